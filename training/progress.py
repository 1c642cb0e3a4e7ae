# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Report a training run: draw a plot and write a section of the model card at every checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files import replacing

PLOT = "training.png"
_AT_POSITION = "eval_accuracy_"
_PANELS = {
    "loss": {"training": "loss", "held out": "eval_loss"},
    "tokens a cycle": {
        "training, expected": "acceptance_length",
        "held out, expected": "eval_acceptance_length",
        "held out, decoded": "eval_decoded_acceptance_length",
    },
}
"""Panels of the plot: title -> label -> key of the log."""
_WIDTH, _HEIGHT = 4.2, 3.4
"""Inches of a panel."""
_HEADING = "## Training"
_UNMEASURED = "Nothing yet: no acceptance length and no speed have been measured for this draft."
_MEASURED = "Acceptance length on held-out text: see the section on training. No speed was measured for this draft."


def write_progress(
    folder: Path, history: list[dict[str, float]], run_summary: dict[str, Any], name: str = ""
) -> None:
    """Write the plot and the section of the card into `folder`, which holds a draft; replace an older section.

    Args:
        history: Trainer's `state.log_history`.
        run_summary: further rows of the section's table.
        name: of the run.
    """
    path = folder / "README.md"
    has_plot = draw(folder / PLOT, history, name)
    card = ModelCard(path.read_text(encoding="utf-8"))
    before, following = _around_section(card.text)
    if _last(history, "eval_acceptance_length") is not None:
        before = before.replace(_UNMEASURED, _MEASURED)
    written = section(history, run_summary, has_plot)
    card.text = f"{before.rstrip()}\n\n{written}\n{following}"
    with replacing(path) as partial:  # a full disk leaves the older card
        card.save(partial)


def _around_section(text: str) -> tuple[str, str]:
    """Return the text of a card before and after its section on training."""
    start = text.find(_HEADING)
    if start < 0:
        return text, ""
    end = text.find("\n## ", start)
    return text[:start], "" if end < 0 else text[end + 1 :]


def section(history: list[dict[str, float]], run_summary: dict[str, Any], has_plot: bool) -> str:
    """Return the section of the card: the recipe, the results, and the plot."""
    shown = run_summary | {
        "loss, first and last of the log": _first_and_last(history, "loss"),
        "held-out loss": _first_and_last(history, "eval_loss"),
        "expected acceptance length, held-out text": _first_and_last(
            history, "eval_acceptance_length"
        ),
        "acceptance length, held-out prompts decoded greedily": _first_and_last(
            history, "eval_decoded_acceptance_length"
        ),
    }
    lines = [_HEADING, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    evaluated = _last(history, f"{_AT_POSITION}1")
    if evaluated is not None:
        found = by_position(evaluated)
        shares = ", ".join(f"{share:.2f}" for share in found)
        lines.append(
            f"| accuracy at positions 1 to {len(found)} of a block, held-out text | {shares} |"
        )
    lines.append("")
    if has_plot:
        lines += [f"![The run: loss and acceptance by step]({PLOT})", ""]
    return "\n".join(lines)


def _last(history: list[dict[str, float]], key: str) -> dict[str, float] | None:
    """Return the last line of the log that has the key."""
    return next((line for line in reversed(history) if key in line), None)


def _first_and_last(history: list[dict[str, float]], key: str) -> str | None:
    """Return the first and the last logged value as text, or None without any."""
    values = [line[key] for line in history if key in line]
    if not values:
        return None
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f}, then {values[-1]:.3f}"


def by_position(line: Mapping[str, float]) -> list[float]:
    """Return the accuracy at each position, of a line of the log of an evaluation; [] of another line."""
    return [line[key] for key in line if key.startswith(_AT_POSITION)]


def draw(path: Path, history: list[dict[str, float]], name: str = "") -> bool:
    """Draw loss, acceptance length and accuracy by position as a PNG, each where it was logged.

    Args:
        name: of the run.

    Returns:
        False if nothing was logged yet, so that there is no picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = {key for line in history for key in line}
    panels = [title for title, lines in _PANELS.items() if logged & {*lines.values()}]
    if not panels:
        return False
    evaluated = _last(history, f"{_AT_POSITION}1")
    count = len(panels) + (evaluated is not None)
    figure = Figure(figsize=(_WIDTH * count, _HEIGHT), dpi=110)
    steps = max(line.get("step", 0) for line in history)
    figure.suptitle(", ".join(part for part in (name, f"{steps:,} steps") if part))
    all_axes = figure.subplots(1, count, squeeze=False, gridspec_kw=_margins(count))[0]
    for axes, title in zip(all_axes, panels, strict=False):
        _draw_lines(axes, _PANELS[title], history)
        axes.set(title=title, xlabel="step")
    if evaluated is not None:
        _draw_bars(all_axes[-1], evaluated)
    # `savefig` would draw it twice.
    FigureCanvasAgg(figure).print_png(path)
    return True


def _margins(count: int) -> dict[str, float]:
    """Return where `count` panels lie in the picture; matplotlib's own layout takes longer than all the rest."""
    left, right = 0.6, 0.15  # inches
    width = _WIDTH * count
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": 0.5 / _HEIGHT,
        "top": 1 - 0.7 / _HEIGHT,
        "wspace": (left + right) / (_WIDTH - left - right),
    }


def _draw_lines(axes: Any, series: dict[str, str], history: list[dict[str, float]]) -> None:
    """Draw one line for each series that was logged: label -> key of the log."""
    for label, key in series.items():
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label, marker="." if len(points) < 30 else None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_bars(axes: Any, line: dict[str, float]) -> None:
    """Draw the accuracy at each position, from a line of the log."""
    from matplotlib.ticker import PercentFormatter

    values = by_position(line)
    axes.bar(range(1, len(values) + 1), values)
    title = f"held-out accuracy, step {line['step']:,}" if "step" in line else "held-out accuracy"
    top = min(1.0, 1.1 * max(values)) or 1.0
    axes.set(title=title, xlabel="position in the block", ylim=(0, top))
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
