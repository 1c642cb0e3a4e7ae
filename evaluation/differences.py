# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compare two reports, prompt by prompt."""

from typing import Any

import torch

from .report import Record
from .results import CONFIDENCE, Totals, ends_of, interval, paired_times, ratio_of, resampled
from .ways import PLAIN

_CONDITION = ("temperature", "batch_size", "context")


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for every way that both reports have, how the second differs from the first.

    Ways are the same if name, method and condition are. Where each report has one way with a draft under a condition,
    these two are compared, whatever their names.

    Returns:
        For each pair the names, `prompts` (how many both decoded) and `same_texts` (how many texts are equal). Then
        `speed` (times as many tokens per second) and `acceptance_length` (difference), each with `low` and `high`.

    Raises:
        ValueError: the reports have no way or no prompt in common.
    """
    pairs = _pairs(first, second)
    if not pairs:
        raise ValueError("The two reports have no way to decode in common.")
    found = []
    for one, two in pairs:
        entry = _difference(first, second, one, two)
        if entry["prompts"]:
            found.append(entry)
    if not found:
        raise ValueError("The two reports have no prompt in common.")
    return found


def unlike(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what else differs between two reports, in words: it may be what the difference of figures is from."""
    words = []
    for part, names in {
        "settings": (
            *("target", "target_revision", "max_new_tokens", "dtype", "chat_template"),
            *("thinking", "capture", "proposal", "repeats", "seed"),
        ),
        "environment": ("hardware", "torch", "transformers", "dflash_hub", "threads"),
        "prompt_set": ("name", "sha256"),
    }.items():
        for name in names:
            one, two = first[part].get(name), second[part].get(name)
            if one != two and name == "sha256":
                words.append("the prompts are not the same tokens")
            elif one != two:
                words.append(f"{name.replace('_', ' ')}: {one} and {two}")
    return words


def _pairs(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the indices of the ways that are compared."""
    pairs = []
    for one, way in enumerate(first["ways"]):
        two = _counterpart(way, first["ways"], second["ways"])
        if two is not None:
            pairs.append((one, two))
    return pairs


def _counterpart(
    way: dict[str, Any], own: list[dict[str, Any]], others: list[dict[str, Any]]
) -> int | None:
    """Return the index of the way among `others` that is compared with `way`."""
    alike = [index for index, other in enumerate(others) if _alike(way, other)]
    named = [index for index in alike if others[index]["name"] == way["name"]]
    if named:
        return named[0]
    is_only = sum(_alike(way, other) for other in own) == 1
    return alike[0] if len(alike) == 1 and is_only else None


def _alike(way: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two ways use the same method under the same condition."""
    return all(way[name] == other[name] for name in ("method", *_CONDITION))


def _difference(
    first: dict[str, Any], second: dict[str, Any], one: int, two: int
) -> dict[str, Any]:
    """Return how a way of the second report differs from one of the first."""
    sides = [_of_way(first, one), _of_way(second, two)]
    times = list(paired_times(*sides).values())
    entry: dict[str, Any] = {
        "first": first["ways"][one]["name"],
        "second": second["ways"][two]["name"],
        "prompts": len(times),
        "speed": {"pooled": ratio_of(times), **interval(times)},
        "same_texts": _same_texts(*sides),
        "acceptance_length": None,
    }
    if first["ways"][one]["method"] != PLAIN:
        entry["acceptance_length"] = _acceptance(*sides)
    return entry


def _of_way(report: dict[str, Any], way: int) -> list[Record]:
    """Return the records of a way that did not fail."""
    return [one for one in report["records"] if one["way"] == way and not one["error"]]


def _same_texts(first: list[Record], second: list[Record]) -> int:
    """Return how many prompts have the same text in both, of the first repeat."""
    texts = {one["prompt"]: one["token_ids"] for one in first if one["repeat"] == 0}
    others = [one for one in second if one["repeat"] == 0]
    return sum(texts.get(one["prompt"]) == one["token_ids"] for one in others)


def _acceptance(first: list[Record], second: list[Record]) -> dict[str, Any] | None:
    """Return the difference of the acceptance lengths over the prompts that both have, with its interval."""
    sides = [_counts(first), _counts(second)]
    common = [prompt for prompt in sides[0] if prompt in sides[1]]
    if not common:
        return None
    values = [[*sides[0][prompt], *sides[1][prompt]] for prompt in common]
    table = torch.tensor(values, dtype=torch.float64)
    found: dict[str, Any] = {"difference": float(_gap(table.sum(dim=0, keepdim=True)))}
    found |= {"low": None, "high": None, "confidence": CONFIDENCE}
    if len(common) > 1:
        found["low"], found["high"] = ends_of(_gap(resampled(table)))
    return found


def _counts(records: list[Record]) -> dict[str, tuple[int, int]]:
    """Return tokens and cycles of every prompt."""
    found = {}
    for prompt in dict.fromkeys(one["prompt"] for one in records):
        cycles = Totals([one for one in records if one["prompt"] == prompt]).cycles
        if cycles:
            found[prompt] = (sum(cycles), len(cycles))
    return found


def _gap(sums: torch.Tensor) -> torch.Tensor:
    """Return the differences of acceptance lengths, `[N]`, of tokens and cycles of both sides, `[N, 4]`."""
    return sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
