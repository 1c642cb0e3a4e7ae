# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub refresh`: update the code of a pushed draft."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .preflight import Problems, check_repository, check_token
from .screen import console, doing, hide_bars
from .shared import Token, tidy_when_terminated

if TYPE_CHECKING:
    from ..publishing.refresh import BranchDifference


def refresh(
    repo: Annotated[str, typer.Argument(help="Repository of a pushed draft, such as me/my-draft.")],
    diff: Annotated[bool, typer.Option("--diff", help="Also show the unified diff.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the differences and push nothing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Push without asking for confirmation.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    token: Token = None,
) -> None:
    """Update the code in a pushed draft's repository to this version. Weights and card stay unchanged."""
    from ..publishing.refresh import RefreshOptions
    from ..publishing.refresh import refresh as run

    hide_bars(downloads=False)
    problems = Problems()
    problems.check(check_repository, repo, "The repository")
    if not dry_run:
        problems.check(check_token, token)
    problems.raise_all()
    options = RefreshOptions(token=token, dry_run=dry_run)
    options.message = message or options.message
    with tidy_when_terminated(), doing("Starting") as status:

        def agree(branches: "tuple[BranchDifference, ...]") -> bool:
            status.stop()
            show_difference(branches, diff)
            if not yes and not sys.stdin.isatty():
                raise ValueError(
                    "Nothing was pushed: there is no terminal to ask for confirmation. Pass --yes to push without it."
                )
            agreed = yes or typer.confirm(f"Push this to {repo}?", abort=True)
            status.start()
            return agreed

        done = run(repo, options, agree, report=status.update)
    if dry_run:
        show_difference(done.branches, diff)
        console.print("Nothing was pushed (--dry-run).")
    elif not done.commits:
        show_difference(done.branches, diff)
        console.print("Nothing to push.")
    for branch, commit in done.commits.items():
        console.print(
            f"[bold]{escape(repo)}[/bold]: {branch} is at {commit[:8]}.",
            highlight=False,
            soft_wrap=True,
        )


def show_difference(branches: "tuple[BranchDifference, ...]", diff: bool) -> None:
    """Print which files would change on each branch; with `diff`, also the lines."""
    from ..configuration_dflash import __version__

    for found in branches:
        if found.changes:
            summary = f"dflash-hub {found.version} becomes {__version__}"
        else:
            summary = f"the code is already that of dflash-hub {__version__}"
        console.print(
            f"[bold]{found.branch}[/bold] at {found.commit[:8]}: {escape(summary)}", highlight=False
        )
        for change in found.changes:
            added, removed = change.lines
            counts = f"+{added}/-{removed} lines"
            console.print(
                f"  {change.kind:<8} {escape(change.path)} {counts}",
                highlight=False,
                soft_wrap=True,
            )
        if diff:
            console.print(
                "".join(change.diff for change in found.changes),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    if "engines" not in [found.branch for found in branches]:
        console.print("There is no branch engines; only main is updated.")
