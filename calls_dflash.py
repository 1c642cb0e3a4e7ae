# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Call a decoding function: by a target's `generate`, or by users.

This file travels with every pushed draft. `generate` reads the signature of a callable to learn which keywords it may
pass, and then calls it with what it has prepared.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from .compat_dflash import dropped_arguments, read_by_generate
from .layouts_dflash import shown

PREPARED = {"logits_processor", "stopping_criteria", "generation_config"}
"""What only `generate` prepares."""


def also_for_users(decode: Callable) -> Callable:
    """Return `decode`, which `generate` calls, for users too: called by them, it calls the target's `generate`."""

    @functools.wraps(decode)
    def call(self: Any, model: Any = None, *args: Any, **options: Any) -> Any:
        if options.keys() >= PREPARED or len(args) > 1:
            return decode(self, model, *args, **options)
        check_direct_call(model, args, options)
        return model.generate(*args, custom_generate=self, **options)

    return call


def check_direct_call(model: Any, args: tuple, options: dict[str, Any]) -> None:
    """Check target and prompt of a call that does not come from `generate`.

    Raises:
        ValueError: naming the argument.
    """
    check_loaded("model", model)
    input_ids = args[0] if args else options.get("input_ids", options.get("inputs"))
    if input_ids is not None:
        check_ids(input_ids)


def check_ids(input_ids: Any) -> None:
    """Refuse what are no token ids `[B, P]`.

    Raises:
        ValueError: with the type or the shape.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int, torch.long):
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ValueError(f"input_ids is {kind}; pass a tensor of token ids, [B, P].")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; decoding takes rows of at least one token, [B, P]."
        )


def check_loaded(name: str, target: Any) -> None:
    """Refuse what is no loaded target: a name, a class, a draft.

    Raises:
        ValueError: with the argument's name.
    """
    if isinstance(target, type):
        raise ValueError(
            f"{name} is the class {target.__name__}; pass a loaded model, "
            f"{target.__name__}.from_pretrained(...)."
        )
    if not hasattr(target, "generate") or not hasattr(target, "config"):
        raise ValueError(
            f"{name} is {shown(target, 60)}; pass the loaded target, "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


class of_a_draft(functools.cached_property):
    """Make an attribute of a draft. That of its class would be ignored by `generate`, so it is refused when called."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is not None:
            return super().__get__(instance, owner)
        return _refuse_class


def _refuse_class(*args: Any, **options: Any) -> None:
    """Refuse the decoding function of a class.

    Raises:
        ValueError: saying what to pass.
    """
    raise ValueError(
        "custom_generate is `speculate` of a class; load a draft, and pass its `draft.speculate`."
    )


class Signature:
    """Give a decoding function its `__signature__`: what `generate` may pass to it. Others read that of its class.

    Workaround: `generate` pops `tokenizer` before it reads the signature and then discards it, so stop strings would
    fail. While it reads, `tokenizer` is put back among its arguments.

    There is no other moment: all that `generate` does with this object before is to read the signature. Then it drops
    the tokenizer and makes its criteria, where stop strings without one are an error. Anything else would have to
    change the target's methods, or ask users for another call than `generate(..., tokenizer=...)`.

    Args:
        decode: the method that `generate` calls in the end.
        more: names of further keywords.
    """

    def __init__(self, decode: Callable, *more: str):
        self.decode, self.more = decode, more

    def __get__(self, function: Any, owner: type) -> inspect.Signature:
        """Return the signature.

        Raises:
            AttributeError: it is not `generate` that reads it.
            ValueError: a class was passed to `generate`, or an argument that has no meaning beside a draft.
        """
        frame = sys._getframe(1)
        if not read_by_generate(frame):
            raise AttributeError("__signature__")
        if function is None:
            raise ValueError(
                f"custom_generate is the class {owner.__name__}; pass an object: load a draft, and pass its "
                "`draft.speculate`."
            )
        if "assistant_tokenizer" in dropped_arguments(frame):
            raise ValueError(
                "A draft cannot be used with assistant_tokenizer: it has its target's tokens. Leave one of the two "
                "out."
            )
        return self.known

    @functools.cached_property
    def known(self) -> inspect.Signature:
        """What may be passed, the same in every call."""
        own = list(inspect.signature(self.decode).parameters.values())[1:]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in self.more]
        return inspect.Signature([*own[:-1], *added, own[-1]])
