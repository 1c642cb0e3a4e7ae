# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Taking back a block from layers that keep recurrent or convolutional state instead of keys and values.

This file travels with every pushed draft. Such a state has no columns: it has swallowed the whole block. So it is kept
from before the block, with what each mixer was given; after a rejection the mixers alone run again, over the accepted
tokens. Rows that accepted the whole block are right as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from .compat_dflash import difference

_MIXERS = ("linear_attn", "mixer", "conv", "mamba", "mamba_decoder.mamba", "self_attn")
"""Where decoder layers hold the module that keeps a state."""


class Recurrence:
    """The recurrent layers of a model and their states; nothing to do for a model without any."""

    def __init__(self, cache: Cache, layers: nn.ModuleList):
        self.states = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer)}
        self.mixers = {index: mixer(layers[index]) for index in self.states}
        self.given: dict[int, tuple[tuple, dict[str, Any]]] = {}
        self.before: dict[int, list[dict[int, torch.Tensor]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what each mixer is given."""
        hooks = [
            module.register_forward_pre_hook(self._keeper(index), with_kwargs=True)
            for index, module in self.mixers.items()
        ]
        try:
            yield
        finally:
            self.given, self.before = {}, {}
            for hook in hooks:
                hook.remove()

    def _keeper(self, index: int) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.given[index] = (args, kwargs)

        return keep

    def keep(self) -> None:
        """Copy every state as it is before a block; a mixer may write to them in place."""
        self.given = {}
        for index, layer in self.states.items():
            self.before[index] = [
                {key: state.clone() for key, state in states.items() if state is not None}
                for states in (layer.conv_states, layer.recurrent_states)
            ]

    def check_given(self) -> None:
        """Refuse to go on where a mixer with a state was not seen in the block.

        Raises:
            ValueError: naming the layer.
        """
        missing = [index for index, states in self.before.items() if any(states) and index not in self.given]
        if missing:
            raise difference(f"The recurrent part of layer {missing[0]} was not called as a module")

    def settle(self, committed: list[int], size: int) -> None:
        """Leave the states as if each row had been given only its first `committed[row]` of `size` tokens."""
        given = dict(self.given)
        for count in sorted(set(committed) - {size}):
            rows = [row for row, accepted in enumerate(committed) if accepted == count]
            for index, states in self.before.items():
                if any(states):  # some versions count layers without a mixer as recurrent; those never hold a state
                    self._replay(index, rows, count, given[index])

    def _replay(self, index: int, rows: list[int], count: int, given: tuple[tuple, dict[str, Any]]) -> None:
        """Run one mixer again for some rows, over their first `count` tokens, and put their states back in place."""
        layer = self.states[index]
        after = (layer.conv_states, layer.recurrent_states)
        conv, recurrent = ({key: state[rows] for key, state in states.items()} for states in self.before[index])
        layer.conv_states, layer.recurrent_states = dict(conv), dict(recurrent)
        if count:
            args, kwargs = given
            self.mixers[index](
                *(_part(value, rows, count) for value in args),
                **{name: _part(value, rows, count) for name, value in kwargs.items()},
            )
        for whole, part in zip(after, (layer.conv_states, layer.recurrent_states), strict=True):
            for key, state in part.items():
                whole[key][rows] = state
        layer.conv_states, layer.recurrent_states = after


def states_of(layer: LinearAttentionLayer) -> dict[str, Any]:
    """What a layer keeps of its states, copied; nothing of the keys and values that it may keep besides."""
    names = vars(LinearAttentionLayer(number_of_states=layer.number_of_states))
    return copied({name: value for name, value in vars(layer).items() if name in names})


def restore_states(layer: LinearAttentionLayer, held: dict[str, Any]) -> None:
    """Put back what `states_of` gave, which stays as it is."""
    vars(layer).update(copied(held))


def copied(held: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer, with dicts and states that are copies."""
    held = {name: dict(value) if isinstance(value, dict) else value for name, value in held.items()}
    for name in ("conv_states", "recurrent_states"):
        held[name] = {key: None if state is None else state.clone() for key, state in held[name].items()}
    return held


def mixer(layer: nn.Module) -> nn.Module:
    """The child of a decoder layer that keeps the state.

    Raises:
        ValueError: the layer does not hold one where transformers' hybrid models do.
    """
    for name in _MIXERS:
        found: Any = layer
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise ValueError(f"{type(layer).__name__} keeps recurrent state in a module that is not known here.")


def _part(value: Any, rows: list[int], count: int) -> Any:
    """The first `count` positions of some rows of a tensor `[B, Q, ...]`; anything else as it is."""
    return value[rows][:, :count] if isinstance(value, torch.Tensor) and value.ndim > 1 else value
