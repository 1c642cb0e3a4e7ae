# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Parse the commands whose options are dataclasses: `train` and `features`."""

from argparse import SUPPRESS, ArgumentError, HelpFormatter
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from shutil import get_terminal_size
from typing import Any, NoReturn

import typer
from transformers import HfArgumentParser

from .mistakes import no_such_option
from .preflight import Problems

_LONGEST = 90
"""Columns of the help at most; longer lines are hard to read."""
_CHOICES = 40
"""Characters of the choices of an option that stand in the help; more are too many."""


class Parser(HfArgumentParser):
    """Raise errors of one line, because the usage text lists more than a hundred options.

    Its help names each option once, with dashes; those of Trainer stand last.
    """

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")

    def format_help(self) -> str:
        formatter = _HelpFormatter(self.prog)
        formatter.add_usage(
            "%(prog)s --target NAME --data FILE_OR_DATASET [options]", [], [], "Usage: "
        )
        names = {name for kind in self.dataclass_types for name in kind.__annotations__} | {"help"}
        known = [one for one in self._actions if one.help != SUPPRESS]
        ours = [one for one in known if one.dest in names]
        for title, actions in (
            ("Options", ours),
            ("Options of transformers' Trainer", [one for one in known if one not in ours]),
        ):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


class _HelpFormatter(HelpFormatter):
    """Write an option with its value, and the help below it where the option is long."""

    def __init__(self, prog: str):
        width = min(get_terminal_size().columns, _LONGEST) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _format_action_invocation(self, action: Any) -> str:
        value = self._value(action)
        return f"{_name(action)} {value}" if value else _name(action)

    def _value(self, action: Any) -> str:
        """Return what stands for the value of an option."""
        if action.nargs == 0:
            return ""
        if action.choices is not None and len(",".join(map(str, action.choices))) <= _CHOICES:
            return "|".join(map(str, action.choices))
        kind = getattr(action.type, "__name__", "")
        shown = {"int": "INT", "float": "NUMBER", "string_to_bool": "true|false"}.get(kind, "TEXT")
        if action.nargs == "?":
            return f"[{shown}]"
        return f"{shown} ..." if action.nargs in ("+", "*") else shown

    def _get_help_string(self, action: Any) -> str:
        help_text = " ".join((action.help or "").split())
        is_told = action.default in (None, False, "", SUPPRESS) or "efault" in help_text
        return help_text if is_told or action.required else f"{help_text} Default: %(default)s."


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


def given_options(parser: Parser, argv: list[str]) -> dict[str, list[str]]:
    """Return the options of a command line by their names, such as num_layers, with the words of their values."""
    known = parser._option_string_actions
    return {known[name].dest: values for name, values, _ in _options(argv) if name in known}


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
