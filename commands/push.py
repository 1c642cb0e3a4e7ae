# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub push`: publish a draft from a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax

from .shared import Token, console


def push(
    directory: Annotated[Path, typer.Argument(help="Folder with the draft, in any layout.")],
    repo: Annotated[str, typer.Argument(help="Repository to push to, such as me/my-draft.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the target, for the card.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License, such as apache-2.0, for the card.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload DFlash draft",
    token: Token = None,
) -> None:
    """Check a draft in a fresh process and push it: the hub layout to main, the engines layout to branch engines."""
    from transformers.utils import logging

    from ..publishing import PublishOptions, publish

    logging.disable_progress_bar()
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder; pass the folder that holds the draft's config.json."
        )
    metadata = {"base_model": base_model, "license": license}
    card = {key: value for key, value in metadata.items() if value}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Starting", total=None)
        options = PublishOptions(private=private or None, token=token, message=message, card=card)
        done = publish(
            directory, repo, options, report=lambda step: progress.update(task, description=step)
        )
        progress.update(task, description="Published", total=1, completed=1)
    console.print(
        f"\n[bold]{done.repo_id}[/bold] is published: main at {done.commit[:8]}, engines at {done.engines_commit[:8]}."
    )
    console.print("Load exactly this commit:\n")
    console.print(Syntax(done.snippet, "python", background_color="default"))
