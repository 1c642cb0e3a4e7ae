# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train --dry-run`: tell what memory is needed, run a few steps and estimate the cost of the whole run."""

import statistics
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
from ..training.loading import QUANTIZATIONS, is_cut
from ..training.memory import Memory, StepShape, Tracker, bytes_of, memory_of_step
from ..training.setup import TrainOptions, models_without_weights
from ..training.trainer import DFlashTrainer, DFlashTrainingArguments, prompt_of
from .screen import console, duration

_TIMED_STEPS = 5
_ENOUGH_SECONDS = 60.0


class _StepClock(TrainerCallback):
    """Measure the memory of the second step, and the seconds of those after it; the first includes warm-up.

    After `_TIMED_STEPS` steps, or once they took `_ENOUGH_SECONDS`, training stops.
    """

    def __init__(self, trainer: DFlashTrainer) -> None:
        self.trainer = trainer
        self.tracker = Tracker()
        self.ended: list[float] = []
        """When each step ended, from the second on."""
        self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.peak = self._measured()
        if state.global_step >= 2:
            self.ended.append(time.perf_counter())
            if len(self.ended) > 1 and self.ended[-1] - self.ended[0] > _ENOUGH_SECONDS:
                control.should_training_stop = True

    def _measured(self) -> int:
        """Return the bytes at the peak of the step that has ended."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        self.tracker.__exit__(None, None, None)
        lasting = bytes_of(self.trainer.target) + bytes_of(self.trainer.model)
        states = self.trainer.optimizer.state.values()
        numbers = [value for state in states for value in state.values()]
        tensors = [value for value in numbers if isinstance(value, torch.Tensor)]
        lasting += sum(one.numel() * one.element_size() for one in tensors)
        return lasting + self.tracker.peak

    @property
    def seconds(self) -> float:
        """The median time of a step."""
        steps = zip(self.ended, self.ended[1:], strict=False)
        return statistics.median(later - earlier for earlier, later in steps)


def tell_memory(options: TrainOptions, args: DFlashTrainingArguments) -> Memory:
    """Print what a step needs, from configs alone, before any weights are loaded."""
    draft, target = models_without_weights(options)
    bits = QUANTIZATIONS[options.target_quantization].bits if options.target_quantization else None
    memory = memory_of_step(draft, target, StepShape.of(args, args.device, bits))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, size in memory.lasting.items():
        table.add_row(name, _gib(size))
    for name, size in memory.phases.items():
        table.add_row(f"at times: {name}", _gib(size))
    table.add_row("expected peak", _gib(memory.peak))
    console.print(table)
    return memory


def dry_run(trainer: DFlashTrainer, folder: Path, expected: Memory | None = None) -> None:
    """Run a few steps; save, reload and check the draft; print the cost of the whole run.

    Args:
        expected: what `tell_memory` returned; None where it tells nothing.
    """
    args, total_steps = trainer.args, _total_steps(trainer)
    args.max_steps, args.save_strategy = 2 + _TIMED_STEPS, "no"
    args.logging_steps = 1
    clock = _StepClock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    checks = _check_reloaded(trainer, folder)
    table = Table(show_header=False, box=None, padding=(0, 2))
    draft = trainer.accelerator.unwrap_model(trainer.model)
    table.add_row("draft", f"{draft.num_parameters():,} parameters")
    table.add_row(
        "target", f"{trainer.target.num_parameters():,} parameters, {trainer.target.dtype}"
    )
    where = "on the GPU" if torch.cuda.is_available() else "of tensors"
    measured = f"{_gib(clock.peak)} {where} in a step"
    if expected is not None:
        measured += f", {_gib(expected.peak)} expected"
    table.add_row("peak memory", measured + _resident())
    whole_run = duration(max(1, clock.seconds * total_steps))
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
    if is_cut(trainer.target):
        return [reloads, "no decoding, since the target is cut"]
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


def _gib(size: int) -> str:
    if size < 2**29:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:.2f} GiB"


def _resident() -> str:
    """Return the peak of this process so far, as text; of no interest beside that of a GPU."""
    if torch.cuda.is_available():
        return ""
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return f"; {_gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} resident"
