# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Publish drafts (`push`), and update the code of published ones (`refresh`)."""

from .push import Plan, Published, PublishOptions, plan, publish

__all__ = ["Plan", "PublishOptions", "Published", "plan", "publish"]
