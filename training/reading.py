# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read rows from files, folders and the Hub, each with what was written in it and with its place.

Arrow gives all objects of a column the same keys and fills those that are absent with None. So a row of JSON stays text
in the dataset, and is parsed when it is prepared. Rows of other kinds have a column with their number.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..findings_dflash import explained_for

TEXT_OF_ROW = "_json"
"""The column with the JSON text of a row."""
PLACE_OF_ROW = "_row"
"""The column with the file and line of a row, or with its number."""
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class BadRow(ValueError):
    """Say where a row stands, what is wrong with it, and what to do."""


@explained_for("data", "read", "Pass a file, a folder or a dataset on the Hub that exists.")
def load_rows(
    data: str, name: str | None = None, split: str = "train", streaming: bool = False
) -> Any:
    """Load a local file (JSONL, JSON, Parquet, CSV, text) or folder, or a dataset on the Hub.

    `row_of` gives what one of the rows holds.

    Raises:
        ValueError: the file is of another kind, or empty, or a line of it is not JSON.
        OSError: it does not exist.
    """
    from datasets import load_dataset

    path = Path(data)
    if not path.is_file():
        if path.suffix in _FORMATS:
            raise FileNotFoundError(f"There is no file {data}.")
        return _load_dataset(data, name, split, streaming)
    if path.suffix not in _FORMATS:
        raise ValueError(
            f"{data} is not of a kind that can be read; give one of {', '.join(_FORMATS)}, or a Hub dataset."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{data} is empty.")
    if _FORMATS[path.suffix] == "json":
        return _json_rows([data], streaming)
    extra = {"sample_by": "document"} if path.suffix == ".txt" else {}
    return _numbered(
        load_dataset(
            _FORMATS[path.suffix], data_files=data, split="train", streaming=streaming, **extra
        )
    )


def _load_dataset(data: str, name: str | None, split: str, streaming: bool) -> Any:
    """Load a folder or a dataset on the Hub; its files of JSON as they are written."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.json.json import Json

    builder = load_dataset_builder(data, name)
    files = (builder.config.data_files or {}).get(split)
    if files and isinstance(builder, Json) and builder.config.field is None:
        return _json_rows(list(files), streaming)
    return _numbered(load_dataset(data, name, split=split, streaming=streaming))


def _json_rows(files: list[str], streaming: bool) -> Any:
    """Return the rows of files of JSON as a dataset of their texts and places.

    Raises:
        BadRow: a line is not a JSON object; of a stream when it is reached.
    """
    from datasets import Dataset, Features, IterableDataset, Value
    from datasets.exceptions import DatasetGenerationError

    features = Features({TEXT_OF_ROW: Value("large_string"), PLACE_OF_ROW: Value("string")})
    stamped = {"files": [(file, _stamp(file)) for file in files]}
    if streaming:
        return IterableDataset.from_generator(read_json, features, gen_kwargs=stamped)
    try:
        return Dataset.from_generator(read_json, features, gen_kwargs=stamped)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, BadRow):
            raise error.__cause__ from None
        raise


def _stamp(file: str) -> str:
    """Return what changes when a local file does: `datasets` keeps what it has read under it."""
    path = Path(file)
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else ""


def read_json(files: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Yield the text and the place of each row.

    Args:
        files: path or address of each file, and a stamp of its content.

    Raises:
        BadRow: something is not a JSON object.
    """
    import fsspec

    for file, _ in files:
        name = file.rpartition("/")[2]
        opened = fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer", newline="\n")
        try:
            with opened as stream:
                yield from _rows_of(stream, name)
        except UnicodeDecodeError as error:
            raise BadRow(f"{name} is not UTF-8: {error}. Save it in UTF-8.") from error


def _rows_of(stream: TextIO, name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a file of JSON lines, or of a file that is a list of objects."""
    for number, line in enumerate(stream, 1):
        if line.lstrip().startswith("["):
            yield from _rows_of_list(line + stream.read(), number, name)
        elif line.strip():
            place = f"{name}, line {number}"
            _check_line(line, place)
            yield {TEXT_OF_ROW: line, PLACE_OF_ROW: place}


def _check_line(text: str, place: str) -> None:
    """Refuse a line that does not hold an object.

    Raises:
        BadRow: with its place.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise BadRow(
            f"{place} is not JSON: {error}. A file must hold one JSON object in each line, or a list of objects."
        ) from error
    _check_object(row, place)


def _check_object(row: Any, place: str) -> None:
    """Refuse a row that is not an object.

    Raises:
        BadRow: with its place.
    """
    if not isinstance(row, dict):
        raise BadRow(
            f"{place} is {short(row)}, but must be a JSON object, such as {{'text': ...}}."
        )


def _rows_of_list(text: str, first_line: int, name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a list of objects, which starts in the line `first_line` of the file."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BadRow(f"{name}, line {line} is not JSON: {error.msg}.") from error
    for number, row in enumerate(rows):
        place = f"{name}, row {number}"
        _check_object(row, place)
        yield {TEXT_OF_ROW: json.dumps(row), PLACE_OF_ROW: place}


def short(value: Any) -> str:
    """Return a value as an error shows it."""
    return "null" if value is None else repr(value)[:60]


def rows_of_list(rows: Iterable[dict[str, Any]]) -> Any:
    """Return rows that are in memory as a dataset of their JSON texts."""
    from datasets import Dataset

    texts = [json.dumps(row, default=lambda value: value.tolist()) for row in rows]
    places = [f"row {number}" for number in range(len(texts))]
    return Dataset.from_dict({TEXT_OF_ROW: texts, PLACE_OF_ROW: places})


def _numbered(rows: Any) -> Any:
    """Return the dataset with the number of each row, which a split would lose."""
    import numpy as np
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows.add_column(PLACE_OF_ROW, np.arange(len(rows)))
    return rows.map(_with_number, with_indices=True)


def _with_number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, PLACE_OF_ROW: number}


def columns_of(rows: Any) -> list[str]:
    """Return the names of the columns; those of the first row where a dataset does not know them."""
    return list(getattr(rows, "column_names", None) or next(iter(rows), {}))


def row_of(record: dict[str, Any], number: int) -> tuple[dict[str, Any], str]:
    """Return what a row of a dataset holds, and its place.

    Args:
        number: of the row, for a dataset that does not know its places.
    """
    if TEXT_OF_ROW in record:
        return json.loads(record[TEXT_OF_ROW]), record[PLACE_OF_ROW]
    place = record.get(PLACE_OF_ROW, number)
    row = {name: as_written(value) for name, value in record.items() if name != PLACE_OF_ROW}
    return row, f"row {place}"


def as_written(value: Any) -> Any:
    """Return a value of Arrow without the keys that Arrow has added, whose value is None."""
    if isinstance(value, dict):
        return {key: as_written(item) for key, item in value.items() if item is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value[:1]):
        return [as_written(item) for item in value]
    return value


def with_file(error: BadRow, data: str) -> BadRow:
    """Return an error of a row that names its file or dataset too."""
    text = str(error)
    return BadRow(f"{data}, {text}" if text.startswith("row ") else text)
