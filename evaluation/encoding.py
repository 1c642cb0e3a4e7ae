# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Turn prompts into tokens: chat template, thinking, and a fixed length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .prompts import Prompt


@dataclass(frozen=True)
class Encoding:
    """Say how prompts become tokens.

    Args:
        tokenizer: the target's.
        chat_template: whether to apply the chat template.
        thinking: what the template gets as `enable_thinking`; None to pass nothing.
    """

    tokenizer: Any
    chat_template: bool
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "The target's tokenizer has no chat template. Pass --no-chat-template to take prompts as they are."
            )
        if self.thinking is not None and not self.chat_template:
            raise ValueError(
                "thinking is a word of the chat template; it has no meaning with --no-chat-template."
            )

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            ValueError: it is a conversation, and there is no chat template to apply; or it has no token.
        """
        if self.chat_template:
            ids = self._of_template(prompt)
        elif prompt.text is None:
            raise ValueError(
                f"The prompt {prompt.id} has messages, which need the chat template; pass --chat-template."
            )
        else:
            ids = self.tokenizer(prompt.text).input_ids
        if not ids:
            raise ValueError(f"The prompt {prompt.id} has no tokens.")
        return list(ids)

    def _of_template(self, prompt: Prompt) -> list[int]:
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return self.tokenizer.apply_chat_template(
            prompt.conversation, add_generation_prompt=True, return_dict=True, **options
        ).input_ids


def of_length(rows: Sequence[list[int]], length: int, first: int | None) -> list[list[int]]:
    """Return every row with exactly `length` tokens: cut at its front, or after tokens of the rows that follow it.

    Args:
        first: the token that begins every text and stays in front; None without one.
    """
    found = []
    for number, row in enumerate(rows):
        front = row[:1] if row[0] == first else []
        wanted, text = length - len(front), row[len(front) :]
        following = number
        while len(text) < wanted:
            following += 1
            text = rows[following % len(rows)] + text
        found.append(front + text[len(text) - max(wanted, 0) :])
    return found
