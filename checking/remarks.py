# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define a remark: a finding about a draft, with its section and how serious it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..findings_dflash import Finding

ERROR = "error"
WARNING = "warning"
NOTE = "note"
STATUS = {ERROR: 2, WARNING: 1, NOTE: 0}
"""How serious a remark is, and the exit status that it leads to."""


@dataclass(frozen=True)
class Remark:
    """Hold a finding about a draft.

    Args:
        section: of the report: config, tensors, repository, pair or run.
        level: "error": the draft does not work. "warning": it works, perhaps worse than it could. "note": no fault.
        name: of the check, the same in every release; for machines.
    """

    section: str
    level: str
    name: str
    finding: Finding

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        place = {"section": self.section, "level": self.level, "name": self.name}
        return place | finding_as_dict(self.finding)


def finding_as_dict(finding: Finding) -> dict[str, Any]:
    """Return a finding as values that JSON can hold."""
    return {
        "what": finding.what,
        "found": as_json(finding.found),
        "expected": as_json(finding.expected),
        "advice": finding.advice,
    }


def as_json(value: Any) -> Any:
    """Return a value as JSON can hold it; what it cannot hold becomes text."""
    if isinstance(value, dict):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(one) for one in value]
    finite = not isinstance(value, float) or abs(value) < float("inf")
    plain = isinstance(value, str | int | float | bool | None) and finite
    return value if plain else str(value)


class Section:
    """Make the remarks of one section of a report."""

    def __init__(self, name: str):
        self.name = name

    def error(self, name: str, *finding: Any) -> Remark:
        return Remark(self.name, ERROR, name, Finding(*finding))

    def warning(self, name: str, *finding: Any) -> Remark:
        return Remark(self.name, WARNING, name, Finding(*finding))

    def note(self, name: str, *finding: Any) -> Remark:
        return Remark(self.name, NOTE, name, Finding(*finding))

    def errors(self, name: str, findings: Iterable[Finding]) -> Iterator[Remark]:
        """Yield each finding as an error."""
        for finding in findings:
            yield Remark(self.name, ERROR, name, finding)


def status_of(remarks: Iterable[Remark]) -> int:
    """Return the exit status: 0 good, 1 works with warnings, 2 broken."""
    return max((STATUS[remark.level] for remark in remarks), default=0)


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first of these names in a sentence, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
