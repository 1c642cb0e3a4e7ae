# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decoding speed, side by side in one process: plain `generate`, transformers' own DFlash loop, and ours.

    python benchmarks/decode.py                                     # the built-in trained pair
    python benchmarks/decode.py --capture compile                   # the same, with blocks compiled
    python benchmarks/decode.py --shape hybrid --tau 3              # a target with recurrent state
    python benchmarks/decode.py --shape qwen3-8b --device cuda --context 1024 --tau 6

Shapes other than `tiny-pair` are built in place with random weights, so their drafts guess nothing: `--tau` has that
many tokens committed per cycle, right tokens being put in place of the draft's after it ran. Texts are greedy, and
compared with plain greedy's. Times are medians over the runs, the ways taking turns. The floor is what must be read
from memory over the bandwidth measured here. The last line is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, DFlashDraftSpec, load_draft
from dflash_hub.execution_dflash import CAPTURE
from dflash_hub.generation_dflash import DecodeState, now
from dflash_hub.kinds import KINDS
from dflash_hub.proposals_dflash import ChainProposer, Proposal
from dflash_hub.target_dflash import is_recurrent

TINY = Path(__file__).parents[1] / "examples" / "tiny_pair"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    "hybrid": {
        "model_type": "qwen3_5_text",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
}


@dataclass
class Figures:
    """Of one way to decode; times are medians over the runs."""

    seconds: float = 0.0
    tokens_per_second: float = 0.0
    ms_per_cycle: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    rest_ms: float | None = None
    rollback_ms: float | None = None
    """Of the rest, taking rejected tokens back from recurrent layers."""
    tau: float | None = None
    peak_mib: float | None = None
    same_text: bool = True
    samples: list[float] = field(default_factory=list, repr=False)


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    target, draft, prompts = build(options)
    for inputs in prompts:
        inputs["max_new_tokens"], inputs["do_sample"], inputs["eos_token_id"] = (
            options.new,
            False,
            None,
        )
    ways = the_ways(target, draft, options)
    figures = measure(target, ways, prompts, options)
    floor = floor_ms(target, draft, options) | {
        "self_check_ms": self_check_ms(target, draft, prompts[0], options)
    }
    show(figures, floor, target, draft, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="tiny-pair", choices=["tiny-pair", *SHAPES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default=None, help="float32 on a CPU, bfloat16 elsewhere, unless said"
    )
    parser.add_argument("--context", type=int, default=150, help="prompt tokens")
    parser.add_argument("--new", type=int, default=96, help="new tokens of each text")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5, help="of the draft")
    parser.add_argument("--variant", default="dflash", choices=KINDS, help="kind of the draft")
    parser.add_argument("--tau", type=int, default=None, help="tokens committed per cycle, forced")
    parser.add_argument("--capture", default="auto", choices=CAPTURE)
    parser.add_argument("--prompts", type=int, default=6, help="of the tiny pair's")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The target, its draft, and the prompts."""
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    if options.shape == "tiny-pair":
        target = (
            AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=dtype)
            .to(options.device)
            .eval()
        )
        draft = (
            load_draft(KINDS[options.variant].demo_draft(TINY), dtype=dtype)
            .to(options.device)
            .eval()
        )
        tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
        lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: options.prompts]
        ids = [
            tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids for line in lines
        ]
        rows = [
            row[:, -options.context :].repeat(options.batch, 1).to(options.device) for row in ids
        ]
    else:
        shape = dict(SHAPES[options.shape])
        config = AutoConfig.for_model(
            shape.pop("model_type"), **shape, eos_token_id=None, pad_token_id=0
        )
        with torch.device(options.device):
            target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            fresh = {
                "mask_token_id": 0,
                "block_size": options.block,
                "num_hidden_layers": options.layers,
            }
            draft = (
                DFlashDraftSpec("benchmark")
                .build(config, options.variant, **fresh)
                .to(dtype)
                .eval()
            )
        target.generation_config.eos_token_id = None
        rows = [
            torch.randint(
                config.vocab_size, (options.batch, options.context), device=options.device
            )
        ]
    return (
        target,
        draft,
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows],
    )


def the_ways(target: Any, draft: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is added to the call of `generate` for each way to decode."""
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    if options.device != "cpu":
        ways["plain, static and compiled"] = {"cache_implementation": "static"}
    if options.batch == 1 and not is_recurrent(target):
        own = {"assistant_model": draft, "speculation_type": "dflash"}
        ways["transformers' own dflash"] = own
        if options.device != "cpu":  # which it compiles from 5.24 on
            ways["transformers' own, static"] = own | {"cache_implementation": "static"}
    ways["ours"] = {"custom_generate": draft.speculate, "capture": options.capture}
    return ways


def measure(
    target: Any,
    ways: dict[str, dict[str, Any]],
    prompts: list[dict[str, Any]],
    options: argparse.Namespace,
) -> dict[str, Figures]:
    """Every way in turn over every prompt, `runs` times, after a round that does not count."""
    figures = {name: Figures() for name in ways}
    cycles: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    plain: dict[int, torch.Tensor] = {}
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    for run in range(-3 if options.capture == "compile" else -1, options.runs):
        totals = dict.fromkeys(ways, 0.0)
        for index, inputs in enumerate(prompts):
            for name, way in ways.items():
                call = inputs | way
                if name == "ours":
                    call |= forced(options, plain.get(index), vocab_size)
                text, seconds, peak = timed(target, lambda call=call: target.generate(**call))
                totals[name] += seconds
                figures[name].peak_mib = peak
                if name == "plain":
                    plain[index] = text
                figures[name].same_text &= torch.equal(text, plain[index])
                if run >= 0 and name != "plain":
                    cycles[name] += count_cycles(target, name, call, options)
        if run >= 0:
            for name, seconds in totals.items():
                figures[name].samples.append(seconds)
    tokens = options.new * options.batch * len(prompts)
    for name, one in figures.items():
        one.seconds = statistics.median(one.samples)
        one.tokens_per_second = tokens / one.seconds
        if cycles[name]:
            sums = [sum(column) for column in zip(*cycles[name], strict=True)]
            parts = [1e3 * second / sums[0] for second in sums[1:6]]
            one.ms_per_cycle, one.draft_ms, one.verify_ms, one.rest_ms, one.rollback_ms = parts
            one.tau = sums[6] / sums[7]
            if name != "ours":
                one.draft_ms = one.verify_ms = one.rest_ms = one.rollback_ms = None
    return figures


def count_cycles(
    target: Any, name: str, call: dict[str, Any], options: argparse.Namespace
) -> list[tuple[float, ...]]:
    """Decode once more; per run: cycles, seconds in all, draft, verify, rest, rollback; tokens and row-cycles."""
    if name == "ours":
        record = DecodeStatistics()
        target.generate(**call, statistics=record)
        parts = (
            record.draft_seconds,
            record.verify_seconds,
            record.rest_seconds,
            record.rollback_seconds,
        )
        return [
            (
                record.cycles,
                record.decode_seconds,
                *parts,
                sum(record.committed),
                len(record.committed),
            )
        ]
    moments: list[float] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        moments.append(now(target.device))

    hook = target.register_forward_hook(note)
    try:
        target.generate(**call)
    finally:
        hook.remove()
    cycles = (
        len(moments) - 1
    )  # the first is the prompt's; from each verify's end to the next is one cycle
    if cycles < 1:
        return []
    return [(cycles, moments[-1] - moments[0], 0.0, 0.0, 0.0, 0.0, options.new - 1, cycles)]


class Forced:
    """A proposer that has `tau` tokens committed per cycle: tokens of the plain text replace the draft's own.

    Args:
        chain: the draft's own proposer, which runs first.
        plain `[B, T]`: the plain text.
        vocab_size: for tokens that are wrong.
    """

    def __init__(self, chain: ChainProposer, plain: torch.Tensor, tau: int, vocab_size: int):
        self.chain, self.plain, self.right, self.vocab_size = chain, plain, tau - 1, vocab_size

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        self.chain.append_context(features, first_slot)

    def propose(self, state: DecodeState) -> Proposal:
        proposal = self.chain.propose(state)
        slots = state.slots[:, None] + torch.arange(1, proposal.size, device=self.plain.device)
        truth = self.plain.gather(1, slots.clamp_max(self.plain.shape[1] - 1))
        proposal.tokens[:, 1 : 1 + self.right] = truth[:, : self.right]
        proposal.tokens[:, 1 + self.right :] = (truth[:, self.right :] + 1) % self.vocab_size
        return proposal

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        self.chain.commit(features, slots)


def forced(
    options: argparse.Namespace, plain: torch.Tensor | None, vocab_size: int
) -> dict[str, Any]:
    """Return what is added to our call of `generate` so that `--tau` tokens are committed per cycle."""
    if options.tau is None or plain is None:
        return {}
    return {"proposer": lambda chain: Forced(chain, plain, options.tau, vocab_size)}


def timed(target: Any, run: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """The result, seconds, and MiB at the peak where the device tells."""
    on_gpu = target.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(target.device)
    started = now(target.device)
    result = run()
    seconds = now(target.device) - started
    return (
        result,
        seconds,
        torch.cuda.max_memory_allocated(target.device) / 2**20 if on_gpu else None,
    )


def floor_ms(target: Any, draft: Any, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that reading takes, at the bandwidth measured here: of a plain step and of a cycle."""
    bandwidth = measured_bandwidth(target, 2**28 if options.device == "cpu" else 2**32)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in target.parameters())
    if head is not embedding:
        weights -= embedding.nbytes
    text, length = target.config.get_text_config(decoder=True), options.context + options.new / 2
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layer = (
        2 * text.num_key_value_heads * text.head_dim * head.element_size() * length * options.batch
    )
    plain = weights + layer * (len(kinds) - kinds.count("linear_attention"))
    drafting = sum(weight.nbytes for weight in draft.parameters()) + head.nbytes
    drafting += draft.config.num_hidden_layers * layer
    return {
        "bandwidth_gb_s": bandwidth / 1e9,
        "plain_ms": 1e3 * plain / bandwidth,
        "cycle_ms": 1e3 * (plain + drafting) / bandwidth,
    }


def measured_bandwidth(target: Any, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=target.device)
    sink = torch.empty_like(source)

    def copy() -> None:
        sink.copy_(source)

    return 2 * size / min(timed(target, copy)[1] for _ in range(5))


def self_check_ms(
    target: Any, draft: Any, inputs: dict[str, Any], options: argparse.Namespace
) -> float:
    """What the first decode of a session costs beyond the next, two tokens each; the median over the runs."""
    call = inputs | {"max_new_tokens": 2, "custom_generate": draft.speculate, "capture": "eager"}
    costs = []
    for _ in range(options.runs + 1):
        draft.speculate.checked.clear()
        first, second = (timed(target, lambda: target.generate(**call))[1] for _ in range(2))
        costs.append(1e3 * (first - second))
    return statistics.median(costs[1:])


def show(
    figures: dict[str, Figures], floor: dict[str, float], target: Any, draft: Any, options: Any
) -> None:
    """The table, the ratios, and one line of JSON."""
    dtype = str(target.dtype).removeprefix("torch.")
    print(
        f"{options.shape}, {options.device}, {dtype}, batch {options.batch}, context {options.context}, ",
        end="",
    )
    print(
        f"block {draft.config.block_size}, {options.new} new tokens, {options.threads} threads, ",
        end="",
    )
    print(f"capture {options.capture}")
    heads = ("tok/s", "ms/cycle", "draft", "verify", "rest", "rollback", "tau", "peak MiB")
    print(" " * 28 + "".join(head.rjust(10) for head in heads) + "  text")
    for name, one in figures.items():
        parts = (
            one.ms_per_cycle,
            one.draft_ms,
            one.verify_ms,
            one.rest_ms,
            one.rollback_ms,
            one.tau,
            one.peak_mib,
        )
        cells = "".join(number(part).rjust(10) for part in (one.tokens_per_second, *parts))
        print(f"{name:28}{cells}  {'same' if one.same_text else 'NOT the same'}")
    ratios = ratios_of(figures, floor, options)
    print(
        f"floor at {floor['bandwidth_gb_s']:.1f} GB/s: {floor['plain_ms']:.3f} ms a plain step, ",
        end="",
    )
    print(f"{floor['cycle_ms']:.3f} ms a cycle")
    print(f"self-check, once a session: {floor['self_check_ms']:.2f} ms")
    print(", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in ratios.items()))
    rows = {name: asdict(one) | {"samples": None} for name, one in figures.items()}
    print(json.dumps({"options": vars(options), "figures": rows, "floor": floor, "ratios": ratios}))


def ratios_of(
    figures: dict[str, Figures], floor: dict[str, float], options: Any
) -> dict[str, float | None]:
    """What is compared with what; one run's figures only."""
    plain, ours, own = figures["plain"], figures["ours"], figures.get("transformers' own dflash")
    cycle = ours.ms_per_cycle or 0.0
    steps = options.new * (options.prompts if options.shape == "tiny-pair" else 1)
    return {
        "times_plain": plain.seconds / ours.seconds,
        "cycle_over_transformers_own": cycle / own.ms_per_cycle
        if own and own.ms_per_cycle
        else None,
        "cycle_over_floor": cycle / floor["cycle_ms"],
        "plain_step_over_floor": 1e3 * plain.seconds / steps / floor["plain_ms"],
    }


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
