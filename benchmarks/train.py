# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure the time and memory of a training step, and of the same step with the logits of all positions at once.

    python benchmarks/train.py                                      # a small body, the vocabulary of Qwen3
    python benchmarks/train.py --shape qwen3-8b --device cuda --length 3072 --anchors 512
    python benchmarks/train.py --against speculators nemo --anchors 64      # other programs' steps, on a CPU

Models have random weights. Times are medians over the steps, where the two methods take turns. Memory is the peak of
a step beyond what was in use before it. The last line is JSON.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from against import PROGRAMS, compare
from transformers import AutoConfig, AutoModelForCausalLM

from dflash_hub import DFlashDraftSpec
from dflash_hub.generation_dflash import now
from dflash_hub.training.blocks import Blocks, PackedBatch, draw_anchors
from dflash_hub.training.loss import Loss, LossInputs, chunk_loss, weighted_loss
from dflash_hub.training.memory import checkpoint_layers
from dflash_hub.training.mix import Mix
from dflash_hub.training.objective import Objective, Recipe

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
PARTS = ("target", "draft", "loss", "backward", "optimizer")


def main() -> None:
    """Run the whole script."""
    options = arguments()
    if options.against:
        compare(options, SHAPES[options.shape])
        return
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    draft, target = build(options, device)
    recipe, timer = Recipe(mix=Mix.parse(options.loss)), Timer(device)
    methods = {
        "ours": Objective(draft.config, target, recipe, weighted_loss, timer.phase),
        "logits in full": Objective(draft.config, target, recipe, loss_in_full, timer.phase),
    }
    draft.set_attn_implementation(methods["ours"].attention(device))
    if options.checkpointing:
        checkpoint_layers(draft)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4)
    ids = torch.randint(options.vocab, (options.batch, options.length), device=device)
    batch = PackedBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids))
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(options.steps + 1):
        anchors = draw_anchors(batch, options.anchors, 0, number)
        for name, objective in methods.items():
            costs = step(objective, draft, optimizer, objective.blocks(batch, anchors), timer)
            if number:  # the first step includes warm-up
                measured[name].append(costs)
    show(measured, options)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        default=None,
        help="dtype of the target; default: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--anchors", type=int, default=128)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5, help="layers of the draft")
    parser.add_argument(
        "--loss", default="ce=1", help="as that of `dflash-hub train`, such as ce=0.5,kl=0.5"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute the draft's layers again in the backward",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=PROGRAMS,
        help="programs to compare with, on a CPU",
    )
    parser.add_argument(
        "--their-attention", help="attention of the other programs, sdpa (the default) or eager"
    )
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Return the draft, in float32, and the target."""
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    config = AutoConfig.for_model(
        "qwen3", vocab_size=options.vocab, tie_word_embeddings=True, **SHAPES[options.shape]
    )
    with device:
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        fields = {
            "mask_token_id": 0,
            "block_size": options.block,
            "num_hidden_layers": options.layers,
        }
        draft = DFlashDraftSpec("benchmark").build(config, dtype=torch.float32, **fields)
    return draft.to(device).train(), target


def loss_in_full(states: torch.Tensor, inputs: LossInputs, vocab_size: int) -> Loss:
    """Compute the loss the simple way: all logits at once, and autograd."""
    return chunk_loss(inputs, states, slice(None))[0]


@dataclass
class Timer:
    """Measure the seconds of each part of a step."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of this context to the part."""
        started = now(self.device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - started


def step(
    objective: Objective, draft: Any, optimizer: Any, blocks: Blocks, timer: Timer
) -> dict[str, float]:
    """Return the seconds of each part of one step, its peak memory in MiB, and its loss."""
    timer.seconds.clear()
    device = timer.device
    with peak_memory(device) as memory:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = objective(draft, blocks).loss
        with timer.phase("backward"):
            (total / objective.divisor(blocks)).backward()
        with timer.phase("optimizer"):
            optimizer.step()
        optimizer.zero_grad()
    return timer.seconds | memory | {"value": float(total.detach())}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure by how many MiB memory grows at its peak: of the GPU, or resident (NaN except on Linux)."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
        yield found
        found["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20 - before
        return
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = resident("VmRSS")
    yield found
    found["peak_mib"] = resident("VmHWM") - before


def resident(field: str) -> float:
    """Return a field of /proc/self/status, in MiB."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    match = re.search(rf"{field}:\s+(\d+)", text)
    return int(match[1]) / 2**10 if match else float("nan")


def show(measured: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Print the table, the ratios, and one line of JSON."""
    rows = {}
    print(
        f"{'ms':16}" + "".join(part.rjust(11) for part in (*PARTS, "step", "tokens/s", "peak MiB"))
    )
    for name, steps in measured.items():
        for costs in steps:
            costs["step"] = sum(costs[part] for part in PARTS)
        parts = {part: 1e3 * median_of(steps, part) for part in PARTS}
        step_ms, peak = 1e3 * median_of(steps, "step"), median_of(steps, "peak_mib")
        rate = 1e3 * options.batch * options.length / step_ms
        rows[name] = {
            "ms": parts,
            "step_ms": step_ms,
            "tokens_per_second": rate,
            "peak_mib": peak,
            "loss": steps[-1]["value"],
        }
        cells = (*parts.values(), step_ms, rate, peak)
        print(f"{name:16}" + "".join(f"{value:11.1f}" for value in cells))
    ours, full = rows.values()
    ratios = {key: ours[key] / full[key] for key in ("step_ms", "peak_mib")}
    print(
        f"ours over logits in full: time {ratios['step_ms']:.2f}, peak memory {ratios['peak_mib']:.2f}"
    )
    print(json.dumps({"options": vars(options), "figures": rows, "ratios": ratios}))


def median_of(steps: list[dict[str, float]], key: str) -> float:
    """Return the median over the steps of one of their values."""
    return statistics.median(costs[key] for costs in steps)


if __name__ == "__main__":
    main()
