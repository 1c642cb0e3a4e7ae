# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run `dflash-hub train`: read the options, set up the run, train, save and publish."""

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from transformers import HfArgumentParser

from ..publishing import PublishOptions, publish
from ..training import DFlashTrainer, DFlashTrainingArguments
from ..training.setup import TrainOptions, build
from ..training.trainer import explain_failed_push, explain_failed_write, sole_trainer
from .dry_run import dry_run
from .inspect_rows import inspect_rows
from .shared import console


class _Parser(HfArgumentParser):
    """Raise errors of one line, because the usage text lists more than a hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `dflash-hub train --help` lists the options.")


def train(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the command line after `dflash-hub train`.

    Raises:
        ValueError: the options, the pair or the data are invalid.
        OSError: something cannot be found or written.
        RuntimeError: the finished draft could not be pushed; it is saved on disk.
    """
    parser = _Parser((TrainOptions, DFlashTrainingArguments), prog="dflash-hub train")
    options, args = parser.parse_args_into_dataclasses(_expand_push_to_hub(argv))
    if options.inspect is not None:
        inspect_rows(options, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run:
            args = replace(
                args, output_dir=scratch, push_to_hub=False, report_to="none", eval_strategy="no"
            )
        with sole_trainer(args):
            _run(options, args)


def _run(options: TrainOptions, args: DFlashTrainingArguments) -> None:
    """Set up the run, and train or make the dry run."""
    trainer = build(options, args)
    if not options.streaming:
        print_data_reports(trainer)
    if options.dry_run:
        dry_run(trainer, Path(str(args.output_dir)))
        return
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finish(trainer, options)


def _expand_push_to_hub(argv: list[str]) -> list[str]:
    """Turn `--push-to-hub REPO` into the Trainer's options: `--push-to-hub True --hub_model_id REPO`."""
    expanded = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        expanded.append(word)
        is_push = word in ("--push-to-hub", "--push_to_hub")
        if is_push and following[:1] not in ("", "-") and following not in ("True", "False"):
            expanded += ["True", "--hub_model_id"]
    return expanded


def option_names() -> list[str]:
    """Return the names of all options."""
    return [one.name for kind in (TrainOptions, DFlashTrainingArguments) for one in fields(kind)]


def print_data_reports(trainer: DFlashTrainer) -> None:
    """Print how many documents were read and how many were left out."""
    for name, report in trainer.reports.items():
        console.print(f"{name} data: {report}", style="dim")


def finish(trainer: DFlashTrainer, options: TrainOptions) -> None:
    """Save the draft, and publish it if the options say so.

    Raises:
        OSError: it could not be saved; says which checkpoint is complete and how to resume from it.
        RuntimeError: it could not be pushed; it is saved.
    """
    folder, repo = trainer.args.output_dir, trainer.args.hub_model_id
    with explain_failed_write(f"The trained draft could not be saved in {folder}", trainer.args):
        trainer.save_model(folder, _internal_call=True)
    if not trainer.is_world_process_zero():
        return
    if options.streaming:
        print_data_reports(trainer)
    console.print(f"The draft is in [bold]{folder}[/bold].")
    if trainer.args.push_to_hub:
        trainer.create_model_card()
        push = PublishOptions(trainer.args.hub_private_repo, trainer.args.hub_token)
        with explain_failed_push(folder, repo):
            done = publish(folder, repo or Path(folder).name, push)
        where = f"main at {done.commit[:8]}, engines at {done.engines_commit[:8]}"
        console.print(f"[bold]{done.repo_id}[/bold] is published: {where}.")
