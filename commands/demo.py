# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub demo`: run the built-in pair, offline."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..kinds import DEMO_KIND, KINDS, kind_named
from .built_in import FOLDER, TARGET
from .preflight import Problems, check_capture
from .screen import console, counted, doing, hide_bars, prose
from .shared import Capture, fail_differing, show_speed

if TYPE_CHECKING:
    from ..evaluation import Comparison

SHOWN = [name for name, kind in KINDS.items() if kind.demo_folder]


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 8,
    capture: Capture = "compile",
    variant: Annotated[str, typer.Option(help=f"Kind of draft: {' or '.join(SHOWN)}.")] = DEMO_KIND,
) -> None:
    """Run the built-in models: plain and DFlash output side by side, with speeds. Offline; 30 s the first time."""
    from transformers import AutoTokenizer

    from ..evaluation import compare, warm_up
    from ..registry import load_draft

    problems = Problems()
    problems.check(check_capture, capture)
    folder = problems.check(_draft, variant)
    problems.raise_all()
    hide_bars(downloads=False)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    target, draft = _target(), load_draft(folder)
    rows = _prompts(tokenizer, prompts)
    with doing("Warming up (compiling takes about 30 s)"):
        warm_up(draft, target, rows[0], capture)
    results = [compare(draft, target, row, max_new_tokens=96, capture=capture) for row in rows]
    total = sum(results[1:], results[0])
    title = kind_named(variant).title
    prose(
        console,
        f"[bold]DFlash demo[/bold]: a target with {target.num_parameters():,} parameters that writes Python, and its "
        f"{title} draft with {draft.num_parameters():,}. Greedy, {counted(len(rows), 'held-out prompt')}.\n",
    )
    # So small a target often repeats itself, so show the most varied text.
    shown = max(range(len(results)), key=lambda index: len({*results[index].plain[0]}))
    show_texts(tokenizer, rows[shown], results[shown], title)
    show_speed(total)
    if not total.identical:
        fail_differing()


def _draft(variant: str) -> Path:
    """Return the folder of the built-in draft of a kind.

    Raises:
        ValueError: there is none.
    """
    return kind_named(variant).demo_draft(FOLDER)


def _target() -> Any:
    """Return the built-in target."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # more threads only slow models of this size down
    return AutoModelForCausalLM.from_pretrained(TARGET)


def _prompts(tokenizer: Any, count: int) -> list[Any]:
    """Return the first held-out prompts as tokens, each `[1, P]`."""
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["prompt"] for line in lines]
    return [tokenizer(text, return_tensors="pt").input_ids[:, -150:] for text in texts]


def show_texts(tokenizer: Any, row: Any, result: "Comparison", title: str) -> None:
    """Print the end of a prompt `row [1, P]`, and below it both texts side by side."""
    end = escape(tokenizer.decode(row[0, -60:]))
    console.print(Panel(end, title="end of one prompt", border_style="dim"))
    texts = [tokenizer.decode(list(tokens)) for tokens in (result.plain[0], result.dflash[0])]
    table = Table(expand=True, show_lines=True)
    table.add_column("the target alone", ratio=1)
    table.add_column(f"the target with its {title} draft", ratio=1)
    table.add_row(*map(escape, texts))
    console.print(table)
