# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train`: pass all options on to the parser in `training_run`."""

import typer


def train(context: typer.Context) -> None:
    """Train a draft: --target ID --data FILE_OR_DATASET --output-dir DIR. Also takes all Trainer options (--help)."""
    from .training_run import train

    train(context.args)
