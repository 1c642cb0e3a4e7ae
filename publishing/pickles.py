# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Convert pickles of tensors into safetensors. A draft's folder may hold such files, and loading reads none of them.

No code in a pickle runs here: it is read with `weights_only=True`, which knows tensors and plain values alone.
"""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..repository_dflash import is_own_file

MASK_EMBEDDING = "mask_embedding"
"""The file of a trained mask embedding, without its ending, and the name of its tensor."""
_WEIGHTS = "pytorch_model"


def pickles_in(folder: Path) -> list[Path]:
    """Return the pickles that a draft needs: its weights and its mask embedding, but no state of a training run."""
    weights = (
        [] if [*folder.glob("model*.safetensors")] else sorted(folder.glob(f"{_WEIGHTS}*.bin"))
    )
    masks = folder / f"{MASK_EMBEDDING}.pt"
    return [path for path in (*weights, masks) if is_own_file(path, folder)]


def without_pickles(folder: Path, staged: Path) -> Path:
    """Write config and weights of a draft into the empty folder `staged`, as shards in safetensors; return it.

    Raises:
        ValueError: a pickle holds anything but tensors and plain values.
    """
    parts = [path for path in sorted(folder.glob("*.safetensors")) if is_own_file(path, folder)]
    for path in pickles_in(folder):
        copy = staged / path.name
        shutil.copyfile(path, copy)
        parts.append(convert_pickle(copy))
        copy.unlink()
    names = {}
    for number, path in enumerate(parts, 1):
        shard = staged / f"model-{number:05}-of-{len(parts):05}.safetensors"
        if path.parent == staged:
            path.rename(shard)
        else:
            shutil.copyfile(path, shard)
        with safe_open(shard, framework="pt") as file:
            names.update(dict.fromkeys(file.keys(), shard.name))
    for name in ("config.json", "README.md"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, staged / name)
    index = {"metadata": {}, "weight_map": names}
    (staged / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return staged


def convert_pickle(path: str | Path) -> Path:
    """Write the tensors of a pickle as safetensors beside it, and return that file; the pickle stays.

    `pytorch_model*.bin` becomes `model*.safetensors`. `mask_embedding.pt` becomes `mask_embedding.safetensors` with
    one tensor, `mask_embedding [H]`. Nested dicts become names with dots, and plain values become metadata.

    Raises:
        ValueError: there is no such file, it holds anything but tensors and plain values, or the new file exists.
    """
    path = Path(path)
    name = path.stem
    if name.startswith(_WEIGHTS):
        name = "model" + name.removeprefix(_WEIGHTS)
    converted = path.with_name(f"{name}.safetensors")
    if converted.exists():
        raise ValueError(
            f"{converted} exists, so {path.name} was not converted. Move one of them away."
        )
    content = _read(path)
    if path.stem == MASK_EMBEDDING:
        content = _one_vector(content, path)
    tensors, values = {}, {}
    for key, value in _flat(content, path):
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().clone().contiguous()
        else:
            values[key] = str(value)
    if not tensors:
        raise ValueError(f"{path} holds no tensors, so there is nothing to convert. Remove it.")
    save_file(tensors, converted, metadata=values | {"format": "pt"})
    return converted


def _read(path: Path) -> Any:
    """Return the content of a pickle, of which no code runs.

    Raises:
        ValueError: there is no such file, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Pass a pickle of tensors, such as a .pt file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which could run code when it is read "
            f"({first}), so it was not converted. Ask its author for safetensors."
        ) from error


def _one_vector(content: Any, path: Path) -> dict[str, Any]:
    """Return a mask embedding as `mask_embedding [H]`, from each form in which it is published.

    Those are a tensor, `[H]` or `[1, H]`, or a dict that holds one and maybe the mask token's id.
    """
    content = content if isinstance(content, dict) else {MASK_EMBEDDING: content}
    values = {key: value for key, value in content.items() if isinstance(value, int)}
    vectors = [value for value in content.values() if isinstance(value, torch.Tensor)]
    vector = vectors[0] if len(vectors) == 1 else None
    if vector is None or len(vector.flatten()) != vector.shape[-1:].numel():
        raise ValueError(
            f"{path} must hold one vector, the embedding of the mask token; it holds {_described(content)}."
        )
    return {MASK_EMBEDDING: vector.reshape(-1), **values}


def _described(content: Any) -> str:
    """Return what a pickle holds, in words."""
    if isinstance(content, torch.Tensor):
        return f"a tensor of shape {tuple(content.shape)}"
    if isinstance(content, dict):
        described = (f"{key}, {_described(value)}" for key, value in content.items())
        return f"a dict with {'; '.join(described)}"
    return f"a {type(content).__name__}"


def _flat(content: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values of nested dicts, with names joined by dots.

    Raises:
        ValueError: there is a value of another type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors; it holds {_described(content)}.")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, path, f"{name}.")
        elif isinstance(value, torch.Tensor | int | float | str | None):
            yield name, value
        else:
            raise ValueError(
                f"{path} holds {name}, {_described(value)}; only tensors and plain values can be converted."
            )
