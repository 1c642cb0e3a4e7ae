# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Record what a function does on a device, and repeat it without the function's Python.

This file travels with every pushed draft. On CUDA a recording is a CUDA graph. Elsewhere it is the list of operations
that reached PyTorch's dispatcher, each of which writes its result where it wrote it first. A repetition therefore has
the same numbers, bit by bit, and needs neither views nor new memory. On a CPU a small model spends half of its time
between the operations.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .compat_dflash import end_broken_recording

_RECORDING = threading.Lock()
"""One thread records at a time: CUDA has one state of recording for all."""


def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record `run`, which works on this device.

    Returns:
        What repeats it, and what it returned; each repetition writes those tensors again.

    Raises:
        RuntimeError: what it does depends on values of tensors, or cannot be repeated for another reason.
    """
    if device.type == "cuda":
        return _record_graph(run, device)
    with Operations() as operations:
        outputs = run()
    return operations.repeat, outputs


def _record_graph(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record `run` as a CUDA graph."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream, mode = _stream(device), "thread_local"  # other threads may go on, such as a streamer's
    with _RECORDING, torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                outputs = run()
        except BaseException:
            if torch.cuda.current_stream(device) == stream:  # it could not even be ended
                end_broken_recording(device, pool)
            raise
    return graph.replay, outputs


@lru_cache
def _stream(device: torch.device) -> Any:
    """Return the stream of this device for recordings; one for all, since libraries hold memory for each stream."""
    return torch.cuda.Stream(device)


class Operations(TorchDispatchMode):
    """Records the operations that run inside the context, with their arguments and the tensors that they filled."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        traits = _traits(function)
        if function.namespace != "aten":
            raise RuntimeError(f"{function} is another library's, which may read values")
        if traits.needs_values and not _picks_by_place(function, args):
            raise RuntimeError(f"{function} reads values, which differ from block to block")
        if traits.is_mutable and traits.makes_new:
            raise RuntimeError(f"{function} both changes tensors and makes new ones")
        result = function(*args, **kwargs)
        if traits.is_mutable:
            self.calls.append(partial(function, *args, **kwargs))
        elif traits.makes_new or not _shows(result, args[0]):
            # A view needs no repetition: what it shows stays where it is.
            self.calls.append(_writer(function, args, kwargs, result))
        return result

    def repeat(self) -> None:
        """Run all operations again, on what their arguments hold now."""
        for call in self.calls:
            call()


class Traits(NamedTuple):
    """Hold what an operation does, by its schema.

    Args:
        needs_values: values decide its result or its shape: `item`, `nonzero`, `unique` ...
        makes_new: its results, or some of them, are in new memory. Of others, such as `reshape`, they may be.
        is_mutable: it changes arguments.
    """

    needs_values: bool
    makes_new: bool
    is_mutable: bool


@lru_cache(None)
def _traits(function: Any) -> Traits:
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    needs_values = any(tag in function.tags for tag in tags)
    makes_new = any(one.alias_info is None for one in function._schema.returns)
    if function is torch.ops.aten._unsafe_view.default:  # the one view whose schema says otherwise
        makes_new = False
    return Traits(needs_values, makes_new, function._schema.is_mutable)


def _shows(result: Any, base: torch.Tensor) -> bool:
    """Tell whether a result, or the first of several, lies in the memory of `base`."""
    first = result if isinstance(result, torch.Tensor) else result[0]
    return first.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _picks_by_place(function: Any, args: tuple) -> bool:
    """Tell whether an operation is indexing by places: indexing by truth decides the shape by values."""
    if function is not torch.ops.aten.index.Tensor:
        return False
    return not any(one.dtype in (torch.bool, torch.uint8) for one in args[1] if one is not None)


def _writer(function: Any, args: tuple, kwargs: dict, result: Any) -> Callable[[], Any]:
    """Return what runs an operation again into the tensors of its `result`."""
    if function is torch.ops.aten._to_copy.default:
        return partial(result.copy_, args[0])
    writing = _writing_overload(function)
    results = [result] if isinstance(result, torch.Tensor) else result
    if writing is None:
        return partial(_run_and_copy, partial(function, *args, **kwargs), results)
    overload, names = writing
    outs = dict(zip(names, results, strict=True))
    key = (function, len(args), tuple(kwargs))
    if key not in _WRITING_FUNCTIONS:
        _WRITING_FUNCTIONS[key] = _writing_function(function, overload, args, kwargs | outs)
    return partial(_WRITING_FUNCTIONS[key], *args, **kwargs, **outs)


_WRITING_FUNCTIONS: dict[Any, Callable] = {}
"""By operation and form of the call: what writes into given tensors."""


def _writing_function(function: Any, overload: Any, args: tuple, kwargs: dict) -> Callable:
    """Return the function in Python's namespace, which takes half of the overload's time, where it takes this call."""
    public = getattr(torch, function.overloadpacket.__name__, overload)
    if "out" in kwargs and torch.Tag.nondeterministic_seeded not in function.tags:
        with suppress(TypeError):
            public(*args, **kwargs)
            return public
    return overload


@lru_cache(None)
def _writing_overload(function: Any) -> tuple[Any, list[str]] | None:
    """Return the overload with the same arguments that writes into given tensors, and their names; None without one."""
    wanted = [(one.name, str(one.type)) for one in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        overload = getattr(function.overloadpacket, name)
        outs = [one.name for one in overload._schema.arguments if one.is_out]
        others = [(one.name, str(one.type)) for one in overload._schema.arguments if not one.is_out]
        if len(outs) == len(function._schema.returns) and others == wanted:
            return overload, outs
    return None


def _run_and_copy(call: Callable[[], Any], results: Any) -> None:
    """Run an operation and copy what it returns to `results`."""
    new = call()
    news = [new] if isinstance(new, torch.Tensor) else new
    for old, current in zip(results, news, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(current)
