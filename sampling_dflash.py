# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Sample the target's own token at each position, from its processed distribution.

This file travels with every pushed draft. A draw is Gumbel-max with noise keyed by row and slot: argmax(scores + noise)
samples softmax(scores) exactly. So a text is the same however its positions were grouped into blocks. Greedy decoding
is the same without noise. Acceptance is by *match*, as in DDTree (arXiv 2604.12989): a drafted token stays if it equals
this draw. So any proposal and any processor is exact.

Shapes: B rows, Q block positions, V vocabulary.
"""

import math
from typing import Any

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

_READING_TEXT = tuple(
    getattr(logits_process, name)
    for name in (
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensAtBeginLogitsProcessor",
        "WatermarkLogitsProcessor",
    )
    if hasattr(logits_process, name)
)
"""Processors that are functions of the text so far and of one position's scores: they may judge rejected tokens too."""


def is_pure_processor(processor: Any) -> bool:
    """Tell whether a processor is transformers' own and a function of text and scores. A subclass is neither."""
    return type(processor) in _POINTWISE or type(processor) in _READING_TEXT


class PositionNoise:
    """Make Gumbel noise: a vector of V for each row and slot of the text, from one seed."""

    def __init__(self, seed: int | None = None):
        # `torch.manual_seed` governs it.
        self.seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed

    def at(self, row: int, slot: int, like: torch.Tensor) -> torch.Tensor:
        """Return `[V]`, the same however often and in whatever block it is asked for."""
        # CPU generators use the low 32 bits: slots must differ there.
        key = hash((self.seed, row)) + slot
        generator = torch.Generator(like.device).manual_seed(key % 2**63)
        noise = torch.empty(like.shape[-1], device=like.device, dtype=torch.float32)
        return -noise.exponential_(generator=generator).log()

    def block(self, first_slots: list[int], size: int, like: torch.Tensor) -> torch.Tensor:
        """Return `[B, size, V]` for `size` slots from the first one of each of B rows on."""
        rows = []
        for row, first in enumerate(first_slots):
            rows.append(
                torch.stack([self.at(row, slot, like) for slot in range(first, first + size)])
            )
        return torch.stack(rows)


class Sampler:
    """Draw the target's own tokens.

    Args:
        processors: what `generate` applies to scores, warpers included.
        noise: None to take the argmax.
        coupled: whether the draft draws its tokens with the same noise.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        noise: PositionNoise | None = None,
        coupled: bool = False,
    ):
        self.processors, self.noise = processors, noise
        self.coupled = coupled and noise is not None
        self.reads_text = not all(type(processor) in _POINTWISE for processor in processors)

    def sample(
        self,
        logits: torch.Tensor,
        first_slots: list[int],
        depths: torch.Tensor | None = None,
        prefixes: list[list[torch.Tensor]] | None = None,
        max_depth: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the target's token after each position of a block.

        Args:
            logits `[B, Q, V]`: the target's.
            first_slots: for each row, the slot of the token after its anchor.
            depths `[B, Q]`: of each position in its tree; None for a chain, where they are 0, 1, 2 ...
            prefixes: for each row and position, the ids `[T]` up to and with it; None if no processor reads them.
            max_depth: no position is deeper; None if that is not known.

        Returns:
            The tokens `[B, Q]`, -1 where logits are NaN, and the processed scores `[B, Q, V]`.
        """
        scores = self.process(logits, prefixes)
        return self.draw(scores, first_slots, depths, max_depth), scores

    def draw(
        self,
        scores: torch.Tensor,
        first_slots: list[int],
        depths: torch.Tensor | None = None,
        max_depth: int | None = None,
    ) -> torch.Tensor:
        """Draw a token from each of the processed `scores [B, Q, V]`: `[B, Q]`, -1 where they are NaN.

        The other arguments are those of `sample`.
        """
        noisy = scores
        if self.noise is not None:
            size = scores.shape[1]
            num_slots = size if max_depth is None else min(size, 1 + max_depth)
            noise = self.noise.block(first_slots, num_slots, scores)
            # Positions of equal depth compete for one slot, and share its noise.
            if depths is not None:
                index = depths.to(noise.device)[..., None]
                noise = noise.gather(1, index.expand_as(scores))
            noisy = scores + noise
        best = noisy.max(dim=-1)
        return best.indices.masked_fill_(best.values.isnan(), -1)

    def process(
        self, logits: torch.Tensor, prefixes: list[list[torch.Tensor]] | None
    ) -> torch.Tensor:
        """Return `logits [B, Q, V]` after all processors, in float32."""
        scores = logits.float()
        if not self.processors:
            return scores
        if prefixes is None:
            unread = torch.zeros(1, 1, dtype=torch.long, device=scores.device)
            return self.processors(unread, scores.flatten(0, 1)).view(scores.shape)
        positions = [
            self._process_position(scores, prefixes, position)
            for position in range(scores.shape[1])
        ]
        return torch.stack(positions, dim=1)

    def _process_position(
        self, scores: torch.Tensor, prefixes: list[list[torch.Tensor]], position: int
    ) -> torch.Tensor:
        """Process one position of every row, `[B, V]`, rows of one length together, as plain `generate` does.

        Processors may use the row index, so each call gets the full batch. Rows of other lengths are replaced by one
        of this length, and their result is dropped.
        """
        texts = [line[position] for line in prefixes]
        result = torch.empty_like(scores[:, position])
        for length in {len(text) for text in texts}:
            rows = [row for row, text in enumerate(texts) if len(text) == length]
            shown = [texts[rows[0]]] * len(texts)
            for row in rows:
                shown[row] = texts[row]
            processed = self.processors(torch.stack(shown), scores[:, position].clone())
            result[rows] = processed[rows]
        return result

    def draft_scores(
        self, logits: torch.Tensor, first_slots: list[int]
    ) -> tuple[torch.Tensor, float]:
        """Add the target's noise to a draft's `logits [B, N, V]`, so that both draw alike: `[B, N, V]`.

        Returns:
            The scores, and what a draft that scores pairs of tokens must multiply those by: 1 / temperature, where
            the processors were applied.
        """
        pair_scale = 1.0
        scores = logits.float()
        if not self.reads_text:
            scores, pair_scale = self.process(logits, None), 1 / self.temperature
        noise = self.noise.block(first_slots, logits.shape[1], scores)  # type: ignore[union-attr]
        return scores + noise, pair_scale

    @property
    def temperature(self) -> float:
        """The number that the processors divide scores by."""
        return math.prod(
            one.temperature for one in self.processors if isinstance(one, TemperatureLogitsWarper)
        )
