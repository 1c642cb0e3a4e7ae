# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keys and values of target and draft, and taking rejected tokens back. The only file that knows transformers' caches.

This file travels with every pushed draft.
"""

from typing import Any

from transformers.cache_utils import Cache, DynamicCache

_REWINDABLE = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def rewindable_cache(config: Any) -> Cache:
    """A fresh cache from which tokens can be taken back, for a model of this config.

    Raises:
        ValueError: the model keeps state that cannot be put back after a rejection (recurrent, convolutional ...).
    """
    cache = DynamicCache(config=config)
    kinds = {type(layer).__name__ for layer in cache.layers} - _REWINDABLE
    if kinds:
        raise ValueError(
            f"{config.model_type} keeps state that cannot be put back exactly after a rejected token "
            f"({', '.join(sorted(kinds))}), so it is not decoded here: its text could come out wrong."
        )
    cache.activate_past_recording()
    return cache


def rewind(cache: Cache, tokens: int) -> None:
    """Take the last `tokens` out of `cache`. Call it after every forward, with 0 too: windows are trimmed here."""
    cache.crop(-tokens)
