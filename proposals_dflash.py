# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Proposals: trees of drafted tokens, what proposes them, and which of their tokens the target accepts.

This file travels with every pushed draft. Acceptance is by *match* and a pure function of tensors; see
`sampling_dflash` for why that is exact.

Shapes: B rows, Q block positions, N new positions, F taps * target hidden size.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from .drafter_dflash import Choice, Drafter, DraftOutput, DraftState
from .sampling_dflash import Sampler
from .trees_dflash import Tree


@dataclass
class Proposal:
    """For each row, a tree of tokens whose root is the anchor.

    Args:
        tokens `[B, Q]`: the anchor first.
        parents `[B, Q]`: for each position the one before it, -1 for the root. Parents come before their children. None
            for a chain, where they are -1, 0, 1, 2 ...
        confidence `[B, Q - 1]`: the chance that each drafted token is accepted if those before it are; None if unknown.
        max_depth: no position is further from the root; None if unknown.
        kind: what it is called in statistics; by default a chain or a tree.
        reason: why it was chosen, for statistics.
    """

    tokens: torch.Tensor
    parents: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    max_depth: int | None = None
    kind: str = ""
    reason: str = ""

    def with_root(self, anchor: torch.Tensor) -> "Proposal":
        """Return the proposal with `anchor [B, 1]` as its root, whatever the proposer put there."""
        tokens = torch.cat([anchor, self.tokens[:, 1:]], dim=1)
        return replace(self, tokens=tokens)

    @property
    def label(self) -> str:
        """Its kind and the positions after the anchor, such as "tree of 15"."""
        kind = self.kind or ("chain" if self.parents is None else "tree")
        return f"{kind} of {self.size - 1}" if self.size > 1 else "plain"

    @property
    def size(self) -> int:
        """Q."""
        return self.tokens.shape[1]

    @cached_property
    def ancestors(self) -> torch.Tensor | None:
        """`[B, Q, Q]`, as `ancestors` returns it; None for a chain."""
        if self.parents is None:
            return None
        return ancestors(self.parents.to(self.tokens.device), self.max_depth)

    @cached_property
    def depths(self) -> torch.Tensor | None:
        """How far each position is from the root, `[B, Q]`; None for a chain, where they are 0, 1, 2 ..."""
        return None if self.ancestors is None else self.ancestors.sum(-1) - 1


def check_proposal(proposal: Any, anchor: torch.Tensor) -> Proposal:
    """Check the form of what a proposer returned, for the rows of `anchor [B, 1]`; its values are not read.

    Raises:
        ValueError: saying what it is, and what is expected.
    """
    tokens, rows = getattr(proposal, "tokens", None), len(anchor)
    expected = f"a Proposal with token ids [{rows}, Q], and parents of that shape or None"
    if not isinstance(proposal, Proposal) or not isinstance(tokens, torch.Tensor):
        raise ValueError(
            f"The proposer returned {type(proposal).__name__}; it must return {expected}."
        )
    for name, value in (("tokens", tokens), ("parents", proposal.parents)):
        if value is None:
            continue
        shape = tuple(value.shape)
        fits = value.ndim == 2 and shape == (rows, tokens.shape[-1])
        if not fits or value.is_floating_point():
            raise ValueError(
                f"The proposer returned {name} of shape {shape} and {value.dtype}; it must return "
                f"{expected}."
            )
    return proposal


def ancestors(parents: torch.Tensor, max_depth: int | None = None) -> torch.Tensor:
    """Tell which positions lie on the path from the root to each position of a tree, both included.

    Example: parents -1, 0, 0, 1. The root has two children, and the first of them has one. The rows are
    [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1].

    Args:
        parents `[B, Q]`: as in `Proposal`.
        max_depth: no position is further from the root; None if unknown.

    Returns:
        `[B, Q, Q]`: True where the second position is on the path to the first.
    """
    size = parents.shape[1]
    itself = torch.eye(size, device=parents.device)
    # [B, Q, Q], at most one up.
    positions = torch.arange(size, device=parents.device)
    steps = itself + (parents[..., None] == positions)
    reach = 1
    # Each round doubles how far up a position looks, without asking the host for anything.
    furthest = size - 1 if max_depth is None else min(max_depth, size - 1)
    while reach < furthest:
        steps = ((steps @ steps) > 0).float()
        reach = 2 * reach
    return steps > 0


def paths(parents: torch.Tensor) -> list[list[list[int]]]:
    """Return, for each row and position, the positions from the root to it. This reads `parents [B, Q]` on the host.

    For the parents -1, 0, 0, 1 these are [0], [0, 1], [0, 2] and [0, 1, 3].
    """
    found = []
    for row in parents.tolist():
        row_paths: list[list[int]] = []
        for position, parent in enumerate(row):
            before = row_paths[parent] if parent >= 0 else []
            row_paths.append([*before, position])
        found.append(row_paths)
    return found


def accept(proposal: Proposal, target_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept the drafted tokens on the path that is the target's own choice all along.

    For the chain 7, 1, 2, 3 and the target tokens 1, 2, 9, 4 two are accepted: 1 and 2 are what the target wrote after
    7 and 1. What it wrote after 2 is 9, which ends the cycle. Committed are 1, 2, 9.

    Args:
        target_tokens `[B, Q]`: the target's token after each position of the proposal.

    Returns:
        How many drafted tokens are accepted, `[B]`; and the path, `[B, Q]`: positions of the proposal from the root on,
        of which the first `1 + accepted` count. The tokens to commit are the target's along the path.
    """
    tokens = proposal.tokens
    size = proposal.size
    lineage = proposal.ancestors
    depths = proposal.depths
    positions = torch.arange(size, device=tokens.device)
    if proposal.parents is None or lineage is None or depths is None:
        matches = tokens[:, 1:] == target_tokens[:, :-1]
        accepted = matches.cumprod(dim=1).sum(dim=1)
        return accepted, positions.expand_as(tokens)
    parents = proposal.parents.to(tokens.device)
    wanted = target_tokens.gather(1, parents.clamp_min(0))
    matches = (tokens == wanted) | (parents < 0)  # [B, Q]
    stays = (matches[:, None] | ~lineage).all(dim=-1)
    # [B, 1], the deepest that stays.
    tip = torch.where(stays, depths, -1).argmax(dim=-1, keepdim=True)
    index = tip[..., None].expand(-1, 1, size)
    on_path = lineage.gather(1, index)[:, 0]  # [B, Q]
    path = torch.where(on_path, positions, size).sort().values
    accepted = depths.gather(1, tip)[:, 0]
    return accepted, path.clamp_max(size - 1)


class Proposer(Protocol):
    """What proposes tokens. `decode` calls `propose` and `commit` in turn; the prefill calls `append_context`."""

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        """Take the context features `[B, N, F]` of the prompt's slots from `first_slot` on, the same in every row."""

    def propose(self, state: Any) -> Proposal:
        """Return a proposal for every row of a `DecodeState`, finished ones too.

        `state.anchor [B, 1]` is each row's last token, at the slot `state.slots [B]`; `state.sequences.text(row)` are
        the ids so far, to read only. Another first token than the anchor is replaced by it.
        """

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take the context features `[B, Q, F]` of the verified block, whose anchor is at `slots [B]`.

        Those of accepted tokens come first, those of rejected ones follow. How many were accepted shows in
        `state.last_slots` at the next `propose`.
        """


class PlainProposer:
    """Proposes nothing but the anchor: every cycle is a step of plain decoding."""

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        """Take nothing: there is no draft to read it."""

    def propose(self, state: Any) -> Proposal:
        return Proposal(state.anchor)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take nothing: there is no draft to read it."""


class ChainProposer:
    """Proposes the draft's block as a chain.

    Args:
        draft_state: what the draft holds of this decode.
        sampler: with whose noise the draft draws, where it is coupled.
        width: tokens of it that are proposed at most; None for all.
    """

    def __init__(
        self,
        drafter: Drafter,
        draft_state: DraftState,
        sampler: Sampler,
        width: int | None = None,
    ):
        self.drafter, self.draft_state = drafter, draft_state
        self.sampler, self.width = sampler, width

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        self.drafter.cache_context(self.draft_state, features, first_slot)

    def draft(self, state: Any) -> DraftOutput:
        """Run the draft's block after each row's anchor."""
        num_slots = max(state.last_slots) + self.drafter.size
        return self.drafter.draft_block(self.draft_state, state.anchor, state.slots, num_slots)

    def propose(self, state: Any) -> Proposal:
        """Return the anchor and the draft's tokens after it."""
        output = self.draft(state)
        choice = Choice(output.tokens, output.confidence)
        if self.sampler.coupled:
            scores, pair_scale = self.sampler.draft_scores(output.logits, state.next_slots)
            choice = self.drafter.choose(scores, output, state.anchor, pair_scale)
        drafted, confidence = choice.tokens, choice.confidence
        if self.width is not None:
            drafted = drafted[:, : self.width]
            confidence = None if confidence is None else confidence[:, : self.width]
        if confidence is not None:
            confidence = (
                confidence.clone()
            )  # a recorded block writes it again, and proposals may be held
        tokens = torch.cat([state.anchor, drafted], dim=1)
        return Proposal(tokens, confidence=confidence)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        self.drafter.add_pending(self.draft_state, features, slots)


def tree_proposal(anchor: torch.Tensor, tree: Tree, size: int) -> Proposal:
    """Return `anchor [B, 1]` and the first `size` nodes of a tree after it."""
    tokens, parents = rooted(anchor, tree, size)
    return Proposal(tokens, parents, max_depth=tree.spine_tokens.shape[1])


def rooted(anchor: torch.Tensor, tree: Tree, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and parents `[B, 1 + size]` of `anchor [B, 1]` and the first `size` nodes of a tree."""
    device = anchor.device
    root = torch.full_like(anchor, -1)
    tokens = torch.cat([anchor, tree.tokens[:, :size].to(device)], dim=1)
    parents = torch.cat([root, tree.parents[:, :size].to(device)], dim=1)
    return tokens, parents


class TreeProposer(ChainProposer):
    """Proposes the tree of the texts that the draft holds likeliest.

    Args:
        num_nodes: of the tree, without its root.
    """

    def __init__(self, drafter: Drafter, draft_state: DraftState, sampler: Sampler, num_nodes: int):
        super().__init__(drafter, draft_state, sampler)
        self.num_nodes = num_nodes
        if not sampler.coupled:
            draft_state.num_nodes = num_nodes

    def propose(self, state: Any) -> Proposal:
        """Return the anchor and the nodes after it, the likeliest first.

        Branches cannot share a recurrent state, so such a target gets the chain.
        """
        if state.target_state.recurrent.states:
            self.draft_state.num_nodes = 0
            return super().propose(state)
        return tree_proposal(state.anchor, self.grow(state), self.num_nodes)

    def grow(self, state: Any) -> Tree:
        """Return the tree after each row's anchor."""
        output = self.draft(state)
        if output.tree is not None:
            return output.tree
        scores, pair_scale = self.sampler.draft_scores(output.logits, state.next_slots)
        return self.drafter.grow(scores, output, state.anchor, pair_scale, self.num_nodes)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take the features of the accepted path, which is no longer than the draft's block."""
        super().commit(features[:, : self.drafter.verified_size], slots)
