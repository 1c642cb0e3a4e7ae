# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a draft in the engines layout by `AutoModel`: its config.json declares Qwen3, and `auto_map` names this file.

This file travels with every pushed draft. Serving engines use a draft class of their own.
"""

from typing import Any

from transformers import Qwen3Config

from .compat_dflash import forget_auto_model
from .modeling_dflash import DFlashDraftModel as Draft


class DFlashDraftModel:
    """Load the draft of `modeling_dflash`. It is no model, so that AutoModel does not use it for Qwen3 configs."""

    config_class = Qwen3Config
    draft: Any = Draft

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # transformers 5.15 registers this class for Qwen3Config: AutoModel would then load every later Qwen3 model of
        # this process as a draft.
        forget_auto_model(Qwen3Config, cls)
        return cls.draft.from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the draft registers itself."""
