# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The texts of a batch while they grow: what is committed, when each row ends, who is told.

This file travels with every pushed draft. Everything is counted by column, never by the value of a token: a token that
happens to be the mask or the padding token is a token like any other.

Shapes: B rows, P prompt columns, T columns so far, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from .compat_dflash import cache_in, made_by_user, without_cache

PREFILL_CHUNK = 2048
"""Prompt columns that go through the target at once."""


_ANY = torch.zeros(1, 1, dtype=torch.long)  # a text on the CPU, for clocks, which do not look at it


class Prompt:
    """A prompt laid out by column, with what `generate` prepared for the target.

    Args:
        input_ids `[B, P]`: the prompt, or the part of it that follows what the cache holds.
        inputs: everything else that `generate` would hand to the target's forward.
        returned: whether `generate` returns its cache.
    """

    def __init__(self, input_ids: torch.Tensor, inputs: dict[str, Any], returned: bool | None = False):
        self.input_ids, self.device, self.returned = input_ids, input_ids.device, bool(returned)
        self.inputs = {name: value for name, value in without_cache(inputs).items() if value is not None}
        self.cache = cache_in(inputs)
        mask, positions = self.inputs.get("attention_mask"), self.inputs.get("position_ids")
        known = [tensor.shape[-1] for tensor in (input_ids, mask, positions) if tensor is not None]
        self.width = max(known)
        """Columns of the prompt, those that the cache holds included."""
        self.before = self.width - input_ids.shape[1]
        """Columns before the first of `input_ids`, where the cache holds what they follow."""
        shape = (input_ids.shape[0], self.width)
        hidden = torch.zeros(shape, dtype=torch.bool, device=self.device) if mask is None else mask == 0
        self.hidden = hidden  # [B, P or more], True where padded
        if positions is None:
            positions = ((~hidden).long().cumsum(-1) - 1).clamp_min(0)
        self.positions = positions.expand(*positions.shape[:-2], *shape)  # [B, P] or [3, B, P]

    @property
    def cache_is_kept(self) -> bool:
        """Whether anybody will look at the cache that `generate` came with."""
        return self.cache is not None and (self.returned or made_by_user(self.cache, unmarked=True))

    @property
    def plain(self) -> bool:
        """Whether it is text and nothing else."""
        return not set(self.inputs) - {"attention_mask", "position_ids", "use_cache"}

    def chunks(self, done: int, recurrent: bool) -> list[tuple[int, int]]:
        """First and last column of each part that goes through the target at once, after `done` columns.

        A prompt with more than text in it, or with padding that a recurrent target must be shown, is one part.
        """
        if done == 0 and (not self.plain or (recurrent and bool(self.hidden.any()))):
            return [(0, self.width)]
        firsts = range(done, self.width, PREFILL_CHUNK)
        return [(first, min(first + PREFILL_CHUNK, self.width)) for first in firsts]

    def ids(self, first: int, last: int) -> torch.Tensor:
        """`[B, last - first]` ids."""
        return self.input_ids[:, first - self.before : last - self.before]

    def model_inputs(self, model: Any, last: int) -> dict[str, Any]:
        """What the target's forward takes for the columns before `last`, as plain `generate` prepares it."""
        inputs = dict(self.inputs)
        for name in ("attention_mask", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][..., :last]
        return model.prepare_inputs_for_generation(self.ids(0, last), is_first_iteration=True, **inputs)

    @property
    def end(self) -> torch.Tensor:
        """`[B, 1]` or `[3, B, 1]`: position minus column, for the columns after the prompt."""
        return self.positions[..., -1:] - (self.width - 1)


@dataclass
class Stops:
    """When a row ends."""

    max_length: int
    """Columns at most, the prompt's included."""
    token_ids: frozenset[int] = frozenset()
    has_eos: bool = False
    """Whether rows that have ended are padded; without end tokens they go on until every row has ended."""
    clocks: list[MaxTimeCriteria] = field(default_factory=list)
    others: list[StoppingCriteria] = field(default_factory=list)

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> "Stops":
        """Sort out what `generate` prepared."""
        lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
        ends = [one for one in criteria if isinstance(one, EosTokenCriteria)]
        clocks = [one for one in criteria if isinstance(one, MaxTimeCriteria)]
        others = [
            one for one in criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria | MaxTimeCriteria)
        ]
        ids = frozenset(token for one in ends for token in one.eos_token_id.flatten().tolist())
        has_eos = any(hasattr(one, "eos_token_id") for one in criteria)
        return cls(min(lengths, default=2**62), ids, has_eos, clocks, others)


class Texts:
    """The texts of B rows, prompt included.

    Args:
        input_ids `[B, P]`: the prompt.
        pad: what stands after the end of a row that ended before others.
        streamer: told every column once, in order, as soon as all rows have it.
    """

    def __init__(self, input_ids: torch.Tensor, stops: Stops, pad: int = 0, streamer: Any = None):
        self.prompt, self.stops, self.pad, self.streamer = input_ids, stops, pad, streamer
        self.new: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        self.ends: list[int | None] = [None] * len(self.new)
        """How many new tokens a row had when it ended."""
        self.told = 0
        self.changed = False
        """Whether the last commit ended a row."""
        self.ids = input_ids.clone()  # [B, T or more], for those who read whole texts; grows when they do
        self.written = [0] * len(self.new)

    @property
    def finished(self) -> bool:
        return not any(self.active)

    @property
    def active(self) -> list[bool]:
        """Which rows still need tokens."""
        ended = all(end is not None for end in self.ends)
        wanted = max((end or 0 for end in self.ends), default=0) if ended else 2**62
        wanted = min(wanted, self.stops.max_length - self.prompt.shape[1])
        return [
            end is None or (not self.stops.has_eos and len(new) < wanted)
            for end, new in zip(self.ends, self.new, strict=True)
        ]

    def commit(self, tokens: list[list[int]]) -> list[int]:
        """Make these tokens final, each row's up to where it ends; how many were, row by row."""
        overtime = any(bool(clock(_ANY, None).any()) for clock in self.stops.clocks)
        before = self.active
        counts = [
            self._commit(row, given, overtime) if active else 0
            for row, (given, active) in enumerate(zip(tokens, before, strict=True))
        ]
        self.changed = self.active != before
        self._tell()
        return counts

    def _commit(self, row: int, tokens: list[int], overtime: bool) -> int:
        new, count = self.new[row], 0
        for token in tokens:
            if len(new) >= self.stops.max_length - self.prompt.shape[1]:
                break
            new.append(token)
            count += 1
            if self.ends[row] is None and (overtime or self._ends(row, token)):
                self.ends[row] = len(new)
                if self.stops.has_eos or overtime:
                    break
        return count

    def _ends(self, row: int, token: int) -> bool:
        """Whether this row ends with the token it was just given."""
        length = self.prompt.shape[1] + len(self.new[row])
        ended = length >= self.stops.max_length or token in self.stops.token_ids
        if not self.stops.others:
            return ended
        text = self.text(row)[None]
        return ended or any(bool(one(text, None).all()) for one in self.stops.others)

    def text(self, row: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """`[T]`: the ids of a row up to its last token; with `tokens [N]` after it, `[T + N]`."""
        length = self.prompt.shape[1] + len(self.new[row])
        more = 0 if tokens is None else len(tokens)
        if length + more > self.ids.shape[1]:
            self.ids = pad(self.ids, (0, length + more))
        new = self.new[row][self.written[row] :]
        if new:
            self.ids[row, length - len(new) : length] = torch.tensor(new, device=self.ids.device)
            self.written[row] = len(self.new[row])
        if tokens is not None:
            self.ids[row, length : length + more] = tokens
        return self.ids[row, : length + more]

    def prefixes(self, tokens: torch.Tensor, ways: list[list[int]]) -> list[list[torch.Tensor]]:
        """For each row and each position of a block, the ids `[T]` up to and with that position.

        Args:
            tokens `[B, Q]`: the block; its first token is the last of the text.
            ways: for each position, the positions from the first to it.
        """
        if ways[-1] == list(range(len(ways))):  # a chain: one text, and its beginnings
            lines = [self.text(row, tokens[row, 1:]) for row in range(len(self.new))]
            return [[line[: len(line) - len(ways) + 1 + position] for position in range(len(ways))] for line in lines]
        return [[torch.cat([self.text(row), tokens[row, way[1:]]]) for way in ways] for row in range(len(self.new))]

    def _tell(self) -> None:
        """Hand the streamer every column that all rows have by now."""
        if self.streamer is None:
            return
        known = min((len(new) for new, on in zip(self.new, self.active, strict=True) if on), default=self.longest)
        while self.told < known:
            column = [new[self.told] if self.told < len(new) else self.pad for new in self.new]
            self.streamer.put(torch.tensor(column))
            self.told += 1

    @property
    def longest(self) -> int:
        """New tokens of the row that went on longest."""
        ends = [len(new) if end is None else end for end, new in zip(self.ends, self.new, strict=True)]
        return max(ends, default=0)

    def sequences(self) -> torch.Tensor:
        """`[B, T]`: prompts and new tokens, padded after the end of a row."""
        longest = self.longest
        rows = [(new + [self.pad] * (longest - len(new)))[:longest] for new in self.new]
        new = torch.tensor(rows, dtype=self.prompt.dtype, device=self.prompt.device).view(len(rows), longest)
        return torch.cat([self.prompt, new], dim=1)
