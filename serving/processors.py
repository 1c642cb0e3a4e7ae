# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What `generate` calls once for each token of a text: penalties of OpenAI's API, and a record of probabilities.

Shapes: T slots so far, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from .choices import TokenLogprob


class Penalties(LogitsProcessor):
    """Lower the scores of tokens that the text has already.

    Args:
        num_prompt: tokens of the prompt, which do not count.
        presence: by how much, however often.
        frequency: by how much for each time.
    """

    def __init__(self, num_prompt: int, presence: float, frequency: float):
        self.num_prompt = num_prompt
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Return `scores [1, V]` after the text `input_ids [1, T]`."""
        new = input_ids[:, self.num_prompt :]
        counts = torch.zeros_like(scores).scatter_add(
            1, new, torch.ones_like(new, dtype=scores.dtype)
        )
        return scores - self.frequency * counts - self.presence * (counts > 0)


class LogprobRecord(LogitsProcessor):
    """Record how likely each token was, and which tokens were the likeliest; it changes nothing.

    Args:
        alternatives: how many of the likeliest.
    """

    def __init__(self, alternatives: int):
        self.alternatives = alternatives
        self.found: list[TokenLogprob] = []
        self.pending: torch.Tensor | None = None
        """`[V]`, of the position whose token is not chosen yet."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Take `scores [1, V]` after the text `input_ids [1, T]`, and return them as they are."""
        self.add(int(input_ids[0, -1]))
        self.pending = scores[0].float().log_softmax(-1)
        return scores

    def add(self, token: int) -> None:
        """Record that this token was chosen, unless that is recorded."""
        if self.pending is None:
            return
        values, places = self.pending.topk(min(self.alternatives, len(self.pending)))
        top = tuple(zip(places.tolist(), values.tolist(), strict=True))
        self.found.append(TokenLogprob(token, float(self.pending[token]), top))
        self.pending = None

    def take(self, last: int) -> list[TokenLogprob]:
        """Return what is new, up to the token `last`, which was chosen last."""
        self.add(last)
        found, self.found = self.found, []
        return found
