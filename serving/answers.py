# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The bodies of responses, whole and in pieces, for conversations and for completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.decoding import Cycle, engine_words
from .calls import CallReader
from .choices import Piece, TokenLogprob
from .text import UNFINISHED

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM does the same."""
_DETAILS = ("per_step_accepted", "per_step_drafted")
"""What vLLM adds with `detailed` only: a number for each cycle."""

Body = dict[str, Any]


@dataclass
class Answered:
    """Hold what one choice has got so far."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.ids += piece.ids
        self.finish, self.cycles = piece.finish, piece.cycles


class Form:
    """Say how a response of one kind of requests looks.

    Args:
        most_drafted: tokens that a cycle drafts at most.
        has_logprobs: whether probabilities are told.
        reports_usage: whether a stream ends with the numbers of tokens, and then every piece has the field.
    """

    prefix = ""
    kind = ""
    piece_kind = ""

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        most_drafted: int,
        has_logprobs: bool = False,
        reports_usage: bool = False,
    ):
        self.tokenizer, self.most_drafted = tokenizer, most_drafted
        self.has_logprobs, self.reports_usage = has_logprobs, reports_usage
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.head = {"id": identity, "created": int(time.time()), "model": model}
        self.offsets: dict[int, int] = {}
        """Characters of each choice whose tokens were told."""
        self.readers: list[CallReader] = []
        """Find the calls of tools in each choice; none where they stay text."""

    def whole(self, answers: Sequence[Answered], prompts: Sequence[int]) -> Body:
        """Return the whole response, for prompts of so many tokens."""
        choices = []
        for index, answer in enumerate(answers):
            choice = self.choice(index, answer)
            choice["logprobs"] = self.logprobs(index, answer.logprobs)
            choices.append({"finish_reason": answer.finish, **choice})
        body = {**self.head, "object": self.kind, "choices": choices}
        return {**body, **self.figures(answers, prompts)}

    def opening(self, index: int) -> list[Body]:
        """Return what a stream says of a choice before its first token."""
        return []

    def pieces(self, index: int, piece: Piece) -> list[Body]:
        """Return what a stream says of a piece of a choice: none if nothing is to be said."""
        if not (piece.text or piece.logprobs or piece.finish or self.readers):
            return []
        choice = {"finish_reason": piece.finish or None, **self.delta(index, piece)}
        choice["logprobs"] = self.logprobs(index, piece.logprobs)
        return [self.chunk([choice])]

    def closing(self, answers: Sequence[Answered], prompts: Sequence[int]) -> list[Body]:
        """Return what a stream says after the last piece."""
        if not self.reports_usage:
            return []
        return [{**self.chunk([]), **self.figures(answers, prompts)}]

    def chunk(self, choices: list[Body]) -> Body:
        """Return a piece of a stream."""
        body = {**self.head, "object": self.piece_kind, "choices": choices}
        return {**body, "usage": None} if self.reports_usage else body

    def figures(self, answers: Sequence[Answered], prompts: Sequence[int]) -> Body:
        """Return the numbers of tokens, and how they were drafted in vLLM's words."""
        new = sum(answer.tokens for answer in answers)
        usage = {"prompt_tokens": sum(prompts), "completion_tokens": new}
        usage["total_tokens"] = sum(prompts) + new
        cycles = [cycle for answer in answers for cycle in answer.cycles]
        if not cycles:
            return {"usage": usage}
        words = engine_words(cycles, self.most_drafted)
        summary = {name: value for name, value in words.items() if name not in _DETAILS}
        return {"usage": usage, "metrics": {"speculative_decoding": summary}}

    def choice(self, index: int, answer: Answered) -> Body:
        """Return a whole choice; its reason to end may be another than the answer's."""
        raise NotImplementedError

    def delta(self, index: int, piece: Piece) -> Body:
        """Return a choice of a piece; its reason to end may be another than the piece's."""
        raise NotImplementedError

    def logprobs(self, index: int, found: list[TokenLogprob]) -> Body | None:
        """Return the probabilities of tokens that a choice goes on with; None where nobody asked."""
        return self.listed(index, found) if self.has_logprobs else None

    def listed(self, index: int, found: list[TokenLogprob]) -> Body:
        """Return the probabilities as this kind of requests lists them."""
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """Return the text of one token, special ones too."""
        return self.tokenizer.decode([token])


class ChatForm(Form):
    """Write responses of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def opening(self, index: int) -> list[Body]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self.chunk([choice])]

    def choice(self, index: int, answer: Answered) -> Body:
        message: Body = {"role": "assistant", "content": answer.text, "refusal": None}
        if not self.readers:
            return {"index": index, "message": message}
        reader = self.readers[index]
        message.update({"content": None} | reader.read(answer.ids, is_last=True))
        if reader.calls:
            message["tool_calls"] = reader.calls
        return {"index": index, "message": message, **_reason(reader, answer.finish)}

    def delta(self, index: int, piece: Piece) -> Body:
        if not self.readers:
            return {"index": index, "delta": {"content": piece.text} if piece.text else {}}
        reader = self.readers[index]
        delta: Body = dict(reader.read(piece.ids, is_last=bool(piece.finish)))
        if piece.finish and reader.calls:
            calls = enumerate(reader.calls)
            delta["tool_calls"] = [{"index": place, **call} for place, call in calls]
        return {"index": index, "delta": delta, **_reason(reader, piece.finish)}

    def listed(self, index: int, found: list[TokenLogprob]) -> Body:
        content = []
        for one in found:
            top = [self._entry(token, logprob) for token, logprob in one.top]
            content.append({**self._entry(one.token, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Body:
        """Return a token; without bytes where these are only a part of a character."""
        text = self.token_text(token)
        bytes_of = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": bytes_of}


def _reason(reader: CallReader, finish: str) -> Body:
    """Return that an answer ends to have tools called, if it does."""
    return {"finish_reason": "tool_calls"} if reader.calls and finish == "stop" else {}


class CompletionForm(Form):
    """Write responses of /v1/completions."""

    prefix = "cmpl"
    kind = "text_completion"
    piece_kind = "text_completion"

    def choice(self, index: int, answer: Answered) -> Body:
        return {"index": index, "text": answer.text}

    def delta(self, index: int, piece: Piece) -> Body:
        return {"index": index, "text": piece.text}

    def listed(self, index: int, found: list[TokenLogprob]) -> Body:
        body: Body = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self.offsets.get(index, 0)
        for one in found:
            text, logprob = self.token_text(one.token), max(one.logprob, LEAST_LOGPROB)
            top = {self.token_text(token): max(value, LEAST_LOGPROB) for token, value in one.top}
            body["tokens"].append(text)
            body["token_logprobs"].append(logprob)
            body["top_logprobs"].append({**top, text: logprob})
            body["text_offset"].append(offset)
            offset += len(text)
        self.offsets[index] = offset
        return body
