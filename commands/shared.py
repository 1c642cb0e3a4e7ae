# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Share the console, options and the table of speeds between commands."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..catalogue import rows
from ..versions import __version__, version_of
from .built_in import DEMO, OF_DRAFT, OF_TARGET, draft_named, target_named
from .screen import console, errors

if TYPE_CHECKING:
    from ..evaluation import Comparison


def complete_target(incomplete: str) -> list[str]:
    """Return the targets of the catalogue that begin with what is typed, for the shell's completion."""
    known = dict.fromkeys(target for row in rows() for target in row.targets)
    return [target for target in (DEMO, *known) if target.startswith(incomplete)]


def complete_draft(incomplete: str) -> list[str]:
    """Return the drafts of the catalogue that begin with what is typed, for the shell's completion."""
    known = dict.fromkeys(row.repo_id for row in rows())
    return [name for name in (DEMO, *known) if name.startswith(incomplete)]


Target = Annotated[
    str,
    typer.Option(
        help=f"Hub id or folder of the target; {OF_TARGET}.",
        autocompletion=complete_target,
        callback=target_named,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help=f"Hub id or folder of the draft (default: the known draft for the target); {OF_DRAFT}.",
        autocompletion=complete_draft,
        callback=draft_named,
    ),
]
AnyDraft = Annotated[
    str,
    typer.Argument(
        help=f"Hub id or folder of the draft, in any layout; {OF_DRAFT}.",
        autocompletion=complete_draft,
        callback=draft_named,
    ),
]
DraftRevision = Annotated[str | None, typer.Option(help="Commit, tag or branch of the draft.")]
Width = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens to verify, at most; needs --proposal chain, tree or lookup."),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")]
Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", help="A Hub token with write access.")
]
ReadToken = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", help="A Hub token that may read the draft.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 ..., or auto: the dtype of the checkpoint.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 or mps (default: cuda if available, else cpu)."),
]
Capture = Annotated[
    str,
    typer.Option(
        help="Execution mode: auto, eager, graphs (on a CPU: recorded blocks) or compile (about 30 s warm-up)."
    ),
]
Proposal = Annotated[
    str, typer.Option(help="What a cycle verifies: auto, chain, tree, lookup or plain.")
]


@contextmanager
def tidy_when_terminated() -> Iterator[None]:
    """Let SIGTERM end what runs in this context as an exception does, so that it removes its temporary folders."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_speed(result: "Comparison") -> None:
    """Print the speed of both, the acceptance length, tokens per cycle, and whether the texts are identical."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("the target alone", f"{result.plain_rate:.1f} tokens/s")
    ratio = result.dflash_rate / result.plain_rate
    table.add_row("with DFlash", f"{result.dflash_rate:.1f} tokens/s ({ratio:.2f} times as fast)")
    cycles = len(result.committed)
    table.add_row(
        "acceptance length",
        f"{result.acceptance_length:.2f} tokens per cycle, over {cycles} cycles",
    )
    console.print(table)
    console.print("\ntokens per cycle")
    most = max(result.histogram.values(), default=1)
    for tokens, count in result.histogram.items():
        bar = "█" * max(1, round(40 * count / most))
        console.print(f"  {tokens:>3} {bar} {count}", highlight=False)
    verdict = "[green]identical[/green]" if result.identical else "[red]NOT identical[/red]"
    console.print(f"\nThe two texts are {verdict}.")


def fail_differing() -> None:
    """Exit with status 1, and ask on stderr for a report of the difference."""
    errors.print(
        "[red]Error:[/red] The two texts differ, which is a bug in float32. Please report it with the command and "
        f"these versions: dflash-hub {__version__}, torch {version_of('torch')}, "
        f"transformers {version_of('transformers')}.",
        soft_wrap=True,
        highlight=False,
    )
    raise typer.Exit(1)
