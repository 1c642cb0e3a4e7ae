# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub drafts`: list the catalogue."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .shared import console

if TYPE_CHECKING:
    from ..registry import DFlashDraftSpec


def drafts(
    target: Annotated[
        str | None, typer.Option(help="Only drafts made for this checkpoint.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Only drafts for targets of this architecture.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, a draft an entry, for programs.")
    ] = False,
) -> None:
    """List the known published drafts, and whether each loads and decodes here."""
    from ..registry import CATALOGUE, drafts_for

    found = drafts_for(target) if target else CATALOGUE
    found = [spec for spec in found if architecture is None or spec.serves(architecture)]
    if not found:
        raise ValueError(
            f"No draft is known for {target or architecture}. Run `dflash-hub drafts` to list all known drafts."
        )
    if as_json:
        typer.echo(json.dumps([_entry(spec) for spec in found], indent=1))
        return
    loaded = sum(spec.loads for spec in found)
    decoded = sum(spec.decodes for spec in found)
    table = Table(title=f"{len(found)} DFlash drafts: {loaded} load, {decoded} decode here")
    for column in ("draft", "made for", "architecture", "block", "revision", "runs here"):
        table.add_column(column, overflow="fold")
    for spec in found:
        made_for = "\n".join(spec.targets) or "not known"
        block = str(spec.details.get("block_size") or "?")
        revision = (spec.revision or "newest")[:8]
        table.add_row(
            spec.name, made_for, "\n".join(spec.architectures), block, revision, _runs_here(spec)
        )
    console.print(table)


def _entry(spec: "DFlashDraftSpec") -> dict[str, Any]:
    """Return a draft as an entry of the JSON list: what the catalogue knows, and what this version does with it."""
    names = ("repo_id", "subfolder", "revision", "targets", "architectures", "license", "gated")
    entry = {name: getattr(spec, name) for name in names}
    entry.update(spec.details)
    state = {"loads": spec.loads, "decodes": spec.decodes, "reason": spec.reason}
    return entry | state | {"note": spec.note}


def _runs_here(spec: "DFlashDraftSpec") -> str:
    """Return "yes" or "no" with the reason or the note, for the table."""
    if spec.decodes:
        return f"yes ({spec.note})" if spec.note else "yes"
    return f"no: loads, but {spec.reason}" if spec.loads else f"no: {spec.reason}"
