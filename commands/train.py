# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train`: the options are the Trainer's and a few of ours, all read by its parser."""

import typer


def train(context: typer.Context) -> None:
    """Train a draft: --target ID --data FILE_OR_DATASET --output-dir DIR, and the Trainer's own options (--help)."""
    from .training_run import train

    train(context.args)
