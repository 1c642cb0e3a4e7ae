# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Answer prompts with a target and its draft, and tell in one line how fast, and why a draft does not help."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from transformers import TextStreamer

from ..adaptive_dflash import MEASURED_FROM
from ..evaluation import positions_left, without_penalties
from ..generation_dflash import DecodeStatistics, now
from .loading import Loaded
from .screen import counted, notes

HELPS = 1.1
"""Times as fast as the target alone, from which a draft helps."""
_UNTRAINED = 1.15
"""Tokens a cycle below which a draft predicts as little as an untrained one."""
_PROBE = 6
"""Tokens of the target alone that are timed, for the estimate."""
_CONTEXT = 64
"""Tokens of a prompt that those follow."""


@dataclass(frozen=True)
class Sampling:
    """Say how tokens are chosen: greedily, or drawn if there is a temperature.

    Args:
        temperature: None or 0 for greedy.
        seed: of the noise; None for another with every call.
        stop: texts that end an answer.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        if self.temperature is None:
            return self.top_p is not None or self.top_k is not None
        return self.temperature > 0

    def problem(self) -> str | None:
        """Return what contradicts itself; None if nothing does."""
        flags = [("--top-p", self.top_p), ("--top-k", self.top_k), ("--seed", self.seed)]
        given = " and ".join(flag for flag, value in flags if value is not None)
        if self.draws or not given:
            return None
        if self.temperature == 0:
            return f"--temperature is 0, which is greedy, so {given} would change nothing; leave one of them out."
        return (
            "--seed would change nothing, since text is greedy without --temperature, --top-p and --top-k; pass one of "
            "them, or leave --seed out."
        )

    def keywords(self, target: Any) -> dict[str, Any]:
        """Return the keywords of `generate`."""
        found = without_penalties(target) | {"do_sample": self.draws}
        if self.draws:
            found["temperature"] = 1.0 if self.temperature is None else self.temperature
            found["top_p"] = 1.0 if self.top_p is None else self.top_p
            found["top_k"] = 0 if self.top_k is None else self.top_k
        return found


@dataclass(frozen=True)
class Answer:
    """Hold a text, and how it came about.

    Args:
        tokens: the new ones.
        seconds: from the call to its end, with all that is prepared once.
        stopped: whether Ctrl-C ended it.
        is_sampled: whether its tokens were drawn.
    """

    tokens: tuple[int, ...]
    text: str
    seconds: float
    statistics: DecodeStatistics
    stopped: bool = False
    is_sampled: bool = False

    @property
    def decoding(self) -> float:
        """Seconds of prefill and cycles, without what is prepared once."""
        return self.statistics.prefill_seconds + self.statistics.decode_seconds

    @property
    def rate(self) -> float:
        """Tokens per second of decoding."""
        return len(self.tokens) / max(self.decoding, 1e-9)


class _Writer(TextStreamer):
    """Write an answer to stdout as it comes, and hold its tokens."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.reshape(-1).tolist()
        super().put(value)


class _Clock:
    """Hold when each token came, as a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class Answerer:
    """Answer prompts with a pair.

    Args:
        capture: how blocks run, as in `draft.speculate`.
    """

    def __init__(self, pair: Loaded, tokenizer: Any, sampling: Sampling, capture: str = "auto"):
        self.pair, self.tokenizer = pair, tokenizer
        self.sampling, self.capture = sampling, capture
        self.proposing: dict[str, Any] = {}
        """What a cycle verifies: further keywords of `draft.speculate`."""
        self.warm = False
        self.has_explained = False
        """Whether it was shown why the draft does not help; once in a conversation is enough."""
        self.plain_seconds: float | None = None
        """Seconds of the target alone for a token, once it was measured."""

    def warm_up(self, row: Any, max_new_tokens: int) -> None:
        """Decode a short text after the end of `row [1, P]`, once, where something is prepared in the first one.

        Blocks are captured or compiled; and costs are measured, which "auto" would do in a text of `max_new_tokens`.
        """
        captures = self.pair.target.device.type != "cpu" or self.capture == "compile"
        measures = self.proposing.get("proposal") == "auto" and max_new_tokens >= MEASURED_FROM
        if self.warm or not (captures or measures):
            return
        self.warm = True
        size = 2 * self.pair.draft.config.block_size if captures else 2
        options = self._with_draft(DecodeStatistics())
        if measures:
            options["proposal"] = "tree"  # which has them measured in a text of any length
        for _ in range(3 if self.capture == "compile" else 1):
            self._generate(row[:, -_CONTEXT:], size, **options)

    def answer(self, row: Any, max_new_tokens: int) -> Answer:
        """Decode after `row [1, P]` and write the text as it comes; Ctrl-C ends it."""
        import torch

        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        elif self.sampling.draws:
            torch.seed()
        statistics, writer = DecodeStatistics(), _Writer(self.tokenizer)
        stopped = False
        started = now(row.device)
        try:
            self._generate(row, max_new_tokens, streamer=writer, **self._with_draft(statistics))
        except KeyboardInterrupt:
            writer.end()
            stopped = True
        seconds = now(row.device) - started
        text = self.tokenizer.decode(writer.tokens, skip_special_tokens=True)
        tokens, is_sampled = tuple(writer.tokens), self.sampling.draws
        return Answer(tokens, text, seconds, statistics, stopped, is_sampled)

    def alone(self, row: Any, max_new_tokens: int) -> tuple[tuple[int, ...], float]:
        """Return the tokens of the target alone after `row [1, P]`, and its seconds."""
        started = now(row.device)
        tokens = self._generate(row, max_new_tokens)[0, row.shape[1] :].tolist()
        return tuple(tokens), now(row.device) - started

    def times_plain(self, row: Any, answer: Answer) -> float:
        """Estimate how many times as fast as the target alone an answer to `row [1, P]` came.

        A few tokens of the target alone are timed once; each of the answer would have taken as long, after the prefill.
        """
        if self.plain_seconds is None:
            clock = _Clock()
            short = row[:, -_CONTEXT:]
            greedy = self.sampling.keywords(self.pair.target) | {"do_sample": False}
            for name in ("temperature", "top_p", "top_k"):
                greedy.pop(name, None)
            limits = {"max_new_tokens": _PROBE, "min_new_tokens": _PROBE, "streamer": clock}
            self.pair.target.generate(
                short, attention_mask=short.new_ones(short.shape), **greedy, **limits
            )
            gaps = [
                after - before
                for before, after in zip(clock.times[1:], clock.times[2:], strict=False)
            ]
            self.plain_seconds = median(gaps)
        alone = answer.statistics.prefill_seconds + self.plain_seconds * (len(answer.tokens) - 1)
        return alone / max(answer.decoding, 1e-9)

    def _with_draft(self, statistics: DecodeStatistics) -> dict[str, Any]:
        return {
            "custom_generate": self.pair.draft.speculate,
            "statistics": statistics,
            "capture": self.capture,
            **self.proposing,
        }

    def _generate(self, row: Any, max_new_tokens: int, **options: Any) -> Any:
        """Generate after `row [1, P]` with these options and the sampling; return `[1, P + new]`."""
        if self.sampling.stop:
            options.update(stop_strings=list(self.sampling.stop), tokenizer=self.tokenizer)
        mask = row.new_ones(row.shape)
        chosen = self.sampling.keywords(self.pair.target)
        return self.pair.target.generate(
            row, attention_mask=mask, max_new_tokens=max_new_tokens, **chosen, **options
        )


def figures(answer: Answer, times: float, how: str) -> str:
    """Return the line after an answer.

    Args:
        times: as fast as the target alone.
        how: "measured" or "estimated".
    """
    speed = f"{counted(len(answer.tokens), 'token')}, {answer.rate:.1f} tokens/s"
    line = f"{speed}, {times:.2f} times the target alone ({how})"
    if not answer.statistics.committed:  # the prefill's token was the last
        return line
    return f"{line}, {answer.statistics.acceptance_length:.2f} tokens a cycle"


def why_no_help(answerer: "Answerer", answer: Answer, times: float) -> str | None:
    """Return that a draft does not help, and why that may be; None where it helps, or too little was decoded."""
    is_asked = answerer.proposing.get("proposal") not in ("lookup", "plain")
    if times >= HELPS or len(answer.statistics.committed) < 4 or not is_asked:
        return None
    pair = answerer.pair
    length = answer.statistics.acceptance_length
    start = "The draft does not help here"
    if length > 2:
        return (
            f"{start}, though {length:.1f} tokens a cycle are good: with a target this small, or on this device, a "
            "block takes as long as the tokens that it saves."
        )
    return f"{start}: {_why_rejected(pair, answer, length)}"


def _why_rejected(pair: Loaded, answer: Answer, length: float) -> str:
    """Return the likeliest reason why few drafted tokens are accepted."""
    name = str(getattr(pair.target.config, "_name_or_path", ""))
    if pair.made_for and name.casefold() not in map(str.casefold, pair.made_for):
        return (
            f"it was made for {', '.join(pair.made_for)}. Unless {name} is a copy of that, fewer of its tokens are "
            "accepted; `dflash-hub drafts --target NAME` lists the drafts of a target."
        )
    if "think>" in answer.text:
        trained = pair.remark or "many are trained on answers without"
        return (
            f"the target thinks aloud in this answer, and the draft may not know that ({trained}). Turn thinking off "
            "in the prompt, if the target can, or take another draft."
        )
    if answer.is_sampled:
        return (
            "fewer of its tokens are accepted where text is sampled, the fewer the higher the temperature. Without "
            "--temperature, --top-p and --top-k the likeliest tokens are taken."
        )
    if length < _UNTRAINED:
        return (
            "hardly any of its tokens is accepted, as of a draft that is not trained, or not for this target. "
            "`dflash-hub check DRAFT --target TARGET` says more."
        )
    return (
        "few of its tokens are accepted; the text may be unlike its training, in language or subject. "
        "`dflash-hub eval` measures it on prompts of your own."
    )


def fitting(model: Any, row: Any, max_new_tokens: int) -> int:
    """Return how many tokens to generate after `row [1, P]`: as many as asked for, or up to the target's last position.

    Raises:
        ValueError: the prompt alone fills the positions.
    """
    room, prompt = positions_left(model, row), row.shape[1]
    if room is None or max_new_tokens <= room:
        return max_new_tokens
    if room < 1:
        raise ValueError(
            f"The prompt has {prompt:,} tokens, but the target was made for texts of {prompt + room:,}. Shorten it."
        )
    notes.print(
        f"--max-new-tokens is {max_new_tokens:,}, but the target was made for texts of {prompt + room:,} tokens, and "
        f"the prompt has {prompt:,}: generation stops after {room:,} new tokens.",
        style="yellow",
        soft_wrap=True,
        highlight=False,
    )
    return room


def encode(tokenizer: Any, messages: list[dict[str, str]], template: bool) -> Any:
    """Return the token ids of a conversation, `[1, P]`; without a template, of the text of its last message.

    Raises:
        ValueError: the template refuses it, or it has no tokens.
    """
    if not template:
        row = tokenizer(messages[-1]["content"], return_tensors="pt").input_ids
    else:
        try:
            row = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        except Exception as error:  # a template is a program of its own
            raise ValueError(
                f"The target's chat template refuses the conversation: {error}. Leave --system out, or pass "
                "--no-chat-template."
            ) from error
    if row.shape[1] == 0:
        raise ValueError("The prompt has no tokens; write something in it.")
    return row.long()
