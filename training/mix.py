# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the loss of single positions: cross-entropy, distances from the target's own distribution, and mixes of them.

Shapes: n positions, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


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
        found = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        if self.ce:
            found = found + self.ce * cross_entropy(logits, labels, reduction="none")
        if target is not None and self.kl:
            own = log_softmax(logits, dim=-1)
            divergence = kl_div(own, target, reduction="none", log_target=True)
            found = found + self.kl * divergence.sum(-1)
        if target is not None and self.tv:
            found = found + self.tv * total_variation(logits, target)
        return found


def total_variation(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return half the sum of |p - q|, `[n]`, of the draft's `logits` and the target's log-probabilities, `[n, V]`."""
    return (logits.softmax(-1) - target.exp()).abs().sum(-1) / 2


def _not_a_mix(text: object, names: list[str]) -> str:
    return (
        f"loss is {text!r}; it must be losses and their weights, at least 0 and not all 0, each of "
        f"{', '.join(names)} once, such as ce=0.1,tv=0.9."
    )
