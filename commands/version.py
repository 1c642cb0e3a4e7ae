# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub version`: print versions."""

import typer

from ..versions import __version__, version_of

PACKAGES = ("torch", "transformers", "huggingface_hub")


def version() -> None:
    """Print the versions; `dflash-hub env` prints all that a bug report needs."""
    found = [f"{name} {version_of(name) or 'missing'}" for name in PACKAGES]
    typer.echo(", ".join([f"dflash-hub {__version__}", *found]))


def print_version(asked: bool) -> None:
    """Print the version of this package and end, where `--version` is given."""
    if asked:
        typer.echo(f"dflash-hub {__version__}")
        raise typer.Exit
