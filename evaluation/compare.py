# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a draft does for a target on given prompts: the same text twice, plain and with DFlash, and the time of both."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..generation_dflash import DecodeStatistics, now


@dataclass(frozen=True)
class Comparison:
    """One or more prompts, generated twice. Times are seconds, prefill included."""

    plain: tuple[tuple[int, ...], ...]
    """New tokens of the target alone, one entry per prompt."""
    dflash: tuple[tuple[int, ...], ...]
    plain_seconds: float
    dflash_seconds: float
    committed: tuple[int, ...]
    """Tokens committed in each cycle, over all prompts."""

    @property
    def identical(self) -> bool:
        return self.plain == self.dflash

    @property
    def plain_rate(self) -> float:
        """Tokens per second of the target alone."""
        return sum(map(len, self.plain)) / self.plain_seconds

    @property
    def dflash_rate(self) -> float:
        return sum(map(len, self.dflash)) / self.dflash_seconds

    @property
    def acceptance_length(self) -> float:
        """Return the tokens committed per cycle, pooled over all prompts."""
        return DecodeStatistics(committed=list(self.committed)).acceptance_length

    @property
    def histogram(self) -> dict[int, int]:
        """Tokens in a cycle -> how many cycles committed that many."""
        return dict(sorted(Counter(self.committed).items()))

    def __add__(self, other: "Comparison") -> "Comparison":
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
) -> Comparison:
    """Generate greedily from `input_ids [1, P]`, with DFlash and then with the target alone, and time both.

    Args:
        streamer: told the tokens of the first, one by one.
        capture: how blocks are run, as in `target.generate(..., custom_generate=draft.speculate, capture=...)`.
    """
    statistics = DecodeStatistics()
    ours_alone = {"custom_generate": draft.speculate, "statistics": statistics, "capture": capture}
    ours, ours_seconds = _timed(
        target, lambda: greedy(target, input_ids, max_new_tokens, streamer=streamer, **ours_alone)
    )
    plain, plain_seconds = _timed(target, lambda: greedy(target, input_ids, max_new_tokens))
    prompt = input_ids.shape[1]
    return Comparison(
        plain=(tuple(plain[0, prompt:].tolist()),),
        dflash=(tuple(ours[0, prompt:].tolist()),),
        plain_seconds=plain_seconds,
        dflash_seconds=ours_seconds,
        committed=tuple(statistics.committed),
    )


def warm_up(draft: Any, target: Any, input_ids: torch.Tensor, capture: str = "auto") -> None:
    """Both ways, briefly: first calls pay for what later ones do not."""
    for _ in range(3 if capture == "compile" else 1):
        compare(
            draft, target, input_ids, max_new_tokens=4 * draft.config.block_size, capture=capture
        )


def greedy(target: Any, input_ids: torch.Tensor, max_new_tokens: int, **ways: Any) -> torch.Tensor:
    """`[1, P + new]`: the target's own greedy text, without the penalties its generation config may ask for."""
    plain = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    stops = list(stop_token_ids(target)) or None
    return target.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0] if stops else 0,
        **plain,
        **ways,
    )


def stop_token_ids(target: Any) -> tuple[int, ...]:
    """The ids that end the target's text, from its generation config."""
    eos = target.generation_config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _timed(target: Any, run: Callable[[], Any]) -> tuple[Any, float]:
    started = now(target.device)
    result = run()
    return result, now(target.device) - started
