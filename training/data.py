# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""From rows of text or chat to packed rows of tokens.

A row with `messages` goes through the target's chat template, and what the assistant says is supervised; a row with
`text` is supervised whole; a row with `input_ids` (and `supervised`, 0 or 1 for each) is taken as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from ..configuration_dflash import __version__
from .blocks import Rows

COLUMNS = ("messages", "text", "input_ids")
TOO_SHORT, UNSUPERVISED, REFUSED = "too short", "nothing supervised", "refused by the chat template"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass
class Reading:
    """How rows are read.

    Args:
        tokenizer: the target's.
        block_size: of the draft; a document shorter than that is left out.
        mask_token_id: of the draft; it may not occur.
        max_length: tokens of a packed row. Longer text is cut into pieces, a longer conversation at its end.
        packing: put several documents into a row.
        stop_ids: tokens that end an answer; what a template puts behind them is not supervised.
    """

    tokenizer: Any
    block_size: int
    mask_token_id: int
    max_length: int = 3072
    packing: bool = True
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    version: str = __version__
    """What was read is kept by `datasets`, under a key that this is part of."""


@dataclass
class Report:
    """How many documents there are, and how many were left out, by reason; of a stream, so far."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.kept:,} documents" + (f"; left out: {left_out}" if left_out else "")


def load_rows(data: str, name: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """A local file (JSONL, JSON, Parquet, CSV, text) or folder, or a dataset on the Hub.

    Raises:
        ValueError: a file of another kind, or an empty one.
        OSError: there is none such.
    """
    from datasets import load_dataset

    path = Path(data)
    if not path.is_file():
        if path.suffix in _FORMATS:
            raise FileNotFoundError(f"There is no file {data}.")
        return load_dataset(data, name, split=split, streaming=streaming)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{data} is of no kind that is read; give one of {', '.join(_FORMATS)}, or a Hub dataset.")
    if path.stat().st_size == 0:
        raise ValueError(f"{data} is empty.")
    extra = {"sample_by": "document"} if path.suffix == ".txt" else {}
    return load_dataset(_FORMATS[path.suffix], data_files=data, split="train", streaming=streaming, **extra)


def prepare(rows: Any, reading: Reading) -> tuple[Any, Report]:
    """Packed rows of tokens, with columns `input_ids`, `supervised` and `lengths` (of the documents), and a report.

    Args:
        rows: a `datasets` dataset, streamed or not, or a list of dicts.

    Raises:
        ValueError: no column that is read, the mask token in the data, or nothing left to train on.
    """
    from datasets import Dataset, IterableDataset

    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    streamed = isinstance(rows, IterableDataset)
    columns = columns_of(rows)
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"The data has the columns {', '.join(columns) or '(none)'}; one of {_listed(COLUMNS)} is read."
        )
    report = Report()
    documents = rows.map(partial(_read, column=column, reading=reading), batched=True, remove_columns=columns)
    if streamed:
        documents = documents.filter(partial(_tally, report=report))
    else:
        found = Counter(documents["dropped"])
        report.kept, report.dropped = found.pop("", 0), found
        documents = documents.filter(lambda reason: not reason, input_columns="dropped")
    packed = documents.map(
        partial(pack, length=reading.max_length if reading.packing else 0), batched=True, remove_columns=["dropped"]
    )
    if next(iter(packed), None) is None:
        raise ValueError(
            f"No row can be trained on: {report}. A row must have at least {reading.block_size} tokens, the "
            "block_size, and two supervised ones in succession."
        )
    if streamed:  # it begins anew
        report.kept, report.dropped = 0, Counter()
    return packed, report


def columns_of(rows: Any) -> list[str]:
    """The names of the columns; of rows that do not say, the first row's."""
    return list(getattr(rows, "column_names", None) or next(iter(rows), {}))


def _tally(document: dict[str, Any], report: Report) -> bool:
    reason = document["dropped"]
    report.kept += not reason
    report.dropped.update([reason] if reason else [])
    return not reason


def _read(batch: dict[str, list], column: str, reading: Reading) -> dict[str, list]:
    """The documents of a batch of rows, each with the reason why it is left out, or ''."""
    found: dict[str, list] = {"input_ids": [], "supervised": [], "dropped": []}
    for index in range(len(batch[column])):
        row = {name: values[index] for name, values in batch.items()}
        for ids, supervised in _documents(row, column, reading) or [([], [])]:
            if reading.mask_token_id in ids:
                raise ValueError(
                    f"The data contains the mask token {reading.mask_token_id}, in the row {str(row[column])[:60]!r} "
                    "...; choose a mask_token_id that does not occur in text."
                )
            found["input_ids"].append(ids)
            found["supervised"].append(supervised)
            found["dropped"].append(_reason(ids, supervised, row, reading.block_size))
    return found


def _reason(ids: list[int], supervised: list[int], row: dict[str, Any], block_size: int) -> str:
    if not ids:
        answers = any(message.get("role") == "assistant" for message in row["messages"] or [])
        return REFUSED if answers else UNSUPERVISED
    if len(ids) < block_size:
        return TOO_SHORT
    return "" if any(a and b for a, b in pairwise(supervised)) else UNSUPERVISED


def _documents(row: dict[str, Any], column: str, reading: Reading) -> Iterator[tuple[list[int], list[int]]] | list:
    """Ids of each document in a row, and 1 for each that is supervised."""
    longest = reading.max_length
    if column == "messages":
        spoken = conversations(row["messages"] or [], _renderer(reading.tokenizer, row.get("tools")))
        return [_tokens(segments, reading) for segments in spoken]
    if column == "text":
        ids = reading.tokenizer(row["text"] or "").input_ids
        ids = ids or [reading.tokenizer.eos_token_id or 0]  # an empty text is short, not refused
        return (
            (ids[start : start + longest], [1] * len(ids[start : start + longest]))
            for start in range(0, len(ids), longest)
        )
    ids = list(row["input_ids"])
    return [(ids[:longest], list(row.get("supervised") or [1] * len(ids))[:longest])]


def _renderer(tokenizer: Any, tools: Any) -> Callable[[list[dict[str, Any]], bool], str]:
    def render(messages: list[dict[str, Any]], asks: bool) -> str:
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return tokenizer.apply_chat_template(said, tools=tools, tokenize=False, add_generation_prompt=asks)

    return render


def conversations(
    messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]], bool], str]
) -> list[list[tuple[str, int]]]:
    """The documents of a conversation, each a list of segments of text, with 1 where the assistant speaks.

    An answer stands behind exactly what the target will be asked with. Where a template shows earlier turns in another
    way than when they were said (without their thoughts, say), a later answer begins a document of its own.
    """
    documents: list[list[tuple[str, int]]] = []
    said = None
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        try:
            before, after = render(messages[:index], True), render(messages[: index + 1], False)
        except (TemplateError, ValueError, TypeError):
            continue
        if not after.startswith(before):
            continue
        if said is None or not before.startswith(said):
            documents.append([(before, 0)])
        else:
            documents[-1].append((before[len(said) :], 0))
        documents[-1].append((after[len(before) :], 1))
        said = after
    return documents


def _tokens(segments: list[tuple[str, int]], reading: Reading) -> tuple[list[int], list[int]]:
    """Ids of the segments, each encoded by itself, as a prompt is and as an answer is generated."""
    ids: list[int] = []
    supervised: list[int] = []
    for text, spoken in segments:
        piece = reading.tokenizer(text, add_special_tokens=False).input_ids
        stops = [index for index, token in enumerate(piece) if token in reading.stop_ids] if spoken else []
        said = stops[-1] + 1 if stops else len(piece) * spoken
        ids += piece
        supervised += [1] * said + [0] * (len(piece) - said)
    return ids[: reading.max_length], supervised[: reading.max_length]


def pack(batch: dict[str, list], length: int) -> dict[str, list]:
    """Documents into rows of at most `length` tokens, the longest first, each into the first row that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    documents = batch["input_ids"]
    for index in sorted(range(len(documents)), key=lambda index: -len(documents[index])):
        size = len(documents[index])
        place = next((number for number, left in enumerate(room) if size <= left), None)
        if place is None:
            bins.append([])
            room.append(length)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= size
    joined = {
        name: [list(chain.from_iterable(batch[name][index] for index in one)) for one in bins]
        for name in ("input_ids", "supervised")
    }
    return joined | {"lengths": [[len(documents[index]) for index in one] for one in bins]}


@dataclass(frozen=True)
class Collator:
    """Packed rows to the tensors of a batch: `input_ids`, `supervised` and `documents`, each `[B, S]`.

    Args:
        length: S; the longest row's where it is None.
    """

    length: int | None = None

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = list(rows)
        width = self.length or max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "supervised", "documents")
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            lengths = torch.as_tensor(row.get("lengths") or [size])
            batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
            batch["supervised"][index, :size] = torch.as_tensor(row.get("supervised") or [1] * size)
            batch["documents"][index, :size] = torch.arange(1, len(lengths) + 1).repeat_interleave(lengths)
        return batch


def rows_of(batch: dict[str, torch.Tensor]) -> Rows:
    """The batch that `Collator` made."""
    return Rows(batch["input_ids"], batch["supervised"].bool(), batch["documents"])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
