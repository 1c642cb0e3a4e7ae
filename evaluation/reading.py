# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read a report that may be partial: what is missing, or of another type than it should be, reads as None."""

from dataclasses import dataclass, field
from typing import Any

from .ways import UNDRAFTED

_GREATEST = 1e18
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def number(value: Any) -> float | None:
    """Return a number of a size that can be measured, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _GREATEST else None  # not with NaN either


def entry(value: Any) -> dict[Any, Any]:
    """Return a dict, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[dict[Any, Any]]:
    """Return the dicts of a list."""
    return [item for item in items(value) if isinstance(item, dict)]


def items(value: Any) -> list[Any]:
    """Return a list, or an empty one for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def words(value: Any) -> str | None:
    """Return the text of a string or a number, or None for anything else."""
    if isinstance(value, str) and value.strip():
        return value
    return None if number(value) is None else f"{value}"


def visible(text: str) -> str:
    """Return `text` with characters that would break a page, or reorder what stands beside them, made visible."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    code = ord(character)
    if code in _BIDI:
        return f"[U+{code:04X}]"
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    broken = 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE
    return "\ufffd" if broken else character


@dataclass(frozen=True)
class Way:
    """Hold one way to decode: what it is, its results and its records."""

    index: int
    label: str
    about: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    of_prompt: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The records of each prompt, by its id."""

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for records in self.of_prompt.values() for record in records]

    @property
    def is_plain(self) -> bool:
        return self.about.get("method") == "plain"

    @property
    def condition(self) -> str:
        """What ways have in common that are compared with each other."""
        return repr([self.about.get(key) for key in ("temperature", "batch_size", "context")])

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per row and step; 1 of plain decoding, whatever its cache."""
        if self.about.get("method") in UNDRAFTED:
            return 1.0
        return number(self.result.get("acceptance_length"))

    @property
    def speedup(self) -> float | None:
        """How many times as fast as plain decoding, pooled over the prompts."""
        return number(self.speedup_entry.get("pooled"))

    @property
    def speedup_entry(self) -> dict[str, Any]:
        return entry(self.result.get("speedup"))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The lower and the upper end of the speed-up's interval."""
        low, high = number(self.speedup_entry.get("low")), number(self.speedup_entry.get("high"))
        return None if low is None or high is None else (low, high)

    @property
    def milliseconds_per_token(self) -> float | None:
        seconds = number(self.result.get("seconds_per_token"))
        return None if seconds is None else 1000 * seconds

    @property
    def floor_milliseconds_per_token(self) -> float | None:
        """The physical floor of one step, shared by the tokens that a step commits in all rows."""
        seconds = number(self.result.get("floor_seconds_per_step"))
        rows = number(self.about.get("batch_size")) or 1
        if seconds is None or not self.acceptance_length:
            return None
        return 1000 * seconds / (self.acceptance_length * rows)


@dataclass(frozen=True)
class Reading:
    """Hold what a page shows of a report."""

    report: dict[str, Any]
    ways: list[Way]
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By id, in the order of the report."""

    @property
    def is_complete(self) -> bool:
        return self.report.get("complete") is True

    @property
    def drafted(self) -> list[Way]:
        """The ways that are compared with plain decoding."""
        return [way for way in self.ways if not way.is_plain]

    def part(self, name: str) -> dict[str, Any]:
        """Return a dict of the report, or an empty one."""
        return entry(self.report.get(name))

    @property
    def recommended(self) -> Way | None:
        """The way that the report recommends first; without a recommendation, the one with the greatest speed-up."""
        chosen = self.part("recommendation").get("way")
        for way in self.ways:
            if type(chosen) is int and way.index == chosen:
                return way
        return fastest(self.drafted)

    @property
    def headlined(self) -> Way | None:
        """The way with a draft to tell of first: the recommended one, else the fastest under the same condition."""
        way = self.recommended
        if way is None or not way.is_plain:
            return way
        return fastest(
            [other for other in self.drafted if other.about.get("baseline") in (None, way.index)]
        )


def fastest(ways: list[Way]) -> Way | None:
    """Return the way with the greatest speed-up; None if none was timed."""
    timed = [way for way in ways if way.speedup is not None]
    return max(timed, key=lambda way: way.speedup or 0.0, default=None)


def read(report: dict[str, Any]) -> Reading:
    """Return what a page shows of `report`."""
    abouts = entries(report.get("ways"))
    ways = [Way(i, label, abouts[i]) for i, label in enumerate(_labels(abouts))]
    for result in _of_ways(report.get("results"), len(ways)):
        ways[result["way"]].result.update(result)
    for record in _of_ways(report.get("records"), len(ways)):
        of_prompt = ways[record["way"]].of_prompt
        of_prompt.setdefault(str(record.get("prompt")), []).append(record)
    return Reading(report, ways, _prompts(report))


def _of_ways(value: Any, count: int) -> list[dict[str, Any]]:
    """Return the dicts of a list whose "way" is one of the `count` ways."""
    found = [item for item in entries(value) if type(item.get("way")) is int]
    return [item for item in found if 0 <= item["way"] < count]


def _prompts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the prompts by id, with those that only records name."""
    found = {str(item.get("id")): item for item in entries(report.get("prompts"))}
    for record in entries(report.get("records")):
        found.setdefault(str(record.get("prompt")), {})
    return found


def _labels(abouts: list[dict[str, Any]]) -> list[str]:
    """Return a name for each way: its own, with its number if another way has the same."""
    labels = []
    for index, about in enumerate(abouts):
        names = (words(about.get(key)) for key in ("name", "draft", "method"))
        label = next(filter(None, names), f"way {index}")
        labels.append(f"{label} ({index})" if label in labels else label)
    return labels
