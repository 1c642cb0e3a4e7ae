# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Turn what requests say into token ids: texts, and conversations by the target's chat template."""

import json
import threading
from typing import Any

from .errors import ApiError, shown
from .requests import ChatRequest, CompletionRequest

DEFAULT_LENGTH = 16
"""Tokens of a completion that names no number, as in OpenAI's API."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Of messages, as in OpenAI's API. Many templates leave out messages of another role without a word."""

_SETTINGS = (
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "documents"),
)
"""Arguments of `apply_chat_template` that are no variables of a template."""


class Prompts:
    """Make token ids of requests.

    Args:
        template: a chat template in place of the tokenizer's own.
        vocabulary: how many token ids the target knows.
        context: tokens of prompt and text at most; None for any number.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, context: int | None, template: str | None = None
    ):
        self.tokenizer, self.template = tokenizer, template
        self.vocabulary, self.context = vocabulary, context
        self.turn = threading.Lock()  # a fast tokenizer is set up anew for some calls

    @property
    def has_template(self) -> bool:
        """Whether conversations can be answered."""
        return bool(self.template or getattr(self.tokenizer, "chat_template", None))

    def of_completion(self, asked: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt.

        Raises:
            ApiError: one is empty, or has ids that the target does not know.
        """
        found = []
        for prompt in asked.prompt:
            ids = self._ids(prompt) if isinstance(prompt, str) else list(prompt)
            self._check(ids, "prompt")
            found.append(ids)
        return found

    def _ids(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            ApiError: it is none that can be encoded, such as half of a pair of surrogates.
        """
        try:
            text.encode()  # its error says more than the tokenizer's
            with self.turn:
                return list(self.tokenizer(text).input_ids)
        except (TypeError, ValueError) as error:
            raise ApiError(400, f"The prompt cannot be encoded: {error}", "prompt") from error

    def of_chat(self, asked: ChatRequest) -> list[int]:
        """Return the token ids of a conversation, up to where the answer begins.

        Raises:
            ApiError: there is no template, or it refuses the conversation.
        """
        if not self.has_template:
            raise ApiError(
                400,
                "The target's tokenizer has no chat template; use /v1/completions, or start the server with "
                "--chat-template.",
                "messages",
            )
        taken = [name for name in asked.chat_template_kwargs if name in _SETTINGS]
        if taken:
            raise ApiError(
                400,
                f"chat_template_kwargs may not set {', '.join(taken)}.",
                "chat_template_kwargs",
            )
        messages = [message_of(one, place) for place, one in enumerate(asked.messages)]
        tools = None if asked.tool_choice == "none" else asked.tools
        found = self._apply(messages, tools, asked.chat_template_kwargs)
        self._check(found, "messages")
        return found

    def _apply(self, messages: list, tools: list | None, variables: dict[str, Any]) -> list[int]:
        try:
            with self.turn:
                ids = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=True,
                    return_dict=True,
                    **variables,
                ).input_ids
        except Exception as error:  # a template is a program of its own
            raise ApiError(
                400, f"The target's chat template refuses the conversation: {error}", "messages"
            ) from error
        return list(ids)

    def _check(self, ids: list[int], param: str) -> None:
        if not ids:
            raise ApiError(400, "The prompt has no tokens; write something in it.", param)
        unknown = [one for one in ids if not 0 <= one < self.vocabulary]
        if unknown:
            raise ApiError(
                400,
                f"The prompt has the token {unknown[0]}, but the target knows 0 to {self.vocabulary - 1}.",
                param,
            )

    def length(self, prompt: list[int], asked: ChatRequest | CompletionRequest) -> int:
        """Return how many tokens to decode after a prompt at most.

        Raises:
            ApiError: prompt and text do not fit into the context.
        """
        wanted = asked.length
        if wanted is None and isinstance(asked, CompletionRequest):
            wanted = DEFAULT_LENGTH
        if self.context is None:
            return wanted or DEFAULT_LENGTH
        room = self.context - len(prompt)
        if room < 1 or (wanted or 1) > room:
            new = "" if wanted is None else f"; new ones asked for: {wanted:,}"
            raise ApiError(
                400,
                f"Tokens of the prompt: {len(prompt):,}{new}. Prompt and text may have {self.context:,} here.",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        return wanted or room


def message_of(message: dict[str, Any], place: int) -> dict[str, Any]:
    """Return a message as chat templates take it: with a text, and with arguments of calls as objects.

    Args:
        place: its number, for errors.

    Raises:
        ApiError: it has no role that is known, no content, or something else than text in it.
    """
    at = f"messages[{place}]"
    role = message.get("role")
    if role not in ROLES:
        given = "is missing" if role is None else f"is {shown(role)}"
        raise ApiError(
            400, f"{at}.role {given}; it must be one of {', '.join(ROLES)}.", f"{at}.role"
        )
    if role != "assistant" and message.get("content") is None:  # calls of tools have none
        raise ApiError(
            400, f"{at}.content is missing; it must be a text, or a list of parts.", f"{at}.content"
        )
    # What OpenAI's newer models call it.
    found = {**message, "role": "system" if role == "developer" else role}
    found["content"] = _text_of(message.get("content"), f"{at}.content")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ApiError(
                400,
                f"{at}.tool_calls must be a list of calls, which are objects.",
                f"{at}.tool_calls",
            )
        found["tool_calls"] = [_call_of(call) for call in calls]
    return found


def _text_of(content: Any, param: str) -> str:
    """Return the text of a message."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400, f"{param} must be a text, or a list of parts, not {shown(content)}.", param
        )
    return "\n".join(_text_in(part, f"{param}[{place}]") for place, part in enumerate(content))


def _text_in(part: Any, param: str) -> str:
    """Return the text of a part of a message."""
    if not isinstance(part, dict):
        raise ApiError(400, f"{param} must be an object of type text, not {shown(part)}.", param)
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        given = "is missing" if kind is None else f"is {shown(kind)}"
        raise ApiError(
            400, f"{param}.type {given}; only parts of type text are read.", f"{param}.type"
        )
    if not isinstance(text, str):
        raise ApiError(400, f"{param}.text must be a text, not {shown(text)}.", f"{param}.text")
    return text


def _call_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool whose arguments are an object, where they are JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
