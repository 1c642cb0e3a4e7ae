# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub version`."""

from .shared import console


def version() -> None:
    """Print the versions that matter in a bug report."""
    import huggingface_hub
    import torch
    import transformers

    from ..configuration_dflash import __version__

    modules = (torch, transformers, huggingface_hub)
    console.print(
        f"dflash-hub {__version__}", *(f"{m.__name__} {m.__version__}" for m in modules), sep=", "
    )
