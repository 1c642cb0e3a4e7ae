# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Report a training run: draw a plot and write a section of the model card at every checkpoint."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

PLOT = "training.png"
_HEADING = "## Training"
_UNMEASURED = "Nothing yet: no acceptance length and no speed have been measured for this draft."
_MEASURED = "Acceptance length on held-out text: see the section on training. No speed was measured for this draft."


def write_progress(
    folder: Path, history: list[dict[str, float]], run_summary: dict[str, Any]
) -> None:
    """Write the plot and the section of the card into `folder`, which holds a draft; replace an older section.

    Args:
        history: Trainer's `state.log_history`.
        run_summary: further rows of the section's table.
    """
    path = folder / "README.md"
    has_plot = draw(folder / PLOT, history)
    card = ModelCard(path.read_text(encoding="utf-8"))
    before, following = _around_section(card.text)
    if _last(history, "eval_acceptance_length") is not None:
        before = before.replace(_UNMEASURED, _MEASURED)
    written = section(history, run_summary, has_plot)
    card.text = f"{before.rstrip()}\n\n{written}\n{following}"
    partial = folder / "_README.md"  # a full disk leaves the older card
    card.save(partial)
    os.replace(partial, path)


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
    by_position = _last(history, "eval_accuracy_1")
    if by_position is not None:
        positions = [key for key in by_position if key.startswith("eval_accuracy_")]
        shares = ", ".join(f"{by_position[key]:.2f}" for key in positions)
        lines.append(
            f"| accuracy at positions 1 to {len(positions)} of a block, held-out text | {shares} |"
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


def draw(path: Path, history: list[dict[str, float]]) -> bool:
    """Draw loss, acceptance length and accuracy by position as a PNG; return False if nothing was logged yet."""
    from matplotlib.figure import Figure

    panels = {
        "loss": {"training": "loss", "held out": "eval_loss"},
        "acceptance length": {
            "training, expected": "acceptance_length",
            "held out, expected": "eval_acceptance_length",
            "held out, decoded": "eval_decoded_acceptance_length",
        },
    }
    drawn = {key for series in panels.values() for key in series.values()}
    if not any(drawn & line.keys() for line in history):
        return False
    figure = Figure(figsize=(11, 3.2))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.16, top=0.9, wspace=0.18)
    *line_axes, accuracy_axes = figure.subplots(1, 3)
    for axes, (title, series) in zip(line_axes, panels.items(), strict=True):
        _draw_lines(axes, series, history)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    _draw_bars(accuracy_axes, _last(history, "eval_accuracy_1"))
    figure.savefig(path, dpi=110)
    return True


def _draw_lines(axes: Any, series: dict[str, str], history: list[dict[str, float]]) -> None:
    """Draw one line for each series: label -> key of the log."""
    for label, key in series.items():
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label, marker="." if len(points) < 3 else None)


def _draw_bars(axes: Any, line: dict[str, float] | None) -> None:
    """Draw the accuracy at each position, from a line of the log."""
    axes.set(title="held-out accuracy by position", xlabel="position in the block", ylim=(0, 1))
    if line is None:
        axes.text(0.5, 0.5, "no evaluation", ha="center", transform=axes.transAxes)
        return
    values = [line[key] for key in line if key.startswith("eval_accuracy_")]
    axes.bar(range(1, len(values) + 1), values)
