# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read prompts: the built-in ones, a file of one's own, or a known benchmark from the Hub."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..findings_dflash import explained
from ..layouts_dflash import shown

BUILT_IN = "built-in"
BUILT_IN_FILE = Path(__file__).parent / "prompts.jsonl"
NOT_STATED = "not stated"
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""What stands in SPEED-Bench for prompts of others."""
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Hold one prompt of a set, as text or as a conversation that ends before the answer."""

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
    """Hold prompts and where they are from."""

    name: str
    license: str
    source: str
    prompts: tuple[Prompt, ...]
    language: str = NOT_STATED


@dataclass(frozen=True)
class Benchmark:
    """Describe a dataset on the Hub.

    Args:
        repository: its id.
        split: of the dataset.
        column: with the prompt, a text or a list of turns, of which the first is taken.
        license: as its card states it.
        language: of the prompts.
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
    language: str = "en"


_BOXED = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_SPEC_BENCH = {
    "question.jsonl": "mt-bench",
    "math_reasoning.jsonl": "math",
    "qa.jsonl": "qa",
    "rag.jsonl": "rag",
    "summarization.jsonl": "summarization",
    "translation.jsonl": "translation",
}
_SPECULATORS = {"HumanEval.jsonl": "code", **_SPEC_BENCH}
_SPECULATORS |= {"tool_call.jsonl": "tool-call", "writing.jsonl": "writing"}
_SPEED_BENCH = Benchmark(
    *("nvidia/SPEED-Bench", "test", "turns", "NVIDIA Evaluation Dataset License"),
    config="qualitative",
    category_column="category",
    id_column="question_id",
    language="many",
)
_THROUGHPUT = ("1k", "2k", "8k", "16k", "32k")
"""Tokens of the prompts of SPEED-Bench's other sets."""
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
        *("RedHatAI/speculator_benchmarks", "train", "prompt", "Apache-2.0"),
        files=_SPEC_BENCH,
        language="en, de",
    ),
    "speculator-benchmarks": Benchmark(
        *("RedHatAI/speculator_benchmarks", "train", "prompt", "Apache-2.0, MIT (HumanEval)"),
        files=_SPECULATORS,
        language="en, de",
    ),
    "speed-bench": _SPEED_BENCH,
}
"""Benchmarks by the name that `load_prompts` takes."""
BENCHMARKS |= {
    f"speed-bench-throughput-{size}": replace(_SPEED_BENCH, config=f"throughput_{size}")
    for size in _THROUGHPUT
}
_COLUMNS = ("prompt", "turns", "question", "problem")
_CONNECTION = "Check the connection, log in for a gated dataset (hf auth login), or pass a file."
_FORMS = ("prompt", "turns", "messages")


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """Return the prompts of this name.

    Args:
        name: `built-in`, a benchmark, a JSONL or parquet file, or a dataset of the Hub as `org/name` or
            `org/name:config`. A benchmark may have some of its categories behind a colon: `speed-bench:coding,math`.
        limit: how many to take; from the categories in turn, in the order of the set. None for all.

    Raises:
        ValueError: there is no such set or category, a line of the file is no prompt, or two prompts have the same id.
        OSError: the dataset could not be loaded.
    """
    benchmark = name.partition(":")[0]
    chosen = name.partition(":")[2]
    if name == BUILT_IN:
        own = tuple(read_file(BUILT_IN_FILE))
        found = PromptSet(name, "Apache-2.0", "evaluation/prompts.jsonl", own, "en")
    elif Path(name).is_file():
        found = PromptSet(Path(name).name, NOT_STATED, name, tuple(read_file(Path(name))))
    elif benchmark in BENCHMARKS:
        found = _of_benchmark(name, BENCHMARKS[benchmark], chosen)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        found = _of_benchmark(name, _of_hub(benchmark, chosen or None), "")
    else:
        known = ", ".join([BUILT_IN, *BENCHMARKS])
        raise ValueError(
            f"prompts is {shown(name)}, which is no file; pass a JSONL file, the org/name of a dataset, or one of "
            f"{known}."
        )
    _check_ids(found)
    return found if limit is None else replace(found, prompts=tuple(by_turns(found.prompts, limit)))


def read_file(path: Path) -> list[Prompt]:
    """Read a JSONL or parquet file with a `prompt`, `turns` or `messages` in every row.

    A row may have a `category`, and an `id` or `question_id`. Of several turns, the first is the prompt.
    """
    prompts: list[Prompt] = []
    rows = _rows_of_parquet(path) if path.suffix == ".parquet" else _rows_of_lines(path)
    for number, row in rows:
        where = f"{path}, line {number}"
        prompts.append(_of_row(row, where, f"{path.stem}-{len(prompts)}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompt. Each line is a JSON object with a prompt.")
    _check_whole(path.name, prompts)
    return prompts


def _rows_of_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON of every line that is not empty, with its number.

    Raises:
        ValueError: a line is no JSON.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON: {error}. Each line is a JSON object."
            ) from error


def _rows_of_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a parquet file with their numbers, without columns that are empty in a row."""
    if find_spec("pyarrow") is None:
        raise ImportError(
            f"{path} needs pyarrow, not installed here: pip install 'dflash-hub[eval]'"
        )
    from pyarrow import parquet

    for number, row in enumerate(parquet.read_table(path).to_pylist(), start=1):
        yield number, {name: value for name, value in row.items() if value is not None}


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


def _of_row(row: Any, where: str, number: str) -> Prompt:
    """Return the prompt of a row.

    Raises:
        ValueError: it is none; with where it stands.
    """
    forms = [key for key in _FORMS if isinstance(row, dict) and key in row]
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


def _of_benchmark(name: str, benchmark: Benchmark, categories: str) -> PromptSet:
    """Load a benchmark from the Hub.

    Args:
        categories: those to take, with commas; empty for all.
    """
    rows: list[tuple[dict[str, Any], str]] = []
    for file, category in (benchmark.files or {"": benchmark.category}).items():
        which = {"data_files": file} if file else {"name": benchmark.config}
        rows += [(row, category) for row in _rows(benchmark, which)]
    prompts = []
    for number, (row, category) in enumerate(rows):
        if benchmark.category_column is not None:
            category = str(row.get(benchmark.category_column) or "all")
        named = row.get(benchmark.id_column or "")
        text = benchmark.question.format(_text(row, benchmark))
        stem = name.partition(":")[0].rpartition("/")[2]
        prompts.append(Prompt(str(named or f"{stem}-{number}"), category, text))
    prompts = _of_categories(prompts, categories, name)
    _check_whole(name, prompts)
    address = f"https://huggingface.co/datasets/{benchmark.repository}"
    return PromptSet(name, benchmark.license, address, tuple(prompts), benchmark.language)


def _of_categories(prompts: list[Prompt], chosen: str, name: str) -> list[Prompt]:
    """Return the prompts of the chosen categories, or all.

    Raises:
        ValueError: there is no such category; with those that there are.
    """
    known = list(dict.fromkeys(prompt.category for prompt in prompts))
    wanted = known
    if chosen:
        wanted = [word.strip() for word in chosen.split(",")]
    for category in wanted:
        if category not in known:
            raise ValueError(
                f"prompts is {shown(name)}, but it has no category {category!r}; it has {', '.join(known)}."
            )
    return [prompt for prompt in prompts if prompt.category in wanted]


def _of_hub(repository: str, config: str | None) -> Benchmark:
    """Return how to read any dataset of the Hub: its column of a known name, and what its card says of it."""
    from huggingface_hub import HfApi

    with explained(f"The dataset {repository} could not be read", _CONNECTION):
        card = HfApi().dataset_info(repository).card_data
    stated = {}
    for name in ("license", "language"):
        stated[name] = _listed(card.get(name) if card else None)
    return Benchmark(
        *(repository, "", "prompt", stated["license"]),
        config=config,
        category_column="category",
        id_column="id",
        language=stated["language"],
    )


def _listed(value: Any) -> str:
    """Return a value of a card's metadata in words, as several of them may stand there."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(str(one) for one in values if one) or NOT_STATED


def _rows(benchmark: Benchmark, which: dict[str, Any]) -> list[dict[str, Any]]:
    """Load a split of a dataset; of one that names none, the test split or the only one.

    Raises:
        ValueError: it has neither.
    """
    if find_spec("datasets") is None:
        raise ImportError(
            "Prompts of the Hub need datasets, not installed here: pip install 'dflash-hub[eval]'"
        )
    from datasets import load_dataset

    with explained(f"The dataset {benchmark.repository} could not be loaded", _CONNECTION):
        found = load_dataset(benchmark.repository, split=benchmark.split or None, **which)
    if benchmark.split:
        return list(found)
    split = "test" if "test" in found else next(iter(found))
    if split != "test" and len(found) > 1:
        raise ValueError(
            f"The dataset {benchmark.repository} has the splits {', '.join(found)}, none of them test. Save the "
            "prompts as a JSONL file, and pass that."
        )
    return list(found[split])


def _text(row: dict[str, Any], benchmark: Benchmark) -> str:
    """Return the prompt of a row: its column, or another of a known name; of several turns, the first."""
    column = next((name for name in (benchmark.column, *_COLUMNS) if name in row), None)
    if column is None:
        raise ValueError(
            f"The dataset {benchmark.repository} has the columns {', '.join(row)}; {benchmark.column} is expected."
        )
    value = row[column]
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"The dataset {benchmark.repository} has {shown(value)} as {column}; a text or a list of turns is expected."
        )
    return text


def _check_whole(name: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that their dataset does not hold, but only says where to fetch.

    Raises:
        ValueError: with their number.
    """
    missing = sum(PLACEHOLDER in prompt.shown for prompt in prompts)
    if missing:
        raise ValueError(
            f"{missing} of the {len(prompts)} prompts of {name} are not in its dataset, for their licenses. Prepare "
            "all with prepare_data.py of NVIDIA's Model Optimizer (examples/specdec_bench), and pass the test.parquet "
            "that it writes as --prompts."
        )


def _check_ids(found: PromptSet) -> None:
    """Refuse two prompts with the same id."""
    seen: set[str] = set()
    for prompt in found.prompts:
        if prompt.id in seen:
            raise ValueError(f"Two prompts of {found.name} have the id {prompt.id}; change one.")
        seen.add(prompt.id)
