# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What is decoded: the choices of a request, and how their tokens are chosen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.decoding import Cycle
from .requests import GenerationRequest

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: scores divided by less overflow. So they are in vLLM."""


@dataclass(frozen=True)
class Options:
    """Say how tokens are chosen. Choices with equal options may be rows of one batch.

    Args:
        keywords: of `generate`, sorted by name.
        penalties: for tokens that the text has already, and for each time it has them; () for none.
        seed: of the noise; None for another every time, or where nothing is drawn.
        alternatives: how many of the likeliest tokens to tell at each position; None for no probabilities.
        alone: whether the text would depend on what else is in the batch.
    """

    keywords: tuple[tuple[str, Any], ...]
    penalties: tuple[float, ...] = ()
    seed: int | None = None
    alternatives: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Hold the log probability of a token of the text, and those of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Piece:
    """Hold a piece of an answer.

    Args:
        finish: why the answer ends with it, "stop" or "length"; "" where it goes on.
        tokens: how many tokens it stands for.
        cycles: of the whole answer, with its last piece.
        error: why decoding failed; the answer ends with it too.
        ids: of its tokens, without one that ends the answer.
    """

    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    error: str = ""
    ids: list[int] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        return bool(self.finish or self.error)


@dataclass(eq=False)
class Choice:
    """Hold one text to decode.

    Args:
        prompt: token ids.
        limit: tokens at most.
        deliver: takes each piece of the answer, in the thread that decodes.
    """

    prompt: list[int]
    options: Options
    limit: int
    stops: tuple[str, ...]
    deliver: Callable[[Piece], None]
    cancelled: bool = False
    """Whether its client has left."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and text at most."""
        return len(self.prompt) + self.limit


def options_of(asked: GenerationRequest, defaults: Any, number: int = 0) -> Options:
    """Return how a request wants the tokens of one of its choices to be chosen.

    What it leaves open is as `generate` does it: by the target's own generation config.

    Args:
        defaults: the target's generation config.
        number: of the choice, which is added to the seed.
    """
    keywords = _sampling(asked, defaults)
    if asked.repetition_penalty is not None:
        keywords["repetition_penalty"] = asked.repetition_penalty
    if asked.logit_bias:
        biases = sorted(asked.logit_bias.items())
        keywords["sequence_bias"] = tuple(((token,), bias) for token, bias in biases)
    penalties = (asked.presence_penalty, asked.frequency_penalty)
    seed = None
    if asked.seed is not None and keywords["do_sample"]:
        seed = (asked.seed + number) % 2**63
    alone = (
        any(penalties)
        or seed is not None
        or asked.alternatives is not None
        or reads_prompt(keywords, defaults)
    )
    return Options(
        tuple(sorted(keywords.items())),
        penalties if any(penalties) else (),
        seed,
        asked.alternatives,
        alone,
    )


def _sampling(asked: GenerationRequest, defaults: Any) -> dict[str, Any]:
    """Return the keywords of `generate` that draw tokens; without a temperature, as the target's config says."""
    own = {
        name: getattr(defaults, name, None) for name in ("temperature", "top_p", "top_k", "min_p")
    }
    given = {name: getattr(asked, name) for name in own}
    temperature = given["temperature"]
    if temperature is None:
        narrowed = any(given[name] is not None for name in ("top_p", "top_k", "min_p"))
        draws = narrowed or bool(getattr(defaults, "do_sample", False))
    else:
        draws = temperature >= GREEDY_BELOW
    if not draws:
        return {"do_sample": False}
    found = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for values in (own, given):
        found.update({name: value for name, value in values.items() if value is not None})
    found["top_k"] = max(found["top_k"], 0)  # -1 and 0 both stand for all
    return found


def reads_prompt(keywords: dict[str, Any], defaults: Any) -> bool:
    """Tell whether processors read the prompt, which is padded in a batch."""
    penalty = keywords.get("repetition_penalty", getattr(defaults, "repetition_penalty", None))
    others = ("no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
    found = [penalty, *(getattr(defaults, name, None) for name in others)]
    return any(value not in (None, 0, 1.0) for value in found)
