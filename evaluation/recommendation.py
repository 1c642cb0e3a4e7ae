# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say in words which way to decode an evaluation recommends."""

from collections.abc import Sequence
from typing import Any

from .divergence import BUG
from .ways import PLAIN

LITTLE = 1.3
"""A draft with an acceptance length below this hardly ever guesses right."""


def recommendations(
    ways: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one recommendation for each condition, with the index of the way and the words."""
    baselines = dict.fromkeys(way["baseline"] for way in ways)
    return [recommended(ways, results, baseline) for baseline in baselines]


def recommended(
    ways: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], baseline: int
) -> dict[str, Any]:
    """Return the recommendation for the ways that are compared with the plain way `baseline`."""
    others = [
        result
        for result in results
        if ways[result["way"]]["baseline"] == baseline and ways[result["way"]]["method"] != PLAIN
    ]
    measured = [result for result in others if result["speedup"]]
    exact = [result for result in measured if not result["verdicts"].get(BUG)]
    condition = ways[baseline]["name"].removeprefix(PLAIN).removeprefix(", ")
    start = f"At {condition}: " if condition else ""
    names = {index: way["name"].removesuffix(f", {condition}") for index, way in enumerate(ways)}
    remarks = [found for one in others if (found := remark_on(ways, one, names[one["way"]]))]
    best = max(exact, key=lambda result: result["speedup"]["pooled"], default=None)
    if best is None:
        return {"way": baseline, "words": " ".join([f"{start}Use plain decoding.", *remarks])}
    low, high = best["speedup"]["low"], best["speedup"]["high"]
    pooled = best["speedup"]["pooled"]
    is_sure = low is None or not low <= 1 <= high
    name, figure = names[best["way"]], shown_speedup(best["speedup"])
    if pooled <= 1 and is_sure:
        words = f"Use plain decoding, which is faster: the fastest other way, {name}, is {figure}."
    elif not is_sure:
        words = (
            f"Use plain decoding, or evaluate more prompts: the fastest other way, {name}, is {figure}, so whether it "
            "is faster is not certain."
        )
    else:
        words = f"Use {name}: {figure}."
    is_chosen = pooled > 1 and is_sure
    way = best["way"] if is_chosen else baseline
    if is_chosen and best["slower_than_plain"]:
        remarks.insert(
            0, f"{count_of(best['slower_than_plain'], 'prompt')} took longer than plainly."
        )
    if is_chosen and low is None:
        remarks.insert(0, "One prompt is too few to say how sure that is.")
    return {"way": way, "words": " ".join([start + words, *remarks])}


def remark_on(ways: Sequence[dict[str, Any]], result: dict[str, Any], name: str) -> str | None:
    """Return what is wrong with the way of this name; None if nothing is."""
    length = result["acceptance_length"]
    bugs = result["verdicts"].get(BUG, 0)
    if bugs:
        return f"Do not use {name}: {bugs} of its texts differ from the plain ones for more than rounding explains."
    if result["speedup"] is None and result["errors"]:
        return f"{name} failed: see the errors of its records."
    if ways[result["way"]]["draft"] and length is not None and length < LITTLE:
        words = f"{name} guesses hardly anything: {length:.2f} tokens per cycle, of which one is the target's own."
        is_sampled = ways[result["way"]]["temperature"] > 0  # which any draft finds harder to guess
        return words if is_sampled else f"{words} Was it made for this target?"
    return None


def shown_speedup(speedup: dict[str, Any]) -> str:
    """Return a speed-up with its interval, in words."""
    words = f"{speedup['pooled']:.2f} times as fast"
    if speedup["low"] is None:
        return words
    return f"{words} [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def count_of(items: Sequence[Any], noun: str) -> str:
    """Return a number with its noun."""
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
