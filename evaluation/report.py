# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keep the report of an evaluation: written whole after every batch, read again to go on with it."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .recommendation import recommendations
from .results import results_of

FORMAT, VERSION = "dflash-hub eval", 1
FILE = "report.json"
FREE_SETTINGS = ("command",)
"""Settings that do not change what is measured."""
FIXED_ENVIRONMENT = ("dflash_hub", "transformers", "torch", "python", "hardware", "threads")
"""What must be the same for figures of one report."""
QUICK = 0.1
"""Seconds that writing may always take."""
LARGEST_PART = 0.02
"""Of the time, that writing a large report may take."""
Record = dict[str, Any]


class Report:
    """Hold a report and its file.

    Args:
        folder: where `report.json` lies.
        head: all of the report but its records and what follows from them.
    """

    def __init__(self, folder: Path, head: dict[str, Any]):
        self.folder, self.head = folder, head
        self.records: list[Record] = []
        self.encoded: list[bytes] = []
        self.resumed = 0
        """How many of the records an earlier run has left."""
        self.written, self.cost = 0.0, 0.0
        """When the file was last written, and how many seconds that took."""

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def resume(self) -> None:
        """Take over the records of a report of the same evaluation, if the folder holds one.

        Raises:
            ValueError: it is of another evaluation; with what differs.
        """
        if not self.path.exists():
            return
        before = read_report(self.path)
        check_same(before, self.head, self.folder)
        self.head["environment"]["bandwidth_gb_s"] = before["environment"]["bandwidth_gb_s"]
        self.head["environment"]["date"] = before["environment"]["date"]
        self.head["overhead"].update(before["overhead"])
        self.add(before["records"])
        self.resumed = len(self.records)

    def add(self, records: Sequence[Record]) -> None:
        """Add records."""
        self.records += records
        self.encoded += [encoded(record) for record in records]

    def changed(self, index: int) -> None:
        """Note that the record at this index was changed."""
        self.encoded[index] = encoded(self.records[index])

    def done(self) -> set[tuple[str, int, int]]:
        """Return prompt, way and repeat of every record."""
        return {(one["prompt"], one["way"], one["repeat"]) for one in self.records}

    def content(self, complete: bool) -> dict[str, Any]:
        """Return the report without its records."""
        results = results_of(self.head, self.records)
        advice = recommendations(self.head["ways"], results)
        found = {**self.head, "complete": complete, "results": results}
        found["recommendation"] = advice[0]
        found["recommendations"] = advice
        return found

    def write(self, complete: bool) -> dict[str, Any]:
        """Write the file, which is replaced at once, and return the report without its records.

        Records are encoded once, when they come, so that writing stays cheap.
        """
        started = time.monotonic()
        content = self.content(complete)
        begin = encoded(content)[:-1]
        parts = [begin, b', "records": [\n', b",\n".join(self.encoded), b"\n]}\n"]
        write_whole(self.path, b"".join(parts))
        self.written = time.monotonic()
        self.cost = self.written - started
        return content

    def write_in_time(self) -> dict[str, Any]:
        """Write the file, unless it is so large that writing would take too large a part of the time.

        Returns:
            The report without its records; empty if it was not written.
        """
        elapsed = time.monotonic() - self.written
        if self.cost > QUICK and self.cost > LARGEST_PART * elapsed:
            return {}
        return self.write(complete=False)


def encoded(value: dict[str, Any]) -> bytes:
    """Return a part of the report as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def read_report(path: Path) -> dict[str, Any]:
    """Read a report, of the path of its file or of its folder.

    Raises:
        ValueError: there is none, or it is none that this version can read.
        OSError: the file cannot be opened.
    """
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"There is no {path}; pass the folder of an evaluation, or its {FILE}.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of dflash-hub eval.")
    if report.get("format_version") != VERSION:
        raise ValueError(
            f"{path} has the format {report.get('format_version')}; this version reads {VERSION}."
        )
    return report


def check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a report of another evaluation.

    Raises:
        ValueError: with the first thing that differs.
    """
    for part in ("settings", "environment"):
        names = FIXED_ENVIRONMENT if part == "environment" else tuple(now[part])
        for name in names:
            if name not in FREE_SETTINGS:
                _check_equal(name, before[part], now[part], folder)
    _check_equal("ways", _named(before), _named(now), folder)
    _check_equal("prompts", before["prompt_set"], now["prompt_set"], folder, "sha256")


def _named(report: dict[str, Any]) -> dict[str, Any]:
    """Return the ways by which a report is recognised."""
    words = []
    for way in report["ways"]:
        revision = way["revision"] or ""
        words.append(f"{way['name']} {way['block_size'] or ''} {revision}".strip())
    return {"ways": ", ".join(words)}


def _check_equal(
    name: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: Path,
    key: str | None = None,
) -> None:
    """Refuse a value that is not what it was."""
    old, new = before.get(key or name), now.get(key or name)
    if old != new:
        words = "are not the same" if key else f"is {new!r} now and was {old!r}"
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {name} {words}. Choose another --output-dir, or "
            "remove that one."
        )
