# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a DFlash 2 draft in the engines layout by `AutoModel`, as `dflash.py` loads a DFlash draft.

This file travels with every pushed DFlash 2 draft.
"""

from .dflash import DFlashDraftModel as Entry
from .modeling_dflash2 import DFlash2DraftModel as Draft


class DFlash2DraftModel(Entry):
    """Load the draft of `modeling_dflash2`."""

    draft = Draft
