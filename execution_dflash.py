# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How a block runs: eager, recorded, or compiled, to avoid what starting every single operation costs.

This file travels with every pushed draft. A block has the same shapes in every cycle, on buffers that stay in
place. So it can be captured once and replayed. A capture is compared with the eager block before it is used.
What cannot be captured runs eagerly, after one warning.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .compat_dflash import configs_of, detours, has_experts, has_hooks, is_offloaded
from .recording_dflash import record

logger = logging.get_logger(__name__)

CAPTURE = ("auto", "eager", "graphs", "compile", "off")
"""What a caller may ask for; "off" is the older name of "eager"."""


WORTH_RECORDING = 64
"""New tokens from which on a text on a CPU repays the recording of its blocks."""


def resolve_mode(capture: str, model: Any, recurrent: bool, new_tokens: int) -> str:
    """Return how blocks run: "auto" records those of dense targets on a GPU and on a CPU, and is eager elsewhere.

    A recurrent target's block changes its state, so it cannot be run twice to compare a capture with it. The weights
    of an offloaded target are not in place between forwards.

    Args:
        new_tokens: that a row may get at most; 0 where no size of blocks is expected to come again.
    """
    asks = capture in ("graphs", "compile")
    offloaded = is_offloaded(model)
    if asks and (recurrent or offloaded):
        kind = "recurrent state" if recurrent else "offloaded weights"
        logger.warning_once(
            f"capture={capture!r} is not for targets with {kind}; blocks run eagerly."
        )
    if recurrent or offloaded:
        return "eager"
    if asks:
        return capture
    is_recorded = capture == "auto" and _repays(model, new_tokens) and not has_experts(model)
    return "graphs" if is_recorded else "eager"


def _repays(model: Any, new_tokens: int) -> bool:
    """Tell whether recording is faster on the target's device, and leaves out nothing that the user wants to run."""
    if model.device.type == "cuda":
        return True
    if model.device.type != "cpu" or new_tokens < WORTH_RECORDING:
        return False
    # A hook of the user's may do something else in every forward.
    return not has_hooks(model)


_LOCKS: dict[int, "threading.RLock"] = {}
"""Of each config that lives, by its id."""


@contextmanager
def turns(*models: Any) -> Iterator[None]:
    """Wait until no other thread decodes with one of these models, or with one that shares a config with them.

    A decode changes the attention that the configs name. All threads take the locks in one order.
    """
    configs = {id(config): config for model in models for config in configs_of(model)}
    with ExitStack() as stack:
        for key in sorted(configs):
            if key not in _LOCKS and _LOCKS.setdefault(key, threading.RLock()):
                weakref.finalize(configs[key], _LOCKS.pop, key, None)
            stack.enter_context(_LOCKS[key])
        yield


_STANCE = threading.RLock()
"""Held while a compiled block runs: the compiler's stance is one for all threads."""


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run a model's own code inside the context: not compiled, and without gradient checkpointing.

    Compiled code skips what we count in Python. Checkpointed layers may drop the cache. Both are as before at the end.
    """
    changed = list(detours(model))
    before = [vars(module)[name] for module, name, _ in changed]
    for module, name, value in changed:
        vars(module)[name] = value
    try:
        yield
    finally:
        for (module, name, _), value in zip(changed, before, strict=True):
            vars(module)[name] = value


class BlockRunner:
    """Runs a function of some state and tensors eagerly, as a CUDA graph, or compiled.

    Args:
        function: of a state and of tensors; returns a tensor or a tuple of them. Run twice on the same inputs it must
            do the same again.
        key: of the state; a recording holds as long as it and the shapes of the inputs stay the same.
    """

    def __init__(self, function: Callable, key: Callable[[Any], Any]):
        self.function, self.key = function, key
        self.compiled: Callable = (
            function  # until it is asked for: the compiler takes seconds to import
        )
        self.mode = "eager"
        self.failed_modes: set[str] = set()
        self.last_key: Any = None
        self.recordings: dict[Any, Callable] = {}
        """By key: what is called in place of the function. All are over the same buffers."""
        self.shapes_seen: set[Any] = set()
        """The shapes of inputs that a decode had. A block is recorded when its shapes come for the second time."""
        self.shapes_recorded: set[Any] = set()
        self.verified_keys: set[Any] = set()
        """Keys for which compiled code was compared. A graph is compared when a decode first records it."""
        self.to_confirm: set[Any] = set()
        """Keys of recorded operations, which are compared a second time: with the next block, whose values differ."""
        self.asked: set[int] | None = None
        """By the width of their first input, the blocks that may be recorded; None for all."""

    @contextmanager
    def using(self, mode: str) -> Iterator[None]:
        """Run in this mode inside the context. Graphs, which hold on to memory, are dropped at its end."""
        self.mode = "eager" if mode in self.failed_modes else mode
        if self.mode == "compile" and self.compiled is self.function:
            self.compiled = torch.compile(self.function)
        try:
            yield
        finally:
            self.last_key = self.asked = None
            for found in (self.recordings, self.shapes_seen, self.shapes_recorded, self.to_confirm):
                found.clear()

    def __call__(self, state: Any, *inputs: torch.Tensor) -> Any:
        """Return what the function returns."""
        is_left_out = self.asked is not None and inputs[0].shape[1] not in self.asked
        if self.mode == "eager" or is_left_out:
            return self.function(state, *inputs)
        key = (self.key(state), tuple(tensor.shape for tensor in inputs))
        known = key in self.verified_keys
        if known and not inputs[0].is_cuda:
            return self._run_compiled(key, state, *inputs)
        if key in self.to_confirm:
            return self._confirm(key, state, *inputs)
        if key in self.recordings:
            return self.recordings[key](*inputs)  # the state is part of the recording
        buffers, shapes = key
        # Over larger buffers, recordings are over, and make room.
        for other in [other for other in self.recordings if other[0] != buffers]:
            del self.recordings[other]
            self.to_confirm.discard(other)
        if known or (shapes in self.shapes_recorded and self.mode == "graphs"):
            return self._capture_again(key, state, *inputs)
        if shapes not in self.shapes_seen:  # blocks of this size may not come again
            self.shapes_seen.add(shapes)
            return self.function(state, *inputs)
        return self._capture_and_compare(key, state, *inputs)

    def _run_compiled(self, key: Any, state: Any, *inputs: torch.Tensor) -> Any:
        """Run compiled code; its guards cost a quarter of a call, so skip them while the key stays the same."""
        same, self.last_key = key == self.last_key, key
        return self._compiled(same, state, *inputs)

    def _compiled(self, skips_guards: bool, state: Any, *inputs: torch.Tensor) -> Any:
        with _STANCE, torch.compiler.set_stance(skip_guard_eval_unsafe=skips_guards):
            return self.compiled(state, *inputs)

    def _capture_and_compare(self, key: Any, state: Any, *inputs: torch.Tensor) -> Any:
        """Record, compare with the eager function, and return what that one gave."""
        if self.mode == "graphs" and not inputs[0].is_cuda:
            self.to_confirm.add(key)
            return self._capture_again(key, state, *inputs)
        expected = self.function(state, *inputs)
        self._record(key, state, inputs, expected)
        return expected

    def _confirm(self, key: Any, state: Any, *inputs: torch.Tensor) -> Any:
        """Compare recorded operations with the eager function, and return what that one gave.

        A number that was read out of a tensor, unseen, stays in the recording. Other inputs show it.
        """
        self.to_confirm.remove(key)
        result = self.recordings[key](*inputs)
        expected = self.function(state, *inputs)
        if not _close(result, expected, 1e-3):
            self._run_eagerly("it gave other numbers for the next block")
        return expected

    def _capture_again(self, key: Any, state: Any, *inputs: torch.Tensor) -> Any:
        """Record what was compared before, or is compared as it runs; return what the recording gives."""
        result = self._record(key, state, inputs)
        return result if key in self.recordings else self.function(state, *inputs)

    def _record(
        self, key: Any, state: Any, inputs: tuple[torch.Tensor, ...], expected: Any = None
    ) -> Any:
        """Record, and return what the recording gives. If it fails or that is not right, blocks run eagerly.

        Args:
            expected: what the eager function gave; None if it was not run.
        """
        # A compiler or a driver may raise anything; the function itself still runs.
        try:
            capture = self._capture(state, inputs)
            result = capture(*inputs)
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            self._run_eagerly(f"{type(error).__name__}: {first_line}")
            return None
        if expected is None and isinstance(capture, Graph):
            expected, capture.first = capture.first, None
        # Without anything to compare with, all outputs must at least be written.
        is_right = _is_written(result) if expected is None else _close(result, expected)
        if not is_right:
            self._run_eagerly("it gave other numbers")
            return None
        self.recordings[key] = capture
        self.shapes_recorded.add(key[1])
        if self.mode == "compile":
            self.verified_keys.add(key)
        return result

    def _capture(self, state: Any, inputs: tuple[torch.Tensor, ...]) -> Callable:
        """Return what is called in place of the function: a graph of it, compiled code, or a graph of that on a GPU."""
        run = self.function
        if self.mode == "compile":
            run = partial(self._compiled, False)
            if not inputs[0].is_cuda:
                return partial(run, state)
            run(state, *inputs)  # compiles, which cannot be recorded
        return Graph(partial(run, state), inputs)

    def _run_eagerly(self, reason: str) -> None:
        logger.warning_once(
            f"A block could not be run with capture={self.mode!r} ({reason}); it runs eagerly."
        )
        self.failed_modes.add(self.mode)
        self.mode = "eager"


class Graph:
    """A recording of a function, on inputs and outputs that stay where they are.

    Attributes:
        first: what the function gave while it was recorded; None on a GPU, where recording runs nothing.
    """

    def __init__(self, function: Callable, inputs: tuple[torch.Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.replay, self.outputs = record(lambda: function(*self.inputs), inputs[0].device)
        self.first = None if inputs[0].is_cuda else _copy(self.outputs)
        _spoil(self.outputs)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for static, current in zip(self.inputs, inputs, strict=True):
            static.copy_(current)
        self.replay()
        return self.outputs


def _copy(outputs: Any) -> Any:
    """Return copies of the outputs of a function."""
    if isinstance(outputs, tuple):
        return tuple(map(_copy, outputs))
    return None if outputs is None else outputs.clone()


def _spoil(outputs: Any) -> None:
    """Overwrite the outputs of a recording with what no block gives, NaN and -1.

    So a recording that does not write them, such as one of another device, is found out.
    """
    if isinstance(outputs, tuple):
        for part in outputs:
            _spoil(part)
    elif outputs is not None:
        outputs.fill_(torch.nan if outputs.is_floating_point() else -1)


def _is_written(result: Any) -> bool:
    """Tell whether nothing is left of what `_spoil` wrote."""
    if isinstance(result, tuple):
        return all(map(_is_written, result))
    if result is None:
        return True
    if result.is_floating_point():
        return not bool(result.isnan().any())
    return bool((result >= 0).all())


def _close(result: Any, expected: Any, tolerance: float = 0.05) -> bool:
    """Tell whether two results agree as far as another order of additions allows."""
    if isinstance(expected, tuple):
        pairs = zip(result, expected, strict=True)
        return all(_close(one, other, tolerance) for one, other in pairs)
    if expected is None:
        return result is None
    if not expected.numel():  # features of a target without taps
        return result.shape == expected.shape
    if not expected.is_floating_point():  # tokens, which near-ties may turn
        return result.shape == expected.shape and _is_written(result)
    # A draft may know fewer tokens than the target: -inf for the others.
    finite = expected.isfinite()
    if not torch.equal(finite, result.isfinite()):
        return False
    result, expected = result.where(finite, 0), expected.where(finite, 0)
    scale = expected.float().abs().amax().clamp_min(1e-6)
    return bool(((result.float() - expected.float()).abs().amax() / scale) < tolerance)
