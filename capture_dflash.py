# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Running a block without paying for every operation of it: CUDA graphs, or torch.compile.

This file travels with every pushed draft. A block has the same shapes in every cycle and works on buffers that stay
where they are, so it can be captured once and replayed. What was captured is compared with the real thing before it is
used; what cannot be captured runs as it is, and that is said once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

CAPTURE = ("auto", "off", "graphs", "compile")


def settled(capture: str, model: Any, recurrent: bool) -> str:
    """How blocks are run: "auto" is CUDA graphs for dense targets on a GPU, and nothing elsewhere.

    A recurrent target's block changes its state, so it cannot be repeated to compare what was captured.
    """
    if recurrent and capture not in ("auto", "off"):
        logger.warning_once(f"capture={capture!r} is not for targets with recurrent state; blocks run as they are.")
    if recurrent:
        return "off"
    if capture != "auto":
        return capture
    if model.device.type != "cuda":
        return "off"
    dense = not any("expert" in name for name, _ in model.named_modules())
    return "graphs" if dense else "off"


class Captured:
    """A function of tensors that runs as it is, as a CUDA graph, or compiled.

    Args:
        function: gives a tensor or a tuple of them; run twice on the same inputs it must do the same again.
        key: what else, besides its inputs' shapes, a recording of it holds for.
    """

    def __init__(self, function: Callable, key: Callable[[], Any]):
        self.function, self.key = function, key
        self.compiled: Callable = function  # until it is asked for: the compiler takes seconds to import
        self.how = "off"
        self.failed: set[str] = set()
        self.known: Any = None
        self.graph: Callable | None = None
        self.trusted: set[Any] = set()
        """What compiled code was compared for; a graph is compared whenever it is recorded."""

    @contextmanager
    def running(self, how: str) -> Iterator[None]:
        """Run in this way inside the context. A graph, which holds on to memory, ends with it."""
        self.how = "off" if how in self.failed else how
        if self.how == "compile" and self.compiled is self.function:
            self.compiled = torch.compile(self.function)
        try:
            yield
        finally:
            self.known = self.graph = None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.how == "off":
            return self.function(*inputs)
        key = (self.key(), *(tensor.shape for tensor in inputs))
        if self.how == "compile" and key in self.trusted:
            return self._compiled(key, *inputs)
        if key != self.known:  # buffers are new or have moved: what is made lazily is made now
            self.known, self.graph = key, None
            return self.function(*inputs)
        if self.graph is None:
            return self._record(*inputs)
        return self.graph(*inputs)

    def _compiled(self, key: Any, *inputs: torch.Tensor) -> Any:
        """Compiled code checks whether it applies, at a quarter of its cost: once a decode, and when `key` moves."""
        checked, self.known = key == self.known, key
        with torch.compiler.set_stance(skip_guard_eval_unsafe=checked):
            return self.compiled(*inputs)

    def _record(self, *inputs: torch.Tensor) -> Any:
        """Record, and compare with the function itself, whose result counts this time."""
        expected = self.function(*inputs)
        try:
            graph = self.compiled if self.how == "compile" else Graph(self.function, inputs)
            result = graph(*inputs)
        except Exception as error:  # a compiler or a driver may raise anything; the function itself still runs
            self._fall_back(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            if _alike(result, expected):
                self.graph = graph
                if self.how == "compile":
                    self.trusted.add(self.known)
            else:
                self._fall_back("it gave other numbers")
        return expected

    def _fall_back(self, reason: str) -> None:
        logger.warning_once(f"A block could not be run with capture={self.how!r} ({reason}); it runs as it is.")
        self.failed.add(self.how)
        self.how = "off"


class Graph:
    """A CUDA graph of a function, on inputs and outputs that stay where they are."""

    def __init__(self, function: Callable, inputs: tuple[torch.Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.replay, self.outputs = record(lambda: function(*self.inputs))

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        self.replay()
        return self.outputs


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What repeats `run` on the device, and what it gave; its tensors are written again by each repetition."""
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on, a streamer's reader say
        outputs = run()
    return graph.replay, outputs


def _alike(result: Any, expected: Any) -> bool:
    """Whether two results agree as far as the order of additions lets them."""
    if isinstance(expected, tuple):
        return all(_alike(*pair) for pair in zip(result, expected, strict=True))
    if not expected.is_floating_point():  # tokens, which near-ties may turn
        return result.shape == expected.shape
    scale = expected.float().abs().amax().clamp_min(1e-6)
    return bool(((result.float() - expected.float()).abs().amax() / scale) < 0.05)
