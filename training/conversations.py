# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Render conversations by the target's chat template, so that each answer stands behind its prompt of inference."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from .formats import Conversation
from .messages import Message
from .reading import BadRow

REFUSED = "refused by the chat template"
PROMPT_CHANGED = "of answers that do not begin where the chat template's prompt ends"
THOUGHT_LACKING = "of answers without the thought that the chat template's prompt opens"
_OPENED = re.compile(r"<([^<>/\s]+)>(\s*)$")
"""A tag at the end of a prompt, as in `<think>`, and the space after it."""


@dataclass(frozen=True)
class Segment:
    """Hold a stretch of text.

    Args:
        is_answer: whether it is learnt from.
        masked: its characters that are not learnt from all the same: start and end.
    """

    text: str
    is_answer: bool = False
    masked: list[tuple[int, int]] = field(default_factory=list)


Render = Callable[[list[dict[str, Any]], bool], str]
"""Renders messages, with or without the prompt for an answer."""


def renderer(tokenizer: Any, conversation: Conversation) -> Render:
    """Return the function that renders messages by the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The target's tokenizer has no chat template, which conversations need. Set tokenizer.chat_template to the "
            "one that the target is used with, or pass plain text: 'text', or 'prompt' and 'completion'."
        )

    def render(messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **conversation.options,
        )

    return render


def documents_of(
    messages: list[Message], render: Render
) -> tuple[list[list[Segment]], Counter[str]]:
    """Return the documents of a conversation, and why answers are left out.

    Each answer is trained with the exact prompt used at inference. Some templates change earlier turns later (Qwen3
    removes their thinking). Then the later answer starts a document of its own.

    Example: for the messages u1 a1 u2 a2, a template that changes nothing gives one document, with the segments u1, a1,
    u2 and a2. A template that shortens a1 to s1 later gives two: u1, a1 and (u1 s1 u2), a2.
    """
    documents: list[list[Segment]] = []
    reasons: Counter[str] = Counter()
    previous = ""  # the text of the last document
    fields = [message.fields for message in messages]
    for index, message in enumerate(messages):
        if not message.learnt:
            continue
        try:
            before, after = render(fields[:index], True), render(fields[: index + 1], False)
        except (TemplateError, ValueError, TypeError) as error:
            reasons[f"{REFUSED} ({str(error)[:80]})"] += 1
            continue
        answer = _answer(before, after, message)
        if answer is None:
            reasons[_why_not(before, message)] += 1
            continue
        if not documents or not before.startswith(previous):
            documents.append([])
            previous = ""
        documents[-1] += [Segment(before[len(previous) :]), _segment(answer, message)]
        previous = before + answer
    return documents, reasons


def _answer(before: str, after: str, message: Message) -> str | None:
    """Return the text of an answer as the target gives it behind its prompt, or None if the data do not tell it.

    Args:
        before: the prompt.
        after: the same conversation with the answer.
    """
    if after.startswith(before):
        return after[len(before) :]
    tag = _OPENED.search(before)
    content = message.fields.get("content", "")
    if tag is None or not after.startswith(before[: tag.start()]) or _closing(tag) not in content:
        return None
    # The template drops the thought from an answer, but its prompt opens one.
    said = content.rpartition(_closing(tag))[2].strip()
    found = after.rfind(said)
    if not said or found < tag.start():
        return None
    return _behind(tag, content) + after[found + len(said) :]


def _closing(tag: re.Match[str]) -> str:
    return f"</{tag[1]}>"


def _behind(tag: re.Match[str], content: str) -> str:
    """Return a content without the tag and the space that the prompt ends with already."""
    opened = content.lstrip()
    if not opened.startswith(f"<{tag[1]}>"):
        return content.rstrip()
    rest = opened[len(tag[1]) + 2 :]
    return rest.removeprefix(tag[2]).rstrip()


def _why_not(before: str, message: Message) -> str:
    """Return why an answer cannot be put behind its prompt."""
    tag = _OPENED.search(before)
    lacks = tag is not None and _closing(tag) not in message.fields.get("content", "")
    return THOUGHT_LACKING if lacks else PROMPT_CHANGED


def _segment(answer: str, message: Message) -> Segment:
    """Return the segment of an answer, with what of it is not learnt from."""
    masked = []
    for key, start, end in message.masked:
        text = message.fields[key]
        at = answer.find(text) if key != "content" else answer.rfind(text)
        if at < 0:
            raise BadRow(
                f"The chat template changes the {key} {text[:40]!r}, parts of which are not to be trained on. Leave "
                "those parts out, or set train for the whole message."
            )
        masked.append((at + start, at + end))
    return Segment(answer, True, masked)
