# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the figures of an evaluation: speed, acceptance, and how sure they are."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import torch

from .ways import PLAIN

Record = dict[str, Any]
RESAMPLES = 2000
CONFIDENCE = 0.95
ACCEPTANCE_LENGTH = (
    "tokens / cycles, pooled over all prompts; a cycle's tokens include the target's own; the token that the prefill "
    "gives is not counted; tokens beyond the end of the text are not counted"
)
ACCEPTANCE_BY_POSITION = (
    "marginal: the share of all cycles that commit the drafted token at this position; conditional: of the cycles that "
    "commit the one before it, the share that commit this one too"
)


class Totals:
    """Sum over records of one way."""

    def __init__(self, records: Sequence[Record]):
        self.records = [record for record in records if not record["error"]]
        self.tokens = sum(record["new_tokens"] for record in self.records)
        self.seconds = sum(record["seconds"] for record in self.records)
        self.cycles = [count for record in self.records for count in record["committed"] or ()]

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per cycle."""
        return sum(self.cycles) / len(self.cycles) if self.cycles else None


def results_of(report: dict[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the results of every way of a report.

    Args:
        report: all of it but its records and results.
        records: those that there are so far.
    """
    by_way: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_way[record["way"]].append(record)
    found = []
    for index, way in enumerate(report["ways"]):
        found.append(result_of(report, index, by_way[index], by_way[way["baseline"]]))
    return found


def result_of(
    report: dict[str, Any], index: int, records: list[Record], plain: list[Record]
) -> dict[str, Any]:
    """Return the results of one way.

    Args:
        records: of this way.
        plain: those of plain decoding under the same condition.
    """
    way, totals = report["ways"][index], Totals(records)
    category_of = {prompt["id"]: prompt["category"] for prompt in report["prompts"]}
    pairs = paired_times(plain, totals.records)
    if way["method"] == PLAIN:
        pairs = {}
    result: dict[str, Any] = {"way": index, "tokens_per_second": totals.rate}
    result["seconds_per_token"] = 1 / totals.rate if totals.rate else None
    result["acceptance_length"] = totals.acceptance_length
    lengths = by_prompt(totals.records)
    result["acceptance_length_by_prompt"] = lengths
    result["acceptance_length_mean_of_prompts"] = mean(lengths.values()) if lengths else None
    result["by_category"] = by_category(category_of, totals.records, pairs)
    result["acceptance_by_position"] = by_position(totals.records)
    result["histogram"] = {str(key): count for key, count in sorted(Counter(totals.cycles).items())}
    result["speedup"] = speedup_of(pairs)
    result["identical"] = sum(record["identical"] is True for record in records)
    result["differing"] = sum(record["identical"] is False for record in records)
    result["verdicts"] = dict(Counter(verdicts(records)))
    result["errors"] = sum(bool(record["error"]) for record in records)
    result["time_split"] = time_split(totals.records)
    result |= floor_of(report, way, totals.records)
    peaks = [record["peak_memory_bytes"] for record in totals.records]
    result["peak_memory_bytes"] = max((peak for peak in peaks if peak), default=None)
    result["slower_than_plain"] = [
        prompt for prompt, times in pairs.items() if (ratio_of([times]) or 1) < 1
    ]
    return result


def verdicts(records: Sequence[Record]) -> list[str]:
    """Return the verdict of every text that differs."""
    return [record["divergence"]["verdict"] for record in records if record["divergence"]]


def by_prompt(records: Sequence[Record]) -> dict[str, float]:
    """Return the acceptance length of every prompt that had a cycle, over all repeats."""
    found: dict[str, list[int]] = defaultdict(list)
    for record in records:
        found[record["prompt"]] += record["committed"] or ()
    return {prompt: sum(counts) / len(counts) for prompt, counts in found.items() if counts}


def by_category(
    category_of: dict[str, str], records: Sequence[Record], pairs: dict[str, "Times"]
) -> dict[str, dict[str, Any]]:
    """Return length of acceptance, speed and number of prompts of every category."""
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        members[category_of[record["prompt"]]].append(record)
    found = {}
    for category, own in members.items():
        prompts = {record["prompt"] for record in own}
        totals = Totals(own)
        found[category] = {
            "acceptance_length": totals.acceptance_length,
            "speedup": ratio_of([pairs[prompt] for prompt in prompts if prompt in pairs]),
            "tokens_per_second": totals.rate,
            "count": len(prompts),
        }
    return found


def by_position(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return the acceptance at each position of the block, see `ACCEPTANCE_BY_POSITION`."""
    counts = accepted_counts(records)
    reached = [sum(counts[position:]) for position in range(len(counts))]
    if not reached or not reached[0]:
        return {"conditional": [], "marginal": []}
    conditional = []
    for before, count in pairwise(reached):
        conditional.append(count / before if before else 0.0)
    marginal = [count / reached[0] for count in reached[1:]]
    return {"conditional": conditional, "marginal": marginal}


def accepted_counts(records: Sequence[Record]) -> list[int]:
    """Return how many cycles accepted 0, 1, 2, ... drafted tokens, over all records whose cycles are known."""
    counts: list[int] = []
    for record in records:
        words = record["speculative_decoding"] or {"acceptance_histogram": []}
        own = words["acceptance_histogram"]
        counts += [0] * (len(own) - len(counts))  # none if it is as long already
        for accepted, cycles in enumerate(own):
            counts[accepted] += cycles
    return counts


def time_split(records: Sequence[Record]) -> dict[str, float | None]:
    """Return the seconds of each part of the decodes; None where it was not measured."""
    split: dict[str, float | None] = {}
    for part in ("prefill", "draft", "verify", "rest"):
        found = [record[f"{part}_seconds"] for record in records]
        split[part] = None if None in found or not found else sum(found)
    return split


def floor_of(
    report: dict[str, Any], way: dict[str, Any], records: Sequence[Record]
) -> dict[str, float | None]:
    """Return the least seconds of a step, by the memory it reads, and that as a share of the seconds measured."""
    unknown: dict[str, float | None] = {"floor_seconds_per_step": None, "floor_share": None}
    bandwidth, read = report["environment"]["bandwidth_gb_s"], way["bytes_per_step"]
    steps = steps_of(records)
    if read is None or not steps:
        return unknown
    lengths = {prompt["id"]: prompt["tokens"] for prompt in report["prompts"]}
    slots = 0.0
    for record in records:
        slots += (way["context"] or lengths[record["prompt"]]) + record["new_tokens"] / 2
    slots *= way["batch_size"] / len(records)
    moved = (
        read["fixed"] + read["per_slot"] * slots + read["per_drafted"] * drafted_per_cycle(records)
    )
    floor = moved / (1e9 * bandwidth)
    spent = sum(record["seconds"] - record["prefill_seconds"] for record in records)
    return {"floor_seconds_per_step": floor, "floor_share": floor * steps / spent}


def drafted_per_cycle(records: Sequence[Record]) -> float:
    """Return the mean number of tokens that a cycle drafts; 0 where none are drafted."""
    drafted, cycles = 0, 0
    for record in records:
        words = record["speculative_decoding"]
        if words is not None:
            drafted += words["num_draft_tokens"]
            cycles += words["num_spec_steps"]
    return drafted / max(cycles, 1)


def steps_of(records: Sequence[Record]) -> int:
    """Return how many steps the decodes took after their prefill; 0 if that is not known.

    A batch takes as many as its longest row.
    """
    longest: dict[tuple[int, int], int] = defaultdict(int)
    for record in records:
        if record["drafted"] is None:
            return 0
        batch = (record["batch"], record["repeat"])
        longest[batch] = max(longest[batch], steps_of_row(record))
    return sum(longest.values())


def steps_of_row(record: Record) -> int:
    """Return the steps of one row after its prefill."""
    committed = record["committed"]
    if committed is None:
        return record["new_tokens"] - 1
    is_with_prefill = sum(committed) == record["new_tokens"]  # tokens were drafted before it
    return len(committed) - is_with_prefill


Times = tuple[float, float, float, float]


def paired_times(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Times]:
    """Return seconds and tokens of the first way and of the second, for every prompt that both decoded."""
    one, two = sums_by_prompt(first), sums_by_prompt(second)
    return {
        prompt: (seconds, tokens, *two[prompt])
        for prompt, (seconds, tokens) in one.items()
        if prompt in two
    }


def sums_by_prompt(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return seconds and tokens of every prompt, over all repeats."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        if not record["error"]:
            seconds, tokens = found.get(record["prompt"], (0.0, 0.0))
            added = (seconds + record["seconds"], tokens + record["new_tokens"])
            found[record["prompt"]] = added
    return found


def speedup_of(pairs: dict[str, Times]) -> dict[str, Any] | None:
    """Return how many times as fast the second way is, with its interval; None without common prompts."""
    if not pairs:
        return None
    times = list(pairs.values())
    return {"pooled": ratio_of(times), **interval(times)}


def ratio_of(pairs: Sequence[Times]) -> float | None:
    """Return how many times as many tokens per second the second way gives, over all pairs."""
    if not pairs:
        return None
    sums = [sum(values) for values in zip(*pairs, strict=True)]
    return (sums[3] / sums[2]) / (sums[1] / sums[0])


def interval(pairs: Sequence[Times], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return a bootstrap interval of `ratio_of`: prompts are drawn with repetition, each with both of its times.

    With fewer than two prompts, there is none.
    """
    found: dict[str, Any] = {"low": None, "high": None, "confidence": CONFIDENCE}
    found["method"] = "bootstrap over prompts, paired"
    if len(pairs) < 2:
        return found
    drawn = resampled(torch.tensor(pairs, dtype=torch.float64), resamples)
    ratios = (drawn[:, 3] / drawn[:, 2]) / (drawn[:, 1] / drawn[:, 0])
    found["low"], found["high"] = ends_of(ratios)
    return found


def resampled(values: torch.Tensor, resamples: int = RESAMPLES) -> torch.Tensor:
    """Return the sums of `values [N, C]` over N rows drawn with repetition, `[resamples, C]`. The draws are fixed."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (resamples, len(values)), generator=noise)
    times_drawn = torch.zeros(draws.shape, dtype=values.dtype)
    times_drawn.scatter_add_(1, draws, torch.ones_like(times_drawn))
    return times_drawn @ values


def ends_of(values: torch.Tensor) -> tuple[float, float]:
    """Return the ends of the middle part of `values [N]` that `CONFIDENCE` names."""
    outside = (1 - CONFIDENCE) / 2
    quantiles = torch.tensor([outside, 1 - outside], dtype=values.dtype)
    low, high = values.quantile(quantiles).tolist()
    return low, high
