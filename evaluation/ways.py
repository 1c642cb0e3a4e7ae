# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List the ways to decode that an evaluation compares: plain, with each draft, and by other methods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

PLAIN = "plain"
PLAIN_STATIC = "plain-static"
DFLASH = "dflash"
TRANSFORMERS = "transformers-dflash"
TRANSFORMERS_STATIC = "transformers-dflash-static"
LOOKUP = "prompt-lookup"
ASSISTANT = "assistant"
METHODS = (PLAIN, PLAIN_STATIC, DFLASH, TRANSFORMERS, TRANSFORMERS_STATIC, LOOKUP, ASSISTANT)
UNDRAFTED = (PLAIN, PLAIN_STATIC)
"""Methods that give one token in a step."""
STATIC = (PLAIN_STATIC, TRANSFORMERS_STATIC)
"""Methods of transformers with a cache of fixed size, which it compiles on a GPU."""
LOOKUP_TOKENS = 10
"""Tokens that prompt look-up proposes, as transformers' documentation does."""


@dataclass(frozen=True)
class Condition:
    """Hold what all ways that are compared with each other have in common.

    Args:
        context: tokens of each prompt; None for the prompts as they are.
    """

    temperature: float = 0.0
    batch_size: int = 1
    context: int | None = None

    def __str__(self) -> str:
        words = []
        if self.temperature:
            words.append(f"temperature {self.temperature:g}")
        if self.batch_size > 1:
            words.append(f"batches of {self.batch_size}")
        if self.context is not None:
            words.append(f"context {self.context:,}")
        return ", ".join(words)


@dataclass(frozen=True)
class Drafting:
    """Name what proposes tokens.

    Args:
        method: one of `METHODS`.
        draft: name of the draft or the assistant; None without one.
        revision: its commit, if it is of the Hub.
        kind: of the draft.
        block_size: of the draft.
        is_varied: whether the same draft takes part with several block sizes.
        taps: the target's layers that the draft reads.
        label: what the user called the draft; None for its name.
    """

    method: str = PLAIN
    draft: str | None = None
    revision: str | None = None
    kind: str | None = None
    block_size: int | None = None
    is_varied: bool = False
    taps: tuple[int, ...] = ()
    label: str | None = None

    def __str__(self) -> str:
        if self.draft is None:
            return self.method
        name = self.label or str(self.draft)
        if self.is_varied:
            name = f"{name}, block {self.block_size}"
        prefixes = {TRANSFORMERS: "transformers, ", TRANSFORMERS_STATIC: "transformers-static, "}
        return prefixes.get(self.method, "") + name


@dataclass(frozen=True)
class Way:
    """Describe one way to decode: what proposes tokens, and under which condition."""

    drafting: Drafting
    condition: Condition

    @property
    def method(self) -> str:
        return self.drafting.method

    @property
    def name(self) -> str:
        words = str(self.condition)
        return f"{self.drafting}, {words}" if words else str(self.drafting)

    def as_json(self, baseline: int) -> dict[str, Any]:
        """Return the entry of a report.

        Args:
            baseline: index of the plain way of the same condition.
        """
        drafting, condition = self.drafting, self.condition
        return {
            "name": self.name,
            "method": drafting.method,
            "draft": drafting.draft,
            "revision": drafting.revision,
            "kind": drafting.kind,
            "block_size": drafting.block_size,
            "taps": list(drafting.taps),
            "temperature": condition.temperature,
            "batch_size": condition.batch_size,
            "context": condition.context,
            "baseline": baseline,
        }


def conditions(
    temperatures: Sequence[float], batch_sizes: Sequence[int], contexts: Sequence[int | None]
) -> list[Condition]:
    """Return the grid of conditions, without repetitions."""
    grid = product(temperatures, batch_sizes, contexts or (None,))
    return list(dict.fromkeys(Condition(*values) for values in grid))


def grid(draftings: Sequence[Drafting], found: Sequence[Condition]) -> list[Way]:
    """Return every drafting under every condition; plain decoding is the first of each condition."""
    all_draftings = [Drafting(), *draftings]
    return [Way(drafting, condition) for condition in found for drafting in all_draftings]


def groups(ways: Sequence[Way]) -> Iterator[tuple[Condition, list[int]]]:
    """Yield each condition with the indices of its ways, plain decoding first."""
    for condition in dict.fromkeys(way.condition for way in ways):
        yield condition, [index for index, way in enumerate(ways) if way.condition == condition]


def in_turn(indices: Sequence[int], number: int) -> list[int]:
    """Return the ways in the order of the batch with this number: each begins as often as the others."""
    first = number % len(indices)
    return [*indices[first:], *indices[:first]]
