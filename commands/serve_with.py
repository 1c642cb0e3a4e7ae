# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub serve-with`: print the lines that serve a draft with an engine."""

from typing import Annotated

import typer
from rich.markup import escape

from .built_in import OF_TARGET, target_named
from .preflight import Problems, check_draft_name, check_served
from .screen import console, errors, prose
from .shared import AnyDraft, ReadToken


def serve_with(
    engine: Annotated[
        str,
        typer.Argument(help="vllm, sglang, llama.cpp, tensorrt-llm, dflash-mlx or mlx-vlm."),
    ],
    draft: AnyDraft,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Hub id or folder of the target (default: as the draft's card says); {OF_TARGET}.",
            callback=target_named,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the draft.")
    ] = None,
    token: ReadToken = None,
) -> None:
    """Print the lines that serve a target with this draft. Exit status 1 if the engine would refuse it, or be wrong."""
    from ..checking.engines import REFUSES
    from ..checking.serve import check_engine
    from ..checking.serve import serve_with as run

    problems = Problems()
    problems.check(check_engine, engine)
    problems.check(check_draft_name, draft, {"revision": revision, "token": token})
    if target is not None:
        problems.check(check_served, target)
    problems.raise_all()
    found = run(engine, draft, target, revision=revision, token=token)
    for line in found.lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found.works:
        return
    title = f"{found.verdict.engine.title} {found.verdict.engine.version}"
    name = f"{draft} at {revision}" if revision else draft
    refused = found.verdict.outcome == REFUSES
    does = f"{title} refuses {name}" if refused else f"{title} loads {name}, and is wrong"
    prose(errors, f"[red]{escape(does)}:[/red]")
    for reason in found.verdict.reasons:
        text = f"- {reason.finding.what} ({reason.rule.source}). {reason.finding.advice}."
        prose(errors, text, markup=False)
    if found.other_branch:
        again = f"dflash-hub serve-with {engine} {draft} --revision {found.other_branch}"
        errors.print(
            f"The branch {found.other_branch} works: {again}", soft_wrap=True, markup=False
        )
    raise typer.Exit(1)
