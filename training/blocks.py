# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Build the training input of a draft: packed rows of documents, random anchors in them, one block after each anchor.

Random anchors, the block mask and the decaying weights follow DFlash (arXiv 2602.06036).

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions, T of those that predict a token: Q, or Q - 1
where the anchor's position does not. N positions with a loss, H target hidden size, F taps * H. A column is an index
into a row, 0 to S - 1.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..attention_dflash import visible


@dataclass(frozen=True)
class PackedBatch:
    """Hold a batch of packed rows. Several documents may share a row; attention never crosses between them.

    Args:
        input_ids `[B, S]`: token ids.
        loss_mask `[B, S]`: True where the draft learns to predict the token.
        documents `[B, S]`: 1, 2 ... for the documents of a row, in order; 0 for the padding at its end.
        features `[B, S, F]`, last_hidden_state `[B, S, H]`: what the target computed for these rows; None where it has
            to be computed.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    documents: torch.Tensor
    features: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None

    @cached_property
    def positions(self) -> torch.Tensor:
        """Return `[B, S]`: the position of each token in its document, from 0, as if it were decoded alone."""
        columns = torch.arange(self.documents.shape[1], device=self.documents.device).expand_as(
            self.documents
        )
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return columns - (columns * begins).cummax(dim=1).values

    @cached_property
    def anchor_mask(self) -> torch.Tensor:
        """Return `[B, S]`: True where an anchor may be, which is where this token and the next have a loss.

        Both must belong to the same document.
        """
        next_has_loss = self.loss_mask[:, 1:] & (self.documents[:, 1:] == self.documents[:, :-1])
        return torch.nn.functional.pad(self.loss_mask[:, :-1] & next_has_loss, (0, 1))

    def spans(self) -> list[tuple[int, int, int]]:
        """Return the row, first column and length of each document."""
        found = []
        for row, documents in enumerate(self.documents.cpu()):
            values, lengths = documents.unique_consecutive(return_counts=True)
            starts = (lengths.cumsum(0) - lengths).tolist()
            for value, start, length in zip(values.tolist(), starts, lengths.tolist(), strict=True):
                if value:
                    found.append((row, start, length))
        return found


def draw_anchors(batch: PackedBatch, num_anchors: int, seed: int, step: int) -> torch.Tensor:
    """Draw up to `num_anchors` anchors in each row; the same arguments always give the same anchors.

    The draw in a row depends on its tokens, the seed and the step alone. So it is the same in any batch, in any
    process, and after a resumed run.

    Returns:
        `[B, A]` columns, ascending, with `A <= num_anchors`; -1 fills rows that have fewer anchors than others.
    """
    drawn = []
    rows = zip(batch.input_ids.cpu(), batch.documents.cpu(), batch.anchor_mask.cpu(), strict=True)
    for ids, documents, anchor_mask in rows:
        columns = anchor_mask.nonzero()[:, 0]
        order = torch.randperm(
            len(columns), generator=_row_generator(ids[documents > 0], seed, step)
        )
        drawn.append(columns[order[:num_anchors]].sort().values)
    anchors = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
    if anchors.shape[1] == 0:
        # One empty block: tensors of size 0 break kernels.
        anchors = anchors.new_full((len(drawn), 1), -1)
    return anchors.to(batch.input_ids.device)


def draw_given(
    batch: PackedBatch, anchors: torch.Tensor, size: int, base: float, draw: tuple[int, int]
) -> torch.Tensor:
    """Draw how many tokens after each anchor are given, as for the second draft of D2SD (arXiv 2606.04446).

    It is at least 1 and leaves one position of the block or more. A number n is drawn with weight base ** n.

    Args:
        anchors `[B, A]`: columns.
        size: positions of a block.
        draw: seed and step; with the tokens of a row they determine what is drawn.

    Returns:
        `[B, A]`.
    """
    weights = base ** torch.arange(1, max(2, size - 1), dtype=torch.float32)
    drawn = []
    for ids, documents in zip(batch.input_ids.cpu(), batch.documents.cpu(), strict=True):
        generator = _row_generator(ids[documents > 0], *draw)
        count = anchors.shape[1]
        drawn.append(1 + weights.multinomial(count, replacement=True, generator=generator))
    return torch.stack(drawn).to(anchors.device)


def _row_generator(tokens: torch.Tensor, seed: int, step: int) -> torch.Generator:
    """Return a generator seeded by a hash of `tokens [n]`, `seed` and `step`."""
    digest = hashlib.blake2b(
        tokens.numpy().tobytes(), digest_size=8, key=f"{seed} {step}".encode()
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Blocks:
    """Place one block of `size` positions after each anchor.

    Args:
        batch: the rows that the anchors are in.
        anchors `[B, A]`: their columns; -1 for an empty block.
        size: Q.
        sample_from_anchor: whether the anchor's position predicts the token after it, and each other position the one
            after its own.
        given `[B, A]`: number of tokens after each anchor that the block holds in place of mask tokens; None for none.
            They have no loss.
    """

    batch: PackedBatch
    anchors: torch.Tensor
    size: int
    sample_from_anchor: bool = False
    given: torch.Tensor | None = None

    @property
    def first(self) -> int:
        """Return the first position of a block that predicts a token."""
        return 1 - self.sample_from_anchor

    @cached_property
    def _first_column(self) -> torch.Tensor:
        """Return `[B, A, 1]`: the first position of each block that has a loss, if the text goes on that far."""
        given = torch.zeros_like(self.anchors) if self.given is None else self.given
        return (given + self.first)[..., None]

    @cached_property
    def columns(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the column of each block position; the last column where a block exceeds the row."""
        columns = self.anchors[..., None].clamp_min(0) + torch.arange(
            self.size, device=self.anchors.device
        )
        return columns.clamp_max(self.batch.input_ids.shape[1] - 1)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the tokens of the text at the block positions."""
        return self._gather(self.batch.input_ids)

    @cached_property
    def label_columns(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the column of the token that each position predicts; the last one beyond the row."""
        columns = self._predicted.clamp_min(0)
        return columns.clamp_max(self.batch.input_ids.shape[1] - 1)

    @property
    def _predicted(self) -> torch.Tensor:
        """Return `label_columns [B, A, Q]`, beyond the row too."""
        steps = torch.arange(self.size, device=self.anchors.device)
        return self.anchors[..., None] + steps + int(self.sample_from_anchor)

    @cached_property
    def predecessor_columns(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the column of the token before each predicted one."""
        return (self.label_columns - 1).clamp_min(0)

    @cached_property
    def labels(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the tokens of the text that the block positions predict."""
        return self._gather(self.batch.input_ids, self.label_columns)

    @cached_property
    def predecessors(self) -> torch.Tensor:
        """Return `[B, A, Q]`: the token of the text before each predicted one."""
        return self._gather(self.batch.input_ids, self.predecessor_columns)

    @cached_property
    def block_loss_mask(self) -> torch.Tensor:
        """Return `[B, A, Q]`: True where a position has a loss.

        It does where it predicts a token of the anchor's document after the given ones, where `loss_mask` is True.
        """
        columns = self.label_columns
        is_real = (self._predicted == columns) & (self.anchors[..., None] >= 0)
        steps = torch.arange(self.size, device=self.anchors.device)
        own_document = self._gather(self.batch.documents)[..., :1]
        same_document = self._gather(self.batch.documents, columns) == own_document
        has_loss = self._gather(self.batch.loss_mask, columns)
        return is_real & (steps >= self._first_column) & same_document & has_loss

    @cached_property
    def positions(self) -> torch.Tensor:
        """Return `[B, A * Q]`: positions, counted in the document of each anchor."""
        first = self._gather(self.batch.positions)[..., :1]
        return (first + torch.arange(self.size, device=first.device)).flatten(1)

    def weights(self, gamma: float) -> torch.Tensor:
        """Return `[B, A, Q]`: exp(-(k - 1) / gamma) for the k-th token that is not given and has a loss, else 0."""
        steps = torch.arange(self.size, device=self.anchors.device, dtype=torch.float32)
        later = (steps - self._first_column).clamp_min(0)
        return self.block_loss_mask * torch.exp(-later / gamma)

    @cached_property
    def places(self) -> torch.Tensor:
        """Return `[N]`: where each position with a loss is among the B * A blocks of T that predict, one by one."""
        return self.block_loss_mask[..., self.first :].flatten().nonzero()[:, 0]

    def noise_ids(self, mask_token_id: int) -> torch.Tensor:
        """Return `[B, A * Q]`: for each block its anchor and what is given, then mask tokens."""
        steps = torch.arange(self.size, device=self.anchors.device)
        is_token = steps < self._first_column + self.sample_from_anchor
        return self.tokens.where(is_token, mask_token_id).flatten(1)

    def mask_function(
        self, window: int | None, causal: bool, from_anchor: bool = False
    ) -> Callable[..., torch.Tensor]:
        """Return the function `sees(b, h, q, kv)` that FlexAttention takes: True where query q sees key kv.

        Queries are the A * Q block positions of row b. Keys are the S columns of the row, then the block positions. A
        query sees its own block, and its document strictly before the anchor. Of these, it sees what the window and
        the causality of the layer allow (`visible`).

        Example: a row with documents 1 1 1 2 2 2 2, anchors at columns 1 and 5, Q = 3. Keys 0 to 6 are the row, 7 to 9
        the first block, 10 to 12 the second. The second block has queries 3, 4, 5, at columns 5, 6, 7. These see:

        | | query 3 | query 4 | query 5 |
        |---|---|---|---|
        | no window, not causal | 3 4, 10 11 12 | 3 4, 10 11 12 | 3 4, 10 11 12 |
        | no window, causal | 3 4, 10 | 3 4, 10 11 | 3 4, 10 11 12 |
        | window 2, not causal | 4, 10 11 | 10 11 12 | 11 12 |
        | window 1 from the anchor, causal | 4, 10 | 4, 10 11 | 4, 10 11 12 |
        """
        length, documents = self.batch.input_ids.shape[1], self.batch.documents
        size, anchors = self.size, self.anchors
        # An empty block sees no context.
        own_document = self._gather(documents)[..., 0].where(anchors >= 0, -1)

        def sees(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            block, anchor = q // size, anchors[b, q // size]
            column, other = kv.clamp(max=length - 1), kv - length
            context = (
                (kv < length) & (documents[b, column] == own_document[b, block]) & (column < anchor)
            )
            inside = (other >= 0) & (other // size == block)
            key_column = torch.where(kv < length, column, anchor + other % size)
            seen = visible(
                anchor + q % size, key_column, window, causal, anchor if from_anchor else None
            )
            return (context | inside) & seen

        return sees

    def dense_mask(
        self,
        window: int | None,
        causal: bool,
        from_anchor: bool = False,
        dtype: torch.dtype | None = None,
        queries: slice = slice(None),
        context: slice = slice(None),
    ) -> torch.Tensor:
        """Return the mask `[B, 1, A * Q, S + A * Q]`, or that of some queries and of the keys that they need.

        Args:
            window, causal, from_anchor: the kind of layer, as in `mask_function`.
            dtype: None for a boolean mask, True where visible, as `sdpa` takes it. With a dtype, 0 where visible and
                its lowest number elsewhere, as `eager` attention takes it.
            queries: positions of whole blocks among all A * Q. Their own positions are the last of the keys.
            context: columns of the row that are the first of the keys.
        """
        device, length = self.anchors.device, self.batch.input_ids.shape[1]
        asked = torch.arange(self.anchors.shape[1] * self.size, device=device)[queries]
        columns = torch.arange(length, device=device)[context]
        rows = torch.arange(len(self.anchors), device=device)[:, None, None]
        sees = self.mask_function(window, causal, from_anchor)
        seen = sees(rows, None, asked[:, None], torch.cat([columns, length + asked]))[:, None]
        if dtype is None:
            return seen
        return torch.zeros((), dtype=dtype, device=device).where(seen, torch.finfo(dtype).min)

    def flex_mask(self, window: int | None, causal: bool, from_anchor: bool = False) -> Any:
        """Return the same mask as a `BlockMask` for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, queries = self.anchors.shape[0], self.anchors.shape[1] * self.size
        keys = self.batch.input_ids.shape[1] + queries
        device = self.anchors.device.type
        # Compiled, the mask never exists as a whole in memory.
        return create_block_mask(
            self.mask_function(window, causal, from_anchor),
            rows,
            None,
            queries,
            keys,
            device=device,
            _compile=device == "cuda",
        )

    def _gather(self, values: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return `values [B, S]` at `columns [B, A, Q]`, by default those of the blocks."""
        columns = self.columns if columns is None else columns
        return values.gather(1, columns.flatten(1)).view_as(columns)


def default_gamma(block_size: int) -> float:
    """Return how slowly the weights fall: 1.6 for blocks of 8 or less, then as published, 5 for 10 and 7 for 16.

    For blocks of 8 the published value is 4; on the built-in pair 1.6 measures best of all (docs/training.md).
    Between 8, 10 and 16 the value is linear.
    """
    if block_size >= 10:
        return 5 + (block_size - 10) / 3
    return 1.6 + 1.7 * max(0, block_size - 8)
