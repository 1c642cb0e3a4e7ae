# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check the weights of a draft: their files, names, shapes, types and values.

This file travels with every pushed draft. A draft with wrong weights loads, and drafts nonsense. Names and shapes are
compared with the config before a tensor is read. So no config makes a model of a size that no file fills.
"""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging

from .compat_dflash import dequantises, find_file, reads_weights, remove_damaged
from .layouts_dflash import shown

logger = logging.get_logger(__name__)

# The Muse assistant of transformers has the feature projection in a submodule.
RENAMED = {"^encoder.fc": "fc", "^encoder.output_norm_enc": "hidden_norm"}
# In early files of SpecForge all heads are in one submodule, in those of Model Optimizer some are in none.
RENAMED |= {r"^logit_head\.": "", "^confidence_proj": "confidence_head.proj"}
for _part in ("markov_w1", "markov_w2", "gate_proj", "joint_proj"):
    RENAMED[f"^{_part}"] = f"markov_head.{_part}"
"""Patterns of the names of tensors -> what replaces them."""
OWN_PARTS = {
    "embed_tokens.weight": "has_own_embed_tokens",
    "lm_head.weight": "has_own_lm_head",
    "mask_embedding": "has_own_mask_embedding",
}
"""Tensor -> the field of a config that says that the draft has it; published ones often lack the field."""
FLOATS = {"F64", "F32", "F16", "BF16"}
_FLOAT_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_GROUPED = "compressed-tensors"
_DEQUANTISED = (_GROUPED, "fp8", "mxfp8")
_INTEGERS = {"I64", "I32", "I16", "U8"}
_IDS, _KNOWN = "d2t", "t2d"
"""The tensors that say which of the target's tokens a draft knows: by id, and by one bool for each of the target's."""
UNUSED = [rf"^{_KNOWN}$", rf"^{_IDS}$", r"^verifier_", r"\binv_freq$", r"\boriginal_inv_freq$"]
"""Patterns of the names of tensors that are not read where a model has none of that name. The bools follow from the
ids, which a draft that knows all tokens does not need; `verifier_*` are the target's, of training."""
_ZERO_WHEN_FRESH = ("kernel", "codebook", "markov_w2")
"""Parts of names of tensors that add nothing before they are trained."""
WRONG_SHAPES = "has tensors of other shapes than its config.json says"
MISSING = "lacks tensors, which would be random"
UNKNOWN = "has tensors that this model does not know (a reduced vocabulary, or another head?)"
NO_FLOATS = "has tensors that are no floats"
NO_INTEGERS = "has ids that are no integers"
_NONSENSE = "It would load and draft nonsense, so it is refused."
Header = tuple[str, tuple[int, ...]]
"""Type and shape of a stored tensor."""
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


# Before the weights are read ------------------------------------------------------------------------------------------


def check_stored(model_class: Any, config: Any, name: Any, where: dict[str, Any]) -> Any:
    """Compare names, shapes and types of the stored tensors with a config, before a tensor is read.

    Weights that are quantised are checked once they are loaded. A draft without safetensors is left to transformers.

    Args:
        where: the keywords that choose the files of a repository.

    Returns:
        The config; without its `quantization_config`, and with a warning, if no tensor is quantised. Such a config
        was copied from that of a quantised target.

    Raises:
        ValueError: they differ, or the index of the shards names no files of this draft.
    """
    files = stored_files(name, where)
    stored = headers(files)
    if not stored:
        _refuse_pickled_weights(name, where)
        return config
    config = with_own_parts(config, stored)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        if are_quantised(stored):
            return config
        warnings.warn(
            f"The config.json of {name} has quantization_config ({shown(quantization)}), but none of its tensors is "
            "quantised. It is ignored; it seems to be copied from the target's.",
            UserWarning,
            stacklevel=3,
        )
        config = copy.deepcopy(config)
        del config.quantization_config
    _refuse(name, misfits(stored, expected_shapes(model_class, config)))
    check_vocabulary(files, config, name)
    return config


def with_own_parts(config: Any, stored: dict[str, Header]) -> Any:
    """Return the config with the fields for the embedding and the head that are among the `stored` tensors."""
    config = copy.deepcopy(config)
    for key, (_, shape) in stored.items():
        field = OWN_PARTS.get(key.removeprefix("model."))
        if field is not None:
            setattr(config, field, True)
            if config.vocab_size is None and len(shape) == 2:
                config.vocab_size = shape[0]
    return config


def check_quantization(config: Any, name: Any) -> Any:
    """Return a config with which transformers loads quantised weights as floats, where it can.

    A draft's context is cached without its forward, in which some formats would unpack their weights.

    Raises:
        ValueError: transformers cannot load the format, or only a part of it.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return config
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = fields.get("quant_method")
    if not reads_weights(method):
        raise _unreadable(name, fields, "has no loader for this format")
    if method not in _DEQUANTISED:
        return config
    if not dequantises(method):
        raise _unreadable(name, fields, "cannot make floats of them; upgrade it")
    groups = fields.get("config_groups") or {}
    if method == _GROUPED and not groups:
        raise _unreadable(name, fields, "finds no config_groups that tell how")
    schemes = [group.get("weights") for group in groups.values()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise _unreadable(name, fields, "dequantises one of its config_groups")
    config = copy.deepcopy(config)
    config.quantization_config = {**fields, "dequantize": True}
    return config


def _unreadable(name: Any, fields: dict[str, Any], reason: str) -> ValueError:
    """Return the error for quantised weights that are not loaded, with the name of their format."""
    keys = ("quant_method", "quant_algo", "format")
    words = [str(fields[key]) for key in keys if fields.get(key)]
    producer = fields.get("producer")
    if isinstance(producer, dict) and producer.get("name"):
        words.insert(0, str(producer["name"]))
    return ValueError(
        f"The weights of {name} are quantised ({' '.join(words) or shown(fields)}), and transformers "
        f"{transformers.__version__} {reason}. Load the draft in plain floats that they were made from, or a copy "
        "quantised with compressed-tensors."
    )


def stored_files(name: Any, where: dict[str, Any]) -> list[Path]:
    """Return the safetensors of a draft, downloaded if necessary; [] if it has none.

    Raises:
        ValueError: the index of the shards names no files of this draft.
    """
    whole = find_file(name, _WHOLE, **where)
    if whole is not None:
        return [whole]
    index = find_file(name, _INDEX, **where)
    if index is None:
        return []
    found = (find_file(name, shard, **where) for shard in shards_in(index))
    return [path for path in found if path is not None]


def shards_in(index: Path) -> list[str]:
    """Return the names of the shards that an index names.

    Raises:
        ValueError: it is no index, or names files elsewhere.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = sorted(names)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is no index of shards, a dict with the dict weight_map; copy or download it again."
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(
                f"{index} names the file {shown(shard)}, which is not a safetensors file beside it, so it is refused."
            )
    return shards


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Yield the name of every tensor in these files, and the file that holds it, which is open until the next one."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                yield key, file


def headers(files: Iterable[Path]) -> dict[str, Header]:
    """Return the type and the shape of every tensor in these files, from their headers."""
    found = {}
    for key, file in stored_tensors(files):
        tensor = file.get_slice(key)
        found[key] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def expected_shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a model of this config stores. Nothing is allocated."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def are_quantised(stored: dict[str, Header]) -> bool:
    """Tell whether any of the stored tensors, but for the tables of ids, are no floats."""
    types = {dtype for key, (dtype, _) in stored.items() if own_name(key) not in (_IDS, _KNOWN)}
    return bool(types - FLOATS)


def own_name(key: str) -> str:
    """Return the name that a stored tensor has in our model."""
    key = key.removeprefix("model.")
    for pattern, ours in RENAMED.items():
        key = re.sub(pattern, ours, key)
    return key


def misfits(
    stored: dict[str, Header], expected: dict[str, tuple[int, ...]]
) -> dict[str, Iterable[str]]:
    """Return what is wrong with stored tensors by name, shape and type, most serious first: fault -> tensors."""
    found = set()
    wrong_shapes, no_floats = [], []
    no_integers = []
    for key, (dtype, shape) in stored.items():
        key = own_name(key)
        found.add(key)
        if key in expected and shape != expected[key]:
            wrong_shapes.append(f"{key}: {shape} in the file, {expected[key]} here")
        if key == _IDS and dtype not in _INTEGERS:
            no_integers.append(f"{key} ({dtype})")
        elif key in expected and key != _IDS and dtype not in FLOATS:
            no_floats.append(f"{key} ({dtype})")
    return {
        WRONG_SHAPES: wrong_shapes,
        MISSING: expected.keys() - found,
        UNKNOWN: _unknown(found - expected.keys()),
        NO_FLOATS: no_floats,
        NO_INTEGERS: no_integers,
    }


def _unknown(keys: Iterable[str]) -> set[str]:
    """Return `keys` without those of tensors that a draft may ship and never uses."""
    unused = re.compile("|".join(UNUSED))
    names = {key.removeprefix("model.") for key in keys}
    return {name for name in names if not unused.search(name)}


def check_vocabulary(files: list[Path], config: Any, name: Any) -> None:
    """Refuse stored ids that are not those of a reduced vocabulary, or that contradict the stored bools."""
    found = _read(files, (_IDS, _KNOWN))
    offsets, known = found.get(_IDS), found.get(_KNOWN)
    ids = torch.arange(config.vocab_size or 0, device="cpu")  # as what is read from files
    if config.draft_vocab_size is None:
        if offsets is not None and bool(offsets.any()):
            raise ValueError(
                f"{name} has d2t, the ids of a reduced vocabulary of {len(offsets)} tokens, but draft_vocab_size is "
                f"None or vocab_size, {config.vocab_size}. {_NONSENSE}"
            )
    elif offsets is not None:
        ids = offsets + torch.arange(len(offsets), device="cpu")
        _check_target_ids(ids, config.vocab_size, name)
    if known is not None and not torch.equal(known.nonzero()[:, 0], ids):
        raise ValueError(
            f"t2d of {name} is True for {int(known.bool().sum())} tokens, which are not the {len(ids)} that d2t and "
            f"draft_vocab_size say. {_NONSENSE}"
        )


def _read(files: list[Path], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return those of these tensors that the files hold."""
    found = {}
    for key, file in stored_tensors(files):
        short = key.removeprefix("model.")
        if short in names:
            found[short] = file.get_tensor(key)
    return found


def _refuse(name: Any, faults: dict[str, Any]) -> None:
    """Raise a ValueError for the first of `faults` (what is wrong -> keys) that has any keys."""
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{name} {fault}: {', '.join(sorted(keys)[:3])}{more}. {_NONSENSE}")


def _refuse_pickled_weights(name: Any, where: dict[str, Any]) -> None:
    """Refuse a draft whose weights are pickles alone.

    Raises:
        OSError: naming the file and the command that converts it.
    """
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if find_file(name, file, **where) is not None:
            raise OSError(
                f"{name} has no model.safetensors, and pickles ({file}) are not read, because they could run code. "
                f"Make a copy in safetensors: dflash-hub convert {name} NEW_FOLDER --layout hub"
            )


def check_no_mask_embedding(name: Any, where: dict[str, Any]) -> None:
    """Refuse a pickle with a trained mask embedding beside the weights; no key of config.json shows it."""
    if find_file(name, "mask_embedding.pt", **where) is not None:
        raise ValueError(
            f"{name} has a trained mask embedding in a pickle (mask_embedding.pt), which is not read, because it could "
            f"run code. Make a copy in safetensors: dflash-hub convert {name} NEW_FOLDER --layout hub"
        )


def verify_downloads(name: Any, where: dict[str, Any], started: float) -> None:
    """Check the weights downloaded since `started` against their published SHA-256, their names in the Hub's cache.

    Raises:
        OSError: the bytes differ. The file is removed, so that the next load downloads it again.
    """
    for path in _weight_files(name, where):
        blob = path.resolve()
        published = re.fullmatch(r"[0-9a-f]{64}", blob.name)
        if published is None or blob.stat().st_mtime < started - 1:
            continue
        actual = _sha256(blob)
        if actual != blob.name:
            remove_damaged(path, name, f"SHA-256 is {actual}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _weight_files(name: Any, where: dict[str, Any]) -> list[Path]:
    """Return the cached safetensors of a Hub repository; [] for a local folder, or where none is cached."""
    if Path(name).exists():
        return []

    def cached(file: str) -> Path | None:
        try:
            return find_file(name, file, local_files_only=True, **where)
        except OSError:
            return None

    names = {_WHOLE}
    index = cached(_INDEX)
    if index is not None:
        names.update(shards_in(index))
    return [path for path in map(cached, sorted(names)) if path is not None]


# Once they are loaded -------------------------------------------------------------------------------------------------


def check_tensors(info: dict[str, Any], name: Any) -> None:
    """Refuse missing tensors, unknown ones, and ones of another shape, of which transformers only warns.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns.
    """
    wrong_shapes = []
    for key, stored, ours in info["mismatched_keys"]:
        wrong_shapes.append(f"{key}: {tuple(stored)} in the file, {tuple(ours)} here")
    unknown, missing = _unknown(info["unexpected_keys"]), info["missing_keys"]
    _refuse(name, {WRONG_SHAPES: wrong_shapes, MISSING: missing, UNKNOWN: unknown})


def is_zero_when_fresh(key: str) -> bool:
    return any(part in key for part in _ZERO_WHEN_FRESH)


_PLAIN = (torch.nn.Parameter, torch.Tensor)
"""Types of tensors whose values are their bits, unlike those of quantised ones."""


@torch.no_grad()
def check_values(model: Any, name: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Refuse weights that are not finite, or all zero; warn of single matrices that are all zero.

    Args:
        tensors: by their names, where the model is on the meta device; None for its parameters.
    """
    not_finite, zero = [], []
    others = 0
    for key, tensor in (tensors or dict(model.named_parameters())).items():
        is_plain = type(tensor) in _PLAIN and tensor.dtype in _FLOAT_DTYPES
        if not is_plain or tensor.device.type == "meta" or not tensor.numel():
            continue
        low, high = tensor.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            not_finite.append(key)
        elif tensor.ndim > 1 and not bool(low.abs() + high.abs()):
            zero.append(key)
        else:
            others += tensor.ndim > 1
    _refuse(name, {"has weights that are NaN or infinite": not_finite})
    ids = model.target_ids
    if ids is not None and ids.device.type != "meta":
        _check_target_ids(ids, model.config.vocab_size, name)
    if zero and not others:
        raise ValueError(f"All weights of {name} are zero. {_NONSENSE}")
    zero = [key for key in zero if not is_zero_when_fresh(key)]
    if zero:
        logger.warning(
            f"{name} has weights that are all zero: {', '.join(zero[:3])}. Was it trained?"
        )


def _check_target_ids(ids: torch.Tensor, vocab: int, name: Any) -> None:
    """Refuse `ids [draft_vocab_size]` that are no tokens of the target, or one token twice."""
    if bool((ids[1:] <= ids[:-1]).any()) or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab:
        raise ValueError(
            f"d2t of {name} leads to tokens from {int(ids.min())} to {int(ids.max())}; they must ascend, from 0 to "
            f"{vocab - 1} (vocab_size - 1). {_NONSENSE}"
        )
