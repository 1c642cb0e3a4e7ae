# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub demo`: the built-in pair, offline."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..kinds import DEMO_KIND, KINDS, kind_named
from .shared import Capture, console, fail_differing, show_figures


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 8,
    capture: Capture = "compile",
    variant: Annotated[
        str, typer.Option(help=f"Kind of its draft: {' or '.join(KINDS)}.")
    ] = DEMO_KIND,
) -> None:
    """The built-in pair: the target's own text and DFlash's beside it. Offline; half a minute the first time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..evaluation import compare, warm_up
    from ..registry import load_draft

    logging.disable_progress_bar()
    torch.set_num_threads(
        1
    )  # models this small gain nothing from more, and lose much where the cores are busy
    home = Path(__file__).parents[1] / "examples" / "tiny_pair"
    tokenizer = AutoTokenizer.from_pretrained(home / "target")
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    kind = kind_named(variant)
    draft = load_draft(kind.demo_draft(home))
    lines = (home / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:prompts]
    rows = [
        tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids[:, -150:]
        for line in lines
    ]
    with console.status("Warming up; compiling takes half a minute, the first time"):
        warm_up(draft, target, rows[0], capture)
    results = [compare(draft, target, row, max_new_tokens=96, capture=capture) for row in rows]
    total = sum(results[1:], results[0])

    # A target this small often repeats itself; the most varied text shows most.
    shown = max(range(len(results)), key=lambda index: len({*results[index].plain[0]}))
    console.print(
        f"[bold]DFlash demo[/bold]: a target of {target.num_parameters():,} parameters that writes Python, ",
        end="",
    )
    console.print(
        f"and a {kind.title} draft of {draft.num_parameters():,} for it; greedy, {len(rows)} held-out prompts.\n"
    )
    console.print(
        Panel(
            escape(tokenizer.decode(rows[shown][0, -60:])),
            title="... end of a prompt",
            border_style="dim",
        )
    )
    side = Table(expand=True, show_lines=True)
    side.add_column("the target alone", ratio=1)
    side.add_column(f"the target with its {kind.title} draft", ratio=1)
    texts = [
        tokenizer.decode(list(row[0])) for row in (results[shown].plain, results[shown].dflash)
    ]
    side.add_row(*map(escape, texts))
    console.print(side)
    show_figures(total)
    if not total.identical:
        fail_differing()
