# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The loss, without the logits of all positions at once.

The target's head is frozen, so the gradient of a chunk of states is known as soon as the chunk's logits are: it is
taken in the forward, and the logits are gone before the next chunk's are made. The head is called as a module,
whatever it is made of.

Shapes: N counted positions, n those of a chunk, H hidden size, V vocabulary, R selector_rank, k selector_top_k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in float32, and their gradient."""


@dataclass
class Selection:
    """What a DFlash 2 draft's selector is scored with: S(a, b) = U(b) + <A(a) * H(h), B(b)>, a being the true token.

    Args:
        gates `[N, R]`: A(a) * H(h) for the token before each position in the text.
        codebook `[V, R]`: B.
        top_k: candidates at each position.
        weight: of the selector's cross-entropy beside the draft's.
    """

    gates: torch.Tensor
    codebook: torch.Tensor
    top_k: int
    weight: float

    def score(self, logits: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Scores `[n, k]` of the candidates, the best of `logits [n, V]`, given `gates [n, R]`.

        `candidates [n, k]` and their `rows [n, k, R]` of the codebook are kept: the gradient of all others is zero.
        """
        unary, self.candidates = logits[:, : len(self.codebook)].topk(self.top_k)
        self.rows = self.codebook.detach()[self.candidates].float().requires_grad_()
        return unary + (self.rows @ gates[..., None])[..., 0]


@dataclass
class Scores:
    """What the counted positions are scored against.

    Args:
        head: states `[n, H]` to logits `[n, V]`.
        labels `[N]`: the tokens of the text.
        weights `[N]`: of each position in the sum.
        teacher: for a slice of the positions, the target's own logits `[n, V]`; None without distillation.
        distillation: share of the forward Kullback-Leibler divergence from the target's distribution in the loss; the
            rest is cross-entropy.
        selection: for a DFlash 2 draft.
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    teacher: Callable[[slice], torch.Tensor] | None = None
    distillation: float = 0.0
    selection: Selection | None = None

    def __post_init__(self) -> None:
        self.correct = torch.zeros_like(self.labels, dtype=torch.bool)
        """`[N]`, whether the draft proposes the text's token where all before it was right; known once the loss is."""
        self.found = torch.zeros_like(self.correct)
        """`[N]`, whether the text's token is among the selector's candidates."""

    def chunk(self, states: torch.Tensor, part: slice, gates: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum of the losses of `states [n, H]`, which are those of `part`; `gates [n, R]` go with them."""
        logits = self.head(states).float()
        losses = self._likelihood(logits, part)
        if self.selection is None or gates is None:
            self.correct[part] = logits.detach().argmax(-1) == self.labels[part]
        else:
            losses = losses + self.selection.weight * self._selector(self.selection.score(logits, gates), part)
        return (losses * self.weights[part]).sum()

    def _likelihood(self, logits: torch.Tensor, part: slice) -> torch.Tensor | float:
        """`[n]`, of `logits [n, V]`: cross-entropy, divergence, or a mixture."""
        losses = cross_entropy(logits, self.labels[part], reduction="none") if self.distillation < 1 else 0.0
        if self.teacher is None:
            return losses
        own = log_softmax(self.teacher(part).float(), dim=-1)
        divergence = kl_div(log_softmax(logits, dim=-1), own, reduction="none", log_target=True).sum(-1)
        return (1 - self.distillation) * losses + self.distillation * divergence

    def _selector(self, scores: torch.Tensor, part: slice) -> torch.Tensor:
        """`[n]`: cross-entropy over candidates with `scores [n, k]`; 0 where the text's token is none of them."""
        right = self.selection.candidates == self.labels[part][:, None]  # type: ignore[union-attr]
        self.found[part] = right.any(-1)
        self.correct[part] = right.gather(-1, scores.detach().argmax(-1, keepdim=True))[:, 0]
        return cross_entropy(scores, right.int().argmax(-1), reduction="none") * self.found[part]


class _InChunks(torch.autograd.Function):
    """The sum over chunks, whose gradient is taken chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx: Any, scores: Scores, size: int, states: torch.Tensor, *selection: torch.Tensor) -> torch.Tensor:
        """`selection` is empty, or gates `[N, R]` and codebook `[V, R]`."""
        wanted, by_position = ctx.needs_input_grad[2], (states, *selection[:1])
        totals = [torch.zeros_like(one, dtype=torch.float32) for one in (states, *selection)] if wanted else []
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            leaves = [one[part].detach().requires_grad_(wanted) for one in by_position]
            with torch.set_grad_enabled(wanted):
                chunk = scores.chunk(leaves[0], part, *leaves[1:])
            loss += chunk.detach()
            if wanted:
                _add(totals, leaves, chunk, part, scores.selection)
        ctx.save_for_backward(*totals)
        ctx.dtypes = [one.dtype for one in (states, *selection)]
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        found = [(total * outer[0]).to(dtype) for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *found


def _add(totals: list, leaves: list, loss: torch.Tensor, part: slice, selection: Selection | None) -> None:
    """Add the gradients of a chunk's `loss` to `totals`, those of all positions."""
    rows = [] if selection is None else [selection.rows]
    gradients = torch.autograd.grad(loss, [*leaves, *rows])
    for total, gradient in zip(totals[: len(leaves)], gradients, strict=False):
        total[part] = gradient
    if selection is not None:
        totals[-1].index_add_(0, selection.candidates.flatten(), gradients[-1].flatten(0, -2))


def weighted_loss(states: torch.Tensor, scores: Scores, vocab_size: int) -> torch.Tensor:
    """The weighted sum of losses over `states [N, H]`, a float32 number; `scores.correct` is filled on the way."""
    selection = () if scores.selection is None else (scores.selection.gates, scores.selection.codebook)
    return _InChunks.apply(scores, max(1, CHUNK_LOGITS // vocab_size), states, *selection)
