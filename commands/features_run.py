# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run `dflash-hub features`: read the options, prepare the rows, and write features or tell what they would cost."""

import shutil
from argparse import SUPPRESS
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from ..training.contradictions import fresh_mistakes
from ..training.feature_setup import NOT_WRITTEN_WITH, FeatureArguments, FeatureJob, check_writing
from ..training.feature_writer import write
from ..training.options import refuse
from ..training.setup import TrainOptions, shape_of
from .built_in import in_words
from .loading import load_tokenizer
from .parsing import Parser, given_options, parsed
from .preflight import (
    Problems,
    check_data,
    check_draft,
    check_dtype,
    check_folder_to_write,
    check_target,
    fresh_beside_draft,
)
from .screen import (
    RowLines,
    console,
    counted,
    duration,
    hide_bars,
    note,
    notes,
    prose,
    rows_progress,
)


def write_features(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the command line after `dflash-hub features`.

    Raises:
        ValueError: the options, the target or the data are invalid, or the folder holds something else.
        OSError: something cannot be found or written.
    """
    options, given = _parse(in_words(argv))
    folder = Path(given.output_dir)
    hide_bars()
    job = FeatureJob(options, given)
    for name, report in job.reports.items():
        notes.print(f"{name} data: {report}", style="dim", highlight=False, soft_wrap=True)
    if options.dry_run:
        _show_cost(job, folder)
        return
    total = sum(1 for _ in job.plan.shards())
    try:
        there = _write_with_progress(job, folder)
    except KeyboardInterrupt:
        note(f"Stopped. The same command goes on from the shards that are in {folder}.")
        raise typer.Exit(130) from None
    if there:
        console.print(f"{there:,} of {total:,} shards were already there.", highlight=False)
    size = f"{counted(_rows(job), 'row')} in {counted(total, 'shard')}"
    prose(
        console,
        f"[bold]{escape(str(folder))}[/bold] holds the features of {size}, {_size(job)}. "
        f"Train from them: dflash-hub train --features {escape(str(folder))}",
    )


def _parse(argv: list[str]) -> tuple[TrainOptions, FeatureArguments]:
    """Return what the options say, once the names of target and draft are checked.

    Raises:
        ValueError: listing everything that is wrong.
    """
    kinds: Any = (TrainOptions, FeatureArguments)
    parser = Parser(kinds, prog="dflash-hub features", allow_abbrev=False)
    _describe(parser)
    problems = Problems()
    options, given = parsed(parser, argv, problems)
    if given is not None:
        problems.check(check_folder_to_write, given.output_dir, "--output-dir")
    if options is not None:
        problems.check(check_target, options.target)
        problems.check(check_draft, options.draft, options.draft_revision)
        problems.check(check_dtype, options.target_dtype, "--target-dtype")
        problems.check(check_data, options.data)
        problems.check(check_writing, options)
        if options.draft is None:
            problems.check(refuse, fresh_mistakes(options))
        given_words = given_options(parser, argv)
        problems.check(
            refuse, fresh_beside_draft(options.draft, options.draft_revision, given_words)
        )
    if not problems.found:
        problems.check(load_tokenizer, options.target, options.trust_remote_code)
    if not problems.found:
        problems.check(shape_of, options)
    problems.raise_all()
    return options, given


def _describe(parser: Parser) -> None:
    """Leave out of the help what features are not written with, and say what their dry run does."""
    for action in parser._actions:
        if action.dest in NOT_WRITTEN_WITH:
            action.help = SUPPRESS
        if action.dest == "dry_run":
            action.help = "Tell the disk space and the time, and write nothing."


def option_names() -> list[str]:
    """Return the names of all options."""
    return [one.name for kind in (TrainOptions, FeatureArguments) for one in fields(kind)]


def _rows(job: FeatureJob) -> int:
    return sum(shard.rows for _, shard in job.plan.shards())


def _size(job: FeatureJob) -> str:
    """Return what the features take, as text."""
    size = sum(job.plan.bytes_of(shard) for _, shard in job.plan.shards())
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _write_with_progress(job: FeatureJob, folder: Path) -> int:
    """Write with a progress bar; return how many shards were there before."""
    lines = RowLines(_rows(job), "Writing")
    with rows_progress() as progress:
        task = progress.add_task("rows", total=_rows(job))

        def report(shards: int, rows: int) -> None:
            progress.update(task, completed=rows, description=f"rows, {counted(shards, 'shard')}")
            lines.tell(rows, f", {counted(shards, 'shard')}")

        return write(folder, job.plan, job.load, report)


def _show_cost(job: FeatureJob, folder: Path) -> None:
    """Print what the features cost in disk and time; nothing is written."""
    origin, tokens = job.plan.origin, job.plan.tokens
    rate = job.tokens_per_second()
    shards = sum(1 for _ in job.plan.shards())
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("rows", f"{_rows(job):,} of {tokens:,} tokens, prepared")
    layers = ", ".join(map(str, origin.target_layer_ids))
    table.add_row("of each token", f"{' and '.join(origin.holds)}, layers {layers}, {origin.dtype}")
    table.add_row(
        "disk",
        f"{origin.bytes_per_token:,} bytes a token; {_size(job)} in {counted(shards, 'shard')}",
    )
    table.add_row("room", f"{shutil.disk_usage(_existing(folder)).free / 1e9:,.1f} GB at {folder}")
    table.add_row(
        "time",
        f"{rate:,.0f} tokens/s on {job.target.device}; about {duration(max(1, tokens / rate))}",
    )
    console.print(table, highlight=False)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
