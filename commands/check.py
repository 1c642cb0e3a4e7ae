# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub check`: say what is wrong with a draft, and what engines would do with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .built_in import OF_TARGET, target_named
from .loading import load_target
from .preflight import (
    Problems,
    check_device,
    check_draft_name,
    check_dtype,
    check_target,
    device_of,
    read_text,
)
from .screen import console, counted, doing, errors, hanging, hide_bars, notes, prose
from .shared import AnyDraft, ReadToken
from .words import in_flags

if TYPE_CHECKING:
    from ..checking import DraftReport, EngineVerdict, Remark
    from ..checking.runs import Acceptance, RunReport

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
_OUTCOMES = {"loads": "green", "refuses": "yellow", "loads, and is wrong": "red"}
_BROKEN = 2  # the exit status
_HUB = "the hub layout of dflash-hub"
_TRANSFORMERS = "transformers"  # the engine


def check(
    draft: AnyDraft,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Hub id or folder of its target: checks the pair, and decodes with it; {OF_TARGET}.",
            callback=target_named,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the draft.")
    ] = None,
    run: Annotated[
        bool, typer.Option(help="Load the target and decode. Without, only its config is read.")
    ] = True,
    values: Annotated[
        bool,
        typer.Option(help="Read the values of tensors, for which a Hub draft is downloaded."),
    ] = True,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts to decode: a text a line, or JSONL with the key "prompt".'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each prompt.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="Of the target: float32, bfloat16 ..., or auto: the checkpoint's.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda ... (default: cuda if available, else cpu).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    token: ReadToken = None,
) -> None:
    """Check a draft: config, tensors, repository, fit with the target, acceptance, and what each engine does with it.

    Exit status: 0 good, 1 works with warnings, 2 broken or not to be read. What engines do with it does not count.
    """
    try:
        where = {"revision": revision, "token": token}
        texts = _texts((draft, where), target, prompts, (dtype, device))
        settings = {"values": values, "prompts": texts, "max_new_tokens": max_new_tokens, **where}
        report = _checked(draft, target, settings, (dtype, device) if run else None)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _tell_broken(draft, str(error), as_json)
        raise typer.Exit(_BROKEN) from error
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        show_report(report)
    raise typer.Exit(report.status)


def _checked(
    draft: str,
    target: str | None,
    settings: dict[str, Any],
    runs: tuple[str, str | None] | None,
) -> "DraftReport":
    """Return the report on a draft.

    Args:
        settings: fields of `CheckOptions`.
        runs: dtype and device of the target; None for not to decode.
    """
    from ..checking import CheckOptions, check_draft

    hide_bars(downloads=False)
    with doing("Starting") as status:
        options = CheckOptions(**settings, report=lambda step: status.update(escape(step)))
        model = _target_model(target, *runs) if target and runs else None
        return check_draft(draft, target if model is None else model, options)


def _tell_broken(draft: str, error: str, as_json: bool) -> None:
    """Print why a draft could not be checked."""
    message = in_flags(error, ("revision", "target", "prompts", "token"))
    prose(errors, f"[red]Error:[/red] {escape(message)}")
    if as_json:
        found = {"draft": draft, "status": _BROKEN, "verdict": "broken", "error": message}
        typer.echo(json.dumps(found, indent=2))


def _texts(
    draft: tuple[str, dict[str, str | None]],
    target: str | None,
    prompts: Path | None,
    runs: tuple[str, str | None],
) -> list[str] | None:
    """Return the prompts of a file, once all options are checked; None for the package's own.

    Args:
        draft: its name, and the keywords that choose its files.
        runs: dtype and device.

    Raises:
        ValueError: listing everything that is wrong.
    """
    problems = Problems()
    problems.check(check_draft_name, *draft)
    if target is not None:
        problems.check(check_target, target)
    problems.check(check_dtype, runs[0])
    problems.check(check_device, runs[1])
    texts = None if prompts is None else problems.check(read_prompts, prompts)
    problems.raise_all()
    return texts


def _target_model(target: str, dtype: str, device: str | None) -> Any:
    """Load the target to decode with it; None, with a line on stderr, where that fails."""
    try:
        return load_target(target, dtype).to(device_of(device)).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = str(error).splitlines()[0]
        prose(notes, f"Nothing is decoded: {first}", "yellow", markup=False)
        return None


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: a text a line, or JSONL with the key "prompt".

    Raises:
        ValueError: it cannot be read, a line of a JSONL file is none, or there is no prompt.
    """
    lines = [line for line in read_text(path, "--prompts").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt_in(path, line) for line in lines]
    if not lines:
        raise ValueError(f"--prompts is {path}, which holds no prompt; write one a line.")
    return lines


def _prompt_in(path: Path, line: str) -> str:
    """Return the prompt of a line of JSON."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(
            f'--prompts is {path}, with the line {line[:80]!r}; it must be a JSON object with a text under "prompt".'
        )
    return prompt


# Output --------------------------------------------------------------------------------------------------------------


def show_report(report: "DraftReport") -> None:
    """Print a report for people."""
    commit = f" at {report.commit[:8]}" if report.commit else ""
    console.print(f"[bold]{escape(report.draft)}[/bold]{commit}", highlight=False, soft_wrap=True)
    console.print(
        f"Layout: {report.layout}. Kind: {report.kind or 'cannot be read'}.", highlight=False
    )
    _show_remarks(report.remarks)
    if report.run is not None:
        _show_run(report.run)
    if report.engines:
        _show_engines(report.engines)
        if report.layout == _HUB and report.status < _BROKEN:
            prose(console, _where_it_loads(report.engines))
    colour = ("green", "yellow", "red")[report.status]
    refused = any(verdict.reasons for verdict in report.engines)
    uncounted = " It does not count what engines do." if refused and report.status < _BROKEN else ""
    console.print(f"\nVerdict: [{colour}]{report.title}[/{colour}].{uncounted}")


def _show_remarks(remarks: "tuple[Remark, ...]") -> None:
    """Print the remarks, most serious first."""
    from ..findings_dflash import ONE_SENTENCE

    if not remarks:
        console.print("Nothing is wrong with its files.")
        return
    order = list(_COLOURS)
    for remark in sorted(remarks, key=lambda one: order.index(one.level)):
        found = remark.finding
        lead = f"{remark.level}, {remark.section}: "
        if found.form == ONE_SENTENCE:
            hanging(console, str(found), lead, _COLOURS[remark.level])
            continue
        hanging(console, f"{found.what}.", lead, _COLOURS[remark.level])
        hanging(console, f"{found.advice}.", "  ")


def _show_run(run: "RunReport") -> None:
    """Print what the run showed: whether texts are exact, and how many tokens each draft predicts."""
    same = "[green]the target's own[/green]" if run.exact else "[red]NOT the target's own[/red]"
    prose(
        console,
        f"\nDecoded {counted(run.prompts, 'prompt')} in {run.dtype}: the texts are {same}, "
        f"{run.tokens_per_cycle:.2f} tokens per cycle. With every token of the texts as the anchor once, drafted "
        "tokens agree so. A row that is clearly better than the first means that the config is wrong:",
    )
    table = Table(box=None, padding=(0, 2))
    for column in ("draft", "tokens per cycle", "share at position 1, 2, ..."):
        table.add_column(column)
    for one in run.acceptances:
        table.add_row(one.name, f"{one.length:.2f}", _shares(one))
    console.print(table)


def _shares(one: "Acceptance") -> str:
    """Return the shares by position as text, as far as any token agrees."""
    shares = [f"{share:.2f}" for share in one.by_position if share > 0]
    return " ".join(shares) or "none"


def _show_engines(engines: "tuple[EngineVerdict, ...]") -> None:
    """Print what each engine would do with the files as they are."""
    console.print("\nWhat engines do with these files as they are:")
    for verdict in engines:
        colour = _OUTCOMES[verdict.outcome]
        name = f"{verdict.engine.title} {verdict.engine.version}"
        hanging(console, f"{name}: {verdict.outcome}", "  ", colour)
        for reason in verdict.reasons:
            hanging(console, reason.finding.what, "    - ")


def _where_it_loads(engines: "tuple[EngineVerdict, ...]") -> str:
    """Return what loads the hub layout as it is, and what writes the draft for the others."""
    if any(one.engine.name == _TRANSFORMERS and not one.reasons for one in engines):
        return (
            "These files are for transformers and dflash-hub. For serving engines, `dflash-hub push` writes the branch "
            "engines too, and `dflash-hub convert DRAFT FOLDER --layout engines` a folder."
        )
    return (
        "As they are, these files are for dflash-hub alone. `dflash-hub push` writes them for transformers to main, "
        "and for engines to the branch engines. `dflash-hub convert DRAFT FOLDER --layout hub` (or engines) writes "
        "a folder."
    )
