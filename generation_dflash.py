# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decoding with a draft: draft, verify, accept, commit. The text is exactly the target's; only the time falls.

This file travels with every pushed draft. After DFlash (arXiv 2602.06036) and z-lab/dflash. `speculate` is the decoding
function that the target's `generate` calls with everything prepared; everything else leads to it.

Shapes: B rows, P prompt columns, Q block positions, V vocabulary, F taps * target hidden size.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache_dflash import Masks, ancestors, widen
from .drafting_dflash import Drafter
from .handover_dflash import take_over
from .sampling_dflash import Chooser
from .selfcheck_dflash import Answer, can_check, check_prompt
from .target_dflash import Target
from .text_dflash import Prompt, Texts


@dataclass
class DecodeStatistics:
    """What a decode did. Filled while it runs, if given to `generate(..., statistics=...)`; several may add up."""

    cycles: int = 0
    """Draft and verify forwards, each over the whole batch."""
    committed: list[int] = field(default_factory=list)
    """Tokens committed in each cycle, the target's own included; one entry for every row still going."""
    accepted_at: list[int] = field(default_factory=list)
    """How often the drafted token at position 1, 2, ... of the block was accepted."""
    prefill_seconds: float = 0.0
    """Until the first token, which prefill gives and no cycle counts."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    rest_seconds: float = 0.0
    """Everything else between the first token and the last: choosing, accepting, committing, telling."""

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds + self.rest_seconds

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per cycle and row, pooled: tokens / cycles; 0 without cycles."""
        return sum(self.committed) / len(self.committed) if self.committed else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each drafted position of the block, the share of cycles in which its token was accepted."""
        return [count / len(self.committed) for count in self.accepted_at]

    def count(self, counts: list[tuple[int, int]], size: int) -> None:
        """One cycle of blocks of `size`: for each row, drafted tokens accepted, and tokens kept (0 once ended)."""
        self.cycles += 1
        self.accepted_at = self.accepted_at or [0] * (size - 1)
        for accepted, kept in counts:
            if kept:
                self.committed.append(kept)
                for position in range(min(accepted, kept)):
                    self.accepted_at[position] += 1


class Recorder:
    """Times the phases of a decode for `DecodeStatistics`; without any to fill, it does nothing at all."""

    def __init__(self, statistics: DecodeStatistics | None, device: torch.device):
        self.statistics, self.device = statistics, device

    def phase(self, name: str) -> Any:
        return nullcontext() if self.statistics is None else self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = now(self.device)
        yield
        field_name = f"{name}_seconds"
        setattr(self.statistics, field_name, getattr(self.statistics, field_name) + now(self.device) - started)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Proposal:
    """A tree of tokens whose root is the anchor.

    Args:
        tokens `[B, Q]`: the anchor first.
        parents `[Q]`: the position before each, -1 for the root; the same in every row, and on the host. None for the
            plain chain.
    """

    tokens: torch.Tensor
    parents: torch.Tensor | None = None

    @property
    def ways(self) -> list[list[int]]:
        """For each position, the positions from the root to it."""
        if self.parents is None:
            return [list(range(position + 1)) for position in range(self.tokens.shape[1])]
        ways: list[list[int]] = []
        for position, parent in enumerate(self.parents.tolist()):
            ways.append([*(ways[parent] if parent >= 0 else []), position])
        return ways

    @property
    def depths(self) -> list[int]:
        """How far each position is from the root."""
        if self.parents is None:
            return list(range(self.tokens.shape[1]))
        return [len(way) - 1 for way in self.ways]


def accept(proposal: Proposal, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which drafted tokens stay: those on the way down that are all the target's own choice.

    Args:
        choices `[B, Q]`: the target's token after each position of the proposal.

    Returns:
        How many stay, `[B]`; and the way, `[B, Q]`: positions of the proposal from the root on, of which the first
        `1 + accepted` count. The tokens to commit are the choices along it.
    """
    tokens, parents = proposal.tokens, proposal.parents
    if parents is None:
        accepted = (tokens[:, 1:] == choices[:, :-1]).cumprod(dim=1).sum(dim=1)
        return accepted, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    lineage, parents = ancestors(parents).to(tokens.device), parents.to(tokens.device)  # [Q, Q], [Q]
    right = (tokens == choices[:, parents.clamp_min(0)]) | (parents < 0)  # [B, Q]
    stays = (right[:, None] | ~lineage).all(dim=-1)
    tip = torch.where(stays, lineage.sum(dim=-1), 0).argmax(dim=-1)  # [B], the deepest that stays
    order = torch.where(lineage[tip], torch.arange(len(parents), device=tokens.device), len(parents)).sort().values
    return lineage[tip].sum(dim=-1) - 1, order.clamp_max(len(parents) - 1)


@torch.no_grad()
def decode(pair: "Pair", statistics: DecodeStatistics | None = None) -> None:
    """The decode loop. What proposes a block, and what the texts do with it, are the pair's steps.

    Raises:
        ValueError: the target's logits are not numbers.
    """
    recorder = Recorder(statistics, pair.draft.device)
    with recorder.phase("prefill"):
        pair.prefill()
    while not pair.texts.finished:
        with recorder.phase("draft"):
            proposal = pair.propose()  # draft: a tree of tokens, [B, Q], with the anchor as its root
        with recorder.phase("verify"):
            logits = pair.verify(proposal)  # [B, Q, V]
        with recorder.phase("rest"):
            choices = pair.choose(proposal, logits)  # [B, Q]: the target's own token after each position
            accepted, way = accept(proposal, choices)  # how many drafted tokens stay, and which
            counts = pair.commit(proposal, choices, accepted, way)  # to the texts; the rest of the block is undone
        if statistics is not None:
            statistics.count(counts, proposal.tokens.shape[1])


class Pair:
    """A target and a draft while they decode a batch: the steps of a cycle, on all rows at once.

    Args:
        prompt: the prompt and what `generate` prepared with it.
        keep: of "scores" and "logits", those to keep of every committed token.
    """

    def __init__(self, target: Target, drafter: Drafter, prompt: Prompt, texts: Texts, chooser: Chooser, keep: tuple):
        self.unchecked = False
        """Whether the prompt shall be checked, see `selfcheck_dflash`."""
        self.has_checked = False
        self.target, self.drafter, self.prompt, self.texts, self.chooser = target, drafter, prompt, texts, chooser
        self.draft, self.model = drafter.draft, target.model
        self.kept: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in texts.new] for name in keep}
        self.hidden, self.end = prompt.hidden, prompt.end
        self.start = torch.full((len(texts.new),), prompt.width - 1, device=prompt.device)  # [B], of each row's anchor
        self.anchor = prompt.input_ids[:, -1:]  # [B, 1], each row's last token
        self.active = torch.ones_like(self.start)  # [B], 0 where the text has ended

    @property
    def columns(self) -> list[int]:
        """The column of each row's last token, as far as it is committed."""
        return [self.prompt.width + len(new) - 1 for new in self.texts.new]

    def prefill(self) -> None:
        """The prompt through the target, its context features through the draft, and the first token of each row."""
        done = take_over(self.prompt.cache, self.target, self.drafter)
        for first, last in self.prompt.chunks(done, recurrent=bool(self.target.recurrence.states)):
            checks = self.unchecked and first == 0 and can_check(self.prompt, last, self.drafter.size)
            logits = self._prompt_logits(first, last, self.drafter.size if checks else 1)
            features = self.target.taps.take()
            if checks:
                check_prompt(self.target, self.prompt, Answer(logits, features))
                self.has_checked = True
            self.drafter.absorb(features, first)
        choices = self.choose(Proposal(self.anchor), logits[:, -1:].to(self.start.device))
        self._commit(choices, torch.zeros_like(self.start))

    def _prompt_logits(self, first: int, last: int, wanted: int) -> torch.Tensor:
        """`[B, N, V]`: of the last of the prompt's columns `first` to `last`, given those before.

        N is `wanted` where they are the first columns, and 1 elsewhere.
        """
        if first == 0:
            return self.target.begin(self.prompt.model_inputs(self.model, last), wanted)
        columns = torch.arange(first, last, device=self.prompt.device).expand(len(self.start), -1)
        positions = self.prompt.positions[..., first:last]
        return self.target.go_on(self.prompt.ids(first, last), columns, positions, self.hidden)[:, None]

    def propose(self) -> Proposal:
        """A chain: the anchor and the draft's tokens after it."""
        columns, size = self.columns, self.drafter.size
        logits = self.drafter.propose(self.anchor, self.start, max(columns) + size)
        tokens = self.chooser.draft(logits, [range(column + 1, column + size) for column in columns], self.drafter.pick)
        return Proposal(torch.cat([self.anchor, tokens], dim=1))

    def verify(self, proposal: Proposal) -> torch.Tensor:
        """The target's logits after each position of the proposal, `[B, Q, V]`."""
        size = proposal.tokens.shape[1]
        if proposal.parents is not None and self.target.recurrence.states:
            raise ValueError(
                f"{type(self.model).__name__} keeps recurrent state, which branches of a tree cannot share."
            )
        self.target.cache.reserve(max(self.columns) + size)
        self.hidden = widen(self.hidden, self.target.cache.capacity)
        masks = self.target.masks
        if masks is None or masks.hidden is not self.hidden or masks.size != size:
            masks = Masks(self.hidden, self.start, size)
        tree = masks.chain if proposal.parents is None else ancestors(proposal.parents).to(self.start.device)
        return self.target.verify(proposal.tokens, self.start, masks, tree, self.end).to(self.start.device)

    def choose(self, proposal: Proposal, logits: torch.Tensor) -> torch.Tensor:
        """The target's own token after each position of the proposal, `[B, Q]`; -1 where its logits are NaN."""
        depths = proposal.depths
        prefixes = self.texts.prefixes(proposal.tokens, proposal.ways) if self.chooser.reads_text else None
        scores = self.chooser.scores(logits, prefixes)
        self.block = {"scores": scores, "logits": logits}
        return self.chooser.choose(scores, [[column + depth + 1 for depth in depths] for column in self.columns])

    def commit(
        self, proposal: Proposal, choices: torch.Tensor, accepted: torch.Tensor, way: torch.Tensor
    ) -> list[tuple[int, int]]:
        """Make the choices along the way final, and leave every state as if nothing else had been in the block.

        Returns:
            For each row, how many drafted tokens were accepted and how many tokens the text kept.
        """
        start, features = self.start, self.target.features
        if proposal.parents is not None:
            choices = choices.gather(1, way)
            self.block = {name: along(values, way) for name, values in self.block.items()}
            features = along(features, way.to(features.device))
            self.target.cache.move(start[:, None] + way, start[:, None] + self.target.masks.steps)
        self.drafter.feed(features, start)
        counts = self._commit(choices, accepted)
        self.target.recurrence.settle([kept for _, kept in counts], way.shape[1])
        return counts

    def _commit(self, choices: torch.Tensor, accepted: torch.Tensor) -> list[tuple[int, int]]:
        """The first `accepted [B]` + 1 of `choices [B, Q]` to each row's text, and every row to its new anchor."""
        told = torch.cat([choices, accepted[:, None]], dim=1).tolist()  # the cycle's one transfer to the host
        tokens = [row[: row[-1] + 1] for row in told]
        if any(token < 0 for row, on in zip(tokens, self.texts.active, strict=True) if on for token in row):
            raise ValueError(
                f"The logits of {type(self.model).__name__} are NaN, so no token can be chosen: it may overflow in "
                f"{self.model.dtype}, or its weights are broken."
            )
        kept = self.texts.commit(tokens)
        for name, lines in self.kept.items():
            for row, count in enumerate(kept):
                lines[row].extend(self.block[name][row, :count].clone().unbind())
        steps = (accepted + 1) * self.active
        if self.texts.changed:  # a row that ends stays at its last token; what it is given from now on is not its text
            steps = torch.tensor(kept, device=steps.device)
            self.active = torch.tensor(self.texts.active, device=steps.device).long()
        self.start = self.start + steps
        self.anchor = torch.where(steps[:, None] > 0, choices.gather(1, (steps[:, None] - 1).clamp_min(0)), self.anchor)
        return [(row[-1], count) for row, count in zip(told, kept, strict=True)]

    def every_step(self, name: str) -> tuple[torch.Tensor, ...] | None:
        """What was kept, `[B, V]` for each new column; zeros where a row had ended."""
        if name not in self.kept:
            return None
        lines = self.kept[name]
        longest = max(lines, key=len)
        return tuple(
            torch.stack([line[step] if step < len(line) else torch.zeros_like(longest[step]) for line in lines])
            for step in range(min(len(longest), self.texts.longest))
        )


def along(values: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """`values [B, Q, D]` in the order of `way [B, Q]`."""
    return values.gather(1, way[..., None].expand_as(values))
