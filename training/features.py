# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Describe a folder of features: what the frozen target computed for prepared rows, written once.

| file | |
|---|---|
| `index.json` | of which target and rows the features are, and which shards there are; the last file of the head |
| `rows.safetensors` | order, length and documents of the rows of each part |
| `target/` | config, embedding and head of the target |
| `eval-00001-of-00001.safetensors`, `train-00001-of-00042.safetensors` ... | tokens and features of some rows |

The head is written before the first shard. A shard appears whole, so the shards that exist are those that are done.

Shapes: R rows of a part, D documents, T tokens of a shard, F taps * target hidden size, H target hidden size, G parts
of a vector with a scale of their own.
"""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..configuration_dflash import __version__

FORMAT = 1
INDEX, TABLES = "index.json", "rows.safetensors"
LOCK, TARGET = "_run.lock", "target"
PARTS = ("eval", "train")
"""Parts of the rows, in the order in which they are written."""
FEATURES, STATES = "features", "last_hidden_state"
FP8 = "fp8"
DTYPES = ("auto", "bfloat16", FP8)
_FP8_TYPE = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8_TYPE).max
_TABLES = ("order", "tokens", "documents", "lengths")
LACKS_STATES = (
    "The loss needs the target's distribution, but the features hold no last_hidden_state. Write them with the "
    "--variant and the --loss of this run, or choose a --loss without kl and tv."
)
AGAIN = "Run the `dflash-hub features` that wrote it again: it writes what is missing."


_DIGESTS = {
    "config": "the fields of the target's config.json",
    "weights": "the target's weights",
    "tokenizer": "the tokens of the target's tokenizer",
    "rows": "the prepared rows of the data",
}
"""Fields that are digests, which say nothing to people, and what they are of."""


@dataclass(frozen=True)
class Origin:
    """Say what features are of. Two that are equal have the same features, up to rounding.

    Args:
        target: its Hub id or folder.
        commit: of a target on the Hub.
        config, weights, tokenizer: digests of the target's.
        target_dtype: the target's own; features are read in it.
        dtype: in which they are stored.
        hidden_size: H.
        holds: what is stored of the target's forward: "features", and "last_hidden_state" for losses that need the
            target's distribution.
        data: where the rows came from.
        rows: digest of the prepared rows.
        eval_rows: rows of the data that were held out.
        seed: it chose those, and the order in which rows are written, that of the first epoch of a run of this seed.
    """

    target: str
    commit: str | None
    config: str
    weights: str
    tokenizer: str
    target_dtype: str
    dtype: str
    hidden_size: int
    target_layer_ids: list[int]
    holds: list[str]
    block_size: int
    mask_token_id: int
    max_length: int
    packing: bool
    last_answer_only: bool
    data: str
    rows: str
    eval_rows: int
    seed: int

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape for one token and the type of every tensor of a shard."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_ids": ((), torch.int32),
            "supervised": ((), torch.bool),
        }
        for name in self.holds:
            groups = self.groups(name)
            found[name] = ((groups * self.hidden_size,), _type_of(self.dtype))
            if self.dtype == FP8:
                found[scale_of(name)] = ((groups,), torch.float32)
        return found

    def groups(self, name: str) -> int:
        """Return how many of the target's vectors a stored one consists of."""
        return len(self.target_layer_ids) if name == FEATURES else 1

    @property
    def bytes_per_token(self) -> int:
        """Return how many bytes of disk a token takes."""
        total = 0
        for shape, dtype in self.columns.values():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total

    def check(self, given: dict[str, Any], advice: str) -> None:
        """Refuse values that are not those of these features.

        Args:
            given: by the names of fields.
            advice: what to do, after the names and values.

        Raises:
            ValueError: naming each field that differs.
        """
        found = []
        for name, value in given.items():
            ours = getattr(self, name)
            if ours == value:
                continue
            if name in _DIGESTS:
                found.append(f"{_DIGESTS[name]} differ from those of the features")
            else:
                found.append(f"{name} is {value!r} here and {ours!r} in the features")
        if found:
            raise ValueError(f"{'; '.join(found)}. {advice}")


def scale_of(name: str) -> str:
    """Return the name of the tensor with the scales of another."""
    return f"{name}_scale"


def _type_of(name: str) -> torch.dtype:
    return _FP8_TYPE if name == FP8 else getattr(torch, name)


@dataclass(frozen=True)
class Shard:
    """Hold the name of a shard's file, and which rows are in it.

    Args:
        first: place of its first row in the order in which rows are written.
        rows, tokens: how many are in it.
    """

    file: str
    first: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Place:
    """Hold where a row is: its shard, its tokens in it, and the lengths of its documents."""

    shard: Shard
    tokens: slice
    lengths: list[int]


@dataclass(frozen=True)
class Part:
    """Hold where the rows of a part are.

    Args:
        shards: in the order in which they are written.
        order `[R]`: number of the row at each place of that order.
        tokens, documents `[R]`: how many there are in the row at each place.
        lengths `[D]`: tokens of each document, in that order.
    """

    shards: list[Shard]
    order: torch.Tensor
    tokens: torch.Tensor
    documents: torch.Tensor
    lengths: torch.Tensor

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in _TABLES}

    @cached_property
    def _places(self) -> torch.Tensor:
        """Return `[R]`: the place of each row by its number."""
        return self.order.argsort()

    @cached_property
    def _ends(self) -> torch.Tensor:
        """Return `[R + 1]`: how many tokens there are before each place."""
        return torch.nn.functional.pad(self.tokens.cumsum(0), (1, 0))

    @cached_property
    def _document_ends(self) -> torch.Tensor:
        """Return `[R + 1]`: how many documents there are before each place."""
        return torch.nn.functional.pad(self.documents.cumsum(0), (1, 0))

    @cached_property
    def _firsts(self) -> list[int]:
        return [shard.first for shard in self.shards]

    def locate(self, number: int) -> Place:
        """Return where the row of this number is."""
        place = int(self._places[number])
        shard = self.shards[bisect_right(self._firsts, place) - 1]
        start = int(self._ends[place] - self._ends[shard.first])
        first, last = self._document_ends[place : place + 2].tolist()
        lengths = self.lengths[first:last].tolist()
        return Place(shard, slice(start, start + int(self.tokens[place])), lengths)


@dataclass(frozen=True)
class Index:
    """Hold what `index.json` does: the origin, and the shards of each part."""

    origin: Origin
    shards: dict[str, list[Shard]]

    def dumps(self) -> str:
        """Return the text of the file."""
        parts = {}
        for name, shards in self.shards.items():
            parts[name] = [asdict(shard) for shard in shards]
        content = {
            "format": FORMAT,
            "written_by": f"dflash-hub {__version__}",
            "of": asdict(self.origin),
            "bytes_per_token": self.origin.bytes_per_token,
            "parts": parts,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str, name: str) -> "Index":
        """Read the text of the file.

        Args:
            name: of the folder, for the messages.

        Raises:
            ValueError: it is no such file, or of another version.
        """
        try:
            content = json.loads(text)
            version, written_by = content["format"], content["written_by"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{name}/{INDEX} is no index of features. Pass a folder that `dflash-hub features` wrote."
            ) from error
        if version != FORMAT:
            raise ValueError(
                f"{name} holds features of format {version!r}, written by {written_by}; this is dflash-hub "
                f"{__version__}, which reads format {FORMAT}. Install that version, or write the features again."
            )
        try:
            parts = dict(content["parts"], train=content["parts"]["train"])
            for part, found in parts.items():
                parts[part] = [Shard(**one) for one in found]
            return cls(Origin(**content["of"]), parts)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name}/{INDEX} lacks entries: {error}. Write the features again."
            ) from error

    def part(self, name: str, tables: Path) -> Part:
        """Return a part, with its tables from a file.

        Raises:
            ValueError: the tables cannot be read, or are not those of the index.
        """
        shards = self.shards[name]
        try:
            with safe_open(tables, framework="pt") as file:
                found = [file.get_tensor(f"{name}.{table}") for table in _TABLES]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{tables} cannot be read: {error}. Write the features again."
            ) from error
        part = Part(shards, *found)
        rows = sum(shard.rows for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        if (rows, tokens) != (len(part.order), int(part.tokens.sum())):
            raise ValueError(
                f"{tables} has {len(part.order)} rows and {int(part.tokens.sum())} tokens of {name}, but {INDEX} has "
                f"{rows} and {tokens}. Write the features again."
            )
        return part


def check_shard(path: Path, origin: Origin, shard: Shard) -> None:
    """Refuse a shard that is not whole, from its header alone.

    Raises:
        ValueError: naming the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not whole: {error}. Remove it. {AGAIN}") from error
    expected = {name: (shard.tokens, *shape) for name, (shape, _) in origin.columns.items()}
    if found != expected:
        raise ValueError(
            f"{path} holds {_shown(found)}, but {INDEX} says {_shown(expected)}. Remove it. {AGAIN}"
        )


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def encoded(name: str, values: torch.Tensor, origin: Origin) -> dict[str, torch.Tensor]:
    """Return the tensors that store `values [T, W]`, by name.

    With fp8 each of the target's vectors has a scale, since few of its numbers are far larger than all others.
    """
    if origin.dtype != FP8:
        return {name: values.to(_type_of(origin.dtype))}
    vectors = values.float().unflatten(-1, (origin.groups(name), -1))  # [T, G, H]
    scale = vectors.abs().amax(-1) / _FP8_MAX  # [T, G]
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return {
        name: (vectors / scale[..., None]).to(_FP8_TYPE).flatten(-2),
        scale_of(name): scale,
    }


def decoded(name: str, tensors: dict[str, torch.Tensor], origin: Origin) -> torch.Tensor:
    """Return `[T, W]` in the target's dtype, from the tensors that store it."""
    values = tensors[name]
    if origin.dtype == FP8:
        vectors = values.float().unflatten(-1, (origin.groups(name), -1))
        values = (vectors * tensors[scale_of(name)][..., None]).flatten(-2)
    return values.to(getattr(torch, origin.target_dtype))
