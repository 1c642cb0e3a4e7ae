# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub resolve`: show which draft belongs to a target."""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer
from rich.markup import escape
from rich.table import Table

from ..catalogue import DraftRow, check_folder, made_for, out_of_cache, reason_of_exact, rows
from ..kinds import DEMO_KIND, kind_named
from .built_in import OF_TARGET, draft_of, target_named
from .screen import console
from .shared import complete_target

if TYPE_CHECKING:
    from ..registry import DFlashDraftSpec


def resolve(
    target: Annotated[
        str,
        typer.Argument(
            help=f"Hub id or folder of the target; {OF_TARGET}.",
            autocompletion=complete_target,
            callback=target_named,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show which draft would be loaded for a target, and why."""
    own = draft_of(target)
    if own is None:
        found = _rows(target, *explain(target))
    else:
        class_name = kind_named(DEMO_KIND).reader
        found = {"target": target, "draft": own, "class": class_name, "why": "It is built in."}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif not sys.stdout.isatty():
        for name, value in found.items():
            typer.echo(f"{name}\t{value}")
    else:
        table = Table(show_header=False, box=None, padding=(0, 2))
        for name, value in found.items():
            shown = escape(value)
            table.add_row(name, f"[bold]{shown}[/bold]" if name == "draft" else shown)
        console.print(table)


def explain(target: str) -> tuple[Union[DraftRow, "DFlashDraftSpec"], str]:
    """Return the draft for a target, and the reason; torch is imported where the target's config must be read."""
    check_folder(target)
    name = out_of_cache(target)
    exact = made_for(name, rows())
    if exact:
        exact[0].check_supported()
        return exact[0], reason_of_exact(name)
    from ..registry import explain_resolution
    from .preflight import check_target, looks_local

    if Path(target, "config.json").is_file() or looks_local(target):
        check_target(target, "The target")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reason is printed below
        return explain_resolution(target=target)


def _rows(target: str, draft: Any, why: str) -> dict[str, str]:
    """Return what is shown, by its name."""
    decodes = f"no: {draft.target_state}" if draft.target_state else ""
    access = "gated: request access on the Hub" if draft.gated else ""
    found = {
        "target": target,
        "draft": draft.name,
        "folder": draft.subfolder,
        "revision": draft.revision or "the newest (no commit is pinned)",
        "class": draft.class_name,
        "made for": ", ".join(draft.targets) or "not known",
        "architectures": ", ".join(draft.architectures) or "not known",
        "why": why,
        "decodes": decodes,
        "note": draft.note,
        "access": access,
    }
    return {name: value for name, value in found.items() if value}
