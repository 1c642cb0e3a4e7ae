# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check drafts: their config, tensors, repository and pair, and what serving engines would do with them."""

from .doctor import CheckOptions, DraftReport, check_draft
from .engines import ENGINES, Engine, EngineVerdict, verdicts
from .remarks import Remark

__all__ = [
    "ENGINES",
    "CheckOptions",
    "DraftReport",
    "Engine",
    "EngineVerdict",
    "Remark",
    "check_draft",
    "verdicts",
]
