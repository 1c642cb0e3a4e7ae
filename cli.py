# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode faster with DFlash draft models: try, find, train and publish them."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from .commands.check import check
from .commands.convert import convert
from .commands.demo import demo
from .commands.drafts import drafts
from .commands.env import env
from .commands.eval import evaluate
from .commands.features import features
from .commands.generate import generate
from .commands.mistakes import CheckedCommand
from .commands.push import push
from .commands.refresh import refresh
from .commands.regenerate import regenerate
from .commands.resolve import resolve
from .commands.screen import (
    Quiet,
    Verbose,
    errors,
    in_words,
    prose,
    set_level,
    with_levels,
)
from .commands.serve import serve
from .commands.serve_with import serve_with
from .commands.train import train
from .commands.version import print_version, version
from .commands.words import in_flags

app = typer.Typer(
    name="dflash-hub",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode=None,  # its tables cut the names of options where a terminal has 80 columns
)

# `train` and `features` have their own parser, which also prints their help; see commands/training_run.py.
PASS_ALL_OPTIONS: dict[str, Any] = {
    "cls": TyperCommand,
    "add_help_option": False,
    "context_settings": {
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
}


def _add(command: Callable[..., None], name: str | None = None, **settings: Any) -> None:
    """Add a command, with the options that every command takes."""
    summary = (command.__doc__ or "").partition("\n\n")[0]  # which typer would cut
    settings.setdefault("cls", CheckedCommand)
    app.command(name, short_help=summary, **settings)(with_levels(command))


@app.callback()
def every_command(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Take the options that stand before the name of a command."""
    set_level(verbose, quiet)


_add(demo)
_add(generate)
_add(serve)
_add(evaluate, "eval")
_add(drafts)
_add(resolve)
_add(check)
_add(serve_with, "serve-with")
_add(train, **PASS_ALL_OPTIONS)
_add(features, **PASS_ALL_OPTIONS)
_add(regenerate)
_add(convert)
_add(push)
_add(refresh)
_add(env)
_add(version)


def main() -> None:
    """Run the command line. Expected errors are printed in one line, others with their traceback."""
    # A notebook sets it for its own kernel. In another environment, importing matplotlib fails at it, and we need none.
    os.environ.pop("MPLBACKEND", None)
    in_words(lambda message: in_flags(message, option_names(sys.argv[1:])))
    try:
        app(prog_name="dflash-hub")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        message = in_flags(str(error), option_names(sys.argv[1:]))
        prose(errors, f"[red]Error:[/red] {escape(message)}")
        sys.exit(1)


def option_names(words: list[str]) -> list[str]:
    """Return the names of the options of the command that was called."""
    called = _called(words)
    if called == "train":
        from .commands.training_run import option_names

        return option_names()
    if called == "features":
        from .commands import features_run

        return features_run.option_names()
    command = typer.main.get_command(app)
    found = getattr(command, "commands", {}).get(called)
    return [one.name for one in getattr(found, "params", ()) if one.param_type_name == "option"]


def _called(words: list[str]) -> str:
    """Return the name of the command that was called: the first word that is no option."""
    return next((word for word in words if not word.startswith("-")), "")
