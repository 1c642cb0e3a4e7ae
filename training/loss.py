# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the loss without the logits of all positions at once.

The target's head is frozen. So the gradient of a chunk of states is known as soon as the chunk's logits are. It is
taken in the forward, and the logits are freed before the next chunk's are made. The head is called as a module, so any
kind of head works. What a draft adds to its logits enters the same total. The loss of a further head has a total and a
gradient of its own. It is divided by another sum of weights, which is known only after the last chunk.

Shapes: N positions with a loss, n those of a chunk, H hidden size, V vocabulary, R width of a further head or of a
correction, D rows of its codebook, m those of them that a chunk used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, log_softmax, pad

from .mix import Mix, total_variation
from .weights import PositionWeights

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in float32, and as much again for their gradient."""
CHUNK_LOGITS_ON_CPU = 2**23
"""The same on a CPU, whose allocator uses the memory of one chunk again for the next up to this size."""


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
    `codebook [D, R]`, a parameter with a row for each token.
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
class Correction:
    """Hold what a draft adds to its logits by the tokens before: gates times codebook.

    Args:
        gates `[N, R]`: of each position.
        codebook `[D, R]`: a row for each token.
        base_share: share of the loss of the logits without it, 0 to 1; the rest is that of the corrected ones.
    """

    gates: torch.Tensor
    codebook: torch.Tensor
    base_share: float = 0.0


@dataclass(frozen=True)
class LossInputs:
    """Hold what the draft's states are scored against.

    Args:
        head: states `[n, H]` to logits `[n, V]`.
        labels `[N]`: the tokens of the text.
        weights: of each position in the sum.
        mix: the losses of a position.
        target_logits: a slice of the positions to the target's own logits `[n, V]`; None where nothing needs them.
        correction: what is added to the logits; None for a draft that adds nothing.
        further_head: inputs of the loss of a further head; None for a draft that has none.
        wants_overlap: whether `Loss.overlap` is computed, which needs the target's logits.
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    weights: PositionWeights
    mix: Mix
    target_logits: Callable[[slice], torch.Tensor] | None = None
    correction: Correction | None = None
    further_head: HeadLossInputs | None = None
    wants_overlap: bool = False

    @property
    def head_tensors(self) -> tuple[torch.Tensor, ...]:
        """Return gates `[N, R]` and codebook `[D, R]` of the correction or the further head; empty without either."""
        source = self.further_head or self.correction
        return () if source is None else (source.gates, source.codebook)


@dataclass(frozen=True)
class Loss:
    """Hold the loss of some positions.

    Args:
        total: the weighted sum of the losses of the draft's logits, a float32 scalar.
        head_total: the same of the further head's losses; 0 without one.
        correct `[n]`: whether the draft proposes the token of the text, given the tokens before it in the text.
        base_correct `[n]`: whether the draft's logits alone propose it, without correction.
        is_candidate `[n]`: whether the token of the text is a candidate of the further head; False without one.
        weights `[n]`: of the positions.
        overlap `[n]`: the chance that speculative sampling accepts the draft's token; 0 where it is not wanted. It is 1
            minus the total variation distance from the target's distribution.
    """

    total: torch.Tensor
    head_total: torch.Tensor
    correct: torch.Tensor
    base_correct: torch.Tensor
    is_candidate: torch.Tensor
    weights: torch.Tensor
    overlap: torch.Tensor


def chunk_loss(
    inputs: LossInputs, states: torch.Tensor, part: slice, *tensors: torch.Tensor
) -> tuple[Loss, HeadChunk | None]:
    """Compute the loss of `states [n, H]`, and what the further head computed for it.

    Args:
        part: which of the N positions these are.
        tensors: gates `[n, R]` of these positions and codebook `[D, R]`, for a draft that has them.
    """
    labels = inputs.labels[part]
    base = inputs.head(states).float()
    logits = base
    if inputs.correction is not None:
        logits = base + _added(tensors[0], tensors[1], base)
    target = None
    if inputs.target_logits is not None:
        target = log_softmax(inputs.target_logits(part).float(), dim=-1)
    weights = inputs.weights.of(part, lambda: cross_entropy(logits, labels, reduction="none"))
    losses = inputs.mix.losses(logits, labels, target)
    if inputs.correction is not None and inputs.correction.base_share:
        share = inputs.correction.base_share
        losses = (1 - share) * losses + share * inputs.mix.losses(base, labels, target)
    total = (losses * weights).sum()
    overlap = torch.zeros_like(weights)
    if inputs.wants_overlap and target is not None:
        overlap = 1 - total_variation(logits.detach(), target)
    correct = base_correct = logits.detach().argmax(-1) == labels
    if inputs.correction is not None:
        base_correct = base.detach().argmax(-1) == labels
    if inputs.further_head is None:
        none = torch.zeros_like(correct)
        zero = torch.zeros_like(total)
        return Loss(total, zero, correct, base_correct, none, weights, overlap), None
    chunk = inputs.further_head.head_chunk(logits, tensors[0], labels)
    head_total = (chunk.losses * weights).sum()
    found = (chunk.correct, base_correct, chunk.is_candidate, weights, overlap)
    return Loss(total, head_total, *found), chunk


def _added(gates: torch.Tensor, codebook: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return gates `[n, R]` times codebook `[D, R]`, over the tokens of `like [n, V]`.

    A target's head may be padded beyond the draft's vocabulary, or lack its padding.
    """
    added = gates @ codebook.T
    return pad(added, (0, like.shape[-1] - added.shape[-1])).to(like.dtype)


class _InChunks(torch.autograd.Function):
    """Sum the losses over chunks; the gradients of each chunk are taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, size: int, states: torch.Tensor, *head: torch.Tensor
    ) -> tuple:
        """Return the fields of `Loss` in order, those of positions `[N]`.

        Args:
            size: positions of a chunk.
            states `[N, H]`: of the draft.
            head: gates `[N, R]` and codebook `[D, R]`; empty for a draft without them.
        """
        needs_grad = ctx.needs_input_grad[2]
        gradients = _Gradients.zeros(inputs, states, head) if needs_grad else None
        totals = torch.zeros(2, dtype=torch.float32, device=states.device)
        flags = torch.zeros(3, len(states), dtype=torch.bool, device=states.device)
        numbers = torch.zeros(2, len(states), dtype=torch.float32, device=states.device)
        for part in inputs.weights.chunks(size):
            leaves = [tensor[part].detach() for tensor in (states, *head[:1])]
            leaves += [tensor.detach() for tensor in head[1:]]
            with torch.set_grad_enabled(needs_grad):
                for leaf in leaves:
                    leaf.requires_grad_(needs_grad)
                loss, chunk = chunk_loss(inputs, leaves[0], part, *leaves[1:])
            totals += torch.stack([loss.total, loss.head_total]).detach()
            flags[:, part] = torch.stack([loss.correct, loss.base_correct, loss.is_candidate])
            numbers[:, part] = torch.stack([loss.weights, loss.overlap])
            if gradients is not None:
                gradients.add(part, loss, leaves, chunk)
        if gradients is not None:
            ctx.save_for_backward(*gradients.of_total, *gradients.of_head)
            ctx.split = len(gradients.of_total)
        ctx.dtypes = [tensor.dtype for tensor in (states, *head)]
        outputs = [*totals.clone().unbind(), *flags.clone().unbind(), *numbers.clone().unbind()]
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        """Scale the gradients that the forward took by those of the two totals."""
        found = [gradient * outer[0] for gradient in ctx.saved_tensors[: ctx.split]]
        of_head = [gradient * outer[1] for gradient in ctx.saved_tensors[ctx.split :]]
        for index, gradient in enumerate(of_head):
            if index < len(found):
                found[index] = found[index] + gradient
            else:
                found.append(gradient)
        cast = [one.to(dtype) for one, dtype in zip(found, ctx.dtypes, strict=True)]
        return (None, None, *cast)


@dataclass(frozen=True)
class _Gradients:
    """Hold gradients in float32: by the states `[N, H]`, the gates `[N, R]` and the codebook `[D, R]`.

    Args:
        of_total: of the total of the draft's logits; by the states alone where nothing corrects them.
        of_head: of the further head's total, by all three; empty without one.
    """

    of_total: tuple[torch.Tensor, ...]
    of_head: tuple[torch.Tensor, ...]

    @classmethod
    def zeros(
        cls, inputs: LossInputs, states: torch.Tensor, head: tuple[torch.Tensor, ...]
    ) -> "_Gradients":
        """Return zeros for `states [N, H]` and for the gates and the codebook, where there are some."""

        def like(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors)

        of_total = like((states, *head) if inputs.further_head is None else (states,))
        return cls(of_total, () if inputs.further_head is None else like((states, *head)))

    def add(
        self, part: slice, loss: Loss, leaves: list[torch.Tensor], chunk: HeadChunk | None
    ) -> None:
        """Add those of a chunk.

        Args:
            part: the positions of the chunk.
            leaves: the states `[n, H]`, the gates `[n, R]` and the codebook `[D, R]`, where the draft has them.
            chunk: what a further head computed.
        """
        reached = leaves[: len(self.of_total)]
        found = torch.autograd.grad(loss.total, reached, retain_graph=chunk is not None)
        _add_by_position(self.of_total, part, found)
        if len(found) > 2:
            self.of_total[2].add_(found[2])
        if chunk is None:
            return
        found = torch.autograd.grad(loss.head_total, [*leaves[:2], chunk.rows])
        _add_by_position(self.of_head, part, found)
        self.of_head[2].index_add_(0, chunk.row_ids, found[2])


def _add_by_position(
    whole: tuple[torch.Tensor, ...], part: slice, found: tuple[torch.Tensor, ...]
) -> None:
    """Write the gradients of a chunk's states `[n, H]` and gates `[n, R]` into those of all positions."""
    for gradients, chunk in zip(whole[:2], found[:2], strict=True):
        gradients[part] = chunk


def weighted_loss(states: torch.Tensor, inputs: LossInputs, vocab_size: int) -> Loss:
    """Compute the loss of all positions in chunks.

    Args:
        states `[N, H]`: of the draft.
        vocab_size: V, from which the size of a chunk follows.
    """
    size = chunk_positions(vocab_size, states.device)
    return Loss(*_InChunks.apply(inputs, size, states, *inputs.head_tensors))


def chunk_positions(vocab_size: int, device: torch.device) -> int:
    """Return the number of positions whose logits exist at once."""
    logits = CHUNK_LOGITS
    if device.type == "cpu":
        logits = min(CHUNK_LOGITS, CHUNK_LOGITS_ON_CPU)
    return max(1, logits // vocab_size)
