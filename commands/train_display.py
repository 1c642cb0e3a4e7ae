# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Show how far a training run is: one display on a terminal, else a line now and then; and how each evaluation went."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..training.progress import by_position
from .screen import RowLines, duration, is_verbose, notes, prose

PARTS = 20
"""Lines of a whole run in a pipe, at least one a minute."""
_SECONDS = 60


@contextmanager
def shown(trainer: Any) -> Iterator["TrainDisplay"]:
    """Show a run of this trainer in our words while this context lasts, in place of Trainer's own bars and dicts."""
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    display = TrainDisplay(trainer)
    trainer.add_callback(display)
    try:
        yield display
    finally:
        display.stop()
        trainer.remove_callback(display)


class TrainDisplay(TrainerCallback):
    """Show a run on stderr.

    Args:
        trainer: a `DFlashTrainer`, whose `latest_metrics` are shown.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.figures: dict[str, float] = {}
        """The newest line of the log."""
        self.evaluated: dict[str, float] = {}
        """What an evaluation has found that is not printed yet."""
        self.started = self.last_line = time.perf_counter()
        self.first_step = self.printed_step = 0
        bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self.bar = Progress(*bar, TextColumn("{task.fields[left]}"), console=notes)
        self.task = self.bar.add_task("starting", total=None, left="")
        self.live: Live | None = None
        self.lines: tuple[int, RowLines] | None = None
        """The round that is being answered, and what prints how far it is."""

    # What Trainer calls ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.last_line = time.perf_counter()
        self.first_step = self.printed_step = state.global_step
        answers = getattr(self.trainer.train_dataset, "answers", None)
        if answers is not None:
            answers.report = self._answered
        if notes.is_interactive and not notes.quiet and state.is_world_process_zero:
            self.live = Live(console=notes, refresh_per_second=4, transient=True)
            self.live.start()
        self._update(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_evaluation(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state, "evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.figures = dict(logs)
            self._update(state)
            if self.live is None or is_verbose():
                self._line_now_and_then(state)
        self.evaluated.update({key: logs[key] for key in logs if key.startswith("eval_")})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_evaluation(state)
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        self._print(state, f"step {state.global_step:,}: checkpoint {folder}", "dim")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_evaluation(state)
        self.stop()

    def stop(self) -> None:
        """Remove the display; the lines of evaluations stay."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    # What is shown ---------------------------------------------------------------------------------------------

    def _update(self, state: Any, doing: str = "") -> None:
        """Bring the display up to date."""
        if self.live is None:
            return
        total = state.max_steps
        step = f"step {state.global_step:,} of {total:,}"
        step += f", {doing}" if doing else ""
        left = self.time_left(state)
        self.bar.update(
            self.task, completed=state.global_step, total=total, description=step, left=left
        )
        lines = [Text(line) for line in self._now()]
        self.live.update(Group(self.bar, *lines))

    def _answered(self, number: int, done: int, failed: int) -> None:
        """Show how far the answers of a round are."""
        total = len(self.trainer.train_dataset.answers.keys)
        more = f", {failed:,} failed" if failed else ""
        if self.live is not None:
            text = f"answers of round {number}: {done:,} of {total:,}{more}"
            self.bar.update(self.task, description=text, left="")
            self.live.update(self.bar)
            return
        if self.lines is None or self.lines[0] != number:
            self.lines = (number, RowLines(total, f"Answers of round {number}"))
        self.lines[1].tell(done, more)

    def _now(self) -> list[str]:
        """Return the newest figures as lines."""
        if not self.figures:
            return ["no figures yet"]
        latest = self.trainer.latest_metrics
        lines = [figures(self.figures)]
        if latest is not None:
            lines.append(f"right at position 1, 2, ...: {percents(latest.by_position)}")
        return lines

    def _line_now_and_then(self, state: Any) -> None:
        """Print the newest figures, if the last line is long ago or everything is to be seen."""
        step, total = state.global_step, state.max_steps
        now = time.perf_counter()
        is_first = self.printed_step == self.first_step
        is_due = step - self.printed_step >= total / PARTS or now - self.last_line >= _SECONDS
        if not (is_first or is_due or is_verbose() or step == total):
            return
        self.printed_step, self.last_line = step, now
        words = everything(self.figures) if is_verbose() else figures(self.figures)
        self._print(state, f"step {step:,} of {total:,}: {words}, {self.time_left(state)}")

    def _tell_evaluation(self, state: Any) -> None:
        """Print what an evaluation has found, once all of it is known."""
        found, self.evaluated = self.evaluated, {}
        if not found:
            return
        words = figures({key.removeprefix("eval_"): value for key, value in found.items()})
        shares = percents(by_position(found))
        shares = f"; right at position 1, 2, ...: {shares}" if shares else ""
        self._print(state, f"step {state.global_step:,}, held out: {words}{shares}", "bold")

    def time_left(self, state: Any) -> str:
        """Return how long the rest of the run will take, as text."""
        done = state.global_step - self.first_step
        if done < 1:
            return ""
        each = (time.perf_counter() - self.started) / done
        return f"{duration(each * (state.max_steps - state.global_step))} left"

    def _print(self, state: Any, text: str, style: str = "") -> None:
        if state.is_world_process_zero:
            prose(notes, text, style, markup=False)


def figures(line: Mapping[str, float]) -> str:
    """Return the figures of a line of the log that are worth a look, as text.

    Args:
        line: by the names of Trainer's log, without a prefix.
    """
    words = []
    if "loss" in line:
        words.append(f"loss {line['loss']:.3f}")
    if "accuracy" in line:
        words.append(f"accuracy {line['accuracy']:.1%}")
    if "acceptance_length" in line:
        words.append(f"{line['acceptance_length']:.2f} tokens a cycle expected")
    if "decoded_acceptance_length" in line:
        words.append(f"{line['decoded_acceptance_length']:.2f} decoded")
    return ", ".join(words)


def everything(line: Mapping[str, float]) -> str:
    """Return all figures of a line of the log, as text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in line.items())


def percents(shares: Sequence[float]) -> str:
    """Return shares as whole percents, as text; "" without any."""
    if not shares:
        return ""
    return " ".join(f"{100 * share:.0f}" for share in shares) + " %"
