# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Training a draft for one's own target: `pip install "dflash-hub[train]"`."""

from importlib.util import find_spec

if find_spec("accelerate") is None or find_spec("datasets") is None:
    raise ImportError(
        "Training needs accelerate and datasets, which are not installed: pip install 'dflash-hub[train]'"
    )

from .arguments import DFlashTrainingArguments
from .trainer import DFlashTrainer

__all__ = ["DFlashTrainer", "DFlashTrainingArguments"]
