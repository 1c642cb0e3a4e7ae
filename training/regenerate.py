# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Rewrite the answers of a dataset with the target's own, which a draft learns best from.

The answers come from any server with OpenAI's protocol (vLLM, SGLang ...), or from the target in this process. Every
finished row is one line of a JSONL file, with the number of its source row. An interrupted run resumes with the rows
that are missing there.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch

from ..files import write_whole
from .formats import Conversation, Text, read_row
from .locks import sole_writer
from .messages import Message
from .reading import BadRow, row_of

ROW = "row"
"""The column with the number of the source row."""


MAX_CONSECUTIVE_FAILURES = 10
"""A run ends when this many rows in succession fail."""


@dataclass(frozen=True)
class GenerationSettings:
    """Say how answers are generated.

    Args:
        max_new_tokens: maximum tokens of an answer.
        temperature: 0 for greedy; None for the target's own settings.
        prompt_tokens: how many of the first tokens of plain text are the prompt.
    """

    max_new_tokens: int = 2048
    temperature: float | None = None
    prompt_tokens: int = 64


SEED = "_seed"
"""What a question may hold beside its own fields: the seed of the answer that is sampled."""
AnswerFn = Callable[[dict[str, Any]], dict[str, Any]]
"""Takes a row with `messages`, `text` or `prompt`, as of `question_of`; returns it with the target's own answers."""
_BESIDE_MESSAGES = ("tools", "chat_template_kwargs")


class Server:
    """Get answers from a server with OpenAI's protocol.

    Args:
        url: its base, such as http://localhost:8000/v1.
        model: the target's name on the server; None for the first that the server lists.

    Raises:
        ValueError: there is no server, or it has another protocol.
    """

    def __init__(
        self, url: str, tokenizer: Any, settings: GenerationSettings, model: str | None = None
    ):
        self.tokenizer, self.settings = tokenizer, settings
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.HTTPTransport(retries=3)
        self.client = httpx.Client(
            base_url=url.rstrip("/") + "/", timeout=600, transport=transport, headers=headers
        )
        try:
            listed = self.client.get("models").raise_for_status().json()["data"]
            self.model = model or listed[0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"No server that lists its models answers at {url}: {error}. Give its address with /v1."
            ) from error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with new answers.

        Raises:
            httpx.HTTPError: the server does not answer.
        """
        seed = {"seed": row[SEED]} if SEED in row else {}
        if row.get("messages") is None:
            start = prompt_of(self.tokenizer, row, self.settings.prompt_tokens)
            choice = self._request("completions", {"prompt": start} | seed)
            return continued(row, start, choice["text"])
        beside = _beside_messages(row)

        def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
            asked = {"messages": messages} | beside | seed
            message = self._request("chat/completions", asked)["message"]
            return {
                key: message[key]
                for key in ("content", "reasoning_content", "tool_calls")
                if message.get(key)
            }

        return {"messages": with_answers(row["messages"], answer)} | beside

    def _request(self, endpoint: str, prompt: dict[str, Any]) -> dict[str, Any]:
        """Post a prompt; return the first choice of the response."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.settings.max_new_tokens}
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        return (
            self.client.post(endpoint, json=body | prompt).raise_for_status().json()["choices"][0]
        )


class InProcess:
    """Generate answers with the target in this process, one row at a time; for small targets."""

    def __init__(self, target: Any, tokenizer: Any, settings: GenerationSettings):
        self.target, self.tokenizer = target.eval(), tokenizer
        self.settings = settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with new answers; with a seed, the random numbers of the caller stay as they are."""
        if SEED not in row:
            return self._answered(row)
        devices = [self.target.device] if self.target.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(row[SEED])
            return self._answered(row)

    def _answered(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row with new answers."""
        if row.get("messages") is None:
            start = prompt_of(self.tokenizer, row, self.settings.prompt_tokens)
            text = self._generate(self.tokenizer(start, return_tensors="pt").input_ids)
            return continued(row, start, text)
        beside = _beside_messages(row)
        options = {"tools": beside.get("tools"), **beside.get("chat_template_kwargs", {})}

        def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
            prompt = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **options
            )
            ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            return {"content": self._generate(ids)}

        return {"messages": with_answers(row["messages"], answer)} | beside

    @torch.no_grad()
    def _generate(self, ids: torch.Tensor) -> str:
        """Return the text of the answer to `ids [1, P]`."""
        generate_kwargs: dict[str, Any] = {"max_new_tokens": self.settings.max_new_tokens}
        if self.settings.temperature is not None:
            generate_kwargs["do_sample"] = self.settings.temperature > 0
        if self.settings.temperature:
            generate_kwargs["temperature"] = self.settings.temperature
        ids = ids.to(self.target.device)
        text = self.target.generate(ids, attention_mask=torch.ones_like(ids), **generate_kwargs)
        return self.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def question_of(record: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a row of any format as one with `messages`, `text`, or the `prompt` of a completion.

    Args:
        record: the row as a dataset has it.
        number: of the row.

    Raises:
        BadRow: it cannot be read, or holds tokens; names its place.
    """
    row, place = row_of(record, number)
    try:
        form = read_row(row)
    except BadRow as error:
        raise BadRow(f"{place}: {error}") from error
    if isinstance(form, Conversation):
        found = {"messages": [_message(message) for message in form.messages]}
        given = {"tools": form.tools, "chat_template_kwargs": form.options}
        return found | {name: value for name, value in given.items() if value}
    if isinstance(form, Text) and form.ends:
        return {"prompt": form.pieces[0][0]}
    if isinstance(form, Text):
        return {"text": "".join(text for text, _ in form.pieces)}
    raise BadRow(f"{place}: input_ids cannot be answered anew; pass messages or text.")


def _message(message: Message) -> dict[str, Any]:
    """Return the fields of a message, with `train` for an answer that is not learnt from."""
    not_learnt = message.role == "assistant" and not message.learnt
    return message.fields | ({"train": False} if not_learnt else {})


def _beside_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _BESIDE_MESSAGES if row.get(name)}


def with_answers(
    messages: list[dict[str, Any]], answer: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the conversation with each assistant message replaced by the answer to the new messages before it.

    A conversation that ends with a question is answered too.
    """
    new: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []  # without `train`, which servers do not know
    ends = [] if messages and messages[-1]["role"] == "assistant" else [{"role": "assistant"}]
    for message in [*messages, *ends]:
        plain = {
            key: value for key, value in message.items() if key != "train" and value is not None
        }
        if message["role"] == "assistant":
            plain = {"role": "assistant"} | answer(asked)
        asked.append(plain)
        new.append(plain | {key: message[key] for key in ("train",) if key in message})
    return new


def prompt_of(tokenizer: Any, row: dict[str, Any], tokens: int) -> str:
    """Return the prompt of a row of plain text: its own, or the first `tokens` tokens, as text."""
    if "prompt" in row:
        return row["prompt"]
    return tokenizer.decode(tokenizer(row["text"], add_special_tokens=False).input_ids[:tokens])


def continued(row: dict[str, Any], start: str, text: str) -> dict[str, Any]:
    """Return a row of plain text with what follows its prompt."""
    if "prompt" in row:
        return {"prompt": start, "completion": text}
    return {"text": start + text}


def finished_rows(path: Path) -> set[int | str]:
    """Return the numbers or keys of the source rows that `path` holds; remove a last line that is incomplete.

    Raises:
        ValueError: `regenerate` did not write the file.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        os.truncate(path, len(complete))
    try:
        return {json.loads(line)[ROW] for line in complete.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by regenerate; choose another --output."
        ) from error


def check_options(path: Path, options: dict[str, Any]) -> None:
    """Refuse a file with answers that were made with other options, as far as it is recorded beside it.

    Args:
        options: what the answers are made with, by the names of the command's options.

    Raises:
        ValueError: naming each option that differs, or the record cannot be read.
    """
    if _first_answer(path) is None:
        return
    recorded = _recorded(path)
    former, asked = [], []
    for name, value in options.items():
        if recorded.get(name, value) != value:
            former.append(_as_given(name, recorded[name]))
            asked.append(_as_given(name, value))
    if former:
        raise ValueError(
            f"{path} holds answers made with {' and '.join(former)}, and this call has {' and '.join(asked)}. Give "
            "what they were made with, or choose another --output."
        )


def _recorded(path: Path) -> dict[str, Any]:
    """Return what the answers in a file were made with; {} where nothing is recorded, as by former versions.

    Raises:
        ValueError: the record cannot be read.
    """
    record = _record(path)
    if not record.exists():
        return {}
    try:
        return dict(json.loads(record.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{record} should say what the answers in {path} were made with, but cannot be read. Remove it if all of "
            "them were made with the options of this call; else choose another --output."
        ) from error


def _record(path: Path) -> Path:
    """Return the file beside an output that says what its answers were made with.

    It is hidden, since `datasets` takes every other file of a folder for data.
    """
    return path.with_name(f".{path.name}.options")


def _as_given(name: str, value: Any) -> str:
    """Return an option as it is typed."""
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _keep_options(path: Path, options: dict[str, Any], is_new: bool) -> None:
    """Record what the answers in a file are made with before the first is; later, refuse other options."""
    if is_new:
        write_whole(_record(path), json.dumps(options, ensure_ascii=False).encode())
    else:
        check_options(path, options)


def check_continued(
    rows: Iterable[dict[str, Any]], path: Path, prompt: Callable[[dict[str, Any]], str]
) -> None:
    """Refuse a file with answers to other rows; the row in its first line is compared with that of the data.

    Args:
        prompt: gives the prompt of a row of plain text.

    Raises:
        ValueError: the two rows have other questions.
    """
    found = _first_answer(path)
    if found is None:
        return
    number = found[ROW]
    source = next(islice(rows, number, None), None)
    if source is None or _has_question(found, question_of(source, number), prompt):
        return
    raise ValueError(
        f"{path} holds answers to other rows: its row {number} is not row {number} of the data, or was written with "
        "another target or another --prompt-tokens. Choose another --output."
    )


def _first_answer(path: Path) -> dict[str, Any] | None:
    """Return the first whole line of a file; None where `finished_rows` finds none, or refuses the file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        line = file.readline()
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(found, dict) and isinstance(found.get(ROW), int)
    return found if is_ours else None


def _has_question(
    found: dict[str, Any], question: dict[str, Any], prompt: Callable[[dict[str, Any]], str]
) -> bool:
    """Return whether an answered row begins with a question."""
    if "messages" in question:
        return _not_answers(found) == _not_answers(question)
    text = found.get("prompt", found.get("text"))
    return isinstance(text, str) and text.startswith(prompt(question))


def _not_answers(row: dict[str, Any]) -> str:
    """Return the messages that are not the assistant's, as JSON."""
    asked = []
    for message in row.get("messages") or []:
        if message["role"] != "assistant":
            asked.append({key: value for key, value in message.items() if value is not None})
    return json.dumps(asked, sort_keys=True)


def check_template(rows: Iterable[dict[str, Any]], tokenizer: Any) -> None:
    """Refuse conversations for a tokenizer that cannot write them as a text, by the first row.

    Raises:
        ValueError: it has no chat template.
    """
    first = next(iter(rows), None)
    if first is None or tokenizer.chat_template is not None:
        return
    if "messages" in question_of(first, 0):
        raise ValueError(
            "The target's tokenizer has no chat template, which conversations need. Pass plain text ('text', or "
            "'prompt' and 'completion'), a target that was trained for chats, or --server with one."
        )


def regenerate(
    rows: Iterable[dict[str, Any]],
    path: Path,
    answer: AnswerFn,
    workers: int,
    report: Callable[[int, int], None],
    options: dict[str, Any] | None = None,
) -> tuple[int, list[str]]:
    """Write every row that is not in `path` yet, with the target's answers.

    Args:
        workers: rows that are answered at once.
        report: called after each row with how many rows are done and how many failed.
        options: what the answers are made with; recorded beside `path` and compared there. None records nothing.

    Returns:
        How many rows `path` holds, and the error of each row that failed; another run tries those again.

    Raises:
        ValueError: another run writes `path`, it was not written by `regenerate` or with other options, or a row
            cannot be read.
        RuntimeError: many rows in succession failed; `path` holds those that were answered.
        OSError: a row could not be written; `path` holds those that were.
    """
    asked = ((number, question_of(row, number)) for number, row in enumerate(rows))
    return write_answers(asked, path, answer, workers, report, options)


def write_answers(
    questions: Iterable[tuple[int | str, dict[str, Any]]],
    path: Path,
    answer: AnswerFn,
    workers: int,
    report: Callable[[int, int], None],
    options: dict[str, Any] | None = None,
) -> tuple[int, list[str]]:
    """Answer questions, each with its number or key, as `regenerate` does with rows."""
    failed: list[str] = []
    consecutive_failures = 0
    lock = sole_writer(path, path.with_name(f"{path.name}.lock"), "--output")
    with lock, ExitStack() as stack:
        done = finished_rows(path)
        if options is not None:
            _keep_options(path, options, is_new=not done)
        missing = (one for one in questions if one[0] not in done)
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        file = stack.enter_context(path.open("ab", buffering=0))
        for number, outcome in _in_flight(pool, answer, missing, 2 * workers):
            error = outcome.exception()
            if error is None:
                _write_row(file, path, number, outcome.result(), len(done))
                done.add(number)
                consecutive_failures = 0
            else:
                failed.append(f"row {number}: {type(error).__name__}: {error}")
                consecutive_failures += 1
            if consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                raise RuntimeError(
                    f"{consecutive_failures} rows in succession were not answered; {path} holds {len(done)}, and "
                    f"the same command resumes from there. The last error: {failed[-1]}"
                )
            report(len(done), len(failed))
    return len(done), failed


def _write_row(
    file: FileIO, path: Path, number: int | str, row: dict[str, Any], num_whole: int
) -> None:
    """Append an answered row to the file at `path`, which holds `num_whole` rows.

    Raises:
        OSError: it could not be written; says what the file holds.
    """
    line = json.dumps({ROW: number} | row, ensure_ascii=False)
    try:
        _append(file, line.encode() + b"\n")
    except OSError as error:
        raise OSError(
            f"Row {number} could not be written to {path}: {error}. It holds {num_whole} whole rows; make room, and "
            "the same command resumes from there."
        ) from error


def _append(file: FileIO, line: bytes) -> None:
    """Append a line to an unbuffered file; nothing of it stays if it cannot be written whole.

    Raises:
        OSError: it could not be written.
    """
    start, written = file.tell(), 0
    try:
        while written < len(line):
            written += file.write(line[written:])
    except BaseException:
        file.truncate(start)
        raise


def _in_flight(
    pool: ThreadPoolExecutor,
    answer: AnswerFn,
    rows: Iterator[tuple[int | str, dict[str, Any]]],
    most: int,
) -> Iterator[tuple[int | str, Future]]:
    """Yield each row's number and outcome as it completes, with at most `most` rows submitted at a time."""
    waiting: dict[Future, int | str] = {}
    for number, row in rows:
        waiting[pool.submit(answer, row)] = number
        if len(waiting) >= most:
            yield from _as_completed(waiting)
    while waiting:
        yield from _as_completed(waiting)


def _as_completed(waiting: dict[Future, int | str]) -> Iterator[tuple[int | str, Future]]:
    """Wait until at least one row is complete; remove those that are from `waiting`, and yield them."""
    for outcome in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(outcome), outcome
