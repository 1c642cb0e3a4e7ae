# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find calls of tools in an answer, by the response template of the target's tokenizer."""

import json
import logging
import uuid
from collections.abc import Callable
from typing import Any

from .text import Detokenizer

logger = logging.getLogger(__name__)
_CALLS = "tool_calls"
_TEXTS = {
    "content": "content",
    "thinking": "reasoning_content",
    "reasoning_content": "reasoning_content",
}
"""Fields of a response template that are text, and what they are called in a message."""


def finds_calls(tokenizer: Any) -> bool:
    """Return whether a tokenizer says how its model writes calls."""
    template = getattr(tokenizer, "response_template", None) or {}
    if _CALLS not in template.get("fields", {}):
        return False
    try:
        tokenizer.get_response_parser(prefix="")
    except ValueError as error:
        logger.warning(
            f"Calls of tools stay text: the tokenizer's response template is wrong: {error}"
        )
        return False
    return True


class CallReader:
    """Read an answer as it comes: its text goes on, its calls are collected.

    Args:
        prompt: token ids.
        tools: that the target may call, as requests name them.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], tools: list[dict[str, Any]]):
        self.detokenizer = Detokenizer(tokenizer, prompt, skips_special=False)
        self.parser = tokenizer.get_response_parser(prefix=prompt, tools=tools)
        self.calls: list[dict[str, Any]] = []
        self.unread = ""
        """Text that may belong to a call that is not whole."""
        self.is_broken = False

    def read(self, ids: list[int], is_last: bool = False) -> dict[str, str]:
        """Return what further tokens add to the texts of the message, by their names.

        What the template cannot read stays text.
        """
        text = "".join(self.detokenizer.add(token) for token in ids)
        text += self.detokenizer.rest() if is_last else ""
        added: dict[str, str] = {}
        for place, character in enumerate(text):
            self.unread += character
            if not self._take(added, self.parser.feed, character):
                self.unread += text[place + 1 :]
                break
        if is_last:
            self._take(added, lambda: self.parser.finalize()[1])
        if self.is_broken:
            added["content"] = added.get("content", "") + self.unread
            self.unread = ""
        return added

    def _take(self, added: dict[str, str], parse: Callable[..., list], *given: str) -> bool:
        """Add the texts of what is parsed, and collect its calls; return False once something cannot be parsed."""
        try:
            events = [] if self.is_broken else parse(*given)
        except (ValueError, KeyError):
            self.is_broken = True
            events = []
        for event in events:
            field = event["field"]
            if event["type"] == "region_close" and field == _CALLS:
                value = event["value"]
                self.calls += map(_call_of, value if isinstance(value, list) else [value])
                self.unread = ""
            elif event["type"] == "region_chunk" and field in _TEXTS:
                name = _TEXTS[field]
                added[name] = added.get(name, "") + event["text"]
                self.unread = self.unread.removeprefix(event["text"])
        return not self.is_broken


def _call_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return a call in OpenAI's form."""
    function = found.get("function", found)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    named = {"name": str(function.get("name", "")), "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": named}
