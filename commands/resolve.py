# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub resolve`: show which draft belongs to a target."""

import warnings
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .shared import console


def resolve(target: Annotated[str, typer.Argument(help="Hub id or folder of the target.")]) -> None:
    """Show which draft would be loaded for a target, and why."""
    from ..registry import explain_resolution

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reason is printed below
        spec, why = explain_resolution(target=target)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("target", escape(target))
    folder = f", folder {spec.subfolder}" if spec.subfolder else ""
    table.add_row("draft", f"[bold]{spec.name}[/bold]{folder}")
    table.add_row("revision", spec.revision or "the newest (no commit is pinned)")
    table.add_row("class", spec.draft_cls.__name__)
    table.add_row("made for", ", ".join(spec.targets) or "not known")
    table.add_row("architectures", ", ".join(spec.architectures) or "not known")
    table.add_row("why", escape(why))
    if spec.target_state:
        table.add_row("decodes", f"no: {spec.target_state}")
    if spec.note:
        table.add_row("note", spec.note)
    if spec.gated:
        table.add_row("access", "gated: request access on the Hub")
    console.print(table)
