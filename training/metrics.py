# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Count correct tokens, and turn the counts into accuracy and expected acceptance length.

Shapes: B rows, A anchors of a row, Q block positions, N positions with a loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counts:
    """Hold numbers of tokens for each block position k = 1 to Q - 1. They add up over rows, steps and processes.

    Each is `[Q - 1]`, or `[B, Q - 1]` for each of several rows.

    Args:
        total: positions with a loss.
        correct: those where the draft's token is the text's.
        reached: positions with a loss where all positions before them in the block are correct.
        accepted: those of them that are correct too.
        candidates: positions whose token is among the candidates of a selector.
    """

    total: torch.Tensor
    correct: torch.Tensor
    reached: torch.Tensor
    accepted: torch.Tensor
    candidates: torch.Tensor

    @classmethod
    def of(
        cls, block_loss_mask: torch.Tensor, correct: torch.Tensor, is_candidate: torch.Tensor
    ) -> "Counts":
        """Count in each row.

        Example: one row with three blocks of Q = 4. Two are whole; the third has one position with a loss, as at the
        end of a text. Written y for correct and n for not correct, the blocks are y y n, n y y and y. The counts are:

        | | k = 1 | k = 2 | k = 3 |
        |---|---|---|---|
        | total | 3 | 2 | 2 |
        | correct | 2 | 2 | 1 |
        | reached | 3 | 1 | 1 |
        | accepted | 2 | 1 | 0 |

        The second block counts as reached at k = 1 only, since it is wrong there.

        Args:
            block_loss_mask `[B, A, Q]`: positions with a loss.
            correct `[N]`: for those in order, whether the draft's token is the text's.
            is_candidate `[N]`: for those, whether the text's token is a candidate.
        """
        correct_at, candidate_at = (
            torch.zeros_like(block_loss_mask),
            torch.zeros_like(block_loss_mask),
        )
        correct_at[block_loss_mask], candidate_at[block_loss_mask] = correct, is_candidate
        has_loss, correct_at = block_loss_mask[..., 1:], correct_at[..., 1:]
        accepted = correct_at.int().cumprod(-1).bool()
        reached = has_loss & torch.nn.functional.pad(accepted[..., :-1], (1, 0), value=True)
        return cls(
            total=has_loss.sum(1),
            correct=correct_at.sum(1),
            reached=reached.sum(1),
            accepted=accepted.sum(1),
            candidates=candidate_at[..., 1:].sum(1),
        )

    def __add__(self, other: "Counts") -> "Counts":
        theirs = other.tensors()
        return Counts(**{name: values + theirs[name] for name, values in self.tensors().items()})

    def over_rows(self) -> "Counts":
        """Return the sum over rows: from `[B, Q - 1]` to `[Q - 1]`."""
        return Counts(**{name: values.sum(0) for name, values in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the numbers by name. `Counts(**tensors)` is the reverse."""
        return dict(vars(self))


@dataclass(frozen=True)
class Metrics:
    """Hold the shares that counts amount to.

    Args:
        accuracy: share of correct tokens over all positions.
        by_position: the same for each position after the anchor.
        acceptance_length: expected tokens per cycle, the target's own included.
        candidate_recall: share of positions whose token is among the selector's candidates; 0 without a selector.
        selector_accuracy: share of correct tokens over those positions; 0 without a selector.
    """

    accuracy: float
    by_position: tuple[float, ...]
    acceptance_length: float
    candidate_recall: float
    selector_accuracy: float

    @classmethod
    def of(cls, counts: Counts) -> "Metrics":
        """Compute the metrics of `counts`, each `[Q - 1]`.

        The expected acceptance length is 1 + the sum over k of the chance that positions 1 to k are all correct. In the
        example of `Counts.of`, it is 1 + 2/3 + 2/3 * 1/1 + 2/3 * 1/1 * 0/1 = 2.33. A position counts only where its
        block reaches it, so a block at the end of a text does not lower it. The accuracy there is 5 / 7.
        """
        numbers = {name: values.double().cpu() for name, values in counts.tensors().items()}
        by_position = numbers["correct"] / numbers["total"].clamp_min(1)
        survival = (numbers["accepted"] / numbers["reached"].clamp_min(1)).cumprod(0)
        total, correct = float(numbers["total"].sum()), float(numbers["correct"].sum())
        candidates = float(numbers["candidates"].sum())
        return cls(
            accuracy=_share(correct, total),
            by_position=tuple(by_position.tolist()),
            acceptance_length=1 + float(survival.sum()),
            candidate_recall=_share(candidates, total),
            selector_accuracy=_share(correct, candidates),
        )

    def as_log(self, names: Iterable[str]) -> dict[str, float]:
        """Return the metrics with these names, for a line of the log."""
        return {name: getattr(self, name) for name in names}


def _share(part: float, whole: float) -> float:
    """Return `part / whole`, or 0 where the whole is 0."""
    return part / whole if whole else 0.0
