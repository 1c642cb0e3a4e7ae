# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure what a cycle may verify, each by itself and chosen in every cycle, on the built-in pair.

    python benchmarks/proposals.py                                          # everything; hours
    python benchmarks/proposals.py --sets prose copy --drafts draft --temperatures 0 --runs 3
    python benchmarks/proposals.py --methods plain auto chain               # these rows only
    python benchmarks/proposals.py --clock process --threads 1              # on a machine that has other work
    python benchmarks/proposals.py --costs                                  # what blocks of each size cost here

Sets of prompts: `held-out` are the pair's, Python code that neither model saw; `tables` are the two of them whose text
stands in other files too; `code` are the others; `prose` are the built-in prompts of an evaluation that are no code.
With `copy` the text to come stands in the prompt already, and the target copies it as far as it does. With `count` the
target, of the same shape, writes the token n + 1 after token n, so it copies all of it. The draft `untrained` has the
shape of `draft` and random weights.

The methods take turns over the prompts, after a round that does not count. Figures are medians over the runs; ratios
are of one run. Costs are measured before; nothing is read from the cache folder. Greedy texts are compared with plain
`generate`, sampled ones among the methods of this package, whose noise belongs to places. The last line is JSON.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
from decode import TINY, holding_its_text, let_it_count, number
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, DFlashDraftSpec, load_draft
from dflash_hub.adaptive_dflash import CHOICES, AutoProposer, mode_of_costs
from dflash_hub.costs_dflash import CostTable, measure_costs
from dflash_hub.evaluation.prompts import load_prompts
from dflash_hub.evaluation.run import environment
from dflash_hub.execution_dflash import WORTH_RECORDING, resolve_mode
from dflash_hub.experience_dflash import Experience
from dflash_hub.generate_dflash import LookupGenerate, SpeculativeGenerate
from dflash_hub.generation_dflash import DecodeState, now
from dflash_hub.proposals_dflash import ChainProposer, Proposal
from dflash_hub.target_dflash import is_recurrent

SETS = ("held-out", "code", "tables", "prose", "copy", "count")
DRAFTS = ("draft", "draft2", "untrained")
TABLES = ("iso8859_15.py", "cp1251.py")
"""Held-out files that are tables of characters, as many others are."""
CODE = "code"
"""The category of prompts that are no prose."""
CONTEXT = 150
"""Tokens of a prompt at most, its last ones."""
COPIED = 200
"""New tokens of texts that stand in their prompt."""
CLOCKS = ("wall", "process")
WIDTHS = (8, 16, 32, 64, 128)
OWN = "transformers' own dflash"
ABLATIONS = {
    "auto without trees": ("tree", "branch"),
    "auto without look-ups": ("lookup", "branch"),
    "auto without pauses": ("plain",),
}
"""What auto may not choose. Without plain steps it never pauses drafting."""


@dataclass
class Result:
    """Hold the figures of one method; all but the counts are one for each run.

    Args:
        token_seconds: of decoding, without the prefill; of a whole run, for each token.
        proposed: how many cycles verified what.
        same_text: None if no text is to be the same.
    """

    seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    cycles: int = 0
    proposed: Counter[str] = field(default_factory=Counter)
    same_text: bool | None = None


@dataclass
class Case:
    """What is decoded in one table."""

    prompts: str
    draft: str
    temperature: float

    def __str__(self) -> str:
        kind = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.prompts}, {self.draft}, {kind}"


def main() -> None:
    """Run the whole script."""
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    target = load_target(options)
    about = environment(target) | {"load_before": os.getloadavg()}
    tables = []
    if options.costs:
        tables = [costs_of(target, name, options) for name in options.drafts]
    else:
        combinations = product(options.sets, options.drafts, options.temperatures)
        for case in (Case(*values) for values in combinations):
            results, costs = measure(target, case, options)
            tables.append(shown(case, results) | {"costs": asdict(costs)})
    about |= {"load_after": os.getloadavg()}
    print(json.dumps({"options": vars(options), "environment": about, "tables": tables}))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_sets = [name for name in SETS if name != "held-out"]
    parser.add_argument("--sets", nargs="+", default=default_sets, choices=SETS)
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS), choices=DRAFTS)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0])
    parser.add_argument("--methods", nargs="+", help="rows of the tables; plain is always one")
    parser.add_argument("--prompts", type=int, default=None, help="prompts of each set at most")
    parser.add_argument("--new", type=int, default=96, help="new tokens; 200 where texts copy")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    words = "process: the time of this process, other work aside; auto itself looks at the wall"
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help=words)
    parser.add_argument("--costs", action="store_true", help="measure what blocks cost, and stop")
    return parser.parse_args()


# Models and prompts


def load_target(options: argparse.Namespace) -> Any:
    """Return the built-in target, in float32."""
    target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32)
    return target.to(options.device).eval()


@torch.no_grad()
def counting(target: Any) -> Any:
    """Return the target with a head of its own, so that after token n it writes n + 1, far ahead of all others."""
    target.config.tie_word_embeddings = False
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())
    # All of one length, so that each is closest to itself.
    directions = torch.randn_like(embedding.weight)
    embedding.weight.copy_(directions / directions.norm(dim=-1, keepdim=True))
    let_it_count(target)
    return target


def load(target: Any, name: str) -> Any:
    """Return a draft of the built-in target."""
    if name != "untrained":
        return load_draft(TINY / name, dtype=target.dtype).to(target.device).eval()
    fields = {"mask_token_id": 1, "block_size": 8, "num_hidden_layers": 2}
    fields["target_layer_ids"] = [1, 2, 4]
    draft = DFlashDraftSpec("benchmark").build(target.config, "dflash", **fields)
    return draft.to(target.device, target.dtype).eval()


def texts_of(name: str) -> list[str]:
    """Return the prompts of a set."""
    if name == "prose":
        prompts = load_prompts("built-in", None).prompts
        return [prompt.text for prompt in prompts if prompt.category != CODE]
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for row in map(json.loads, lines):
        is_table = row["source"] in TABLES
        if name not in ("code", "tables") or is_table == (name == "tables"):
            found.append(row["prompt"])
    return found


def load_prompts_of(target: Any, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the prompts of a set as arguments of `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    found = []
    for text in texts_of(name)[: options.prompts]:
        row = tokenizer(text, return_tensors="pt").input_ids[:, -CONTEXT:].to(target.device)
        if name in ("copy", "count"):
            row = holding_its_text(target, row, COPIED, CONTEXT)
        found.append({"input_ids": row, "attention_mask": torch.ones_like(row)})
    new = COPIED if name in ("copy", "count") else options.new
    for inputs in found:
        inputs |= {"max_new_tokens": new, "eos_token_id": None}
    return found


# Costs


class Measuring(ChainProposer):
    """Measures, before the first cycle, what blocks of each size cost.

    Args:
        chain: the draft's own proposer.
        found: where the table goes.
    """

    def __init__(self, chain: ChainProposer, found: list[CostTable]):
        super().__init__(chain.drafter, chain.draft_state, chain.sampler)
        self.found = found

    def propose(self, state: DecodeState) -> Proposal:
        if not self.found:
            self.found.append(measure_costs(state))
        return super().propose(state)


def measured_costs(target: Any, draft: Any, inputs: dict[str, Any]) -> CostTable:
    """Return what blocks of each size cost after a prompt, measured now."""
    found: list[CostTable] = []
    asked = inputs | {"max_new_tokens": WORTH_RECORDING, "do_sample": False}
    more = {"proposer": lambda chain: Measuring(chain, found)}
    target.generate(**asked, custom_generate=draft.speculate, **more)
    return found[0]


def costs_of(target: Any, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Print the costs with a draft, and return them."""
    prompts = load_prompts_of(target, "held-out", options)
    table = measured_costs(target, load(target, name), prompts[0])
    print(f"{name}: milliseconds of the verify forward, and times that of one position")
    for size, seconds in zip(table.sizes, table.measured, strict=True):
        times = seconds / table.measured[0]
        print(f"{size:6} positions {1e3 * seconds:10.2f} {times:8.2f}")
    return {"draft": name} | asdict(table)


# Methods


def methods(target: Any, draft: Any, costs: CostTable, sampled: bool) -> dict[str, dict[str, Any]]:
    """Return the arguments that each method adds to the call of `generate`."""
    found: dict[str, dict[str, Any]] = {"plain": {}}
    if not is_recurrent(target):
        found[OWN] = {"assistant_model": draft, "speculation_type": "dflash"}
    found["look-ups without a draft"] = {"custom_generate": LookupGenerate()}
    mode = resolve_mode("auto", target, is_recurrent(target), WORTH_RECORDING)
    key = (1, mode_of_costs(mode, target.device))
    # What was learnt stays with the function.
    for name, more in ours(sampled).items():
        found[name] = {"custom_generate": SpeculativeGenerate(draft)} | more
    learns = found["auto"]["custom_generate"]
    learns.experiences[target] = {key: Experience(costs)}
    for name, without in ABLATIONS.items():
        known = {key: Experience(costs)}
        kinds = tuple(kind for kind in CHOICES if kind not in without)
        found[name] = {"custom_generate": SpeculativeGenerate(draft), "capture": mode}
        found[name]["proposer"] = limited(known, mode, kinds)
    return found


def ours(sampled: bool) -> dict[str, dict[str, Any]]:
    """Return the keywords of each method with a draft."""
    found: dict[str, dict[str, Any]] = {
        "plain steps of ours": {"proposal": "plain"},
        "chain": {"proposal": "chain"},
        "chain of 3": {"proposal": "chain", "width": 3},
    }
    for width in WIDTHS:
        found[f"tree of {width}"] = {"proposal": "tree", "width": width}
    if sampled:
        for name in ("chain", *(f"tree of {width}" for width in WIDTHS)):
            found[f"{name}, greedy draft"] = found[name] | {"draft_sampling": "greedy"}
    found["look-ups"] = {"proposal": "lookup"}
    found["auto"] = {"proposal": "auto"}
    return found


def limited(known: dict[Any, Experience], mode: str, kinds: tuple[str, ...]) -> Any:
    """Return what makes a proposer that chooses among these kinds."""
    return lambda chain: AutoProposer(chain, known, mode, kinds)


def is_ours(name: str) -> bool:
    """Return whether a method is one of this package."""
    return name not in ("plain", OWN)


# Measuring


def measure(
    target: Any, case: Case, options: argparse.Namespace
) -> tuple[dict[str, Result], CostTable]:
    """Run every method in turn over every prompt, `runs` times, after a round of warm-up."""
    if case.prompts == "count":
        target = counting(load_target(options))
    draft = load(target, case.draft)
    prompts = load_prompts_of(target, case.prompts, options)
    costs = measured_costs(target, draft, prompts[0])
    chosen = methods(target, draft, costs, case.temperature > 0)
    if options.methods:
        chosen = {name: chosen[name] for name in chosen if name in ("plain", *options.methods)}
    results = {name: Result() for name in chosen}
    # Transformers' own loop leaves hooks on its target.
    targets = dict.fromkeys(chosen, target) | {OWN: copy.deepcopy(target)}
    for run in range(-1, options.runs):
        round_of = {name: Result() for name in chosen}
        for inputs in prompts:
            texts = decode_all(targets, chosen, inputs | sampling(case), options.clock, round_of)
            compare(texts, round_of, case.temperature > 0)
        print(f"{case}: run {run} done", file=sys.stderr, flush=True)
        for name, found in round_of.items():
            add(results[name], found, counts=run >= 0)
    return results, costs


def sampling(case: Case) -> dict[str, Any]:
    """Return the arguments of `generate` for a temperature."""
    if not case.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": case.temperature, "top_k": 0, "top_p": 1.0}


def decode_all(
    targets: dict[str, Any],
    chosen: dict[str, dict[str, Any]],
    inputs: dict[str, Any],
    clock: str,
    results: dict[str, Result],
) -> dict[str, torch.Tensor]:
    """Decode a prompt by every method, and add what it took to its result; return the texts."""
    # Each prompt begins with another method, so that a machine that grows slower favours nobody.
    first = len(results["plain"].seconds) % len(chosen)
    names = list(chosen)
    texts = {}
    for name in [*names[first:], *names[:first]]:
        torch.manual_seed(first)
        texts[name] = timed(targets[name], name, inputs | chosen[name], clock, results[name])
    return texts


def compare(texts: dict[str, torch.Tensor], results: dict[str, Result], sampled: bool) -> None:
    """Note which texts are not what they are to be."""
    names = list(texts)
    for name in names:
        other = compared_with(name, names, sampled)
        if other is not None:
            add_same(results[name], torch.equal(texts[name], texts[other]))


def add_same(result: Result, same: bool | None) -> None:
    """Note whether further texts are what they are to be."""
    if same is not None:
        result.same_text = same and result.same_text is not False


def compared_with(name: str, names: list[str], sampled: bool) -> str | None:
    """Return the method whose text is to be the same; None for none."""
    if not sampled:
        return "plain"
    return next(filter(is_ours, names)) if is_ours(name) else None


def timed(target: Any, name: str, call: dict[str, Any], clock: str, result: Result) -> torch.Tensor:
    """Decode once, and add seconds, tokens and cycles to a result; return the text `[1, T]`."""
    record, moments = DecodeStatistics(), [now(target.device)]
    with ExitStack() as stack:
        if is_ours(name):
            call = call | {"statistics": record}
        else:  # ours counts by itself
            hook = target.register_forward_hook(lambda *_: moments.append(now(target.device)))
            stack.callback(hook.remove)
        started = read_clock(clock, target)
        text = target.generate(**call)
        seconds = read_clock(clock, target) - started
    whole = now(target.device) - moments[0]
    prefill = record.prefill_seconds if is_ours(name) else moments[1] - moments[0]
    result.seconds.append(seconds)
    result.token_seconds.append(seconds * (1 - prefill / whole))
    result.texts += 1
    result.tokens += call["max_new_tokens"]
    result.cycles += record.cycles if is_ours(name) else len(moments) - 2
    result.proposed.update(record.proposed)
    return text


def read_clock(clock: str, target: Any) -> float:
    """Return seconds, once the device has finished its work."""
    return time.process_time() if clock == "process" else now(target.device)


def add(result: Result, found: Result, counts: bool) -> None:
    """Add a run, the sum of its prompts; of a warm-up only whether its texts were the same."""
    add_same(result, found.same_text)
    if not counts:
        return
    result.seconds.append(sum(found.seconds))
    # The first token of a text, which the prefill gives, is in no cycle.
    result.token_seconds.append(sum(found.token_seconds) / (found.tokens - found.texts))
    result.texts += found.texts
    result.tokens += found.tokens
    result.cycles += found.cycles
    result.proposed.update(found.proposed)


# Showing


def shown(case: Case, results: dict[str, Result]) -> dict[str, Any]:
    """Print a table, and return its figures."""
    heads = ("tokens/cycle", "tokens/s", "times plain", "token/theirs")
    print(f"\n{case}\n" + " " * 26 + "".join(head.rjust(14) for head in heads) + "  text")
    rows = {}
    for name, result in results.items():
        row = rows[name] = figures(name, results)
        cells = [row[key] for key in ("tau", "tokens_per_second", "times_plain", "over_own")]
        text = {None: "-", True: "same", False: "NOT the same"}[result.same_text]
        print(f"{name:26}" + "".join(number(cell).rjust(14) for cell in cells) + f"  {text}")
    print(f"auto chose: {chosen_kinds(results)}", flush=True)
    return asdict(case) | {"rows": rows}


def figures(name: str, results: dict[str, Result]) -> dict[str, Any]:
    """Return the figures of a method, beside plain `generate` and transformers' own loop in the same run."""
    result, plain = results[name], results["plain"]
    own = results.get(OWN)
    runs = len(result.seconds)
    return {
        "tau": (result.tokens - result.texts) / result.cycles,
        "tokens_per_second": result.tokens / runs / statistics.median(result.seconds),
        "times_plain": median_ratio(plain.seconds, result.seconds),
        "over_own": median_ratio(result.token_seconds, own.token_seconds) if own else None,
        "same_text": result.same_text,
        "seconds": result.seconds,
        "proposed": dict(result.proposed),
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each run."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def chosen_kinds(results: dict[str, Result]) -> str:
    """Return the share of each kind among the cycles of auto, in words."""
    if "auto" not in results:
        return "-"
    kinds: Counter[str] = Counter()
    for label, count in results["auto"].proposed.items():
        kinds[label.split()[0]] += count
    whole = sum(kinds.values())
    return ", ".join(f"{kind} {count / whole:.0%}" for kind, count in kinds.most_common())


if __name__ == "__main__":
    main()
