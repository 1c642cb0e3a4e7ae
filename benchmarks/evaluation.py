# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure what `dflash-hub eval` adds to the decoding that it measures: each text as it decodes it, and without.

    python benchmarks/evaluation.py                                         # the built-in pair
    python benchmarks/evaluation.py --target org/target --draft org/draft --device cuda

Both take turns over the same prompts. One is `generate` with the draft and nothing else; the other takes times and
counts of every cycle, as an evaluation does. What an evaluation does between decodes is in its report, as `overhead`.
On a CPU the time is that of this process, so that other work on the machine counts little.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import load_draft
from dflash_hub.evaluation.decoding import Job, Models, decode, generate, padded
from dflash_hub.evaluation.prompts import load_prompts
from dflash_hub.evaluation.ways import DFLASH, Condition, Drafting, Way
from dflash_hub.generation_dflash import now

TINY = Path(__file__).parents[1] / "examples" / "tiny_pair"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--target", default=str(TINY / "target"))
    parser.add_argument("--draft", default=str(TINY / "draft"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype="auto").to(options.device)
    draft = load_draft(options.draft, dtype=target.dtype).to(target.device)
    size = draft.config.block_size
    models = Models(target, tokenizer, {("draft", size): draft})
    rows = [
        tokenizer(one.text).input_ids for one in load_prompts("built-in", options.prompts).prompts
    ]
    jobs = [Job((tuple(row),), options.new) for row in rows]
    way = Way(Drafting(DFLASH, "draft", block_size=size), Condition())
    ratios = []
    for run in range(1 + options.runs):
        ratio = measured(models, way, jobs, reverse=bool(run % 2))
        if run:  # the first warms up
            ratios.append(ratio)
            print(f"run {run}: {100 * (ratio - 1):+.2f} %", flush=True)
    print(
        f"{target.device}, median of {len(ratios)}: {100 * (statistics.median(ratios) - 1):+.2f} %"
    )


def measured(models: Models, way: Way, jobs: list[Job], reverse: bool) -> float:
    """Return how many times as long texts take as an evaluation decodes them; each prompt is decoded both ways."""
    seconds = {"bare": 0.0, "evaluated": 0.0}
    for number, job in enumerate(jobs):
        order = ["bare", "evaluated"]
        for name in reversed(order) if reverse != bool(number % 2) else order:
            started = clock(models.target.device)
            decode(models, way, job) if name == "evaluated" else bare(models, way, job)
            seconds[name] += clock(models.target.device) - started
    return seconds["evaluated"] / seconds["bare"]


def clock(device: torch.device) -> float:
    """Return seconds: of this process on a CPU, and otherwise when the device has finished its work."""
    return time.process_time() if device.type == "cpu" else now(device)


def bare(models: Models, way: Way, job: Job) -> Any:
    """Decode a text with the draft and nothing else."""
    inputs = padded(job.rows, models.target)
    options = {"custom_generate": models.draft_of(way.drafting).speculate, "do_sample": False}
    return generate(models.target, inputs, job, options)


if __name__ == "__main__":
    with torch.no_grad():
        main()
