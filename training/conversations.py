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
from .messages import THOUGHTS, Message
from .reading import BadRow

REFUSED = "refused by the chat template"
PROMPT_CHANGED = "of answers that do not begin where the chat template's prompt ends"
THOUGHT_LACKING = "of answers without the thought that the chat template's prompt opens"
LEFT_OUT = "of answers whose text or calls the chat template leaves out"
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
        answer, reason = _answer(before, after, message)
        if reason:
            reasons[reason] += 1
            continue
        if not documents or not before.startswith(previous):
            documents.append([])
            previous = ""
        documents[-1] += [Segment(before[len(previous) :]), _segment(answer, message)]
        previous = before + answer
    return documents, reasons


def _answer(before: str, after: str, message: Message) -> tuple[str, str]:
    """Return the text of an answer as the target gives it behind its prompt, and why it cannot be found, or ''.

    Args:
        before: the prompt.
        after: the same conversation with the answer.
    """
    content = message.fields.get("content", "")
    tag = _OPENED.search(before)
    if after.startswith(before):
        answer = after[len(before) :]
        return answer, "" if _holds(answer, message) else LEFT_OUT
    if tag is None or not after.startswith(before[: tag.start()]):
        return "", PROMPT_CHANGED
    # The template drops the thought from an answer, but its prompt opens one.
    closing = f"</{tag[1]}>"
    thought = message.fields.get(THOUGHTS[0])
    if closing not in content and thought:
        content = f"{thought.strip()}\n{closing}\n\n{content}"
    answer = content.rpartition(closing)[2].strip()
    found = after.rfind(answer)
    if closing not in content:
        return "", THOUGHT_LACKING
    if not answer or found < tag.start():
        return "", PROMPT_CHANGED
    return _behind(tag, content) + after[found + len(answer) :], ""


def _holds(answer: str, message: Message) -> bool:
    """Return whether a rendered answer holds the content, but for a thought in it, and the calls."""
    text = message.fields.get("content", "").rpartition("</think>")[2].strip()
    calls = [call.get("function", call) for call in message.fields.get("tool_calls", [])]
    names = [str(call["name"]) for call in calls if "name" in call]
    return text in answer and all(name in answer for name in names)


def _behind(tag: re.Match[str], content: str) -> str:
    """Return a content without the tag and the space that the prompt ends with already."""
    opened = content.lstrip()
    if not opened.startswith(f"<{tag[1]}>"):
        return content.rstrip()
    rest = opened[len(tag[1]) + 2 :]
    return rest.removeprefix(tag[2]).rstrip()


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
