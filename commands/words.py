# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say in flags what the package says in keywords, since users of the command line have no others."""

import re
from collections.abc import Iterable

_FOR_PYTHON = {
    "spec.build()": "`dflash-hub train`",
    "Add one with register_dflash_draft()": "Train one with `dflash-hub train`",
    "pass a Hub id, a folder, a config or a model": "pass a Hub id or a folder",
}


def flag_of(name: str) -> str:
    """Return the flag of an option: --max-length for max_length."""
    return "--" + name.replace("_", "-")


def in_flags(message: str, options: Iterable[str]) -> str:
    """Return the message with the names of these options as flags.

    Example: "max_length is 1", "pass max_length=2" become "--max-length is 1", "pass --max-length 2". A name that is a
    word, such as loss, counts only where a sentence begins with it, or advises to leave it out.

    Args:
        options: names of the command's options, such as "max_length".
    """
    for words, ours in _FOR_PYTHON.items():
        message = message.replace(words, ours)
    for name in options:
        flag = flag_of(name)
        for pattern, replacement in _patterns(name):
            message = re.sub(pattern, replacement.format(flag=flag), message)
    message = re.sub(r"(--[\w-]+) is True, (but|which)", r"\1 is given, \2", message)
    return re.sub(r"(--[\w-]+) is None", r"\1 is not given", message)


def _patterns(name: str) -> list[tuple[str, str]]:
    """Return how messages write an option of this name, and what stands there in flags."""
    start = r"(?<![\w./'\"-])"
    found = [
        (rf"{start}{name}=(?=[\w\[.'\"])", "{flag} "),
        (rf"{start}{name}=", "{flag}"),
        (rf"(\A|\n- |[.:;] )(The )?{name} (is|are|has|must|needs|compares) ", r"\1{flag} \3 "),
        (rf"([Ll]eave|[Ll]eave out|or) {name}( out|[.,;]|\Z)", r"\1 {flag}\2"),
    ]
    if "_" in name:  # which is no word of a sentence
        found.append((rf"--{name}\b", "{flag}"))
        found.append((rf"{start}(?<!says ){name}(?![\w'\"=/]|\.\w)", "{flag}"))
    return found
