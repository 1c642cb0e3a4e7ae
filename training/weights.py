# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Weigh the positions of a block in the loss: by a fixed decay, or by what each adds to the accepted length (D-PACE).

Shapes: N positions with a loss, n those of a chunk, m blocks of a chunk, T positions of a block that predict a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class PositionWeights(Protocol):
    """Describe the weights of N positions."""

    def chunks(self, size: int) -> list[slice]:
        """Return the chunks of up to `size` positions in which the weights can be computed."""
        ...

    def of(self, part: slice, cross_entropy: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the weights `[n]` of a chunk, without gradients.

        Args:
            part: which of the N positions these are.
            cross_entropy: returns the cross-entropy `[n]` of the text's tokens, for weights that depend on it.
        """
        ...


@dataclass(frozen=True)
class FixedWeights:
    """Hold weights `values [N]` that are known before the draft's logits are."""

    values: torch.Tensor

    def chunks(self, size: int) -> list[slice]:
        """Return chunks of `size` positions; the last may be shorter."""
        return [slice(start, start + size) for start in range(0, len(self.values), size)]

    def of(self, part: slice, cross_entropy: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the weights `[n]` of a chunk."""
        return self.values[part]


@dataclass(frozen=True)
class DPaceWeights:
    """Weigh a position by the accepted length that depends on it (D-PACE, arXiv 2605.18810).

    The weight of position j is the sum over m >= j of the chance that positions 1 to m are all accepted. The chance of
    a single position is (1 - alpha) * q + alpha, where q is the draft's probability of the text's token. Positions
    without a loss neither add to the sum nor lower the chance.

    Args:
        places `[N]`: of each position, the number of its block times `length`, plus its number in it; ascending.
        length: T.
        alpha: keeps the weights of positions after an unlikely token above 0.
    """

    places: torch.Tensor
    length: int
    alpha: float

    def chunks(self, size: int) -> list[slice]:
        """Return chunks of whole blocks, with up to `size` positions, or with one block that has more."""
        blocks = self.places.div(self.length, rounding_mode="floor")
        counts = blocks.unique_consecutive(return_counts=True)[1].tolist()
        found: list[slice] = []
        start = end = 0
        for count in counts:
            if end + count - start > size and end > start:
                found.append(slice(start, end))
                start = end
            end += count
        return [*found, slice(start, end)] if end > start else found

    def of(self, part: slice, cross_entropy: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the weights `[n]` of a chunk of whole blocks.

        Example: a block of two positions with q 0.8 and 0.4, and alpha 0.5. The chances are 0.9 and 0.7, those of both
        0.63. So the weights are 0.9 + 0.63 = 1.53 and 0.63.
        """
        places = self.places[part]
        if not len(places):
            return torch.zeros(0, device=places.device)
        places = places - places[0].div(self.length, rounding_mode="floor") * self.length
        q = torch.exp(-cross_entropy().detach().float())
        chances = q.new_ones(int(places[-1]) // self.length + 1, self.length)  # [m, T]
        chances.view(-1)[places] = (1 - self.alpha) * q + self.alpha
        reached = torch.zeros_like(chances)
        reached.view(-1)[places] = chances.cumprod(-1).view(-1)[places]
        return reached.flip(-1).cumsum(-1).flip(-1).view(-1)[places]
