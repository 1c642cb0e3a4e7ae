# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub drafts`: list the catalogue."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from ..catalogue import DraftRow, matching, nearest, rows
from ..kinds import KINDS
from .built_in import DEMO
from .screen import console, note, notes
from .shared import complete_target

_WIDE = 118
"""Columns of a terminal from which a draft's target stands beside it, and not above it."""
_GAP = "  "


def drafts(
    target: Annotated[
        str | None,
        typer.Option(
            help="Only drafts for this checkpoint, or a part of its name.",
            autocompletion=complete_target,
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Only drafts for targets of this architecture.")
    ] = None,
    licence: Annotated[
        bool, typer.Option("--licence", "--license", help="Also show the licence, where known.")
    ] = False,
    downloads: Annotated[
        bool, typer.Option("--downloads", help="Also ask the Hub for the downloads of a month.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, a draft an entry, for programs.")
    ] = False,
) -> None:
    """List the known published drafts: target, repository, kind, and whether each runs here.

    In a pipe, each is a line of columns between tabs. They are target, repository, kind, yes or no, why not, folder,
    and what further options ask for.
    """
    found = matching(target, rows()) if target else rows()
    found = [row for row in found if architecture is None or row.serves(architecture)]
    if not found:
        raise ValueError(_no_draft(target, architecture))
    counts = _downloads(found) if downloads else {}
    if as_json:
        typer.echo(json.dumps([_entry(row, counts) for row in found], indent=1))
        return
    lines = [_Line(row, _extras(row, licence, downloads, counts)) for row in found]
    if not sys.stdout.isatty():
        for line in lines:
            typer.echo("\t".join(line.columns()))
    else:
        show(lines, console.width)
    loaded = sum(row.loads for row in found)
    decoded = sum(row.decodes for row in found)
    notes.print(
        f"{len(found)} DFlash drafts: {loaded} load, {decoded} decode here", highlight=False
    )


def _no_draft(target: str | None, architecture: str | None) -> str:
    """Return the message for a name that matches no draft, with names that are spelt alike."""
    if target == DEMO:
        return (
            f"{DEMO} is the built-in pair, which no list has; `dflash-hub resolve {DEMO}` shows it."
        )
    asked = " and ".join(one for one in (target, architecture) if one)
    found = nearest(target, rows()) if target else []
    alike = f"The nearest names are {', '.join(found)}. " if found else ""
    return (
        f"No draft is known for {asked}. {alike}Run `dflash-hub drafts` to list all known drafts."
    )


def _entry(row: DraftRow, counts: dict[str, int]) -> dict[str, Any]:
    """Return a draft as an entry of the JSON list: what the catalogue knows, and what this version does with it."""
    names = ("repo_id", "subfolder", "revision", "targets", "architectures", "license", "gated")
    entry = {name: getattr(row, name) for name in names}
    entry.update(row.details)
    entry.update(loads=row.loads, decodes=row.decodes, reason=row.reason, note=row.note)
    if row.repo_id in counts:
        entry["downloads"] = counts[row.repo_id]
    return entry


def _downloads(found: Sequence[DraftRow]) -> dict[str, int]:
    """Return the downloads of each draft that the Hub counts, by its repository."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    api = HfApi()
    failed = []

    def ask(name: str) -> tuple[str, int | None]:
        try:
            return name, api.model_info(name).downloads
        except Exception as error:  # the kind differs between versions of huggingface_hub
            failed.append(str(error).splitlines()[0])
            return name, None

    names = {row.repo_id for row in found}
    with ThreadPoolExecutor(8) as pool:
        counts = dict(pool.map(ask, names))
    if failed:
        note(f"The Hub does not tell the downloads of {len(failed)} drafts: {failed[0]}")
    return {name: count for name, count in counts.items() if count is not None}


def _extras(
    row: DraftRow, licence: bool, downloads: bool, counts: dict[str, int]
) -> tuple[str, ...]:
    """Return the columns that were asked for."""
    extras = []
    if licence:
        extras.append(row.license or "licence not known")
    if downloads:
        count = counts.get(row.repo_id)
        extras.append("downloads not known" if count is None else f"{count} downloads")
    return tuple(extras)


# Output --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """Write a draft as a line."""

    row: DraftRow
    extras: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.row.target or "target not known"

    @property
    def kind(self) -> str:
        return KINDS[self.row.variant].title

    def runs(self, number: int) -> str:
        """Return whether it runs here; a number stands for the reason why not."""
        if self.row.decodes:
            return "yes"
        return f"loads ({number})" if self.row.loads else f"no ({number})"

    def columns(self) -> list[str]:
        """Return everything, for a pipe."""
        row = self.row
        works = "yes" if row.decodes else "no"
        whole = [", ".join(row.targets), row.repo_id, self.kind, works, row.reason or ""]
        return [*whole, row.subfolder, *self.extras]

    def text(self, lead: str, name_width: int, number: int) -> Text:
        """Return the line for a terminal; names are never cut."""
        colour = "green" if self.row.decodes else "yellow"
        start = lead + self.row.repo_id.ljust(name_width) + _GAP + self.kind.ljust(8) + _GAP
        rest = ", ".join([self.runs(number), *self.extras])
        return Text(start).append(rest, style=colour)


def show(lines: Sequence[_Line], width: int) -> None:
    """Print one line a draft, and the reasons below; where the terminal is narrow, targets stand above their drafts."""
    wide = width >= _WIDE
    ordered = lines if wide else _by_target(lines)
    numbers: dict[str, int] = {}
    above = ""
    for line in ordered:
        number = numbers.setdefault(line.row.reason, len(numbers) + 1) if line.row.reason else 0
        if not wide and line.target != above:
            console.print(f"[bold]{escape(line.target)}[/bold]", highlight=False, soft_wrap=True)
        above = line.target
        lead = line.target.ljust(36) + _GAP if wide else _GAP
        shown = line.text(lead, 47 if wide else 45, number)
        console.print(shown, soft_wrap=True, highlight=False)
    for reason, number in numbers.items():
        console.print(f"({number}) {reason}", style="dim", highlight=False, markup=False)


def _by_target(lines: Sequence[_Line]) -> list[_Line]:
    """Return the lines so that those of a target stand together, in the order of its first."""
    order: dict[str, list[_Line]] = {}
    for line in lines:
        order.setdefault(line.target, []).append(line)
    return [line for those in order.values() for line in those]
