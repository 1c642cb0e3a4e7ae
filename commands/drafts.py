# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub drafts`: the catalogue."""

from typing import Annotated

import typer
from rich.table import Table

from .shared import console


def drafts(
    target: Annotated[
        str | None, typer.Option(help="Only drafts made for this checkpoint.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Only drafts for targets of this architecture.")
    ] = None,
) -> None:
    """List the published drafts that are known, and why some cannot be run."""
    from ..registry import CATALOGUE, drafts_for

    found = drafts_for(target) if target else CATALOGUE
    found = [spec for spec in found if architecture is None or spec.serves(architecture)]
    if not found:
        raise ValueError(
            f"No draft is known for {target or architecture}; `dflash-hub drafts` lists all that are."
        )
    table = Table(title=f"{len(found)} DFlash drafts")
    for column in ("draft", "made for", "architecture", "block", "revision", "runs here"):
        table.add_column(column, overflow="fold")
    for spec in found:
        obstacle = spec.unsupported or (spec.target_state and f"loads, but {spec.target_state}")
        runs = f"no: {obstacle}" if obstacle else "yes" + (f" ({spec.note})" if spec.note else "")
        made_for = "\n".join(spec.targets) or "not known"
        block = str(spec.details.get("block_size") or "?")
        revision = (spec.revision or "newest")[:8]
        table.add_row(spec.repo_id, made_for, "\n".join(spec.architectures), block, revision, runs)
    console.print(table)
