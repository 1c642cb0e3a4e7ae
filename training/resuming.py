# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say that a resumed run has another schedule of learning rates than it began with."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class ScheduleNotice(TrainerCallback):
    """Says at the start of a resumed run what of its schedule is not as before.

    Args:
        checkpoint: the folder to resume from.
    """

    def __init__(self, checkpoint: str | Path):
        self.checkpoint = Path(checkpoint)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or lr_scheduler is None:
            return
        saved = json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if saved["global_step"] != state.global_step:
            return  # another run of the same trainer
        for change in changes(saved, state, args, lr_scheduler):
            logger.warning(change)


def changes(saved: dict[str, Any], state: Any, args: Any, scheduler: Any) -> list[str]:
    """Return a sentence on each change of the schedule.

    Args:
        saved: the state in the checkpoint.
        state: of the resumed run.
        scheduler: of learning rates, with what it had in the checkpoint.
    """
    found = []
    rate = float(scheduler.base_lrs[0]) if getattr(scheduler, "base_lrs", None) else None
    if rate is not None and rate != args.learning_rate:
        found.append(
            f"learning_rate is {args.learning_rate:g}, but a resumed run keeps that of its checkpoint, {rate:g}. "
            "Start a new run from the draft to train it with another one."
        )
    before = _last_rate(saved["log_history"])
    rates = [_rate_at(scheduler, step) for step in (before[0], before[0] - 1)] if before else []
    known = [one for one in rates if one is not None]
    if before and known and not any(_alike(one, before[1]) for one in known):
        found.append(
            f"The run resumes with another schedule: it had {saved['max_steps']:,} steps and now has "
            f"{state.max_steps:,}. At step {before[0]:,} the learning rate was {before[1]:.3g}; by the new schedule "
            f"it is {known[0]:.3g} there. Pass the options of the first run to go on as it would have."
        )
    elif saved["max_steps"] != state.max_steps:
        found.append(
            f"The run resumes with another length: it had {saved['max_steps']:,} steps and now has {state.max_steps:,}; "
            "the learning rate follows the schedule of the new one."
        )
    return found


def _last_rate(history: list[dict[str, float]]) -> tuple[int, float] | None:
    """Return the step and the learning rate of the last line of the log that has one."""
    lines = [line for line in history if "learning_rate" in line]
    return (int(lines[-1]["step"]), float(lines[-1]["learning_rate"])) if lines else None


def _rate_at(scheduler: Any, step: int) -> float | None:
    """Return the learning rate of a step; None where the schedule is no function of the step."""
    functions = getattr(scheduler, "lr_lambdas", None)
    if not functions or functions[0] is None:
        return None
    return float(scheduler.base_lrs[0]) * float(functions[0](max(step, 0)))


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-3 * max(abs(one), abs(other), 1e-12)
