# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Parse the commands whose options are dataclasses: `train` and `features`."""

import difflib
from typing import NoReturn

from transformers import HfArgumentParser

from .preflight import Problems


class Parser(HfArgumentParser):
    """Raise errors of one line, because the usage text lists more than a hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def check_words(parser: Parser, argv: list[str], problems: Problems) -> None:
    """Refuse options that there are not.

    Raises:
        ValueError: listing them, and what is missing besides.
    """
    known = [name for action in parser._actions for name in action.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            problems.add(_unknown(name, known, parser.prog))
    if problems.found:
        problems.check(parser.parse_known_args, argv)
        problems.raise_all()


def _unknown(name: str, known: list[str], command: str) -> str:
    """Return the message for an option that there is not, with the one that is spelt most like it."""
    dashed = [one for one in known if one.startswith("--") and "_" not in one]
    alike = difflib.get_close_matches(name.replace("_", "-"), dashed, n=1, cutoff=0.6)
    alike = alike or [one for one in dashed if one.startswith(name)][:1]
    meant = f"did you mean {alike[0]}?" if alike else f"`{command} --help` lists the options."
    return f"{name} is no option of {command.split()[-1]}; {meant}"
