# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The fields of requests: those that are answered exactly, those that change nothing, and those that are refused.

Nothing is ignored that would change the text. A field that is null counts as left out.
"""

import json
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import shown

MOST_CHOICES = 128
"""Choices of one request at most, as in OpenAI's API."""


def wrong(message: str) -> PydanticCustomError:
    """Return the error of a field."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def only(*allowed: Any, because: str) -> BeforeValidator:
    """Return a check that refuses a field, unless it has one of the values that change nothing."""

    values = " or ".join(json.dumps(one) for one in allowed)
    but = f", except for {values}" if allowed else ""

    def check(value: Any, info: ValidationInfo) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise wrong(f"{info.field_name} is not supported here{but}: {because}")
        return value

    return BeforeValidator(check)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _stops(value: Any) -> Any:
    """Return stop strings as a list."""
    found = _listed(value)
    if not isinstance(found, list):
        raise wrong(f"stop must be a text or a list of texts, not {shown(value)}.")
    return found


def _prompt(value: Any) -> Any:
    """Return a prompt as a list of texts, or of lists of token ids."""
    found = _listed(value)
    if isinstance(found, list) and found and all(_is_id(one) for one in found):
        found = [found]
    is_list = isinstance(found, list) and found
    if not is_list or not all(_is_one_prompt(one) for one in found):
        raise wrong(
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; none of them empty. "
            f"It is {shown(value)}."
        )
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_one_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(_is_id(one) for one in value)


def _bias(value: Any) -> Any:
    """Return a logit bias with token ids as keys."""
    if not isinstance(value, dict):
        return value
    found = {}
    for token, number in value.items():
        try:
            found[int(token)] = number
        except ValueError as error:
            raise wrong(f"The keys of logit_bias must be token ids, not {shown(token)}.") from error
    return found


Stop = Annotated[list[Annotated[str, StringConstraints(min_length=1)]], BeforeValidator(_stops)]
Prompts = Annotated[list[Any], BeforeValidator(_prompt)]
Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bias)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Fields(BaseModel):
    """Check the types of fields strictly; what is unknown is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """Drop fields that are null."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


class StreamOptions(Fields):
    """Say what a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: Any = None  # of no effect


class GenerationRequest(Fields):
    """Hold what requests of both kinds have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Count | None = None
    stop: Stop = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Bias = {}
    # Not of OpenAI's API, but of vLLM's.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    # These change no text.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @property
    def length(self) -> int | None:
        """How many tokens are asked for at most; None where that is not said."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to tell at each position; None for no probabilities at all."""
        raise NotImplementedError


def _tool_choice(value: Any) -> Any:
    if value not in ("auto", "none"):
        raise wrong(
            f"tool_choice must be auto or none here, not {shown(value)}: no grammar makes the target call a tool."
        )
    return value


def _response_format(value: Any) -> Any:
    if value != {"type": "text"}:
        raise wrong(
            "response_format is not supported here, except for text: no grammar constrains the answer."
        )
    return value


_OTHER_MEDIA = "answers are text."
_NO_CALLS = "pass functions as tools."


class ChatRequest(GenerationRequest):
    """Hold a request to /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    response_format: Annotated[Any, BeforeValidator(_response_format)] = None
    parallel_tool_calls: Annotated[Any, only(True, because="nothing limits the calls.")] = True
    modalities: Annotated[Any, only(["text"], because=_OTHER_MEDIA)] = None
    audio: Annotated[Any, only(because=_OTHER_MEDIA)] = None
    prediction: Annotated[Any, only(because="the draft proposes, and nobody else.")] = None
    functions: Annotated[Any, only([], because=_NO_CALLS)] = None
    function_call: Annotated[Any, only("auto", "none", because=_NO_CALLS)] = None
    reasoning_effort: Annotated[
        Any, only(because="pass what the target's template takes by chat_template_kwargs.")
    ] = None
    verbosity: Annotated[Any, only("medium", because="say it in the prompt.")] = None
    web_search_options: Annotated[Any, only(because="this server reaches no web.")] = None

    @model_validator(mode="after")
    def agree(self) -> "ChatRequest":
        """Refuse fields that contradict each other."""
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise wrong(
                f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; pass one of them."
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs is given, but logprobs is not true.")
        return self

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Hold a request to /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[Any, only(False, because="the prompt is not part of the answer.")] = False
    suffix: Annotated[Any, only("", because="the target continues a text, and fills no gap.")] = (
        None
    )
    best_of: int | None = None

    @model_validator(mode="after")
    def agree(self) -> "CompletionRequest":
        """Refuse to choose among more texts than are returned."""
        if self.best_of is not None and self.best_of != self.n:
            raise wrong("best_of is not supported here: all texts that are drawn are returned.")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
