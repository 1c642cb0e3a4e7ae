# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Lay charts out as marks of an SVG image, which a template writes with every text escaped.

All images are `WIDTH` units wide, a phone's width, so that their letters stay readable when they are scaled to one.
Colours are classes, so that the page's style sheet chooses them for light and dark.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from itertools import pairwise
from typing import Any

from .charts import Bar, Bars, Chart, Columns, Lines, Stack

WIDTH = 340
_LETTER = 6.1
"""About how wide a letter is."""
_ROW = 46
"""Height of a bar with its label."""
_BAR = 22
"""Where a bar begins below the top of its row."""
_TOP = 20
"""Space above a chart with two axes."""
_LEFT = 36
"""Space for its labels of y."""
_PLOT = 140
"""Its height."""


@dataclass(frozen=True)
class Mark:
    """Hold one element of an image."""

    tag: str
    attributes: Mapping[str, Any]
    text: str = ""
    title: str = ""
    """Shown where the mouse rests on the element."""


@dataclass
class Drawing:
    """Collect the marks of one image, from top to bottom."""

    height: float = 0.0
    marks: list[Mark] = field(default_factory=list)

    def rect(self, x: float, y: float, size: tuple[float, float], kind: str, title: str) -> None:
        width, height = max(size[0], 0.0), max(size[1], 0.0)
        box = {
            "x": _rounded(x),
            "y": _rounded(y),
            "width": _rounded(width),
            "height": _rounded(height),
        }
        self.marks.append(Mark("rect", {**box, "class": kind}, title=title))

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        ends = {"x1": _rounded(start[0]), "y1": _rounded(start[1])}
        ends |= {"x2": _rounded(end[0]), "y2": _rounded(end[1])}
        self.marks.append(Mark("line", {**ends, "class": kind}))

    def tick(self, middle: tuple[float, float], reach: float, kind: str) -> None:
        """Draw an upright line across a bar, with a rim that parts it from the bar's colour."""
        x, y = middle
        for each in (f"halo {kind}-halo", kind):
            self.line((x, y - reach), (x, y + reach), each)

    def write(self, x: float, y: float, text: str, kind: str = "label") -> None:
        """Write `text` at its start; at its end if the kind ends with "end", or around its middle with "middle"."""
        at = {"x": _rounded(x), "y": _rounded(y), "class": kind}
        self.marks.append(Mark("text", at, text=text))

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.marks.append(Mark("polyline", {"points": joined, "class": kind}))

    def dot(self, at: tuple[float, float], number: int, title: str) -> None:
        """Draw a point of line `number`: a circle, square, triangle or diamond."""
        x, y = at
        corners = [
            f"M{x - 3:.1f},{y:.1f}a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
            f"M{x - 3:.1f},{y - 3:.1f}h6v6h-6z",
            f"M{x:.1f},{y - 4:.1f}l4,7h-8z",
            f"M{x:.1f},{y - 4:.1f}l4,4l-4,4l-4,-4z",
        ]
        shape = {"d": corners[number], "class": f"dot line-{number}"}
        self.marks.append(Mark("path", shape, title=title))


def _rounded(value: float) -> float:
    return round(value, 1)


def shortened(text: str, most: int) -> str:
    """Return `text` with its middle left out if it has more than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[head + 1 - most :]}"


@singledispatch
def draw(chart: Chart) -> Drawing:
    """Return the image of a chart."""
    raise TypeError(f"{type(chart).__name__} is no chart.")


@draw.register
def _(chart: Bars) -> Drawing:
    drawing = Drawing(height=_ROW * len(chart.bars) + (16 if chart.reference else 4))
    room = WIDTH - _LETTER * max(len(bar.words) for bar in chart.bars) - 10
    most = max(_reach(bar) for bar in chart.bars)
    scale = max(room, WIDTH / 4) / max(most, chart.reference or 0.0, 1e-9)
    bottom = _ROW * len(chart.bars)
    for row, bar in enumerate(chart.bars):
        _draw_bar(drawing, bar, (_ROW * row, scale), chart.reference)
    drawing.line((0.5, 0), (0.5, bottom), "axis")
    if chart.reference:
        x = scale * chart.reference
        for row in range(len(chart.bars)):  # not through the labels
            drawing.tick((x, _ROW * row + _BAR + 7), 10, "reference")
        side = "small middle" if x > 40 else "small"
        drawing.write(x, bottom + 10, "plain = 1", side)
    return drawing


def _reach(bar: Bar) -> float:
    """Return the greatest value that the row of a bar shows."""
    return max(bar.value, bar.floor or 0.0, *(bar.interval or ()))


def _draw_bar(
    drawing: Drawing, bar: Bar, place: tuple[float, float], reference: float | None
) -> None:
    """Draw one bar with its label above it and its value beside it; `place` is its top and the units per value."""
    top, scale = place
    drawing.write(4, top + 16, shortened(bar.label, 54))
    size = (scale * bar.value, 14.0)
    kind = "bar plain" if bar.is_plain else "bar"
    drawing.rect(0, top + _BAR, size, kind, f"{bar.label}: {bar.words}")
    if bar.floor is not None:
        drawing.tick((scale * bar.floor, top + _BAR + 7), 10, "floor")
    if bar.interval is not None:
        _draw_interval(drawing, bar.interval, place)
    end = scale * _reach(bar)
    if reference and end < scale * reference:
        end = scale * reference
    drawing.write(end + 6, top + _BAR + 11, bar.words, "value")


def _draw_interval(
    drawing: Drawing, interval: tuple[float, float], place: tuple[float, float]
) -> None:
    middle, scale = place[0] + _BAR + 7, place[1]
    low, high = scale * interval[0], scale * interval[1]
    for kind in ("halo", "interval"):
        drawing.line((low, middle), (high, middle), kind)
    for x in (low, high):
        drawing.tick((x, middle), 4, "interval")


@draw.register
def _(chart: Columns) -> Drawing:
    drawing, shares = Drawing(), chart.shares
    steps = scale_of(100 * max(shares))
    draw_axes(drawing, steps, (chart.x_label, chart.y_label), WIDTH)
    room = (WIDTH - _LEFT - 4) / len(shares)
    every = math.ceil(len(shares) / 18)
    for place, share in enumerate(shares):
        middle = _LEFT + room * (place + 0.5)
        height = _PLOT * 100 * share / steps[-1]
        label, count = chart.labels[place], chart.counts[place]
        title = f"{label}: {count:g} ({share:.1%})"
        corner = middle - 0.4 * room, _TOP + _PLOT - height
        drawing.rect(*corner, (0.8 * room, height), "bar", title)
        if share and every == 1:
            shown = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            drawing.write(middle, corner[1] - 3, shown, "small middle")
        if place % every == 0:
            drawing.write(middle, _TOP + _PLOT + 13, label, "small middle")
    return drawing


def scale_of(most: float) -> list[float]:
    """Return three to six round values from 0 to at least `most`."""
    rough = max(most, 1e-6) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [step * index for index in range(math.ceil(most / step * 0.999) + 1)]


def draw_axes(drawing: Drawing, steps: list[float], names: tuple[str, str], right: float) -> None:
    """Draw the lines and labels of y at `steps` as far as `right`, and the names of x and y."""
    drawing.height = _TOP + _PLOT + 32
    for step in steps:
        y = _TOP + _PLOT * (1 - step / steps[-1])
        drawing.line((_LEFT, y), (right, y), "grid" if step else "axis")
        drawing.write(_LEFT - 5, y + 3.5, f"{step:g}", "small end")
    drawing.write(0, 10, names[1], "small")
    drawing.write((_LEFT + right) / 2, _TOP + _PLOT + 28, names[0], "small middle")


@draw.register
def _(chart: Lines) -> Drawing:
    drawing, factor = Drawing(), 100.0 if chart.is_share else 1.0
    tops = [y for line in chart.lines for _, y in line.points]
    tops += [interval[1] for line in chart.lines for interval in line.intervals if interval]
    steps = scale_of(factor * max(*tops, chart.reference or 0.0, 1e-6))
    if chart.is_share:
        steps = [0, 25, 50, 75, 100]
    plane = Plane(chart.ticks, steps[-1] / factor, max(len(line.label) for line in chart.lines))
    draw_axes(drawing, steps, (chart.x_label, chart.y_label), plane.right)
    if chart.reference:
        y = plane.y(chart.reference)
        drawing.line((_LEFT, y), (plane.right, y), "reference")
        drawing.write(_LEFT + 3, y + 11, "plain = 1", "small")
    every = math.ceil(len(chart.ticks) / 12)
    for tick in chart.ticks[::every]:
        drawing.write(plane.x(tick), _TOP + _PLOT + 13, tick, "small middle")
    for number in range(len(chart.lines)):
        _draw_line(drawing, chart, number, plane)
    _name_lines(drawing, chart, plane)
    return drawing


@dataclass(frozen=True)
class Plane:
    """Hold where values lie in a chart with two axes."""

    ticks: list[str]
    most: float
    longest: int
    """Characters of the longest name of a line."""

    @property
    def named_beside(self) -> bool:
        """Whether the names of the lines stand beside their ends; longer ones stand below the chart."""
        return self.longest <= 12

    @property
    def right(self) -> float:
        """Where the lines end and their names begin."""
        return WIDTH - (_LETTER * self.longest + 4 if self.named_beside else 18)

    def x(self, tick: str) -> float:
        return _LEFT + (self.right - _LEFT) * (self.ticks.index(tick) + 0.5) / len(self.ticks)

    def y(self, value: float) -> float:
        return _TOP + _PLOT * (1 - value / self.most)


def _draw_line(drawing: Drawing, chart: Lines, number: int, plane: Plane) -> None:
    line = chart.lines[number]
    places = [(plane.x(tick), plane.y(value)) for tick, value in line.points]
    for place, interval in zip(places, line.intervals, strict=True):
        if interval is not None:
            ends = [(place[0], plane.y(end)) for end in interval]
            drawing.line(ends[0], ends[1], f"whisker line-{number}")
    drawing.path(places, f"path line-{number}")
    for place, (tick, value) in zip(places, line.points, strict=True):
        shown = f"{value:.1%}" if chart.is_share else f"{value:.2f}"
        drawing.dot(place, number, f"{line.label}, {chart.x_label} {tick}: {shown}")


def _name_lines(drawing: Drawing, chart: Lines, plane: Plane) -> None:
    """Write the names of the lines at their ends; long ones below, with a letter at their ends."""
    ends = [(plane.x(line.points[-1][0]), plane.y(line.points[-1][1])) for line in chart.lines]
    heights = spread([end[1] for end in ends], 12)
    for number, line in enumerate(chart.lines):
        name = line.label if plane.named_beside else chr(ord("A") + number)
        y = min(heights[number] + 4, _TOP + _PLOT - 3)
        drawing.write(ends[number][0] + 7, y, name, f"name line-{number}")
        if not plane.named_beside:
            drawing.height += 16
            drawing.dot((8, drawing.height - 10), number, "")
            below = f"{name}  {shortened(line.label, 50)}"
            drawing.write(18, drawing.height - 6, below)


def spread(heights: list[float], least: float) -> list[float]:
    """Return the heights moved apart so that each lies at least `least` from the next."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    middle = (sum(moved) - sum(heights)) / max(len(heights), 1)
    return [height - middle for height in moved]


@draw.register
def _(chart: Stack) -> Drawing:
    drawing = Drawing(height=18 + _ROW * len(chart.rows))
    for number, part in enumerate(chart.parts):
        x = WIDTH / len(chart.parts) * number
        drawing.rect(x, 2, (11, 11), f"part-{number}", "")
        drawing.write(x + 16, 12, part)
    for row, (label, shares) in enumerate(chart.rows):
        top, start = 18 + _ROW * row, 0.0
        drawing.write(0, top + 16, shortened(label, 54))
        for number, share in enumerate(shares):
            size = WIDTH * share
            title = f"{label}: {chart.parts[number]} {share:.1%}"
            drawing.rect(
                start, top + _BAR, (max(size - 1, 0.5 * size), 18), f"part-{number}", title
            )
            if size >= 30:
                drawing.write(
                    start + size / 2, top + _BAR + 13, f"{share:.0%}", f"on part-{number} middle"
                )
            start += size
    return drawing
