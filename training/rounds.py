# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write the answers of the training data anew while a run goes on.

The first round trains on the data as it is. After every N steps the target answers the same prompts again, sampled with
another seed, and the next round trains on those texts. The target is frozen, so the texts of all rounds are of the same
distribution: that of the target, in which the draft is to propose.

Answers lie in files, one for each round, keyed by prompt. A row that is there is never written again, so an interrupted
round goes on where it was. Which row is trained on in a step depends on the files, the seed and the step alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .arguments import DFlashTrainingArguments
from .contradictions import greedy_mistakes, round_mistakes
from .digests import json_digest
from .options import refuse
from .regenerate import (
    ROW,
    SEED,
    AnswerFn,
    GenerationSettings,
    InProcess,
    Server,
    finished_rows,
    prompt_of,
    question_of,
    write_answers,
)

FOLDER = "_rounds"  # Trainer pushes no name with _
_DIGEST = 8
"""Bytes of the digests by which rows and folders are named."""
_FAILED = "failed"
"""The column of a row that the target did not answer; it is left out of its round."""


@dataclass(frozen=True)
class Plan:
    """Say when rounds begin.

    Args:
        every: steps of a round.
        steps: of the whole run.
        rows: packed rows of a step, on all processes.
        seed: of the order of rows and of the answers.
    """

    every: int
    steps: int
    rows: int
    seed: int


class Answers:
    """Hold the answers of every round in files.

    Args:
        rows: of the data; they must have prompts.
        folder: of the files.
        answer: gives the target's answer to a row.
        prompt: gives the prompt of a row of plain text.
        workers: rows that are answered at once.
    """

    def __init__(
        self,
        rows: Any,
        folder: Path,
        answer: AnswerFn,
        prompt: Callable[[dict[str, Any]], str],
        workers: int,
    ):
        self.rows, self.folder = rows, folder
        self.answer, self.workers = answer, workers
        self.prompt = prompt
        self.report: Callable[[int, int, int], None] = _quiet
        """Called after each answer with the number of the round, and how many are done and how many failed."""
        self.keys = [key for key, _ in self._questions()]

    def _questions(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the key and the question of each row. A prompt that occurs again has a key of its own.

        Raises:
            BadRow: a row has no prompt.
        """
        times: Counter[str] = Counter()
        for number, row in enumerate(self.rows):
            question = question_of(row, number)
            key = json_digest(self._asked(question), _DIGEST)
            times[key] += 1
            yield (key if times[key] == 1 else f"{key}-{times[key]}"), question

    def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return a question without the answers that the data has."""
        if "messages" not in question:
            return {"prompt": self.prompt(question)}
        messages = []
        for message in question["messages"]:
            answered = message["role"] == "assistant"
            messages.append({"role": "assistant"} if answered else message)
        return question | {"messages": messages}

    def file(self, number: int) -> Path:
        """Return the path of a round's answers."""
        return self.folder / f"round-{number}.jsonl"

    def write(self, number: int, seed: int) -> None:
        """Write the answers that the file of a round lacks; those that fail twice are left out.

        Raises:
            RuntimeError: many rows in succession failed.
            OSError: a row could not be written.
        """
        path = self.file(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            questions = (
                (key, question | {SEED: _seed(seed, number, key)})
                for key, question in self._questions()
            )
            report = partial(self.report, number)
            _, failed = write_answers(questions, path, self.answer, self.workers, report)
            if not failed:
                return
        done = finished_rows(path)
        with path.open("a", encoding="utf-8") as file:
            for key in self.keys:
                if key not in done:
                    file.write(json.dumps({ROW: key, _FAILED: failed[-1]}) + "\n")

    def read(self, number: int) -> list[dict[str, Any]]:
        """Return the answered rows of a round, in the order of the data."""
        found = {}
        for line in self.file(number).read_bytes().splitlines():
            row = json.loads(line)
            found[row.pop(ROW)] = row
        rows = [found[key] for key in self.keys]
        return [row for row in rows if _FAILED not in row]


class Rounds(Dataset):
    """Hold the packed rows of all steps of a run, in their order; those of a round are made when it begins.

    Args:
        first: packed rows of the first round.
        answers: those of the other rounds.
        plan: when they begin.
        packed: packs the rows of a round; it is called once for each, with its number.
        alone: a context in which the main process goes first.
    """

    def __init__(
        self,
        first: Any,
        answers: Answers,
        plan: Plan,
        packed: Callable[[list[dict[str, Any]], int], Any],
        alone: Callable[[], Any],
    ):
        self.first, self.plan = first, plan
        self.answers, self._packed = answers, packed
        self._alone = alone
        self._round = 0
        self._rows = first
        self._turn: tuple[int, int, list[int]] = (-1, -1, [])

    def __len__(self) -> int:
        return self.plan.steps * self.plan.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row of step `index // plan.rows`. A round goes over its rows as often as it needs to."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index, self.plan.every * self.plan.rows)
        if number != self._round:
            self._begin(number)
        turn, place = divmod(place, len(self._rows))
        if self._turn[:2] != (number, turn):
            seed = _seed(self.plan.seed, number, f"turn {turn}")
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self._rows), generator=generator).tolist()
            self._turn = number, turn, order
        return self._rows[self._turn[2][place]]

    def _begin(self, number: int) -> None:
        """Make the rows of a round."""
        if number == 0:
            rows = self.first
        else:
            with self._alone():
                self.answers.write(number, self.plan.seed)
            rows = self._packed(self.answers.read(number), number)
        self._round, self._rows = number, rows


def _seed(seed: int, number: int, key: str) -> int:
    """Return the seed of an answer, or of an order, of 31 bits."""
    digest = hashlib.blake2b(f"{seed} {number} {key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _quiet(number: int, done: int, failed: int) -> None:
    """Report nothing: the log has a line for each round."""


def check_rounds(args: DFlashTrainingArguments, rows: Any, target: Any) -> None:
    """Refuse what rounds cannot work with.

    Raises:
        ValueError: names the options.
    """
    refuse(
        [
            *round_mistakes(args, hasattr(rows, "__len__")),
            *greedy_mistakes(args, getattr(target, "generation_config", None)),
        ]
    )


def answers_of(
    args: DFlashTrainingArguments, rows: Any, tokenizer: Any, target: Any, version: str
) -> Answers:
    """Return the answers of a run.

    Args:
        version: of the target; answers of another one are not taken for its own.

    Raises:
        ValueError: there is no server, or a row has no prompt.
    """
    settings = GenerationSettings(
        args.regenerate_max_new_tokens, args.regenerate_temperature, args.regenerate_prompt_tokens
    )
    if args.regenerate_server is None:
        answer: AnswerFn = InProcess(target, tokenizer, settings)
    else:
        answer = Server(args.regenerate_server, tokenizer, settings, args.regenerate_model)
    facts = [vars(settings), args.regenerate_server, args.regenerate_model, args.seed, version]
    folder = Path(str(args.output_dir)) / FOLDER / json_digest(facts, _DIGEST)
    workers = 1 if args.regenerate_server is None else args.regenerate_workers
    return Answers(
        rows,
        folder,
        answer,
        lambda row: prompt_of(tokenizer, row, settings.prompt_tokens),
        workers,
    )
