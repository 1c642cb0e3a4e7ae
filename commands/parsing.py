# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Parse the commands whose options are dataclasses: `train` and `features`."""

from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

import typer
from transformers import HfArgumentParser

from .mistakes import no_such_option
from .preflight import Problems


class Parser(HfArgumentParser):
    """Raise errors of one line, because the usage text lists more than a hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def parsed(parser: Parser, argv: list[str], problems: Problems) -> list[Any]:
    """Return what a command line says, in each of the parser's dataclasses; None for one whose values are refused.

    Raises:
        ValueError: a word is no option, a value cannot be read, or something is missing; lists all that is wrong.
    """
    if {"-h", "--help"}.intersection(argv):
        parser.print_help()
        raise typer.Exit
    actions = parser._option_string_actions
    dashed = [name for name in actions if name.startswith("--") and "_" not in name]
    words: list[str] = []
    wrong_values: list[str] = []
    for name, values, whole in _options(argv):
        action: Any = actions.get(name)
        if action is None and name:
            problems.add(no_such_option(name, dashed, parser.prog))
        elif action is not None and (wrong := _wrong_value(parser, action, values)):
            wrong_values.append(wrong)
        else:
            words += whole
    names = _missing(parser, argv)
    if names:
        problems.add(f"These options are missing: {', '.join(names)}.")
    is_readable = not problems.found
    for one in wrong_values:
        problems.add(one)
    if not is_readable:
        problems.raise_all()
    given = vars(parser.parse_args(words))
    made = []
    for kind in parser.dataclass_types:
        values_of_kind = {one.name: given[one.name] for one in fields(kind) if one.init}
        made.append(problems.check(partial(kind, **values_of_kind)))
    return made


def _missing(parser: Parser, argv: list[str]) -> list[str]:
    """Return the options that must be given, and are not."""
    given = {word.partition("=")[0] for word in argv}
    required = [one for one in parser._actions if one.required]
    return [_name(one) for one in required if not given.intersection(one.option_strings)]


def _options(argv: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each option of a command line, its values, and all of its words; first, those before any option."""
    name = ""
    values: list[str] = []
    whole: list[str] = []
    for word in argv:
        if word.startswith("--"):
            yield name, values, whole
            name = word.partition("=")[0]
            values = [word.removeprefix(f"{name}=")] if name != word else []
            whole = [word]
        else:
            values.append(word)
            whole.append(word)
    yield name, values, whole


def _name(action: Any) -> str:
    """Return the name of an option, with dashes."""
    return max(action.option_strings, key=lambda name: name.count("-"))


def _wrong_value(parser: Parser, action: Any, values: list[str]) -> str | None:
    """Return the message for values that an option does not take."""
    try:
        count = parser._match_argument(action, "A" * len(values))
        parser._get_values(action, values[:count])
    except ArgumentError as error:
        shown = f"{_name(action)} is {' '.join(values)}" if values else _name(action)
        return f"{shown}: {error.message}."
    return None
