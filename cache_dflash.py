# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Hold state that can be taken back: keys and values in fixed slots, and snapshots of recurrent state.

This file travels with every pushed draft. The prompt takes the slots of `input_ids`, padding included. Every new token
takes the next slot of its own row. Nothing is concatenated or cropped: a block overwrites what the block before it left
behind. Recurrent and convolutional state has no slots, so it is copied before a block. After a rejection the layers
that hold it run again, over the committed tokens only.

Shapes: B rows, N new positions, Q block positions, M slots, S slots of a buffer, L slots that attention reads (L <= S),
H key and value heads, D head dim.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer

from .compat_dflash import difference

BUCKET = 256
"""Buffers and reads are rounded up to this many slots, or to a sixteenth to an eighth of their size if that is more."""

_MIXERS = ("linear_attn", "mixer", "conv", "mamba", "mamba_decoder.mamba", "self_attn")
"""Where decoder layers hold the module that keeps recurrent state."""


def bucket(num_slots: int) -> int:
    """Return the smallest size of a buffer, or of a read, that holds this many slots."""
    step_of_size = 1 << max(num_slots.bit_length() - 4, 0)
    step = max(BUCKET, step_of_size)
    return -(-num_slots // step) * step


# Slots ----------------------------------------------------------------------------------------------------------------


class SlotLayer(CacheLayerMixin):
    """Hold keys and values of one layer, `[B, S, H, D]` each. A sliding layer keeps every slot too."""

    def __init__(self, owner: "SlotCache", is_sliding: bool = False):
        super().__init__()
        # In a circle of references, buffers would live until Python's collector finds them.
        self.owner, self.is_sliding = weakref.proxy(owner), is_sliding
        self.num_written = 0
        """Slots that were written since `SlotCache.check_written`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make buffers for the shapes of `key_states, value_states [B, H, N, D]`, which may differ in D."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(states.shape[0], self.owner.capacity, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a layer does not know its slots, `SlotView.update` does."""
        raise NotImplementedError(
            "A layer's cache was updated directly, so its slots are not known."
        )

    def write(
        self, parts: list[torch.Tensor], key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Write `[B, H, N, D]` to flat slots, one part `[B * n]` of the N positions after the other.

        A later part may overwrite an earlier one, which one write of all would do in no defined order.
        """
        begin = 0
        for flat_slots in parts:
            end = begin + flat_slots.numel() // key_states.shape[0]
            write_flat(self.keys, flat_slots, key_states[:, :, begin:end])
            write_flat(self.values, flat_slots, value_states[:, :, begin:end])
            begin = end
        self._count(begin)

    def fill(self, first: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write `[B, H, N, D]` to the slots from `first` on, the same in every row."""
        end = first + key_states.shape[2]
        self.keys[:, first:end] = key_states.transpose(1, 2)
        self.values[:, first:end] = value_states.transpose(1, 2)
        self._count(end - first)

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the first `length` slots, `[B, H, L, D]` each."""
        keys = self.keys[:, :length]
        values = self.values[:, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _count(self, num_slots: int) -> None:
        if not torch.compiler.is_compiling():
            self.num_written = num_slots

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` slots."""
        if self.is_initialized:
            self.keys, self.values = (
                torch.cat(
                    [old, old.new_zeros(old.shape[0], capacity - old.shape[1], *old.shape[2:])],
                    dim=1,
                )
                for old in (self.keys, self.values)
            )

    def copy_slots(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy the flat slots `source [B * M]` to `destination [B * M]`. All are read before any is written."""
        for states in (self.keys, self.values):
            flat = states.flatten(0, 1)
            copied = flat[source.to(flat.device)]
            flat.index_copy_(0, destination.to(flat.device), copied)

    # Models that count positions themselves see the prompt's length; the positions of a block are always passed.

    def get_seq_length(self) -> int:
        return self.owner.num_prefilled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class HybridSlotLayer(LinearAttentionLayer, SlotLayer):
    """Hold a layer with both keys and values in slots and recurrent state."""

    def __init__(self, owner: "SlotCache", is_sliding: bool, number_of_states: int):
        SlotLayer.__init__(self, owner, is_sliding)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialize keys and values if called by position, states if called by name, as transformers' layers are."""
        (SlotLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        return -1


def write_flat(states: torch.Tensor, flat_slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write `new [B, H, N, D]` into `states [B, S, H, D]` at `flat_slots [B * N]`."""
    if len(states) == 1:  # half the time of the general way
        states.index_copy_(1, flat_slots.to(states.device), new.transpose(1, 2))
        return
    flat = states.flatten(0, 1)
    values = new.transpose(1, 2).flatten(0, 1)
    flat.index_copy_(0, flat_slots.to(states.device), values)


class SlotView(Cache):
    """Show a `SlotCache` as one forward sees it: the slots that it writes, and how many it reads.

    Args:
        parts: flat slots `[B * n]` of each part of the new positions; None at the beginning of a text, where attention
            reads what was just computed.
        length: L.
    """

    def __init__(self, layers: list[Any], parts: list[torch.Tensor] | None, length: int):
        super().__init__(layers=layers)
        self.parts, self.length = parts, length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[B, H, N, D]` and return what attention reads, `[B, H, L, D]`."""
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.parts is None:
            layer.fill(0, key_states, value_states)
            return key_states, value_states
        layer.write(self.parts, key_states, value_states)
        return layer.read(self.length)


class SlotCache:
    """Hold the buffers of every layer of a model.

    Args:
        template: a new `DynamicCache` of the model's config. Layers without keys and values are used as they are.
    """

    def __init__(self, template: DynamicCache):
        self.layers = [self._layer(layer) for layer in template.layers]
        self.capacity = 0
        self.length = 0
        """Slots that a forward reads."""
        self.num_prefilled = 0
        """Slots of the prompt, for models that count positions themselves."""

    def _layer(self, layer: Any) -> Any:
        if not isinstance(layer, CacheLayerMixin):
            return layer
        if isinstance(layer, LinearAttentionLayer):
            return HybridSlotLayer(self, layer.is_sliding, layer.number_of_states)
        return SlotLayer(self, layer.is_sliding)

    @property
    def slot_layers(self) -> dict[int, SlotLayer]:
        """The layers with keys and values, by their number."""
        return {
            index: layer for index, layer in enumerate(self.layers) if isinstance(layer, SlotLayer)
        }

    def reserve(self, num_slots: int) -> None:
        """Make room for this many slots, and let forwards read all of them."""
        self.length = bucket(num_slots)
        if self.length > self.capacity:
            self.capacity = self.length
            for layer in self.slot_layers.values():
                layer.grow(self.capacity)

    def at_start(self) -> SlotView:
        """Return the view for a forward over the beginning of a text."""
        return SlotView(self.layers, None, self.length)

    def at(self, *parts: torch.Tensor) -> SlotView:
        """Return the view for a forward whose positions go, part by part, to these slots, `[B, N]` each."""
        return SlotView(self.layers, [self._flat(part) for part in parts], self.length)

    def _flat(self, slots: torch.Tensor) -> torch.Tensor:
        """Return `slots [B, N]` as rows of the flattened buffers: `[B * N]`."""
        if slots.shape[0] == 1:
            return slots[0]
        rows = torch.arange(slots.shape[0], device=slots.device)
        first = rows[:, None] * self.capacity
        return (slots + first).flatten()

    def select_rows(self, rows: list[int]) -> None:
        """Make the rows of every layer these ones, which may repeat."""
        for layer in self.slot_layers.values():
            layer.keys = layer.keys[rows]
            layer.values = layer.values[rows]

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move every layer to a device and a dtype. What inference mode made is copied, to be written outside."""
        inside = torch.is_inference_mode_enabled()
        for layer in self.slot_layers.values():
            copy = layer.keys.is_inference() and not inside
            layer.keys = layer.keys.to(device, dtype, copy=copy)
            layer.values = layer.values.to(device, dtype, copy=copy)
            layer.device = device
            layer.dtype = dtype

    def copy_slots(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy the slots `source [B, M]` to `destination [B, M]` in every layer."""
        for layer in self.slot_layers.values():
            layer.copy_slots(self._flat(source), self._flat(destination))

    def check_written(self, num_slots: int, whose: str) -> None:
        """Check that the last forward wrote `num_slots` slots of every layer.

        Raises:
            ValueError: naming the first layer in which it did not.
        """
        for index, layer in self.slot_layers.items():
            written, layer.num_written = layer.num_written, 0
            if written != num_slots:
                raise difference(
                    f"Layer {index} of {whose} cached {written} of {num_slots} positions"
                )


def rewindable_cache(config: Any) -> Cache:
    """Return a new cache for calling a draft by hand; `crop` takes tokens back from it."""
    # Layers of a config with a window keep W - 1 keys; counted from the anchor, a window has W.
    cache = DynamicCache() if config.window_from_anchor else DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


# Recurrent state ------------------------------------------------------------------------------------------------------

MixerInputs = dict[int, tuple[tuple, dict[str, Any]]]
"""For each recurrent layer, the arguments of its mixer."""


@dataclass
class Snapshot:
    """Hold what takes a block back from the recurrent layers."""

    states: dict[int, list[dict[int, torch.Tensor]]]
    """For each layer, its convolutional and its recurrent states before the block."""
    mixer_inputs: MixerInputs


class RecurrentLayers:
    """Hold the recurrent layers of a model: their states, and the mixers that change them.

    Args:
        cache_layers: of the cache.
        layers: of the decoder.
    """

    def __init__(self, cache_layers: list[Any], layers: nn.ModuleList):
        self.states = {
            i: layer
            for i, layer in enumerate(cache_layers)
            if isinstance(layer, LinearAttentionLayer)
        }
        self.mixers = {index: find_mixer(layers[index]) for index in self.states}
        self.mixer_inputs: MixerInputs = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the inputs of every mixer."""
        with ExitStack() as hooks:
            for index, module in self.mixers.items():
                hook = module.register_forward_pre_hook(self._hook(index), with_kwargs=True)
                hooks.enter_context(hook)
            yield

    def _hook(self, index: int) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.mixer_inputs[index] = (args, kwargs)

        return record

    def snapshot(self) -> Snapshot:
        """Copy every state before a block. Afterwards `record_inputs` completes the snapshot."""
        self.mixer_inputs = {}
        states = {}
        for index, layer in self.states.items():
            states[index] = [cloned(layer.conv_states), cloned(layer.recurrent_states)]
        return Snapshot(states, {})

    def record_inputs(self, snapshot: Snapshot, whose: str) -> None:
        """Put the inputs of the block's forward into the snapshot.

        Raises:
            ValueError: a mixer with state was not called as a module.
        """
        snapshot.mixer_inputs, self.mixer_inputs = self.mixer_inputs, {}
        for index, states in snapshot.states.items():
            if any(states) and index not in snapshot.mixer_inputs:
                raise difference(
                    f"The recurrent part of layer {index} of {whose} was not called as a module"
                )


def roll_back(
    recurrent: RecurrentLayers, snapshot: Snapshot, committed: list[int], size: int
) -> None:
    """Leave the states as if each row had seen only its first `committed[row]` of the block's `size` tokens.

    Rows that committed the whole block are right as they are.
    """
    for count in sorted(set(committed) - {size}):
        rows = [row for row, tokens in enumerate(committed) if tokens == count]
        for index, states in snapshot.states.items():
            # Some versions count layers without a mixer as recurrent; those never hold a state.
            if any(states):
                _recompute(recurrent, index, snapshot, rows, count)


def _recompute(
    recurrent: RecurrentLayers, index: int, snapshot: Snapshot, rows: list[int], count: int
) -> None:
    """Run the mixer of one layer again for some rows, over their first `count` tokens, and put their states in."""
    layer = recurrent.states[index]
    after = (layer.conv_states, layer.recurrent_states)
    conv_states, recurrent_states = snapshot.states[index]
    layer.conv_states = {key: state[rows] for key, state in conv_states.items()}
    layer.recurrent_states = {key: state[rows] for key, state in recurrent_states.items()}
    if count:
        args, kwargs = snapshot.mixer_inputs[index]
        first = [_part(value, rows, count) for value in args]
        named = {name: _part(value, rows, count) for name, value in kwargs.items()}
        recurrent.mixers[index](*first, **named)
    for whole, part in zip(after, (layer.conv_states, layer.recurrent_states), strict=True):
        for key, state in part.items():
            whole[key][rows] = state
    layer.conv_states, layer.recurrent_states = after


def cloned(states: dict[int, Any]) -> dict[int, torch.Tensor]:
    """Copy the states that are there; a mixer may write to them in place."""
    return {key: state.clone() for key, state in states.items() if state is not None}


def states_of(layer: LinearAttentionLayer) -> dict[str, Any]:
    """Copy what a layer holds of its states, without the keys and values that it may hold besides."""
    names = vars(LinearAttentionLayer(number_of_states=layer.number_of_states))
    return _copied({name: value for name, value in vars(layer).items() if name in names})


def restore_states(layer: LinearAttentionLayer, saved: dict[str, Any]) -> None:
    """Put back what `states_of` returned; `saved` is copied and not changed."""
    vars(layer).update(_copied(saved))


def _copied(saved: dict[str, Any]) -> dict[str, Any]:
    """Copy the attributes of a layer, its dicts and its states."""
    copy = {}
    for name, value in saved.items():
        copy[name] = dict(value) if isinstance(value, dict) else value
    for name in ("conv_states", "recurrent_states"):
        for key, state in copy[name].items():
            copy[name][key] = None if state is None else state.clone()
    return copy


def find_mixer(layer: nn.Module) -> nn.Module:
    """Return the child of a decoder layer that keeps its recurrent state.

    Raises:
        ValueError: it is not where transformers' hybrid models hold it.
    """
    for name in _MIXERS:
        found: Any = layer
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise ValueError(
        f"{type(layer).__name__} keeps recurrent state in a module that is not known here."
    )


def _part(value: Any, rows: list[int], count: int) -> Any:
    """Return the first `count` positions of some rows of a tensor `[B, Q, ...]`; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return value[rows][:, :count]
