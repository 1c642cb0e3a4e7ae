# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Let `dflash-hub train --features DIR` do without the options that features were written with."""

import argparse

from ..training.feature_data import open_features
from ..training.feature_setup import FROM_FEATURES


def take_from_features(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Make the values of the features the defaults of a parser, if the command line names features.

    Raises:
        ValueError, OSError: they cannot be read.
    """
    name = _value_of("--features", argv)
    if name is None:
        return
    origin = open_features(name).origin
    parser.set_defaults(**{option: getattr(origin, option) for option in FROM_FEATURES})
    parser.set_defaults(target="", data="")
    for action in parser._actions:
        if action.dest in ("target", "data"):
            action.required = False


def _value_of(option: str, argv: list[str]) -> str | None:
    """Return the value of an option on a command line; None without it."""
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
