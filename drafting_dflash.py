# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The draft while it proposes blocks: its context as keys and values by column, and its forward.

This file travels with every pushed draft.

Shapes: B rows, N new columns, Q block positions, S columns of a buffer, V vocabulary, F taps * target hidden size.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from .cache_dflash import ColumnCache, Masks
from .target_dflash import BlockAttention, embed_noise


class Drafter:
    """A draft while it proposes blocks for B rows: its context, kept as keys and values by column.

    Args:
        hidden `[B, S]`: columns that hold no context, True where padded.
    """

    def __init__(self, draft: Any, target: Any, hidden: torch.Tensor):
        self.draft, self.size = draft, draft.config.block_size
        self.embed, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.attention = BlockAttention(draft, layer_kinds(draft.config))
        self.no_masks = dict.fromkeys(draft.config.layer_types)
        self.cache = ColumnCache(DynamicCache(config=draft.config))
        self.hidden = hidden.to(draft.device)
        self.offset = (~self.hidden).int().argmax(dim=1)  # [B], the column at which each row's text begins
        self.masks: Masks | None = None
        self.steps = torch.arange(self.size, device=draft.device)
        rows, width = len(hidden), draft.config.fc_width
        self.noise_ids = torch.full((rows, self.size - 1), draft.config.mask_token_id, device=hidden.device)
        self.context = torch.zeros(rows, self.size, width, device=draft.device, dtype=draft.dtype)
        self.start: torch.Tensor | None = None  # [B], the first column of `context`

    def absorb(self, features: torch.Tensor, start: int) -> None:
        """Take in the context features `[B, N, F]` of the columns from `start` on, the same in every row."""
        columns = torch.arange(start, start + features.shape[1], device=self.draft.device).expand(len(features), -1)
        self.cache.reserve(start + features.shape[1])
        self.cache.write_at(columns)
        self.draft.absorb(features, self._positions(columns), self.cache)

    def propose(self, anchor: torch.Tensor, start: torch.Tensor, room: int) -> torch.Tensor:
        """The draft's logits `[B, Q - 1, V]` for the columns after `anchor [B, 1]`, which is at columns `start [B]`.

        Args:
            room: columns that the longest row needs, its block included.
        """
        noise_ids = torch.cat([anchor, self.noise_ids], dim=1)
        noise_embeds = embed_noise(self.embed, noise_ids).to(self.draft.device, self.draft.dtype)
        start = start.to(self.draft.device)
        block = start[:, None] + self.steps  # [B, Q]
        context = block if self.start is None else self.start[:, None] + self.steps
        # Rejected positions of the context share their columns with the block, which is written after it.
        self.cache.reserve(room)
        self.cache.write_at(context, block)
        masks = self._masks_at(start)
        positions = self._positions(torch.cat([context, block], dim=1))
        with self.attention.active(masks, self.cache.length):
            states = self.draft(noise_embeds, self.context, self.no_masks, positions, self.cache).last_hidden_state
        weight = next(self.head.parameters())
        return self.head(states[:, 1:].to(weight.device, weight.dtype)).to(anchor.device)

    def feed(self, features: torch.Tensor, start: torch.Tensor) -> None:
        """Context features `[B, Q, F]` of the block at `start [B]`, in the order of the text; rejected ones may follow.

        They reach the draft with its next block.
        """
        self.context, self.start = features, start.to(self.draft.device)

    def hide(self, columns: int) -> None:
        """The first `columns` hold no context: they were cached without this draft."""
        self.hidden = self.hidden.clone()
        self.hidden[:, :columns] = True

    def flush(self) -> None:
        """Take in what the draft was fed last; rejected columns are overwritten by whatever follows."""
        if self.start is not None:
            columns = self.start[:, None] + self.steps
            self.cache.reserve(int(columns.max()) + 1)
            self.cache.write_at(columns)
            self.draft.absorb(self.context, self._positions(columns), self.cache)

    def _positions(self, columns: torch.Tensor) -> torch.Tensor:
        """Positions in each row's text of `columns [B, N]`."""
        return (columns - self.offset[:, None]).clamp_min(0)

    def _masks_at(self, start: torch.Tensor) -> Masks:
        self.hidden = widen(self.hidden, self.cache.capacity)
        if self.masks is None or self.masks.hidden is not self.hidden:
            self.masks = Masks(self.hidden, start, self.size)
        else:
            self.masks.move(start)
        return self.masks


def layer_kinds(config: Any) -> list[tuple[int | None, bool]]:
    """Of each layer of a draft, its window (None for all) and whether it is causal."""
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return list(zip(windows, config.causal_layers, strict=True))


def widen(hidden: torch.Tensor, columns: int) -> torch.Tensor:
    """`hidden [B, S]` with at least this many columns; nothing is hidden among those that are added."""
    missing = columns - hidden.shape[1]
    return pad(hidden, (0, missing)) if missing > 0 else hidden
