# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Turn rows of text, chat or tokens into packed rows of tokens.

`formats` reads a row, `conversations` renders a chat. What of it is learnt from is supervised.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from ..configuration_dflash import __version__
from .blocks import PackedBatch
from .conversations import Segment, documents_of, renderer
from .features import FEATURES, STATES
from .formats import Conversation, Text, Tokens, read_row
from .messages import Message
from .reading import BadRow, columns_of, row_of, rows_of_list

__all__ = [
    *(
        "Collator",
        "DropReport",
        "PreprocessConfig",
        "columns_of",
        "pack",
        "packed_batch",
        "prepare",
    ),
]

TOO_SHORT = "too short"
UNSUPERVISED = "nothing supervised"
ROWS_OF_A_PROCESS = 500
"""Fewer rows than these are not worth a further process."""
ROWS_AT_ONCE = 100
"""The tokenizer encodes the texts of so many rows in one call, which costs less than a call for each."""

Document = tuple[list[int], list[int]]
"""Token ids, and 1 for each supervised token, else 0."""
Checked = tuple[list[int], list[int], str]
"""Token ids, supervision, and why the document is left out, or ''."""


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
        vocab_size: of the target; None if unknown.
        last_answer_only: whether the last answer of a conversation alone is supervised.
        version: part of the `datasets` cache fingerprint, so a new release tokenises again.
    """

    tokenizer: Any
    block_size: int
    mask_token_id: int
    max_length: int = 3072
    packing: bool = True
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    vocab_size: int | None = None
    last_answer_only: bool = False
    version: str = __version__


@dataclass
class DropReport:
    """Count the documents that are used and, by reason, those left out. For a stream: up to now."""

    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = [f"{count:,} {reason}" for reason, count in sorted(self.dropped.items())]
        return f"{self.used:,} documents" + (f"; left out: {', '.join(reasons)}" if reasons else "")


def prepare(rows: Any, config: PreprocessConfig) -> tuple[Any, DropReport]:
    """Return packed rows with columns `input_ids`, `supervised` and `lengths` (of the documents), and a report.

    Args:
        rows: a `datasets` dataset, streamed or not, or a list of dicts.

    Raises:
        BadRow: a row cannot be read, holds the mask token or tokens beyond the vocabulary; names its place.
        ValueError: the tokenizer has no chat template, or nothing is left to train on.
    """
    from datasets import Dataset, IterableDataset

    rows = rows if isinstance(rows, Dataset | IterableDataset) else rows_of_list(rows)
    streamed = isinstance(rows, IterableDataset)
    report = DropReport()
    documents = _documents_of_rows(rows, config)
    if streamed:
        documents = documents.filter(partial(_count_document, report=report))
    else:
        reasons = Counter(documents["dropped"])
        report.used, report.dropped = reasons.pop("", 0), reasons
        documents = documents.filter(lambda reason: not reason, input_columns="dropped")
    length = config.max_length if config.packing else 0
    documents = documents if streamed else documents.with_format("numpy")
    packed = documents.map(partial(pack, length=length), batched=True, remove_columns=["dropped"])
    packed = packed.map(_as_lists) if streamed else packed.with_format(None)
    if next(iter(packed), None) is None:
        raise ValueError(
            f"No row can be trained on: {report}. A row must have at least {config.block_size} tokens, the "
            "block_size, and two supervised tokens in succession. `dflash-hub regenerate` answers prompts without one."
        )
    if streamed:  # the check above has counted the first rows; training starts the stream again
        report.used, report.dropped = 0, Counter()
    return packed, report


def _documents_of_rows(rows: Any, config: PreprocessConfig) -> Any:
    """Return the documents of all rows, in their order, with columns `input_ids`, `supervised` and `dropped`.

    Processes take parts of the rows; their number changes neither the documents nor what lies of them on disk.
    """
    from datasets import Dataset

    processes: dict[str, Any] = {}
    if isinstance(rows, Dataset) and len(rows) >= 2 * ROWS_OF_A_PROCESS:
        number = min(cores(), len(rows) // ROWS_OF_A_PROCESS)
        processes["num_proc"] = number if number > 1 else None  # 1 would start a process too
    return rows.map(
        partial(_tokenize, config=config),
        with_indices=True,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=columns_of(rows),
        **processes,
    )


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count_document(document: dict[str, Any], report: DropReport) -> bool:
    """Count a document in `report`; return whether it is used."""
    reason = document["dropped"]
    if reason:
        report.dropped[reason] += 1
    else:
        report.used += 1
    return not reason


def _tokenize(
    batch: dict[str, list], numbers: list[int], config: PreprocessConfig
) -> dict[str, list]:
    """Return the documents of a batch of rows; for each, why it is left out, or '' where it is used.

    Raises:
        BadRow: a row cannot be trained on; names its place.
    """
    records = [
        dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
    ]
    result: dict[str, list] = {"input_ids": [], "supervised": [], "dropped": []}
    for _, documents in documents_of_rows(records, numbers, config):
        for ids, supervised, reason in documents:
            result["input_ids"].append(np.array(ids, dtype=np.int64))
            result["supervised"].append(np.frombuffer(bytes(supervised), dtype=np.int8))
            result["dropped"].append(reason)
    return result


def documents_of_rows(
    records: Sequence[dict[str, Any]], numbers: Sequence[int], config: PreprocessConfig
) -> list[tuple[str, list[Checked]]]:
    """Return the place and the documents of each row; the texts of all are encoded in one call.

    Args:
        records: the rows as a dataset has them.
        numbers: of the rows, for a dataset that does not know their places.

    Raises:
        BadRow: a row cannot be trained on; names its place.
    """
    rows = [_read(*one, config) for one in zip(records, numbers, strict=True)]
    encoded = iter(_encode([document for row in rows for document in row.documents], config))
    found = []
    for row in rows:
        documents = list(islice(encoded, len(row.documents)))
        with _named(row.place):
            for ids, _ in documents:
                _check_ids(ids, config)
        used = [(ids, marks, _drop_reason(ids, marks, config)) for ids, marks in documents]
        found.append((row.place, used + [([], [], reason) for reason in row.left_out]))
    return found


@dataclass(frozen=True)
class _Row:
    """Hold what a row holds.

    Args:
        place: where it stands.
        documents: each encoded, or the segments of its text.
        left_out: why further documents cannot be made.
    """

    place: str
    documents: Sequence[Document | list[Segment]]
    left_out: list[str]


def _read(record: dict[str, Any], number: int, config: PreprocessConfig) -> _Row:
    """Return what a row of a dataset holds.

    Raises:
        BadRow: it cannot be read; names its place.
    """
    row, place = row_of(record, number)
    with _named(place):
        form = read_row(row)
        if config.tokenizer is None and not isinstance(form, Tokens):
            raise BadRow(
                "it holds text, which needs the target's tokenizer. Pass processing_class=tokenizer."
            )
        if isinstance(form, Conversation):
            return _Row(place, *_of_conversation(form, config))
        if isinstance(form, Text):
            return _Row(place, _of_text(form, config), [])
        longest = config.max_length
        return _Row(place, [(form.ids[:longest], form.supervised[:longest])], [])


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the place of a row in what is raised of it."""
    try:
        yield
    except BadRow as error:
        raise BadRow(f"{place}: {error}") from error


def _check_ids(ids: list[int], config: PreprocessConfig) -> None:
    """Refuse the mask token, and ids that are no tokens of the target."""
    if config.mask_token_id in ids:
        raise BadRow(
            f"The data contains the mask token {config.mask_token_id}. Choose a mask_token_id that does not occur in "
            "text."
        )
    vocab_size = config.vocab_size
    if ids and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise BadRow(
            f"it contains the token {wrong}, but the target's vocabulary has {vocab_size}. Use the target's tokenizer."
        )


def _drop_reason(ids: list[int], supervised: list[int], config: PreprocessConfig) -> str:
    """Return why a document is left out, or '' where it is used."""
    if len(ids) < config.block_size:
        return TOO_SHORT
    has_anchor = b"\1\1" in bytes(supervised)
    return "" if has_anchor else UNSUPERVISED


def _of_conversation(
    form: Conversation, config: PreprocessConfig
) -> tuple[list[list[Segment]], list[str]]:
    """Return the documents of a conversation, and why those are left out that cannot be made."""
    messages = _last_alone(form.messages) if config.last_answer_only else form.messages
    if not any(message.learnt for message in messages):
        return [], [UNSUPERVISED]
    found, reasons = documents_of(messages, renderer(config.tokenizer, form))
    return found, list(reasons.elements())


def _last_alone(messages: list[Message]) -> list[Message]:
    """Return the messages, of which the last answer alone is learnt from."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    found = list(messages)
    for index in answers[:-1]:
        found[index] = replace(messages[index], learnt=False)
    return found


def _of_text(form: Text, config: PreprocessConfig) -> list[Document | list[Segment]]:
    """Return the documents of plain text: one alone is cut into pieces; several pieces are one document."""
    if not form.is_cut:
        return [_segments(form, config.tokenizer)]
    longest = config.max_length
    ids = config.tokenizer(form.pieces[0][0]).input_ids
    starts = range(0, max(1, len(ids)), longest)  # an empty text is a document, too short
    parts = [ids[start : start + longest] for start in starts]
    marks = [[1] * len(part) for part in parts]
    return list(zip(parts, marks, strict=True))


def _segments(form: Text, tokenizer: Any) -> list[Segment]:
    """Return the pieces of a text; the end token ends the last, if it is an answer that lacks it."""
    segments = [Segment(text, learnt) for text, learnt in form.pieces]
    end = tokenizer.eos_token or ""
    if form.ends and not segments[-1].text.endswith(end):
        segments[-1] = replace(segments[-1], text=segments[-1].text + end)
    return segments


def _encode(documents: list[Document | list[Segment]], config: PreprocessConfig) -> list[Document]:
    """Return the documents, those of segments encoded in one call.

    Each segment is encoded on its own, because in decoding the prompt is encoded without the answer.
    """
    found: list[Any] = list(documents)
    segments = [one for document in documents if isinstance(document, list) for one in document]
    if not segments:
        return found
    is_masked = any(segment.masked for segment in segments)
    encoded = config.tokenizer(
        [segment.text for segment in segments],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=is_masked,
    )
    offsets = encoded["offset_mapping"] if is_masked else repeat([])
    pieces = zip(segments, encoded["input_ids"], offsets, strict=False)  # repeat has no end
    for index, document in enumerate(documents):
        if isinstance(document, list):
            found[index] = _joined(islice(pieces, len(document)), config)
    return found


def _joined(
    pieces: Iterable[tuple[Segment, list[int], list[tuple[int, int]]]], config: PreprocessConfig
) -> Document:
    """Return one document of its segments.

    Args:
        pieces: each segment, its token ids, and start and end of each token if some segment is masked.
    """
    ids: list[int] = []
    supervised: list[int] = []
    for segment, piece, offsets in pieces:
        length = _answer_length(piece, config.stop_ids) if segment.is_answer else 0
        marks = [1] * length + [0] * (len(piece) - length)
        if segment.masked:
            _mask(marks, offsets, segment.masked)
        ids += piece
        supervised += marks
    return ids[: config.max_length], supervised[: config.max_length]


def _mask(marks: list[int], offsets: list[tuple[int, int]], masked: list[tuple[int, int]]) -> None:
    """Set the marks of tokens to 0 in which there is a character that is masked."""
    for index, (start, end) in enumerate(offsets):
        if any(start < last and first < end for first, last in masked):
            marks[index] = 0


def _answer_length(ids: list[int], stop_ids: frozenset[int]) -> int:
    """Return how many of an answer's tokens are supervised: up to its last stop token, or all without one."""
    for index in reversed(range(len(ids))):
        if ids[index] in stop_ids:
            return index + 1
    return len(ids)


def _as_lists(row: dict[str, Any]) -> dict[str, list[int]]:
    """Return a row of a stream with lists, which a dataset on disk gives as well."""
    return row | {name: row[name].tolist() for name in ("input_ids", "supervised")}


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
            packed[name].append(np.concatenate([batch[name][index] for index in members]))
        packed["lengths"].append([len(documents[index]) for index in members])
    return packed


@dataclass(frozen=True)
class Collator:
    """Turn packed rows into the tensors of a batch: `input_ids`, `supervised` and `documents`, each `[B, S]`.

    What the target computed for the rows becomes `[B, S, ...]`, 0 at padding.

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
        for name in (FEATURES, STATES):
            if name in rows[0]:
                batch[name] = _padded([row[name] for row in rows], width)
        return batch


def _padded(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    """Return `[B, S, W]`: values of each row, `[n, W]`, with zeros after them."""
    whole = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
    for index, values in enumerate(rows):
        whole[index, : len(values)] = values
    return whole


def packed_batch(tensors: dict[str, torch.Tensor]) -> PackedBatch:
    """Return the batch of the tensors that `Collator` made."""
    computed = (tensors.get(name) for name in (FEATURES, STATES))
    return PackedBatch(
        tensors["input_ids"], tensors["supervised"].bool(), tensors["documents"], *computed
    )
