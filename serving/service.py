# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Answer requests: from their fields to choices that wait, and from pieces to whole answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from .answers import Answered, ChatForm, CompletionForm, Form
from .calls import CallReader, finds_calls
from .choices import Choice, Options, Piece, options_of
from .decoding import Decoder, Worker
from .errors import ApiError
from .metrics import Metrics
from .prompts import Prompts
from .requests import ChatRequest, CompletionRequest
from .waiting import Waiting

Asked = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Settings:
    """Say how a server serves.

    Args:
        name: of the target, as requests name it.
        draft: its name.
        batch: rows that are decoded together at most.
        most_waiting: choices that may wait.
        context: tokens of prompt and text at most; None for the target's positions.
        template: a chat template in place of the tokenizer's own.
        key: what clients must show; None for none.
        hosts: by which names clients may call the server; () for any.
    """

    name: str
    draft: str = ""
    batch: int = 8
    most_waiting: int = 64
    context: int | None = None
    template: str | None = None
    key: str | None = None
    hosts: tuple[str, ...] = ()


class Run:
    """Hold a request that is being answered.

    Args:
        prompts: token ids, one for each prompt.
        plan: for each choice its prompt's place, its options and its length.
    """

    def __init__(
        self, prompts: list[list[int]], plan: list[tuple[int, Options, int]], stops: Sequence[str]
    ):
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.prompts = [len(prompt) for prompt in prompts]
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.choices: list[Choice] = []
        self.answers: list[Answered] = []
        for place, options, limit in plan:
            deliver = self._deliverer(len(self.choices))
            self.choices.append(Choice(prompts[place], options, limit, tuple(stops), deliver))
            self.answers.append(Answered())

    def _deliverer(self, index: int) -> Any:
        """Return what takes the pieces of a choice, in the thread that decodes."""

        def deliver(piece: Piece) -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                self.loop.call_soon_threadsafe(self.arrived.put_nowait, (index, piece))

        return deliver

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all choices as they come, each with the choice's number.

        Raises:
            ApiError: decoding failed.
        """
        left = len(self.choices)
        while left:
            index, piece = await self.arrived.get()
            if piece.error:
                raise ApiError(500, piece.error)
            if self.first_token is None:
                self.first_token = self.seconds
            self.answers[index].add(piece)
            left -= piece.is_last
            yield index, piece

    async def whole(self) -> None:
        """Wait until all choices are answered.

        Raises:
            ApiError: decoding failed.
        """
        async for _ in self.pieces():
            pass

    def cancel(self) -> None:
        """End what is still decoded; nobody waits for it."""
        for choice in self.choices:
            choice.cancelled = True


class Service:
    """Answer requests by a decoder with a queue before it."""

    def __init__(self, decoder: Decoder, settings: Settings):
        self.decoder, self.settings = decoder, settings
        own = decoder.context
        limits = [limit for limit in (settings.context, own) if limit is not None]
        context = min(limits, default=None)
        vocabulary = decoder.target.get_input_embeddings().weight.shape[0]
        self.prompts = Prompts(decoder.tokenizer, vocabulary, context, settings.template)
        self.waiting = Waiting(settings.most_waiting, settings.batch, context)
        self.worker = Worker(self.waiting, decoder.decode)
        self.metrics = Metrics(lambda: len(self.waiting.running), lambda: len(self.waiting.choices))
        self.finds_calls = finds_calls(decoder.tokenizer)
        self.began = int(time.time())

    @property
    def context(self) -> int | None:
        """Tokens of prompt and text at most; None for any number."""
        return self.prompts.context

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.worker.is_alive() and not self.waiting.closed

    async def start(self, asked: Asked) -> Run:
        """Let the choices of a request wait.

        Raises:
            ApiError: it cannot be answered, or not now.
        """
        if asked.model not in (None, self.settings.name):
            raise self.no_model(asked.model)
        prompts = await run_in_threadpool(self._prompts, asked)
        for token in asked.logit_bias:
            if not 0 <= token < self.prompts.vocabulary:
                raise ApiError(
                    400,
                    f"logit_bias has the token {token}, but the target knows 0 to {self.prompts.vocabulary - 1}.",
                    "logit_bias",
                )
        run = Run(prompts, self._settings(prompts, asked), asked.stop)
        self.waiting.add(run.choices)
        return run

    def no_model(self, name: str) -> ApiError:
        """Return the refusal of another model's name."""
        message = f"The model {name!r} is not here; this server has {self.settings.name!r}."
        return ApiError(404, message, "model", "model_not_found")

    def _prompts(self, asked: Asked) -> list[list[int]]:
        if isinstance(asked, ChatRequest):
            return [self.prompts.of_chat(asked)]
        return self.prompts.of_completion(asked)

    def _settings(self, prompts: list[list[int]], asked: Asked) -> list[tuple[int, Options, int]]:
        """Return for each choice its prompt's place, its options and its length."""
        found: list[tuple[int, Options, int]] = []
        for place, prompt in enumerate(prompts):
            limit = self.prompts.length(prompt, asked)
            for _ in range(asked.n):
                options = options_of(asked, self.decoder.defaults, len(found))
                found.append((place, options, limit))
        return found

    def form(self, asked: Asked, run: Run) -> Form:
        """Return how the answers to a request look."""
        kind = ChatForm if isinstance(asked, ChatRequest) else CompletionForm
        extras = asked.stream_options
        form = kind(
            self.settings.name,
            self.decoder.tokenizer,
            self.decoder.draft.config.num_drafted,
            asked.alternatives is not None,
            asked.stream and extras is not None and extras.include_usage,
        )
        if self._may_call(asked):
            tokenizer, tools = self.decoder.tokenizer, getattr(asked, "tools", [])
            form.readers = [CallReader(tokenizer, one.prompt, tools) for one in run.choices]
        return form

    def _may_call(self, asked: Asked) -> bool:
        """Tell whether calls of tools are looked for; an answer that ends at a text is none of a template."""
        if not isinstance(asked, ChatRequest) or asked.stop:
            return False
        return bool(asked.tools and asked.tool_choice == "auto" and self.finds_calls)

    def count(self, run: Run) -> None:
        """Count a request that was answered."""
        self.metrics.first_token.observe(run.first_token or run.seconds)
        self.metrics.count(run.answers, sum(run.prompts), run.seconds)

    def models(self) -> list[dict[str, Any]]:
        """Return what /v1/models lists."""
        one = {"id": self.settings.name, "object": "model", "created": self.began}
        one |= {"owned_by": "dflash-hub", "max_model_len": self.context}
        one["draft"] = self.settings.draft
        return [one]
