# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub resolve`: the draft of a target."""

import warnings
from typing import Annotated

import typer
from rich.table import Table

from .shared import console


def resolve(target: Annotated[str, typer.Argument(help="Hub id or folder of the target.")]) -> None:
    """Show which draft would be loaded for a target, and why."""
    from ..registry import explain_resolution

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reason is printed anyway
        spec, why = explain_resolution(target=target)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("target", target)
    table.add_row(
        "draft",
        f"[bold]{spec.repo_id}[/bold]" + (f", folder {spec.subfolder}" if spec.subfolder else ""),
    )
    table.add_row("revision", spec.revision or "the newest; no commit is known to pin")
    table.add_row("class", spec.draft_cls.__name__)
    table.add_row("made for", ", ".join(spec.targets) or "not known")
    table.add_row("architectures", ", ".join(spec.architectures) or "not known")
    table.add_row("why", why)
    decodes = f"no: {spec.target_state}" if spec.target_state else ""
    for name, value in (
        ("decodes", decodes),
        ("note", spec.note),
        ("access", "gated: ask for it on the Hub" if spec.gated else ""),
    ):
        if value:
            table.add_row(name, value)
    console.print(table)
