# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Isolate every use of a private name of transformers, and of behaviour that differs between its versions.

This file travels with every pushed draft. Each function notes the versions that it was checked with, and when it can
be deleted. No other file uses a private name of transformers.
"""

import hashlib
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.version import Version
from transformers import AutoModel, masking_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import cached_file

from .findings_dflash import reason

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache argument in transformers: the first from 5.24 on; the others before, and until 5.40 too."""

GENERATE = "transformers.generation.utils"

CHECKED = ("5.15.1", "5.24.0")
"""The oldest and the newest version of transformers that the tests run on."""


def versions() -> str:
    """Return the installed versions, for error messages."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def difference(fault: str) -> ValueError:
    """Return the error for a model that runs in another way than expected: the `fault`, and how to proceed."""
    oldest, newest = (Version(version) for version in CHECKED)
    advice = (
        f"This version of dflash-hub was checked with transformers {oldest} to {newest}: install one of those, or "
        "upgrade it (pip install --upgrade dflash-hub). Where the draft's code came from the Hub, its owner runs "
        "`dflash-hub refresh`."
    )
    if oldest <= Version(transformers.__version__) <= newest:
        advice = (
            "This version of dflash-hub was checked with this transformers, so it is this model that it cannot "
            "decode, or something has changed it. Call `target.eval()` if it is in training mode; else generate "
            "without a draft."
        )
    return ValueError(
        f"{fault} ({versions()}). The text could come out wrong, so it is not written. {advice}"
    )


# The cache argument. Checked with 5.15.1, 5.23.0 and 5.24.0; delete when the oldest supported version is 5.24. --------


def parameters(function: Callable) -> frozenset[str]:
    """Return the names of the arguments of `function`; for a wrapper, those of the wrapped function."""
    return frozenset(inspect.signature(function).parameters)


def cache_name(function: Callable) -> str:
    """Return the name of the cache argument of `function`, the forward of a model or a layer.

    Raises:
        ValueError: it has none.
    """
    known = parameters(function)
    found = next((name for name in CACHE_NAMES if name in known), None)
    if found is None:
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} takes no cache by any name that is known here "
            f"({', '.join(CACHE_NAMES)}; {versions()}), so a draft cannot decode with it. Upgrade dflash-hub, or "
            "install a transformers that it was checked with."
        )
    return found


def cache_in(inputs: MutableMapping[str, Any]) -> Any:
    """Return the cache among `inputs`, under any of its names; None without one."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def without_cache(inputs: MutableMapping[str, Any]) -> dict[str, Any]:
    """Return `inputs` without a cache under any of its names."""
    return {name: value for name, value in inputs.items() if name not in CACHE_NAMES}


def cache_field(output: Any) -> str:
    """Return the name of the cache field of an output class of a model or of `generate`."""
    names = {one.name for one in fields(output)}
    return next(name for name in CACHE_NAMES if name in names)


# `generate` ----------------------------------------------------------------------------------------------------------


def made_by_user(cache: Any, unmarked: bool) -> bool:
    """Return whether the user passed this cache, which `generate` marks; `unmarked` where it has no mark.

    Checked with 5.15.1 to 5.24.0; delete when `generate` passes this on to a decoding function.
    """
    return getattr(cache, "_is_user_defined", unmarked)


def padding_token(config: Any) -> int:
    """Return the token that `generate` appends to finished rows, 0 where it has none.

    Checked with 5.15.1 to 5.24.0; delete when the prepared config has a public name for it.
    """
    found = getattr(config, "_pad_token_tensor", None)
    return 0 if found is None else int(found)


def _module(frame: Any) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def _beyond_ours(frame: Any) -> Any:
    """Return the first frame from this one upwards that is neither of these files nor of `inspect`."""
    ours = f"{__name__.rpartition('.')[0]}."
    while frame is not None:
        if frame.f_code.co_filename != inspect.__file__ and not _module(frame).startswith(ours):
            break
        frame = frame.f_back
    return frame


def local_of_generate(name: str, frame: Any) -> Any:
    """Return a local variable of transformers' `generate`, which drops it; None where that is not the caller.

    Args:
        frame: that of a function that `generate` calls, by way of other functions of these files or directly.

    Checked with 5.15.1 to 5.24.0; delete when `generate` passes streamer and tokenizer to a decoding function.

    Raises:
        RuntimeError: `generate` has no such variable, so the user's argument would be lost silently.
    """
    frame = _beyond_ours(frame)
    module = _module(frame)
    if not module.startswith("transformers."):
        return None
    if module != GENERATE or name not in frame.f_code.co_varnames + frame.f_code.co_cellvars:
        raise RuntimeError(
            f"`generate` of this version ({versions()}) holds no {name!r}, which a draft's decoding reads there. "
            "Upgrade dflash-hub, or install a transformers that it was checked with."
        )
    return frame.f_locals.get(name)


def read_by_generate(frame: Any) -> bool:
    """Return whether it is transformers' `generate` that reads an attribute.

    Args:
        frame: the frame that reads it; may be inside the standard library.
    """
    return _module(_beyond_ours(frame)) == GENERATE


def dropped_arguments(frame: Any) -> dict[str, Any]:
    """Return the arguments that `generate` drops while it reads a signature; put the tokenizer back.

    Checked with 5.15.1 to 5.24.0. They take these out for every decoding function that is passed to them; delete when
    they do not.
    """
    frame = _beyond_ours(frame)
    if frame is None or frame.f_code.co_name != "_extract_generation_mode_kwargs":
        return {}
    dropped = local_of_generate("generation_mode_kwargs", frame) or {}
    if "tokenizer" in dropped:
        local_of_generate("kwargs", frame)["tokenizer"] = dropped["tokenizer"]
    return dropped


def read_by_assisted_generation(frame: Any) -> bool:
    """Return whether it is transformers' own assisted generation that reads an attribute.

    Checked with 5.15.1 to 5.24.0; delete when it asks an assistant whether it can generate.
    """
    return _module(frame) == "transformers.generation.candidate_generator"


def makes_own_cache(model: Any) -> bool:
    """Return whether a model makes its own kind of cache, instead of the one that `generate` makes.

    Checked with 5.15.1 to 5.24.0; delete when models have a public name for it.
    """
    return not model._supports_default_dynamic_cache()


# Attention -----------------------------------------------------------------------------------------------------------


def attention_name(config: Any) -> str:
    """Return the attention implementation that a config names: "sdpa", "eager" ...

    Checked with 5.15.1 to 5.24.0; delete when there is a public name.
    """
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Set the attention of one config; the public setter would also change the parts of a composite config.

    Checked with 5.15.1 to 5.24.0; delete when the attention of one forward can be chosen by an argument.
    """
    config._attn_implementation_internal = name


def names_attention(config: Any) -> bool:
    """Return whether a config names an attention implementation."""
    return hasattr(config, "_attn_implementation_internal")


def modules_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a model and the modules in it, each once, in no order; `model.modules()` takes four times as long.

    Every decode looks through all modules several times: of a model of 36 layers, those are 550.
    """
    found = [model]
    known = {model}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return found


def configs_of(model: Any) -> list[Any]:
    """Return the configs of a model and its parts that name an attention."""
    configs = {}
    for module in modules_of(model):
        config = vars(module).get("config")
        if config is not None and names_attention(config):
            configs[id(config)] = config
    return list(configs.values())


def own_eager(module: Any) -> Callable:
    """Return the eager attention function of the file that defines `module`.

    Checked with 5.15.1 to 5.24.0; delete when transformers has a registry of these functions.

    Raises:
        ValueError: that file has none.
    """
    defining_file = sys.modules[type(module).__module__]
    if not hasattr(defining_file, "eager_attention_forward"):
        raise ValueError(
            f"{type(module).__name__} has no plain attention function where transformers keeps them "
            f"(eager_attention_forward in {defining_file.__name__}; {versions()}), so a draft cannot decode with it."
        )
    return defining_file.eager_attention_forward


def visible_in_window(
    window: int, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor | None:
    """Return which `keys [M]` each of `queries [Q]` sees in a causal window, by transformers' own rule: `[Q, M]`.

    Checked with 5.15.1 to 5.24.0. Returns None where a version has no such function; the self-check then runs a text
    longer than the window.
    """
    rule = getattr(masking_utils, "sliding_window_causal_mask_function", None)
    return None if rule is None else rule(window)(0, 0, queries[:, None], keys[None])


# Cache layers --------------------------------------------------------------------------------------------------------


def mask_length(config: Any) -> int | None:
    """Return the length of the mask that `generate` dropped, since it hides nothing; None where it dropped none.

    Checked with 5.15.1, which drops none, and 5.24.0; delete when a decoding function gets the mask.
    """
    return getattr(config, "_mask_length", None)


def set_slots_seen(layer: Any, slots: int) -> None:
    """Set the number of tokens that a sliding or static layer of a cache has seen; it may store only the last ones.

    Checked with 5.15.1 to 5.24.0; delete when such a layer can be built from its keys and the length.

    Raises:
        ValueError: the layer has no such counter.
    """
    if not hasattr(layer, "cumulative_length"):
        raise difference(f"{type(layer).__name__} does not say how long its text is")
    if isinstance(layer.cumulative_length, int):
        layer.cumulative_length = slots
        return
    layer.cumulative_length.fill_(slots)
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = slots


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def end_broken_recording(device: torch.device, pool: Any) -> None:
    """Clean up after a CUDA graph whose recording an operation broke off, so that torch could not end it.

    Until then torch draws no random numbers on the device, and returns no memory to it.

    Args:
        pool: of the graph's memory.

    Checked with torch 2.11; delete when `torch.cuda.graph` cleans up itself.
    """
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    end_pool = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end_pool is not None:
        with suppress(RuntimeError):  # already ended
            end_pool(device.index, pool)


# Weights that accelerate loads for each forward, adapters of PEFT ----------------------------------------------------


def is_offloaded(module: Any) -> bool:
    """Return whether weights of a module are on the meta device between its forwards."""
    return any(weight.is_meta for weight in weights_of(module))


def weights_of(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of a model, those that modules share several times; see `modules_of`."""
    for module in modules_of(model):
        for weight in module._parameters.values():
            if weight is not None:
                yield weight


def loader_of(module: Any) -> Any:
    """Return accelerate's hook on a module, which brings its weights and moves its inputs; None without one.

    Checked with accelerate 1.15; delete when accelerate has a public name for it.
    """
    return getattr(module, "_hf_hook", None)


def device_of(model: Any) -> torch.device:
    """Return the device on which a model computes, also where its weights lie elsewhere between forwards."""
    device = model.device
    if device.type == "meta":
        device = getattr(loader_of(model), "execution_device", None)
        tensors = [*model.parameters(), *model.buffers()]
        found = next((tensor.device for tensor in tensors if not tensor.is_meta), "cpu")
        device = found if device is None else device
    return torch.device(device)


def device_of_inputs(module: Any, default: torch.device) -> torch.device:
    """Return where a module's weights are; `default` where a hook moves its inputs, or it shows no weights."""
    weight = next(module.parameters(), None)
    return default if weight is None or weight.is_meta else weight.device


def dtype_of_inputs(module: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's weights; `default` where they have few bits, unlike their inputs."""
    weight = next(module.parameters(), None)
    wide = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return weight.dtype if weight is not None and weight.dtype in wide else default


@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """Keep the offloaded weights of a module in place inside the context."""
    loader = loader_of(module) if is_offloaded(module) else None
    if loader is not None:
        loader.pre_forward(module)
    try:
        yield
    finally:
        if loader is not None:
            loader.post_forward(module, None)


def adapter_layers(model: Any) -> list[Any]:
    """Return the modules by which PEFT replaced layers of a model.

    Checked with peft 0.18 to 0.21; delete when transformers has a public function for it.
    """
    return [module for module in modules_of(model) if "merged_adapters" in vars(module)]


def adapters_of_rows(model: Any) -> set[str]:
    """Return the adapters among which each row has its own (`generate(adapter_names=...)`); none otherwise."""
    names: set[str] = set()
    for layer in adapter_layers(model):
        for hook in layer._forward_pre_hooks.values():
            names.update(getattr(hook, "keywords", {}).get("adapter_names") or ())
    return names


def has_hooks(model: Any) -> bool:
    """Tell whether a module of a model has a hook on its forward.

    Those of transformers do not count: they collect outputs where outputs are asked for, and stay afterwards.
    """
    for module in modules_of(model):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                return True
    return False


def has_experts(model: Any) -> bool:
    """Tell whether a model has experts, by the names of its modules."""
    return any("expert" in name for module in modules_of(model) for name in module._modules)


def adapters_in_use(wrapper: Any) -> list[Any]:
    """Return the configs of the PEFT adapters that the next forward uses; none of a model without any.

    Args:
        wrapper: PEFT's own, or a model with adapters.
    """
    known = getattr(wrapper, "peft_config", None) or {}
    layers = adapter_layers(wrapper) if known else []
    names = adapters_of_rows(wrapper) if layers else set(known)
    if not names:
        for layer in layers:
            names.update(() if layer.disable_adapters else layer.active_adapters)
    return [config for name, config in known.items() if name in names]


def arrangement(model: Any) -> int:
    """Return a number that changes with a model's modules, its adapters, its training mode, and where weights lie."""
    found: list[Any] = [frozenset(adapters_of_rows(model))]
    for module in modules_of(model):
        found.append((id(module), type(module), module.training))
    for layer in adapter_layers(model):
        active, merged = tuple(layer.active_adapters), tuple(layer.merged_adapters)
        found.append((active, merged, bool(layer.disable_adapters)))
    for weight in weights_of(model):
        found.append((weight.shape, weight.dtype, weight.device))
    return hash(tuple(found))


# Compiled code -------------------------------------------------------------------------------------------------------


def detours(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    """Yield each module whose own code would not run as written, the attribute to change, and what to set it to.

    Checked with torch 2.13 and 2.14; delete when one context turns off the compiler for one model.
    """
    for module in modules_of(model):
        own = vars(module)
        if own.get("gradient_checkpointing"):
            yield module, "gradient_checkpointing", False
        if own.get("_compiled_call_impl") is not None:
            yield module, "_compiled_call_impl", None
        original = uncompiled(own.get("forward"))
        if original is not own.get("forward"):
            yield module, "forward", original


def uncompiled(function: Any) -> Any:
    """Return what `torch.compile` was given to make `function`; a function that it did not make unchanged."""
    # A function that wraps a compiled one has copies of its attributes, that of its id included.
    while getattr(function, "_torchdynamo_wrapper_id", None) == id(function):
        function = function._torchdynamo_orig_callable
    return function


def without_compiler(model: Any) -> Any:
    """Return the model inside the wrapper of `torch.compile`; any other model as it is."""
    return getattr(model, "_orig_mod", model)


# Auto classes and configs --------------------------------------------------------------------------------------------


def forget_auto_model(config_class: type, model_class: type) -> None:
    """Remove `model_class` from AutoModel's table, where transformers registered it for `config_class`.

    Checked with 5.15.1, which registers the class in `auto_map`; 5.23 and 5.24 do not.
    """
    with suppress(AttributeError):
        registered = AutoModel._model_mapping._extra_content
        if registered.get(config_class) is model_class:
            del registered[config_class]


def in_auto_model(config_class: type) -> bool:
    """Return whether AutoModel has a model for `config_class`.

    Checked with 5.15.1 to 5.24.0; delete when there is a public function for it.
    """
    return config_class in AutoModel._model_mapping


def checkpoint_name(config: Any) -> str | None:
    """Return the Hub id or folder that a config was read from; None if it was not read.

    Checked with 5.15.1 to 5.24.0; delete when there is a public name.
    """
    return getattr(config, "_name_or_path", None) or None


def copy_loading_options(config: Any, other: Any) -> None:
    """Copy the attention and the dtype that the caller chose from `other`, a config of the same file, to `config`."""
    config._attn_implementation = attention_name(other)
    config.dtype = other.dtype


def find_file(name: Any, file: str, **where: Any) -> Path | None:
    """Return a file of a repository or folder, downloaded if necessary; None if it is missing.

    Without a connection it is missing if it is not in the cache. A Hub that fails may have it, so that is an error.
    Checked with 5.15.1 to 5.24.0; delete when `cached_file` has public arguments for that.

    Raises:
        OSError: the Hub answers with an error or breaks off, or a small file arrives damaged.
    """
    started = time.time()
    try:
        found = cached_file(name, file, **where)
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, LocalEntryNotFoundError):
            if is_unreachable(cause.__cause__):
                return None
            raise OSError(
                f"The Hub did not send {file} of {name}: {reason(cause.__cause__ or cause)}\nRun the same again."
            ) from error
        if cause is not None:
            raise
        # a missing file, or a damaged download, which raises again
        found = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    _check_small(Path(found), name, started)
    return Path(found)


def _check_small(path: Path, name: Any, started: float) -> None:
    """Check a file downloaded since `started` against its published hash of git, its name in the Hub's cache.

    Some mirrors publish the plain SHA-1 in its place. Weights have a SHA-256, and are checked once they are read.

    Raises:
        OSError: the bytes differ. The file is removed, so that the next load downloads it again.
    """
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}", blob.name) or blob.stat().st_mtime < started - 1:
        return
    data = blob.read_bytes()
    git, plain = (
        hashlib.sha1(head + data, usedforsecurity=False).hexdigest()
        for head in (b"blob %d\0" % len(data), b"")
    )
    if blob.name not in (git, plain):
        remove_damaged(path, name, f"hash of git is {git}")


def remove_damaged(path: Path, name: Any, found: str) -> NoReturn:
    """Remove a damaged file of the repository `name` from the Hub's cache, so that the next load downloads it again.

    Args:
        found: its hash; the published one is its name in the cache.

    Raises:
        OSError: always, with both hashes.
    """
    blob = path.resolve()
    blob.unlink()
    path.unlink(missing_ok=True)
    raise OSError(
        f"{path.name} of {name} arrived damaged: its {found}, the published one {blob.name}. "
        "The damaged file was removed; load again to download it again."
    )


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether no connection to the Hub was made; None stands for a lookup in the cache alone."""
    names = ("OfflineModeIsEnabled", "ConnectError", "ConnectTimeout")  # of httpx or httpx2
    return error is None or type(error).__name__ in names


def pinned(name: Any, where: dict[str, Any], local_files_only: bool = False) -> dict[str, Any]:
    """Return `where` with the commit that its revision names now, so that all files of a load are of one commit.

    A folder has no commits. Without config.json, `where` stays, and the loader says what is missing.

    Args:
        where: the keywords that choose the files of a repository.
    """
    if Path(name).is_dir():
        return where
    config = find_file(name, "config.json", local_files_only=local_files_only, **where)
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(config))
    return where if commit is None else where | {"revision": commit[1]}


def reads_weights(method: Any) -> bool:
    """Return whether transformers has a loader for weights that were quantised by this method.

    Checked with 5.15.1 to 5.24.0; delete when there is a public list.
    """
    names = (method, f"{method}_8bit")  # bitsandbytes has one for each number of bits
    return any(name in AUTO_QUANTIZER_MAPPING for name in names if isinstance(method, str))


def dequantises(method: str) -> bool:
    """Return whether `dequantize` makes plain floats of weights in this format; older versions leave their scales.

    Checked with 5.15.1 to 5.24.0; delete when 5.24 is the oldest.
    """
    quantizer = AUTO_QUANTIZER_MAPPING[method]
    return method != "compressed-tensors" or hasattr(quantizer, "get_load_operations")
