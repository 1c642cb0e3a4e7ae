# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What `auto_map` names in the engines layout, whose config.json passes for a Qwen3 config.

This file travels with every pushed draft. Serving engines bring their own draft class; `AutoModel` comes here.
"""

from typing import Any

from transformers import Qwen3Config

from .compat_dflash import forget_auto_model
from .modeling_dflash import DFlashDraftModel as Draft


class DFlashDraftModel:
    """Loads the draft of `modeling_dflash`. It is no model itself, so that Qwen3 configs stay Qwen3's."""

    config_class = Qwen3Config
    draft: Any = Draft

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Older versions (5.15 is one) register what auto_map names for the config's class: every Qwen3 model that
        # AutoModel loads later in this process would then be taken for a draft.
        forget_auto_model(Qwen3Config, cls)
        return cls.draft.from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the draft registers itself."""
