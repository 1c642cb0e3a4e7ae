# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub regenerate`: the answers of a dataset in the target's own words."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from .shared import NewTokens, Target, console


def regenerate(
    target: Target,
    data: Annotated[str, typer.Option(help="A file or a Hub dataset with messages or text.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; resumes if the file exists.")],
    server: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, such as http://host:8000/v1.")
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
        typer.Option(min=1, help="For plain text, how many of its first tokens are the prompt."),
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Concurrent requests to the server.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    data_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    data_split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    streaming: Annotated[bool, typer.Option(help="Stream the dataset.")] = False,
) -> None:
    """Rewrite a dataset's answers with the target's own, through a server or in this process; resumable."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.data import load_rows
    from ..training.regenerate import AnswerFn, GenerationSettings, InProcess, Server, check_columns
    from ..training.regenerate import regenerate as run

    tokenizer = AutoTokenizer.from_pretrained(target)
    settings = GenerationSettings(max_new_tokens, temperature, prompt_tokens)
    rows = load_rows(data, data_name, data_split, streaming)
    rows = rows if limit is None else rows.take(limit)
    check_columns(rows)
    if server is not None:
        answer: AnswerFn = Server(server, tokenizer, settings, model)
    else:
        answer = InProcess(
            AutoModelForCausalLM.from_pretrained(target, dtype="auto"), tokenizer, settings
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=len(rows) if hasattr(rows, "__len__") else None)

        def report(done: int, failed: int) -> None:
            progress.update(
                task, completed=done, description=f"rows, {failed} failed" if failed else "rows"
            )

        done, failed = run(rows, output, answer, workers if server else 1, report)
    console.print(f"[bold]{output}[/bold] holds {done:,} rows.")
    if failed:
        console.print(
            f"{len(failed)} rows failed; the same command tries them again: {escape(failed[0])}"
        )
        raise typer.Exit(1)
