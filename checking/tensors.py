# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check the tensors of a draft: names, shapes and types by their headers, values tensor by tensor.

Values are read from the files one tensor at a time, so the memory needed is that of the largest tensor.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kinds import kind_of
from ..weights_dflash import (
    FLOATS,
    MISSING,
    NO_FLOATS,
    NO_INTEGERS,
    UNKNOWN,
    WRONG_SHAPES,
    Header,
    are_quantised,
    check_quantization,
    check_vocabulary,
    expected_shapes,
    is_zero_when_fresh,
    misfits,
    own_name,
    stored_tensors,
    with_own_parts,
)
from .remarks import Remark, Section, listed
from .sources import DraftFiles

_SECTION, _CONFIG = Section("tensors"), Section("config")
_CHUNK = 2**20  # values that are converted at once
_FAULTS = {
    WRONG_SHAPES: ("tensor-shape", "Correct the config, or export the draft again"),
    MISSING: ("tensor-missing", "Export the draft again, whole"),
    UNKNOWN: ("tensor-unknown", "Remove them, or say in the config what they are for"),
    NO_FLOATS: (
        "tensor-dtype",
        "Store floats, or write the quantization_config that says how to read them",
    ),
    NO_INTEGERS: ("ids-dtype", "Store the table of ids as integers"),
}
"""Fault -> name of the check, and what to do."""


@dataclass(frozen=True)
class TensorValues:
    """Describe the values of one tensor.

    Args:
        finite: whether none is NaN or infinite; the figures below are of finite values alone.
        low, high: its least and its largest value.
        mean, std: over all of its values.
    """

    name: str
    size: int
    dimensions: int
    finite: bool
    low: float
    high: float
    mean: float
    std: float

    @property
    def is_zero(self) -> bool:
        return self.finite and self.low == self.high == 0

    @property
    def is_one(self) -> bool:
        return self.finite and self.low == self.high == 1


def tensor_remarks(files: DraftFiles, config: Any, values_too: bool = True) -> Iterator[Remark]:
    """Yield everything that is wrong with the tensors of a draft.

    Args:
        config: as it is read from config.json; None if it cannot be read, then only values are checked.
        values_too: whether to read the values, for which the weights of a repository are downloaded.
    """
    stored = files.tensors
    if files.broken_weights:
        what = f"The weights cannot be read: {files.broken_weights}"
        yield _SECTION.error(
            "weights-broken", what, None, "safetensors", "Download or copy them again"
        )
        return
    if not stored:
        what = "There is no model.safetensors, and no index of shards"
        advice = "Save the draft with draft.save_pretrained(folder)"
        yield _SECTION.error(
            "weights-missing", what, list(files.names), "model.safetensors", advice
        )
        return
    if config is not None:
        yield from _header_remarks(files, config, values_too)
    yield from name_remarks(list(stored))
    yield from _dtype_remarks({dtype for dtype, _ in stored.values()})
    if not values_too:
        return
    values = [*tensor_values(files.weights)]
    yield from _value_remarks(values)
    initial = 0.02 if config is None else config.initializer_range
    yield from _training_remarks(values, initial)


def _header_remarks(files: DraftFiles, config: Any, values_too: bool) -> Iterator[Remark]:
    """Yield tensors that are not those of the config's model, by name, shape or type."""
    config = with_own_parts(config, files.tensors)
    expected = expected_shapes(kind_of(config).model_class, config)
    try:
        if values_too:
            check_vocabulary(files.weights, config, files.name)
    except ValueError as error:
        advice = "Export the draft again, with the table of ids of its head"
        yield _SECTION.error("vocabulary-ids", str(error), None, "ascending ids", advice)
    yield from _quantisation_remarks(config, files)
    if _is_quantised(config, files.tensors):
        return
    for fault, keys in misfits(files.tensors, expected).items():
        name, advice = _FAULTS[fault]
        keys = sorted(keys)
        if keys:
            what = f"The draft {fault}: {listed(keys)}"
            yield _SECTION.error(name, what, keys, f"{len(expected)} tensors", advice)


def _is_quantised(config: Any, stored: dict[str, Header]) -> bool:
    """Tell whether tensors are quantised, so that their names and shapes are those of the format."""
    return getattr(config, "quantization_config", None) is not None and are_quantised(stored)


def _quantisation_remarks(config: Any, files: DraftFiles) -> Iterator[Remark]:
    """Yield a quantisation that transformers does not read, or that was copied from the target's config."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    if not _is_quantised(config, files.tensors):
        what = "The config has a quantization_config, but none of the tensors is quantised; dflash-hub ignores it"
        advice = "Remove it, it seems to be the target's: engines may believe it"
        yield _SECTION.warning("quantization-copied", what, quantization, None, advice)
        return
    yield _CONFIG.note("quantised", *_quantised(quantization))
    try:
        check_quantization(config, files.name)
    except ValueError as error:
        advice = "Store the draft in bfloat16"
        yield _SECTION.error("quantization-unread", str(error), quantization, None, advice)


def _quantised(quantization: Any) -> tuple[str, Any, Any, str]:
    """Return what there is to note of a quantised draft."""
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    named = [fields.get(key) for key in ("quant_method", "format")]
    name = ", ".join(str(one) for one in named if one) or "unnamed"
    what = f"The draft is quantised ({name}); what engines do with that format was not checked"
    advice = "Try it there, or store the draft in bfloat16"
    return what, name, "floats", advice


def name_remarks(names: list[str]) -> Iterator[Remark]:
    """Yield names of tensors that readers treat differently."""
    prefixed = [name for name in names if name.startswith("model.")]
    if prefixed:
        what = f"Names of tensors begin with `model.`: {listed(prefixed)}. vLLM adds that itself and refuses them"
        advice = (
            "Load the draft with load_draft and save it again; that writes the names without it"
        )
        yield _SECTION.warning("tensor-prefix", what, prefixed, "no prefix", advice)
    own = [own_name(name) for name in names]
    own_parts = sorted({"embed_tokens.weight", "lm_head.weight"}.intersection(own))
    if own_parts:
        what = f"The draft ships {' and '.join(own_parts)}, which it uses in place of its target's"
        advice = "Leave out what is a copy of the target's: strict loaders (MLX) refuse it"
        if "d2t" in own:
            advice = "The head is that of its reduced vocabulary, which strict loaders (MLX) refuse"
        yield _SECTION.note("tensor-own-vocabulary", what, own_parts, "neither", advice)


def _dtype_remarks(dtypes: set[str]) -> Iterator[Remark]:
    """Yield types of stored tensors that work badly; integers are tables."""
    dtypes = {dtype for dtype in dtypes if dtype in FLOATS}
    if "F16" in dtypes:
        what = "Tensors are stored in float16, in which the feature projection of some targets overflows"
        yield _SECTION.warning("tensor-float16", what, "F16", "BF16", "Store the draft in bfloat16")
    if len(dtypes) > 1:
        what = f"Tensors have several types: {', '.join(sorted(dtypes))}"
        yield _SECTION.note(
            "tensor-dtypes-mixed", what, sorted(dtypes), "one type", "Is that meant?"
        )


def tensor_values(files: Iterable[Path]) -> Iterator[TensorValues]:
    """Yield what the values of every floating point tensor in these files are."""
    for name, file in stored_tensors(files):
        tensor = file.get_tensor(name)
        if tensor.is_floating_point() and tensor.numel():
            yield _measure(own_name(name), tensor)


@torch.no_grad()
def _measure(name: str, tensor: torch.Tensor) -> TensorValues:
    """Return what the values of a tensor of any shape are, a part at a time."""
    low, high = math.inf, -math.inf
    total = squares = 0.0
    count, flat = 0, tensor.reshape(-1)
    for part in flat.split(_CHUNK):
        wide = part if part.dtype == torch.float64 else part.float()
        least, most = map(float, wide.aminmax())
        if not math.isfinite(least + most):
            wide = wide[wide.isfinite()]
        if not wide.numel():
            continue
        least, most = map(float, wide.aminmax())
        variance, mean = map(float, torch.var_mean(wide, correction=0))
        low, high = min(low, least), max(high, most)
        total += mean * wide.numel()
        squares += (variance + mean**2) * wide.numel()
        count += wide.numel()
    mean = total / max(count, 1)
    variance = max(0.0, squares / max(count, 1) - mean**2)
    finite = count == flat.numel()
    return TensorValues(name, flat.numel(), tensor.ndim, finite, low, high, mean, variance**0.5)


def _value_remarks(values: list[TensorValues]) -> Iterator[Remark]:
    """Yield tensors that are not finite, or all zero."""
    broken = [value.name for value in values if not value.finite]
    if broken:
        what = f"{len(broken)} tensors hold NaN or infinite values: {listed(broken)}"
        advice = "Take an earlier checkpoint; training has diverged, or the file is damaged"
        yield _SECTION.error("tensor-nan", what, broken, "finite values", advice)
    matrices = [value for value in values if value.dimensions > 1]
    zero = [value.name for value in matrices if value.is_zero]
    if zero and len(zero) == len(matrices):
        what = "All matrices are zero"
        yield _SECTION.error(
            "tensors-all-zero", what, zero, "trained values", "Export the draft again"
        )
        return
    fresh = [name for name in zero if is_zero_when_fresh(name)]
    lost = [name for name in zero if not is_zero_when_fresh(name)]
    if lost:
        what = f"{len(lost)} of {len(matrices)} matrices are all zero: {listed(lost)}"
        yield _SECTION.warning(
            "tensor-zero", what, lost, "trained values", "Was the draft exported whole?"
        )
    if fresh:
        what = (
            f"Parts that are zero before training still are: {listed(fresh)}. They change nothing"
        )
        yield _SECTION.warning("head-untrained", what, fresh, "trained values", "Train them")
    gone = [
        value.name
        for value in values
        if value.dimensions == 1 and value.is_zero and "norm" in value.name
    ]
    if gone:
        what = f"Norms are all zero, so what they scale vanishes: {listed(gone)}"
        yield _SECTION.error("norm-zero", what, gone, "values near one", "Export the draft again")


def _training_remarks(values: list[TensorValues], initial: float) -> Iterator[Remark]:
    """Yield that a draft looks like one that was never trained: norms all one, projections as they are initialised."""
    body = [
        value
        for value in values
        if value.name.startswith(("layers.", "fc.", "norm.", "hidden_norm."))
    ]
    body = [value for value in body if not is_zero_when_fresh(value.name)]
    norms = [
        value for value in body if value.dimensions == 1 and value.name.endswith("norm.weight")
    ]
    projections = [value for value in body if value.dimensions == 2]
    ones = sum(value.is_one for value in norms)
    fresh = sum(_is_initial(value, initial) for value in projections)
    if not projections or fresh < len(projections) or ones < len(norms):
        return
    stds = [value.std for value in projections]
    what = (
        f"The draft looks as if it was never trained: {ones} of {len(norms)} norms are exactly one, and {fresh} of "
        f"{len(projections)} projections have the mean 0 and the standard deviation of initializer_range, {initial:g} "
        f"(found: {min(stds):.4g} to {max(stds):.4g})"
    )
    yield _SECTION.error(
        "untrained", what, stds, initial, "Train it, or export the trained weights"
    )


def _is_initial(value: TensorValues, initial: float) -> bool:
    """Tell whether mean and standard deviation are those of a normal distribution of this width, within four errors."""
    error = 1 / value.size**0.5
    near_width = abs(value.std - initial) <= initial * max(0.005, 4 * error / 2**0.5)
    near_zero = abs(value.mean) <= initial * max(0.001, 4 * error)
    return value.finite and near_width and near_zero
