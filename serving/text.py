# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Turn tokens into text as they come, and end it at stop strings."""

from typing import Any

from .choices import Choice, Piece, TokenLogprob

CONTEXT = 5
"""Tokens of the prompt that are decoded with the first token, whose spaces may depend on them."""
UNFINISHED = "\ufffd"
"""What stands for bytes that are no character, or not yet."""


class Detokenizer:
    """Decode a text token by token; a character of several tokens comes with the last of them.

    Args:
        prompt: token ids.
        skips_special: whether special tokens are no text.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], skips_special: bool = True):
        self.tokenizer, self.skips_special = tokenizer, skips_special
        self.ids = prompt[-CONTEXT:]
        self.first, self.read = 0, len(self.ids)
        """Tokens before `read` are text already; decoding begins with `first`."""

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self.ids.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self.first, self.read = self.read, len(self.ids)
        return text

    def rest(self) -> str:
        """Return what was not certain; nothing may follow."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self.ids[self.first : self.read])
        return self._decode(self.ids[self.first :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skips_special)


class StopFinder:
    """Find the first of several texts in a stream, and hold back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held, self.found = "", False

    def add(self, text: str) -> str:
        """Return what is certain to stand before any of them."""
        self.held += text
        places = [self.held.find(stop) for stop in self.stops]
        places = [place for place in places if place >= 0]
        self.found = bool(places)
        end = min(places) if self.found else len(self.held) - self._beginning()
        certain = self.held[:end]
        self.held = "" if self.found else self.held[end:]
        return certain

    def _beginning(self) -> int:
        """Return how many characters at the end may begin one of the texts."""
        longest = 0
        for stop in self.stops:
            for size in range(1, min(len(stop), len(self.held) + 1)):
                if self.held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest


class Writer:
    """Turn the tokens of a choice into pieces of its answer, up to where it ends.

    Args:
        ends: token ids that end it.
    """

    def __init__(self, tokenizer: Any, choice: Choice, ends: frozenset[int]):
        self.choice, self.ends = choice, ends
        self.detokenizer = Detokenizer(tokenizer, choice.prompt)
        self.stops = StopFinder(choice.stops)
        self.num_tokens = 0
        self.finish = ""

    def write(self, tokens: list[int], logprobs: list[TokenLogprob]) -> Piece:
        """Return the piece that these tokens add; tokens after the end are dropped."""
        before, text = self.num_tokens, ""
        for token in tokens:
            if not self.finish:
                self.num_tokens += 1
                text += self._text(token)
        added = self.num_tokens - before
        ids = [token for token in tokens[:added] if token not in self.ends]
        return Piece(text, self.finish, added, logprobs[:added], ids=ids)

    def _text(self, token: int) -> str:
        """Return the text that a token adds, and note whether the answer ends with it."""
        if token in self.ends:
            self.finish = "stop"
            return self._rest()
        text = self.stops.add(self.detokenizer.add(token))
        if self.stops.found:
            self.finish = "stop"
        elif self.num_tokens >= self.choice.limit:
            self.finish = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """Return all that was held back."""
        text = self.stops.add(self.detokenizer.rest())
        if self.stops.found:
            self.finish = "stop"
        return text + self.stops.held
