# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub push`: publish a draft from a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax

from .screen import console, hide_bars, notes
from .shared import Token, tidy_when_terminated

if TYPE_CHECKING:
    from ..publishing import Plan, Published


def push(
    directory: Annotated[Path, typer.Argument(help="Folder with the draft, in any layout.")],
    repo: Annotated[str, typer.Argument(help="Repository to push to, such as me/my-draft.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the target, for the card.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License, such as apache-2.0, for the card.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Language that the draft was made for, such as en; may be repeated."),
    ] = None,
    thinking: Annotated[
        str | None, typer.Option(help="Mode that the draft was made for: on, off or both.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files, push nothing.")
    ] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload DFlash draft",
    token: Token = None,
) -> None:
    """Check a draft in a fresh process and push it: the hub layout to main, the engines layout to branch engines."""
    from ..publishing import Published, PublishOptions, plan, publish

    hide_bars(downloads=False)
    metadata = {"base_model": base_model, "license": license, "language": language}
    metadata["thinking"] = thinking
    card = {key: value for key, value in metadata.items() if value}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tidy_when_terminated(),
        Progress(*columns, console=notes, disable=not notes.is_interactive) as progress,
    ):
        task = progress.add_task("Starting", total=None)
        options = PublishOptions(private=private or None, token=token, message=message, card=card)
        run = plan if dry_run else publish
        done = run(
            directory, repo, options, report=lambda step: progress.update(task, description=step)
        )
        finished = "Checked" if dry_run else "Published"
        progress.update(task, description=finished, total=1, completed=1)
    for one in done.left_out:
        console.print(f"Left out: {one}", highlight=False, soft_wrap=True)
    if isinstance(done, Published):
        _show_published(done)
    else:
        _show_plan(done)


def _show_plan(done: "Plan") -> None:
    """Print the files that would be pushed to each branch, with their sizes."""
    for branch, files in done.files.items():
        console.print(f"\n[bold]{done.repo_id}[/bold], branch {branch}: {len(files)} files")
        for name, size in files.items():
            console.print(f"  {size:>14,}  {name}", highlight=False, soft_wrap=True)
    console.print("\nNothing was pushed.")


def _show_published(done: "Published") -> None:
    """Print the commits, and the code that loads the draft."""
    console.print(
        f"\n[bold]{done.repo_id}[/bold] is published: main at {done.commit[:8]}, engines at {done.engines_commit[:8]}."
    )
    console.print("Load exactly this commit:\n")
    console.print(Syntax(done.snippet, "python", background_color="default"))
