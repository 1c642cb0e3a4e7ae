# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say which evaluation of a run was the best, and whether a smaller block would do.

What decides is the acceptance length of held-out prompts that are decoded. A draft with a lower loss may decode worse.
"""

from typing import Any

DECODED = "decoded_acceptance_length"
"""The metric by which the best checkpoint is chosen, where evaluations decode."""
ACCEPTED_AT = "decoded_accepted_"
"""With k, the share of cycles in which the drafted token at position k was accepted."""
KEPT = 0.99
"""A smaller block that keeps this share of the acceptance length would do."""
PAYS = 1.3
"""Tokens a cycle from which on a draft may be worth a push; 1 is decoding without one."""
_FULL = 0.2
"""Share of cycles that accept the last position from which on a larger block may be worth a try."""

Line = dict[str, float]
"""A line of Trainer's `state.log_history`."""


def check_best(args: Any, names: list[str], eval_dataset: Any) -> None:
    """Refuse a best checkpoint that no evaluation can choose.

    Args:
        args: how to train.
        names: the metrics of an evaluation.
        eval_dataset: packed rows, several of them by name, or None.

    Raises:
        ValueError: there is nothing to evaluate, or no such metric.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    if eval_dataset is None:
        raise ValueError(
            f"The best checkpoint is chosen by {metric}, but there are no rows to evaluate. Hold some out "
            "(--eval-rows 200, in Python eval_dataset), or leave out load_best_model_at_end, early_stopping and "
            "metric_for_best_model."
        )
    if isinstance(eval_dataset, dict):
        names = [f"{part}_{name}" for part in eval_dataset for name in names]
    if metric.removeprefix("eval_") not in names:
        raise ValueError(no_metric(metric, names))


def no_metric(metric: str, names: list[str]) -> str:
    """Return the message for a metric that is none of these."""
    return (
        f"metric_for_best_model is {metric!r}, which is none of what an evaluation gives: {', '.join(names)}. "
        f"{DECODED} needs eval_acceptance_prompts."
    )


def best_of(history: list[Line], metric: str, greater: bool) -> Line | None:
    """Return the first line with the best value of a metric, as Trainer chooses it; None without any."""
    key = f"eval_{metric.removeprefix('eval_')}"
    lines = [line for line in history if key in line and line["step"] > 0]
    sign = 1 if greater else -1
    return max(lines, key=lambda line: sign * line[key], default=None)


def describe_best(history: list[Line], metric: str, greater: bool) -> str | None:
    """Return which step was the best, what it decodes and what its losses are; None without an evaluation."""
    best = best_of(history, metric, greater)
    if best is None:
        return None
    key = f"eval_{metric.removeprefix('eval_')}"
    text = f"step {best['step']:,.0f} with {_measured(best)}"
    if key not in (f"eval_{DECODED}", "eval_loss"):
        text += f", {metric} {best[key]:.4g}"
    trained = [line for line in history if "loss" in line and line["step"] <= best["step"]]
    if trained:
        text += f", training loss {trained[-1]['loss']:.3f}"
    other = best_of(history, "loss", greater=False)
    if other is not None and other["step"] != best["step"]:
        text += (
            f"; the lowest held-out loss is of step {other['step']:,.0f}, with {_measured(other)}"
        )
    return text


def _measured(line: Line) -> str:
    """Return what an evaluation decoded, and its loss."""
    parts = []
    if f"eval_{DECODED}" in line:
        parts.append(f"{line[f'eval_{DECODED}']:.3f} tokens a cycle when decoded")
    if "eval_loss" in line:
        parts.append(f"held-out loss {line['eval_loss']:.3f}")
    return ", ".join(parts)


def describe_block(line: Line, config: Any) -> str | None:
    """Return whether a smaller block would do, or a larger one may be better.

    It is None if nothing was decoded, or next to nothing accepted.

    It counts what each position added. A draft that is trained with another block may do better or worse.

    Args:
        line: of an evaluation.
        config: the draft's.
    """
    shares = [line.get(f"eval_{ACCEPTED_AT}{k}") for k in range(1, config.num_drafted + 1)]
    found = [share for share in shares if share is not None]
    whole = 1 + sum(found)
    if whole < PAYS:
        return None
    sums = [1 + sum(found[:count]) for count in range(1, len(found) + 1)]
    enough = next(count for count, length in enumerate(sums, 1) if length >= KEPT * whole)
    if enough < len(found):
        size = enough + config.block_size - config.num_drafted
        share = sums[enough - 1] / whole
        return (
            f"Positions {enough + 1} to {len(found)} of a block add {whole - sums[enough - 1]:.2f} tokens a cycle: "
            f"block_size {size} would keep {share:.1%} of the acceptance length."
        )
    text = (
        f"Every position of a block counts: the last is accepted in {found[-1]:.1%} of all cycles."
    )
    if found[-1] >= _FULL:
        text += f" A block_size above {config.block_size} may add to the acceptance length."
    return text
