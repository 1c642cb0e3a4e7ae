# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decide which tokens of a verified block become text, by processors and stopping criteria.

This file travels with every pushed draft. There are two ways to the same text:

- **By block** (`BlockAcceptance`). transformers' own processors and criteria are functions of the text and the scores.
  So all positions of a block are processed at once, those of rejected tokens too.
- **Step by step** (`StepwiseAcceptance`). Any other object may keep state, count its calls, or read what it gets.
  It is called exactly as plain `generate` calls it: once for each committed token, in order, with the whole batch.

Shapes: B rows, Q block positions, T slots so far, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .proposals_dflash import Proposal, accept, paths
from .sampling_dflash import Sampler, is_pure_processor
from .sequences_dflash import is_pure_criterion
from .target_dflash import gather_path


@dataclass
class Accepted:
    """Hold what a cycle added to the text.

    Args:
        tokens `[B, Q]`: the target's own, along the path.
        path `[B, Q]`: positions of the proposal from the root on. Of both, the first `1 + drafted` count.
        drafted `[B]`: drafted tokens that were accepted.
        counts: for each row, drafted tokens accepted and tokens committed, on the host.
        ended: for each row, whether it had ended before and only goes on with padding.
        in_place: whether all accepted tokens are at the front of their block, in order, as those of a chain are.
    """

    tokens: torch.Tensor
    path: torch.Tensor
    drafted: torch.Tensor
    counts: list[tuple[int, int]]
    ended: list[bool]
    in_place: bool = False

    @property
    def committed(self) -> list[int]:
        """For each row, tokens committed, padding included."""
        return [committed for _, committed in self.counts]

    @property
    def written(self) -> list[tuple[int, int]]:
        """The counts, with 0 committed in rows that only go on with padding."""
        written = []
        for (drafted, committed), ended in zip(self.counts, self.ended, strict=True):
            written.append((drafted, 0 if ended else committed))
        return written


class Acceptance(Protocol):
    """Make text of a verified block."""

    sampler: Sampler
    reasons: list[str]
    """Why tokens are accepted step by step, see `DecodeStatistics.stepwise`; empty by block."""

    @property
    def input_ids(self) -> torch.Tensor | None:
        """`[B, T]`, the text as processors and criteria left it, who may write into it; None by block."""

    def complete(self, proposal: Proposal) -> Proposal:
        """Return the proposal to verify."""

    def accept(self, state: Any, proposal: Proposal, logits: torch.Tensor) -> Accepted:
        """Append what the target chooses to the text of a `DecodeState`.

        Args:
            logits `[B, Q, V]`: the target's, for the positions of the proposal.
        """


class BlockAcceptance:
    """Accept the longest path that matches, after all positions were processed and sampled at once."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.input_ids: torch.Tensor | None = None
        self.reasons: list[str] = []

    def complete(self, proposal: Proposal) -> Proposal:
        return proposal

    def accept(self, state: Any, proposal: Proposal, logits: torch.Tensor) -> Accepted:
        prefixes = self._prefixes(state, proposal)
        shape = (proposal.depths, prefixes, proposal.max_depth)
        tokens, scores = self.sampler.sample(logits, state.next_slots, *shape)
        drafted, path = accept(proposal, tokens)
        if proposal.parents is not None:
            tokens = tokens.gather(1, path)
            scores, logits = gather_path(scores, path), gather_path(logits, path)
        parts = [tokens, drafted[:, None]]
        if proposal.parents is not None:
            # The last accepted position of a path 0, 1, 2 ... is as far as it is deep.
            parts.append(path.gather(1, drafted[:, None]))
        # The cycle's one transfer to the host.
        cycle = torch.cat(parts, dim=1).tolist()
        size = proposal.size
        in_place = all(row[-1] == row[size] for row in cycle)
        ended = [not active for active in state.sequences.active]
        new_tokens = [row[: row[size] + 1] for row in cycle]
        committed = state.append_tokens(new_tokens)
        state.step_outputs.collect(scores, logits, committed)
        counts = []
        for row, count in zip(cycle, committed, strict=True):
            counts.append((row[size], count))
        return Accepted(tokens, path, drafted, counts, ended, in_place)

    def _prefixes(self, state: Any, proposal: Proposal) -> list[list[torch.Tensor]] | None:
        """Return, for each row and position, the ids `[T]` up to and with it; None if no processor reads them."""
        if not self.sampler.reads_text:
            return None
        if proposal.parents is None:
            return state.sequences.chain_prefixes(proposal.tokens)
        return state.sequences.tree_prefixes(proposal.tokens, paths(proposal.parents))


class StepwiseAcceptance:
    """Accept one token of every row after the other, up to the first that some row's proposal does not have.

    So in a batch all rows commit equally many tokens in a cycle. A row that has ended goes on with padding, as in plain
    `generate`, since the scores of its padding are among what processors see.

    Args:
        sampler: its processors are called here.
        criteria: all that `generate` prepared.
        input_ids `[B, P]`: the prompt.
        pad_token_id: of the padding; None where rows go on with tokens of their own until all have ended.
        reasons: why tokens are accepted step by step.
    """

    def __init__(
        self,
        sampler: Sampler,
        criteria: StoppingCriteriaList,
        input_ids: torch.Tensor,
        pad_token_id: int | None,
        reasons: list[str],
    ):
        self.sampler, self.criteria = sampler, criteria
        self.reasons = reasons
        self.input_ids: torch.Tensor = input_ids
        """`[B, T]`, the text so far. A new tensor at each step, since processors may store it."""
        self.pad_token_id = pad_token_id
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        """`[B]`, 1, or 0 where a row has ended. Integers, since a criterion may return any number, as to `generate`."""

    def complete(self, proposal: Proposal) -> Proposal:
        """Return the proposal with padding in rows that have ended, where nothing else can follow."""
        if self.pad_token_id is None:
            return proposal
        unfinished = self.unfinished.to(proposal.tokens.device)[:, None] != 0
        tokens = torch.where(unfinished, proposal.tokens, self.pad_token_id)
        return replace(proposal, tokens=tokens)

    def accept(self, state: Any, proposal: Proposal, logits: torch.Tensor) -> Accepted:
        ended = [False] * len(logits)
        if self.pad_token_id is not None:
            ended = (self.unfinished == 0).tolist()
        rows = torch.arange(len(logits), device=logits.device)
        position = torch.zeros_like(rows)
        tokens, path = [], [position]
        while True:
            tokens.append(self._step(state, logits[rows, position]))
            position = child(proposal, position, tokens[-1].to(position.device))
            if state.sequences.finished or bool((position < 0).any()):
                break
            path.append(position)
        committed = len(tokens)
        drafted = torch.full_like(rows, committed - 1)
        counts = [(committed - 1, committed)] * len(logits)
        return Accepted(
            _fill(tokens, proposal.size), _fill(path, proposal.size), drafted, counts, ended
        )

    def _step(self, state: Any, logits: torch.Tensor) -> torch.Tensor:
        """Choose and append the next token of every row, `[B]`, as one step of plain `generate` does.

        Args:
            logits `[B, V]`: the target's. They are copied, since processors may write into them.
        """
        step_logits = logits.to(self.input_ids.device, torch.float32, copy=True)
        scores = self.sampler.processors(self.input_ids, step_logits)
        tokens = self._choose(state, scores, logits)
        if self.pad_token_id is not None:
            tokens = tokens * self.unfinished + self.pad_token_id * (1 - self.unfinished)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        state.step_outputs.collect_step(scores, step_logits)
        ended = self.criteria(self.input_ids, state.step_outputs.steps("scores"))
        self.unfinished = self.unfinished & ~ended
        tokens = self.input_ids[:, -1].clone()  # a criterion may have written another there
        state.append_tokens(tokens[:, None].tolist())
        if not bool(self.unfinished.any()):
            state.sequences.end()
        return tokens

    def _choose(self, state: Any, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Draw a token `[B]` from each row of `scores [B, V]`; greedily also past a processor's NaN, as `generate`."""
        drawn = self.sampler.draw(scores[:, None], state.next_slots)
        tokens = drawn[:, 0]
        if (
            self.sampler.noise is None
            and bool((tokens < 0).any())
            and not bool(logits.isnan().any())
        ):
            tokens = scores.argmax(dim=-1)
        return tokens


def child(proposal: Proposal, position: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the position that follows `position [B]` in each row with the token `tokens [B]`: `[B]`, -1 for none.

    In the chain 7, 1, 2 position 1 follows position 0 with the token 1, and nothing follows it with the token 9.
    """
    parents = proposal.parents
    if parents is None:
        parents = torch.arange(-1, proposal.size - 1, device=position.device)[None]
    follows = (parents.to(position.device) == position[:, None]) & (
        proposal.tokens.to(position.device) == tokens[:, None]
    )  # [B, Q]
    found = follows.int().argmax(dim=1)
    return torch.where(follows.any(dim=1), found, -1)


def _fill(columns: list[torch.Tensor], size: int) -> torch.Tensor:
    """Stack `columns` of `[B]` into `[B, size]`; the last one fills what is left, which does not count."""
    missing = size - len(columns)
    return torch.stack([*columns, *(columns[-1:] * missing)], dim=1)


def foreign_objects(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> list[str]:
    """Return the class names of all objects that are not known to be functions of the text and the scores."""
    found = [one for one in processors if not is_pure_processor(one)]
    found += [one for one in criteria if not is_pure_criterion(one)]
    return [type(one).__name__ for one in found]
