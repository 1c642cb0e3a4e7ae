# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read the outputs of the target's layers that a draft is conditioned on; check that they are the right ones.

This file travels with every pushed draft. A tap is the output of a decoder layer: the input of the next layer, before
any norm. Features that are something else change no text, but the draft was not trained on them.

Shapes: B rows, N positions, T tokens of a short text, D hidden size of the target, F taps * D.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .compat_dflash import difference, loaded


class FeatureTaps:
    """Hold outputs of the tapped layers in one target forward.

    Args:
        layers: of the target's decoder.
        ids: of the tapped layers.
        width: of an output, the target's hidden size.
    """

    def __init__(self, layers: nn.ModuleList, ids: tuple[int, ...], width: int):
        self.layers, self.ids = layers, ids
        self.width = width
        self.outputs: dict[int, torch.Tensor] = {}
        self.num_outputs = 0
        """Outputs since `clear`, those of a layer that ran twice included."""
        self.hooks = {index: self._hook(index) for index in ids}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect outputs during the forwards inside."""
        with ExitStack() as hooks:
            hooks.callback(self.clear)
            for index, hook in self.hooks.items():
                hooks.enter_context(self.layers[index].register_forward_hook(hook))
            yield

    def clear(self) -> None:
        """Drop what was collected, before a forward."""
        self.outputs.clear()
        self.num_outputs = 0

    def _hook(self, index: int) -> Callable:
        def collect(module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs[index] = output[0] if isinstance(output, tuple) else output
            self.num_outputs += 1

        return collect

    def pop(self) -> torch.Tensor:
        """Return the context features `[B, N, F]` of the last forward, on the device of its last tap.

        Raises:
            ValueError: a tapped layer was not called once, or returned something else than `[B, N, hidden size]`.
        """
        missing = [index for index in self.ids if index not in self.outputs]
        if missing or self.num_outputs != len(self.ids):
            seen = (
                f"layer {missing[0]} was not called"
                if missing
                else "a layer was called more than once"
            )
            raise difference(
                f"Of the tapped layers {list(self.ids)}, {seen} as a module in one forward"
            )
        outputs = [self.outputs[index] for index in self.ids]
        self.clear()
        for index, features in zip(self.ids, outputs, strict=True):
            if (
                not isinstance(features, torch.Tensor)
                or features.ndim != 3
                or features.shape[-1] != self.width
            ):
                shape = tuple(getattr(features, "shape", ())) or type(features).__name__
                raise difference(
                    f"The output of layer {index} is {shape}, not [batch, tokens, {self.width}]"
                )
        return torch.cat([features.to(outputs[-1].device) for features in outputs], dim=-1)


class TapWatch:
    """Collect what surrounds the tapped layers in one forward: the input of the next layer, and outputs of norms."""

    def __init__(self, taps: FeatureTaps):
        self.taps = taps
        self.next_inputs: dict[int, Any] = {}  # [B, T, D] for each tap, of the layer after it
        self.norm_outputs: dict[int, list[torch.Tensor]] = {
            index: [] for index in taps.ids
        }  # inside the tapped layer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect during the forward inside."""
        with ExitStack() as hooks:
            for index in self.taps.ids:
                for norm in norms_of(self.taps.layers[index], self.taps.width):
                    hooks.enter_context(norm.register_forward_hook(self._norm_hook(index)))
                for following in self.taps.layers[index + 1 : index + 2]:
                    collect = self._input_hook(index)
                    hook = following.register_forward_pre_hook(collect, with_kwargs=True)
                    hooks.enter_context(hook)
            yield

    def _input_hook(self, index: int) -> Callable:
        def collect(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.next_inputs[index] = args[0] if args else kwargs.get("hidden_states")

        return collect

    def _norm_hook(self, index: int) -> Callable:
        def collect(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.norm_outputs[index].append(output)

        return collect

    def check(self, features: torch.Tensor, decoder: nn.Module, tolerance: float) -> None:
        """Check that taps are the inputs of the next layers, and not outputs of a norm.

        Args:
            features `[B, T, F]`: of the forward that was watched.
            decoder: whose layers were tapped.
            tolerance: of the dtype.

        Raises:
            ValueError: naming the layer.
        """
        for index, tap in zip(self.taps.ids, features.split(self.taps.width, dim=-1), strict=True):
            next_input = self.next_inputs.get(index)
            if isinstance(next_input, torch.Tensor) and not torch.equal(
                next_input.to(tap.device), tap
            ):
                raise difference(
                    f"The output of layer {index} is not what layer {index + 1} is given"
                )
            # A layer that ends with a norm of its own is as it should be.
            own_norm = any(
                torch.equal(norm.to(tap.device).view_as(tap), tap)
                for norm in self.norm_outputs[index]
            )
            if not own_norm and self._is_normed(index, tap[0].float(), decoder, tolerance):
                raise difference(
                    f"The output of layer {index} is that of a norm, which a tap comes before"
                )

    def _is_normed(
        self, index: int, tap: torch.Tensor, decoder: nn.Module, tolerance: float
    ) -> bool:
        """Tell whether `tap [T, D]` has the same size at every token, as the output of a norm has."""
        inside = {id(norm) for layer in self.taps.layers for norm in layer.modules()}
        around = [norm for norm in norms_of(decoder, self.taps.width) if id(norm) not in inside]
        for layer in self.taps.layers[index + 1 : index + 2]:
            around += norms_of(layer, self.taps.width)
        return any(
            is_level(states, max(1e-3, tolerance / 8))
            for states in without_norm_weights(tap, around)
        )


def norms_of(module: nn.Module, width: int) -> list[nn.Module]:
    """Return the norms inside a module that normalise vectors of this width."""
    found = [one for one in module.modules() if "norm" in type(one).__name__.lower()]
    return [
        one
        for one in found
        if getattr(one, "weight", None) is not None and one.weight.shape == (width,)
    ]


def without_norm_weights(tap: torch.Tensor, norms: list[Any]) -> Iterator[torch.Tensor]:
    """Yield `tap [T, D]` as it is, and with the weights of each norm divided out of it."""
    yield tap
    for norm in norms:
        with loaded(norm):
            weight = norm.weight.detach().float().to(tap.device)
            bias = getattr(norm, "bias", None)
            shifted = tap if bias is None else tap - bias.detach().float().to(tap.device)
        for factor in (weight, 1 + weight):  # some families store the weight less one
            if bool((factor.abs() > 1e-3).all()):
                yield shifted / factor


def is_level(states: torch.Tensor, tolerance: float) -> bool:
    """Tell whether `states [T, D]` have the same root mean square at every token."""
    sizes = states.square().mean(dim=-1).sqrt()
    return bool((sizes.max() - sizes.min()) <= tolerance * sizes.mean())
