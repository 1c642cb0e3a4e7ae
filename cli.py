# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode faster with DFlash draft models: try, find, train and publish them."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from .commands.check import check
from .commands.convert import convert
from .commands.demo import demo
from .commands.drafts import drafts
from .commands.eval import evaluate
from .commands.generate import generate
from .commands.push import push
from .commands.refresh import refresh
from .commands.regenerate import regenerate
from .commands.resolve import resolve
from .commands.serve_with import serve_with
from .commands.train import train
from .commands.version import version
from .commands.words import in_flags

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

# `train` has its own parser, which also prints its help; see commands/training_run.py.
PASS_ALL_OPTIONS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}

app.command()(version)
app.command()(demo)
app.command()(generate)
app.command(name="eval")(evaluate)
app.command()(drafts)
app.command()(resolve)
app.command()(check)
app.command("serve-with")(serve_with)
app.command(context_settings=PASS_ALL_OPTIONS, add_help_option=False)(train)
app.command()(regenerate)
app.command()(convert)
app.command()(push)
app.command()(refresh)


def main() -> None:
    """Run the command line. Expected errors are printed in one line, others with their traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        message = in_flags(str(error), _options(sys.argv[1:]))
        Console(stderr=True).print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
        sys.exit(1)


def _options(words: list[str]) -> list[str]:
    """Return the names of the options of the command that was called."""
    if words[:1] == ["train"]:
        from .commands.training_run import option_names

        return option_names()
    command = typer.main.get_command(app)
    called = getattr(command, "commands", {}).get(next(iter(words), ""))
    return [option.name for option in getattr(called, "params", ())]
