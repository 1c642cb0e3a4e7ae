# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What several commands share: the console, options, and how figures are shown."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..evaluation import Comparison

console = Console()

Target = Annotated[str, typer.Option(help="Hub id or folder of the target.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Budget of new tokens.")]
Capture = Annotated[
    str,
    typer.Option(
        help="How blocks run: auto, off, graphs (CUDA), or compile (half a minute first)."
    ),
]


def show_figures(result: "Comparison") -> None:
    """Tokens per second of both, acceptance length, tokens per cycle, and whether the texts are identical."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("the target alone", f"{result.plain_rate:.1f} tokens/s")
    ratio = result.dflash_rate / result.plain_rate
    table.add_row("with DFlash", f"{result.dflash_rate:.1f} tokens/s ({ratio:.2f} times)")
    cycles = len(result.committed)
    table.add_row(
        "acceptance length",
        f"{result.acceptance_length:.2f} tokens per cycle, over {cycles} cycles",
    )
    console.print(table)
    console.print("\ntokens per cycle")
    most = max(result.histogram.values(), default=1)
    for tokens, count in result.histogram.items():
        console.print(
            f"  {tokens:>3} {'█' * max(1, round(40 * count / most))} {count}", highlight=False
        )
    verdict = "[green]identical[/green]" if result.identical else "[red]NOT identical[/red]"
    console.print(f"\nThe two texts are {verdict}.")


def fail_differing() -> None:
    """End with exit status 1, and say on stderr what a report of two differing texts needs."""
    import torch
    import transformers

    from ..configuration_dflash import __version__

    Console(stderr=True).print(
        "[red]Error:[/red] The two texts differ, which in float32 they must not. Please report it, with the command "
        f"and these versions: dflash-hub {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        soft_wrap=True,
        highlight=False,
    )
    raise typer.Exit(1)
