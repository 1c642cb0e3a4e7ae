# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What `dflash-hub train` does: read the options, set the run up, train, save and publish."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from transformers import HfArgumentParser

from ..publishing import PublishOptions, publish
from ..training import DFlashTrainer, DFlashTrainingArguments
from ..training.setup import TrainOptions, build
from ..training.trainer import explain_failed_push
from .dry_run import dry_run
from .shared import console


class _Parser(HfArgumentParser):
    """Whose errors are one line; the Trainer has more than a hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `dflash-hub train --help` lists the options.")


def train(words: list[str]) -> None:
    """Run the command.

    Args:
        words: the command line after `dflash-hub train`.

    Raises:
        ValueError: options, pair or data are not sound.
        OSError: something cannot be found or written.
        RuntimeError: the Hub did not take the finished draft; it is safe on disk.
    """
    parser = _Parser((TrainOptions, DFlashTrainingArguments), prog="dflash-hub train")
    options, args = parser.parse_args_into_dataclasses(_repository(words))
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run:
            args = replace(
                args, output_dir=scratch, push_to_hub=False, report_to="none", eval_strategy="no"
            )
        trainer = build(options, args)
        if not options.streaming:
            tell_data(trainer)
        if options.dry_run:
            dry_run(trainer, Path(scratch))
            return
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finish(trainer, options)


def _repository(words: list[str]) -> list[str]:
    """`--push-to-hub REPO` in the words of the Trainer: `--push_to_hub --hub_model_id REPO`."""
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        spelled.append(word)
        if (
            word in ("--push-to-hub", "--push_to_hub")
            and following
            and following[0] != "-"
            and following not in ("True", "False")
        ):
            spelled += ["True", "--hub_model_id"]
    return spelled


def tell_data(trainer: DFlashTrainer) -> None:
    """How many documents there are, and how many were left out; of a stream, as far as it was read."""
    for name, report in trainer.reports.items():
        console.print(f"{name} data: {report}", style="dim")


def finish(trainer: DFlashTrainer, options: TrainOptions) -> None:
    """Save the draft, and publish it where that was asked for."""
    folder, repo = trainer.args.output_dir, trainer.args.hub_model_id
    trainer.save_model(folder, _internal_call=True)
    if not trainer.is_world_process_zero():
        return
    if options.streaming:
        tell_data(trainer)
    console.print(f"The draft is in [bold]{folder}[/bold].")
    if trainer.args.push_to_hub:
        trainer.create_model_card()
        push = PublishOptions(trainer.args.hub_private_repo, trainer.args.hub_token)
        with explain_failed_push(folder, repo):
            done = publish(folder, repo or Path(folder).name, push)
        where = f"main at {done.commit[:8]}, engines at {done.engines_commit[:8]}"
        console.print(f"[bold]{done.repo_id}[/bold] is published: {where}.")
