# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Serve a target and its draft over OpenAI's API, to the user of one machine.

In the order in which a request meets them: `app` (routes), `requests` (their fields), `prompts` (token ids), `choices`
(what is decoded), `waiting` (the queue), `decoding` (batches, through the target's `generate`), `text` (tokens to
text), `answers` (the bodies of responses). `mistakes` says what is wrong with requests.
"""
