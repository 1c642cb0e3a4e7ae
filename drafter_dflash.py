# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run the draft's side of a decode: its context in slots of a cache, and its forward over a block.

This file travels with every pushed draft.

Shapes: B rows, N new positions, Q block positions, T drafted tokens, S slots of a buffer, V vocabulary, H hidden size
of the draft, F taps * target hidden size. T is Q where the anchor's position predicts a token, and else Q - 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from .attention_dflash import BlockAttention, BlockState, LayerKind, pad_to
from .cache_dflash import SlotCache
from .compat_dflash import device_of_inputs, dtype_of_inputs
from .execution_dflash import BlockRunner, as_written
from .target_dflash import embed_noise
from .trees_dflash import NUM_CANDIDATES, Tree, best_tree, tree_on_host


class Walk(NamedTuple):
    """Hold what a draft needs to choose tokens that depend on each other.

    Args:
        anchor `[B, 1]`: the token before the first.
        embed: returns the embeddings `[B, N, H]` of tokens `[B, N]`, as they enter the block; for drafts that read
            them.
        pair_scale: factor of what the draft adds to the scores of single tokens.
    """

    anchor: torch.Tensor
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None
    pair_scale: float = 1.0


class Choice(NamedTuple):
    """Hold the tokens that a draft chose, `[B, T]`.

    `confidence [B, T]` is the chance that each is accepted if those before it are; None if the draft estimates none.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor | None = None


class DraftOutput(NamedTuple):
    """Hold what a draft returned for the positions of a block that predict a token.

    Args:
        logits `[B, T, V]`: on the device of the target's tokens.
        states `[B, T, H]`: hidden states, on the draft's device.
        tokens `[B, T]`: what it proposes by its logits alone.
        confidence `[B, T]`: as in `Choice`, on the draft's device; None beside a tree.
        tree: the tree of likely texts by its logits alone, on the draft's device; None where none was asked for.
    """

    logits: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor | None = None
    tree: Tree | None = None


@dataclass
class PendingContext:
    """Hold context features that reach the draft with its next block.

    Args:
        features `[B, N, F]`: of committed tokens in the order of the text; those of rejected ones may follow.
        slots `[B]`: of the first of them.
    """

    features: torch.Tensor
    slots: torch.Tensor


@dataclass
class DraftState(BlockState):
    """Hold what a draft has of one decode.

    Args:
        position_offset `[B, 1]`: position minus slot.
        noise_ids `[B, Q - 1]`: mask tokens.
        steps `[C + Q]`: of each position of a block's context, and then of the block, from its first one.
        pending: context that is not cached yet, in the order of the text.
        num_nodes: of the tree that a block returns; 0 for none.
    """

    position_offset: torch.Tensor
    noise_ids: torch.Tensor
    steps: torch.Tensor
    pending: list[PendingContext] = field(default_factory=list)
    num_nodes: int = 0

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the positions in each row's text of `slots [B, N]`."""
        return (slots + self.position_offset).clamp_min(0)

    def hide(self, hidden: torch.Tensor) -> None:
        """Hide those of the first slots that hold no context of this draft: `[B, L]`, True where it is missing."""
        num_slots = hidden.shape[1]
        padding_mask = pad_to(self.padding_mask, num_slots).clone()
        hidden = hidden.to(padding_mask.device)
        padding_mask[:, :num_slots] |= hidden
        self.padding_mask = padding_mask


class Drafter:
    """Run a draft's forwards while it proposes blocks. It holds no tensors between decodes.

    Args:
        draft: the draft model.
        target: whose embeddings and head it uses, where it has none of its own.
    """

    def __init__(self, draft: Any, target: Any):
        self.draft, self.size = draft, draft.config.block_size
        self.num_drafted = draft.config.num_drafted
        self.embed, self.head = embedding_and_head(draft, target)
        self.head_dtype = dtype_of_inputs(self.head, target.dtype)
        self.num_embedded = len(target.get_input_embeddings().weight)
        self.attention = BlockAttention(draft, layer_kinds(draft.config))
        self.no_masks = dict.fromkeys(draft.config.layer_types)
        self.runner = BlockRunner(
            self._run_block,
            lambda state: (state.cache.length, state.cache.capacity, state.num_nodes),
        )

    @property
    def verified_size(self) -> int:
        """Positions that the target verifies: the anchor and the drafted tokens."""
        return 1 + self.num_drafted

    @contextmanager
    def decoding(self, padding_mask: torch.Tensor, mode: str) -> Iterator[DraftState]:
        """Make the state for one decode.

        Args:
            padding_mask `[B, P]`: True at the prompt's slots of padding.
            mode: "eager", "graphs" or "compile".
        """
        # A model looks for its weights whenever it is asked for these.
        self.device = self.draft.device
        self.dtype = self.draft.dtype
        shape = (len(padding_mask), self.size - 1)
        noise_ids = torch.full(shape, self.draft.config.mask_token_id, device=padding_mask.device)
        padding_mask = padding_mask.to(self.device)
        # The slot at which each row's text begins.
        first = (~padding_mask).int().argmax(dim=1, keepdim=True)
        cache = SlotCache(DynamicCache(config=self.draft.config))
        numbers = [*range(self.verified_size), *range(self.size)]
        steps = torch.tensor(numbers, device=padding_mask.device)
        with as_written(self.draft), self.runner.using(mode), self.attention.installed():
            yield DraftState(cache, padding_mask, -first, noise_ids, steps)

    def cache_context(self, state: DraftState, features: torch.Tensor, first_slot: int) -> None:
        """Cache the context features `[B, N, F]` of the slots from `first_slot` on, the same in every row."""
        last_slot = first_slot + features.shape[1]
        slots = torch.arange(first_slot, last_slot, device=self.device)
        self.cache_at(state, features, slots.expand(len(features), -1))

    def add_pending(self, state: DraftState, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Let context features `[B, N, F]` from `slots [B]` on reach the draft before or with its next block."""
        state.advance(features.shape[1])
        # A copy: a recorded block of the target writes to the same features again.
        features = features.to(self.device, self.dtype, copy=True)
        state.pending.append(PendingContext(features, slots.to(self.device)))

    def flush_pending(self, state: DraftState) -> None:
        """Cache the pending context now. The slots of rejected tokens are overwritten by whatever follows."""
        if not state.pending:
            return
        parts = []
        for context in state.pending:
            steps = torch.arange(context.features.shape[1], device=self.device)
            parts.append(context.slots[:, None] + steps)
        features = torch.cat([context.features for context in state.pending], dim=1)
        state.pending = []
        self.cache_at(state, features, *parts)

    def cache_at(self, state: DraftState, features: torch.Tensor, *parts: torch.Tensor) -> None:
        """Cache the context features `[B, N, F]` of slots, `[B, n]` for each part of the N.

        Where parts share slots, the later one counts.
        """
        parts = tuple(part.to(self.device) for part in parts)
        slots = torch.cat(parts, dim=1)
        state.cache.reserve(int(slots.max()) + 1)
        self.draft.extend_cache(
            self._to_draft(features), state.positions(slots), state.cache.at(*parts)
        )
        state.cache.check_written(slots.shape[1], "the draft")

    def draft_block(
        self, state: DraftState, anchor: torch.Tensor, slots: torch.Tensor, num_slots: int
    ) -> DraftOutput:
        """Run a block of noise after `anchor [B, 1]`.

        Args:
            slots `[B]`: of each row's anchor.
            num_slots: slots that the longest row needs, its block included.
        """
        own_slots = slots.to(self.device)
        context = self._context(state, own_slots)
        state.cache.reserve(num_slots + self.verified_size - self.size)
        # A cycle usually moves a row by all verified positions at most.
        reach = self.verified_size
        masks = state.masks_for(own_slots, self.size, self.attention, reach)
        with self.attention.under(masks):
            output: DraftOutput = self.runner(
                state, anchor, context.features, context.slots, own_slots
            )
        # Grown by Python, which a recorded block leaves out.
        if state.num_nodes and output.tree is None:
            walk = Walk(anchor.to(slots.device), self._embed)
            scores = output.logits.to(slots.device)
            tree = self._tree(scores, output.states, walk, state.num_nodes)
            output = output._replace(tokens=tree.spine_tokens, tree=tree)
        return output._replace(
            logits=output.logits.to(slots.device), tokens=output.tokens.to(slots.device)
        )

    def choose(
        self, scores: torch.Tensor, output: DraftOutput, anchor: torch.Tensor, pair_scale: float
    ) -> Choice:
        """Return the tokens that the draft proposes by `scores [B, T, V]` in place of its logits.

        Args:
            pair_scale: what drafts whose tokens depend on each other multiply their corrections by.
        """
        own = output.states.device
        walk = Walk(anchor.to(own), self._embed, pair_scale)
        choice = self.draft.select_tokens(scores.to(own), output.states, walk)
        return choice._replace(tokens=choice.tokens.to(scores.device))

    def grow(
        self,
        scores: torch.Tensor,
        output: DraftOutput,
        anchor: torch.Tensor,
        pair_scale: float,
        num_nodes: int,
    ) -> Tree:
        """Return the tree of `num_nodes` likely texts by `scores [B, T, V]` in place of its logits."""
        own = output.states.device
        walk = Walk(anchor.to(own), self._embed, pair_scale)
        return self._tree(scores.to(own), output.states, walk, num_nodes)

    def _context(self, state: DraftState, slots: torch.Tensor) -> PendingContext:
        """Return the context to run with a block at `slots [B]`, in its usual shape; the rest is cached.

        Usually all of it goes with the block. What is missing in length are zeros, whose slots the block overwrites.
        """
        pending, size = state.pending, self.verified_size
        last = pending.pop() if pending and pending[-1].features.shape[1] <= size else None
        self.flush_pending(state)
        if last is None:
            shape = (len(slots), 0, self.draft.config.fc_width)
            empty = torch.zeros(shape, device=slots.device, dtype=self.dtype)
            last = PendingContext(empty, slots)
        missing = size - last.features.shape[1]
        if not missing:
            return last
        return PendingContext(pad(last.features, (0, 0, 0, missing)), last.slots)

    def _run_block(
        self,
        state: DraftState,
        anchor: torch.Tensor,
        context: torch.Tensor,
        context_slots: torch.Tensor,
        slots: torch.Tensor,
    ) -> DraftOutput:
        """Run the block. What changes from cycle to cycle are the arguments."""
        masks = state.masks[self.size]
        masks.move(slots)
        sizes = [context.shape[1], self.size]
        first = torch.cat(
            [
                context_slots[:, None].expand(-1, sizes[0]),
                slots[:, None].expand(-1, sizes[1]),
            ],
            dim=1,
        )
        all_slots = first + state.steps  # [B, C + Q]
        # Rejected positions of the context share their slots with the block, which is written after it.
        view = state.cache.at(*all_slots.split(sizes, dim=1))
        noise_ids = torch.cat([anchor, state.noise_ids], dim=1)
        noise_embeds = self._embed(noise_ids)
        positions = all_slots + state.position_offset
        output = self.draft(noise_embeds, context, self.no_masks, positions, view)
        states = output.last_hidden_state[:, -self.num_drafted :]
        if not torch.compiler.is_compiling():
            state.cache.check_written(positions.shape[1], "the draft")
            layers = set(range(len(self.draft.layers)))
            self.attention.check_layers(layers, "the draft")
        head_device = device_of_inputs(self.head, states.device)
        head_states = states.to(head_device, self.head_dtype)
        logits = self.draft.logits(head_states, self.head)
        if logits.shape[-1] > self.num_embedded:
            logits = logits.index_fill(-1, self._beyond(logits), -torch.inf)
        walk = Walk(anchor.to(slots.device), self._embed)
        scores = logits.to(slots.device)
        is_recorded = self.runner.mode == "graphs"
        if state.num_nodes and not (is_recorded and self._grows_on_host(scores)):
            tree = self._tree(scores, states, walk, state.num_nodes)
            return DraftOutput(logits, states, tree.spine_tokens, tree=tree)
        return DraftOutput(logits, states, *self.draft.select_tokens(scores, states, walk))

    def _tree(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk, num_nodes: int) -> Tree:
        num_candidates = min(NUM_CANDIDATES, num_nodes)
        candidates = self.draft.candidates(scores, states, walk, num_candidates)
        grow = tree_on_host if self._grows_on_host(scores) else best_tree
        return grow(candidates, num_nodes)

    def _grows_on_host(self, scores: torch.Tensor) -> bool:
        """Tell whether trees are grown in Python, which no recording can hold."""
        return self.runner.mode != "compile" and scores.device.type == "cpu"

    def _beyond(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the tokens of `logits [B, T, V]` that the target has no embedding of."""
        return torch.arange(self.num_embedded, logits.shape[-1], device=logits.device)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `[B, N, H]` of tokens `[B, N]`, on the draft's device."""
        ids = ids.to(device_of_inputs(self.embed, ids.device))
        if self.draft.embed_tokens is not None:
            ids = ids.clamp_max(self.draft.config.vocab_size - 1)  # of a target with rows added
        embeds = embed_noise(self.embed, ids, self.draft.config.unscaled_embeddings)
        return self._to_draft(embeds)

    def _to_draft(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.device, self.dtype)


def embedding_and_head(draft: Any, target: Any) -> tuple[Any, Any]:
    """Return the embedding and the head that a draft uses: its own, or the target's.

    A part of the draft's own that equals the target's gives its memory back: it becomes a view of the target's.
    """
    parts = []
    for name, targets in (
        ("embed_tokens", target.get_input_embeddings()),
        ("lm_head", target.get_output_embeddings()),
    ):
        own = getattr(draft, name)
        if own is not None and not draft.training:
            share_equal(own, targets)
        parts.append(targets if own is None else own)
    return parts[0], parts[1]


@torch.no_grad()
def share_equal(own: Any, targets: Any) -> None:
    """Let the weight `[V, H]` of the draft's module be the target's memory, if all values are equal."""
    weight, other = own.weight, targets.weight
    if (weight.device, weight.dtype, weight.shape) != (other.device, other.dtype, other.shape):
        return
    if weight.data_ptr() != other.data_ptr() and torch.equal(weight, other):
        own.weight = torch.nn.Parameter(other.detach(), requires_grad=weight.requires_grad)


def layer_kinds(config: Any) -> list[LayerKind]:
    """Return what each layer of a draft lets a query see."""
    kinds = []
    for kind, causal in zip(config.layer_types, config.causal_layers, strict=True):
        window = config.sliding_window if kind == "sliding_attention" else None
        kinds.append(LayerKind(window, causal, config.window_from_anchor))
    return kinds
