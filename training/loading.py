# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a target in less memory, for training: in fewer bits, over several processes, without layers above its taps."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, TorchAoConfig


def _eight_bits(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _four_bits(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _torchao(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@dataclass(frozen=True)
class Quantization:
    """Describe a way to hold the weights of a target's linear layers; embedding and head stay as they are.

    Args:
        library: what it needs.
        bits: of a weight, with its share of the scales.
        config: makes transformers' config, given the dtype to compute in.
    """

    library: str
    bits: float
    config: Callable[[torch.dtype], Any]


QUANTIZATIONS = {
    "8bit": Quantization("bitsandbytes", 8.1, _eight_bits),
    "4bit": Quantization("bitsandbytes", 4.5, _four_bits),
    "int8": Quantization("torchao", 8.1, _torchao),
}
"""By the values of `--target-quantization`."""


def quantization_config(name: str | None, dtype: torch.dtype) -> Any:
    """Return transformers' config of a quantisation; None for none.

    Raises:
        ValueError: there is no such one, or its library is not installed.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise ValueError(
            f"target_quantization is {name!r}; it must be one of {', '.join(QUANTIZATIONS)}."
        )
    chosen = QUANTIZATIONS[name]
    try:
        return chosen.config(dtype)
    except ImportError as error:
        raise ValueError(
            f"target_quantization is {name!r}, which needs {chosen.library}: pip install {chosen.library}"
        ) from error


# Several processes --------------------------------------------------------------------------------------------------


def parallel_options() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a target over all processes.

    Raises:
        ValueError: there is one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            "tensor_parallel is True, but there is one process; start several with torchrun or accelerate launch."
        )
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # before transformers 5.18
        return {"tp_plan": "auto"}


def is_parallel(target: Any) -> bool:
    """Return whether the weights of a target are spread over several processes."""
    return any(isinstance(weight, DTensor) for weight in target.parameters())


def whole_module(module: Any) -> Any:
    """Return an embedding or a head with its whole weight, of one whose weight is spread over processes.

    What processes ask of it then need not be the same.
    """
    if not any(isinstance(weight, DTensor) for weight in module.parameters()):
        return module
    whole = copy.copy(module)
    # What asks the other processes is a forward of its own, or hooks in older versions.
    vars(whole).pop("forward", None)
    whole._forward_hooks, whole._forward_pre_hooks = OrderedDict(), OrderedDict()
    whole._parameters = dict(module._parameters)
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(weight, DTensor):
            whole._parameters[name] = nn.Parameter(weight.full_tensor(), requires_grad=False)
    return whole


# Layers above the last tap ---------------------------------------------------------------------------------------


class AbsentLayer(nn.Module):
    """Stand for a layer of the target that was not loaded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "The target was loaded without the layers above its last tap (cut_target), so it only trains drafts. Load "
            "it whole to decode, or for a loss that needs its distribution."
        )


def is_cut(target: Any) -> bool:
    """Return whether a target was loaded without its last layers."""
    return any(isinstance(module, AbsentLayer) for module in target.modules())


@contextmanager
def cut_config(config: Any, layers: int) -> Iterator[None]:
    """Let the config of a target describe its first `layers` alone, while a model is made from it in this context."""
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    before = {"num_hidden_layers": whole}
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            before[name] = value
    for name, value in before.items():
        setattr(text, name, layers if name == "num_hidden_layers" else value[:layers])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)


def add_absent_layers(target: Any, layers: int, whole: int) -> None:
    """Put something in the place of the layers that a target of `whole` was loaded without, so that all count.

    Raises:
        ValueError: its layers are not where transformers' models keep them.
    """
    found = getattr(target.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) != layers:
        raise ValueError(
            f"{type(target).__name__} shows no list of {layers} decoder layers, so it cannot be cut; leave cut_target "
            "out."
        )
    found.extend([AbsentLayer() for _ in range(whole - layers)])
