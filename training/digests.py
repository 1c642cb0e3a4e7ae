# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Hash what must be the same in two runs: values of JSON; a target's config, tokenizer and weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from ..weights_dflash import shards_in

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_SIZE = 16
"""Bytes of a digest."""
_SAMPLE = 4096
"""Bytes of a tensor that its digest covers, at its beginning and in its middle."""
_VOLATILE = ("transformers_version",)
"""Keys of a config.json that change without the model."""
_PROBE = "def f(x):\n    return 3.14  # naïve 你好 🙂"
"""Text whose tokens are part of a tokenizer's digest."""


def json_digest(value: Any, size: int = _SIZE) -> str:
    """Return a hash of what JSON can hold, of `size` bytes."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def config_digest(name: str) -> tuple[str, str | None]:
    """Return the digest of a target's config.json, and its commit on the Hub or None."""
    content, _ = PretrainedConfig.get_config_dict(name)
    commit = content.get("_commit_hash")
    lasting = {
        key: value for key, value in content.items() if key[0] != "_" and key not in _VOLATILE
    }
    return json_digest(lasting), commit


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, the chat template, and the tokens of a probe."""
    return json_digest(
        [
            sorted(tokenizer.get_vocab().items()),
            tokenizer.chat_template,
            tokenizer(_PROBE).input_ids,
        ]
    )


def weights_digest(name: str, download: bool) -> str | None:
    """Return a digest of the weights in a checkpoint: name, type, shape and some bytes of every tensor.

    Args:
        download: whether to fetch files that are not in the cache.

    Returns:
        None if the files are not here.
    """
    files = _weight_files(name, download)
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=_SIZE)
    if files[0].suffix != ".safetensors":
        for path in files:
            digest.update(path.read_bytes())
        return digest.hexdigest()
    found = sorted((key, place, path) for path in files for key, place in _header(path).items())
    for key, (kind, shape, start, end), path in found:
        digest.update(json.dumps([key, kind, shape]).encode())
        with path.open("rb") as file:
            for place in (start, (start + end) // 2):
                file.seek(place)
                digest.update(file.read(min(_SAMPLE, end - place)))
    return digest.hexdigest()


def _header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Return type, shape, begin and end in the file of every tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(size))
    content.pop("__metadata__", None)
    found = {}
    for key, entry in content.items():
        start, end = entry["data_offsets"]
        found[key] = entry["dtype"], entry["shape"], 8 + size + start, 8 + size + end
    return found


def _weight_files(name: str, download: bool) -> list[Path]:
    """Return the files of a checkpoint's weights; [] if they are not here."""
    whole = _file(name, _WEIGHTS, download)
    if whole is not None:
        return [whole]
    index = _file(name, _INDEX, download)
    if index is None:
        pickled = _file(name, _PICKLED, download)
        return [] if pickled is None else [pickled]
    found = []
    for shard in shards_in(index):
        path = _file(name, shard, download)
        if path is None:
            return []
        found.append(path)
    return found


def _file(name: str, file: str, download: bool) -> Path | None:
    """Return a file of a folder, or of a repository; None without it."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    silent = {"_raise_exceptions_for_missing_entries": False}
    silent |= {"_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, file, local_files_only=not download, **silent)
    return Path(found) if found else None
