# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""dflash-hub: DFlash draft models for Transformers, from and to the Hugging Face Hub.

Importing it registers the configs of all kinds of drafts with `AutoConfig`, and their models with `AutoModel`.
Drafts in the hub layout then load by the Auto classes without `trust_remote_code`, and no downloaded code runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from .configuration_dflash import EXTENSIONS, DFlashConfig, __version__
from .configuration_dflash2 import DFlash2Config
from .configuration_domino import DominoConfig
from .configuration_dspark import DSparkConfig
from .kinds import KINDS
from .layouts import read_layout
from .qwen3_configs import read_qwen3

if TYPE_CHECKING:
    from .generate_dflash import lookup_generate
    from .generation_dflash import DecodeStatistics
    from .modeling_dflash import DFlashDraftModel, Qwen3DFlashDraftModel
    from .modeling_dflash2 import DFlash2DraftModel, Qwen3DFlash2DraftModel
    from .modeling_domino import DominoDraftModel
    from .modeling_dspark import DSparkDraftModel, Qwen3DSparkModel
    from .registry import (
        DFLASH_DRAFT_REGISTRY,
        DFlashDraftSpec,
        build_target_layer_ids,
        dflash_generate,
        load_draft,
        register_dflash_draft,
        resolve_dflash_draft_spec,
    )

# Imported on first use: the base class of all models takes transformers more than a second to import.
_ON_DEMAND = {
    "DFlash2DraftModel": "modeling_dflash2",
    "DFlashDraftModel": "modeling_dflash",
    "DSparkDraftModel": "modeling_dspark",
    "DominoDraftModel": "modeling_domino",
    "Qwen3DFlash2DraftModel": "modeling_dflash2",
    "Qwen3DFlashDraftModel": "modeling_dflash",
    "Qwen3DSparkModel": "modeling_dspark",
    "DFLASH_DRAFT_REGISTRY": "registry",
    "DFlashDraftSpec": "registry",
    "register_dflash_draft": "registry",
    "resolve_dflash_draft_spec": "registry",
    "DecodeStatistics": "generation_dflash",
    "build_target_layer_ids": "registry",
    "dflash_generate": "registry",
    "load_draft": "registry",
    "lookup_generate": "generate_dflash",
}

__all__ = [
    "DFLASH_DRAFT_REGISTRY",
    "DFlash2Config",
    "DFlash2DraftModel",
    "DFlashConfig",
    "DFlashDraftModel",
    "DFlashDraftSpec",
    "DSparkConfig",
    "DSparkDraftModel",
    "DecodeStatistics",
    "DominoConfig",
    "DominoDraftModel",
    "Qwen3DFlash2DraftModel",
    "Qwen3DFlashDraftModel",
    "Qwen3DSparkModel",
    "__version__",
    "build_target_layer_ids",
    "dflash_generate",
    "load_draft",
    "lookup_generate",
    "register_dflash_draft",
    "resolve_dflash_draft_spec",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, and register a model class when it is imported."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    if _ON_DEMAND[name].startswith("modeling_"):
        from .compat_dflash import in_auto_model

        value.register_for_auto_class("AutoModel")
        if in_auto_model(value.config_class):
            AutoModel.register(value.config_class, value, exist_ok=True)
    return value


def __dir__() -> list[str]:
    """Return all public names, including those not imported yet."""
    return sorted({*globals(), *__all__})


def _on_demand(config: Any) -> type:
    """Return a class that stands for the model of `config` in AutoModel's table and imports it on first use."""

    class DraftOnDemand:
        config_class = config

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return __getattr__(config.architecture).from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
            return __getattr__(config.architecture)._from_config(*args, **kwargs)

    return DraftOnDemand


def _register(config: Any) -> None:
    """Register config and model together. With the config alone, AutoModel would run the repository's model code."""
    try:
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, _on_demand(config), exist_ok=True)
    except ValueError as error:
        logging.get_logger(__name__).warning(
            f"This transformers has its own model type {config.model_type!r} ({error}). The Auto classes will use that "
            f"one; {config.architecture}.from_pretrained still uses dflash-hub's."
        )
    config.register_for_auto_class()


def _write_card(*args: Any) -> None:
    """Write a model card; import the code for it only when a draft is saved."""
    from .publishing.card import write_card

    write_card(*args)


def _write_layout(*args: Any, **kwargs: Any) -> list[str]:
    """Write a draft in the layout of another project; import the code for it only then."""
    from .publishing.layouts import write_layout

    return write_layout(*args, **kwargs)


EXTENSIONS.read_layout = read_layout
EXTENSIONS.other_layouts = ("speculators", "muse")
EXTENSIONS.write_layout = _write_layout
EXTENSIONS.write_card = _write_card
EXTENSIONS.read_qwen3 = read_qwen3
for _kind in KINDS.values():
    _register(_kind.config_class)
