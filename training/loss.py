# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the loss without the logits of all positions at once.

The target's head is frozen. So the gradient of a chunk of states is known as soon as the chunk's logits are. It is
taken in the forward, and the logits are freed before the next chunk's are made. The head is called as a module,
so any kind of head works.

Shapes: N positions with a loss, n those of a chunk, H hidden size, V vocabulary, R width of a further head, m rows of
its codebook.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in float32, and their gradient."""


@dataclass(frozen=True)
class HeadChunk:
    """Hold what a further head of the draft computes for a chunk.

    Args:
        losses `[n]`: added to those of the draft's logits.
        correct `[n]`: whether the head chooses the token of the text.
        is_candidate `[n]`: whether the token of the text is among those that the head chooses from.
        row_ids `[m]`: rows of the codebook that were used. The gradient of all other rows is zero.
        rows `[m, R]`: those rows as a leaf, whose gradient is taken.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    is_candidate: torch.Tensor
    row_ids: torch.Tensor
    rows: torch.Tensor


class HeadLossInputs(Protocol):
    """Describe the inputs of a further head's loss.

    Gradients flow through `gates [N, R]`, one for each position, into whatever they were made from; and into
    `codebook [V, R]`, a parameter with a row for each token.
    """

    @property
    def gates(self) -> torch.Tensor: ...

    @property
    def codebook(self) -> torch.Tensor: ...

    def head_chunk(
        self, logits: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor
    ) -> HeadChunk:
        """Score a chunk, given the draft's `logits [n, V]`, `gates [n, R]` and `labels [n]`."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """Hold what the draft's states are scored against.

    Args:
        head: states `[n, H]` to logits `[n, V]`.
        labels `[N]`: the tokens of the text.
        weights `[N]`: the weight of each position in the sum.
        target_logits: a slice of the positions to the target's own logits `[n, V]`; None without distillation.
        distillation: share of the forward Kullback-Leibler divergence from the target's distribution in the loss; the
            rest is cross-entropy.
        further_head: inputs of the loss of a further head; None for a draft that has none.
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    target_logits: Callable[[slice], torch.Tensor] | None = None
    distillation: float = 0.0
    further_head: HeadLossInputs | None = None


@dataclass(frozen=True)
class Loss:
    """Hold the loss of some positions.

    Args:
        total: the weighted sum of losses, a float32 scalar.
        correct `[n]`: whether the draft proposes the token of the text, given the tokens before it in the text.
        is_candidate `[n]`: whether the token of the text is a candidate of the further head; False without one.
    """

    total: torch.Tensor
    correct: torch.Tensor
    is_candidate: torch.Tensor


def chunk_loss(
    inputs: LossInputs, states: torch.Tensor, part: slice, gates: torch.Tensor | None = None
) -> tuple[Loss, HeadChunk | None]:
    """Compute the loss of `states [n, H]`, and what the further head computed for it.

    Args:
        part: which of the N positions these are.
        gates `[n, R]`: those of the further head, where the draft has one.
    """
    labels, weights = inputs.labels[part], inputs.weights[part]
    logits = inputs.head(states).float()
    losses = _draft_losses(inputs, logits, part)
    if inputs.further_head is None or gates is None:
        correct = logits.detach().argmax(-1) == labels
        return Loss((losses * weights).sum(), correct, torch.zeros_like(correct)), None
    chunk = inputs.further_head.head_chunk(logits, gates, labels)
    total = ((losses + chunk.losses) * weights).sum()
    return Loss(total, chunk.correct, chunk.is_candidate), chunk


def _draft_losses(inputs: LossInputs, logits: torch.Tensor, part: slice) -> torch.Tensor:
    """Return `[n]`, for `logits [n, V]`: cross-entropy, divergence from the target, or a mixture of both."""
    labels = inputs.labels[part]
    if inputs.target_logits is None:
        return cross_entropy(logits, labels, reduction="none")
    target = log_softmax(inputs.target_logits(part).float(), dim=-1)
    divergence = kl_div(log_softmax(logits, dim=-1), target, reduction="none", log_target=True).sum(
        -1
    )
    if inputs.distillation == 1:
        return divergence
    losses = cross_entropy(logits, labels, reduction="none")
    return (1 - inputs.distillation) * losses + inputs.distillation * divergence


class _InChunks(torch.autograd.Function):
    """Sum the loss over chunks; the gradient of each chunk is taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, size: int, states: torch.Tensor, *head: torch.Tensor
    ) -> tuple:
        """Return the total, `correct [N]` and `is_candidate [N]`.

        Args:
            size: positions of a chunk.
            states `[N, H]`: of the draft.
            head: gates `[N, R]` and codebook `[V, R]` of the further head; empty without one.
        """
        needs_grad, by_position = ctx.needs_input_grad[2], (states, *head[:1])
        gradients = []
        if needs_grad:
            gradients = [
                torch.zeros_like(tensor, dtype=torch.float32) for tensor in (states, *head)
            ]
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        correct = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        is_candidate = torch.zeros_like(correct)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            leaves = [tensor[part].detach().requires_grad_(needs_grad) for tensor in by_position]
            with torch.set_grad_enabled(needs_grad):
                loss, chunk = chunk_loss(inputs, leaves[0], part, *leaves[1:])
            total += loss.total.detach()
            correct[part], is_candidate[part] = loss.correct, loss.is_candidate
            if needs_grad:
                _add_gradients(gradients, part, loss.total, leaves, chunk)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in (states, *head)]
        ctx.mark_non_differentiable(correct, is_candidate)
        return total, correct, is_candidate

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        """Scale the gradients that the forward took."""
        scaled = [gradient * outer[0] for gradient in ctx.saved_tensors]
        return None, None, *[one.to(dtype) for one, dtype in zip(scaled, ctx.dtypes, strict=True)]


def _add_gradients(
    gradients: list[torch.Tensor],
    part: slice,
    loss: torch.Tensor,
    leaves: list[torch.Tensor],
    chunk: HeadChunk | None,
) -> None:
    """Add the gradients of a chunk's `loss` to `gradients`, those of all positions.

    Args:
        part: the positions of the chunk.
        leaves: the states `[n, H]`, and the gates `[n, R]` where the draft has a further head.
        chunk: what that head computed.
    """
    rows = [] if chunk is None else [chunk.rows]
    found = torch.autograd.grad(loss, [*leaves, *rows])
    for whole, gradient in zip(gradients[: len(leaves)], found[: len(leaves)], strict=True):
        whole[part] = gradient
    if chunk is not None:
        gradients[-1].index_add_(0, chunk.row_ids, found[-1])


def weighted_loss(states: torch.Tensor, inputs: LossInputs, vocab_size: int) -> Loss:
    """Compute the loss of all positions in chunks.

    Args:
        states `[N, H]`: of the draft.
        vocab_size: V, from which the size of a chunk follows.
    """
    head = inputs.further_head
    tensors = () if head is None else (head.gates, head.codebook)
    return Loss(*_InChunks.apply(inputs, max(1, CHUNK_LOGITS // vocab_size), states, *tensors))
