# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say what each chart of a report shows, apart from how it is drawn."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .reading import Reading, Way, entry, items, number

SETTINGS = {
    "block_size": ("block size", "block {:g}"),
    "temperature": ("temperature", "temperature {:g}"),
    "batch_size": ("batch size", "batches of {:g}"),
    "context": ("context", "context {:,}"),
}
"""What ways with one draft may differ in: its name, and how the name of a way has its value."""
PARTS = ("prefill", "draft", "verify", "rest")
_NO_SETTINGS = ("name", "baseline", "bytes_per_step")
TIMES = "\u00d7"
MOST_LINES = 4
"""Lines that one chart can hold and readers can still distinguish."""


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    words: str
    """The value as it is shown beside the bar."""
    interval: tuple[float, float] | None = None
    floor: float | None = None
    is_plain: bool = False


@dataclass(frozen=True)
class Bars:
    """Hold horizontal bars from zero."""

    title: str
    bars: list[Bar]
    note: str = ""
    reference: float | None = None
    """A line across all bars, at plain decoding."""

    @property
    def description(self) -> str:
        return "; ".join(f"{bar.label}: {bar.words}" for bar in self.bars)


@dataclass(frozen=True)
class Columns:
    """Hold a histogram: shares of 1 by label, with the count of each."""

    title: str
    labels: list[str]
    counts: list[float]
    x_label: str
    y_label: str
    note: str = ""

    @property
    def shares(self) -> list[float]:
        whole = sum(self.counts)
        return [count / whole for count in self.counts]

    @property
    def description(self) -> str:
        rows = zip(self.labels, self.counts, self.shares, strict=True)
        return "; ".join(f"{label}: {count:g} ({share:.1%})" for label, count, share in rows)


@dataclass(frozen=True)
class Line:
    label: str
    points: list[tuple[str, float]]
    """x as its label among `Lines.ticks`, and y."""
    intervals: list[tuple[float, float] | None]

    @property
    def description(self) -> str:
        return f"{self.label}: " + ", ".join(f"{x}: {y:.3g}" for x, y in self.points)


@dataclass(frozen=True)
class Lines:
    """Hold lines over ordered values that stand at equal distances."""

    title: str
    ticks: list[str]
    lines: list[Line]
    x_label: str
    y_label: str
    is_share: bool = False
    reference: float | None = None
    note: str = ""

    @property
    def description(self) -> str:
        return "; ".join(line.description for line in self.lines)


@dataclass(frozen=True)
class Stack:
    """Hold bars that are split into parts, shares of 1."""

    title: str
    parts: tuple[str, ...]
    rows: list[tuple[str, list[float]]]
    note: str = ""

    @property
    def description(self) -> str:
        return "; ".join(f"{label}: {self.of_row(shares)}" for label, shares in self.rows)

    def of_row(self, shares: list[float]) -> str:
        rows = zip(self.parts, shares, strict=True)
        return ", ".join(f"{part} {share:.0%}" for part, share in rows)


Chart = Bars | Columns | Lines | Stack


def conditions(reading: Reading) -> list[list[Way]]:
    """Return the ways in groups that are compared with each other; first the group of the headline."""
    groups: dict[str, list[Way]] = {}
    for way in reading.ways:
        groups.setdefault(way.condition, []).append(way)
    return sorted(groups.values(), key=lambda group: reading.headlined not in group)


def charts_of_condition(ways: list[Way]) -> dict[str, Chart]:
    """Return the charts that compare ways, by the name of their file. Those without any data are left out."""
    charts = {
        "speed_up": speed_up(ways),
        "time_per_token": time_per_token(ways),
        "time_split": time_split(ways),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def charts_of_settings(reading: Reading) -> dict[str, Chart]:
    """Return the charts over each setting of which there are several values, by the name of their file."""
    charts = {f"by_{key}": by_setting(reading, key) for key in SETTINGS}
    return {name: chart for name, chart in charts.items() if chart is not None}


def charts_of_way(way: Way) -> dict[str, Chart]:
    """Return the charts of one way, by the name of their file. Those without any data are left out.

    Plain decoding has none: it commits one token in each step.
    """
    if way.is_plain:
        return {}
    charts = {
        "tokens_per_cycle": tokens_per_cycle(way),
        "acceptance_by_position": acceptance_by_position(way),
        "speed_up_by_category": by_category(way),
        "acceptance_by_category": acceptance_by_category(way),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def speed_up(ways: list[Way]) -> Chart | None:
    """Show how many times as fast as plain decoding each way is."""
    bars = []
    for way in ways:
        if way.speedup is not None and not way.is_plain:
            shown = times(way.speedup, way.interval)
            bars.append(Bar(way.label, way.speedup, shown, way.interval))
    if not bars:
        return None
    note = "Thin line: the interval. Dashed: plain decoding."
    return Bars("Speed-up over plain decoding", bars, note, reference=1.0)


def times(value: float, interval: tuple[float, float] | None = None) -> str:
    """Return a speed-up in characters, with its interval."""
    shown = f"{value:.2f}{TIMES}"
    return shown if interval is None else f"{shown} [{interval[0]:.2f}, {interval[1]:.2f}]"


def time_per_token(ways: list[Way]) -> Chart | None:
    """Show the time that each way takes for a token, and the physical floor of it."""
    bars = []
    for way in ways:
        value, floor = way.milliseconds_per_token, way.floor_milliseconds_per_token
        if value is not None:
            shown = milliseconds(value)
            if floor is not None:
                shown = f"{shown}, floor {milliseconds(floor)}"
            bars.append(Bar(way.label, value, shown, floor=floor, is_plain=way.is_plain))
    if not bars:
        return None
    note = "Shorter is faster."
    if any(bar.floor is not None for bar in bars):
        note += " Orange tick: the physical floor, the time to read weights, keys and values."
    return Bars("Time per token", bars, note)


def milliseconds(value: float) -> str:
    """Return milliseconds in characters, with three digits."""
    digits = max(2 - int(value >= 10) - int(value >= 100), 0)
    return f"{value:.{digits}f} ms"


def time_split(ways: list[Way]) -> Chart | None:
    """Show where the time of each way goes."""
    rows = []
    for way in ways:
        split = entry(way.result.get("time_split"))
        values = [max(number(split.get(part)) or 0.0, 0.0) for part in PARTS]
        if sum(values):
            rows.append((way.label, [value / sum(values) for value in values]))
    note = "Where draft and verify were not timed apart, all but the prefill is the rest."
    return Stack("Where the time goes", PARTS, rows, note) if rows else None


def tokens_per_cycle(way: Way) -> Chart | None:
    """Show the share of cycles that committed 1, 2, ... tokens."""
    found = {}
    for key, value in entry(way.result.get("histogram")).items():
        if str(key).isdecimal() and number(value) is not None:
            found[int(key)] = value
    if not found or sum(found.values()) <= 0 or max(found) > 256:
        return None
    sizes = range(1, max(found) + 1)
    counts = [found.get(size, 0) for size in sizes]
    labels = [f"{size}" for size in sizes]
    return Columns("Tokens per cycle", labels, counts, "tokens that a cycle commits", "% of cycles")


def acceptance_by_position(way: Way) -> Chart | None:
    """Show the share of drafted tokens accepted at each position of the block."""
    shares = entry(way.result.get("acceptance_by_position"))
    lines = []
    for name in ("conditional", "marginal"):
        values = [number(value) for value in items(shares.get(name))]
        points = [(f"{i + 1}", value) for i, value in enumerate(values) if value is not None]
        if points:
            lines.append(Line(name, points, [None] * len(points)))
    if not lines:
        return None
    length = max(int(line.points[-1][0]) for line in lines)
    ticks = [f"{position + 1}" for position in range(length)]
    return Lines(
        "Acceptance by position",
        ticks,
        lines,
        "position in the block",
        "% accepted",
        is_share=True,
        note="Marginal: of all cycles. Conditional: of cycles that accepted every token before.",
    )


def by_category(way: Way) -> Chart | None:
    """Show the speed-up of one way by category of prompts."""
    bars = _category_bars(way, "speedup", TIMES)
    if not bars:
        return None
    return Bars("Speed-up by category", bars, "Dashed: plain decoding.", reference=1.0)


def acceptance_by_category(way: Way) -> Chart | None:
    """Show the acceptance length of one way by category of prompts."""
    bars = _category_bars(way, "acceptance_length", " tokens")
    return Bars("Acceptance length by category", bars) if bars else None


def _category_bars(way: Way, key: str, unit: str) -> list[Bar]:
    bars = []
    for name, figures in entry(way.result.get("by_category")).items():
        value = _speedup_number(entry(figures).get(key))
        count = number(entry(figures).get("count"))
        if value is not None:
            prompts = "" if count is None else f", {counted(count, 'prompt')}"
            bars.append(Bar(str(name), value, f"{value:.2f}{unit}{prompts}"))
    return bars


def _speedup_number(value: Any) -> float | None:
    """Return a figure that is given as a number, or as a dict with the pooled number."""
    return number(value["pooled"] if "pooled" in entry(value) else value)


def counted(count: float, noun: str) -> str:
    """Return a count and its noun, in the plural unless it is 1."""
    return f"{count:g} {noun}" if count == 1 else f"{count:g} {noun}s"


def by_setting(reading: Reading, key: str) -> Chart | None:
    """Show the speed-up by one setting, a line for ways that differ in nothing else. None without two values."""
    groups = [group for group in _groups(reading.drafted, key) if len(group) > 1]
    if not groups:
        return None
    groups.sort(key=lambda group: reading.headlined not in group)
    values = sorted({way.about[key] for group in groups for way in group})
    lines = [_line(group, key, _name_without(group[0], key)) for group in groups[:MOST_LINES]]
    left_out = len(groups) - len(lines)
    note = f"{left_out} more are in the table of ways." if left_out else ""
    name = SETTINGS[key][0]
    ticks = [f"{value:g}" for value in values]
    title = f"Speed-up by {name}"
    return Lines(title, ticks, lines, name, "times plain", reference=1.0, note=note)


def _groups(ways: Iterable[Way], key: str) -> list[list[Way]]:
    """Return the timed ways in groups that differ only in `key`, each in the order of its values."""
    groups: dict[str, dict[float, Way]] = {}
    for way in ways:
        value = number(way.about.get(key))
        if value is not None and way.speedup is not None:
            others = {
                name: item for name, item in way.about.items() if name not in (key, *_NO_SETTINGS)
            }
            groups.setdefault(repr(sorted(others.items(), key=repr)), {})[value] = way
    return [list(dict(sorted(group.items())).values()) for group in groups.values()]


def _line(group: list[Way], key: str, label: str) -> Line:
    points = [(f"{way.about[key]:g}", way.speedup or 0.0) for way in group]
    return Line(label, points, [way.interval for way in group])


def _name_without(way: Way, key: str) -> str:
    """Return the name of a way without the value of one setting."""
    own = SETTINGS[key][1].format(way.about[key])
    return ", ".join(part for part in way.label.split(", ") if part != own)
