# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Train a draft for your own target. Needs `pip install "dflash-hub[train]"`."""

from importlib.util import find_spec

_MISSING = [
    name for name in ("accelerate", "datasets", "matplotlib", "httpx") if find_spec(name) is None
]
if _MISSING:
    raise ImportError(
        f"Training needs {', '.join(_MISSING)}, not installed here: pip install 'dflash-hub[train]'"
    )

from .arguments import DFlashTrainingArguments  # noqa: E402 (after the check above, because its message is clearer)
from .trainer import DFlashTrainer  # noqa: E402

__all__ = ["DFlashTrainer", "DFlashTrainingArguments"]
