# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Train a draft for your own target. Needs `pip install "dflash-hub[train]"`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import DFlashTrainingArguments
    from .trainer import DFlashTrainer

__all__ = ["DFlashTrainer", "DFlashTrainingArguments", "require"]


def require(*modules: str, purpose: str) -> None:
    """Check that these modules can be imported.

    Raises:
        ImportError: naming those that are missing, and the extra that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {', '.join(missing)}, not installed here: pip install 'dflash-hub[train]'"
        )


def __getattr__(name: str) -> Any:
    """Import the trainer when it is asked for: regenerating answers needs less than training."""
    if name not in ("DFlashTrainer", "DFlashTrainingArguments"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("accelerate", "datasets", "matplotlib", purpose="Training")
    from . import arguments, trainer

    found = {
        "DFlashTrainer": trainer.DFlashTrainer,
        "DFlashTrainingArguments": arguments.DFlashTrainingArguments,
    }
    return found[name]
