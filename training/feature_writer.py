# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write the features of prepared rows: once, shard by shard, and further where an interrupted run ended.

Shapes: R rows, T tokens, S tokens of a row.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import replacing, write_whole
from .data import Collator, packed_batch
from .feature_target import save_ends
from .features import (
    AGAIN,
    FEATURES,
    INDEX,
    LOCK,
    PARTS,
    STATES,
    TABLES,
    TARGET,
    Index,
    Origin,
    Part,
    Shard,
    check_shard,
    encoded,
)
from .locks import sole_writer
from .objective import FrozenTarget, TargetOutput

_PARTIAL = "_partial.safetensors"
_OURS = {TABLES, TARGET, LOCK, f"{LOCK}-holder", _PARTIAL, f"_{INDEX}.partial"}
"""What a folder without an index may hold: of a run that ended before it was written."""
_NOT_COMPARED = ("target", "commit", "data")
"""Names of things whose content is compared by a digest."""


@dataclass(frozen=True)
class Plan:
    """Hold what is to be written.

    Args:
        origin: of the features.
        parts: where each row goes.
        rows: the prepared rows of each part.
    """

    origin: Origin
    parts: dict[str, Part]
    rows: dict[str, Any]

    @property
    def index(self) -> Index:
        return Index(self.origin, {name: part.shards for name, part in self.parts.items()})

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """Yield the part and every shard, in the order in which they are written."""
        for name, part in self.parts.items():
            for shard in part.shards:
                yield name, shard

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for _, shard in self.shards())

    def bytes_of(self, shard: Shard) -> int:
        """Return about how large the file of a shard is."""
        return shard.tokens * self.origin.bytes_per_token


def plan(origin: Origin, rows: dict[str, Any], shard_bytes: int) -> Plan:
    """Decide which row goes where.

    Args:
        origin: all but its digest of the rows.
        rows: the prepared rows of each part.
        shard_bytes: about the size of a shard; a row is never split.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = {}
    for name in PARTS:
        if name in rows:
            tables = _tables(rows[name], origin.seed, digest)
            most = max(1, shard_bytes // origin.bytes_per_token)
            parts[name] = Part(_shards(name, tables["tokens"], most), **tables)
    return Plan(replace(origin, rows=digest.hexdigest()), parts, rows)


def order_of(count: int, seed: int) -> torch.Tensor:
    """Return `[R]`: the rows in the order in which the Trainer visits them in the first epoch of this seed.

    So a run may read the first rows while the last ones are being written.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _tables(rows: Any, seed: int, digest: Any) -> dict[str, torch.Tensor]:
    """Return the tables of `Part` for prepared rows, and add what they hold to a digest."""
    documents = []
    for row in rows.with_format("numpy"):
        documents.append(np.atleast_1d(row["lengths"]))
        for values, kind in (
            (row["input_ids"], "<i4"),
            (row["supervised"], "<i1"),
            (documents[-1], "<i4"),
        ):
            digest.update(np.asarray(values).astype(kind).tobytes())
    order = order_of(len(documents), seed)
    ordered = [documents[number] for number in order.tolist()]
    tokens = [int(lengths.sum()) for lengths in ordered]
    counts = [len(lengths) for lengths in ordered]
    return {
        "order": order,
        "tokens": torch.tensor(tokens),
        "documents": torch.tensor(counts),
        "lengths": torch.from_numpy(np.concatenate(ordered).astype(np.int64)),
    }


def _shards(name: str, tokens: torch.Tensor, most: int) -> list[Shard]:
    """Return the shards of rows with so many `tokens [R]`: each at most `most` tokens, or one row."""
    firsts, sizes = [0], [0]
    for place, size in enumerate(tokens.tolist()):
        if sizes[-1] and sizes[-1] + size > most:
            firsts.append(place)
            sizes.append(0)
        sizes[-1] += size
    ends = [*firsts[1:], len(tokens)]
    shards = []
    for number, (first, end, size) in enumerate(zip(firsts, ends, sizes, strict=True), start=1):
        file = f"{name}-{number:05d}-of-{len(firsts):05d}.safetensors"
        shards.append(Shard(file, first, end - first, size))
    return shards


# Writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    planned: Plan,
    load: Callable[[], FrozenTarget],
    report: Callable[[int, int], None],
) -> int:
    """Write every shard that is not in the folder yet.

    Args:
        load: returns the target; called if something is missing.
        report: called after each row, and once before, with the shards and the rows that are there.

    Returns:
        How many shards were there before.

    Raises:
        ValueError: another run writes the folder, it holds something else, or there is no room.
        OSError: a shard could not be written; those before it are whole.
    """
    with sole_writer(folder, folder / LOCK, "--output-dir"):
        begun = _check_begun(folder, planned)
        missing = []
        for name, shard in planned.shards():
            if not _is_whole(folder / shard.file, planned.origin, shard):
                missing.append((name, shard))
        progress = _Progress(planned, missing, report)
        there = progress.shards
        if begun and not missing:
            (folder / _PARTIAL).unlink(missing_ok=True)
            return there
        _check_room(folder, sum(planned.bytes_of(shard) for _, shard in missing))
        target = load()
        if not begun:
            _write_head(folder, planned, target)
        for name, shard in missing:
            _write_shard(folder, planned, (name, shard), target, progress)
    return there


class _Progress:
    """Count what is there, and report it."""

    def __init__(
        self, planned: Plan, missing: list[tuple[str, Shard]], report: Callable[[int, int], None]
    ):
        self.total = sum(1 for _ in planned.shards())
        self.shards = self.total - len(missing)
        self.rows = sum(shard.rows for _, shard in planned.shards())
        self.rows -= sum(shard.rows for _, shard in missing)
        self.report = report
        report(self.shards, self.rows)

    def add(self, shards: int = 0, rows: int = 0) -> None:
        self.shards += shards
        self.rows += rows
        self.report(self.shards, self.rows)


def _check_begun(folder: Path, planned: Plan) -> bool:
    """Return whether the folder holds the beginning of these features.

    Raises:
        ValueError: it holds other ones, or something else.
    """
    path = folder / INDEX
    if not path.exists():
        foreign = sorted(one.name for one in folder.iterdir() if one.name not in _OURS)
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[0]}, but no features. Choose another --output-dir."
            )
        return False
    found = Index.loads(path.read_text(encoding="utf-8"), str(folder))
    ours = planned.index
    compared = {field.name for field in fields(Origin)} - set(_NOT_COMPARED)
    given = {name: getattr(planned.origin, name) for name in sorted(compared)}
    advice = f"{folder} holds those. Choose another --output-dir, or repeat the options that it was written with."
    found.origin.check(given, advice)
    if found.shards != ours.shards:
        raise ValueError(
            f"{folder} holds features in shards of another size. Repeat its --shard-size, or choose another "
            "--output-dir."
        )
    return True


def _is_whole(path: Path, origin: Origin, shard: Shard) -> bool:
    if not path.exists():
        return False
    try:
        check_shard(path, origin, shard)
    except ValueError:
        return False
    return True


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit.

    Raises:
        ValueError: with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The features need {needed / 1e9:,.1f} GB more, but {folder} has {free / 1e9:,.1f} GB of room. Choose "
            "another --output-dir, take --dtype bfloat16 or fp8, or write fewer rows."
        )


def _write_head(folder: Path, planned: Plan, target: FrozenTarget) -> None:
    """Write what precedes the shards; the index is the last of it."""
    with _explained(folder, f"{INDEX} could not be written", 0, 0):
        save_ends(folder / TARGET, target.model)
        tables = {}
        for name, part in planned.parts.items():
            for table, values in part.tables.items():
                tables[f"{name}.{table}"] = values
        _save(tables, folder / TABLES)
        write_whole(folder / INDEX, planned.index.dumps().encode())


def _write_shard(
    folder: Path,
    planned: Plan,
    place: tuple[str, Shard],
    target: FrozenTarget,
    progress: _Progress,
) -> None:
    """Compute and write one shard."""
    (name, shard), origin = place, planned.origin
    tensors = {}
    for key, (shape, dtype) in origin.columns.items():
        tensors[key] = torch.empty(shard.tokens, *shape, dtype=dtype)
    order = planned.parts[name].order[shard.first : shard.first + shard.rows]
    start = 0
    for number in order.tolist():
        row = planned.rows[name][number]
        part = slice(start, start + len(row["input_ids"]))
        for key, values in tensors_of_row(row, target, origin).items():
            tensors[key][part] = values
        start = part.stop
        progress.add(rows=1)
    what = f"{shard.file} could not be written"
    with _explained(folder, what, progress.shards, progress.total):
        _save(tensors, folder / shard.file)
    progress.add(shards=1)


def tensors_of_row(
    row: dict[str, Any], target: FrozenTarget, origin: Origin
) -> dict[str, torch.Tensor]:
    """Return what is stored of a prepared row, as in a batch of this row alone: `[S, ...]` by name."""
    output: TargetOutput = target.run(packed_batch(Collator()([row])), STATES in origin.holds)
    found = {
        "input_ids": torch.tensor(row["input_ids"], dtype=torch.int32),
        "supervised": torch.tensor(row["supervised"], dtype=torch.bool),
    }
    found.update(encoded(FEATURES, output.features[0].cpu(), origin))
    if output.last_hidden_state is not None:
        found.update(encoded(STATES, output.last_hidden_state[0].cpu(), origin))
    return found


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file that appears whole."""
    with replacing(path, _PARTIAL) as partial:
        save_file(tensors, partial)
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read
        with partial.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _explained(folder: Path, what: str, done: int, total: int) -> Iterator[None]:
    """Write in this context: if it fails, the error says what the folder holds.

    Raises:
        OSError: something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{what}: {error}. {folder} holds {done} of {total} shards; make room. {AGAIN}"
        ) from error
