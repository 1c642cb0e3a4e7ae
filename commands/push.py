# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub push`: publish a draft from a folder."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax

from .preflight import Problems, check_base_model, check_draft_name, check_repository, check_token
from .screen import console, hide_bars, note, notes, prose
from .shared import Token, tidy_when_terminated

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..checking.serve import Serving
    from ..publishing import Plan, Published, PublishOptions

_TARGET = "YOUR-TARGET"
_MEASURED = "## Measured"
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


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
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Hub id of data that it was trained on, for the card; may be repeated."),
    ] = None,
    thinking: Annotated[
        str | None, typer.Option(help="Mode that the draft was made for: on, off or both.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the files, push nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Push without asking on a terminal.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload DFlash draft",
    token: Token = None,
) -> None:
    """Check a draft in a fresh process and push it: the hub layout to main, the engines layout to branch engines."""
    from ..publishing import Published, PublishOptions

    hide_bars(downloads=False)
    metadata = {"base_model": base_model, "license": license, "language": language}
    metadata.update(datasets=dataset, thinking=thinking)
    card = {key: value for key, value in metadata.items() if value}
    problems = Problems()
    if not dry_run:  # which does what it can without one
        problems.check(check_token, token)
    _check(directory, repo, card, problems)
    options = PublishOptions(private=private or None, token=token, message=message, card=card)
    done, served = _run(directory, repo, options, dry_run, yes)
    if isinstance(done, Published):
        _show_published(done)
    show_servings(done.repo_id, served)
    if dry_run:
        console.print("\nNothing was pushed (--dry-run).")


def _run(
    directory: Path, repo: str, options: "PublishOptions", dry_run: bool, yes: bool
) -> "tuple[Plan | Published, dict[str, Serving]]":
    """Push a draft, or only plan to; show on the way what it will write, and ask.

    Returns:
        What was planned or pushed, and how engines serve it.
    """
    from ..publishing import plan, publish

    served: dict[str, Serving] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tidy_when_terminated(),
        Progress(*columns, console=notes, disable=not notes.is_interactive) as progress,
    ):
        task = progress.add_task("Starting", total=None)

        def preview(found: "Plan") -> None:
            progress.stop()
            served.update(_servings(found))
            show_plan(found, dry_run)
            if not dry_run:
                _ask(repo, yes)
                progress.start()

        run: Any = plan if dry_run else publish
        done = run(
            directory,
            repo,
            options,
            report=lambda step: progress.update(task, description=step),
            preview=preview,
        )
        finished = "Checked" if dry_run else "Published"
        progress.update(task, description=finished, total=1, completed=1)
    return done, served


def _check(directory: Path, repo: str, card: dict[str, Any], problems: Problems) -> None:
    """Refuse what cannot be pushed, before the draft is read.

    Args:
        problems: those that are known.

    Raises:
        ValueError: listing everything that is wrong.
    """
    from ..publishing.card import MODES

    if not directory.is_dir():
        problems.add(
            f"{directory} is not a folder; pass the folder that holds the draft's config.json."
        )
    else:
        problems.check(check_draft_name, str(directory), {})
    problems.check(check_repository, repo, "The repository")
    if "base_model" in card:
        problems.check(check_base_model, card["base_model"])
    if card.get("thinking", "on") not in MODES:
        problems.add(f"--thinking is {card['thinking']!r}; it must be one of {', '.join(MODES)}.")
    problems.raise_all()


def _ask(repo: str, yes: bool) -> None:
    """Ask on a terminal whether to push; nobody can be asked elsewhere.

    Raises:
        typer.Abort: no.
    """
    if not yes and sys.stdin.isatty() and notes.is_interactive:
        typer.confirm(f"Push this to {repo}?", abort=True, err=True)


def show_plan(found: "Plan", whole: bool) -> None:
    """Print what would be pushed: to each branch its files with their sizes, and what the card says.

    Args:
        whole: whether this is the result, with every file; else the code is one line.
    """
    from ..publishing.card import gaps

    out = console if whole else notes
    for branch, files in found.files.items():
        total = size_of(sum(files.values()))
        title = f"{found.repo_id}, branch {branch}: {len(files)} files, {total}"
        out.print(f"\n{title}", style="bold", **_PLAIN)
        code = [name for name in files if name.endswith(".py")]
        for name, size in files.items():
            if whole or name not in code:
                out.print(f"  {size_of(size):>10}  {name}", **_PLAIN)
        if not whole:
            all_code = size_of(sum(files[name] for name in code))
            out.print(f"  {all_code:>10}  code, {len(code)} files", **_PLAIN)
    for one in found.left_out:
        out.print(f"Left out: {one}", **_PLAIN)
    out.print("\nThe card:", style="bold")
    for line in card_lines(found.card):
        out.print(f"  {line}", **_PLAIN)
    if not has_section(found.card, _MEASURED):
        note(
            "A push does not decode. `dflash-hub check FOLDER --target TARGET` does, and says how much of what the "
            "draft proposes is accepted. `dflash-hub eval --update-card` writes that into the card."
        )
    missing = gaps(found.card)
    if missing:
        note(
            f"The card does not say {', '.join(missing)}. Options of push fill it in, or README.md."
        )
    if not found.is_asked:
        _tell_unasked(found.repo_id)


def _tell_unasked(repo_id: str) -> None:
    """Print what a plan without a token cannot say, and how to log in."""
    note(
        f"There is no token, so the Hub was not asked whether {repo_id} exists, is public, may be written or has a "
        "card to keep. To have that checked, log in with hf auth login, set HF_TOKEN, or pass --token."
    )
    if "/" not in repo_id:
        note(
            f"{repo_id} names no owner. With a token it becomes its user's, and the lines name that."
        )


def card_lines(card: "ModelCard") -> list[str]:
    """Return what a card says, a line each."""
    data = card.data.to_dict()
    lines = []
    for name in ("base_model", "license", "datasets", "language"):
        value = data.get(name)
        if value:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{name}: {shown}")
    for heading, words in (("## Training", "how it was trained"), (_MEASURED, "measurements")):
        has_one = has_section(card, heading)
        lines.append(f"{words}: {'in a section of its own' if has_one else 'nothing'}")
    return lines


def has_section(card: "ModelCard", heading: str) -> bool:
    """Tell whether a section of a card says something."""
    section = card.text.partition(f"{heading}\n")[2].strip()
    return bool(section) and not section.startswith("Nothing yet")


def size_of(count: int) -> str:
    """Return a number of bytes as text."""
    if count < 2**10:
        return f"{count} B"
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), _UNITS[-1])
    return f"{count / unit:,.1f} {name}"


def _servings(found: "Plan") -> "dict[str, Serving]":
    """Return how engines serve what is staged, from the branch that is theirs."""
    from ..checking.serve import servings

    target = found.card.data.get("base_model") or _TARGET
    name = target[0] if isinstance(target, list) else str(target)
    return servings(found.folders["engines"], found.repo_id, name, "engines")


def _show_published(done: "Published") -> None:
    """Print the commits, and the code that loads the draft."""
    where = f"main at {done.commit[:8]}, engines at {done.engines_commit[:8]}"
    console.print(f"\n{done.repo_id} is published: {where}.", style="bold", **_PLAIN)
    console.print("\nTransformers, with exactly this commit:\n", style="bold")
    console.print(Syntax(done.snippet, "python", background_color="default"))


def show_servings(repo_id: str, found: "dict[str, Serving]") -> None:
    """Print the lines of each engine that serves the draft, and why the others do not."""
    prose(
        console,
        "\nServing engines read the branch engines: the same weights, with the config.json and the names that they "
        "know. They do not read main, which is for transformers and dflash-hub.",
    )
    for title, serving in found.items():
        console.print(f"\n{title}:", style="bold", **_PLAIN)
        if not serving.works:
            reasons = "; ".join(reason.finding.what for reason in serving.verdict.reasons)
            prose(console, f"  not for this draft: {reasons}", markup=False)
            continue
        for line in serving.lines:
            console.print(f"  {line}", **_PLAIN)
    if any(_TARGET in line for serving in found.values() for line in serving.lines):
        note(f"The card names no target: put the Hub id of yours in place of {_TARGET}.")
