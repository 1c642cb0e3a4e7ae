# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a training step costs, and the same step with the logits of all positions at once, in one process.

    python benchmarks/train.py                                      # a small body, the vocabulary of Qwen3
    python benchmarks/train.py --shape qwen3-8b --device cuda --length 3072 --anchors 512

Models are built in place with random weights. Times are medians over the steps, the two ways taking turns; memory is
the most that a step takes beyond what is there before it. The last line is JSON.
"""

import argparse
import contextlib
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dflash_hub import DFlashDraftSpec
from dflash_hub.generation_dflash import now
from dflash_hub.training import objective as module
from dflash_hub.training.blocks import Rows, draw_anchors
from dflash_hub.training.loss import Scores
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
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    draft, objective = build(options, device)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4)
    ids = torch.randint(options.vocab, (options.batch, options.length), device=device)
    rows = Rows(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids))
    ways: dict[str, Callable[..., torch.Tensor]] = {"ours": module.weighted_loss, "logits in full": loss_in_full}
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(options.steps + 1):
        blocks = objective.blocks(rows, draw_anchors(rows, options.anchors, 0, number))
        for name, loss in ways.items():
            figures = step(objective, draft, optimizer, blocks, loss, device)
            if number:  # the first pays for what later ones do not
                measured[name].append(figures)
    show(measured, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="of the target; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--anchors", type=int, default=128)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5, help="of the draft")
    parser.add_argument("--distillation", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> tuple[Any, Objective]:
    """The draft, in float32, and the objective with the target in it."""
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    config = AutoConfig.for_model("qwen3", vocab_size=options.vocab, tie_word_embeddings=True, **SHAPES[options.shape])
    with device:
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        fresh = {"mask_token_id": 0, "block_size": options.block, "num_hidden_layers": options.layers}
        draft = DFlashDraftSpec("benchmark").build(config, dtype=torch.float32, **fresh).to(device).train()
    objective = Objective(draft.config, target, Recipe(distillation=options.distillation))
    draft.set_attn_implementation("flex_attention" if objective.flex(device) else "sdpa")
    return draft, objective


def loss_in_full(states: torch.Tensor, scores: Scores, vocab_size: int) -> torch.Tensor:
    """As everybody writes it first: all logits, and autograd."""
    return scores.chunk(states, slice(None))


def step(
    objective: Objective,
    draft: Any,
    optimizer: Any,
    blocks: Any,
    loss: Callable[..., torch.Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each part of one step, and the most memory it took, in MiB."""
    seconds = dict.fromkeys(PARTS, 0.0)
    with peak_memory(device) as memory, contextlib.ExitStack() as stack:
        for owner, name, part in (
            (objective.target, "read", "target"),
            (objective, "states", "draft"),
            (module, "weighted_loss", "loss"),
        ):
            run = loss if part == "loss" else getattr(owner, name)
            stack.enter_context(replaced(owner, name, timed(run, part, seconds, device)))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total, _ = objective(draft, blocks)
        timed((total / blocks.weights(objective.gamma).sum()).backward, "backward", seconds, device)()
        timed(optimizer.step, "optimizer", seconds, device)()
        optimizer.zero_grad()
    return seconds | memory | {"value": float(total.detach())}


def timed(run: Callable, part: str, seconds: dict[str, float], device: torch.device) -> Callable:
    def wrapped(*args: Any) -> Any:
        started = now(device)
        result = run(*args)
        seconds[part] += now(device) - started
        return result

    return wrapped


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """The most memory beyond what there was before, in MiB: of the GPU, or resident (on Linux, else not known)."""
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
    """Of /proc/self/status, in MiB."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    match = re.search(rf"{field}:\s+(\d+)", text)
    return int(match[1]) / 2**10 if match else float("nan")


def show(measured: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """A table, and the JSON line."""
    figures = {}
    print(f"{'ms':16}" + "".join(part.rjust(11) for part in (*PARTS, "step", "tokens/s", "peak MiB")))
    for name, steps in measured.items():
        parts = {part: 1e3 * statistics.median(one[part] for one in steps) for part in PARTS}
        whole = 1e3 * statistics.median(sum(one[part] for part in PARTS) for one in steps)
        peak = statistics.median(one["peak_mib"] for one in steps)
        rate = 1e3 * options.batch * options.length / whole
        figures[name] = {
            "ms": parts,
            "step_ms": whole,
            "tokens_per_second": rate,
            "peak_mib": peak,
            "loss": steps[-1]["value"],
        }
        print(f"{name:16}" + "".join(f"{value:11.1f}" for value in (*parts.values(), whole, rate, peak)))
    ours, full = figures.values()
    ratios = {key: ours[key] / full[key] for key in ("step_ms", "peak_mib")}
    print(f"ours over logits in full: time {ratios['step_ms']:.2f}, peak memory {ratios['peak_mib']:.2f}")
    print(json.dumps({"options": vars(options), "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    main()
