# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The outputs of the target's layers that a draft is conditioned on, and whether they are what they should be.

This file travels with every pushed draft. A tap is the output of a decoder layer: what the next layer is given, before
any norm. Features that are something else change no text, but the draft was not trained on them.

Shapes: B rows, N positions, T tokens of a short text, D hidden size of the target, F taps * D.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .compat_dflash import difference


class Taps:
    """Outputs of the tapped layers in one target forward.

    Args:
        width: of an output, the target's hidden size.
    """

    def __init__(self, layers: nn.ModuleList, ids: tuple[int, ...], width: int):
        self.layers, self.ids, self.width = layers, ids, width
        self.kept: dict[int, torch.Tensor] = {}
        self.fired = 0
        """How many outputs were seen since `take`."""
        self.keepers = {index: self._keeper(index) for index in ids}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        hooks = [self.layers[index].register_forward_hook(keep) for index, keep in self.keepers.items()]
        try:
            yield
        finally:
            self.clear()
            for hook in hooks:
                hook.remove()

    def clear(self) -> None:
        """Forget what was seen so far; a forward is about to begin."""
        self.kept.clear()
        self.fired = 0

    def _keeper(self, index: int) -> Callable:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.kept[index] = output[0] if isinstance(output, tuple) else output
            self.fired += 1

        return keep

    def take(self) -> torch.Tensor:
        """The context features `[B, N, F]` of the last forward, on the device of its last tap.

        Raises:
            ValueError: a tapped layer was not called once, or gave something else than `[B, N, hidden size]`.
        """
        missing = [index for index in self.ids if index not in self.kept]
        if missing or self.fired != len(self.ids):
            seen = f"layer {missing[0]} was not called" if missing else "a layer was called more than once"
            raise difference(f"Of the tapped layers {list(self.ids)}, {seen} as a module in one forward")
        kept = [self.kept[index] for index in self.ids]
        self.clear()
        for index, features in zip(self.ids, kept, strict=True):
            if not isinstance(features, torch.Tensor) or features.ndim != 3 or features.shape[-1] != self.width:
                shape = tuple(getattr(features, "shape", ())) or type(features).__name__
                raise difference(f"The output of layer {index} is {shape}, not [batch, tokens, {self.width}]")
        return torch.cat([features.to(kept[-1].device) for features in kept], dim=-1)


class TapWatch:
    """What surrounds the tapped layers in one forward: what the layer after each is given, and what its norms give."""

    def __init__(self, taps: Taps):
        self.taps = taps
        self.given: dict[int, Any] = {}  # [B, T, D], by the tap before
        self.norms: dict[int, list[torch.Tensor]] = {index: [] for index in taps.ids}  # of the tapped layer itself

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forwards inside."""
        hooks = []
        for index in self.taps.ids:
            for norm in norms_of(self.taps.layers[index], self.taps.width):
                hooks.append(norm.register_forward_hook(self._norm_keeper(index)))
            if index + 1 < len(self.taps.layers):
                following = self.taps.layers[index + 1]
                hooks.append(following.register_forward_pre_hook(self._input_keeper(index), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _input_keeper(self, index: int) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.given[index] = args[0] if args else kwargs.get("hidden_states")

        return keep

    def _norm_keeper(self, index: int) -> Callable:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.norms[index].append(output)

        return keep

    def check(self, features: torch.Tensor, decoder: nn.Module, tolerance: float) -> None:
        """Refuse taps that are not what the next layer is given, or that a norm has gone over.

        Args:
            features `[B, T, F]`: of the forward that was watched.
            decoder: whose layers were tapped.
            tolerance: of the dtype.

        Raises:
            ValueError: naming the layer.
        """
        for index, tap in zip(self.taps.ids, features.split(self.taps.width, dim=-1), strict=True):
            given = self.given.get(index)
            if isinstance(given, torch.Tensor) and not torch.equal(given.to(tap.device), tap):
                raise difference(f"The output of layer {index} is not what layer {index + 1} is given")
            by_itself = any(torch.equal(norm.to(tap.device).view_as(tap), tap) for norm in self.norms[index])
            if not by_itself and self._normed(index, tap[0].float(), decoder, tolerance):
                raise difference(f"The output of layer {index} is that of a norm, which a tap comes before")

    def _normed(self, index: int, tap: torch.Tensor, decoder: nn.Module, tolerance: float) -> bool:
        """Whether `tap [T, D]` has the same size at every token, as what comes out of a norm has."""
        inside = {id(norm) for layer in self.taps.layers for norm in layer.modules()}
        around = [norm for norm in norms_of(decoder, self.taps.width) if id(norm) not in inside]
        for layer in self.taps.layers[index + 1 : index + 2]:
            around += norms_of(layer, self.taps.width)
        return any(level(states, max(1e-3, tolerance / 8)) for states in undone(tap, around))


def norms_of(module: nn.Module, width: int) -> list[nn.Module]:
    """The norms inside a module that go over vectors of this width."""
    found = [one for one in module.modules() if "norm" in type(one).__name__.lower()]
    return [one for one in found if getattr(one, "weight", None) is not None and one.weight.shape == (width,)]


def undone(tap: torch.Tensor, norms: list[Any]) -> Iterator[torch.Tensor]:
    """`tap [T, D]` as it is, and with the weights of each norm taken out of it."""
    yield tap
    for norm in norms:
        weight = norm.weight.detach().float().to(tap.device)
        bias = getattr(norm, "bias", None)
        shifted = tap if bias is None else tap - bias.detach().float().to(tap.device)
        for factor in (weight, 1 + weight):  # some families keep the weight less one
            if bool((factor.abs() > 1e-3).all()):
                yield shifted / factor


def level(states: torch.Tensor, tolerance: float) -> bool:
    """Whether `states [T, D]` have the same root mean square at every token."""
    sizes = states.square().mean(dim=-1).sqrt()
    return bool((sizes.max() - sizes.min()) <= tolerance * sizes.mean())
