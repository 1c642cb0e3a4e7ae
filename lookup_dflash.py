# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Look up proposals: they copy what followed the same tokens before, in the prompt or in the text since.

This file travels with every pushed draft. Look-ups need no draft, and their proposals are chains, which every target
takes. Texts are plain lists of ids on the host.

Shapes: B rows, P prompt slots, Q block positions, N new positions, F taps * target hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .proposals_dflash import Proposal

SHORTEST, LONGEST = 3, 32
"""How many tokens must have occurred before, and how many are compared at most."""
CANDIDATES = 64
"""Earlier occurrences that are compared at most, the latest first."""
WIDTHS = (1, 4, 8, 16, 32, 64)
"""Positions that a block may have. Each width costs masks, and a recording where blocks are recorded."""
FIRST_WIDTH = 8
"""The width with which a row begins."""
TRUSTED = 8
"""A match of this many tokens is proposed after any number of rejections."""


@dataclass
class Match:
    """Hold an earlier occurrence of the last tokens of a text.

    Args:
        length: how many tokens are the same, counted back from the end of the text.
        tokens: what followed them.
    """

    length: int
    tokens: list[int]


class SuffixIndex:
    """Hold one text, and where its short runs of tokens occurred before.

    The hash of each run of `shortest` tokens leads to its last occurrence, and each occurrence to the one before. So a
    token costs one entry. What is found is compared token by token, backwards.

    Args:
        shortest: tokens of a match at least.
        longest: tokens that are compared at most.
    """

    def __init__(self, shortest: int = SHORTEST, longest: int = LONGEST):
        self.shortest, self.longest = shortest, longest
        self.tokens: list[int] = []
        self.last_ends: dict[int, int] = {}
        """By the hash of a run, how many tokens of the text precede what follows its last occurrence."""
        self.earlier_ends: list[int] = []
        """For each run in the order of the text, the end of its occurrence before; 0 if there was none."""

    def extend(self, tokens: list[int]) -> None:
        """Append these tokens to the text."""
        first = max(0, len(self.tokens) - self.shortest + 1)
        self.tokens += tokens
        shifted = [self.tokens[first + offset :] for offset in range(self.shortest)]
        last_ends, earlier_ends = self.last_ends, self.earlier_ends
        # Hashes and not the runs: the garbage collector would walk through those.
        hashes = map(hash, zip(*shifted, strict=False))
        for end, run in enumerate(hashes, first + self.shortest):
            earlier_ends.append(last_ends.get(run, 0))
            last_ends[run] = end

    def find(self, count: int) -> Match | None:
        """Return the longest match of the end of the text, and the `count` tokens that followed it.

        Of several that are equally long it is the latest. What followed may reach the end of the text; then it goes on
        with itself. After 1, 2, 3, 1, 2, 3, 1, 2, 3 the match is six tokens long, and 1, 2, 3, 1, 2, 3 ... follow.
        """
        length, best_end = self.shortest - 1, 0
        end = self.earlier_ends[-1] if self.earlier_ends else 0
        for _ in range(CANDIDATES):
            if not end or length >= self.longest:
                break
            common = self._common(end)
            if common > length:
                length, best_end = common, end
            end = self.earlier_ends[end - self.shortest]
        if not best_end:
            return None
        followed = self.tokens[best_end : best_end + count]
        repeats = -(-count // len(followed))
        return Match(length, (followed * repeats)[:count])

    def _common(self, end: int) -> int:
        """Return how many tokens before `end` are those before the end of the text."""
        tokens, length = self.tokens, 0
        most = min(self.longest, end)
        while length < most and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length


class Lookup:
    """Hold the texts of a decode's rows, indexed as far as they go. The prompt is indexed when first asked for."""

    def __init__(self, shortest: int = SHORTEST, longest: int = LONGEST):
        self.shortest, self.longest = shortest, longest
        self.indices: list[SuffixIndex] = []
        self.num_indexed: list[int] = []
        """Generated tokens of each row that its index holds."""

    def find(self, state: Any, count: int = WIDTHS[-1] - 1) -> list[Match | None]:
        """Return, for each row of a `DecodeState`, the match that ends with its anchor; None for none.

        Args:
            count: how many tokens each match holds. Rows that are finished have none.
        """
        if not self.indices:
            self._index_prompts(state)
        found = []
        for row, active in enumerate(state.sequences.active):
            found.append(self._find_in(row, state, count) if active else None)
        return found

    def _find_in(self, row: int, state: Any, count: int) -> Match | None:
        generated = state.sequences.generated[row]
        index = self.indices[row]
        index.extend(generated[self.num_indexed[row] :])
        self.num_indexed[row] = len(generated)
        return index.find(count)

    def _index_prompts(self, state: Any) -> None:
        """Index what each row's prompt shows as ids, without its padding."""
        ids, first = state.sequences.prompt, state.prompt.first_id_slot
        padding = state.prompt.padding_mask[:, first : first + ids.shape[1]]
        for row, hidden in zip(ids, padding, strict=True):
            index = SuffixIndex(self.shortest, self.longest)
            index.extend(row[~hidden].tolist())
            self.indices.append(index)
            self.num_indexed.append(0)


class LookupProposer:
    """Propose as a chain what followed the last tokens of each row's text before.

    A block is as wide as the row with a match that asks for most. After all that a row asked for was accepted, it asks
    for twice as much; after less than half was, for half. It never asks for more than twice the length of its match.
    After every two proposals of which nothing was accepted its match must be one token longer. Without any match the
    block is the anchor alone, a step of plain decoding.

    Args:
        width: tokens that are proposed at most; None for as many as `WIDTHS` allow.
    """

    def __init__(self, width: int | None = None) -> None:
        self.lookup, self.width = Lookup(), width
        self.widths: list[int] = []
        """For each row, what it may ask for, one of `WIDTHS`."""
        self.failures: list[int] = []
        """For each row, how many proposals in a row had nothing that was accepted."""
        self.proposed: list[tuple[int, int]] = []
        """For each row at the last proposal, the slot of its anchor, and what it asked for; 1 is the anchor alone."""

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        """Take nothing: look-ups read the text."""

    def propose(self, state: Any) -> Proposal:
        """Return each row's anchor and what followed the match before; rows without a match repeat their anchor."""
        slots = state.last_slots
        if not self.proposed and not state.slots.is_cuda:
            # To record operations takes as long as several blocks, and no size but one is sure to come again.
            state.target.runner.asked = {1}
        self._learn(slots)
        matches = self.lookup.find(state)
        wanted = [self._width(row, match, state) for row, match in enumerate(matches)]
        self.proposed = list(zip(slots, wanted, strict=True))
        size = max(wanted)
        if self.width is not None:
            size = min(size, 1 + self.width)
        if size == 1:
            return Proposal(state.anchor)
        return chain_of(matches, state, size)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take nothing: look-ups read the text."""

    def _learn(self, slots: list[int]) -> None:
        """Let rows ask for more or for less, by how far they moved to their anchors' new `slots`."""
        if not self.widths:
            self.widths, self.failures = [FIRST_WIDTH] * len(slots), [0] * len(slots)
        for row, (slot, width) in enumerate(self.proposed):
            if width == 1:
                continue
            moved = slots[row] - slot
            self.failures[row] = 0 if moved > 1 else self.failures[row] + 1
            if moved >= width:
                self.widths[row] = max(self.widths[row], at_least(width + 1))
            elif 2 * moved < width:
                self.widths[row] = WIDTHS[max(1, WIDTHS.index(width) - 1)]

    def _width(self, row: int, match: Match | None, state: Any) -> int:
        """Return what a row asks for: at most what its match is worth, and what reaches the end of the text."""
        if match is None or match.length < min(SHORTEST + self.failures[row] // 2, TRUSTED):
            return 1
        sequences = state.sequences
        length = sequences.prompt.shape[1] + len(sequences.generated[row])
        left = sequences.stop_conditions.max_length - length
        return min(self.widths[row], at_least(2 * match.length), at_least(left))


def chain_of(matches: list[Match | None], state: Any, size: int) -> Proposal:
    """Return each row's anchor and the first `size - 1` tokens of its match; rows without one repeat their anchor."""
    rows = []
    for match, generated in zip(matches, state.sequences.generated, strict=True):
        anchor = generated[-1:]
        followed = anchor * (size - 1) if match is None else match.tokens
        rows.append(anchor + followed[: size - 1])
    return Proposal(torch.tensor(rows, device=state.anchor.device), kind="lookup")


def at_least(count: int) -> int:
    """Return the smallest width of this many positions or more; the largest one where none is."""
    return next((width for width in WIDTHS if width >= count), WIDTHS[-1])
