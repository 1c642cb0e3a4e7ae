# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the losses of further heads that a draft may have beside its layers, such as a candidate selector.

Shapes: B rows, A anchors of a row, Q block positions, N positions with a loss, n those of a chunk, H hidden size,
V vocabulary, R selector_rank, k selector_top_k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .blocks import Blocks
from .loss import HeadChunk, HeadLossInputs


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


def selector_loss_inputs(draft: Any, blocks: Blocks, states: torch.Tensor) -> SelectorLossInputs:
    """Return the inputs of the loss of `draft.candidate_selector`, for the draft's `states [N, H]`."""
    selector = draft.candidate_selector
    before = blocks.tokens.roll(1, dims=-1)
    previous = before[blocks.block_loss_mask]  # [N], the token before each position
    states = states.to(selector.hidden_projection.weight.dtype)
    gates = selector.gates(states, previous[:, None])[:, 0]
    return SelectorLossInputs(gates, selector.successor_codebook, selector.top_k)


HEADS: dict[str, Callable[[Any, Blocks, torch.Tensor], HeadLossInputs]] = {
    "selector": selector_loss_inputs
}
"""Functions that return the inputs of a head's loss, by the name of the head in the table of kinds."""
