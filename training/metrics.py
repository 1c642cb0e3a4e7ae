# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Count correct tokens, and turn the counts into accuracy and expected acceptance length.

Shapes: B rows, A anchors of a row, T positions of a block that predict a token, N positions with a loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counts:
    """Hold numbers of tokens for each position k = 1 to T of a block. They add up over rows, steps and processes.

    Each is `[T]`, or `[B, T]` for each of several rows.

    Args:
        total: positions with a loss.
        correct: those where the draft's token is the text's.
        reached: positions with a loss where all positions before them in the block are correct.
        accepted: those of them that are correct too.
        candidates: positions whose token is among the candidates of a selector.
        base_correct: those where the draft's logits alone have the text's token. Where a draft's tokens do not depend
            on each other, all that are correct.
    """

    total: torch.Tensor
    correct: torch.Tensor
    reached: torch.Tensor
    accepted: torch.Tensor
    candidates: torch.Tensor
    base_correct: torch.Tensor

    @classmethod
    def of(
        cls,
        has_loss: torch.Tensor,
        correct: torch.Tensor,
        is_candidate: torch.Tensor,
        base_correct: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
    ) -> "Counts":
        """Count in each row.

        Example: one row with three blocks of T = 3. Two are whole; the third has one position with a loss, as at the
        end of a text. Written y for correct and n for not correct, the blocks are y y n, n y y and y. The counts are:

        | | k = 1 | k = 2 | k = 3 |
        |---|---|---|---|
        | total | 3 | 2 | 2 |
        | correct | 2 | 2 | 1 |
        | reached | 3 | 1 | 1 |
        | accepted | 2 | 1 | 0 |

        The second block counts as reached at k = 1 only, since it is wrong there.

        Args:
            has_loss `[B, A, T]`: positions with a loss.
            correct `[N]`: for those in order, whether the draft's token is the text's.
            is_candidate `[N]`: for those, whether the text's token is a candidate.
            base_correct `[N]`: for those, whether the draft's logits alone have it; by default `correct`.
            given `[B, A]`: number of predicted positions at the beginning of each block that are not counted; the one
                after them is k = 1. None for none.
        """
        positions = torch.arange(has_loss.shape[-1], device=has_loss.device)
        if given is not None:
            positions = positions + given[..., None]
        inside = positions < has_loss.shape[-1]
        positions = positions.clamp_max(has_loss.shape[-1] - 1).expand_as(has_loss)

        def placed(flags: torch.Tensor) -> torch.Tensor:
            """Return `[B, A, T]`: `flags [N]` at their positions, False elsewhere."""
            placed_flags = torch.zeros_like(has_loss).masked_scatter(has_loss, flags)
            return placed_flags.gather(-1, positions) & inside

        has_loss_at, correct_at = placed(torch.ones_like(correct)), placed(correct)
        accepted = correct_at.int().cumprod(-1).bool()
        reached = has_loss_at & torch.nn.functional.pad(accepted[..., :-1], (1, 0), value=True)
        return cls(
            total=has_loss_at.sum(1),
            correct=correct_at.sum(1),
            reached=reached.sum(1),
            accepted=accepted.sum(1),
            candidates=placed(is_candidate).sum(1),
            base_correct=placed(correct if base_correct is None else base_correct).sum(1),
        )

    def __add__(self, other: "Counts") -> "Counts":
        theirs = other.tensors()
        return Counts(**{name: values + theirs[name] for name, values in self.tensors().items()})

    def over_rows(self) -> "Counts":
        """Return the sum over rows: from `[B, T]` to `[T]`."""
        return Counts(**{name: values.sum(0) for name, values in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the numbers by name. `Counts(**tensors)` is the reverse."""
        return dict(vars(self))


@dataclass(frozen=True)
class LossSums:
    """Hold weighted sums of losses, and of their weights. They add up over rows, steps and processes.

    Args:
        base: of the losses of the draft's logits.
        weight: of the weights of their positions.
        head: of the losses of a further head; 0 without one.
        head_weight: of the weights of the positions that this is of: all, or for a selector those whose token is one
            of its candidates.
    """

    base: torch.Tensor
    weight: torch.Tensor
    head: torch.Tensor
    head_weight: torch.Tensor

    def __add__(self, other: "LossSums") -> "LossSums":
        theirs = other.tensors()
        return LossSums(**{name: value + theirs[name] for name, value in self.tensors().items()})

    def detached(self) -> "LossSums":
        """Return the same without gradients."""
        return LossSums(**{name: value.detach() for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums by name. `LossSums(**tensors)` is the reverse."""
        return dict(vars(self))


@dataclass(frozen=True)
class Metrics:
    """Hold the shares that counts amount to, and the means of losses.

    Args:
        accuracy: share of correct tokens over all positions.
        by_position: the same for each position after the anchor.
        acceptance_length: expected tokens per cycle, the target's own included.
        candidate_recall: share of positions whose token is among the selector's candidates; 0 without a selector.
        selector_accuracy: share of correct tokens over those positions; 0 without a selector.
        base_accuracy: share of positions where the draft's logits alone have the text's token.
        base_loss: mean loss of the draft's logits, with what corrects them.
        head_loss: mean loss of the further head; 0 without one. A selector's is over the positions whose token is a
            candidate, a confidence head's over all.
    """

    accuracy: float
    by_position: tuple[float, ...]
    acceptance_length: float
    candidate_recall: float
    selector_accuracy: float
    base_accuracy: float
    base_loss: float
    head_loss: float

    @property
    def selector_loss(self) -> float:
        """`head_loss` under its name in the log of a draft with a selector."""
        return self.head_loss

    @property
    def confidence_loss(self) -> float:
        """`head_loss` under its name in the log of a draft with a confidence head."""
        return self.head_loss

    @classmethod
    def of(cls, counts: Counts, sums: LossSums | None = None) -> "Metrics":
        """Compute the metrics of `counts`, each `[T]`, and of the `sums`; without them the losses are 0.

        The expected acceptance length is 1 + the sum over k of the chance that positions 1 to k are all correct. In the
        example of `Counts.of`, it is 1 + 2/3 + 2/3 * 1/1 + 2/3 * 1/1 * 0/1 = 2.33. A position counts only where its
        block reaches it, so a block at the end of a text does not lower it. The accuracy there is 5 / 7.
        """
        numbers = {name: values.double().cpu() for name, values in counts.tensors().items()}
        by_position = numbers["correct"] / numbers["total"].clamp_min(1)
        survival = (numbers["accepted"] / numbers["reached"].clamp_min(1)).cumprod(0)
        total, correct = float(numbers["total"].sum()), float(numbers["correct"].sum())
        candidates = float(numbers["candidates"].sum())
        losses = dict.fromkeys(LossSums.__dataclass_fields__, 0.0)
        if sums is not None:
            losses = {name: float(value) for name, value in sums.tensors().items()}
        return cls(
            accuracy=_share(correct, total),
            by_position=tuple(by_position.tolist()),
            acceptance_length=1 + float(survival.sum()),
            candidate_recall=_share(candidates, total),
            selector_accuracy=_share(correct, candidates),
            base_accuracy=_share(float(numbers["base_correct"].sum()), total),
            base_loss=_share(losses["base"], losses["weight"]),
            head_loss=_share(losses["head"], losses["head_weight"]),
        )

    def as_log(self, names: Iterable[str]) -> dict[str, float]:
        """Return the metrics with these names, for a line of the log."""
        return {name: getattr(self, name) for name in names}


def _share(part: float, whole: float) -> float:
    """Return `part / whole`, or 0 where the whole is 0."""
    return part / whole if whole else 0.0
