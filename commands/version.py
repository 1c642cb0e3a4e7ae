# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub version`: print versions."""

from .shared import console


def version() -> None:
    """Print the versions to include in a bug report."""
    import huggingface_hub
    import torch
    import transformers

    from ..configuration_dflash import __version__

    modules = (torch, transformers, huggingface_hub)
    console.print(
        f"dflash-hub {__version__}",
        *(f"{module.__name__} {module.__version__}" for module in modules),
        sep=", ",
    )
