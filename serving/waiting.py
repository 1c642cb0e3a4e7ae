# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The queue: choices wait in the order in which they came, and those that fit together make a batch."""

import threading
import time
from collections.abc import Sequence
from math import ceil

from .choices import Choice
from .errors import ApiError

PADDING = 64
"""Slots of padding that a row of a batch may have, however short its prompt is."""


class Waiting:
    """Hold the choices that wait, for several threads.

    Args:
        most: choices that may wait. A request that comes while nothing waits may have more.
        batch: rows of a batch at most.
        context: tokens of prompt and text at most; None for any number.
    """

    def __init__(self, most: int, batch: int, context: int | None):
        self.most, self.batch = most, batch
        self.context = context
        self.choices: list[Choice] = []
        self.running: list[Choice] = []
        self.closed = False
        self.changed = threading.Condition()
        self.seconds = 1.0
        """What a batch has taken on average, the last ones most."""
        self.started = 0.0

    @property
    def sizes(self) -> list[int]:
        """How many rows a batch may have."""
        return [2**power for power in range(self.batch.bit_length())]

    def add(self, choices: Sequence[Choice]) -> None:
        """Let these wait.

        Raises:
            ApiError: too many wait, or the server ends.
        """
        with self.changed:
            if self.closed:
                raise ApiError(503, "The server is shutting down.", retry_after=10)
            if self.choices and len(self.choices) + len(choices) > self.most:
                raise ApiError(
                    429,
                    f"{len(self.choices)} answers wait already, of {self.most} that may; try again later.",
                    code="rate_limit_exceeded",
                    retry_after=self._delay(),
                )
            self.choices += choices
            self.changed.notify_all()

    def take(self) -> list[Choice]:
        """Wait for a batch and return it; [] once there will be none."""
        with self.changed:
            self._end_batch()
            while True:
                self.choices = [choice for choice in self.choices if not choice.cancelled]
                if self.choices or self.closed:
                    break
                self.changed.wait()
            self.running = self._batch() if self.choices else []
            self.choices = [choice for choice in self.choices if choice not in self.running]
            self.started = time.monotonic()
            return self.running

    def close(self) -> None:
        """Take no more; what waits is still decoded."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def cancel(self) -> None:
        """End everything as if all clients had left."""
        with self.changed:
            for choice in [*self.choices, *self.running]:
                choice.cancelled = True

    def _batch(self) -> list[Choice]:
        """Return the first choice and those that fit, as many as a power of two.

        So blocks are measured and recorded for few numbers of rows.
        """
        found = self.choices[:1]
        if not found[0].options.alone:
            for choice in self.choices[1:]:
                if len(found) < self.batch and self._fits(choice, found):
                    found.append(choice)
        return found[: 2 ** (len(found).bit_length() - 1)]

    def _fits(self, choice: Choice, others: list[Choice]) -> bool:
        """Tell whether a choice may be a row beside others: equal options, little padding, and none beyond the context.

        Choices that are decoded alone have equal options with nobody who is not.
        """
        if choice.options != others[0].options:
            return False
        rows = [choice, *others]
        lengths = [len(row.prompt) for row in rows]
        if max(lengths) > 2 * min(lengths) + PADDING:
            return False
        longest = max(lengths) + max(row.limit for row in rows)
        return self.context is None or longest <= self.context

    def _end_batch(self) -> None:
        if self.running:
            taken = time.monotonic() - self.started
            self.seconds += (taken - self.seconds) / 4
        self.running = []

    def _delay(self) -> int:
        """Return the seconds after which there may be room."""
        batches = len(self.choices) / self.batch
        return max(1, ceil(batches * self.seconds))
