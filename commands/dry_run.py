# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train --dry-run`: run two steps and estimate the cost of the whole run."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import TrainerCallback

from ..evaluation import compare
from ..publishing.probe import digests
from ..publishing.push import check_staged, stage
from ..registry import load_draft
from ..training.feature_target import has_layers
from ..training.trainer import DFlashTrainer, prompt_of
from .shared import console


class _StepClock(TrainerCallback):
    """Measure the seconds of the last step, since the first includes warm-up."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def dry_run(trainer: DFlashTrainer, folder: Path) -> None:
    """Run two steps; save, reload and check the draft; print the cost of the whole run."""
    args, total_steps = trainer.args, _total_steps(trainer)
    args.max_steps, args.save_strategy = 2, "no"
    args.logging_steps = 1
    clock = _StepClock()
    trainer.add_callback(clock)
    trainer.train()
    checks = _check_reloaded(trainer, folder)
    table = Table(show_header=False, box=None, padding=(0, 2))
    draft = trainer.accelerator.unwrap_model(trainer.model)
    table.add_row("draft", f"{draft.num_parameters():,} parameters")
    table.add_row(
        "target", f"{trainer.target.num_parameters():,} parameters, {trainer.target.dtype}"
    )
    where = "of GPU memory" if torch.cuda.is_available() else "resident"
    table.add_row("peak memory", f"{_peak_gib():.2f} GiB {where}")
    whole_run = duration(clock.seconds * total_steps)
    table.add_row("time", f"{clock.seconds:.2f} s a step; {whole_run} for {total_steps:,} steps")
    for check in checks:
        table.add_row("checked", check)
    console.print(table)


def _total_steps(trainer: DFlashTrainer) -> int:
    """Return the number of steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            "A streamed dataset has no length, so the number of steps is unknown. Pass --max-steps."
        )
    batch = (
        trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size
    )
    return int(-(-len(trainer.train_dataset) // batch) * trainer.args.num_train_epochs)


def _check_reloaded(trainer: DFlashTrainer, folder: Path) -> list[str]:
    """Save and reload the draft in both layouts, compare, and return the checks that passed.

    Raises:
        ValueError: a check failed.
    """
    draft = trainer.accelerator.unwrap_model(trainer.model).eval()
    trainer.save_model(str(folder / "saved"), _internal_call=True)
    reloaded = load_draft(folder / "saved").to(draft.device).eval()
    if digests(reloaded) != digests(draft):
        raise ValueError(
            "The weights of the saved draft differ after reloading. Please report this."
        )
    for layout in ("hub", "engines"):
        stage(reloaded, folder / layout, layout, {})
        check_staged(reloaded, folder / layout)
    reloads = (
        "the draft reloads bit-equal in both layouts, here and in a process without this package"
    )
    if not has_layers(trainer.target):
        return [reloads]
    ids = prompt_of(next(iter(trainer.train_dataset))).to(trainer.target.device)
    before = compare(draft, trainer.target, ids, max_new_tokens=32, proposal="chain")
    after = compare(reloaded, trainer.target, ids, max_new_tokens=32, proposal="chain")
    if before.committed != after.committed:
        raise ValueError(
            f"Acceptance changed by saving and reloading: {after.committed} tokens per cycle instead of "
            f"{before.committed}. Please report this."
        )
    near_ties = f"differs by near-ties in {trainer.target.dtype}"
    text = "is the target's own" if after.identical else near_ties
    return [
        reloads,
        f"the draft decodes as before it was saved, and the text {text}",
    ]


def _peak_gib() -> float:
    """Return the peak memory so far, of the GPU or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Return a duration in hours and minutes, as text."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
