# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The command `dflash-hub`: one thin command for each thing the package does."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from .commands.demo import demo
from .commands.drafts import drafts
from .commands.generate import generate
from .commands.push import push
from .commands.refresh import refresh
from .commands.regenerate import regenerate
from .commands.resolve import resolve
from .commands.train import train
from .commands.version import version

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

# The options of `train` are the Trainer's: its own parser reads them, and prints its help.
TRAINERS_OWN = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app.command()(version)
app.command()(demo)
app.command()(generate)
app.command()(drafts)
app.command()(resolve)
app.command(context_settings=TRAINERS_OWN, add_help_option=False)(train)
app.command()(regenerate)
app.command()(push)
app.command()(refresh)


def main() -> None:
    """Run the command line; errors that a user can mend are printed without a traceback, others with it."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
