# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The commands of `dflash-hub`, a file for each; `cli` puts them together.

What costs time to import is imported inside a command, so that `--help` waits for none of it.
"""
