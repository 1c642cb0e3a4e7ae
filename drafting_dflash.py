# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The draft while it proposes blocks: its context as keys and values by column, and its forward.

This file travels with every pushed draft.

Shapes: B rows, N new columns, Q block positions, S columns of a buffer, V vocabulary, F taps * target hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .cache_dflash import ColumnCache, Masks, widen
from .capture_dflash import Captured
from .target_dflash import BlockAttention, embed_noise


class Drafter:
    """A draft's forwards while it proposes blocks for B rows of a target's text.

    One of these is kept for a draft and its target and used for one decode after another; between decodes it holds no
    tensors but its own.
    """

    def __init__(self, draft: Any, target: Any):
        self.draft, self.size = draft, draft.config.block_size
        self.embed, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        # Weights of few bits have dtypes that are not those of their inputs.
        self.head_device, self.head_dtype = next(self.head.parameters()).device, target.dtype
        self.attention = BlockAttention(draft, layer_kinds(draft.config))
        self.no_masks = dict.fromkeys(draft.config.layer_types)
        self.block = Captured(self._block, lambda: (self.cache.length, self.cache.capacity))
        self.clear()

    def clear(self) -> None:
        """Back to no text at all."""
        self.cache = ColumnCache(DynamicCache(config=self.draft.config))
        self.masks: Any = None  # of the block, `Masks`
        self.context: Any = None  # [B, Q, F], of the last block
        self.start: Any = None  # [B], the column of the first of them
        self.hidden: Any = None  # [B, S], columns that hold no context
        self.offset: Any = None  # [B], the column at which each row's text begins
        self.noise_ids: Any = None  # [B, Q - 1], mask tokens
        self.logits: Any = None  # [B, Q - 1, V], of the last block
        self.picked: Any = None  # [B, Q - 1], what it proposes by its logits alone
        self.states: Any = None  # [B, Q - 1, H], of the last block
        self.anchor: Any = None  # [B, 1], of the last block

    @contextmanager
    def decoding(self, hidden: torch.Tensor, how: str) -> Iterator[None]:
        """For rows whose columns are padding where `hidden [B, S]` says so."""
        self.hidden = hidden.to(self.draft.device)
        self.offset = (~self.hidden).int().argmax(dim=1)
        shape = (len(hidden), self.size - 1)
        self.noise_ids = torch.full(shape, self.draft.config.mask_token_id, device=hidden.device)
        with self.block.running(how), self.attention.hold() if how == "compile" else nullcontext():
            try:
                yield
            finally:
                self.clear()

    def absorb(self, features: torch.Tensor, start: int) -> None:
        """Take in the context features `[B, N, F]` of the columns from `start` on, the same in every row."""
        columns = torch.arange(start, start + features.shape[1], device=self.draft.device).expand(len(features), -1)
        self._absorb(self._at_home(features), columns)

    def _absorb(self, features: torch.Tensor, columns: torch.Tensor) -> None:
        self.cache.reserve(int(columns.max()) + 1)
        self.cache.write_at(columns)
        self.draft.absorb(features, self._positions(columns), self.cache)
        self.cache.check_written(columns.shape[1], "the draft")

    def feed(self, features: torch.Tensor, start: torch.Tensor) -> None:
        """Context features `[B, N, F]` of the block at `start [B]`, in the order of the text; rejected ones may follow.

        They reach the draft with its next block.
        """
        self.context, self.start = self._at_home(features), start.to(self.draft.device)

    def flush(self) -> None:
        """Take in what the draft was fed last; rejected columns are overwritten by whatever follows."""
        if self.start is not None:
            columns = torch.arange(self.context.shape[1], device=self.draft.device)
            self._absorb(self.context, self.start[:, None] + columns)

    def hide(self, columns: int) -> None:
        """The first `columns` hold no context: they were cached without this draft."""
        self.hidden = self.hidden.clone()
        self.hidden[:, :columns] = True

    def propose(self, anchor: torch.Tensor, start: torch.Tensor, room: int) -> torch.Tensor:
        """The draft's logits `[B, Q - 1, V]` for the columns after `anchor [B, 1]`, which is at columns `start [B]`.

        Args:
            room: columns that the longest row needs, its block included.
        """
        home = start.to(self.draft.device)
        if self.context is None:  # the prompt's was absorbed: any, to be overwritten by the block
            width = self.draft.config.fc_width
            self.context = torch.zeros(len(start), self.size, width, device=home.device, dtype=self.draft.dtype)
            self.start = home
        self.cache.reserve(room + max(0, self.context.shape[1] - self.size))  # what was verified may be a wider tree
        self.hidden = widen(self.hidden, self.cache.capacity)
        if self.masks is None or self.masks.hidden is not self.hidden:
            self.masks = Masks(self.hidden, home, self.size)
        self.anchor = anchor
        with self.attention.active(self.masks, self.cache.length):
            logits, self.picked, self.states = self.block(anchor, self.context, self.start, home)
        self.logits = logits.to(start.device)
        return self.logits

    def pick(self, scores: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """The tokens `[B, Q - 1]` that the last block proposes.

        Args:
            scores `[B, Q - 1, V]`: its logits, or what processors and noise made of them.
            weight: of what the draft adds to them, which processors did not see.
        """
        if scores is self.logits:
            return self.picked.to(scores.device)
        home = self.states.device
        return self.draft.pick(scores.to(home), self.states, self.anchor.to(home), weight).to(scores.device)

    def _block(
        self, anchor: torch.Tensor, context: torch.Tensor, context_start: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[B, Q - 1, V]`, the tokens `[B, Q - 1]` that they alone propose, and states `[B, Q - 1, H]`.

        Nothing here depends on anything but tensors.
        """
        self.masks.move(start, self.masks.chain)
        columns = start[:, None] + self.masks.steps  # [B, Q]
        before = context_start[:, None] + torch.arange(context.shape[1], device=start.device)
        # Rejected positions of the context share their columns with the block, which is written after it.
        self.cache.write_at(before, columns)
        noise_embeds = self._at_home(embed_noise(self.embed, torch.cat([anchor, self.noise_ids], dim=1)))
        positions = self._positions(torch.cat([before, columns], dim=1))
        states = self.draft(noise_embeds, context, self.no_masks, positions, self.cache).last_hidden_state[:, 1:]
        if not torch.compiler.is_compiling():
            self.cache.check_written(positions.shape[1], "the draft")
            self.attention.check_asked(set(range(len(self.draft.layers))), "the draft")
        logits = self.draft.logits(states.to(self.head_device, self.head_dtype), self.head)
        return logits, self.draft.pick(logits.to(start.device), states, anchor.to(start.device), 1.0), states

    def _positions(self, columns: torch.Tensor) -> torch.Tensor:
        """Positions in each row's text of `columns [B, N]`."""
        return (columns - self.offset[:, None]).clamp_min(0)

    def _at_home(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.draft.device, self.draft.dtype)


def layer_kinds(config: Any) -> list[tuple[int | None, bool]]:
    """Of each layer of a draft, its window (None for all) and whether it is causal."""
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return list(zip(windows, config.causal_layers, strict=True))
