# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Import a user's cache before a decode, and export it afterwards as plain `generate` would leave it.

This file travels with every pushed draft. The draft's context is stored on the cache, as its attribute `dflash`. So the
second turn of a conversation accepts as many tokens as the first. Plain code may have changed the cache in between.
Then each row takes what context still belongs to its keys, and the draft does not see the other slots. The text is the
same.

Shapes: B rows, P prompt tokens, T slots, L cached slots, N new positions, H key and value heads, D head dim.
"""

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .attention_dflash import pad_to
from .cache_dflash import SlotCache, SlotLayer, restore_states, roll_back, states_of
from .compat_dflash import cache_in, mask_length, set_slots_seen
from .drafter_dflash import DraftState
from .findings_dflash import Finding
from .generation_dflash import DecodeState, run_chunk
from .proposals_dflash import ChainProposer
from .sequences_dflash import PREFILL_CHUNK, UNLIMITED, Prompt, StopConditions
from .target_dflash import Target, TargetState, windows

MARK_SIZE = 8
"""Numbers of a slot's deepest key that tell whose context it is."""

TEXT_INPUTS = {"attention_mask", "position_ids", "use_cache", "token_type_ids", "mm_token_type_ids"}
"""What `generate` prepares for a prompt that is text."""


HOLDS_TEXT = (CacheLayerMixin, LinearAttentionLayer)
"""Layers of a cache that hold something of a text; layers that share another's keys do not."""


# What the cache holds, and what follows -------------------------------------------------------------------------------


def num_cached(cache: Cache | None) -> int:
    """Return how many slots a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def lay_out(input_ids: torch.Tensor, inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return `inputs` with a mask and positions that cover the cached slots and the tokens that follow, no more.

    What follows is what plain `generate` feeds. That is the part of `input_ids` that is not cached, where mask and ids
    have one length, and all of it otherwise. Of a prompt that is cached as a whole it is all of it, too.

    Args:
        input_ids `[B, P]`.
        config: the prepared generation config.

    Raises:
        ValueError: nothing follows, or the mask hides some slots and covers others than these.
    """
    if inputs.get("inputs_embeds") is not None:
        return inputs  # they come without a cache that holds anything
    cached, length = num_cached(cache_in(inputs)), input_ids.shape[1]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    covered = mask_length(config) if mask is None else mask.shape[1]
    fed = _num_fed(length, cached) if covered == length else length
    if fed < 1:
        raise ValueError(
            f"The cache holds {cached} slots, more than the prompt of {length} tokens, so nothing is left to feed. "
            "Plain `generate` cannot go on from it either. Take the cache back (cache.crop), or pass new tokens with "
            "an attention_mask that covers the cached slots too."
        )
    width, laid_out = cached + fed, dict(inputs)
    if mask is not None:
        laid_out["attention_mask"] = _mask_over(mask, width, cached)
    if positions is not None:
        laid_out["position_ids"] = _positions_over(positions, width, fed)
    return laid_out


def _num_fed(length: int, cached: int) -> int:
    """Return how many of the prompt's last tokens plain `generate` feeds: those of `input_ids[:, cached - length:]`."""
    return length - cached if cached < length else 2 * length - cached


def _mask_over(mask: torch.Tensor, width: int, cached: int) -> torch.Tensor:
    """Return the part `[B, width]` of a mask; refuse one that shows less, or that hides later slots."""
    if mask.shape[1] < width or bool((mask[:, width:] == 0).any()):
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} slots, but the cache holds {cached} and {width - cached} follow, "
            f"so new tokens would be hidden from themselves. Pass a mask of {width}; or, if the cache holds the end of "
            "this prompt already, take it back first (cache.crop)."
        )
    return mask[:, :width]


def _positions_over(positions: torch.Tensor, width: int, fed: int) -> torch.Tensor:
    """Return positions `[..., width]` whose last `fed` are those of the tokens to feed; others are never read."""
    if positions.shape[-1] < fed:
        raise ValueError(
            f"position_ids covers {positions.shape[-1]} positions, but {fed} tokens are to be fed: pass {fed} or more."
        )
    missing = max(0, width - positions.shape[-1])
    return pad(positions, (missing, 0))[..., -width:]


def cache_findings(
    prompt: Prompt, target: Target, stop_conditions: StopConditions
) -> Iterator[Finding]:
    """Yield every reason not to carry a cache on, or not to leave this decode in it."""
    cache = prompt.cache
    cached = num_cached(cache)
    if cache is None or not (cached or prompt.cache_is_wanted):
        return
    template = DynamicCache(config=target.text).layers
    yield from _layer_findings(cache, template, target.name)
    for layer in cache.layers:
        yield from _state_findings(layer, len(prompt.input_ids))
    yield from _room_findings(cache, prompt, target, stop_conditions)
    others = [
        name
        for name in sorted(set(prompt.inputs) - TEXT_INPUTS)
        if _holds_tensors(prompt.inputs[name])
    ]
    if cached and others:
        names = ", ".join(others)
        what = f"The cache holds {cached} slots, and {names} would follow them"
        yield Finding(what, names, "text", "Pass images and the like without a cache")


def _holds_tensors(value: Any) -> bool:
    """Tell whether an input is a tensor, or a container with one."""
    if isinstance(value, dict):
        return any(_holds_tensors(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(part) for part in value)
    return isinstance(value, torch.Tensor)


def _layer_findings(cache: Cache, template: list[Any], name: str) -> Iterator[Finding]:
    """Refuse a cache whose layers are not those of the target. One without layers makes them when it is used."""
    kinds = [type(layer).__name__ for layer in cache.layers]
    expected = [type(layer).__name__ for layer in template]
    recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in template)
    if not kinds and recurrent:
        what = f"The cache was made without a config, but {name} keeps recurrent state"
        yield Finding(what, kinds, expected, "Pass DynamicCache(config=target.config)")
    elif kinds and any(isinstance(layer, HOLDS_TEXT) for layer in template[len(kinds) :]):
        what = f"The cache has {len(kinds)} layers, but {name} has {len(expected)}"
        yield Finding(what, len(kinds), len(expected), "Pass a cache of this target")
    for index, (theirs, own) in enumerate(zip(cache.layers, template, strict=False)):
        if not _fits(theirs, own):
            what = f"Layer {index} of the cache is a {kinds[index]}, but {name} keeps a {expected[index]} there"
            yield Finding(what, kinds[index], expected[index], "Pass a cache of this target")


def _fits(theirs: Any, own: Any) -> bool:
    """Tell whether a layer of a user's cache holds what `own`, a layer of the target, does."""
    if isinstance(own, LinearAttentionLayer) and not isinstance(theirs, LinearAttentionLayer):
        return False
    if "Quantized" in type(theirs).__name__:
        return False
    return not isinstance(own, DynamicLayer) or isinstance(theirs, DynamicLayer | StaticLayer)


def _state_findings(layer: Any, rows: int) -> Iterator[Finding]:
    """Refuse a layer that holds other rows, or more of a recurrent state than the last of it."""
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.ndim == 4 and keys.shape[0] != rows:
        what = f"The cache holds {keys.shape[0]} rows, and input_ids has {rows}"
        yield Finding(
            what, keys.shape[0], rows, "Repeat or select its rows (cache.batch_repeat_interleave)"
        )
    if isinstance(layer, LinearAttentionLayer) and layer.record_past:
        what = "The cache records the past of its recurrent layers, which a draft does not run token by token"
        yield Finding(what, "record_past", "a cache as it is made", "Set record_past to False")


def _room_findings(
    cache: Cache, prompt: Prompt, target: Target, stop_conditions: StopConditions
) -> Iterator[Finding]:
    """Refuse a text that outgrows a static cache: the prompt, or the whole where nothing but its length ends it."""
    needed, room = prompt.width, _room(cache, target)
    if stop_conditions.is_length_alone:
        needed = prompt.first_id_slot + stop_conditions.max_length - 1
    if needed > room:
        what = f"The text takes {needed} slots, but the cache has room for {room}"
        yield Finding(what, needed, room, "Pass one with a larger max_cache_len")


def _room(cache: Cache, target: Target) -> int:
    """Return how many slots a cache can hold. A static layer of a window's size can hold any number."""
    sizes = [UNLIMITED]
    for layer, window in zip(cache.layers, windows(target.text), strict=False):
        if isinstance(layer, StaticLayer) and (window is None or layer.max_cache_len < window):
            sizes.append(layer.max_cache_len)
    return min(sizes)


# The draft's context --------------------------------------------------------------------------------------------------


@dataclass
class DraftContext:
    """Hold a draft's context for the slots of a target's cache. It does not outlive a process: a pickle of it is None.

    Args:
        marks `[B, T, 8 or less]`: a part of the target's deepest keys, by which each row finds its context again.
        hidden `[B, T]`: True at slots that hold no context.
    """

    draft: "weakref.ref[Any]"
    cache: SlotCache
    marks: torch.Tensor
    hidden: torch.Tensor

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> "DraftContext":
        cache = copy.deepcopy(self.cache, memo)
        return DraftContext(self.draft, cache, self.marks.clone(), self.hidden.clone())

    def follow(self, marks: torch.Tensor, first: int) -> bool:
        """Give each row the context of a row with the same keys, as far as they are the same, and hide the rest of it.

        Args:
            marks `[B, L, 8 or less]`: of the rows to follow.
            first: the first slot whose marks are known.

        Returns:
            Whether any of the context belongs to these keys.
        """
        last = min(marks.shape[1], self.marks.shape[1])
        rows, lengths = matching_rows(marks[:, first:last], self.marks[:, first:last])
        if not any(lengths):
            return False
        if rows != list(range(len(self.marks))):
            self.cache.select_rows(rows)
        device = self.hidden.device
        common = torch.tensor(lengths, device=device)
        ends = torch.where(common > 0, first + common, 0)
        known = self.hidden[torch.tensor(rows, device=device), :last]
        hidden = pad(known, (0, marks.shape[1] - last), value=True)
        self.hidden = hidden | (torch.arange(marks.shape[1], device=device) >= ends[:, None])
        self.marks = marks.clone()
        return True


def matching_rows(marks: torch.Tensor, others: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return, for each row of `marks [B, N, D]`, the row of `others [C, N, D]` with the longest common beginning.

    Returns:
        The rows, and the lengths of those beginnings.
    """
    if marks.dtype != others.dtype:
        return [0] * len(marks), [0] * len(marks)
    found = []
    for row in marks:
        same = (row == others.to(row.device)).all(dim=-1)  # [C, N]
        found.append(torch.stack(same.cumprod(dim=1).sum(dim=1).max(dim=0)))
    lengths, rows = torch.stack(found, dim=1).tolist()
    return rows, lengths


def deepest(cache: SlotCache) -> SlotLayer:
    """Return the last layer with keys, one without a window where there is one: its keys depend on the whole text."""
    layers = list(cache.slot_layers.values())
    whole = [layer for layer in layers if not layer.is_sliding]
    return (whole or layers)[-1]


def _marks(layer: SlotLayer, slots: int) -> torch.Tensor:
    """Return the marks of the first slots, `[B, slots, 8 or less]`."""
    return layer.keys[:, :slots, 0, :MARK_SIZE]


# Import ---------------------------------------------------------------------------------------------------------------


def import_past_key_values(
    cache: Cache | None, target_state: TargetState, chain: ChainProposer | None
) -> int:
    """Copy what `cache` holds, which `cache_findings` has checked, into the slots of target and draft.

    Args:
        chain: the draft's own proposer; None without a draft.

    Returns:
        How many slots that is.
    """
    slots = num_cached(cache)
    if cache is None or not slots:
        return 0
    target_state.cache.reserve(slots)
    for ours, theirs in zip(target_state.cache.layers, cache.layers, strict=False):
        if isinstance(ours, SlotLayer):
            keys, values = held(theirs, slots)
            ours.lazy_initialization(keys, values)
            ours.fill(slots - keys.shape[2], keys, values)
    _import_states(cache, target_state)
    target_state.cache.num_prefilled = slots
    if chain is not None:
        _import_context(getattr(cache, "dflash", None), target_state, chain)
    return slots


def _import_context(context: Any, target_state: TargetState, chain: ChainProposer) -> None:
    """Let the draft read what of `context` belongs to the target's keys, and hide all other cached slots from it."""
    layer, slots = deepest(target_state.cache), target_state.cache.num_prefilled
    draft, draft_state = chain.drafter.draft, chain.draft_state
    first = slots - layer.num_written
    own = context if isinstance(context, DraftContext) and context.draft() is draft else None
    if own is not None and own.follow(_marks(layer, slots), first):
        own.cache.move(draft.device, draft.dtype)
        draft_state.cache = own.cache
        draft_state.hide(own.hidden)
    else:
        hidden = layer.keys.new_ones(len(layer.keys), slots, dtype=torch.bool)
        draft_state.hide(hidden)


def _import_states(cache: Cache, target_state: TargetState) -> None:
    for ours, theirs in zip(target_state.cache.layers, cache.layers, strict=False):
        if isinstance(ours, LinearAttentionLayer):
            restore_states(ours, states_of(theirs))


def held(layer: Any, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer holds of the first `slots` slots: keys and values of the last ones, `[B, H, N, D]`."""
    keys, values = layer.keys, layer.values
    return keys[:, :, :slots], values[:, :, :slots]


# Export ---------------------------------------------------------------------------------------------------------------


def export_past_key_values(state: DecodeState, chain: ChainProposer | None) -> Cache | None:
    """Fill the cache that `generate` came with, with every slot but the last token's; large layers as views.

    Args:
        chain: the draft's own proposer. Without a draft, what another left on the cache stays: it belongs to its keys.

    Returns:
        The cache; None where nobody asked for it.

    Raises:
        ValueError: the text has outgrown a static cache.
    """
    prompt, cache = state.prompt, state.prompt.cache
    if cache is None or not prompt.cache_is_wanted:
        return None
    output_ids = state.sequences.output_ids()
    slots = prompt.width + state.sequences.longest - 1
    room = _room(cache, state.target)
    if slots > room:
        raise ValueError(
            f"The text takes {slots} slots, but the cache has room for {room}, so it was not changed. Pass one with a "
            "larger max_cache_len."
        )
    if chain is not None:
        chain.drafter.flush_pending(chain.draft_state)
    if state.target_state.recurrent.states and max(state.last_slots) > slots:
        _run_again(state, output_ids)
    else:
        _complete(state, chain, output_ids)
    # A cache made without a config makes its layers when used, up to the last that has keys.
    if not cache.layers:
        count = max(state.target_state.cache.slot_layers) + 1
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(count))
    for ours, theirs in zip(state.target_state.cache.layers, cache.layers, strict=False):
        if isinstance(ours, SlotLayer):
            _export_keys(ours, theirs, slots)
        if isinstance(ours, LinearAttentionLayer):
            _export_states(ours, theirs)
    if chain is not None:
        cache.dflash = _context(state, chain, slots)
    return cache


def _context(state: DecodeState, chain: ChainProposer, slots: int) -> DraftContext | None:
    """Return the draft's context of the first slots; None where the draft was given none."""
    draft_state = chain.draft_state
    if not _has_context(draft_state):
        return None
    marks = _marks(deepest(state.target_state.cache), slots).clone()
    hidden = pad_to(draft_state.padding_mask, slots)[:, :slots]
    return DraftContext(weakref.ref(chain.drafter.draft), draft_state.cache, marks, hidden)


def _has_context(draft_state: DraftState) -> bool:
    """Return whether the draft has context; a proposer of one's own may not have passed it on."""
    return all(layer.is_initialized for layer in draft_state.cache.slot_layers.values())


def _export_keys(ours: SlotLayer, theirs: Any, slots: int) -> None:
    if isinstance(theirs, StaticLayer):
        _fill_static(ours, theirs, slots)
        return
    # A layer that was made without a config has none.
    window = getattr(theirs, "sliding_window", None)
    first = 0 if window is None else max(0, slots - window + 1)
    if getattr(theirs, "record_past", False):
        # It holds every slot since its first, until it is cropped.
        before = theirs.keys.shape[2] if theirs.get_seq_length() else 0
        first = theirs.get_seq_length() - before
    keys, values = (states[:, first:slots].transpose(1, 2) for states in (ours.keys, ours.values))
    if first:  # A part is copied, so that the rest of the buffer is freed.
        keys, values = keys.contiguous(), values.contiguous()
    if not theirs.is_initialized:
        theirs.lazy_initialization(keys, values)
    theirs.keys, theirs.values = keys, values
    if window is not None:
        set_slots_seen(theirs, slots)


def _fill_static(ours: SlotLayer, theirs: StaticLayer, slots: int) -> None:
    """Fill a layer in place, since compiled code knows where it lies."""
    if not theirs.is_initialized:
        theirs.lazy_initialization(*ours.read(1))
    first = max(0, slots - theirs.max_cache_len)
    for states, buffer in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        buffer[:, :, : slots - first] = states[:, first:slots].transpose(1, 2)
    set_slots_seen(theirs, slots)


def _export_states(ours: LinearAttentionLayer, theirs: LinearAttentionLayer) -> None:
    """Put the states into a layer, in place where it holds some already, since compiled code knows where they lie."""
    saved = states_of(ours)
    for name in ("conv_states", "recurrent_states"):
        before = getattr(theirs, name)
        for key, state in saved[name].items():
            if before.get(key) is not None and state is not None:
                saved[name][key] = before[key].copy_(state)
    vars(theirs).update(saved)


def _complete(state: DecodeState, chain: ChainProposer | None, output_ids: torch.Tensor) -> None:
    """Run the slots that rows which ended early lack, as plain `generate` does: the end of their text, and padding.

    Args:
        output_ids `[B, T]`.
    """
    last = state.prompt.first_id_slot + output_ids.shape[1] - 1
    missing = [max(0, last - slot) for slot in state.last_slots]
    begin = torch.tensor(state.last_slots, device=output_ids.device)[:, None]
    for start in range(0, max(missing), PREFILL_CHUNK):
        size = min(PREFILL_CHUNK, max(missing) - start)
        slots = begin + torch.arange(start, start + size, device=output_ids.device)
        snapshot = state.target_state.recurrent.snapshot()
        features = _run_slots(state, output_ids, slots)
        state.target_state.recurrent.record_inputs(snapshot, state.target.name)
        committed = [min(max(0, count - start), size) for count in missing]
        roll_back(state.target_state.recurrent, snapshot, committed, size)
        if chain is not None and _has_context(chain.draft_state):
            chain.drafter.cache_at(chain.draft_state, features, slots)


def _run_slots(state: DecodeState, output_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Run the text at `slots [B, N]`, its last token after the end of it, and return the features `[B, N, F]`."""
    index = (slots - state.prompt.first_id_slot).clamp_max(output_ids.shape[1] - 1)
    ids = output_ids.gather(1, index)
    positions = state.prompt.position_offset + slots
    return state.target.prefill_chunk(state.target_state, ids, slots, positions).features


def _run_again(state: DecodeState, output_ids: torch.Tensor) -> None:
    """Compute recurrent state again, where a row's went past the end of the text, which no snapshot takes back."""
    prompt, target_state = state.prompt, state.target_state
    cached = num_cached(prompt.cache)
    for layer in target_state.recurrent.states.values():
        restore_states(layer, vars(LinearAttentionLayer(number_of_states=layer.number_of_states)))
    if cached:
        _import_states(prompt.cache, target_state)
    target_state.cache.num_prefilled = cached
    for first, last in prompt.chunks(cached, recurrent=True):
        run_chunk(state, first, last, 1)
    end = prompt.first_id_slot + output_ids.shape[1] - 1
    for first in range(prompt.width, end, PREFILL_CHUNK):
        slots = torch.arange(first, min(first + PREFILL_CHUNK, end), device=output_ids.device)
        _run_slots(state, output_ids, slots.expand(len(output_ids), -1))
