# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Make the Auto classes of transformers know the drafts, and the configs of drafts know every layout.

Both need torch, and the command line lists drafts without it. So they are done when the module that they change is
first imported, by whomever.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

from .kinds import KINDS, DraftKind


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call `then` once a module has been imported: now, if it has been already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch(MetaPathFinder):
    """Find one module as the other finders do, and call a function after its first import."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the other finders find it
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_call(module: Any) -> None:
            execute(module)
            self.then()

        loader.exec_module = execute_and_call
        return spec


_CONFIGS: set[str] = set()
"""The kinds whose config AutoConfig knows."""


def register_configs() -> None:
    """Register the config of every kind with AutoConfig."""
    from transformers import AutoConfig
    from transformers.utils import logging

    for kind in KINDS.values():
        try:
            AutoConfig.register(kind.name, kind.config_class)
            _CONFIGS.add(kind.name)
        except ValueError as error:
            logging.get_logger(__name__).warning(
                f"This transformers has its own model type {kind.name!r} ({error}). The Auto classes will use that "
                f"one; {kind.reader}.from_pretrained still uses dflash-hub's."
            )
        kind.config_class.register_for_auto_class()


def register_models() -> None:
    """Register a model with AutoModel for each config; without one, it would run the repository's model code."""
    from transformers import AutoModel

    for kind in KINDS.values():
        if kind.name in _CONFIGS:
            AutoModel.register(kind.config_class, _on_demand(kind), exist_ok=True)


def _on_demand(kind: DraftKind) -> type:
    """Return a class that stands for the model of a kind in AutoModel's table and imports it on first use."""

    class DraftOnDemand:
        config_class = kind.config_class

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return registered_model(kind.model_class).from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
            return registered_model(kind.model_class)._from_config(*args, **kwargs)

    return DraftOnDemand


def registered_model(model_class: Any) -> Any:
    """Put a model class into AutoModel's table, in place of the one that stands for it; return it."""
    from transformers import AutoModel

    from .compat_dflash import in_auto_model

    model_class.register_for_auto_class("AutoModel")
    if in_auto_model(model_class.config_class):
        AutoModel.register(model_class.config_class, model_class, exist_ok=True)
    return model_class


def extend_configs() -> None:
    """Give the configs of drafts what stays at home: other projects' layouts, and the model card."""
    from .configuration_dflash import EXTENSIONS

    EXTENSIONS.read_layout = _read_layout
    EXTENSIONS.other_layouts = ("speculators", "muse")
    EXTENSIONS.write_layout = _write_layout
    EXTENSIONS.write_card = _write_card
    EXTENSIONS.read_qwen3 = _read_qwen3


def _read_layout(*args: Any) -> dict[str, Any]:
    """Read a config.json in any layout; import the code for it only then."""
    from .layouts import read_layout

    return read_layout(*args)


def _read_qwen3(*args: Any) -> Any:
    """Read a config of the reference implementation; import the code for it only then."""
    from .qwen3_configs import read_qwen3

    return read_qwen3(*args)


def _write_card(*args: Any) -> None:
    """Write a model card; import the code for it only when a draft is saved."""
    from .publishing.card import write_card

    write_card(*args)


def _write_layout(*args: Any, **kwargs: Any) -> list[str]:
    """Write a draft in the layout of another project; import the code for it only then."""
    from .publishing.layouts import write_layout

    return write_layout(*args, **kwargs)


def register() -> None:
    """Do all this as soon as what it changes is imported."""
    when_imported(f"{__package__}.configuration_dflash", extend_configs)
    when_imported("transformers.models.auto.configuration_auto", register_configs)
    when_imported("transformers.models.auto.modeling_auto", register_models)
