# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure decoding speed in one process: plain `generate`, transformers' own DFlash loop, and ours.

    python benchmarks/decode.py                                     # the built-in trained pair
    python benchmarks/decode.py --capture compile                   # the same, with blocks compiled
    python benchmarks/decode.py --shape hybrid --tau 3              # a target with recurrent state
    python benchmarks/decode.py --shape qwen3-8b --device cuda --context 1024 --tau 6 --capture eager graphs
    python benchmarks/decode.py --shape small --copy --new 200      # a text that stands in the prompt: look-ups

Shapes other than `tiny-pair` have random weights, so their drafts guess no token. `--tau` fixes how many tokens are
committed per cycle: after the draft ran, right tokens replace its own. Texts are greedy and compared with plain
greedy decoding. Such a target counts: after token n it writes n + 1, far ahead of all others, so rounding changes no
text. With `--copy` the text to come stands in the prompt already, so that look-ups find it. Times are medians over the
runs, where the methods take turns. The floor is the time to read all weights and keys from memory, at the bandwidth
measured here. The last line is JSON.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, DFlashDraftSpec, load_draft
from dflash_hub.evaluation.floor import bytes_of_draft, bytes_of_plain_step, measured_bandwidth
from dflash_hub.execution_dflash import CAPTURE
from dflash_hub.generate_dflash import CHECKED, PROPOSALS, LookupGenerate, SpeculativeGenerate
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
class Result:
    """Hold the results of one method; times are medians over the runs."""

    seconds: float = 0.0
    tokens_per_second: float = 0.0
    ms_per_cycle: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    rest_ms: float | None = None
    rollback_ms: float | None = None
    """The part of the rest that rolls recurrent layers back."""
    tau: float | None = None
    peak_mib: float | None = None
    same_text: bool = True
    samples: list[float] = field(default_factory=list, repr=False)


def main() -> None:
    """Run the whole script."""
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    target, draft, prompts = build(options)
    for inputs in prompts:
        inputs |= {"max_new_tokens": options.new, "do_sample": False, "eos_token_id": None}
    found = methods(target, draft, options)
    chosen = {name: found[name] for name in found if name in (options.methods or found)}
    results = measure(target, chosen, prompts, options)
    floor = floor_ms(target, draft, options)
    floor["self_check_ms"] = self_check_ms(target, draft, prompts[0], options)
    show(results, floor, target, draft, options)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="tiny-pair", choices=["tiny-pair", *SHAPES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default=None, help="default: float32 on a CPU, bfloat16 elsewhere"
    )
    parser.add_argument("--context", type=int, default=150, help="prompt tokens")
    parser.add_argument("--new", type=int, default=96, help="new tokens per text")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--layers", type=int, default=5, help="layers of the draft")
    parser.add_argument("--variant", default="dflash", choices=KINDS, help="kind of the draft")
    parser.add_argument("--tau", type=int, default=None, help="force this many tokens per cycle")
    parser.add_argument("--copy", action="store_true", help="prompts that hold the text to come")
    parser.add_argument("--capture", nargs="+", default=["auto"], choices=CAPTURE)
    parser.add_argument("--proposal", nargs="+", default=["auto", "chain"], choices=PROPOSALS)
    parser.add_argument("--width", type=int, default=None, help="nodes of --proposal tree")
    parser.add_argument("--methods", nargs="*", help="rows of the table, plain among them")
    parser.add_argument("--prompts", type=int, default=6, help="number of prompts of the tiny pair")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return the target, its draft, and the prompts as arguments of `generate`."""
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    load = load_tiny_pair if options.shape == "tiny-pair" else build_random_pair
    target, draft, rows = load(options, dtype)
    if options.copy:
        rows = [holding_its_text(target, row, options.new, options.context) for row in rows]
    prompts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return target, draft, prompts


def holding_its_text(target: Any, row: torch.Tensor, new: int, context: int) -> torch.Tensor:
    """Return the prompt `row [B, P]`, its greedy text, and its end again, which the same text is to follow."""
    asked = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    text = target.generate(row, attention_mask=torch.ones_like(row), **asked)
    return torch.cat([text, row[:, -context // 2 :]], dim=1)


def load_tiny_pair(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, list[Any]]:
    """Return the built-in target, its draft, and the ids of each prompt, `[B, P]`."""
    target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=dtype)
    draft = load_draft(KINDS[options.variant].demo_draft(TINY), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    rows = []
    for line in (
        (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: options.prompts]
    ):
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids
        rows.append(ids[:, -options.context :].repeat(options.batch, 1).to(options.device))
    return target.to(options.device).eval(), draft.to(options.device).eval(), rows


def build_random_pair(
    options: argparse.Namespace, dtype: torch.dtype
) -> tuple[Any, Any, list[Any]]:
    """Return a random target of the shape, a random draft, and the ids of one random prompt, `[B, P]`."""
    shape = SHAPES[options.shape] | {"eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    fields = {
        "mask_token_id": 0,
        "block_size": options.block,
        "num_hidden_layers": options.layers,
    }
    with torch.device(options.device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        draft = DFlashDraftSpec("benchmark").build(config, options.variant, **fields)
    target.generation_config.eos_token_id = None
    let_it_count(target)
    size = (options.batch, options.context)
    row = torch.randint(config.vocab_size, size, device=options.device)
    return target, draft.to(dtype).eval(), [row]


@torch.no_grad()
def let_it_count(target: Any) -> None:
    """Give the head the embeddings, one token further, and let the embeddings outweigh what the layers add."""
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    if head is not embedding:
        head.copy_(embedding.roll(1, dims=0))
        embedding.mul_(1000)


def methods(target: Any, draft: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the arguments that each method adds to the call of `generate`."""
    found: dict[str, dict[str, Any]] = {"plain": {}}
    if options.device != "cpu":
        found["plain, static and compiled"] = {"cache_implementation": "static"}
    if options.batch == 1 and not is_recurrent(target):
        own = {"assistant_model": draft, "speculation_type": "dflash"}
        found["transformers' own dflash"] = own
        found["transformers' own look-ups"] = {"prompt_lookup_num_tokens": 10}
        if options.device != "cpu":  # transformers compiles it from 5.24 on
            found["transformers' own, static"] = own | {"cache_implementation": "static"}
    proposals = ["chain"] if options.tau else options.proposal
    for capture, proposal in itertools.product(options.capture, proposals):
        # Compiled code and what was learnt stay with the function.
        ours = {"custom_generate": SpeculativeGenerate(draft), "capture": capture}
        if not options.tau:
            ours["proposal"] = proposal
        if proposal == "tree":
            ours["width"] = options.width
        name = f"ours, {proposal}" if capture == "auto" else f"ours, {proposal}, {capture}"
        found[name] = ours
    look_ups = {"custom_generate": LookupGenerate(), "capture": options.capture[0]}
    found["ours, look-ups without a draft"] = look_ups
    return found


def is_ours(name: str) -> bool:
    """Return whether a method is one of ours."""
    return name.startswith("ours")


def measure(
    target: Any,
    kwargs_of: dict[str, dict[str, Any]],
    prompts: list[dict[str, Any]],
    options: argparse.Namespace,
) -> dict[str, Result]:
    """Run every method in turn over every prompt, `runs` times, after a round of warm-up."""
    results = {name: Result() for name in kwargs_of}
    cycles: dict[str, list[Cycles]] = {name: [] for name in kwargs_of}
    plain: dict[int, torch.Tensor] = {}
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    for run in range(-2 if "compile" in options.capture else -1, options.runs):
        totals = dict.fromkeys(kwargs_of, 0.0)
        for index, inputs in enumerate(prompts):
            for name, generate_kwargs in kwargs_of.items():
                call = inputs | generate_kwargs
                if is_ours(name) and "look-ups" not in name:
                    call |= forced(options, plain.get(index), vocab_size)
                (text, seconds), peak = timed_with_peak(target, call)
                totals[name] += seconds
                results[name].peak_mib = peak
                if name == "plain":
                    plain[index] = text
                results[name].same_text &= torch.equal(text, plain[index])
                print(f"run {run}, {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
                if run >= 0 and name != "plain":
                    cycles[name] += count_cycles(target, name, call, options)
        if run >= 0:
            for name, seconds in totals.items():
                results[name].samples.append(seconds)
    tokens = options.new * options.batch * len(prompts)
    for name, result in results.items():
        result.seconds = statistics.median(result.samples)
        result.tokens_per_second = tokens / result.seconds
        if cycles[name]:
            add_cycles(result, cycles[name], has_parts=is_ours(name))
    return results


@dataclass
class Cycles:
    """Hold the number of cycles of one decode, and their seconds in all and by part."""

    cycles: int
    seconds: float
    tokens: int
    row_cycles: int
    """Cycles summed over the rows that were not finished."""
    draft: float = 0.0
    verify: float = 0.0
    rest: float = 0.0
    rollback: float = 0.0


def add_cycles(result: Result, found: list[Cycles], has_parts: bool) -> None:
    """Set the mean times per cycle and the tokens per cycle of a result."""

    def total(name: str) -> float:
        return sum(getattr(decode, name) for decode in found)

    def milliseconds(name: str) -> float:
        return 1e3 * total(name) / total("cycles")

    result.ms_per_cycle = milliseconds("seconds")
    result.tau = total("tokens") / total("row_cycles")
    if has_parts:
        result.draft_ms = milliseconds("draft")
        result.verify_ms = milliseconds("verify")
        result.rest_ms = milliseconds("rest")
        result.rollback_ms = milliseconds("rollback")


def count_cycles(
    target: Any, name: str, call: dict[str, Any], options: argparse.Namespace
) -> list[Cycles]:
    """Decode once more and return its cycles; an empty list if there was none."""
    if is_ours(name):
        record = DecodeStatistics()
        target.generate(**call, statistics=record)
        found = Cycles(
            record.cycles, record.decode_seconds, sum(record.committed), len(record.committed)
        )
        found.draft, found.verify = record.draft_seconds, record.verify_seconds
        found.rest, found.rollback = record.rest_seconds, record.rollback_seconds
        return [found]
    moments: list[float] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        moments.append(now(target.device))

    hook = target.register_forward_hook(note)
    try:
        target.generate(**call)
    finally:
        hook.remove()
    # The first forward is the prompt's; a cycle lasts from the end of one forward to the next.
    cycles = len(moments) - 1
    if cycles < 1:
        return []
    return [Cycles(cycles, moments[-1] - moments[0], options.new - 1, cycles)]


class Forced(ChainProposer):
    """Propose tokens of the plain text instead of the draft's, so that `tau` tokens are committed per cycle.

    Args:
        chain: the draft's own proposer, whose work is done first.
        plain `[B, T]`: the plain text.
        vocab_size: used to make wrong tokens.
    """

    def __init__(self, chain: ChainProposer, plain: torch.Tensor, tau: int, vocab_size: int):
        super().__init__(chain.drafter, chain.draft_state, chain.sampler)
        self.plain = plain
        self.right, self.vocab_size = tau - 1, vocab_size

    def propose(self, state: DecodeState) -> Proposal:
        proposal = super().propose(state)
        slots = state.slots[:, None] + torch.arange(1, proposal.size, device=self.plain.device)
        truth = self.plain.gather(1, slots.clamp_max(self.plain.shape[1] - 1))
        proposal.tokens[:, 1 : 1 + self.right] = truth[:, : self.right]
        proposal.tokens[:, 1 + self.right :] = (truth[:, self.right :] + 1) % self.vocab_size
        return proposal


def forced(
    options: argparse.Namespace, plain: torch.Tensor | None, vocab_size: int
) -> dict[str, Any]:
    """Return the arguments for our `generate` that fix the tokens per cycle at `--tau`."""
    if options.tau is None or plain is None:
        return {}
    return {"proposer": lambda chain: Forced(chain, plain, options.tau, vocab_size)}


def timed(target: Any, run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `run` and the seconds it took."""
    started = now(target.device)
    result = run()
    return result, now(target.device) - started


def timed_with_peak(target: Any, call: dict[str, Any]) -> tuple[tuple[Any, float], float | None]:
    """Return the text of `generate` with its seconds, and the peak memory in MiB on a GPU."""
    if target.device.type != "cuda":
        return timed(target, lambda: target.generate(**call)), None
    torch.cuda.reset_peak_memory_stats(target.device)
    result = timed(target, lambda: target.generate(**call))
    return result, torch.cuda.max_memory_allocated(target.device) / 2**20


def floor_ms(target: Any, draft: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds that a plain step and a cycle need just to read from memory."""
    bandwidth = measured_bandwidth(target.device)
    plain_bytes, slots = bytes_of_plain_step(target), options.context + options.new / 2
    plain = plain_bytes.of(slots, options.batch)
    cycle = (plain_bytes + bytes_of_draft(target, draft)).of(slots, options.batch)
    return {
        "bandwidth_gb_s": bandwidth / 1e9,
        "plain_ms": 1e3 * plain / bandwidth,
        "cycle_ms": 1e3 * cycle / bandwidth,
    }


def self_check_ms(
    target: Any, draft: Any, inputs: dict[str, Any], options: argparse.Namespace
) -> float:
    """Return the extra time of a session's first decode over its second, two tokens each; the median over the runs."""
    call = inputs | {"max_new_tokens": 2, "custom_generate": draft.speculate, "capture": "eager"}
    costs = []
    for _ in range(options.runs + 1):
        CHECKED.clear()
        _, first = timed(target, lambda: target.generate(**call))
        _, second = timed(target, lambda: target.generate(**call))
        costs.append(1e3 * (first - second))
    return statistics.median(costs[1:])


def show(
    results: dict[str, Result], floor: dict[str, float], target: Any, draft: Any, options: Any
) -> None:
    """Print the table, the ratios, and one line of JSON."""
    dtype = str(target.dtype).removeprefix("torch.")
    print(
        f"{options.shape}, {options.device}, {dtype}, batch {options.batch}, context {options.context}, ",
        end="",
    )
    print(
        f"block {draft.config.block_size}, {options.new} new tokens, {options.threads} threads, ",
        end="",
    )
    print(f"{torch.cuda.get_device_name() if target.device.type == 'cuda' else 'CPU'}")
    heads = ("tok/s", "ms/cycle", "draft", "verify", "rest", "rollback", "tau", "peak MiB")
    print(" " * 28 + "".join(head.rjust(10) for head in heads) + "  text")
    for name, result in results.items():
        print(f"{name:28}{row_of(result)}")
    ratios = ratios_of(results, floor, options)
    print(
        f"floor at {floor['bandwidth_gb_s']:.1f} GB/s: {floor['plain_ms']:.3f} ms a plain step, ",
        end="",
    )
    print(f"{floor['cycle_ms']:.3f} ms a cycle")
    print(f"self-check, once a session: {floor['self_check_ms']:.2f} ms")
    for method, found in ratios.items():
        words = [f"{name.replace('_', ' ')} {number(value)}" for name, value in found.items()]
        print(f"{method}: {', '.join(words)}")
    rows = {name: asdict(result) | {"samples": None} for name, result in results.items()}
    print(json.dumps({"options": vars(options), "figures": rows, "floor": floor, "ratios": ratios}))


def row_of(result: Result) -> str:
    """Return the cells of a row of the table."""
    cells = (
        result.tokens_per_second,
        result.ms_per_cycle,
        result.draft_ms,
        result.verify_ms,
        result.rest_ms,
        result.rollback_ms,
        result.tau,
        result.peak_mib,
    )
    text = "same" if result.same_text else "NOT the same"
    return "".join(number(cell).rjust(10) for cell in cells) + f"  {text}"


def ratios_of(
    results: dict[str, Result], floor: dict[str, float], options: Any
) -> dict[str, dict[str, float | None]]:
    """Return the ratios of times, all from this run."""
    plain, own = results["plain"], results.get("transformers' own dflash", Result()).ms_per_cycle
    steps = options.new * (options.prompts if options.shape == "tiny-pair" else 1)
    step = 1e3 * plain.seconds / steps
    ratios: dict[str, dict[str, float | None]] = {}
    ratios["plain"] = {"ms_per_step": step, "step_over_floor": step / floor["plain_ms"]}
    for name, ours in results.items():
        cycle, verify = ours.ms_per_cycle, ours.verify_ms
        if not is_ours(name) or not cycle or not verify:
            continue
        ratios[name] = {
            "times_plain": plain.seconds / ours.seconds,
            "cycle_over_transformers_own": cycle / own if own else None,
            "cycle_over_floor": cycle / floor["cycle_ms"],
            "share_beside_verify": 1 - verify / cycle,
        }
    return ratios


def number(value: float | None) -> str:
    """Return a number with two decimals, or a dash."""
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
