# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define a finding: one reason why a file, a draft, a target or an option is refused.

This file travels with every pushed draft. Checks yield findings; loading and decoding raise the first one. Errors of
other libraries are raised again, with what was asked and what to do.
"""

import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

_OF_FOLDERS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
"""Errors of a folder, or of a disk: neither name nor connection is at fault."""
_THEIR_ADVICE = "Check your internet connection"
"""Begins a line of transformers' errors that says what ours say in other words."""
ONE_SENTENCE = "{what}; {advice}."
"""A form of a finding's message."""


@dataclass(frozen=True)
class Finding:
    """Hold one reason why something is not supported. As a string it is the message of an error.

    Args:
        form: the message, with a place for `what` and one for `advice`.
    """

    what: str
    found: Any
    expected: Any
    advice: str
    form: str = "{what}. {advice}."

    def __str__(self) -> str:
        return self.form.format(what=self.what, advice=self.advice)

    def error(self) -> ValueError:
        return ValueError(str(self))


def must(what: str, found: Any, right: str, verb: str = "be") -> Finding:
    """Return a finding with the message "{what}; it must {verb} {right}."."""
    return Finding(what, found, right, f"it must {verb} {right}", ONE_SENTENCE)


def raise_first(findings: Iterable[Finding]) -> None:
    """Raise the first finding, if there is one.

    Raises:
        ValueError: with what is wrong and what to do.
    """
    for finding in findings:
        raise finding.error()


def check_path(argument: str, value: Any) -> None:
    """Refuse what is neither a name nor a path; libraries take a number for an open file.

    Raises:
        ValueError: with the argument.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(
            f"{argument} is {value!r}; it must be a folder or the name of a repository."
        )


@contextmanager
def explained(asked: str, advice: str) -> Iterator[None]:
    """Raise an error of another library again, between what was asked and what to do.

    Raises:
        OSError, ImportError, RuntimeError: the error was one; a request that failed is an OSError.
        ValueError: it was any other.
    """
    try:
        yield
    except Exception as error:
        if _is_ours(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        known: dict[type[Exception], Any] = {
            OSError: (OSError, HTTPError),
            ImportError: ImportError,
            RuntimeError: RuntimeError,
        }
        kind = next((kind for kind, those in known.items() if isinstance(error, those)), ValueError)
        raise kind(f"{asked}: {reason(error)}\n{advice_on(error, advice)}") from error


def explained_for(
    argument: str, verb: str, advice: str, check: Callable[[str, Any], None] | None = check_path
) -> Callable[[Callable], Callable]:
    """Return a decorator: `explained` for a function whose first argument is a path or the name of a repository.

    Args:
        argument: its name.
        verb: what the function does with it, as in "org/draft could not be loaded".
        check: called with the name and the value; None if the function checks it.
    """

    def decorate(function: Callable) -> Callable:
        is_method = next(iter(_names(function))) in ("self", "cls")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[is_method:]
            value = given[0] if given else kwargs.get(argument)
            if check is not None:
                check(argument, value)
            with explained(f"{value} could not be {verb}", advice):
                return function(*args, **kwargs)

        return call

    return decorate


def reason(error: BaseException) -> str:
    """Return the message of an error, and after how many seconds to ask the Hub again, where it names them."""
    lines = (str(error) or type(error).__name__).splitlines()
    message = "\n".join(line for line in lines if not line.startswith(_THEIR_ADVICE))
    if _THEIR_ADVICE in str(error) and constants.HF_HUB_OFFLINE:
        message += " HF_HUB_OFFLINE is set; without it the Hub is asked."
    cause: BaseException | None = error
    while cause is not None:
        headers = getattr(getattr(cause, "response", None), "headers", {})
        seconds = str(headers.get("Retry-After", ""))
        if seconds.isdigit():
            return f"{message}\nThe Hub asks to wait {seconds} seconds."
        cause = cause.__cause__
    return message


def advice_on(error: BaseException, advice: str) -> str:
    """Return what to do after an error: `advice`, unless a folder, a disk or a missing package is at fault."""
    if isinstance(error, ImportError):
        return PACKAGES
    return FOLDERS if isinstance(error, OSError) and error.errno in _OF_FOLDERS else advice


def _names(function: Callable) -> tuple[str, ...]:
    """Return the names of the positional arguments."""
    return function.__code__.co_varnames


def _is_ours(error: Exception) -> bool:
    """Return whether a check of ours raised this error; a warning counts too."""
    checks = (ValueError, OSError, TypeError, RuntimeError, ImportError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    ours = module.startswith(f"{__name__.rpartition('.')[0]}.")
    return isinstance(error, Warning) or (ours and isinstance(error, checks))


LOADING = (
    "Check name, revision and connection, and run the same again. For a private or gated repository, log in: "
    "hf auth login, or HF_TOKEN."
)
SAVING = "Pass a folder that can be written, and options as in PreTrainedModel.save_pretrained."
FOLDERS = "Pass a folder that can be read and written, with room left. Downloads go to HF_HOME, or to cache_dir=."
PACKAGES = "Install what is named there into this environment, and run the same again."
PUSHING = "Nothing was pushed. Pass the options as in PreTrainedModel.push_to_hub."
"""What to do after an error of another library."""
