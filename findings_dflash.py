# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define a finding: one reason why a file, a draft, a target or an option is refused.

This file travels with every pushed draft. Checks yield findings; loading and decoding raise the first one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ONE_SENTENCE = "{what}; {advice}."
"""A form of a finding's message."""


@dataclass(frozen=True)
class Finding:
    """One reason why something is not supported. As a string it is the message of an error.

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
