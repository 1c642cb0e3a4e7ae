# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the loss of single positions: cross-entropy, distances from the target's own distribution, and mixes of them.

Shapes: n positions, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Mix:
    """Weigh the losses of a position; what they are of is p, the target's distribution, and q, the draft's.

    Args:
        ce: weight of the cross-entropy of the text's token, -log q(token).
        kl: weight of the forward Kullback-Leibler divergence, the sum of p * log(p / q).
        tv: weight of the total variation distance, half the sum of |p - q|. It is 1 minus the chance that
            speculative sampling accepts the token.
    """

    ce: float = 0.0
    kl: float = 0.0
    tv: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """Return the mix that a text such as "ce=0.1,tv=0.9" describes; "kl" alone is "kl=1".

        Raises:
            ValueError: a loss is unknown or named twice, a weight is no number or below 0, or all are 0.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(text, str):
            raise ValueError(_not_a_mix(text, names))
        weights: dict[str, float] = {}
        for part in text.split(","):
            words = [word.strip() for word in part.partition("=")]
            name = words[0]
            if name not in names or name in weights:
                raise ValueError(_not_a_mix(text, names))
            try:
                weights[name] = float(words[2] or 1)
            except ValueError as error:
                raise ValueError(_not_a_mix(text, names)) from error
        valid = all(0 <= weight < float("inf") for weight in weights.values())
        if not valid or not any(weights.values()):
            raise ValueError(_not_a_mix(text, names))
        return cls(**weights)

    def __str__(self) -> str:
        weights = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(f"{name}={weight:g}" for name, weight in weights if weight)

    @property
    def needs_target(self) -> bool:
        """Whether the target's own distribution is needed."""
        return self.kl > 0 or self.tv > 0

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, target: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the mixed losses `[n]`.

        Args:
            logits `[n, V]`: the draft's.
            labels `[n]`: the tokens of the text.
            target `[n, V]`: the target's log-probabilities; None where none are needed.
        """
        return _Mixed.apply(logits, labels, target, self)


class _Mixed(torch.autograd.Function):
    """Compute mixed losses, and their gradient by its formula, which needs fewer copies of the logits than autograd.

    With q the draft's distribution and p the target's, the gradient by the logits is

        (ce + kl) q - ce [label] - kl p + tv q (s - sum of q s), where s is half the sign of q - p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        target: torch.Tensor | None,
        mix: Mix,
    ) -> torch.Tensor:
        """Return the losses `[n]`; the arguments are those of `Mix.losses`."""
        top = logits.amax(-1, keepdim=True)
        exps = (logits - top).exp_()
        sums = exps.sum(-1, keepdim=True)
        normaliser = top + sums.log()  # [n, 1]
        losses = mix.ce * (normaliser - logits.gather(1, labels[:, None]))[:, 0]
        chances = target.exp() if target is not None and mix.needs_target else None
        if target is not None and chances is not None and mix.kl:
            ratios = (target - logits).add_(normaliser)  # log(p / q)
            losses = losses + mix.kl * _dot(chances, ratios)
        if chances is not None and mix.tv:
            distances = (exps / sums).sub_(chances).abs_()
            losses = losses + mix.tv / 2 * distances.sum(-1)
        ctx.mix = mix
        ctx.save_for_backward(labels, exps, sums, chances)
        return losses

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient by the logits, given that by the losses, `outer [n]`."""
        labels, exps = ctx.saved_tensors[:2]
        sums, chances = ctx.saved_tensors[2:]
        mix, outer = ctx.mix, outer[:, None]
        variation = None
        if chances is not None and mix.tv:
            own = exps / sums
            signs = (own - chances).sign_().div_(2)
            variation = own.mul_(signs - _dot(own, signs)[:, None])
        found = exps.mul_((mix.ce + mix.kl) * outer / sums)  # raises if it is asked for twice
        found.scatter_add_(1, labels[:, None], -mix.ce * outer)
        if chances is not None and mix.kl:
            found.addcmul_(chances, -mix.kl * outer)
        if variation is not None:
            found.addcmul_(variation, mix.tv * outer)
        return found, None, None, None


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the scalar products `[n]` of the rows of two tensors `[n, V]`, without a third one."""
    return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]


def total_variation(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return half the sum of |p - q|, `[n]`, of the draft's `logits` and the target's log-probabilities, `[n, V]`."""
    return (logits.softmax(-1) - target.exp()).abs().sum(-1) / 2


def _not_a_mix(text: object, names: list[str]) -> str:
    return (
        f"loss is {text!r}; it must be losses and their weights, at least 0 and not all 0, each of "
        f"{', '.join(names)} once, such as ce=0.1,tv=0.9."
    )
