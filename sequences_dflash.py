# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Hold the sequences of a batch: the prompt, committed tokens, stop conditions, streaming.

This file travels with every pushed draft. Everything is counted by slot, never by the value of a token. One that
happens to be the mask or the padding token is a token like any other.

Shapes: B rows, P prompt slots, Q block positions, T slots so far, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .compat_dflash import cache_in, made_by_user, without_cache

PREFILL_CHUNK = 2048
"""Prompt slots that go through the target at once."""

UNLIMITED = 2**62
"""A length that no text reaches."""

# On the CPU, for time limits, which do not look at it.
_ANY_TEXT = torch.zeros(1, 1, dtype=torch.long, device="cpu")


class Prompt:
    """Hold a prompt laid out by slot, with what `generate` prepared for the target.

    Args:
        input_ids `[B, P]`: the prompt, or the part of it that follows what the cache holds.
        inputs: everything else that `generate` would hand to the target's forward.
        returns_cache: whether `generate` returns its cache.
        layer_outputs: what every forward is asked for, see `target_dflash`.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        inputs: dict[str, Any],
        returns_cache: bool | None = False,
        layer_outputs: tuple[str, ...] = (),
    ):
        self.input_ids, self.device = input_ids, input_ids.device
        self.returns_cache = bool(returns_cache)
        self.layer_outputs = layer_outputs
        # `generate` asks for the logits of the last position; a check of the prompt needs more.
        ours = {"logits_to_keep", "output_hidden_states", "output_attentions"}
        self.inputs = {
            name: value
            for name, value in without_cache(inputs).items()
            if value is not None and name not in ours
        }
        self.cache = cache_in(inputs)
        mask = self.inputs.get("attention_mask")
        positions = self.inputs.get("position_ids")
        embeds = self.inputs.get("inputs_embeds")  # [B, P, D]
        num_new = input_ids.shape[1] if embeds is None else embeds.shape[1]
        lengths = [tensor.shape[-1] for tensor in (mask, positions) if tensor is not None]
        self.width = max([num_new, *lengths])
        """Slots of the prompt, those that the cache holds included."""
        self.num_cached = self.width - num_new
        """Slots before the first new token, where the cache holds what follows."""
        self.first_id_slot = self.width - input_ids.shape[1]
        """Slot of the first of `input_ids`. Without ids, in a prompt of embeddings, that of the first new token."""
        shape = (input_ids.shape[0], self.width)
        padding = (
            torch.zeros(shape, dtype=torch.bool, device=self.device) if mask is None else mask == 0
        )
        self.padding_mask = padding  # [B, P or more], True at padding
        if positions is None:
            positions = ((~padding).long().cumsum(-1) - 1).clamp_min(0)
        self.positions = positions.expand(*positions.shape[:-2], *shape)  # [B, P] or [3, B, P]

    @property
    def cache_is_wanted(self) -> bool:
        """Whether anybody will look at the cache that `generate` came with."""
        return self.cache is not None and (
            self.returns_cache or made_by_user(self.cache, unmarked=True)
        )

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is text and nothing else."""
        return not set(self.inputs) - {"attention_mask", "position_ids", "use_cache"}

    @property
    def position_offset(self) -> torch.Tensor:
        """Position minus slot, for the slots after the prompt: `[B, 1]` or `[3, B, 1]`."""
        return self.positions[..., -1:] - (self.width - 1)

    def chunks(self, first: int, recurrent: bool) -> list[tuple[int, int]]:
        """Return the first and last slot of each part that goes through the target at once, from slot `first` on.

        A prompt with more than text in it is one part, and so is padding that a recurrent target must be shown. So is
        one whose hidden states or attentions are returned.
        """
        if self.layer_outputs:
            return [(first, self.width)]
        if first == 0 and (not self.is_plain or (recurrent and bool(self.padding_mask.any()))):
            return [(0, self.width)]
        starts = range(first, self.width, PREFILL_CHUNK)
        return [(start, min(start + PREFILL_CHUNK, self.width)) for start in starts]

    def ids(self, first: int, last: int) -> torch.Tensor:
        """Return the ids of these slots, `[B, last - first]`."""
        first, last = first - self.num_cached, last - self.num_cached
        return self.input_ids[:, first:last]

    def model_inputs(self, model: Any, last: int) -> dict[str, Any]:
        """Return what the target's forward takes for the slots before `last`, as plain `generate` prepares it."""
        inputs = dict(self.inputs)
        for name in ("attention_mask", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][..., :last]
        return model.prepare_inputs_for_generation(
            self.ids(0, last), is_first_iteration=True, **inputs
        )


@dataclass
class StopConditions:
    """Say when a row ends."""

    max_length: int = UNLIMITED
    """Slots at most, the prompt's included."""
    token_ids: frozenset[int] = frozenset()
    pads_ended_rows: bool = False
    """Whether rows that have ended are padded. Without end tokens `generate` extends every row until all have ended."""
    time_limits: list[MaxTimeCriteria] = field(default_factory=list)
    stop_strings: list[StopStringCriteria] = field(default_factory=list)
    are_all: bool = True
    """Whether nothing else ends a text; False where criteria are called step by step."""

    @classmethod
    def from_criteria(cls, criteria: StoppingCriteriaList) -> "StopConditions":
        """Sort the criteria that `generate` prepared; `is_pure_criterion` holds for each."""
        lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
        ends = [one for one in criteria if isinstance(one, EosTokenCriteria)]
        time_limits = [one for one in criteria if isinstance(one, MaxTimeCriteria)]
        stop_strings = [one for one in criteria if isinstance(one, StopStringCriteria)]
        ids = frozenset(token for one in ends for token in one.eos_token_id.flatten().tolist())
        pads_ended_rows = any(hasattr(one, "eos_token_id") for one in criteria)
        return cls(min(lengths, default=UNLIMITED), ids, pads_ended_rows, time_limits, stop_strings)

    @property
    def is_length_alone(self) -> bool:
        """Whether nothing but the length ends a text."""
        return self.are_all and not (self.token_ids or self.stop_strings or self.time_limits)


def is_pure_criterion(criterion: Any) -> bool:
    """Tell whether a criterion is transformers' own and a function of the text, or of time. A subclass is neither."""
    pure = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria)
    return type(criterion) in pure


class Sequences:
    """Hold the sequences of B rows, prompt included.

    Args:
        input_ids `[B, P]`: the prompt.
        pad_token_id: what stands after the end of a row that ended before others.
        streamer: gets the tokens of every slot once, in order, as soon as all rows have theirs.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stop_conditions: StopConditions,
        pad_token_id: int = 0,
        streamer: Any = None,
    ):
        self.prompt, self.stop_conditions = input_ids, stop_conditions
        self.pad_token_id, self.streamer = pad_token_id, streamer
        rows = input_ids.shape[0]
        self.generated: list[list[int]] = [[] for _ in range(rows)]
        self.end_lengths: list[int | None] = [None] * len(self.generated)
        """How many tokens a row had generated when it ended."""
        self.num_streamed = 0
        self.row_ended = False
        """Whether the last `append_tokens` ended a row."""
        # [B, T or more], for those who read whole texts; grows when they do.
        self.buffer = input_ids.clone()
        self.num_copied = [0] * len(self.generated)
        """Generated tokens of each row that the buffer holds."""

    @property
    def finished(self) -> bool:
        return not any(self.active)

    @property
    def active(self) -> list[bool]:
        """Which rows still need tokens."""
        budget = self.stop_conditions.max_length - self.prompt.shape[1]
        if all(end is not None for end in self.end_lengths):
            budget = min(budget, max((end or 0 for end in self.end_lengths), default=0))
        return [
            end is None or (not self.stop_conditions.pads_ended_rows and len(tokens) < budget)
            for end, tokens in zip(self.end_lengths, self.generated, strict=True)
        ]

    def append_tokens(self, tokens: list[list[int]]) -> list[int]:
        """Make these tokens final, each row's up to where it ends.

        Returns:
            For each row, how many of them are part of its text.
        """
        overtime = any(
            bool(limit(_ANY_TEXT, None).any()) for limit in self.stop_conditions.time_limits
        )
        before = self.active
        counts = []
        for row, row_tokens in enumerate(tokens):
            count = self._append_row(row, row_tokens, overtime) if before[row] else 0
            counts.append(count)
        self.row_ended = self.active != before
        self._stream()
        return counts

    def _append_row(self, row: int, tokens: list[int], overtime: bool) -> int:
        generated, count = self.generated[row], 0
        for token in tokens:
            if len(generated) >= self.stop_conditions.max_length - self.prompt.shape[1]:
                break
            generated.append(token)
            count += 1
            if self.end_lengths[row] is None and (overtime or self._ends_with(row, token)):
                self.end_lengths[row] = len(generated)
                if self.stop_conditions.pads_ended_rows or overtime:
                    break
        return count

    def _ends_with(self, row: int, token: int) -> bool:
        """Tell whether this row ends with `token`, its last."""
        length = self.prompt.shape[1] + len(self.generated[row])
        ended = length >= self.stop_conditions.max_length or token in self.stop_conditions.token_ids
        if ended or not self.stop_conditions.stop_strings:
            return ended
        text = self.text(row)[None]
        return any(bool(one(text, None).all()) for one in self.stop_conditions.stop_strings)

    def end(self) -> None:
        """End every row where it is."""
        self.end_lengths = [len(tokens) for tokens in self.generated]
        self.row_ended = True

    def end_row(self, row: int) -> None:
        """End one row where it is; without end tokens it goes on, with tokens that are not part of its text."""
        if self.end_lengths[row] is None:
            self.end_lengths[row] = len(self.generated[row])
            self.row_ended = True

    def text(self, row: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the ids of a row up to its last token, `[T]`; with `tokens [N]` after it, `[T + N]`.

        They are a view of the buffer, valid until the next call.
        """
        length = self.prompt.shape[1] + len(self.generated[row])
        more = 0 if tokens is None else len(tokens)
        if length + more > self.buffer.shape[1]:
            self.buffer = pad(self.buffer, (0, length + more))
        new = self.generated[row][self.num_copied[row] :]
        if new:
            self.buffer[row, length - len(new) : length] = torch.tensor(
                new, device=self.buffer.device
            )
            self.num_copied[row] = len(self.generated[row])
        if tokens is not None:
            self.buffer[row, length : length + more] = tokens
        return self.buffer[row, : length + more]

    def chain_prefixes(self, tokens: torch.Tensor) -> list[list[torch.Tensor]]:
        """Return, for each row and position of a chain, the ids `[T]` up to and with that position.

        After the text 5, 6 and for the block 6, 7, 8 these are [5, 6], [5, 6, 7] and [5, 6, 7, 8].

        Args:
            tokens `[B, Q]`: the chain; its first token is the last of the text.
        """
        size, prefixes = tokens.shape[1], []
        for row in range(len(self.generated)):
            line = self.text(row, tokens[row, 1:])
            first = len(line) - size + 1
            prefixes.append([line[: first + position] for position in range(size)])
        return prefixes

    def tree_prefixes(
        self, tokens: torch.Tensor, paths: list[list[list[int]]]
    ) -> list[list[torch.Tensor]]:
        """Return, for each row and position of a tree, the ids `[T]` up to and with that position.

        Args:
            tokens `[B, Q]`: the tree; its root is the last token of the text.
            paths: for each row and position, the positions from the root to it.
        """
        prefixes = []
        for row, row_paths in enumerate(paths):
            text = self.text(row)
            row_prefixes = []
            for path in row_paths:
                drafted = tokens[row, path[1:]]
                row_prefixes.append(torch.cat([text, drafted]))
            prefixes.append(row_prefixes)
        return prefixes

    def _stream(self) -> None:
        """Hand the streamer every slot that all rows have filled by now."""
        if self.streamer is None:
            return
        growing = [
            len(tokens)
            for tokens, active in zip(self.generated, self.active, strict=True)
            if active
        ]
        filled = min(growing, default=self.longest)
        while self.num_streamed < filled:
            slot = torch.full((len(self.generated),), self.pad_token_id, device="cpu")
            for row, tokens in enumerate(self.generated):
                if self.num_streamed < len(tokens):
                    slot[row] = tokens[self.num_streamed]
            self.streamer.put(slot)
            self.num_streamed += 1

    @property
    def longest(self) -> int:
        """Generated tokens of the row that went on longest."""
        longest = 0
        for end, tokens in zip(self.end_lengths, self.generated, strict=True):
            longest = max(longest, len(tokens) if end is None else end)
        return longest

    def output_ids(self) -> torch.Tensor:
        """Return prompts and generated tokens, padded after the end of a row: `[B, T]`."""
        longest, rows = self.longest, []
        for tokens in self.generated:
            padding = [self.pad_token_id] * (longest - len(tokens))
            rows.append((tokens + padding)[:longest])
        generated = torch.tensor(rows, dtype=torch.long, device=self.prompt.device).view(
            len(rows), longest
        )
        return torch.cat([self.prompt, generated], dim=1)
