# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read prompts: the built-in ones, a file of one's own, or a known benchmark from the Hub."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..findings_dflash import explained
from ..layouts_dflash import shown

BUILT_IN = "built-in"
BUILT_IN_FILE = Path(__file__).parent / "prompts.jsonl"
OWN_LICENSE = "not stated"
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""What stands in SPEED-Bench for prompts of others."""
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set, as text or as a conversation that ends before the answer."""

    id: str
    category: str
    text: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def conversation(self) -> list[Message]:
        """The messages; a text is what the user says."""
        return list(self.messages) or [{"role": "user", "content": self.text}]

    @property
    def shown(self) -> str:
        """The text, or that of all messages."""
        if self.text is not None:
            return self.text
        return "\n".join(str(message.get("content") or "") for message in self.messages)


@dataclass(frozen=True)
class PromptSet:
    """Prompts and where they are from."""

    name: str
    license: str
    source: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Benchmark:
    """A dataset on the Hub.

    Args:
        repository: its id.
        split: of the dataset.
        column: with the prompt, a text or a list of turns, of which the first is taken.
        license: as its card states it.
        category: of all prompts, where no column names one.
        config: its name, where the dataset has several.
        files: those to read, each with the category of its prompts, where a dataset is a folder of files.
        category_column: the column that names the category.
        id_column: the column that names a prompt.
        question: the words around a prompt, `{}` in its place.
    """

    repository: str
    split: str
    column: str
    license: str
    category: str = ""
    config: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    category_column: str | None = None
    id_column: str | None = None
    question: str = "{}"


_BOXED = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_SPEC_BENCH = {
    "question.jsonl": "mt-bench",
    "math_reasoning.jsonl": "math",
    "qa.jsonl": "qa",
    "rag.jsonl": "rag",
    "summarization.jsonl": "summarization",
    "translation.jsonl": "translation",
}
BENCHMARKS = {
    "gsm8k": Benchmark(
        "openai/gsm8k", "test", "question", "MIT", "math", config="main", question=_BOXED
    ),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500", "test", "problem", "not stated", "math", question=_BOXED
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval", "test", "prompt", "MIT", "code", id_column="task_id"
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp", "test", "prompt", "CC-BY-4.0", "code", config="sanitized"
    ),
    "mt-bench": Benchmark(
        *("HuggingFaceH4/mt_bench_prompts", "train", "prompt", "Apache-2.0", "chat"),
        category_column="category",
    ),
    "spec-bench": Benchmark(
        *("RedHatAI/speculator_benchmarks", "train", "prompt", "Apache-2.0"), files=_SPEC_BENCH
    ),
    "speculator-benchmarks": Benchmark(
        *("RedHatAI/speculator_benchmarks", "train", "prompt", "Apache-2.0, MIT (HumanEval)"),
        files={"HumanEval.jsonl": "code", **_SPEC_BENCH, "writing.jsonl": "writing"},
    ),
    "speed-bench": Benchmark(
        *("nvidia/SPEED-Bench", "test", "turns", "NVIDIA Evaluation Dataset License"),
        config="qualitative",
        category_column="category",
        id_column="question_id",
    ),
}
"""Benchmarks by the name that `load_prompts` takes."""
_COLUMNS = ("prompt", "turns", "question", "problem")


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """Return the prompts of this name: `built-in`, a benchmark, or a JSONL file.

    Args:
        limit: how many to take; from the categories in turn, in the order of the set. None for all.

    Raises:
        ValueError: there is no such set, a line of the file is no prompt, or two prompts have the same id.
        OSError: the dataset could not be loaded.
    """
    if name == BUILT_IN:
        found = PromptSet(
            name, "Apache-2.0", "evaluation/prompts.jsonl", tuple(read_file(BUILT_IN_FILE))
        )
    elif name in BENCHMARKS:
        found = _of_benchmark(name, BENCHMARKS[name])
    elif Path(name).is_file():
        found = PromptSet(Path(name).name, OWN_LICENSE, name, tuple(read_file(Path(name))))
    else:
        known = ", ".join([BUILT_IN, *BENCHMARKS])
        raise ValueError(
            f"prompts is {shown(name)}, which is no file; pass a JSONL file, or one of {known}."
        )
    _check_ids(found)
    chosen = found.prompts if limit is None else by_turns(found.prompts, limit)
    return PromptSet(found.name, found.license, found.source, tuple(chosen))


def read_file(path: Path) -> list[Prompt]:
    """Read a JSONL file with a `prompt`, `turns` or `messages` in every line, and perhaps a `category` and an `id`.

    Of several turns, the first is the prompt.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            prompts.append(_of_line(line, f"{path}, line {number}", f"{path.stem}-{len(prompts)}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompt. Each line is a JSON object with a prompt.")
    return prompts


def by_turns(prompts: Iterable[Prompt], limit: int) -> list[Prompt]:
    """Return `limit` prompts, taken from the categories in turn."""
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    found: list[Prompt] = []
    for turn in range(max(map(len, categories.values()))):
        for members in categories.values():
            found += members[turn : turn + 1]
    return found[:limit]


def _of_line(line: str, where: str, number: str) -> Prompt:
    """Return the prompt of a line of JSON.

    Raises:
        ValueError: it is none; with the line.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}. Each line is a JSON object.") from error
    forms = [key for key in ("prompt", "turns", "messages") if isinstance(row, dict) and key in row]
    if len(forms) != 1:
        raise ValueError(f"{where} must be an object with either a prompt, turns or messages.")
    name = str(row.get("id", row.get("question_id", number)))
    category = str(row.get("category", "all"))
    if forms == ["turns"]:
        row["prompt"] = row["turns"][0] if isinstance(row["turns"], list) and row["turns"] else None
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise ValueError(f"{where}: prompt is {shown(row['prompt'])}; it must be a text.")
        return Prompt(name, category, text=row["prompt"])
    return Prompt(name, category, messages=_messages(row["messages"], where))


def _messages(messages: Any, where: str) -> tuple[Message, ...]:
    """Return the messages of a row, or refuse what are none."""
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise ValueError(
            f"{where}: messages is {shown(messages)}; it must be a list of objects with role and content."
        )
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the last message is the assistant's; leave out what is to be answered."
        )
    return tuple(messages)


def _of_benchmark(name: str, benchmark: Benchmark) -> PromptSet:
    """Load a benchmark from the Hub."""
    rows: list[tuple[dict[str, Any], str]] = []
    if benchmark.files:
        for file, category in benchmark.files.items():
            rows += [(row, category) for row in _rows(benchmark, {"data_files": file})]
    else:
        rows = [(row, benchmark.category) for row in _rows(benchmark, {"name": benchmark.config})]
    prompts = []
    for number, (row, category) in enumerate(rows):
        if benchmark.category_column is not None:
            category = str(row[benchmark.category_column])
        named = row.get(benchmark.id_column or "")
        text = benchmark.question.format(_text(row, benchmark))
        prompts.append(Prompt(str(named or f"{name}-{number}"), category, text))
    _check_whole(name, prompts)
    address = f"https://huggingface.co/datasets/{benchmark.repository}"
    return PromptSet(name, benchmark.license, address, tuple(prompts))


def _rows(benchmark: Benchmark, which: dict[str, Any]) -> list[dict[str, Any]]:
    """Load a split of a dataset."""
    if find_spec("datasets") is None:
        raise ImportError(
            "Prompts of the Hub need datasets, not installed here: pip install 'dflash-hub[eval]'"
        )
    from datasets import load_dataset

    advice = "Check the connection, log in for a gated dataset (hf auth login), or pass a file."
    with explained(f"The dataset {benchmark.repository} could not be loaded", advice):
        return list(load_dataset(benchmark.repository, split=benchmark.split, **which))


def _text(row: dict[str, Any], benchmark: Benchmark) -> str:
    """Return the prompt of a row: its column, or another of a known name; of several turns, the first."""
    column = next((name for name in (benchmark.column, *_COLUMNS) if name in row), None)
    if column is None:
        raise ValueError(
            f"The dataset {benchmark.repository} has the columns {', '.join(row)}; {benchmark.column} is expected."
        )
    value = row[column]
    return str(value[0] if isinstance(value, list) else value)


def _check_whole(name: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that their dataset does not hold, but only says where to fetch.

    Raises:
        ValueError: with their number.
    """
    missing = sum(PLACEHOLDER in prompt.shown for prompt in prompts)
    if missing:
        raise ValueError(
            f"{missing} of the {len(prompts)} prompts of {name} are not in its dataset, for their licenses. Prepare "
            "all with NVIDIA's script (Model Optimizer, specdec_bench), and pass its JSONL file as --prompts."
        )


def _check_ids(found: PromptSet) -> None:
    """Refuse two prompts with the same id."""
    seen: set[str] = set()
    for prompt in found.prompts:
        if prompt.id in seen:
            raise ValueError(f"Two prompts of {found.name} have the id {prompt.id}; change one.")
        seen.add(prompt.id)
