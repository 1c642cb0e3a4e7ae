# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find all mistakes of a command line, where typer tells the first."""

import difflib
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

UsageError: Any = typer.BadParameter.__bases__[0]
"""Of click, of which newer versions of typer have a copy."""
_IN_OUR_WORDS = {
    "Input should": "it must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
_of_values: list[str] = []
"""What is wrong with values of options on the command line that was read last."""


def of_values() -> list[str]:
    """Return what is wrong with values of options, once; the command lists it with what it finds itself."""
    found = list(_of_values)
    _of_values.clear()
    return found


class CheckedCommand(TyperCommand):
    """Tell all that is wrong with a command line at once.

    Where only values of options are wrong, the command runs with the defaults in their place, as far as to its
    `Problems`, which begin with these mistakes.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _of_values.clear()
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            found = _Mistakes(self, ctx, words)
            if found.words or not found.values:
                raise UsageError(listed(found.told() or [error.format_message()]), ctx) from error
            _of_values.extend(found.values)
            return []


class _Mistakes:
    """Collect the mistakes of a command line.

    Args:
        command: that was called.
        words: after its name.
    """

    def __init__(self, command: CheckedCommand, ctx: Any, words: list[str]):
        self.words: list[str] = []
        """Of words that are no options, or are missing, or too many."""
        self.values: list[str] = []
        """Of values of options."""
        parameters: list[Any] = command.get_params(ctx)
        names = [name for one in parameters for name in (*one.opts, *one.secondary_opts)]
        self.options = [name for name in names if name.startswith("--")]
        self.path = ctx.command_path
        given, rest = self._parsed(command.make_parser(ctx), words)
        has_unknown = bool(self.words)
        for one in parameters:
            try:
                _, rest = one.handle_parse_result(ctx, given, rest)
            except UsageError as error:
                value = given.get(one.name)
                if value is None and not has_unknown:
                    self.words.append(f"{_name(one)} is missing: {one.help}")
                elif value is not None:
                    self.values.append(f"{_name(one)} is {_shown(value)}; {_reason(error)}")
                ctx.params[one.name] = one.get_default(ctx)
        if rest and not has_unknown:
            self.words.append(
                f"{' '.join(rest)} is more than {command.name} takes; quote texts with spaces."
            )

    def _parsed(self, parser: Any, words: list[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the words of each option, and what is left; words that are no options are left out."""
        while True:
            try:
                return parser.parse_args(args=list(words))[:2]
            except UsageError as error:
                name = getattr(error, "option_name", "")
                message = f"{error.format_message().rstrip('.')}."
                if hasattr(error, "possibilities"):  # of an option that there is not
                    message = no_such_option(name, self.options, self.path)
                self.words.append(message)
                kept = [word for word in words if word.partition("=")[0] != name]
                if len(kept) == len(words):
                    return {}, []
                words = kept

    def told(self) -> list[str]:
        """Return all mistakes."""
        return self.words + self.values


def no_such_option(name: str, options: Sequence[str], command: str) -> str:
    """Return the message for an option that there is not, with the one that is spelt most like it.

    Args:
        options: that there are.
        command: as it is typed, such as "dflash-hub train".
    """
    alike = difflib.get_close_matches(name.replace("_", "-"), options, n=1, cutoff=0.6)
    alike = alike or [one for one in options if one.startswith(name)][:1]
    meant = f"did you mean {alike[0]}?" if alike else f"`{command} --help` lists the options."
    return f"{name} is no option of {command.split()[-1]}; {meant}"


def _name(parameter: Any) -> str:
    """Return the name of a parameter as users type it, or as the help writes it."""
    is_option = parameter.param_type_name == "option"
    return max(parameter.opts, key=len) if is_option else parameter.name.upper()


def _shown(value: Any) -> str:
    """Return what was typed."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reason(error: Any) -> str:
    """Return why a value is wrong, as a part of a sentence."""
    said = str(error.message).strip().rstrip(".") + "."
    for theirs, ours in _IN_OUR_WORDS.items():
        said = said.replace(theirs, ours)
    return said


def listed(mistakes: list[str]) -> str:
    """Return one or several mistakes as a message; further lines of one are indented."""
    if len(mistakes) == 1:
        return mistakes[0]
    lines = ["- " + one.replace("\n", "\n  ") for one in mistakes]
    return "\n".join([f"{len(mistakes)} things are wrong:", *lines])
