# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""dflash-hub: DFlash draft models for Transformers, from and to the Hugging Face Hub.

Importing it registers the configs of all kinds of drafts with `AutoConfig`, and their models with `AutoModel`, as soon
as these are imported. Drafts in the hub layout then load by the Auto classes without `trust_remote_code`, and no
downloaded code runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, registered_model
from .versions import __version__

if TYPE_CHECKING:
    from .configuration_dflash import DFlashConfig
    from .configuration_dflash2 import DFlash2Config
    from .configuration_domino import DominoConfig
    from .configuration_dspark import DSparkConfig
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

# Imported on first use: torch and transformers take seconds, and the command line lists drafts without them.
_ON_DEMAND = {
    "DFlash2Config": "configuration_dflash2",
    "DFlashConfig": "configuration_dflash",
    "DSparkConfig": "configuration_dspark",
    "DominoConfig": "configuration_domino",
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
    value = getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    if _ON_DEMAND[name].startswith("modeling_"):
        registered_model(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return all public names, including those not imported yet."""
    return sorted({*globals(), *__all__})


register()
