# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Turn rows of text or chat into packed rows of tokens.

A row with `messages` goes through the target's chat template, and the assistant's messages are supervised. A row with
`text` is supervised from start to end. A row with `input_ids` (and `supervised`, 0 or 1 for each) is used as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from ..configuration_dflash import __version__
from ..findings_dflash import explained_for
from .blocks import PackedBatch

COLUMNS = ("messages", "text", "input_ids")
TOO_SHORT = "too short"
UNSUPERVISED = "nothing supervised"
REFUSED = "refused by the chat template"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass
class PreprocessConfig:
    """Say how rows are turned into tokens.

    Args:
        tokenizer: the target's.
        block_size: of the draft; shorter documents are left out.
        mask_token_id: of the draft; it must not occur.
        max_length: tokens of a packed row. Longer text is cut into pieces, a longer conversation at its end.
        packing: whether to put several documents into a row.
        stop_ids: tokens that end an answer; what a template puts after them is not supervised.
        version: part of the `datasets` cache fingerprint, so a new release tokenises again.
    """

    tokenizer: Any
    block_size: int
    mask_token_id: int
    max_length: int = 3072
    packing: bool = True
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    version: str = __version__


@dataclass
class DropReport:
    """Count the documents that are used and, by reason, those left out. For a stream: up to now."""

    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = [f"{count:,} {reason}" for reason, count in sorted(self.dropped.items())]
        return f"{self.used:,} documents" + (f"; left out: {', '.join(reasons)}" if reasons else "")


@explained_for("data", "read", "Pass a file, a folder or a dataset on the Hub that exists.")
def load_rows(
    data: str, name: str | None = None, split: str = "train", streaming: bool = False
) -> Any:
    """Load a local file (JSONL, JSON, Parquet, CSV, text) or folder, or a dataset on the Hub.

    Raises:
        ValueError: the file is of another kind, or empty.
        OSError: it does not exist.
    """
    from datasets import load_dataset

    path = Path(data)
    if not path.is_file():
        if path.suffix in _FORMATS:
            raise FileNotFoundError(f"There is no file {data}.")
        return load_dataset(data, name, split=split, streaming=streaming)
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"{data} is not of a kind that can be read; give one of {', '.join(_FORMATS)}, or a Hub dataset."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{data} is empty.")
    extra = {"sample_by": "document"} if path.suffix == ".txt" else {}
    return load_dataset(
        _FORMATS[path.suffix], data_files=data, split="train", streaming=streaming, **extra
    )


def prepare(rows: Any, config: PreprocessConfig) -> tuple[Any, DropReport]:
    """Return packed rows with columns `input_ids`, `supervised` and `lengths` (of the documents), and a report.

    Args:
        rows: a `datasets` dataset, streamed or not, or a list of dicts.

    Raises:
        ValueError: no known column, the mask token in the data, or nothing left to train on.
    """
    from datasets import Dataset, IterableDataset

    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    streamed = isinstance(rows, IterableDataset)
    columns = columns_of(rows)
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"The data has the columns {', '.join(columns) or '(none)'}; one of {_listed(COLUMNS)} is needed."
        )
    report = DropReport()
    documents = rows.map(
        partial(_tokenize, column=column, config=config), batched=True, remove_columns=columns
    )
    if streamed:
        documents = documents.filter(partial(_count_document, report=report))
    else:
        reasons = Counter(documents["dropped"])
        report.used, report.dropped = reasons.pop("", 0), reasons
        documents = documents.filter(lambda reason: not reason, input_columns="dropped")
    length = config.max_length if config.packing else 0
    packed = documents.map(partial(pack, length=length), batched=True, remove_columns=["dropped"])
    if next(iter(packed), None) is None:
        raise ValueError(
            f"No row can be trained on: {report}. A row must have at least {config.block_size} tokens, the "
            "block_size, and two supervised tokens in succession."
        )
    if streamed:  # the check above has counted the first rows; training starts the stream again
        report.used, report.dropped = 0, Counter()
    return packed, report


def columns_of(rows: Any) -> list[str]:
    """Return the names of the columns; those of the first row where a dataset does not know them."""
    return list(getattr(rows, "column_names", None) or next(iter(rows), {}))


def _count_document(document: dict[str, Any], report: DropReport) -> bool:
    """Count a document in `report`; return whether it is used."""
    reason = document["dropped"]
    if reason:
        report.dropped[reason] += 1
    else:
        report.used += 1
    return not reason


def _tokenize(batch: dict[str, list], column: str, config: PreprocessConfig) -> dict[str, list]:
    """Return the documents of a batch of rows; for each, why it is left out, or '' where it is used."""
    result: dict[str, list] = {"input_ids": [], "supervised": [], "dropped": []}
    for index in range(len(batch[column])):
        row = {name: values[index] for name, values in batch.items()}
        for ids, supervised in _documents(row, column, config) or [([], [])]:
            if config.mask_token_id in ids:
                raise ValueError(
                    f"The data contains the mask token {config.mask_token_id}, in the row {str(row[column])[:60]!r} "
                    "...; choose a mask_token_id that does not occur in text."
                )
            result["input_ids"].append(ids)
            result["supervised"].append(supervised)
            result["dropped"].append(_drop_reason(ids, supervised, row, config.block_size))
    return result


def _drop_reason(
    ids: list[int], supervised: list[int], row: dict[str, Any], block_size: int
) -> str:
    """Return why a document is left out, or '' where it is used."""
    if not ids:
        has_answer = any(message.get("role") == "assistant" for message in row["messages"] or [])
        return REFUSED if has_answer else UNSUPERVISED
    if len(ids) < block_size:
        return TOO_SHORT
    has_anchor = any(a and b for a, b in pairwise(supervised))
    return "" if has_anchor else UNSUPERVISED


def _documents(
    row: dict[str, Any], column: str, config: PreprocessConfig
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each document in a row, and 1 for each supervised token, else 0."""
    if column == "messages":
        found = conversations(row["messages"] or [], _renderer(config.tokenizer, row.get("tools")))
        return [_encode(segments, config) for segments in found]
    longest = config.max_length
    if column == "text":
        ids = config.tokenizer(row["text"] or "").input_ids
        ids = ids or [
            config.tokenizer.eos_token_id or 0
        ]  # so that an empty text counts as too short
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        return [(piece, [1] * len(piece)) for piece in pieces]
    ids = list(row["input_ids"])
    return [(ids[:longest], list(row.get("supervised") or [1] * len(ids))[:longest])]


def _renderer(tokenizer: Any, tools: Any) -> Callable[[list[dict[str, Any]], bool], str]:
    """Return the function that renders messages by the chat template, with or without the prompt for an answer."""

    def render(messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        # `datasets` fills absent keys with None, which templates would print.
        present = [without_none(message) for message in messages]
        return tokenizer.apply_chat_template(
            present, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )

    return render


def without_none(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the keys whose value is None."""
    return {key: value for key, value in message.items() if value is not None}


def conversations(
    messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]], bool], str]
) -> list[list[tuple[str, int]]]:
    """Return the documents of a conversation, each a list of segments of text, with 1 for an answer and 0 otherwise.

    Each answer is trained with the exact prompt used at inference. Some templates change earlier turns later (Qwen3
    removes their thinking). Then the later answer starts a document of its own.

    Example: for the messages u1 a1 u2 a2, a template that changes nothing gives one document, `[(u1, 0), (a1, 1),
    (u2, 0), (a2, 1)]`. A template that shortens a1 to s1 later gives two: `[(u1, 0), (a1, 1)]` and
    `[(u1 s1 u2, 0), (a2, 1)]`.
    """
    documents: list[list[tuple[str, int]]] = []
    previous = None  # the text up to the end of the last answer
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        try:
            before, after = render(messages[:index], True), render(messages[: index + 1], False)
        except (TemplateError, ValueError, TypeError):
            continue
        if not after.startswith(before):
            continue
        if previous is None or not before.startswith(previous):
            documents.append([(before, 0)])
        else:
            documents[-1].append((before[len(previous) :], 0))
        documents[-1].append((after[len(before) :], 1))
        previous = after
    return documents


def _encode(
    segments: list[tuple[str, int]], config: PreprocessConfig
) -> tuple[list[int], list[int]]:
    """Return the token ids of the segments, and 1 for each supervised token, else 0.

    Each segment is encoded on its own, because in decoding the prompt is encoded without the answer.
    """
    ids: list[int] = []
    supervised: list[int] = []
    for text, is_answer in segments:
        piece = config.tokenizer(text, add_special_tokens=False).input_ids
        length = _answer_length(piece, config.stop_ids) if is_answer else 0
        ids += piece
        supervised += [1] * length + [0] * (len(piece) - length)
    return ids[: config.max_length], supervised[: config.max_length]


def _answer_length(ids: list[int], stop_ids: frozenset[int]) -> int:
    """Return how many of an answer's tokens are supervised: up to its last stop token, or all without one."""
    stops = [index for index, token in enumerate(ids) if token in stop_ids]
    return stops[-1] + 1 if stops else len(ids)


def pack(batch: dict[str, list], length: int) -> dict[str, list]:
    """Pack documents into rows of at most `length` tokens: the longest first, each into the first row with room.

    Example: documents of 5, 3, 4 and 2 tokens and a length of 8 give two rows, of 5 + 3 and 4 + 2 tokens.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    documents = batch["input_ids"]
    for index in sorted(range(len(documents)), key=lambda index: -len(documents[index])):
        size = len(documents[index])
        chosen = next((number for number, left in enumerate(room) if size <= left), None)
        if chosen is None:
            bins.append([])
            room.append(length)
            chosen = len(bins) - 1
        bins[chosen].append(index)
        room[chosen] -= size
    packed: dict[str, list] = {"input_ids": [], "supervised": [], "lengths": []}
    for members in bins:
        for name in ("input_ids", "supervised"):
            packed[name].append(list(chain.from_iterable(batch[name][index] for index in members)))
        packed["lengths"].append([len(documents[index]) for index in members])
    return packed


@dataclass(frozen=True)
class Collator:
    """Turn packed rows into the tensors of a batch: `input_ids`, `supervised` and `documents`, each `[B, S]`.

    Args:
        length: S; None for the length of the longest row.
    """

    length: int | None = None

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = list(rows)
        width = self.length or max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.zeros(len(rows), width, dtype=torch.long)
            for name in ("input_ids", "supervised", "documents")
        }
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            lengths = torch.as_tensor(row.get("lengths") or [size])
            batch["input_ids"][index, :size] = torch.as_tensor(row["input_ids"])
            batch["supervised"][index, :size] = torch.as_tensor(row.get("supervised") or [1] * size)
            batch["documents"][index, :size] = torch.arange(1, len(lengths) + 1).repeat_interleave(
                lengths
            )
        return batch


def packed_batch(tensors: dict[str, torch.Tensor]) -> PackedBatch:
    """Return the batch of the tensors that `Collator` made."""
    return PackedBatch(tensors["input_ids"], tensors["supervised"].bool(), tensors["documents"])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
