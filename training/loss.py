# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The loss, without the logits of all positions at once.

The target's head is frozen, so the gradient of a chunk of states is known as soon as the chunk's logits are: it is
taken in the forward, and the logits are gone before the next chunk's are made. The head is called as a module,
whatever it is made of.

Shapes: N counted positions, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in float32, and their gradient."""


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
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    teacher: Callable[[slice], torch.Tensor] | None = None
    distillation: float = 0.0

    def __post_init__(self) -> None:
        self.correct = torch.zeros_like(self.labels, dtype=torch.bool)
        """`[N]`, whether the likeliest token was the text's; known once the loss is."""

    def chunk(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """The weighted sum of the losses of `states [n, H]`, which are those of `part`."""
        logits = self.head(states).float()
        self.correct[part] = logits.detach().argmax(-1) == self.labels[part]
        losses = cross_entropy(logits, self.labels[part], reduction="none") if self.distillation < 1 else 0.0
        if self.teacher is not None:
            own = log_softmax(self.teacher(part).float(), dim=-1)
            divergence = kl_div(log_softmax(logits, dim=-1), own, reduction="none", log_target=True).sum(-1)
            losses = (1 - self.distillation) * losses + self.distillation * divergence
        return (losses * self.weights[part]).sum()


class _InChunks(torch.autograd.Function):
    """The sum over chunks, whose gradient is taken chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, scores: Scores, size: int) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states, dtype=torch.float32) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                chunk = states[part].detach().requires_grad_(wanted)
                loss = scores.chunk(chunk, part)
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(ctx.dtype), None, None


def weighted_loss(states: torch.Tensor, scores: Scores, vocab_size: int) -> torch.Tensor:
    """The weighted sum of losses over `states [N, H]`, a float32 number; `scores.correct` is filled on the way."""
    size = max(1, CHUNK_LOGITS // vocab_size)
    return _InChunks.apply(states, scores, size)
