# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A user's cache: imported before a decode, and exported after it as plain `generate` would leave it.

This file travels with every pushed draft. The draft's context is stored on the cache, as its attribute `dflash`. So the
second turn of a conversation accepts as many tokens as the first. Without it the draft sees the new turn only, and the
text is the same.

Shapes: B rows, T slots, L cached slots, H key and value heads, D head dim.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from .cache_dflash import SlotCache, SlotLayer, states_of
from .compat_dflash import set_slots_seen
from .drafter_dflash import Drafter, DraftState
from .generation_dflash import DecodeState
from .target_dflash import TargetState


@dataclass
class DraftContext:
    """A draft's context for the slots of a target's cache."""

    draft: "weakref.ref[Any]"
    cache: SlotCache
    num_slots: int


def import_past_key_values(
    cache: Cache | None, target_state: TargetState, drafter: Drafter, draft_state: DraftState
) -> int:
    """Copy what `cache` holds into the slots of target and draft.

    Returns:
        How many slots that is.

    Raises:
        ValueError: the cache holds its keys and values in another form than a `DynamicCache` does.
    """
    if cache is None or not cache.get_seq_length():
        return 0
    slots = int(cache.get_seq_length())
    target_state.cache.reserve(slots)
    for ours, theirs in zip(target_state.cache.layers, cache.layers, strict=True):
        if isinstance(ours, SlotLayer):
            _import_keys(ours, theirs, slots)
        if isinstance(ours, LinearAttentionLayer):
            vars(ours).update(states_of(theirs))
    target_state.cache.num_prefilled = slots
    context = getattr(cache, "dflash", None)
    if context is not None and context.draft() is drafter.draft and context.num_slots == slots:
        draft_state.cache = writable(context.cache)
    else:
        draft_state.mask_context(slots)
    return slots


def writable(cache: SlotCache) -> SlotCache:
    """Return a cache whose buffers can be written now: those made in inference mode cannot be outside of it."""
    for layer in cache.slot_layers.values():
        if (
            layer.is_initialized
            and layer.keys.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def _import_keys(ours: SlotLayer, theirs: Any, slots: int) -> None:
    if not isinstance(theirs, DynamicLayer):
        raise ValueError(
            f"The cache holds a {type(theirs).__name__}; pass a DynamicCache, whose keys can be read as they are."
        )
    ours.lazy_initialization(theirs.keys, theirs.values)
    ours.fill(slots - theirs.keys.shape[2], theirs.keys, theirs.values)


def export_past_key_values(
    state: DecodeState, drafter: Drafter, draft_state: DraftState
) -> Cache | None:
    """Fill the cache that `generate` came with, with every slot but the last token's, as views of our buffers.

    Returns:
        The cache; None where nobody asked for it, or where it cannot be what plain `generate` leaves: it is no
        `DynamicCache` (`generate` made it for a cache_implementation), or rows with recurrent state ended apart.
    """
    prompt, cache = state.prompt, state.prompt.cache
    recurrent = bool(state.target_state.recurrent.states)
    ended_apart = len({len(tokens) for tokens in state.sequences.generated}) > 1
    if (
        not prompt.cache_is_wanted
        or not isinstance(cache, DynamicCache)
        or (ended_apart and recurrent)
    ):
        return None
    output_ids = state.sequences.output_ids()
    slots = prompt.num_cached + output_ids.shape[1] - 1
    if ended_apart:
        _complete(state, output_ids, slots)
    # A cache made without a config makes its layers when used.
    if not cache.layers and not recurrent:
        cache.layers.extend(
            cache.layer_class_to_replicate() for _ in state.target_state.cache.layers
        )
    for ours, theirs in zip(state.target_state.cache.layers, cache.layers, strict=True):
        if isinstance(ours, SlotLayer):
            _export_keys(ours, theirs, slots)
        if isinstance(ours, LinearAttentionLayer):
            vars(theirs).update(states_of(ours))
    drafter.flush_pending(draft_state)
    cache.dflash = DraftContext(weakref.ref(drafter.draft), draft_state.cache, slots)
    return cache


def _export_keys(ours: SlotLayer, theirs: Any, slots: int) -> None:
    # A layer that was made without a config has none.
    window = getattr(theirs, "sliding_window", None)
    first = 0 if window is None else max(0, slots - window + 1)
    keys, values = (states[:, first:slots].transpose(1, 2) for states in (ours.keys, ours.values))
    if not theirs.is_initialized:
        theirs.lazy_initialization(keys, values)
    theirs.keys, theirs.values = keys, values
    if window is not None:
        set_slots_seen(theirs, slots)


def _complete(state: DecodeState, output_ids: torch.Tensor, slots: int) -> None:
    """Cache the padding `[B, T]` after rows that ended early too, as plain `generate` does: one more forward."""
    first = min(state.last_slots)
    if first >= slots:
        return
    prompt = state.prompt
    where = torch.arange(first, slots, device=output_ids.device).expand(len(output_ids), -1)
    ids = output_ids[:, first - prompt.num_cached : slots - prompt.num_cached]
    state.target.prefill_chunk(state.target_state, ids, where, prompt.position_offset + where)
