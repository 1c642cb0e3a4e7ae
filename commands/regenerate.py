# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub regenerate`: replace the answers of a dataset by the target's own."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .built_in import name_of
from .loading import checked_tokenizer, load_target
from .preflight import Problems, check_data, check_file_to_write
from .screen import RowLines, console, counted, notes, rows_progress
from .shared import NewTokens, Target

if TYPE_CHECKING:
    from ..training.regenerate import AnswerFn


def regenerate(
    target: Target,
    data: Annotated[str, typer.Option(help="A file or a Hub dataset, with messages or text.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; resumes if the file exists.")],
    server: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server, such as http://host:8000/v1 (default: run the target here)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name on the server (default: the first listed).")
    ] = None,
    max_new_tokens: NewTokens = 2048,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 is greedy (default: the target's own)."),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(min=1, help="Number of leading tokens used as the prompt, for plain text."),
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Concurrent requests to the server.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many rows, from the start.")
    ] = None,
    data_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    data_split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    streaming: Annotated[bool, typer.Option(help="Stream the dataset.")] = False,
) -> None:
    """Replace a dataset's answers by the target's own, from a server or generated here. Resumable."""
    from ..training import require

    require("datasets", "httpx", purpose="Regenerating answers")
    from ..training.reading import load_rows
    from ..training.regenerate import (
        GenerationSettings,
        InProcess,
        Server,
        check_continued,
        check_options,
        check_template,
        prompt_of,
    )

    problems = Problems()
    problems.check(check_file_to_write, output, "--output")
    problems.check(check_data, data)
    if model is not None and server is None:
        problems.add(
            "--model names a model of a server, and there is no --server; pass both or none."
        )
    tokenizer = checked_tokenizer(problems, target)
    problems.raise_all()
    settings = GenerationSettings(max_new_tokens, temperature, prompt_tokens)
    rows = load_rows(data, data_name, data_split, streaming)
    rows = rows if limit is None else rows.take(limit)
    options = {"target": _lasting(target)} | vars(settings)
    check_options(output, options)
    check_continued(rows, output, lambda row: prompt_of(tokenizer, row, prompt_tokens))
    if server is None:
        check_template(rows, tokenizer)
    if server is not None:
        answering = Server(server, tokenizer, settings, model)
        options["model"] = answering.model
        answer: AnswerFn = answering
    elif _all_there(rows, output):
        return
    else:
        answer = InProcess(load_target(target, dtype="auto"), tokenizer, settings)
    done = regenerate_with_progress(rows, output, answer, workers if server else 1, options)
    _tell(output, *done)


def _lasting(target: str) -> str:
    """Return the name of a target, which for a folder does not depend on where the command runs."""
    return name_of(os.path.abspath(target) if os.path.exists(target) else target)


def _tell(output: Path, done: int, failed: list[str]) -> None:
    """Print how many rows are there.

    Raises:
        typer.Exit: rows failed.
    """
    console.print(
        f"{output} holds {counted(done, 'row')}.", markup=False, highlight=False, soft_wrap=True
    )
    if failed:
        console.print(
            f"{counted(len(failed), 'row')} failed; the same command tries again. First error: {escape(failed[0])}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(1)


def _all_there(rows: Any, output: Path) -> bool:
    """Tell whether a file holds an answer to every row already, and say so."""
    from ..training.regenerate import finished_rows

    if not hasattr(rows, "__len__") or not output.exists():
        return False
    there = finished_rows(output) & {*range(len(rows))}
    if len(there) < len(rows):
        notes.print(f"{len(there):,} of {len(rows):,} already there", style="dim", highlight=False)
        return False
    words = f"{output}: {len(there):,} of {len(rows):,} already there; nothing to do. "
    words += "To have them answered anew, or with other options, choose another --output."
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    return True


def regenerate_with_progress(
    rows: Any, output: Path, answer: "AnswerFn", workers: int, options: dict[str, Any]
) -> tuple[int, list[str]]:
    """Run `training.regenerate` with a progress bar; return the number of rows, and the errors of failed rows.

    Args:
        options: what the answers are made with.
    """
    from ..training.regenerate import regenerate as run

    total = len(rows) if hasattr(rows, "__len__") else None
    lines = RowLines(total, "Answering")
    with rows_progress() as progress:
        task = progress.add_task("rows", total=total)

        def report(done: int, failed: int) -> None:
            description = f"rows, {failed} failed" if failed else "rows"
            progress.update(task, completed=done, description=description)
            lines.tell(done, f", {failed} failed" if failed else "")

        return run(rows, output, answer, workers, report, options)
