# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Remember what decoding has shown: what cycles cost, how many drafted tokens are accepted, whether drafting pays.

This file travels with every pushed draft. All means forget, since texts change and machines are busy.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from .costs_dflash import CostTable
from .lookup_dflash import Match

MEMORY = 0.95
"""The weight that a cycle keeps with every cycle after it."""

SHORT_MEMORY = 0.85
"""The same, for whether drafting pays."""

EVIDENCE = 4.0
"""Weight of the cycles with the draft after which it may be paused."""

UNTRIED = {"tree": 1.1, "branch": 1.1}
"""By kind, how much longer cycles are held to take than others before one was tried; other kinds a little less."""

LEAST_SHARE = 0.4
"""A recorded block is held to take at least this part of an eager one, until it was tried."""

FIRST_TREE = 15
"""Nodes of the trees that are verified at first; twice as many and one are grown to choose from."""

DOUBT = 2.0
"""Accepted tokens, as many as expected, with which every count begins: few cycles prove little. They are forgotten."""

FIRST_PAUSE, LONGEST_PAUSE = 4, 256
"""Cycles without the draft, once it does not pay: so many at first, then twice as many each time, up to this."""


class Estimate(NamedTuple):
    """Hold what a cycle may verify, what that is expected to bring, and what it costs.

    Args:
        kind: "plain", "chain", "tree", "lookup" or "branch", which is a look-up beside a tree.
        size: positions after the anchor.
        masses: for each depth, in how many rows the draft expects its token to be accepted. Empty for look-ups.
        tokens: to be committed, over all rows.
        seconds: of the cycle.
    """

    kind: str
    size: int
    masses: list[float]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return f"{self.tokens:.1f} tokens expected in {1e3 * self.seconds:.1f} ms"


@dataclass
class Average:
    """Hold a mean that forgets.

    Args:
        first: the mean before anything was added.
        memory: the weight that a value keeps with every value after it.
    """

    first: float
    memory: float = MEMORY
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Add a value, or the sum of `weight` values."""
        self.total = self.memory * self.total + value
        self.weight = self.memory * self.weight + weight

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else self.first


class Odds:
    """Count by depth how often a drafted token was accepted, beside how often the draft expected it."""

    def __init__(self) -> None:
        self.accepted: list[float] = []
        self.expected: list[float] = []

    def add(self, accepted: list[int], expected: list[float]) -> None:
        """Add a cycle: for each depth, in how many rows a token was accepted, and in how many it was expected."""
        missing = len(expected) - len(self.expected)
        self.accepted += [DOUBT] * missing
        self.expected += [DOUBT] * missing
        for depth, (reached, mass) in enumerate(zip(accepted, expected, strict=True)):
            self.accepted[depth] = MEMORY * self.accepted[depth] + reached
            self.expected[depth] = MEMORY * self.expected[depth] + mass

    def corrected(self, masses: list[float]) -> float:
        """Return how many drafted tokens to expect where the draft expects `masses`."""
        total = sum(masses[len(self.expected) :])
        for mass, accepted, expected in zip(masses, self.accepted, self.expected, strict=False):
            total += mass * accepted / expected
        return total


@dataclass
class Experience:
    """Hold what decoding some number of rows with one target and draft has shown, from text to text.

    Args:
        costs: seconds of verifying, as they were measured.
    """

    costs: CostTable
    drift: Average = field(default_factory=lambda: Average(1.0))
    """How much longer cycles take now than verifying took then."""
    overheads: dict[tuple[str, int, bool], Average] = field(default_factory=dict)
    """By kind, size, and whether such blocks are recorded, how much longer such cycles take than others."""
    saved: Average = field(default_factory=lambda: Average(0.0))
    """Seconds that a recording saves in a cycle beside the draft."""
    saved_drafting: Average = field(default_factory=lambda: Average(0.0))
    """The same in drafting."""
    cycle_tokens: Average = field(default_factory=lambda: Average(2.0))
    """Tokens that a row gets in a cycle."""
    shares: dict[int, Average] = field(default_factory=dict)
    """By size, in which part of all cycles it was verified."""
    draft_share: Average = field(default_factory=lambda: Average(1.0))
    """In which part of all cycles the draft was asked."""
    draft_seconds: Average = field(default_factory=lambda: Average(0.0))
    """Of eager blocks of the draft, where only some are recorded."""
    draft_rate: Average = field(default_factory=lambda: Average(0.0, SHORT_MEMORY))
    """Tokens per second of cycles with the draft, as estimated."""
    odds: dict[str, Odds] = field(default_factory=lambda: defaultdict(Odds))
    """By kind."""
    match_odds: dict[int, Average] = field(default_factory=dict)
    """By the length of a match, in powers of 2: how often its next token was right."""
    widest_used: int = FIRST_TREE
    """Nodes of the largest tree that was verified lately, or of the first ones."""
    pause: int = 0
    """Cycles to come without the draft."""
    next_pause: int = FIRST_PAUSE

    def cycle_seconds(self, kind: str, size: int, is_recorded: bool = False) -> float:
        """Return what a cycle costs that verifies `size` positions after the anchor, without the draft."""
        base = self.costs.seconds(1 + size) * self.drift.mean
        own = self._overhead(kind, size, is_recorded)
        if not is_recorded or own.weight:
            return base * own.mean
        eager = base * self._overhead(kind, size, False).mean
        return max(eager - self.saved.mean, LEAST_SHARE * eager)

    @property
    def drafting(self) -> tuple[float, float]:
        """Seconds of drafting, by an eager and by a recorded block."""
        eager = self.draft_seconds.mean
        return eager, max(eager - self.saved_drafting.mean, LEAST_SHARE * eager)

    def add_cycle(self, kind: str, size: int, seconds: float, is_recorded: bool = False) -> None:
        """Learn what a cycle cost without the draft."""
        eager = self._overhead(kind, size, False)
        if is_recorded and eager.weight:  # what the eager block takes was seen
            self.saved.add(self.cycle_seconds(kind, size) - seconds)
        ratio = seconds / self.costs.seconds(1 + size)
        ratio = min(max(ratio, 0.2), 5.0)  # the process may have slept
        own = self._overhead(kind, size, is_recorded)
        if own.weight or not is_recorded:  # what a recording saves is no drift
            self.drift.add(ratio / own.mean)
        own.add(ratio / self.drift.mean)

    def _overhead(self, kind: str, size: int, is_recorded: bool) -> Average:
        key = (kind, size, is_recorded)
        if key not in self.overheads:
            self.overheads[key] = Average(UNTRIED.get(kind, 0.95))
        return self.overheads[key]

    def add_size(self, size: int, has_drafted: bool) -> None:
        """Learn which sizes come, and how often the draft is asked."""
        self.draft_share.add(float(has_drafted))
        if size not in self.shares:
            # It did not come in any of the cycles before.
            self.shares[size] = Average(0.0, weight=self.draft_share.weight - 1)
        for known, share in self.shares.items():
            share.add(float(known == size))

    def add_accepted(self, kind: str, masses: list[float], accepted: list[int]) -> None:
        """Learn how many drafted tokens each row accepted, where the draft expected `masses`."""
        reached = []
        for depth in range(len(masses)):
            reached.append(sum(count > depth for count in accepted))
        self.odds[kind].add(reached, masses)

    def odds_of(self, match: Match) -> Average:
        """Return how often the next token is right after matches about as long as this; longer ones are trusted more.

        The first guess is 0.5 for 3 tokens, 0.75 for 4 to 7, 0.875 for 8 to 15.
        """
        bits = match.length.bit_length()
        if bits not in self.match_odds:
            first = 1 - 0.5 ** (bits - 1)
            known = self.match_odds[bits] = Average(first)
            known.add(4 * first, 4)
        return self.match_odds[bits]

    def add_draft_rate(self, rate: float, plain_rate: float) -> None:
        """Learn the rate of a cycle with the draft, and pause drafting where it does not pay."""
        self.draft_rate.add(rate)
        if self.draft_rate.mean >= plain_rate:
            self.next_pause = FIRST_PAUSE
        elif self.draft_rate.weight > EVIDENCE:
            self.pause = self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
