# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Rewrite the answers of a dataset with the target's own: a draft learns best from what its target would say.

The answers come from any server that speaks OpenAI's protocol (vLLM, SGLang ...), or from the target in this process.
Every finished row is one line of a JSONL file with the number of its source row; a run that was interrupted goes on
with the rows that are missing there.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from .data import columns_of

ROW = "row"
"""The column with the number of the source row."""


@dataclass(frozen=True)
class Asking:
    """How answers are asked for.

    Args:
        max_new_tokens: at most, for an answer.
        temperature: 0 for the likeliest answer; None for the target's own settings.
        prompt_tokens: of a row with `text`, how many of its first tokens are kept as the prompt.
    """

    max_new_tokens: int = 2048
    temperature: float | None = None
    prompt_tokens: int = 64


GIVE_UP = 10
"""Rows in succession without an answer that end a run."""

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""A row with `messages` or `text` to the same row with the target's own answers."""


class Server:
    """A server that speaks OpenAI's protocol.

    Args:
        url: its base, such as http://localhost:8000/v1.
        model: the target's name there; the first that the server lists where it is None.

    Raises:
        ValueError: nothing answers there, or not in that protocol.
    """

    def __init__(self, url: str, tokenizer: Any, asking: Asking, model: str | None = None):
        self.tokenizer, self.asking = tokenizer, asking
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.HTTPTransport(retries=3)
        self.client = httpx.Client(base_url=url.rstrip("/") + "/", timeout=600, transport=transport, headers=headers)
        try:
            listed = self.client.get("models").raise_for_status().json()["data"]
            self.model = model or listed[0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"No server that lists its models answers at {url}: {error}. It is given with /v1."
            ) from error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Raises httpx.HTTPError where the server does not answer."""
        if row.get("messages") is None:
            start = prompt_text(self.tokenizer, row["text"], self.asking.prompt_tokens)
            said = self._ask("completions", {"prompt": start})
            return {"text": start + said["text"]}
        tools = {"tools": row["tools"]} if row.get("tools") else {}

        def say(messages: list[dict[str, Any]]) -> dict[str, Any]:
            said = self._ask("chat/completions", {"messages": messages} | tools)["message"]
            return {key: said[key] for key in ("content", "reasoning_content", "tool_calls") if said.get(key)}

        return {"messages": answered(row["messages"], say)} | tools

    def _ask(self, what: str, question: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {"model": self.model, "max_tokens": self.asking.max_new_tokens}
        if self.asking.temperature is not None:
            settings["temperature"] = self.asking.temperature
        return self.client.post(what, json=settings | question).raise_for_status().json()["choices"][0]


class InProcess:
    """The target itself, one row at a time; for small targets."""

    def __init__(self, target: Any, tokenizer: Any, asking: Asking):
        self.target, self.tokenizer, self.asking = target.eval(), tokenizer, asking

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("messages") is None:
            start = prompt_text(self.tokenizer, row["text"], self.asking.prompt_tokens)
            return {"text": start + self._ask(self.tokenizer(start, return_tensors="pt").input_ids)}
        tools = {"tools": row["tools"]} if row.get("tools") else {}

        def say(messages: list[dict[str, Any]]) -> dict[str, Any]:
            asked = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **tools)
            return {
                "content": self._ask(self.tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids)
            }

        return {"messages": answered(row["messages"], say)} | tools

    @torch.no_grad()
    def _ask(self, ids: torch.Tensor) -> str:
        """The text of the answer to `ids [1, P]`."""
        settings: dict[str, Any] = {"max_new_tokens": self.asking.max_new_tokens}
        if self.asking.temperature is not None:
            settings["do_sample"] = self.asking.temperature > 0
        if self.asking.temperature:
            settings["temperature"] = self.asking.temperature
        ids = ids.to(self.target.device)
        text = self.target.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return self.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)


def answered(
    messages: list[dict[str, Any]], say: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with each of the assistant's messages replaced by what is said to the ones before it."""
    new: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            new.append({"role": "assistant"} | say(new))
        else:
            new.append({key: value for key, value in message.items() if value is not None})
    return new


def prompt_text(tokenizer: Any, text: str, tokens: int) -> str:
    """The text of its first `tokens` tokens."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:tokens])


def check_columns(rows: Any) -> None:
    """Raises ValueError: there is neither `messages` nor `text`."""
    columns = columns_of(rows)
    if not {"messages", "text"} & set(columns):
        raise ValueError(f"The data has the columns {', '.join(columns)}; 'messages' or 'text' is read.")


def finished_rows(path: Path) -> set[int]:
    """The source rows that `path` holds; a last line that was cut off in the middle is taken away.

    Raises:
        ValueError: the file is not one that `regenerate` wrote.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    try:
        return {json.loads(line)[ROW] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by regenerate; choose another --output.") from error


def regenerate(
    rows: Iterable[dict[str, Any]], path: Path, answer: Answer, workers: int, report: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """Write every row that is not in `path` yet, with the target's answers.

    Args:
        workers: rows asked for at once.
        report: told how many rows are done and how many failed, as they are.

    Returns:
        How many rows `path` holds, and what was said of each row that failed; another run tries those again.

    Raises:
        RuntimeError: many rows in succession failed; what was answered is in `path`.
    """
    done = finished_rows(path)
    failed: list[str] = []
    in_vain = 0  # in succession
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = ((number, row) for number, row in enumerate(rows) if number not in done)
    pool = ThreadPoolExecutor(workers)
    try:
        with path.open("ab") as file:
            for number, outcome in _in_flight(pool, answer, missing, 2 * workers):
                error = outcome.exception()
                if error is None:
                    file.write(json.dumps({ROW: number} | outcome.result(), ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    done.add(number)
                else:
                    failed.append(f"row {number}: {type(error).__name__}: {error}")
                in_vain = 0 if error is None else in_vain + 1
                if in_vain >= GIVE_UP:
                    raise RuntimeError(
                        f"{in_vain} rows in succession were not answered; {path} holds {len(done)}, and the same "
                        f"command goes on from there. The last said: {failed[-1]}"
                    )
                report(len(done), len(failed))
    finally:
        pool.shutdown(cancel_futures=True)
    return len(done), failed


def _in_flight(
    pool: ThreadPoolExecutor, answer: Answer, rows: Iterator[tuple[int, dict[str, Any]]], most: int
) -> Iterator[tuple[int, Future]]:
    """Each row's number and outcome as it comes, with at most `most` rows asked for and not yet come."""
    waiting: dict[Future, int] = {}
    for number, row in rows:
        waiting[pool.submit(answer, row)] = number
        if len(waiting) >= most:
            yield from _come(waiting)
    while waiting:
        yield from _come(waiting)


def _come(waiting: dict[Future, int]) -> Iterator[tuple[int, Future]]:
    for outcome in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(outcome), outcome
