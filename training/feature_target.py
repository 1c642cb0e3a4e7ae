# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write and load what training from features needs of the target: its config, embedding and head.

The last hidden state is stored as the head reads it, after the final norm. So no layer and no norm is needed.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..compat_dflash import loaded

WEIGHTS = "model.safetensors"
_TIED = ("head.weight", "embed.weight")
"""A head without this tensor has that one."""


def _ends_of(model: Any) -> dict[str, nn.Module]:
    return {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings()}


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Yield the full name, the owner, the name there, and every tensor of a module; those too that are not saved."""
    for prefix, owner in module.named_modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield f"{prefix}.{name}".lstrip("."), owner, name, tensor


def save_ends(folder: Path, target: Any) -> None:
    """Write config, embedding and head of a target; a head that is the embedding is not written twice.

    Raises:
        ValueError: they are not plain tensors, so that they cannot be written or put back.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for end, module in _ends_of(target).items():
        with loaded(module):
            for name, _, _, tensor in _tensors_of(module):
                if id(tensor) not in known:
                    key = f"{end}.{name}"
                    tensors[key] = _plain(key, tensor)
                known.add(id(tensor))
    folder.mkdir(parents=True, exist_ok=True)
    target.config.save_pretrained(folder)
    target.generation_config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS)
    load_ends(folder)


def _plain(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU.

    Raises:
        ValueError: it is no plain one.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise ValueError(
            f"The target's {key} is a {type(tensor).__name__}, so it is quantised in a way that features do not hold. "
            "Load the target with its embedding and head in floats, or train without features."
        )
    return tensor.detach().to("cpu", copy=True).contiguous()


def load_ends(folder: Path) -> Any:
    """Return the target without its layers' weights: what needs them is refused.

    Raises:
        ValueError: the files cannot be read, or are not of this model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = list(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder}, the target's embedding and head, cannot be read: {error}. Write the features again."
        ) from error
    _put_ends(model, stored, folder)
    _drop_weights(model)
    _refuse_forwards(model)
    return model.eval()


def _put_ends(model: Any, stored: dict[str, torch.Tensor], folder: Path) -> None:
    """Give the embedding and the head of a model the tensors that were written.

    Raises:
        ValueError: they have other names or shapes.
    """
    head, embed = _TIED
    if head not in stored and embed in stored:
        stored[head] = stored[embed]
    frozen: dict[int, nn.Parameter] = {}
    expected = {}
    for end, module in _ends_of(model).items():
        for name, owner, own, tensor in list(_tensors_of(module)):
            key = f"{end}.{name}"
            expected[key] = tuple(tensor.shape)
            if key in stored and own in owner._buffers:
                owner._buffers[own] = stored[key]
            elif key in stored:
                values = stored[key]
                owner._parameters[own] = frozen.setdefault(id(values), nn.Parameter(values, False))
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != expected:
        raise ValueError(
            f"{folder / WEIGHTS} holds {found}, but the embedding and head of a {type(model).__name__} are "
            f"{expected}. Train without features: this target has others than its config.json says."
        )


def _drop_weights(model: nn.Module) -> None:
    """Remove every tensor that has no values."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = None


def _refuse_forwards(model: Any) -> None:
    """Let whatever needs the layers say why there are none."""
    for owner, name in ((model, "generate"), (model.get_decoder(), "forward")):
        setattr(owner, name, _refusing(getattr(owner, name)))


def _refusing(function: Callable) -> Callable:
    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "Of the target only embedding and head are here, since the run is trained from features; but this needs "
            "its layers. Pass the whole target, and rows of the features alone; or leave out what decodes."
        )

    return refuse


def has_layers(target: Any) -> bool:
    """Return whether a target can run, and is not one of `load_ends`."""
    return "generate" not in vars(target)
