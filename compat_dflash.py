# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Everything that leans on private names of transformers, or on how one of its versions behaves.

This file travels with every pushed draft. One small function each: what it does, the versions that it was checked with,
and when it can go. No other file uses a private name of transformers.
"""

import inspect
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, masking_utils
from transformers.utils import cached_file

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls a cache: the first from 5.24 on, the others before, and until 5.40 (`generate`: 6.0) too."""

GENERATE = "transformers.generation.utils"

CHECKED = ("5.15.1", "5.24.0")
"""The oldest and the newest version of transformers that the tests run on."""


def versions() -> str:
    """Name the versions that an error message must hold."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def difference(what: str) -> ValueError:
    """Return the error for a model that runs in another way than expected: what differs, and what to do."""
    oldest, newest = (Version(version) for version in CHECKED)
    advice = (
        f"This version of dflash-hub was checked with transformers {oldest} to {newest}: upgrade it (pip install "
        "--upgrade dflash-hub; for a draft whose code came from the Hub, its owner runs `dflash-hub refresh`), or "
        "install one of those."
    )
    if oldest <= Version(transformers.__version__) <= newest:
        advice = (
            "This version of dflash-hub was checked with this transformers, so it is this model that it cannot "
            "decode, or something has changed it. Call `target.eval()` if it is in training mode; else generate "
            "without a draft."
        )
    return ValueError(
        f"{what} ({versions()}). The text could come out wrong, so it is not written. {advice}"
    )


# The cache argument. Checked with 5.15.1, 5.23.0 and 5.24.0; can go when the oldest supported version is 5.24. --------


def parameters(function: Callable) -> frozenset[str]:
    """The names of the arguments that `function` takes, those of what it wraps included."""
    return frozenset(inspect.signature(function).parameters)


def cache_name(function: Callable) -> str:
    """What `function`, the forward of a model or of a layer, calls the cache that it is given.

    Raises:
        ValueError: it takes none.
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
    """The cache among `inputs`, by whichever name; None if there is none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def without_cache(inputs: MutableMapping[str, Any]) -> dict[str, Any]:
    """`inputs` without a cache by any name."""
    return {name: value for name, value in inputs.items() if name not in CACHE_NAMES}


def cache_field(output: Any) -> str:
    """What an output of a model or of `generate` calls the cache that it holds."""
    names = {one.name for one in fields(output)}
    return next(name for name in CACHE_NAMES if name in names)


# `generate` ----------------------------------------------------------------------------------------------------------


def made_by_user(cache: Any, unmarked: bool) -> bool:
    """Whether a user made this cache, which `generate` marks; `unmarked` where nothing was marked.

    Checked with 5.15.1 to 5.24.0; can go when `generate` tells a decoding function.
    """
    return getattr(cache, "_is_user_defined", unmarked)


def padding_token(config: Any) -> int:
    """The token that `generate` puts after the end of a row, 0 where it has none.

    Checked with 5.15.1 to 5.24.0; can go when the prepared config holds it by a public name.
    """
    found = getattr(config, "_pad_token_tensor", None)
    return 0 if found is None else int(found)


def local_of_generate(name: str, frame: Any) -> Any:
    """A local variable of a frame of transformers' `generate`, which does not pass it on; None anywhere else.

    Checked with 5.15.1 to 5.24.0; can go when `generate` hands streamer and tokenizer to a decoding function.

    Raises:
        RuntimeError: `generate` has no such variable; what it was given would be lost without a word.
    """
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    if not module.startswith("transformers."):
        return None
    if module != GENERATE or name not in frame.f_code.co_varnames + frame.f_code.co_cellvars:
        raise RuntimeError(
            f"`generate` of this version ({versions()}) holds no {name!r}, which a draft's decoding reads there. "
            "Upgrade dflash-hub, or install a transformers that it was checked with."
        )
    return frame.f_locals.get(name)


def keep_tokenizer(frame: Any) -> None:
    """Put the tokenizer, which stop strings need, back among the arguments that `generate` is about to drop.

    Checked with 5.15.1 to 5.24.0, which drop it for every decoding function that is handed to them; can go when they
    do not.

    Args:
        frame: that reads the signature of the decoding function; may be inside the standard library.
    """
    while frame is not None and frame.f_code.co_filename == inspect.__file__:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_extract_generation_mode_kwargs":
        return
    prepared = local_of_generate("generation_mode_kwargs", frame)
    arguments = local_of_generate("kwargs", frame)
    if "tokenizer" in (prepared or {}):
        arguments["tokenizer"] = prepared["tokenizer"]


def makes_own_cache(model: Any) -> bool:
    """Whether a model wants a cache of a kind of its own, which `generate` then leaves to it.

    Checked with 5.15.1 to 5.24.0; can go when a model says so by a public name.
    """
    return not model._supports_default_dynamic_cache()


# Attention -----------------------------------------------------------------------------------------------------------


def attention_name(config: Any) -> str:
    """The attention that a config names: "sdpa", "eager" ...

    Checked with 5.15.1 to 5.24.0; can go with a public name.
    """
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Name an attention, and leave the parts of a composite config alone, which the public setter does not.

    Checked with 5.15.1 to 5.24.0; can go when the attention of one forward can be chosen by an argument.
    """
    config._attn_implementation_internal = name


def names_attention(config: Any) -> bool:
    """Whether a config names an attention of its own."""
    return hasattr(config, "_attn_implementation_internal")


def own_eager(module: Any) -> Callable:
    """The plain attention function of the file that defines `module`.

    Checked with 5.15.1 to 5.24.0, which have no registry of them; can go when they do.

    Raises:
        ValueError: that file has none.
    """
    home = sys.modules[type(module).__module__]
    if not hasattr(home, "eager_attention_forward"):
        raise ValueError(
            f"{type(module).__name__} has no plain attention function where transformers keeps them "
            f"(eager_attention_forward in {home.__name__}; {versions()}), so a draft cannot decode with it."
        )
    return home.eager_attention_forward


def visible_in_window(
    window: int, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor | None:
    """Which `keys [M]` each of `queries [Q]` sees through a causal window, by transformers' own masks: `[Q, M]`.

    Checked with 5.15.1 to 5.24.0. None where a version has no such function; the window is then crossed to see.
    """
    rule = getattr(masking_utils, "sliding_window_causal_mask_function", None)
    return None if rule is None else rule(window)(0, 0, queries[:, None], keys[None])


# Cache layers --------------------------------------------------------------------------------------------------------


def set_slots_seen(layer: Any, slots: int) -> None:
    """Tell a sliding layer of a `DynamicCache` how long its text is, of which it keeps the end.

    Checked with 5.15.1 to 5.24.0; can go when such a layer can be built from its keys and the length.

    Raises:
        ValueError: the layer counts by another name.
    """
    if not hasattr(layer, "cumulative_length"):
        raise difference(f"{type(layer).__name__} does not say how long its text is")
    layer.cumulative_length = slots


# Auto classes and configs --------------------------------------------------------------------------------------------


def forget_auto_model(config_class: type, model_class: type) -> None:
    """Take `model_class` out of AutoModel's table, where transformers put it for every config of `config_class`.

    Checked with 5.15.1, which registers what `auto_map` names; 5.23 and 5.24 do not, and have nothing to take out.
    """
    with suppress(AttributeError):
        registered = AutoModel._model_mapping._extra_content
        if registered.get(config_class) is model_class:
            del registered[config_class]


def in_auto_model(config_class: type) -> bool:
    """Whether AutoModel has a model for `config_class`.

    Checked with 5.15.1 to 5.24.0; can go with a public question.
    """
    return config_class in AutoModel._model_mapping


def checkpoint_name(config: Any) -> str | None:
    """What a config was read from, a Hub id or a folder. Checked with 5.15.1 to 5.24.0; can go with a public name."""
    return getattr(config, "_name_or_path", None) or None


def take_over_loading(config: Any, other: Any) -> None:
    """Give `config` the attention and the dtype that `other`, read from the same file, was told to load with."""
    config._attn_implementation = attention_name(other)
    config.dtype = other.dtype


def find_file(name: Any, file: str, **where: Any) -> Path | None:
    """A file of a repository or folder, downloaded if need be; None where it is not there, or cannot be reached.

    Checked with 5.15.1 to 5.24.0; can go when `cached_file` has public arguments for that.
    """
    silent = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(name, file, **where, **silent)
    return None if found is None else Path(found)
