# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Draw the main charts of a report as PNG files, for a model card or a talk. Needs matplotlib."""

import warnings
from functools import singledispatch
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from transformers.utils import logging

from .charts import (
    Bars,
    Chart,
    Columns,
    Lines,
    Stack,
    charts_of_condition,
    charts_of_settings,
    charts_of_way,
    conditions,
)
from .reading import read, visible
from .svg import shortened

logger = logging.get_logger(__name__)
_COLOURS = ["#0b5fb0", "#b04a00", "#0d7658", "#8a3a9c"]
_PART_COLOURS = ["#0d7658", "#b04a00", "#0b5fb0", "#5f6670"]
_PLAIN = "#767d86"


def write_pngs(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the charts of the headline's way and of its condition into `folder`; return the files.

    Without matplotlib it draws none and logs a warning that says so.
    """
    if find_spec("matplotlib") is None:
        logger.warning(
            "The charts are not drawn as PNG files, since matplotlib is not installed: "
            "pip install 'dflash-hub[plots]'. The page report.html has them all."
        )
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(chart, folder / f"{name}.png") for name, chart in _charts(report).items()]


def _charts(report: dict[str, Any]) -> dict[str, Chart]:
    reading = read(report)
    found: dict[str, Chart] = {}
    for ways in conditions(reading)[:1]:
        found |= charts_of_condition(ways)
    found |= charts_of_settings(reading)
    if reading.headlined is not None:
        found |= charts_of_way(reading.headlined)
    return found


def _write(chart: Chart, path: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a font, for a text of the report
        figure = Figure(figsize=(7, _height(chart)), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(chart.title, loc="left", weight="bold")
        draw(chart, axes)
        figure.savefig(path, dpi=130)
    return path


def _height(chart: Chart) -> float:
    """Return inches: more for more bars."""
    rows = len(getattr(chart, "bars", getattr(chart, "rows", ())))
    return max(3.5 if rows == 0 else 1.4 + 0.5 * rows, 2.0)


def _label(text: str) -> str:
    return shortened(visible(text), 90)


@singledispatch
def draw(chart: Chart, axes: Any) -> None:
    """Draw a chart into matplotlib's axes."""
    raise TypeError(f"{type(chart).__name__} is no chart.")


@draw.register
def _(chart: Bars, axes: Any) -> None:
    ends = [max(bar.value, chart.reference or 0.0, *(bar.interval or ())) for bar in chart.bars]
    for row, bar in enumerate(chart.bars):
        axes.barh(row, bar.value, color=_PLAIN if bar.is_plain else _COLOURS[0], height=0.4)
        if bar.interval is not None:
            axes.hlines(row, *bar.interval, color="black", linewidth=1.5)
        if bar.floor is not None:
            axes.vlines(bar.floor, row - 0.24, row + 0.24, color=_COLOURS[1], linewidth=2.5)
        if chart.reference is not None:
            axes.vlines(chart.reference, row - 0.24, row + 0.24, color="black", linestyle="--")
        axes.annotate(f" {bar.words}", (ends[row], row), va="center", fontsize="small")
    _name_rows(axes, [bar.label for bar in chart.bars])
    axes.set_xlabel(fill(chart.note, 100), fontsize="small", loc="left")
    axes.set_xlim(0, 1.4 * max(*ends, 1e-9))


def _name_rows(axes: Any, labels: list[str]) -> None:
    """Write a name above each bar, where long ones have room."""
    for row, label in enumerate(labels):
        axes.annotate(_label(label), (0, row - 0.28), fontsize="small")
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.6, -0.7)


@draw.register
def _(chart: Columns, axes: Any) -> None:
    axes.bar(chart.labels, [100 * share for share in chart.shares], color=_COLOURS[0])
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)


@draw.register
def _(chart: Lines, axes: Any) -> None:
    factor = 100 if chart.is_share else 1
    for number, line in enumerate(chart.lines):
        places = [chart.ticks.index(tick) for tick, _ in line.points]
        heights = [factor * value for _, value in line.points]
        style = {"color": _COLOURS[number], "marker": "os^D"[number], "label": _label(line.label)}
        axes.plot(places, heights, **style)
        for place, ends in zip(places, line.intervals, strict=True):
            if ends is not None:
                axes.vlines(place, *ends, color=_COLOURS[number])
    if chart.reference is not None:
        axes.axhline(chart.reference, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(chart.ticks)), chart.ticks)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_ylim(0, 102 if chart.is_share else None)
    axes.legend(fontsize="small", frameon=False)


@draw.register
def _(chart: Stack, axes: Any) -> None:
    starts = [0.0] * len(chart.rows)
    places = range(len(chart.rows))
    for number, part in enumerate(chart.parts):
        shares = [100 * row[1][number] for row in chart.rows]
        axes.barh(places, shares, left=starts, color=_PART_COLOURS[number], label=part, height=0.4)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    _name_rows(axes, [label for label, _ in chart.rows])
    axes.set(xlabel="% of the time", xlim=(0, 100))
    axes.figure.legend(ncols=4, fontsize="small", frameon=False, loc="outside lower center")
