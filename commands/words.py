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


def in_flags(message: str, options: Iterable[str]) -> str:
    """Return the message with the names of these options as flags.

    Example: "max_length is 1", "pass max_length=2" become "--max-length is 1", "pass --max-length 2".

    Args:
        options: names of the command's options, such as "max_length".
    """
    for words, ours in _FOR_PYTHON.items():
        message = message.replace(words, ours)
    for name in options:
        flag = "--" + name.replace("_", "-")
        message = re.sub(rf"(?<![\w.-]){name}=(?=[\w\[.])", f"{flag} ", message)
        message = re.sub(rf"(?<![\w.-]){name}=", flag, message)
        message = re.sub(rf"(\A|[.:;] )(The )?{name} (is|must) ", rf"\1{flag} \3 ", message)
    return message
