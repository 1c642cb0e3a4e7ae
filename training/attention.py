# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Attend from blocks to their texts under dense masks, a group of neighbouring blocks at a time.

Anchors ascend, so a group needs the context before its last anchor and its own blocks, and no other keys. That is
about a third of all pairs of queries and keys. One mask serves all layers of a kind.

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions, H query heads, K key heads, D head width;
q queries and k keys of a group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks import Blocks

GROUPED = "grouped_sdpa"
"""Name of the attention function below, for `set_attn_implementation`."""
_GROUPS = 4


@dataclass(frozen=True)
class GroupMask:
    """Say what one group of blocks sees.

    Args:
        queries: the positions of its blocks among all A * Q.
        context: the columns of the row that it may see, S in all.
        values `[B, 1, q, k]`: 0 where visible and the lowest number elsewhere. Keys are the context, then the blocks.
    """

    queries: slice
    context: slice
    values: torch.Tensor

    def keys_of(self, states: torch.Tensor, length: int) -> torch.Tensor:
        """Return the keys or values `[B, K, k, D]` of the group, of all `states [B, K, S + A * Q, D]`."""
        first, end = length + self.queries.start, length + self.queries.stop
        return torch.cat([states[:, :, self.context], states[:, :, first:end]], dim=2)


@dataclass(frozen=True)
class GroupedMask:
    """Hold the masks of all groups, and the number S of columns before the blocks."""

    groups: list[GroupMask]
    length: int

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        dtype: torch.dtype,
        window: int | None,
        causal: bool,
        from_anchor: bool = False,
    ) -> "GroupedMask":
        """Return the masks of `blocks`.

        Args:
            dtype: of the queries.
            window, causal, from_anchor: the kind of layer, as in `Blocks.mask_function`.
        """
        length, num_anchors = blocks.batch.input_ids.shape[1], blocks.anchors.shape[1]
        size = group_size(num_anchors)
        groups = []
        for first in range(0, num_anchors, size):
            anchors = blocks.anchors[:, first : first + size]
            context = slice(0, max(0, int(anchors.max())))
            queries = slice(first * blocks.size, (first + anchors.shape[1]) * blocks.size)
            values = blocks.dense_mask(window, causal, from_anchor, dtype, queries, context)
            groups.append(GroupMask(queries, context, values))
        return cls(groups, length)


def group_size(num_anchors: int) -> int:
    """Return the number of blocks of a group."""
    return -(-num_anchors // _GROUPS)


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: GroupedMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from `query [B, H, A * Q, D]` to `key, value [B, K, S + A * Q, D]`: `[B, A * Q, H, D]`, and no weights.

    A mask of another kind, or None, is that of `sdpa`.
    """
    if not isinstance(attention_mask, GroupedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    on_cpu = query.device.type == "cpu"  # elsewhere no kernel takes a mask and fewer heads of keys
    if not on_cpu:
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    found = []
    for group in attention_mask.groups:
        output = scaled_dot_product_attention(
            query[:, :, group.queries],
            group.keys_of(key, attention_mask.length),
            group.keys_of(value, attention_mask.length),
            attn_mask=group.values,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=on_cpu,
        )
        found.append(output.transpose(1, 2))
    return torch.cat(found, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
