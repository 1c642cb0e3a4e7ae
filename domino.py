# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a Domino draft in the engines layout by `AutoModel`, as `dflash.py` loads a DFlash draft.

This file travels with every pushed Domino draft.
"""

from .dflash import DFlashDraftModel as Entry
from .modeling_domino import DominoDraftModel as Draft


class DominoDraftModel(Entry):
    """Load the draft of `modeling_domino`."""

    draft = Draft
