# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keys and values at fixed columns, so that a rejected token is simply overwritten.

This file travels with every pushed draft. The prompt's columns are those of `input_ids`, padding included; every new
token takes the next column of its own row. Nothing is concatenated or cropped: where each row stands is the only state
that moves, and a block is written over the columns of the block before it. Buffers grow in buckets.

Shapes: B rows, N new positions, Q block positions, S columns of a buffer, L columns that attention reads (L <= S),
H key and value heads, D head dim, G query heads per key head.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer

from .compat_dflash import difference

BUCKET = 256
"""Buffers and reads are rounded up to this many columns, or to an eighth of what is there once that is more."""


def bucket(columns: int) -> int:
    """The smallest size of a buffer, or of what is read of it, that holds this many columns."""
    step = max(BUCKET, 1 << max(columns.bit_length() - 4, 0))
    return -(-columns // step) * step


class ColumnLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, S, H, D]` each; every column is kept, also where the layer slides."""

    def __init__(self, cache: "ColumnCache", is_sliding: bool = False):
        super().__init__()
        self.cache, self.is_sliding = cache, is_sliding
        self.written = 0
        """How many columns the last forward wrote; 0 again once somebody has looked."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers for the shapes of `key_states, value_states [B, H, N, D]`; those two may differ in D."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(states.shape[0], self.cache.capacity, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[B, H, N, D]` where the cache says; what attention then reads, `[B, H, L, D]`.

        Without columns from the cache, this is the beginning of a text: attention reads what was just computed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.writes is None:
            self.fill(0, key_states, value_states)
            return key_states, value_states
        begin = 0
        for rows in self.cache.writes:  # in order: a later part may overwrite what an earlier one wrote
            end = begin + rows.numel() // key_states.shape[0]
            write(self.keys, rows, key_states[:, :, begin:end])
            write(self.values, rows, value_states[:, :, begin:end])
            begin = end
        self._count(begin)
        length = self.cache.length
        return self.keys[:, :length].transpose(1, 2), self.values[:, :length].transpose(1, 2)

    def fill(self, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write `[B, H, N, D]` to the columns from `start` on, the same in every row."""
        end = start + key_states.shape[2]
        self.keys[:, start:end] = key_states.transpose(1, 2)
        self.values[:, start:end] = value_states.transpose(1, 2)
        self._count(end - start)

    def _count(self, columns: int) -> None:
        if not torch.compiler.is_compiling():
            self.written = columns

    def grow(self, capacity: int) -> None:
        """Room for `capacity` columns."""
        if self.is_initialized:
            self.keys, self.values = (
                torch.cat([old, old.new_zeros(old.shape[0], capacity - old.shape[1], *old.shape[2:])], dim=1)
                for old in (self.keys, self.values)
            )

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy the flat columns `source [M]` to `destination [M]`; both are read before anything is written."""
        for states in (self.keys, self.values):
            flat = states.flatten(0, 1)
            flat.index_copy_(0, destination.to(flat.device), flat[source.to(flat.device)])

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class HybridColumnLayer(LinearAttentionLayer, ColumnLayer):
    """Keys and values by column, and recurrent state, of a layer that has both."""

    def __init__(self, cache: "ColumnCache", is_sliding: bool, number_of_states: int):
        ColumnLayer.__init__(self, cache, is_sliding)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """By position, keys and values; by name, states: as transformers' own layers of both kinds."""
        (ColumnLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        return -1


def write(states: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
    """`new [B, H, N, D]` into `states [B, S, H, D]` at the flat columns `rows [B * N]`."""
    states.flatten(0, 1).index_copy_(0, rows.to(states.device), new.transpose(1, 2).flatten(0, 1))


class ColumnCache(Cache):
    """The buffers of every layer of a model, and where the next forward writes and reads.

    Args:
        template: a fresh `DynamicCache` of the model's config; layers without keys and values are kept as they are.
    """

    def __init__(self, template: DynamicCache):
        super().__init__(layers=[self._layer(layer) for layer in template.layers])
        self.capacity = 0
        self.length = 0
        """Columns that a forward reads."""
        self.seen = 0
        """Columns written by whole forwards, for models that count positions themselves."""
        self.writes: list[torch.Tensor] | None = None
        """Flat columns `[B * N]` of each part of the next forward's keys; None at the beginning of a text."""

    def _layer(self, layer: Any) -> Any:
        if not isinstance(layer, CacheLayerMixin):
            return layer
        if isinstance(layer, LinearAttentionLayer):
            return HybridColumnLayer(self, layer.is_sliding, layer.number_of_states)
        return ColumnLayer(self, layer.is_sliding)

    def reserve(self, columns: int) -> None:
        """Let the next forward write and read up to this many columns."""
        self.length = bucket(columns)
        if self.length > self.capacity:
            self.capacity = self.length
            for layer in self.attention:
                layer.grow(self.capacity)

    @property
    def attention(self) -> list[ColumnLayer]:
        return [layer for layer in self.layers if isinstance(layer, ColumnLayer)]

    def write_at(self, *columns: torch.Tensor) -> None:
        """The next forward writes its keys, part by part, to these columns, `[B, N]` each."""
        self.writes = [self.flat(part) for part in columns]

    def flat(self, columns: torch.Tensor) -> torch.Tensor:
        """`columns [B, N]` as rows of the flattened buffers, `[B * N]`."""
        if columns.shape[0] == 1:
            return columns[0]
        offsets = torch.arange(columns.shape[0], device=columns.device)[:, None] * self.capacity
        return (columns + offsets).flatten()

    def check_written(self, columns: int, whose: str) -> None:
        """Refuse to go on where the last forward did not write `columns` columns into every layer.

        Raises:
            ValueError: naming the first such layer.
        """
        for index, layer in enumerate(self.layers):
            if isinstance(layer, ColumnLayer):
                written, layer.written = layer.written, 0
                if written != columns:
                    raise difference(f"Layer {index} of {whose} cached {written} of {columns} positions")

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy columns `source [B, M]` to `destination [B, M]` in every layer."""
        for layer in self.attention:
            layer.move(self.flat(source), self.flat(destination))


class Masks:
    """Which columns each position of a block sees, as additive masks that are kept, and corrected as rows move on.

    Between two cycles a row moves by at most one block, so a mask differs from the last one only in the columns near
    the block and, where a window slides, near the window's far end: those alone are written again.

    Args:
        hidden `[B, S]`: columns of the prompt that nothing but themselves may see (padding), True where hidden.
        size: of the block, at first a chain; `move` makes it any tree of that size.
    """

    def __init__(self, hidden: torch.Tensor, start: torch.Tensor, size: int):
        self.hidden, self.start, self.size = hidden, start, size
        self.chain = self.ancestors = chain(size, start.device)
        self.depth = self.ancestors.sum(-1) - 1  # [Q]
        self.steps = torch.arange(size, device=start.device)  # [Q]
        self.near = torch.arange(-size, size, device=start.device)
        self.kept: dict[tuple, torch.Tensor] = {}

    def get(
        self, window: int | None, causal: bool, groups: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """`[B, 1, groups * Q, S]`, 0 where visible and -inf elsewhere."""
        kind = (window, causal, groups, dtype, device)
        if kind not in self.kept:
            everything = torch.arange(self.hidden.shape[1], device=self.start.device)[None]
            values = self._values(everything.expand(len(self.start), -1), window, causal)
            values = values.to(device, dtype)[:, None, None]
            self.kept[kind] = values.expand(-1, 1, groups, -1, -1).contiguous()
        return self.kept[kind].flatten(2, 3)

    def move(self, start: torch.Tensor, ancestors: torch.Tensor) -> None:
        """The blocks now begin at `start [B]`, at most Q columns after where they began, and are this tree.

        Args:
            ancestors `[Q, Q]`: `chain` or `ancestors` of the block.
        """
        self.start, self.ancestors, self.depth = start, ancestors, ancestors.sum(-1) - 1
        for (window, causal, _, dtype, device), mask in self.kept.items():
            regions = self.near if window is None else torch.cat([self.near, self.near - window])
            columns = (start[:, None] + regions).clamp_min(0)
            values = self._values(columns, window, causal).to(device, dtype)[:, None, None]
            index = columns.to(device)[:, None, None, None].expand(*mask.shape[:-1], -1)
            mask.scatter_(-1, index, values.expand_as(index))

    def _values(self, columns: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
        """`[B, Q, M]` for `columns [B, M]`."""
        visible = self.visible(columns, window, causal)
        return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))

    def visible(self, columns: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
        """Whether each position of the block sees `columns [B, M]`: `[B, Q, M]`.

        A window of W shows what lies at a distance below W, on both sides where the layer is not causal.
        """
        offset = columns - self.start[:, None]  # [B, M]; from 0 on, the block itself
        inside = (offset >= 0) & (offset < self.size)
        if causal:
            in_block = self.ancestors[:, offset.clamp(0, self.size - 1)].transpose(0, 1)  # [B, Q, M]
        else:
            in_block = torch.ones_like(inside)[:, None]
        seen = torch.where(inside[:, None], in_block, (offset < 0)[:, None])
        if window is not None:
            there = torch.where(inside, self.depth[offset.clamp(0, self.size - 1)], offset)
            distance = self.depth[:, None] - there[:, None]  # [B, Q, M]
            seen = seen & (distance.abs() < window)
        itself = offset[:, None] == self.steps[:, None]
        return (seen & ~self.hidden.gather(1, columns)[:, None]) | itself


def chain(size: int, device: torch.device) -> torch.Tensor:
    """`[Q, Q]`: each position of a chain comes after all before it."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """`[Q, Q]`: True where the second position lies on the way from the first to the root, both included.

    Args:
        parents `[Q]`: the position before each; -1 for the root, which is the first. Parents come before children.
    """
    found = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for position, parent in enumerate(parents.tolist()):
        if parent >= 0:
            found[position] |= found[parent]
    return found


def widen(hidden: torch.Tensor, columns: int) -> torch.Tensor:
    """`hidden [B, S]` with at least this many columns, none of the new ones hidden; itself where it has them."""
    missing = columns - hidden.shape[1]
    return torch.nn.functional.pad(hidden, (0, missing)) if missing > 0 else hidden


def rewindable_cache(config: Any) -> Cache:
    """A fresh cache for calling a draft by hand: tokens can be taken back from it with `crop`."""
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache
