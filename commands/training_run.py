# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run `dflash-hub train`: read the options, set up the run, train, save and publish."""

import re
import shlex
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer
from huggingface_hub import HfApi

from ..publishing import PublishOptions, publish
from ..repository_dflash import check_destination
from ..training import DFlashTrainer, DFlashTrainingArguments
from ..training.best import PAYS
from ..training.contradictions import contradictions, fresh_mistakes, greedy_mistakes
from ..training.feature_setup import build_from_features, with_features
from ..training.options import refuse
from ..training.progress import PLOT
from ..training.setup import TrainOptions, build, shape_of
from ..training.trainer import (
    checkpoint_to_resume,
    explain_failed_push,
    explain_failed_write,
    last_checkpoint,
    sole_trainer,
)
from .built_in import in_words, name_of
from .dry_run import dry_run, tell_memory
from .feature_defaults import take_from_features
from .inspect_rows import inspect_rows
from .loading import load_tokenizer
from .parsing import Parser, given_options, parsed
from .preflight import (
    Problems,
    check_data,
    check_draft,
    check_dtype,
    check_folder_to_write,
    check_repository,
    check_target,
    check_token,
    fresh_beside_draft,
)
from .screen import console, hide_bars, note, notes
from .train_display import shown
from .tune import SHORT, check_tune, tune


def train(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the command line after `dflash-hub train`.

    Raises:
        ValueError: the options, the pair or the data are invalid.
        OSError: something cannot be found or written.
        RuntimeError: the finished draft could not be pushed; it is saved on disk.
    """
    argv = in_words(argv)
    parser = Parser(
        (TrainOptions, DFlashTrainingArguments), prog="dflash-hub train", allow_abbrev=False
    )
    take_from_features(parser, argv)
    options, args = _parse(parser, _expand_push_to_hub(argv))
    if options.inspect is not None and options.features is None:
        inspect_rows(options, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.tune is not None:
            tune(parser, _expand_push_to_hub(argv), options, Path(scratch))
            return
        if options.dry_run:
            args = replace(args, output_dir=scratch, **SHORT)
        with sole_trainer(args):
            _run(options, args)


def _parse(parser: Parser, argv: list[str]) -> tuple[TrainOptions, Any]:
    """Return what the options say, ours and the Trainer's, once the names of target and draft are checked.

    Raises:
        ValueError: listing everything that is wrong.
    """
    problems = Problems()
    options, args = parsed(parser, argv, problems)
    are_known = options is not None and _check_names(options, problems)
    if options is not None:
        given = given_options(parser, argv)
        problems.check(refuse, fresh_beside_draft(options.draft, options.draft_revision, given))
    if args is not None and options is not None:
        _check_output(options, args, problems)
        if options.tune is not None:
            problems.check(check_tune, options, args)
    config, own = _check_shape(options, problems, are_known)
    _check_together(options, args, config, own, problems)
    problems.raise_all()
    return options, args


def _check_names(options: TrainOptions, problems: Problems) -> bool:
    """Collect what is wrong with the names of target, draft and data; return whether the models can be read."""
    found = len(problems.found)
    is_named = options.features is None or bool(options.target)
    if is_named:
        problems.check(check_target, options.target)
    problems.check(check_draft, options.draft, options.draft_revision)
    problems.check(check_dtype, options.target_dtype, "--target-dtype")
    if is_named and len(problems.found) == found:
        problems.check(load_tokenizer, options.target, options.trust_remote_code)
    are_known = len(problems.found) == found
    if options.features is None:
        problems.check(check_data, options.data)
    return are_known


def _check_output(options: TrainOptions, args: Any, problems: Problems) -> None:
    """Collect why the draft cannot be written or pushed."""
    if options.inspect is None and options.tune is None and not options.dry_run:
        problems.check(check_folder_to_write, str(args.output_dir), "--output-dir")
        problems.check(checkpoint_to_resume, args, args.resume_from_checkpoint)
        if args.push_to_hub:
            problems.check(_check_push, args)


def _check_shape(
    options: TrainOptions | None, problems: Problems, are_known: bool
) -> tuple[Any, Any]:
    """Collect what is wrong with the draft's shape; return its config and the target's settings, None if unknown.

    Args:
        options: None if they could not be read.
        are_known: whether the configs of target and draft can be read.
    """
    if options is None:
        return None, None
    mistakes = [] if options.draft is not None else list(fresh_mistakes(options))
    for mistake in mistakes:
        problems.add(mistake)
    if mistakes or not are_known or options.features is not None:
        return None, None
    return problems.check(shape_of, options) or (None, None)


def _check_together(
    options: TrainOptions | None, args: Any, config: Any, own: Any, problems: Problems
) -> None:
    """Collect what options say against each other, and against the settings `own` of the target."""
    if options is None or args is None:
        return
    for mistake in contradictions(options, args, config):
        problems.add(mistake)
    if options.features is not None:
        for mistake in with_features(options, args):
            problems.add(mistake)
    if config is not None:
        for mistake in greedy_mistakes(args, own):
            problems.add(mistake)


def _check_push(args: Any) -> None:
    """Ask the Hub whether the draft may be pushed at the end.

    Raises:
        ValueError, RuntimeError: it may not, or there is no token.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).name
    check_repository(name, "--push-to-hub")
    check_token(args.hub_token, "--hub-token")
    check_destination(HfApi(token=args.hub_token), name, args.hub_private_repo)


def _run(options: TrainOptions, args: DFlashTrainingArguments) -> None:
    """Set up the run, and train or make the dry run."""
    hide_bars()
    loaded = options.features or f"{name_of(options.target)} and {options.data}"
    notes.print(f"Loading {loaded}", style="dim", markup=False, highlight=False, soft_wrap=True)
    expected = None
    if options.dry_run and options.features is None:
        expected = tell_memory(options, args)
    trainer = (build if options.features is None else build_from_features)(options, args)
    if options.draft is None and not args.resume_from_checkpoint:
        _tell_choices(trainer)
    if not options.streaming:
        print_data_reports(trainer)
    with shown(trainer):
        if options.dry_run:
            dry_run(trainer, Path(str(args.output_dir)), expected)
            return
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        except KeyboardInterrupt:
            _tell_interrupted(trainer)
            raise typer.Exit(130) from None
    finish(trainer, options)


def _tell_interrupted(trainer: DFlashTrainer) -> None:
    """Print what a run that was ended by Ctrl-C has left, and how to go on."""
    complete = last_checkpoint(trainer.args.output_dir)
    how = "There is no checkpoint to go on from."
    if complete is not None:
        how = f"The same command with --resume-from-checkpoint true goes on from {complete}."
    note(f"Stopped at step {trainer.state.global_step:,}. {how}")


def _tell_choices(trainer: DFlashTrainer) -> None:
    """Print what a fresh draft reads and predicts with, which may have been chosen for it."""
    config: Any = trainer.accelerator.unwrap_model(trainer.model).config
    taps = ", ".join(map(str, config.target_layer_ids))
    notes.print(
        f"A fresh draft: mask token {config.mask_token_id}, target layers {taps}, blocks of {config.block_size}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _expand_push_to_hub(argv: list[str]) -> list[str]:
    """Turn `--push-to-hub REPO` into the Trainer's options: `--push-to-hub True --hub_model_id REPO`."""
    expanded = []
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
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
        notes.print(f"{name} data: {report}", style="dim", markup=False, highlight=False)


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
    console.print(f"The draft is in {folder}.", markup=False, highlight=False, soft_wrap=True)
    plot = Path(str(folder)) / PLOT
    if plot.exists():
        console.print(f"Plot: {plot}", markup=False, highlight=False, soft_wrap=True)
    for line in trainer.best_evaluation():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if trainer.args.push_to_hub:
        trainer.create_model_card()
        push = PublishOptions(trainer.args.hub_private_repo, trainer.args.hub_token)
        with explain_failed_push(folder, repo):
            done = publish(folder, repo or Path(folder).name, push)
        where = f"main at {done.commit[:8]}, engines at {done.engines_commit[:8]}"
        console.print(f"[bold]{done.repo_id}[/bold] is published: {where}.", soft_wrap=True)
    tell_next(trainer, options, str(folder))


def tell_next(trainer: DFlashTrainer, options: TrainOptions, folder: str) -> None:
    """Print the commands that come next.

    Decode with the draft, and push it or, if it is pushed or was not measured, measure it. Where hardly any drafted
    token is accepted, look at the data and train longer.
    """
    pair = f"--target {shlex.quote(name_of(options.target))} --draft {shlex.quote(folder)}"
    length = accepted(trainer.state.log_history)
    follow = [f"dflash-hub push {shlex.quote(folder)} {_repository(folder)}"]
    if trainer.args.push_to_hub or length is None:
        follow = [f"dflash-hub eval {pair} --output-dir results"]
    elif not Path(options.target).exists():
        follow[0] += f" --base-model {shlex.quote(name_of(options.target))}"
    if length is not None and length < PAYS:
        note(
            f"{length:.2f} tokens a cycle: hardly any drafted token is accepted, so this draft helps nobody yet. Check "
            "what it is trained on, and train longer."
        )
        follow = _to_train_longer(options, trainer.args, folder)
    notes.print("Next:", style="dim")
    for line in (f'dflash-hub generate {pair} "Write a quicksort in Python."', *follow):
        notes.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def accepted(history: list[dict[str, float]]) -> float | None:
    """Return the last acceptance length of a log: decoded, of held-out text, or of training; None without any."""
    for name in ("eval_decoded_acceptance_length", "eval_acceptance_length", "acceptance_length"):
        found = [line[name] for line in history if name in line]
        if found:
            return found[-1]
    return None


def _to_train_longer(options: TrainOptions, args: Any, folder: str) -> list[str]:
    """Return commands that show the data and go on from a draft."""
    data = f"--data {shlex.quote(options.data)}"
    shown = [f"dflash-hub train --target {shlex.quote(name_of(options.target))} {data} --inspect"]
    if options.features is not None:
        data, shown = f"--features {shlex.quote(options.features)}", []
    pair = f"--target {shlex.quote(name_of(options.target))} --draft {shlex.quote(folder)}"
    longer = f"--max-steps {10 * args.max_steps}"
    if args.max_steps <= 0:
        longer = f"--num-train-epochs {10 * args.num_train_epochs:g}"
    more = f"dflash-hub train {pair} {data} --output-dir {shlex.quote(folder + '-longer')} {longer}"
    return [*shown, more]


def _repository(folder: str) -> str:
    """Return a name for the repository of a draft in this folder, which its user completes."""
    name = re.sub(r"[^\w.-]+", "-", Path(folder).resolve().name).strip("-.")
    return f"me/{name or 'my-draft'}"
