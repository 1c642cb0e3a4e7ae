# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run an evaluation: the same prompts in every way, in turn, with a report after every batch."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from ..configuration_dflash import __version__
from .decoding import Job, Models, Record, attempted, decode
from .divergence import NOT_CHECKED, check_in_float32, divergence, parting
from .encoding import Encoding, of_length
from .floor import (
    bytes_of_assistant,
    bytes_of_draft,
    bytes_of_plain_step,
    has_floor,
    measured_bandwidth,
)
from .html import write_html
from .profile import write_profiles
from .prompts import PromptSet
from .report import FORMAT, VERSION, Report
from .results import ACCEPTANCE_BY_POSITION, ACCEPTANCE_LENGTH
from .ways import ASSISTANT, STATIC, Condition, Way, groups, in_turn

EMPTY: Record = {
    "seconds": None,
    "prefill_seconds": None,
    "draft_seconds": None,
    "verify_seconds": None,
    "rest_seconds": None,
    "new_tokens": 0,
    "text": "",
    "token_ids": [],
    "tokens": [],
    "drafted": None,
    "committed": None,
    "speculative_decoding": None,
    "identical": None,
    "divergence": None,
    "peak_memory_bytes": None,
    "error": None,
}
"""The fields of a record that failed, its error aside."""
COMPILED_WARM_UP = 3
"""Decodes that warm up a way whose code is compiled."""
SHOWN = 2000
"""Characters of each prompt in the report."""


@dataclass(frozen=True)
class Settings:
    """Hold what is evaluated and how, as the report says it.

    Args:
        target: name of the target.
        prompts: name or file of the prompts.
        seed: of the noise, where text is sampled.
        attention: of the target, by the name that transformers has for it.
        proposal: what a cycle with a draft verifies; with "chain" the figures are those of the draft alone.
        limit: how many of the prompts were taken; None for all.
        repeats: how often each prompt is decoded in each way.
        warm_up: decodes in each way before the first that counts; short, unless blocks are compiled.
        float32_check: whether texts that differ are decoded again in float32.
        command: the command line.
    """

    target: str
    prompts: str
    max_new_tokens: int
    target_revision: str | None = None
    seed: int = 0
    limit: int | None = None
    chat_template: bool = False
    thinking: bool | None = None
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = ""
    capture: str = "auto"
    proposal: str = "chain"
    repeats: int = 1
    warm_up: int = 1
    float32_check: bool = True
    command: str = ""


@dataclass
class Progress:
    """Say how far an evaluation is.

    Args:
        done: decodes, one for each prompt, way and repeat.
        doing: what is done now.
        content: the report without its records, as of the last batch.
    """

    done: int
    total: int
    doing: str
    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Hold prompts that are decoded together under one condition.

    Args:
        number: of the batch among those of its condition.
        members: indices of its prompts.
    """

    condition: Condition
    number: int
    members: tuple[int, ...]
    repeat: int


class Evaluation:
    """Decode every prompt in every way.

    Args:
        models: the loaded models.
        ways: plain decoding is the first of each condition.
        encoding: how the prompts become tokens.
        folder: where the report is written.
        in_float32: loads the same models in float32; raises a ValueError where they do not fit.

    Raises:
        ValueError: a prompt has no tokens; or the folder holds another evaluation.
    """

    def __init__(
        self,
        models: Models,
        ways: Sequence[Way],
        prompt_set: PromptSet,
        encoding: Encoding,
        settings: Settings,
        folder: Path,
        in_float32: Callable[[], Models] | None = None,
    ):
        self.models, self.ways = models, list(ways)
        self.prompts, self.settings = prompt_set.prompts, settings
        self.in_float32 = in_float32
        self.rows = [encoding.ids(prompt) for prompt in self.prompts]
        self.first_token = getattr(encoding.tokenizer, "bos_token_id", None)
        self.texts: dict[int, str] = {}
        self.lengthened: dict[int, list[list[int]]] = {}
        head = {"format": FORMAT, "format_version": VERSION, "complete": False}
        head |= {"settings": asdict(settings), "environment": environment(models.target)}
        head |= {"prompt_set": described(prompt_set, self.rows), "prompts": self._prompts()}
        head |= {"ways": self._ways(), "float32_check": "not done"}
        head["overhead"] = {"decoding_seconds": 0.0, "other_seconds": 0.0, "share": None}
        head["definitions"] = {
            "acceptance_length": ACCEPTANCE_LENGTH,
            "acceptance_by_position": ACCEPTANCE_BY_POSITION,
        }
        self.report = Report(folder, head)

    @property
    def total(self) -> int:
        """The number of records of a complete report."""
        return len(self.ways) * len(self.prompts) * self.settings.repeats

    def run(self, watch: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Decode what the folder's report lacks; return the report. The report is written however this ends."""
        self.report.folder.mkdir(parents=True, exist_ok=True)
        self.report.resume()
        if self.report.head["environment"]["bandwidth_gb_s"] is None:
            bandwidth = measured_bandwidth(self.models.target.device)
            self.report.head["environment"]["bandwidth_gb_s"] = bandwidth / 1e9
        complete = False
        try:
            self._decode_all(watch)
            self._check_all(watch)
            complete = True
        finally:
            content = self.report.write(complete)
            content["records"] = self.report.records
            write_profiles(self.report.folder, content, self.report.records)
            write_html(content, self.report.folder / "report.html")
        return content

    def _decode_all(self, watch: Callable[[Progress], None]) -> None:
        """Decode every batch that has no records yet."""
        warm: set[Condition] = set()
        spent = self.report.head["overhead"]
        for condition, indices in groups(self.ways):
            for batch in self._batches(condition):
                if self._is_done(batch, indices):
                    continue
                if condition not in warm:
                    watch(Progress(len(self.report.records), self.total, "warming up"))
                    self._warm_up(condition, indices)
                    warm.add(condition)
                started, before = time.perf_counter(), spent["decoding_seconds"]
                self.report.add(self._decode_in_turn(batch, indices, watch))
                content = self.report.write_in_time()
                watch(Progress(len(self.report.records), self.total, "", content))
                elapsed = time.perf_counter() - started
                spent["other_seconds"] += elapsed - (spent["decoding_seconds"] - before)
                spent["share"] = spent["other_seconds"] / spent["decoding_seconds"]

    def _decode_in_turn(
        self, batch: Batch, indices: Sequence[int], watch: Callable[[Progress], None]
    ) -> list[Record]:
        """Return the records of a batch in every way of its condition; each batch begins with another way."""
        found: dict[int, list[Record]] = {}
        for index in in_turn(indices, batch.number + batch.repeat):
            watch(Progress(len(self.report.records), self.total, self.ways[index].name))
            found[index] = self._decode(batch, index)
        plain = found[indices[0]]
        for index in indices[1:]:
            self._compare(batch, plain, found[index])
        return [record for index in indices for record in found[index]]

    def _decode(self, batch: Batch, index: int) -> list[Record]:
        """Return the records of a batch in one way."""
        way = self.ways[index]

        def run() -> list[Record]:
            return decode(self.models, way, self._job(batch))

        records = []
        started = time.perf_counter()
        decoded = attempted(run, len(batch.members))
        spent = time.perf_counter() - started
        if not decoded[0].get("error"):
            spent = sum(found["seconds"] for found in decoded)
        self.report.head["overhead"]["decoding_seconds"] += spent
        for member, found in zip(batch.members, decoded, strict=True):
            place = {"prompt": self.prompts[member].id, "way": index, "repeat": batch.repeat}
            record = {**place, "batch": batch.number, **EMPTY, **found}
            tokens = record["token_ids"]
            record["text"] = self.models.tokenizer.decode(tokens)
            record["tokens"] = [self._text(token) for token in tokens]
            records.append(record)
        return records

    def _compare(self, batch: Batch, plain: list[Record], others: list[Record]) -> None:
        """Set in the records of greedy text whether it is the plain one, and where it parts from it."""
        if batch.condition.temperature:
            return
        for row, (one, other) in enumerate(zip(plain, others, strict=True)):
            if one["error"] or other["error"]:
                continue
            other["identical"] = one["token_ids"] == other["token_ids"]
            if not other["identical"]:
                other["divergence"] = self._divergence(batch, row, one, other)

    def _divergence(
        self, batch: Batch, row: int, plain: Record, other: Record
    ) -> dict[str, Any] | None:
        """Return where two texts part. Where the plain run cannot be repeated, the margin is not known."""
        job, texts = self._job(batch), (plain["token_ids"], other["token_ids"])
        try:
            return divergence(self.models, job, row, *texts)
        except RuntimeError as error:  # such as a GPU's memory that is full
            found = parting(self.models.target.dtype, None, *texts)
            return found and found | {"margin_error": str(error)}

    def _check_all(self, watch: Callable[[Progress], None]) -> None:
        """Decode again in float32 whatever differs, which distinguishes rounding from bugs."""
        open_cases = [
            index
            for index, record in enumerate(self.report.records)
            if record["divergence"] and record["divergence"]["float32"] == NOT_CHECKED
        ]
        head = self.report.head
        if not open_cases:
            is_checked = any(record["divergence"] for record in self.report.records)
            head["float32_check"] = "done" if is_checked else "not needed"
            return
        if self.in_float32 is None or not self.settings.float32_check:
            head["float32_check"] = "not asked for"
            return
        watch(Progress(self.total, self.total, "loading the models in float32"))
        try:
            models = self.in_float32()
        except ValueError as error:
            head["float32_check"] = str(error)
            return
        head["float32_check"] = "done"
        for number, index in enumerate(open_cases, start=1):
            watch(Progress(self.total, self.total, f"float32, {number} of {len(open_cases)}"))
            self._check(models, index)
            self.report.changed(index)

    def _check(self, models: Models, index: int) -> None:
        """Decode the batch of one record in float32. Where that fails, its verdict stays unknown."""
        record = self.report.records[index]
        way = self.ways[record["way"]]
        batches = self._batches(way.condition)
        key = (record["batch"], record["repeat"])
        batch = next(one for one in batches if (one.number, one.repeat) == key)
        ids = [self.prompts[member].id for member in batch.members]
        row, dtype = ids.index(record["prompt"]), self.models.target.dtype

        def run() -> list[Record]:
            check_in_float32(models, way, self._job(batch), row, record["divergence"], dtype)
            return []

        failed = attempted(run, 1)
        if failed:
            record["divergence"]["float32_error"] = failed[0]["error"]

    def _batches(self, condition: Condition) -> Iterator[Batch]:
        """Yield all batches of a condition, the repeats one after the other."""
        size = condition.batch_size
        starts = range(0, len(self.prompts), size)
        for repeat in range(self.settings.repeats):
            for number, start in enumerate(starts):
                members = range(start, min(start + size, len(self.prompts)))
                yield Batch(condition, number, tuple(members), repeat)

    def _job(self, batch: Batch) -> Job:
        """Return what is decoded for a batch.

        Raises:
            ValueError: a prompt fills the target's positions.
        """
        rows = self._rows_of(batch.condition.context)
        chosen = [tuple(rows[member]) for member in batch.members]
        longest, new_tokens = max(map(len, chosen)), self.settings.max_new_tokens
        text = self.models.target.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None:
            new_tokens = min(new_tokens, positions - longest)
        if new_tokens < 1:
            raise ValueError(
                f"The prompt has {longest:,} tokens, but the target was made for texts of {positions:,}."
            )
        seed = self.settings.seed + 10_007 * batch.number + batch.repeat
        longest = max(map(len, rows)) + self.settings.max_new_tokens
        return Job(tuple(chosen), new_tokens, seed, longest)

    def _rows_of(self, context: int | None) -> list[list[int]]:
        """Return the tokens of all prompts, brought to `context` tokens if that is a number."""
        if context is None:
            return self.rows
        if context not in self.lengthened:
            self.lengthened[context] = of_length(self.rows, context, self.first_token)
        return self.lengthened[context]

    def _warm_up(self, condition: Condition, indices: Sequence[int]) -> None:
        """Decode in every way, so that one-time costs do not count. What fails, fails later by name."""
        for index in indices:
            way = self.ways[index]
            is_whole = self._is_compiled(way)
            turns = (
                max(self.settings.warm_up, COMPILED_WARM_UP) if is_whole else self.settings.warm_up
            )
            for batch in self._warm_up_batches(condition, turns):

                def run(
                    way: Way = way, batch: Batch = batch, is_whole: bool = is_whole
                ) -> list[Record]:
                    job = self._job(batch)
                    if is_whole or self.settings.proposal == "auto":  # whose costs are measured
                        return decode(self.models, way, job)
                    short = min(job.max_new_tokens, 4 * (way.drafting.block_size or 8))
                    return decode(self.models, way, replace(job, max_new_tokens=short))

                attempted(run, 1)

    def _is_compiled(self, way: Way) -> bool:
        """Return whether code is compiled for a way: ours where it was asked for, static caches on a GPU too."""
        on_gpu = self.models.target.device.type == "cuda"
        return self.settings.capture == "compile" or (on_gpu and way.method in STATIC)

    def _warm_up_batches(self, condition: Condition, wanted: int) -> list[Batch]:
        """Return the batches to warm up with: the first; or those with the shortest, the longest and other prompts.

        Code is compiled anew for the second length that it meets, so that more than one is needed.
        """
        batches = [batch for batch in self._batches(condition) if batch.repeat == 0]
        if wanted < 2:
            return batches[:wanted]
        rows = self._rows_of(condition.context)
        batches.sort(key=lambda batch: max(len(rows[member]) for member in batch.members))
        last = len(batches) - 1
        return [batches[round(turn * last / (wanted - 1))] for turn in range(wanted)]

    def _is_done(self, batch: Batch, indices: Sequence[int]) -> bool:
        done = self.report.done()
        return all(
            (self.prompts[member].id, index, batch.repeat) in done
            for member in batch.members
            for index in indices
        )

    def _text(self, token: int) -> str:
        """Return the text of a token."""
        if token not in self.texts:
            self.texts[token] = self.models.tokenizer.decode([token])
        return self.texts[token]

    def _prompts(self) -> list[dict[str, Any]]:
        found = []
        for prompt, row in zip(self.prompts, self.rows, strict=True):
            words = {"id": prompt.id, "category": prompt.category, "tokens": len(row)}
            found.append({**words, "text": prompt.shown[:SHOWN]})
        return found

    def _ways(self) -> list[dict[str, Any]]:
        """Return the ways, each with the index of its plain way and the bytes that a step reads."""
        found: dict[int, dict[str, Any]] = {}
        for _, indices in groups(self.ways):
            for index in indices:
                way = self.ways[index].as_json(indices[0])
                found[index] = way | {"bytes_per_step": self._bytes(self.ways[index])}
        return [found[index] for index in sorted(found)]

    def _bytes(self, way: Way) -> dict[str, float] | None:
        target, draft = self.models.target, self.models.draft_of(way.drafting)
        if not has_floor(target):
            return None
        read = bytes_of_plain_step(target)
        if way.method == ASSISTANT and not has_floor(draft):
            return None
        if way.method == ASSISTANT:
            read = read + bytes_of_assistant(draft)
        elif draft is not None:
            read = read + bytes_of_draft(target, draft)
        return asdict(read)


def described(prompt_set: PromptSet, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Return what the report says of a set of prompts; the hash is of all their tokens."""
    digest = hashlib.sha256(repr(list(rows)).encode()).hexdigest()
    return {
        "name": prompt_set.name,
        "license": prompt_set.license,
        "language": prompt_set.language,
        "source": prompt_set.source,
        "count": len(prompt_set.prompts),
        "sha256": digest,
    }


def environment(target: Any) -> dict[str, Any]:
    """Return the versions and the hardware. The bandwidth is measured later."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dflash_hub": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "hardware": hardware(target.device),
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": None,
    }


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"
