# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a draft is trained on: packed rows of documents, anchors drawn in them, one block after each anchor.

Random anchors, the block mask and the decaying weights are those of DFlash (arXiv 2602.06036).

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """Packed rows. Several documents may share a row; nothing crosses from one to another.

    Args:
        input_ids `[B, S]`: token ids.
        supervised `[B, S]`: True where the draft shall learn to predict the token.
        documents `[B, S]`: 1, 2 ... for the documents of a row, in order; 0 where the row is padded at its end.
    """

    input_ids: torch.Tensor
    supervised: torch.Tensor
    documents: torch.Tensor

    @cached_property
    def positions(self) -> torch.Tensor:
        """`[B, S]`, counted from 0 in each document, as when it is decoded alone."""
        columns = torch.arange(self.documents.shape[1], device=self.documents.device).expand_as(self.documents)
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return columns - (columns * begins).cummax(dim=1).values

    @cached_property
    def candidates(self) -> torch.Tensor:
        """`[B, S]`, where an anchor may be: a supervised token followed by one of its document."""
        follows = self.supervised[:, 1:] & (self.documents[:, 1:] == self.documents[:, :-1])
        return torch.nn.functional.pad(self.supervised[:, :-1] & follows, (0, 1))

    def spans(self) -> list[tuple[int, int, int]]:
        """Each document's row, first column and length."""
        found = []
        for row, documents in enumerate(self.documents.cpu()):
            values, lengths = documents.unique_consecutive(return_counts=True)
            starts = (lengths.cumsum(0) - lengths).tolist()
            every = zip(values.tolist(), starts, lengths.tolist(), strict=True)
            found += [(row, start, length) for value, start, length in every if value]
        return found


def draw_anchors(rows: Rows, most: int, seed: int, step: int) -> torch.Tensor:
    """`[B, A]` columns, ascending, `A <= most`; -1 where a row has fewer candidates than another.

    What is drawn in a row depends on its tokens, the seed and the step alone, so that it is the same in whichever
    process and batch the row is, and again after a run was resumed.
    """
    drawn = []
    every = zip(rows.input_ids.cpu(), rows.documents.cpu(), rows.candidates.cpu(), strict=True)
    for ids, documents, candidates in every:
        columns = candidates.nonzero()[:, 0]
        key = hashlib.blake2b(ids[documents > 0].numpy().tobytes(), digest_size=8, key=f"{seed} {step}".encode())
        generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "little") >> 1)
        drawn.append(columns[torch.randperm(len(columns), generator=generator)[:most]].sort().values)
    anchors = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
    if anchors.shape[1] == 0:
        anchors = anchors.new_full((len(drawn), 1), -1)  # one empty block, so that nothing has no size
    return anchors.to(rows.input_ids.device)


@dataclass(frozen=True)
class Blocks:
    """One block of `size` positions after each anchor.

    Args:
        rows: that the anchors are in.
        anchors `[B, A]`: their columns; -1 for an empty block.
        size: Q.
    """

    rows: Rows
    anchors: torch.Tensor
    size: int

    @cached_property
    def columns(self) -> torch.Tensor:
        """`[B, A, Q]`, in the row; the last one's where a block hangs over the end."""
        columns = self.anchors[..., None].clamp_min(0) + torch.arange(self.size, device=self.anchors.device)
        return columns.clamp_max(self.rows.input_ids.shape[1] - 1)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """`[B, A, Q]`, the text's."""
        return self._of(self.rows.input_ids)

    @cached_property
    def counted(self) -> torch.Tensor:
        """`[B, A, Q]`, where there is something to learn: a supervised token after the anchor, in its document."""
        steps = torch.arange(self.size, device=self.anchors.device)
        inside = self.anchors[..., None] + steps == self.columns
        documents = self._of(self.rows.documents)
        return inside & (steps > 0) & (documents == documents[..., :1]) & self._of(self.rows.supervised)

    @cached_property
    def positions(self) -> torch.Tensor:
        """`[B, A * Q]`, in each anchor's document."""
        first = self._of(self.rows.positions)[..., :1]
        return (first + torch.arange(self.size, device=first.device)).flatten(1)

    def weights(self, gamma: float) -> torch.Tensor:
        """`[B, A, Q]`: exp(-(k - 1) / gamma) at position k where it is counted, else 0."""
        steps = torch.arange(self.size, device=self.anchors.device, dtype=torch.float32)
        return self.counted * torch.exp(-(steps - 1) / gamma)

    def noise_ids(self, mask_token_id: int) -> torch.Tensor:
        """`[B, A * Q]`: of each block its anchor, then mask tokens."""
        ids = torch.full_like(self.tokens, mask_token_id)
        ids[..., 0] = self.tokens[..., 0]
        return ids.flatten(1)

    def visible(self, window: int | None, causal: bool) -> Callable[..., torch.Tensor]:
        """Whether query q of the blocks sees key kv, of the row's S columns and then of the blocks, row by row.

        The context of a block is its document strictly before its anchor. Inside the block it is bidirectional or
        causal; a window counts distances, strictly below it.
        """
        length, size, anchors = self.rows.input_ids.shape[1], self.size, self.anchors
        documents = self.rows.documents
        own = self._of(documents)[..., 0].where(anchors >= 0, -1)  # an empty block sees no context

        def visible(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            block, at = q // size, q % size
            column, other = kv.clamp(max=length - 1), kv - length
            context = (kv < length) & (documents[b, column] == own[b, block]) & (column < anchors[b, block])
            inside = (other >= 0) & (other // size == block)
            distance = at - other % size
            if causal:
                inside = inside & (distance >= 0)
            if window is not None:
                context = context & (anchors[b, block] + at - column < window)
                inside = inside & (distance.abs() < window)
            return context | inside

        return visible

    def dense_mask(self, window: int | None, causal: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`[B, 1, A * Q, S + A * Q]`: True where visible; or, given a dtype, 0 there and its lowest number elsewhere.

        The boolean form is for `sdpa`, the other for `eager` attention.
        """
        device = self.anchors.device
        queries = self.anchors.shape[1] * self.size
        keys = torch.arange(self.rows.input_ids.shape[1] + queries, device=device)
        batch = torch.arange(len(self.anchors), device=device)[:, None, None]
        seen = self.visible(window, causal)(batch, None, torch.arange(queries, device=device)[:, None], keys)[:, None]
        return (
            seen if dtype is None else torch.zeros((), dtype=dtype, device=device).where(seen, torch.finfo(dtype).min)
        )

    def flex_mask(self, window: int | None, causal: bool) -> Any:
        """The same as a `BlockMask` for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, queries = len(self.anchors), self.anchors.shape[1] * self.size
        keys = self.rows.input_ids.shape[1] + queries
        device = self.anchors.device
        # Compiled, the mask is never whole in memory.
        return create_block_mask(
            self.visible(window, causal), rows, None, queries, keys, device=device.type, _compile=device.type == "cuda"
        )

    def _of(self, values: torch.Tensor) -> torch.Tensor:
        """`values [B, S]` at the blocks' columns, `[B, A, Q]`."""
        return values.gather(1, self.columns.flatten(1)).view_as(self.columns)


def default_gamma(block_size: int) -> float:
    """How slowly the weights fall: 7 for blocks of 16, 5 for 10, 4 for 8, as published; between them in proportion."""
    return max(1.0, 5 + (block_size - 10) / 3 if block_size >= 10 else 5 - (10 - block_size) / 2)
