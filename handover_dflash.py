# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A conversation's cache, taken over at the start of a decode and left, at its end, as plain `generate` leaves it.

This file travels with every pushed draft. The draft's own context rides along on the cache, so that the second turn of
a conversation accepts as many tokens as the first; without it the draft sees the new turn only, and the text is the
same.

Shapes: B rows, L cached columns, H key and value heads, D head dim.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from .cache_dflash import ColumnLayer
from .compat_dflash import set_columns_seen
from .drafting_dflash import Drafter
from .recurrence_dflash import states_of
from .target_dflash import Target


@dataclass
class Companion:
    """A draft's context for the columns of a target's cache."""

    draft: "weakref.ref[Any]"
    keys: Any
    columns: int


def take_over(cache: Cache | None, target: Target, drafter: Drafter) -> int:
    """Copy what `cache` holds into the columns of target and draft; how many columns that is.

    Raises:
        ValueError: the cache keeps its keys and values in a form that is not theirs.
    """
    if cache is None or not cache.get_seq_length():
        return 0
    columns = int(cache.get_seq_length())
    target.cache.reserve(columns)
    for ours, theirs in zip(target.cache.layers, cache.layers, strict=True):
        if isinstance(ours, ColumnLayer):
            _take_keys(ours, theirs, columns)
        if isinstance(ours, LinearAttentionLayer):
            vars(ours).update(states_of(theirs))
    target.cache.seen = columns
    companion = getattr(cache, "dflash", None)
    if companion is not None and companion.draft() is drafter.draft and companion.columns == columns:
        drafter.cache = companion.keys
    else:
        drafter.hide(columns)
    return columns


def _take_keys(ours: ColumnLayer, theirs: Any, columns: int) -> None:
    if not isinstance(theirs, DynamicLayer):
        raise ValueError(
            f"The cache holds a {type(theirs).__name__}; pass a DynamicCache, whose keys can be read as they are."
        )
    ours.lazy_initialization(theirs.keys, theirs.values)
    ours.fill(columns - theirs.keys.shape[2], theirs.keys, theirs.values)


def give_back(pair: Any) -> None:
    """Leave every column but the last token's in the cache that `generate` came with, as views of our buffers."""
    if not pair.prompt.cache_is_kept:
        return
    if not isinstance(pair.prompt.cache, DynamicCache):  # made by `generate` for a cache_implementation
        pair.prompt.cache = None
        return
    sequences = pair.texts.sequences()
    columns = pair.prompt.before + sequences.shape[1] - 1
    if len({len(new) for new in pair.texts.new}) > 1:
        if pair.target.recurrence.states:
            pair.prompt.cache = None  # states of rows that ended apart cannot be brought to one column
            return
        _complete(pair, sequences, columns)
    layers = pair.prompt.cache.layers
    if not layers and not pair.target.recurrence.states:  # a cache made without a config makes its layers when used
        layers.extend(pair.prompt.cache.layer_class_to_replicate() for _ in pair.target.cache.layers)
    for ours, theirs in zip(pair.target.cache.layers, layers, strict=True):
        if isinstance(ours, ColumnLayer):
            _give_keys(ours, theirs, columns)
        if isinstance(ours, LinearAttentionLayer):
            vars(theirs).update(states_of(ours))
    pair.drafter.flush()
    pair.prompt.cache.dflash = Companion(weakref.ref(pair.draft), pair.drafter.cache, columns)


def _give_keys(ours: ColumnLayer, theirs: Any, columns: int) -> None:
    window = getattr(theirs, "sliding_window", None)  # one that was made without a config keeps everything
    first = 0 if window is None else max(0, columns - window + 1)
    keys, values = (states[:, first:columns].transpose(1, 2) for states in (ours.keys, ours.values))
    if not theirs.is_initialized:
        theirs.lazy_initialization(keys, values)
    theirs.keys, theirs.values = keys, values
    if window is not None:
        set_columns_seen(theirs, columns)


def _complete(pair: Any, sequences: torch.Tensor, columns: int) -> None:
    """One more forward, where rows ended at different columns: the padding after an end is cached like any token."""
    first = min(pair.columns)
    if first >= columns:
        return
    where = torch.arange(first, columns, device=sequences.device).expand(len(sequences), -1)
    ids = sequences[:, first - pair.prompt.before : columns - pair.prompt.before]
    pair.target.go_on(ids, where, pair.end + where, pair.hidden)
