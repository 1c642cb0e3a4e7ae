# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub features`: pass all options on to the parser in `features_run`."""

import typer


def features(context: typer.Context) -> None:
    """Write what training reads of the target, once: --target ID --data FILE_OR_DATASET --output-dir DIR. Resumable."""
    from ..training import require

    require("accelerate", "datasets", "matplotlib", purpose="Writing features")
    from .features_run import write_features

    write_features(context.args)
