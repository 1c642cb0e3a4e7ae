# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Attend over the slots of a cache: one visibility rule, its masks, and the attention function that uses them.

This file travels with every pushed draft.

Shapes: B rows, N new positions, Q block positions, S slots of a buffer, M some of those slots, L slots that attention
reads (L <= S), H key and value heads, G query heads per key head, D head dim.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_dflash import SlotCache
from .compat_dflash import (
    attention_name,
    configs_of,
    difference,
    own_eager,
    set_attention_name,
)


class LayerKind(NamedTuple):
    """Hold what a layer lets a query see; the arguments of `visible`.

    Args:
        window: None for none.
        causal: whether later keys are hidden.
        from_anchor: whether the window is counted from the block's anchor, and not from each query.
    """

    window: int | None
    causal: bool
    from_anchor: bool = False


def visible(
    query: torch.Tensor,
    key: torch.Tensor,
    window: int | None,
    causal: bool,
    anchor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tell which keys a query sees, by their positions in one text. The draft, the target and training use this rule.

    A causal layer hides later keys. A window of W hides keys at a distance of W or more, on both sides.
    For a query at position 5 with a window of 3, a causal layer shows 3, 4, 5; any other layer shows 3 to 7.

    With an anchor, the window is the W keys before it, for every query of its block, and hides no key of the block.
    Take the block 4, 5, 6, 7 and a window of 3. In a causal layer the query at 5 sees 1 to 5. In any other layer it
    sees 1 to 7, as 4, 6 and 7 do.

    Args:
        query, key: positions, in shapes that broadcast.
        anchor: the position at which the query's block begins, if windows are counted from there.

    Returns:
        Bool, in the shape that they broadcast to.
    """
    distance = query - key
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is None:
        return seen
    if anchor is not None:
        return seen & (anchor - key <= window)
    return seen & (distance.abs() < window)


class MaskKind(NamedTuple):
    """Hold what makes the mask of one layer differ from that of another."""

    window: int | None
    causal: bool
    groups: int
    dtype: torch.dtype
    device: torch.device
    from_anchor: bool = False


def additive(seen: torch.Tensor, kind: MaskKind) -> torch.Tensor:
    """Return 0 where `seen`, a bool of any shape, is True, and -inf elsewhere: what a mask of this kind holds."""
    values = torch.zeros(seen.shape, dtype=kind.dtype, device=seen.device)
    values.masked_fill_(~seen, float("-inf"))
    return values.to(kind.device)


class BlockMasks:
    """Hold the additive masks of a block, updated as its rows move on.

    Between two cycles a row moves by a block or little more. So a mask changes only near the block and, where a window
    slides, near the far end of the window. Only those slots are written again.

    Args:
        padding_mask `[B, S]`: True at slots of padding, which no other slot may see.
        slots `[B]`: of the first token of each row's block.
        size: Q. The block starts as a chain; `move` makes it any tree of that size.
        kinds: masks to build at once. A block that is captured must find them in place.
        reach: slots by which a row moves at most; by default Q.
    """

    def __init__(
        self,
        padding_mask: torch.Tensor,
        slots: torch.Tensor,
        size: int,
        kinds: Iterable[MaskKind] = (),
        reach: int | None = None,
    ):
        self.padding_mask = padding_mask
        self.slots, self.size = slots, size
        self.reach = reach or size
        self.behind = 0
        """Slots by which rows may have moved since these masks were last used, at most."""
        self.offsets = torch.arange(size, device=slots.device)  # [Q]
        self.nearby = torch.arange(-self.reach, size, device=slots.device)  # [reach + Q]
        chain = torch.ones(size, size, dtype=torch.bool, device=slots.device).tril()
        self.chain = chain.expand(len(slots), -1, -1).contiguous()  # [B, Q, Q]
        self.ancestors = self.chain
        self.depths = self.offsets.expand(len(slots), -1)  # [B, Q]
        self.built: dict[MaskKind, torch.Tensor] = {}
        self.padding: dict[MaskKind, torch.Tensor] = {}
        """What hides padding in a mask of this kind, `[B, S]`, to be added."""
        self.by_offset: dict[MaskKind, torch.Tensor] = {}
        """What a mask of this kind holds for a chain, `[R, Q]`, from the first slot on that its rows may change."""
        for kind in kinds:
            self.get(kind)

    def get(self, kind: MaskKind) -> torch.Tensor:
        """Return the mask of this kind, built when first asked for: `[B, 1, G * Q, S]`, 0 if visible and -inf else."""
        if kind not in self.built:
            self.built[kind] = self._whole(kind).contiguous()
            shown = ~self.padding_mask
            self.padding[kind] = additive(shown, kind)
            self.by_offset[kind] = self._by_offset(kind)
        return self.built[kind].flatten(2, 3)

    def rebuild(self, slots: torch.Tensor) -> None:
        """Write all masks again where they lie, for chains at `slots [B]`, however far those have moved."""
        self.place(slots, None)
        for kind, mask in self.built.items():
            mask.copy_(self._whole(kind))

    def _whole(self, kind: MaskKind) -> torch.Tensor:
        """Return the mask of this kind for all slots, `[B, 1, G, Q, S]`."""
        slots = torch.arange(self.padding_mask.shape[1], device=self.slots.device)
        values = self._values(slots.expand(len(self.slots), -1), kind)
        return values.expand(-1, 1, kind.groups, -1, -1)

    def _by_offset(self, kind: MaskKind) -> torch.Tensor:
        """Return a mask of this kind for a chain, by the offset of a slot from the anchor: `[R, Q]`."""
        first = -self.reach
        if kind.window is not None:
            first -= kind.window
        device = self.slots.device
        key = torch.arange(first, self.size, device=device)
        key = key[:, None]
        anchor = None
        if kind.from_anchor:
            anchor = torch.zeros_like(key)
        seen = visible(self.offsets, key, kind.window, kind.causal, anchor)
        return additive(seen, kind)

    def place(self, slots: torch.Tensor, ancestors: torch.Tensor | None) -> None:
        """Note where the blocks are, `slots [B]`, and their trees, as `move` is given them."""
        self.slots = slots
        self.ancestors = self.chain
        self.depths = self.offsets.expand(len(slots), -1)
        if ancestors is not None:
            self.ancestors = ancestors
            self.depths = ancestors.sum(-1) - 1

    def move(self, slots: torch.Tensor, ancestors: torch.Tensor | None = None) -> None:
        """Update all masks for blocks at `slots [B]`, at most `reach` slots after the last ones.

        A chain looks the same wherever it is, so its values are copied; those of a tree are computed.

        Args:
            ancestors `[B, Q, Q]`: of each row's tree, as `ancestors` gives it; None for chains, without padding in
                their blocks.
        """
        self.place(slots, ancestors)
        near_slots = slots[:, None] + self.nearby
        near = near_slots.clamp_min(0)
        for kind, mask in self.built.items():
            where = near
            if kind.window is not None:
                # Its far end lies there, counted from each position or from the anchor.
                far = (near_slots - kind.window).clamp_min(0)
                where = torch.cat([near, far], dim=1)
            values = self._moved_values(where, kind, ancestors is None)
            num_changed = where.shape[1]
            index = where.to(kind.device)
            index = index.view(-1, 1, 1, 1, num_changed)
            index = index.expand(*mask.shape[:-1], -1)
            mask.scatter_(-1, index, values.expand_as(index))

    def _moved_values(self, where: torch.Tensor, kind: MaskKind, is_chain: bool) -> torch.Tensor:
        """Return what `_values` does; for chains, it is looked up and not computed."""
        if not is_chain:
            return self._values(where, kind)
        values = self.by_offset[kind]  # without a window, all of it lies near
        if kind.window is not None:
            first = self.slots - self.reach - kind.window
            row = where - first[:, None]
            row = row.to(kind.device)
            values = values[row]
        index = where.to(kind.device)
        padding = self.padding[kind].gather(1, index)
        values = values.mT + padding[:, None]
        return values[:, None, None]

    def _values(self, where: torch.Tensor, kind: MaskKind) -> torch.Tensor:
        """Return the masks for the slots `where [B, M]`: `[B, 1, 1, Q, M]`."""
        layer_kind = LayerKind(kind.window, kind.causal, kind.from_anchor)
        seen = self.visible_slots(where, *layer_kind)
        values = additive(seen, kind)
        return values[:, None, None]

    def visible_slots(
        self, where: torch.Tensor, window: int | None, causal: bool, from_anchor: bool = False
    ) -> torch.Tensor:
        """Tell which of the slots `where [B, M]` each position of the block sees: `[B, Q, M]`.

        Take a chain of 3 at slot 8: its second position sees slots 0 to 9 if causal, else 0 to 10. Of a tree, a causal
        position sees its ancestors and not its siblings.
        """
        # [B, M]; below 0 is the context, from Q on nothing is written yet.
        offset = where - self.slots[:, None]
        in_block = (offset >= 0) & (offset < self.size)
        member = offset.clamp(0, self.size - 1)
        # Relative to the anchor, context lies at its offset and a position of the block at its depth in the tree.
        key = torch.where(in_block, self.depths.gather(1, member), offset)
        query = self.depths[:, :, None]
        anchor = torch.zeros_like(query) if from_anchor else None
        seen = visible(query, key[:, None], window, causal, anchor)
        written = (offset < self.size)[:, None]
        if causal:
            # [B, Q, M].
            index = member[:, None].expand(-1, self.size, -1)
            lineage = self.ancestors.gather(2, index)
            written = torch.where(in_block[:, None], lineage, written)
        padding = self.padding_mask.gather(1, where)[:, None]
        seen = seen & written & ~padding
        # A token of padding sees what precedes it, and only itself if that is nothing.
        itself = offset[:, None] == self.offsets[:, None]
        alone = ~seen.any(dim=-1, keepdim=True)
        return seen | (itself & alone)


def pad_to(padding_mask: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Return `padding_mask [B, S]` with at least this many slots; the new ones are no padding."""
    return pad(padding_mask, (0, max(0, num_slots - padding_mask.shape[1])))


class BlockAttention:
    """Attend over slots of a cache under `BlockMasks`, in place of a model's own attention function.

    A model that runs `sdpa` gets it with its query heads packed by key head, so that keys are never repeated. A model
    that runs `eager` keeps its own function, since only that one knows its sinks or soft caps.

    Args:
        layer_kinds: what each layer lets a query see.
    """

    def __init__(self, model: Any, layer_kinds: list[LayerKind]):
        self.configs = configs_of(model)
        self.layer_kinds = layer_kinds
        self.one_kind = len(set(layer_kinds)) == 1
        self.name = f"dflash_slots_{id(self):x}"
        self.original = attention_name(model.config.get_text_config(decoder=True))
        self.names_before: list[str] = []
        self.masks: BlockMasks | None = None
        self.mask_kinds: set[MaskKind] = set()
        """The masks that this model's layers have asked for, for the next decode to build in advance."""
        self.layers_seen: list[int | None] = []
        """The layers that called `attend` since `check_layers`."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the model's attention during a decode. Its configs name this one, so no other masks are made."""
        self.names_before = [attention_name(config) for config in self.configs]
        ALL_ATTENTION_FUNCTIONS[self.name] = self.attend
        self._set_names([self.name] * len(self.configs))
        try:
            yield
        finally:
            self._set_names(self.names_before)
            del ALL_ATTENTION_FUNCTIONS[self.name]

    @contextmanager
    def uninstalled(self) -> Iterator[None]:
        """Put the model's own attention back inside a decode, for forwards as plain `generate` runs them."""
        self._set_names(self.names_before)
        try:
            yield
        finally:
            self._set_names([self.name] * len(self.configs))

    @contextmanager
    def under(self, masks: BlockMasks) -> Iterator[None]:
        """Use these masks in the forward inside."""
        self.masks = masks
        try:
            yield
        finally:
            self.masks = None

    def _set_names(self, names: list[str]) -> None:
        for config, name in zip(self.configs, names, strict=True):
            set_attention_name(config, name)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `query [B, G * H, Q, D]` to `key, value [B, H, L, D]`: `[B, Q, G * H, D]`, and no weights."""
        if attention_mask is not None:
            raise difference(
                f"{type(module).__name__} brings a mask of its own, which is not read over slots"
            )
        if not torch.compiler.is_compiling():
            self.layers_seen.append(module.layer_idx)
        eager = self.original == "eager"
        if self.original not in ("eager", "sdpa"):
            eager = any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))
        groups = 1 if eager else query.shape[1] // key.shape[1]
        length = key.shape[2]
        mask = self._mask(module, groups, query)[..., :length]
        if eager:
            return own_eager(module)(module, query, key, value, mask, scaling=scaling, **kwargs)
        grouped = query.unflatten(1, (key.shape[1], groups))
        packed = grouped.flatten(2, 3)  # [B, H, G * Q, D]
        output = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        output = output.unflatten(2, (groups, query.shape[2]))
        output = output.flatten(1, 2)  # [B, G * H, Q, D]
        return output.transpose(1, 2).contiguous(), None

    def check_layers(self, layers: set[int], whose: str) -> None:
        """Check that all of `layers` called `attend` in the last forward.

        Raises:
            ValueError: naming the first that did not.
        """
        seen, self.layers_seen = self.layers_seen, []
        missing = layers - set(seen)
        # A module that several layers share knows no number of its own.
        if missing and len(seen) != len(layers):
            raise difference(
                f"Layer {min(missing)} of {whose} did not ask the attention that its config names"
            )

    def _layer_kind(self, module: Any) -> LayerKind:
        """Return what a layer lets a query see.

        Raises:
            ValueError: layers differ, and this one does not know its number.
        """
        if self.one_kind:
            return self.layer_kinds[0]
        if module.layer_idx not in range(len(self.layer_kinds)):
            raise difference(
                f"{type(module).__name__} does not know which of {len(self.layer_kinds)} layers it is"
            )
        return self.layer_kinds[module.layer_idx]

    def _mask(self, module: Any, groups: int, query: torch.Tensor) -> torch.Tensor:
        """Return the mask for one layer, `[B, 1, G * Q, S]`."""
        if self.masks is None:
            raise RuntimeError(
                "The target was called from elsewhere while a draft decodes; call it afterwards."
            )
        layer = self._layer_kind(module)
        whose = (groups, query.dtype, query.device)
        kind = MaskKind(layer.window, layer.causal, *whose, layer.from_anchor)
        if kind not in self.masks.built:
            self.mask_kinds.add(kind)
        return self.masks.get(kind)


@dataclass
class BlockState:
    """Hold what a model has of one decode, for its blocks: made before the prefill, dropped at the end.

    Args:
        cache: keys and values of its text.
        padding_mask `[B, P]`: True at slots that hold nothing to see.
        masks: of the blocks of each size.
    """

    cache: SlotCache
    padding_mask: torch.Tensor
    masks: dict[int, BlockMasks] = field(default_factory=dict, kw_only=True)

    def masks_for(
        self,
        slots: torch.Tensor,
        size: int,
        attention: BlockAttention,
        reach: int | None = None,
    ) -> BlockMasks:
        """Return the masks for blocks of `size` at `slots [B]`, which `BlockMasks.move` can update.

        They are new where buffers grew, and written again where rows moved further than they reach.
        """
        masks = self.masks.get(size)
        capacity = self.cache.capacity
        if masks is None or masks.padding_mask.shape[1] < capacity:
            padding_mask = pad_to(self.padding_mask, capacity)
            kinds = attention.mask_kinds
            masks = self.masks[size] = BlockMasks(padding_mask, slots, size, kinds, reach)
        elif masks.behind > masks.reach:
            masks.rebuild(slots)
        masks.behind = 0
        return masks

    def advance(self, num_slots: int) -> None:
        """Note that rows move on by this many slots at most."""
        for masks in self.masks.values():
            masks.behind += num_slots
