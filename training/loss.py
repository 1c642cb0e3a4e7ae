# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the loss without the logits of all positions at once.

The target's head is frozen. So the gradient of a chunk of states is known as soon as the chunk's logits are. It is
taken in the forward, and the logits are freed before the next chunk's are made. The head is called as a module,
so any kind of head works. The loss of a further head has a total and a gradient of its own, since it is divided by
another sum of weights, which is known only after the last chunk.

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
        losses `[n]`: of the head; 0 where the token of the text is no candidate.
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
        total: the weighted sum of the losses of the draft's logits, a float32 scalar.
        head_total: the same of the further head's losses; 0 without one.
        correct `[n]`: whether the draft proposes the token of the text, given the tokens before it in the text.
        base_correct `[n]`: whether the draft's logits alone propose it.
        is_candidate `[n]`: whether the token of the text is a candidate of the further head; False without one.
    """

    total: torch.Tensor
    head_total: torch.Tensor
    correct: torch.Tensor
    base_correct: torch.Tensor
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
    total = (_draft_losses(inputs, logits, part) * weights).sum()
    base_correct = logits.detach().argmax(-1) == labels
    if inputs.further_head is None or gates is None:
        none = torch.zeros_like(base_correct)
        return Loss(total, torch.zeros_like(total), base_correct, base_correct, none), None
    chunk = inputs.further_head.head_chunk(logits, gates, labels)
    head_total = (chunk.losses * weights).sum()
    return Loss(total, head_total, chunk.correct, base_correct, chunk.is_candidate), chunk


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
    """Sum the losses over chunks; the gradients of each chunk are taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, size: int, states: torch.Tensor, *head: torch.Tensor
    ) -> tuple:
        """Return both totals, then `correct`, `base_correct` and `is_candidate`, each `[N]`.

        Args:
            size: positions of a chunk.
            states `[N, H]`: of the draft.
            head: gates `[N, R]` and codebook `[V, R]` of the further head; empty without one.
        """
        needs_grad, by_position = ctx.needs_input_grad[2], (states, *head[:1])
        gradients = _Gradients.zeros(states, head) if needs_grad else None
        totals = torch.zeros(2, dtype=torch.float32, device=states.device)
        flags = torch.zeros(3, len(states), dtype=torch.bool, device=states.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            leaves = [tensor[part].detach().requires_grad_(needs_grad) for tensor in by_position]
            with torch.set_grad_enabled(needs_grad):
                loss, chunk = chunk_loss(inputs, leaves[0], part, *leaves[1:])
            totals += torch.stack([loss.total, loss.head_total]).detach()
            flags[:, part] = torch.stack([loss.correct, loss.base_correct, loss.is_candidate])
            if gradients is not None:
                gradients.add(part, loss, leaves, chunk)
        ctx.save_for_backward(*([] if gradients is None else gradients.tensors()))
        ctx.dtypes = [tensor.dtype for tensor in (states, *head)]
        outputs = [*totals.clone().unbind(), *flags.clone().unbind()]
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        """Scale the gradients that the forward took by those of the two totals."""
        states, *of_head = ctx.saved_tensors
        found = [gradient * outer[1] for gradient in of_head]
        scaled = states * outer[0]
        if found:
            scaled = scaled + found[0]
        gradients = [scaled, *found[1:]]
        return (
            None,
            None,
            *[one.to(dtype) for one, dtype in zip(gradients, ctx.dtypes, strict=True)],
        )


@dataclass(frozen=True)
class _Gradients:
    """Hold the gradients of all positions in float32.

    Args:
        states `[N, H]`: of the total of the draft's logits.
        of_head: of the further head's total, by the states `[N, H]`, the gates `[N, R]` and the codebook `[V, R]`;
            empty without one.
    """

    states: torch.Tensor
    of_head: tuple[torch.Tensor, ...]

    @classmethod
    def zeros(cls, states: torch.Tensor, head: tuple[torch.Tensor, ...]) -> "_Gradients":
        """Return zeros for `states [N, H]`, and for the tensors of the further head where there is one."""
        zeros = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (states, *head)]
        return cls(torch.zeros_like(zeros[0]), tuple(zeros if head else ()))

    def tensors(self) -> list[torch.Tensor]:
        """Return all of them, the states' first."""
        return [self.states, *self.of_head]

    def add(
        self, part: slice, loss: Loss, leaves: list[torch.Tensor], chunk: HeadChunk | None
    ) -> None:
        """Add those of a chunk.

        Args:
            part: the positions of the chunk.
            leaves: the states `[n, H]`, and the gates `[n, R]` where the draft has a further head.
            chunk: what that head computed.
        """
        (self.states[part],) = torch.autograd.grad(
            loss.total, leaves[:1], retain_graph=chunk is not None
        )
        if chunk is None:
            return
        found = torch.autograd.grad(loss.head_total, [*leaves, chunk.rows])
        for whole, gradient in zip(self.of_head[:2], found[:2], strict=True):
            whole[part] = gradient
        self.of_head[2].index_add_(0, chunk.row_ids, found[2])


def weighted_loss(states: torch.Tensor, inputs: LossInputs, vocab_size: int) -> Loss:
    """Compute the loss of all positions in chunks.

    Args:
        states `[N, H]`: of the draft.
        vocab_size: V, from which the size of a chunk follows.
    """
    head = inputs.further_head
    tensors = () if head is None else (head.gates, head.codebook)
    return Loss(*_InChunks.apply(inputs, max(1, CHUNK_LOGITS // vocab_size), states, *tensors))
