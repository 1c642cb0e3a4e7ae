# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute what the heads of a draft contribute to the loss, beside its layers: corrections, a selector, confidences.

The tokens before a position are those of the text.

Shapes: B rows, A anchors of a row, Q block positions, T of those that predict a token, N positions with a loss, n those
of a chunk, H hidden size, V vocabulary, R width of a head, k selector_top_k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .blocks import Blocks
from .loss import Correction, HeadChunk, HeadLossInputs


@dataclass(frozen=True)
class HeadInputs:
    """Hold what a draft's heads contribute to the loss; None for what it has not.

    Args:
        correction: what is added to the draft's logits.
        further_head: of a head whose loss needs the draft's logits.
        confidence `[N]`: logits of the chance that each token is accepted.
    """

    correction: Correction | None = None
    further_head: HeadLossInputs | None = None
    confidence: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockStates:
    """Hold what the heads read: the draft's states of whole blocks.

    Args:
        states `[B * A, T, H]`: of the positions that predict a token.
        predecessors `[B * A, T]`: the tokens before the predicted ones.
        mask `[B * A, T]`: True at the N positions with a loss.
        embed: returns the embeddings of tokens, as they enter a block.
        base_share: share of the loss that is of uncorrected logits, for a draft that begins with them.
    """

    states: torch.Tensor
    predecessors: torch.Tensor
    mask: torch.Tensor
    embed: Callable[[torch.Tensor], torch.Tensor]
    base_share: float

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        states: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        base_share: float,
    ) -> "BlockStates":
        """Cut the positions that predict nothing from `states [B, A * Q, H]`."""
        whole = states.reshape(-1, blocks.size, states.shape[-1])
        predecessors = blocks.predecessors.flatten(0, 1)
        mask = blocks.block_loss_mask.flatten(0, 1)
        first = blocks.first
        return cls(whole[:, first:], predecessors[:, first:], mask[:, first:], embed, base_share)


@dataclass(frozen=True)
class SelectorLossInputs:
    """Hold what a candidate selector is scored with: S(a, b) = U(b) + <A(a) * H(h), B(b)>.

    Here a is the token before in the text, b a candidate, h the draft's state, and U the draft's logits.

    Args:
        gates `[N, R]`: A(a) * H(h) for each position.
        codebook `[V, R]`: B.
        top_k: candidates at each position.
    """

    gates: torch.Tensor
    codebook: torch.Tensor
    top_k: int

    def head_chunk(
        self, logits: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor
    ) -> HeadChunk:
        """Return the cross-entropy over the candidates, the best k tokens of `logits [n, V]`.

        The loss is 0 where the token of the text is not a candidate.

        Example: labels 7 and 5, candidates [[4, 7], [2, 9]], scores [[1.0, 3.0], [2.0, 0.5]]. The first position
        chooses the candidate 7, which is correct, with a loss of 0.127. The second has no loss and is not correct.

        Args:
            gates `[n, R]`: those of the chunk.
            labels `[n]`: the tokens of the text.
        """
        unary, candidates = logits[:, : len(self.codebook)].topk(self.top_k)  # [n, k]
        rows = self.codebook.detach()[candidates.flatten()].float().requires_grad_()  # [n * k, R]
        scores = unary + (rows.view(*candidates.shape, -1) @ gates[..., None])[..., 0]  # [n, k]
        is_label = candidates == labels[:, None]  # [n, k]
        is_candidate = is_label.any(-1)
        correct = is_label.gather(-1, scores.detach().argmax(-1, keepdim=True))[:, 0]
        losses = cross_entropy(scores, is_label.int().argmax(-1), reduction="none") * is_candidate
        return HeadChunk(losses, correct, is_candidate, candidates.flatten(), rows)


def selector_inputs(draft: Any, block: BlockStates) -> HeadInputs:
    """Return what `draft.candidate_selector` contributes."""
    selector = draft.candidate_selector
    states = block.states[block.mask].to(selector.hidden_projection.weight.dtype)
    gates = selector.gates(states, block.predecessors[block.mask][:, None])[:, 0]
    selected = SelectorLossInputs(gates, selector.successor_codebook, selector.top_k)
    return HeadInputs(further_head=selected)


def markov_inputs(draft: Any, block: BlockStates) -> HeadInputs:
    """Return what `draft.markov_head`, a bias by the token before, and `draft.confidence_head` contribute."""
    head = draft.markov_head
    states = block.states.to(next(draft.parameters()).dtype)
    correction = None
    if head is not None:
        gates = head.mixed(states, block.predecessors)[block.mask]
        correction = Correction(gates, head.markov_w2.weight)
    confidence = draft.confidence_logits(states, block.predecessors)
    if confidence is not None:
        confidence = confidence[block.mask]
    return HeadInputs(correction, confidence=confidence)


def prefix_inputs(draft: Any, block: BlockStates) -> HeadInputs:
    """Return what `draft.embed_proj`, a correction by all tokens before in the block, contributes."""
    expand = draft.embed_proj[2]
    states = block.states.to(expand.weight.dtype)
    gates = draft.correction_features(states, draft.prefixes(block.predecessors, block.embed))
    corrected = (
        torch.arange(gates.shape[1], device=gates.device) >= draft.config.pure_draft_prefix_len
    )
    gates = (gates * corrected[:, None])[block.mask]
    return HeadInputs(Correction(gates, expand.weight, block.base_share))


def confidence_loss(
    confidence: torch.Tensor, overlap: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of the binary cross-entropies of `confidence [N]`, logits, to `overlap [N]`, chances."""
    losses = binary_cross_entropy_with_logits(confidence.float(), overlap, reduction="none")
    return (losses * weights).sum()


HEADS: dict[str, Callable[[Any, BlockStates], HeadInputs]] = {
    "selector": selector_inputs,
    "markov": markov_inputs,
    "prefix": prefix_inputs,
}
"""Functions that return what a draft's heads contribute, by the name of the head in the table of kinds."""
