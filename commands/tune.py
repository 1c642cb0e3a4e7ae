# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train --tune`: short runs with other options, compared by what their drafts decode."""

import gc
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..training.best import DECODED, describe_block
from ..training.options import refuse
from ..training.setup import TrainOptions, build
from .mistakes import no_such_option
from .preflight import fresh_beside_draft
from .screen import console, notes
from .train_display import shown
from .words import flag_of

SHORT: dict[str, Any] = {
    "push_to_hub": False,
    "report_to": "none",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "early_stopping": None,
}
"""Options of a run of few steps, which leaves nothing."""


def tune(parser: Any, argv: list[str], options: TrainOptions, scratch: Path) -> None:
    """Train every combination of the options to compare for a few steps; print what each decodes.

    Args:
        parser: of the command line.
        argv: the command line, which holds all other options.
        options: as they are read from it.
        scratch: a folder for what the runs write.

    Raises:
        ValueError: nothing can be decoded, or an option cannot be compared.
    """
    choices = _choices(options.tune or [])
    table = Table(*choices, "held-out loss", "expected", "decoded", "seconds", box=None)
    found: list[tuple[float, str]] = []
    loaded = None
    for number, values in enumerate(itertools.product(*choices.values()), 1):
        words = [f"--{name}={value}" for name, value in zip(choices, values, strict=True)]
        given, args = parser.parse_args_into_dataclasses([*argv, *words])
        name = " ".join(words)
        notes.print(f"{number}: {name}", style="dim", highlight=False)
        trainer = build(given, _short(args, given.tune_steps, scratch / str(number)), loaded)
        loaded = trainer.preprocess_config.tokenizer, trainer.target
        line, seconds = _train(trainer)
        figures = [line["eval_loss"], line["eval_acceptance_length"], line[f"eval_{DECODED}"]]
        table.add_row(*values, *(f"{value:.3f}" for value in figures), f"{seconds:.0f}")
        advice = describe_block(line, trainer.accelerator.unwrap_model(trainer.model).config)
        found.append((line[f"eval_{DECODED}"], f"{name}. {advice}"))
        del trainer
        gc.collect()
    console.print(table)
    best = max(found, key=lambda one: one[0])
    console.print(
        f"After {options.tune_steps} steps most is accepted with {best[1]}",
        highlight=False,
        soft_wrap=True,
    )


def _short(args: Any, steps: int, folder: Path) -> Any:
    """Return the options of a run of so many steps, which leaves nothing."""
    lasting = {"save_strategy": "no", "resume_from_checkpoint": None}
    return replace(args, output_dir=str(folder), max_steps=steps, **lasting, **SHORT)


def _train(trainer: Any) -> tuple[dict[str, float], float]:
    """Train; return what an evaluation finds then, and the seconds that training took."""
    began = time.monotonic()
    with shown(trainer):
        trainer.train()
        seconds = time.monotonic() - began
        return trainer.evaluate(), seconds


def _choices(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each option to compare.

    Raises:
        ValueError: a word does not say option and values.
    """
    choices = {}
    for word in words:
        name, values = word.partition("=")[::2]
        if not name or not values:
            raise ValueError(
                f"--tune has {word!r}; write options and their values, such as learning_rate=3e-4,1e-3 block_size=8,16."
            )
        choices[name.removeprefix("--").replace("-", "_")] = values.split(",")
    return choices


def check_tune(options: TrainOptions, args: Any) -> None:
    """Refuse a comparison without anything to compare, or to compare by.

    Raises:
        ValueError: names the option.
    """
    known = {*vars(options), *vars(args)}
    flags = [flag_of(name) for name in sorted(known)]
    choices = _choices(options.tune or [])
    found = list(fresh_beside_draft(options.draft, options.draft_revision, choices))
    for name in choices:
        if name not in known:
            found.append(f"--tune: {no_such_option(flag_of(name), flags, 'dflash-hub train')}")
    if not options.eval_rows or not args.eval_acceptance_prompts:
        found.append(
            "--tune compares by what held-out prompts decode; pass --eval-rows 100 --eval-acceptance-prompts 16."
        )
    refuse(found)
