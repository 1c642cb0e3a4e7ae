# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub drafts`: list the catalogue."""

from typing import TYPE_CHECKING, Annotated

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
) -> None:
    """List the known published drafts, and whether each runs here."""
    from ..registry import CATALOGUE, drafts_for

    found = drafts_for(target) if target else CATALOGUE
    found = [spec for spec in found if architecture is None or spec.serves(architecture)]
    if not found:
        raise ValueError(
            f"No draft is known for {target or architecture}. Run `dflash-hub drafts` to list all known drafts."
        )
    table = Table(title=f"{len(found)} DFlash drafts")
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


def _runs_here(spec: "DFlashDraftSpec") -> str:
    """Return "yes" or "no" with the reason or the note, for the table."""
    if spec.unsupported:
        return f"no: {spec.unsupported}"
    if spec.target_state:
        return f"no: loads, but {spec.target_state}"
    return f"yes ({spec.note})" if spec.note else "yes"
