# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train --dry-run`: two steps, and what the whole run would cost."""

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
from ..training.trainer import DFlashTrainer, prompt_of
from .shared import console


class _StepClock(TrainerCallback):
    """Measure the seconds of the last step; the first pays for warm-up."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def dry_run(trainer: DFlashTrainer, folder: Path) -> None:
    """Two steps, saved, reloaded and checked; then what the whole run would cost."""
    args, whole = trainer.args, _steps(trainer)
    args.max_steps, args.save_strategy, args.logging_steps = 2, "no", 1
    clock = _StepClock()
    trainer.add_callback(clock)
    trainer.train()
    checks = _checked(trainer, folder)
    table = Table(show_header=False, box=None, padding=(0, 2))
    draft = trainer.accelerator.unwrap_model(trainer.model)
    table.add_row("draft", f"{draft.num_parameters():,} parameters")
    table.add_row(
        "target", f"{trainer.target.num_parameters():,} parameters, {trainer.target.dtype}"
    )
    table.add_row(
        "memory, at most",
        f"{_peak_gib():.2f} GiB {'of the GPU' if torch.cuda.is_available() else 'resident'}",
    )
    table.add_row(
        "time",
        f"{clock.seconds:.2f} s a step; {_duration(clock.seconds * whole)} for {whole:,} steps",
    )
    for check in checks:
        table.add_row("checked", check)
    console.print(table)


def _steps(trainer: DFlashTrainer) -> int:
    """Steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("A stream has no length: give --max-steps.")
    batch = (
        trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size
    )
    return int(-(-len(trainer.train_dataset) // batch) * trainer.args.num_train_epochs)


def _checked(trainer: DFlashTrainer, folder: Path) -> list[str]:
    """Save, reload and compare; what was found to be right.

    Raises:
        ValueError: what was not.
    """
    draft = trainer.accelerator.unwrap_model(trainer.model).eval()
    trainer.save_model(str(folder / "saved"), _internal_call=True)
    again = load_draft(folder / "saved").to(draft.device).eval()
    if digests(again) != digests(draft):
        raise ValueError("The saved draft reloads otherwise than it was.")
    for layout in ("hub", "engines"):
        stage(again, folder / layout, layout, {})
        check_staged(again, folder / layout)
    ids = prompt_of(next(iter(trainer.train_dataset))).to(trainer.target.device)
    one, other = (
        compare(model, trainer.target, ids, max_new_tokens=32) for model in (draft, again)
    )
    if one.committed != other.committed:
        raise ValueError("The reloaded draft drafts otherwise than before it was saved.")
    text = (
        "is the target's own"
        if other.identical
        else f"differs by near-ties in {trainer.target.dtype}"
    )
    return [
        "it reloads bit-equal, here and in a process without this package, in both layouts",
        f"it decodes as before it was saved, and the text {text}",
    ]


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
