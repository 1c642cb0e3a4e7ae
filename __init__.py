# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""dflash-hub: DFlash draft models for Transformers, from and to the Hugging Face Hub.

Importing it registers the pair `DFlashConfig` / `DFlashDraftModel` with `AutoConfig` and `AutoModel`: drafts in the hub
layout then load by the Auto classes without `trust_remote_code`, and no downloaded code runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from .configuration_dflash import DFlashConfig, __version__

if TYPE_CHECKING:
    from .generation_dflash import DecodeStatistics
    from .modeling_dflash import DFlashDraftModel, Qwen3DFlashDraftModel
    from .registry import (
        DFLASH_DRAFT_REGISTRY,
        DFlashDraftSpec,
        dflash_generate,
        register_dflash_draft,
        resolve_dflash_draft_spec,
    )

# Loaded when first asked for: the base class of every model costs transformers more than a second to import.
_ON_DEMAND = {
    "DFlashDraftModel": "modeling_dflash",
    "Qwen3DFlashDraftModel": "modeling_dflash",
    "DFLASH_DRAFT_REGISTRY": "registry",
    "DFlashDraftSpec": "registry",
    "register_dflash_draft": "registry",
    "resolve_dflash_draft_spec": "registry",
    "DecodeStatistics": "generation_dflash",
    "dflash_generate": "registry",
}

__all__ = [
    "DFLASH_DRAFT_REGISTRY",
    "DFlashConfig",
    "DFlashDraftModel",
    "DFlashDraftSpec",
    "DecodeStatistics",
    "Qwen3DFlashDraftModel",
    "__version__",
    "dflash_generate",
    "register_dflash_draft",
    "resolve_dflash_draft_spec",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    if _ON_DEMAND[name] == "modeling_dflash":
        value.register_for_auto_class("AutoModel")
        if DFlashConfig in AutoModel._model_mapping:
            AutoModel.register(DFlashConfig, value, exist_ok=True)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _DraftOnDemand:
    """Stands for `DFlashDraftModel` in AutoModel's table until a draft is wanted."""

    config_class = DFlashConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("DFlashDraftModel").from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("DFlashDraftModel")._from_config(*args, **kwargs)


def _register() -> None:
    """Config and model together: a registered config alone would mix ours with the repository's model code."""
    try:
        AutoConfig.register(DFlashConfig.model_type, DFlashConfig)
        AutoModel.register(DFlashConfig, _DraftOnDemand, exist_ok=True)
    except ValueError as error:
        logging.get_logger(__name__).warning(
            f"This transformers has a model type {DFlashConfig.model_type!r} of its own ({error}). The Auto classes "
            "will use that one; DFlashDraftModel.from_pretrained still uses dflash-hub's."
        )
    DFlashConfig.register_for_auto_class()


_register()
