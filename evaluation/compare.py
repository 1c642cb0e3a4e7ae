# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Generate from a prompt twice, with the target alone and with DFlash; compare text and time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..calls_dflash import check_ids, check_loaded
from ..generation_dflash import DecodeStatistics, now
from ..layouts_dflash import shown


@dataclass(frozen=True)
class Comparison:
    """Hold the results of one or more prompts, each generated twice. Times are seconds, including prefill."""

    plain: tuple[tuple[int, ...], ...]
    """New tokens of the target alone, one entry per prompt."""
    dflash: tuple[tuple[int, ...], ...]
    """New tokens with DFlash, likewise."""
    plain_seconds: float
    dflash_seconds: float
    committed: tuple[int, ...]
    """Tokens committed in each cycle, over all prompts."""

    @property
    def identical(self) -> bool:
        """Whether both texts are the same for every prompt."""
        return self.plain == self.dflash

    @property
    def plain_rate(self) -> float:
        """Tokens per second of the target alone."""
        return sum(map(len, self.plain)) / self.plain_seconds

    @property
    def dflash_rate(self) -> float:
        """Tokens per second with DFlash."""
        return sum(map(len, self.dflash)) / self.dflash_seconds

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per cycle, pooled over all prompts."""
        return DecodeStatistics(committed=list(self.committed)).acceptance_length

    @property
    def histogram(self) -> dict[int, int]:
        """Number of cycles by the number of tokens that they committed."""
        return dict(sorted(Counter(self.committed).items()))

    def __add__(self, other: "Comparison") -> "Comparison":
        """Return the results of both sets of prompts together."""
        return Comparison(
            self.plain + other.plain,
            self.dflash + other.dflash,
            self.plain_seconds + other.plain_seconds,
            self.dflash_seconds + other.dflash_seconds,
            self.committed + other.committed,
        )


def compare(
    draft: Any,
    target: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    streamer: Any = None,
    capture: str = "auto",
    proposal: str = "auto",
) -> Comparison:
    """Generate greedily from `input_ids [1, P]`, with DFlash and then with the target alone, and time both.

    Args:
        streamer: receives the tokens of the run with DFlash.
        capture, proposal: as in `target.generate(..., custom_generate=draft.speculate, capture=...)`.
    """
    if not hasattr(draft, "speculate") or isinstance(draft, type):
        raise ValueError(f"draft is {shown(draft)}; pass a loaded draft, load_draft(...).")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer is {shown(streamer)}; pass a TextStreamer.")
    statistics = DecodeStatistics()
    generate_kwargs = {
        "custom_generate": draft.speculate,
        "statistics": statistics,
        "capture": capture,
        "proposal": proposal,
    }
    generate_kwargs["streamer"] = streamer
    dflash, dflash_seconds = _timed(
        target, lambda: greedy(target, input_ids, max_new_tokens, **generate_kwargs)
    )
    plain, plain_seconds = _timed(target, lambda: greedy(target, input_ids, max_new_tokens))
    prompt = input_ids.shape[1]
    return Comparison(
        plain=(tuple(plain[0, prompt:].tolist()),),
        dflash=(tuple(dflash[0, prompt:].tolist()),),
        plain_seconds=plain_seconds,
        dflash_seconds=dflash_seconds,
        committed=tuple(statistics.committed),
    )


def warm_up(draft: Any, target: Any, input_ids: torch.Tensor, capture: str = "auto") -> None:
    """Generate a short text both ways, so that one-time costs do not count in later timings."""
    size = getattr(getattr(draft, "config", None), "block_size", 1)  # `compare` checks the draft
    new_tokens = 4 * size
    if room := positions_left(target, input_ids):
        new_tokens = min(new_tokens, room)
    for _ in range(3 if capture == "compile" else 1):
        compare(draft, target, input_ids, new_tokens, capture=capture)


def greedy(
    target: Any, input_ids: torch.Tensor, max_new_tokens: int, **generate_kwargs: Any
) -> torch.Tensor:
    """Generate greedily from `input_ids [1, P]`, without penalties of the generation config; return `[1, P + new]`."""
    check_loaded("target", target)
    check_ids(input_ids)
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be an int, 1 or more.")
    return target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **without_penalties(target),
        **generate_kwargs,
    )


def without_penalties(target: Any) -> dict[str, Any]:
    """Return the arguments of `generate` that end texts as the target does, and turn its penalties off."""
    stops = list(stop_token_ids(target)) or None
    return {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": stops,
        "pad_token_id": stops[0] if stops else 0,
    }


def stop_token_ids(target: Any) -> tuple[int, ...]:
    """Return the end tokens of the target's generation config."""
    check_loaded("target", target)
    eos = target.generation_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def positions_left(target: Any, input_ids: torch.Tensor) -> int | None:
    """Return how many tokens fit after `input_ids [1, P]` into the target's positions; None if it names none."""
    check_loaded("target", target)
    check_ids(input_ids)
    text = target.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    return None if positions is None else positions - input_ids.shape[1]


def _timed(target: Any, run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `run` and the seconds it took."""
    check_loaded("target", target)
    started = now(target.device)
    result = run()
    return result, now(target.device) - started
