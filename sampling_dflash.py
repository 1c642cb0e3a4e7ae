# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The target's own token at each position: its processed distribution, and one draw from it.

This file travels with every pushed draft. A draw is Gumbel-max with noise keyed by row and column: argmax(scores +
noise) samples softmax(scores) exactly, and a text is the same however its positions were grouped into blocks. Greedy
decoding is the same without noise. Acceptance is by *match*, as in DDTree (arXiv 2604.12989): a drafted token stays if
it equals this draw, so any proposal and any processor is exact.

Shapes: B rows, Q block positions, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import logits_process

_POINTWISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)
"""Processors that look at one position's scores and at nothing else: a whole block goes through them at once."""


class PositionNoise:
    """Gumbel noise, one row of V per row and column of the text, from one seed."""

    def __init__(self, seed: int | None = None):
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed  # torch.manual_seed governs it

    def at(self, row: int, column: int, like: torch.Tensor) -> torch.Tensor:
        """`[V]`, the same however often and in whatever block it is asked for."""
        key = hash((self.seed, row)) + column  # CPU generators use the low 32 bits: columns must differ there
        generator = torch.Generator(like.device).manual_seed(key % 2**63)
        noise = torch.empty(like.shape[-1], device=like.device, dtype=torch.float32)
        return -noise.exponential_(generator=generator).log()

    def block(self, columns: Sequence[Sequence[int]], like: torch.Tensor) -> torch.Tensor:
        """`[B, Q, V]` for `columns`, a list of Q for each of B rows."""
        rows = [torch.stack([self.at(row, column, like) for column in line]) for row, line in enumerate(columns)]
        return torch.stack(rows)


class Chooser:
    """Chooses the target's tokens.

    Args:
        processors: what `generate` applies to scores, warpers included.
        noise: None for the argmax.
    """

    def __init__(self, processors: LogitsProcessorList, noise: PositionNoise | None = None, coupled: bool = False):
        self.processors, self.noise, self.coupled = processors, noise, coupled
        self.reads_text = not all(type(processor) in _POINTWISE for processor in processors)

    def scores(self, logits: torch.Tensor, texts: list[list[torch.Tensor]] | None) -> torch.Tensor:
        """`logits [B, Q, V]` after all processors, in float32.

        Args:
            texts: for each row and position, the ids `[T]` up to and with that position; None if no processor reads
                them.
        """
        scores = logits.float()
        if not self.processors:
            return scores
        if texts is None:
            unread = torch.zeros(1, 1, dtype=torch.long, device=scores.device)
            return self.processors(unread, scores.flatten(0, 1)).view(scores.shape)
        return torch.stack([self._at(scores, texts, position) for position in range(scores.shape[1])], dim=1)

    def _at(self, scores: torch.Tensor, texts: list[list[torch.Tensor]], position: int) -> torch.Tensor:
        """`[B, V]`: one position of every row, rows of one length together, as in plain `generate`.

        Every row keeps its index, which some processors look at: where a row is of another length, another stands in.
        """
        here, result = [line[position] for line in texts], torch.empty_like(scores[:, position])
        for length in {len(text) for text in here}:
            rows = [row for row, text in enumerate(here) if len(text) == length]
            shown = torch.stack([text if len(text) == length else here[rows[0]] for text in here])
            result[rows] = self.processors(shown, scores[:, position].clone())[rows]
        return result

    def choose(self, scores: torch.Tensor, columns: list[list[int]]) -> torch.Tensor:
        """The tokens `[B, Q]` chosen for `columns` from `scores [B, Q, V]`; -1 where scores are NaN."""
        if self.noise is not None:
            scores = scores + self.noise.block(columns, scores)
        best = scores.max(dim=-1)
        return best.indices.masked_fill_(best.values.isnan(), -1)

    def draft(
        self, logits: torch.Tensor, columns: list[range], pick: Callable[[torch.Tensor, float], torch.Tensor]
    ) -> torch.Tensor:
        """The tokens `[B, Q - 1]` that a draft with these `logits [B, Q - 1, V]` proposes for `columns`.

        Args:
            pick: scores `[B, Q - 1, V]`, and the weight of what a draft adds to them, to tokens `[B, Q - 1]`.
        """
        if self.noise is None or not self.coupled:
            return pick(logits, 1.0)
        scores = logits.float() if self.reads_text else self.scores(logits, None)
        return pick(scores + self.noise.block(columns, scores), 1.0 if self.reads_text else 1 / self.temperature)

    @property
    def temperature(self) -> float:
        """What the processors divide scores by."""
        found = [one.temperature for one in self.processors if isinstance(one, TemperatureLogitsWarper)]
        return math.prod(found)


def refuse_processors(processors: LogitsProcessorList) -> None:
    """Refuse processors that cannot judge the positions of a block.

    Raises:
        ValueError: naming it.
    """
    stateful = {
        "SynthIDTextWatermarkLogitsProcessor": "it keeps state from one call to the next",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance runs the target a second time for each token",
    }
    for processor in processors:
        reason = stateful.get(type(processor).__name__)
        if reason:
            raise ValueError(f"{type(processor).__name__} cannot be used with a draft: {reason}. Leave it out.")
