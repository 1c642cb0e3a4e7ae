# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub convert`: write a draft in another layout."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .built_in import OF_TARGET, target_named
from .preflight import (
    Problems,
    check_base_model,
    check_draft_name,
    check_folder_to_write,
    check_target,
)
from .screen import console, hide_bars, prose
from .shared import AnyDraft

if TYPE_CHECKING:
    from ..publishing.convert import Conversion


def convert(
    source: AnyDraft,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    layout: Annotated[
        str, typer.Option(help="hub, engines, speculators or muse; see docs/layouts.md.")
    ],
    revision: Annotated[str | None, typer.Option(help="Commit or branch of the draft.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the target, which speculators names.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the target: says what config.json lacks; copies of its parts are left out. "
            f"{OF_TARGET}.",
            callback=target_named,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, write nothing.")
    ] = False,
) -> None:
    """Write a draft in another layout, with every tensor bit-equal; weights are copied and never held in memory."""
    from ..configuration_dflash import check_layout
    from ..publishing.convert import ALL_LAYOUTS, ConvertOptions, convert, plan_conversion

    hide_bars(downloads=False)
    problems = Problems()
    problems.check(check_layout, layout, ALL_LAYOUTS)
    problems.check(check_draft_name, source, {"revision": revision})
    if not dry_run:
        problems.check(check_folder_to_write, destination, "The destination")
    if base_model is not None:
        problems.check(check_base_model, base_model)
    if target is not None:
        problems.check(check_target, target)
    problems.raise_all()
    options = ConvertOptions(revision, base_model, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are printed below
        done = (
            plan_conversion(source, layout, options)
            if dry_run
            else convert(source, destination, layout, options)
        )
    _show(done)
    if dry_run and done.config is not None:
        console.print_json(json.dumps(done.config))
    written = (
        "Nothing was written."
        if dry_run
        else f"Written to [bold]{escape(str(destination))}[/bold]."
    )
    console.print(written, highlight=False)


def _show(done: "Conversion") -> None:
    """Print what is converted, and what of it changes."""
    size = f"{done.size / 2**20:,.1f} MiB"
    what = f"{done.title} draft, {size}: {done.source_layout} layout to {done.layout} layout"
    console.print(what, highlight=False)
    for old, new in done.renamed.items():
        console.print(f"  {old} is written as {new}", highlight=False, soft_wrap=True)
    for name in done.left_out:
        console.print(f"  {name} is left out: no draft needs it", highlight=False, soft_wrap=True)
    for remark in done.remarks:
        prose(console, f"[yellow]{escape(remark)}[/yellow]")
