# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute one step: the target's features of the text, the draft's states of the blocks, the loss, and the counts.

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions, N positions with a loss, H hidden size of
draft and target, F taps * target hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel

from ..compat_dflash import attention_name, detours
from ..drafter_dflash import layer_kinds
from ..kinds import kind_of
from ..taps_dflash import FeatureTaps
from ..target_dflash import decoder_layers, embed_noise
from .attention import GROUPED, GroupedMask
from .blocks import Blocks, PackedBatch, default_gamma, draw_given
from .features import LACKS_STATES
from .heads import HEADS, BlockStates, HeadInputs, confidence_loss
from .loading import is_parallel, whole_module
from .loss import Loss, LossInputs, weighted_loss
from .metrics import Counts, LossSums
from .mix import Mix
from .weights import DPaceWeights, FixedWeights, PositionWeights

Span = tuple[int, int, int]
"""Row, first column and length of a document."""


@dataclass(frozen=True)
class Recipe:
    """Say what the loss depends on beside the draft's config.

    Args:
        mix: the losses of a position and their weights; None for the published one of the kind of draft.
        weights: how positions are weighed: "decay", or "dpace" by what each adds to the accepted length.
        gamma: how slowly the weights fall inside a block with "decay"; None for the published value.
        dpace_alpha: smoothing of the chances that "dpace" multiplies.
        attention: "flex" (FlexAttention with a block mask), "dense", or "auto": flex on a GPU.
        selector_weight: weight of the selector's mean loss beside the draft's, for a draft with a selector.
        confidence_weight: likewise of the confidence head's.
        given_prefix: base of the weights by which the number of given tokens is drawn for each block; None for none.
        base_until: for a draft that corrects its logits by all tokens before. The share of uncorrected logits in the
            loss falls from 1 to 0 over this part of the run.
    """

    mix: Mix | None = None
    weights: str = "decay"
    gamma: float | None = None
    dpace_alpha: float = 0.5
    attention: str = "auto"
    selector_weight: float = 1.0
    confidence_weight: float = 1.0
    base_until: float = 1.0
    given_prefix: float | None = None


@dataclass(frozen=True)
class TargetOutput:
    """Hold what the target computes for a batch.

    Args:
        features `[B, S, F]`: context features; 0 at padding.
        last_hidden_state `[B, S, H]`: what its head reads; None where it was not asked for.
    """

    features: torch.Tensor
    last_hidden_state: torch.Tensor | None


def check_trainable(config: Any) -> None:
    """Refuse a draft whose loss is not implemented.

    Raises:
        ValueError: naming the kind or the field.
    """
    own = ("has_own_embed_tokens", "has_own_lm_head", "has_own_mask_embedding")
    for name in own:
        if getattr(config, name):
            raise ValueError(
                f"{name} is True; training such a draft is not implemented. Train one that has the target's embedding "
                "and head."
            )


class _LastTap(Exception):
    """End a forward of which no more is needed."""


def _stop(*args: Any) -> None:
    raise _LastTap


def mix_of(config: Any, recipe: Recipe) -> Mix:
    """Return the losses of a position of a draft with this config."""
    return Mix.parse(kind_of(config).loss) if recipe.mix is None else recipe.mix


def needs_target(config: Any, recipe: Recipe) -> bool:
    """Return whether the loss of a draft with this config needs the target's own distribution."""
    has_confidence = getattr(config, "enable_confidence_head", False)
    return mix_of(config, recipe).needs_target or has_confidence


class FrozenTarget:
    """Run the target for training: tapped features, embedding and head. Nothing of it learns."""

    def __init__(self, model: Any, taps: list[int]):
        self.model = model.eval().requires_grad_(False)
        self.decoder = model.get_decoder()
        self.is_compiled = any(name != "gradient_checkpointing" for _, name, _ in detours(model))
        text = model.config.get_text_config(decoder=True)
        self.taps = FeatureTaps(decoder_layers(model), tuple(taps), text.hidden_size)
        self.is_parallel = is_parallel(model)
        self.embed = whole_module(model.get_input_embeddings())
        self.head = whole_module(model.get_output_embeddings())
        self.soft_cap, self.vocab_size = (
            getattr(text, "final_logit_softcapping", None),
            text.vocab_size,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def run(self, batch: PackedBatch, last_hidden_state: bool) -> TargetOutput:
        """Run every document through the target; where it is spread over processes, those of all, one after the other.

        Args:
            last_hidden_state: whether to return the states that the head reads too.
        """
        if not self.is_parallel:
            return self._run(batch, last_hidden_state)
        batches: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(batches, (batch.input_ids.cpu(), batch.documents.cpu()))
        own = None
        for process, (ids, documents) in enumerate(batches):
            given = PackedBatch(ids.to(self.device), documents > 0, documents)
            found = self._run(given, last_hidden_state)
            if process == dist.get_rank():
                own = found
        assert own is not None
        return own

    def _run(self, batch: PackedBatch, last_hidden_state: bool) -> TargetOutput:
        """Run every document through the target from its own first token, so that nothing crosses between documents.

        Documents of about the same length form a batch, whatever rows they are in. A document's padding comes after
        it, where a causal model does not look; so no mask is needed, whatever layers the target has.

        Where the batch has features already, these are returned.

        Raises:
            ValueError: the batch has features, but not the states that are asked for.
        """
        if batch.features is not None:
            if last_hidden_state and batch.last_hidden_state is None:
                raise ValueError(LACKS_STATES)
            states = batch.last_hidden_state if last_hidden_state else None
            return TargetOutput(batch.features, states)
        shape = batch.input_ids.shape
        features = states = None
        for group in _group_by_length(batch.spans()):
            tokens = _Tokens.of(group, batch.input_ids.device)
            ids = batch.input_ids[tokens.rows, tokens.columns].to(self.device)
            with self.taps.collecting():
                output = self._forward(ids, whole=last_hidden_state)
                tapped = self.taps.pop()
            if features is None:
                features = tapped.new_zeros(*shape, tapped.shape[-1])
                states = (
                    output[0].new_zeros(*shape, output[0].shape[-1]) if last_hidden_state else None
                )
            tokens.put(tapped, features)
            if states is not None:
                tokens.put(output[0], states)
        return TargetOutput(torch.empty(0) if features is None else features, states)

    def _forward(self, ids: torch.Tensor, whole: bool) -> Any:
        """Run the target's decoder on `ids [D, L]`; not `whole`, only up to its last tap, and return None."""
        if whole or self.is_compiled:
            return self.decoder(input_ids=ids, use_cache=False)
        last = self.taps.layers[max(self.taps.ids)]
        hook = last.register_forward_hook(_stop)  # runs after the hook that collects
        with suppress(_LastTap):
            self.decoder(input_ids=ids, use_cache=False)
        hook.remove()
        return None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the target's own logits `[n, V]` for its `states [n, H]`."""
        logits = self.head(states)
        return (
            logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
        )

    def draft_logits(self, draft: Any, states: torch.Tensor) -> torch.Tensor:
        """Return the logits `[n, V]` of `draft` for its `states [n, H]`, computed as in decoding."""
        return draft.logits(
            states.to(next(self.head.parameters()).device, self.model.dtype), self.head
        )


@dataclass(frozen=True)
class _Tokens:
    """Locate the tokens of D documents in a batch, up to the length L of the longest.

    Args:
        rows, columns `[D, L]`: where each token is. Shorter documents repeat their last column.
        real `[D, L]`: False at those repetitions.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, group: list[Span], device: torch.device) -> "_Tokens":
        """Locate the tokens of documents, of which the first is the longest."""
        spans = torch.tensor(group, device=device)  # [D, 3]
        first, lengths = spans[:, 1:2], spans[:, 2:]
        steps = torch.arange(group[0][2], device=device)
        columns = first + steps.minimum(lengths - 1)
        return cls(spans[:, :1].expand_as(columns), columns, steps < lengths)

    def put(self, values: torch.Tensor, whole: torch.Tensor) -> None:
        """Write the values of the documents, `[D, L, W]`, into `whole [B, S, W]`."""
        real = self.real.to(whole.device)
        rows, columns = self.rows.to(whole.device), self.columns.to(whole.device)
        whole[rows[real], columns[real]] = values.to(whole.device)[real]


def _group_by_length(spans: list[Span]) -> list[list[Span]]:
    """Group documents, the longest of a group first and no other half as long or shorter, to keep the padding small.

    Example: lengths 9, 2, 5, 3 become the groups 9 5 and 3 2.
    """
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: -span[2]):
        if groups and 2 * span[2] > groups[-1][0][2]:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


# The objective --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepOutput:
    """Hold what a step computes.

    Args:
        sums: of losses and their weights; gradients flow through the losses.
        counts: of correct tokens, for each row.
        head_share: weight of a further head's mean loss beside the loss of the draft's logits.
    """

    sums: LossSums
    counts: Counts
    head_share: float

    @property
    def loss(self) -> torch.Tensor:
        """The sum of losses, to be divided by `Objective.divisor`, where one process has the whole batch."""
        return self.loss_among(torch.stack([self.sums.weight, self.sums.head_weight]))

    def loss_among(self, weights: torch.Tensor) -> torch.Tensor:
        """Return this process's sum of losses, to be divided by the divisors of all processes.

        As in the reference implementation, a selector's loss is a mean over the positions whose token is among its
        candidates. The mean of the draft's logits is over all positions.

        Args:
            weights `[2]`: the sum of weights of all positions, and of those with a candidate, over all processes.
        """
        scale = self.head_share * weights[0] / weights[1].clamp_min(1e-9)
        return self.sums.base + scale * self.sums.head


def _no_phase(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Objective:
    """Compute the loss of a draft on packed rows, and the counts from which accuracy and acceptance follow.

    Args:
        config: the draft's.
        target: the target model.
        loss: computes the loss from `(states [N, H], LossInputs, V)`; another function may be compared with it.
        phase: `with phase(name)` surrounds the parts "target", "draft" and "loss" of a step, to time them.
    """

    def __init__(
        self,
        config: Any,
        target: Any,
        recipe: Recipe,
        loss: Callable[[torch.Tensor, LossInputs, int], Loss] = weighted_loss,
        phase: Callable[[str], AbstractContextManager[Any]] = _no_phase,
    ):
        self.config, self.recipe = config, recipe
        self.loss, self.phase = loss, phase
        self.target = FrozenTarget(target, config.target_layer_ids)
        self.gamma = default_gamma(1 + config.num_drafted) if recipe.gamma is None else recipe.gamma
        self.mix = mix_of(config, recipe)
        self.head = kind_of(config).head
        self.has_confidence = getattr(config, "enable_confidence_head", False)

    @property
    def needs_target(self) -> bool:
        """Whether the loss needs the target's own distribution."""
        return needs_target(self.config, self.recipe)

    def blocks(
        self, batch: PackedBatch, anchors: torch.Tensor, draw: tuple[int, int] = (0, 0)
    ) -> Blocks:
        """Return the blocks after `anchors [B, A]`.

        Args:
            draw: seed and step, which determine what else is drawn.
        """
        size, base = self.config.block_size, self.recipe.given_prefix
        given = None if base is None else draw_given(batch, anchors, size, base, draw)
        return Blocks(batch, anchors, size, self.config.sample_from_anchor, given)

    def divisor(self, blocks: Blocks) -> torch.Tensor:
        """Return what the sum of losses of `blocks` is divided by.

        It is the sum of the weights; for D-PACE the number of blocks with a loss, as its authors have it, since there
        the weights are lengths: their sum divided by the blocks is what a block can gain.
        """
        if self.recipe.weights == "dpace":
            return blocks.block_loss_mask.any(-1).sum().float()
        return blocks.weights(self.gamma).sum()

    def __call__(self, draft: Any, blocks: Blocks, progress: float = 1.0) -> StepOutput:
        """Compute the loss and the counts of `blocks`.

        Args:
            draft: the model, wrapped or not.
            progress: the part of the run that is over, 0 to 1, for losses that change with it.
        """
        # The target has one dtype in training and in decoding. Only the draft's forward is in mixed precision.
        with torch.autocast(blocks.anchors.device.type, enabled=False):
            with self.phase("target"):
                target_output = self.target.run(blocks.batch, self.needs_target)
            noise_embeds = self.noise_embeds(blocks)
        with self.phase("draft"):
            states = self.states(draft, blocks, noise_embeds, target_output.features)
        with torch.autocast(blocks.anchors.device.type, enabled=False):
            unwrapped = extract_model_from_parallel(draft)
            heads = self.head_inputs(unwrapped, blocks, states, progress)
            inputs = self.loss_inputs(unwrapped, blocks, heads, target_output.last_hidden_state)
            with self.phase("loss"):
                states = states[blocks.block_loss_mask.flatten(1)]  # [N, H]
                loss = self.loss(states, inputs, self.target.vocab_size)
        found = (loss.correct, loss.is_candidate, loss.base_correct)
        has_loss = blocks.block_loss_mask[..., blocks.first :]
        counts = Counts.of(has_loss, *found, given=blocks.given)
        return StepOutput(self._sums(loss, heads), counts, self.head_share)

    @property
    def head_share(self) -> float:
        """The weight of the further head's loss."""
        return self.recipe.confidence_weight if self.has_confidence else self.recipe.selector_weight

    def _sums(self, loss: Loss, heads: HeadInputs) -> LossSums:
        """Return the sums of losses and of weights; the further head is a selector or a confidence head."""
        head, head_weight = loss.head_total, (loss.weights * loss.is_candidate).sum()
        if heads.confidence is not None:
            head = confidence_loss(heads.confidence, loss.overlap, loss.weights)
            head_weight = loss.weights.sum()
        return LossSums(loss.total, loss.weights.sum(), head, head_weight)

    def noise_embeds(self, blocks: Blocks) -> torch.Tensor:
        """Return the target's embeddings `[B, A * Q, H]` of each block's anchor and mask tokens."""
        return self._embed(blocks.noise_ids(self.config.mask_token_id))

    def states(
        self, draft: Any, blocks: Blocks, noise_embeds: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Return the draft's states `[B, A * Q, H]` of the blocks.

        Args:
            noise_embeds `[B, A * Q, H]`: the embedded blocks.
            features `[B, S, F]`: the target's context features.
        """
        weights = next(draft.parameters())
        make_mask = self._mask_maker(blocks, weights.dtype)
        masks = {}
        for name, kind in set(zip(self.config.layer_types, layer_kinds(self.config), strict=True)):
            masks[name, kind.causal] = make_mask(*kind)
        return draft(
            noise_embeds=noise_embeds.to(weights.device, weights.dtype),
            context_hidden_states=features.to(weights.device, weights.dtype),
            attention_mask=masks,
            position_ids=torch.cat([blocks.batch.positions, blocks.positions], dim=1),
        ).last_hidden_state

    def _mask_maker(self, blocks: Blocks, dtype: torch.dtype) -> Callable[..., Any]:
        """Return the function that makes the mask of a kind of layer, in the form that the draft's attention takes."""
        if self.flex(blocks.anchors.device):
            return blocks.flex_mask
        if attention_name(self.config) == GROUPED:
            return partial(GroupedMask.of, blocks, dtype)
        return blocks.dense_mask

    def attention(self, device: torch.device) -> str:
        """Return the name of the attention function that suits the draft on this device, for it to be set."""
        return "flex_attention" if self.flex(device) else GROUPED

    def flex(self, device: torch.device) -> bool:
        """Return whether blocks are masked by a `BlockMask` on this device."""
        if self.recipe.attention == "auto":
            return device.type == "cuda"
        return self.recipe.attention == "flex"

    def head_inputs(
        self, draft: Any, blocks: Blocks, states: torch.Tensor, progress: float = 1.0
    ) -> HeadInputs:
        """Return what the draft's heads contribute to the loss.

        Args:
            draft: the model itself, not wrapped.
            states `[B, A * Q, H]`: its states of whole blocks.
            progress: as in `__call__`.
        """
        if self.head is None:
            return HeadInputs()
        base_share = 0.0
        if progress < self.recipe.base_until:
            base_share = 1 - progress / self.recipe.base_until
        block = BlockStates.of(blocks, states, self._embed, base_share)
        return HEADS[self.head](draft, block)

    def loss_inputs(
        self,
        draft: Any,
        blocks: Blocks,
        heads: HeadInputs,
        last_hidden_state: torch.Tensor | None,
    ) -> LossInputs:
        """Return what the draft's states are scored against.

        Args:
            draft: the model itself, not wrapped.
            heads: what its heads contribute.
            last_hidden_state `[B, S, H]`: of the target, where the loss needs it; else None.
        """
        target_logits = None
        if last_hidden_state is not None:
            target_logits = partial(
                self._target_logits, _previous_states(blocks, last_hidden_state)
            )
        return LossInputs(
            partial(self.target.draft_logits, draft),
            labels=blocks.labels[blocks.block_loss_mask],
            weights=self.position_weights(blocks),
            mix=self.mix,
            target_logits=target_logits,
            correction=heads.correction,
            further_head=heads.further_head,
            wants_overlap=heads.confidence is not None,
        )

    def position_weights(self, blocks: Blocks) -> PositionWeights:
        """Return how the positions of `blocks` are weighed."""
        if self.recipe.weights == "dpace":
            return DPaceWeights(blocks.places, blocks.size - blocks.first, self.recipe.dpace_alpha)
        return FixedWeights(blocks.weights(self.gamma)[blocks.block_loss_mask])

    @torch.no_grad()
    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the target's embeddings `[..., H]` of tokens, as they enter a block."""
        ids = ids.to(self.target.device)
        return embed_noise(self.target.embed, ids, self.config.unscaled_embeddings)

    @torch.no_grad()
    def _target_logits(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """Return the target's logits `[n, V]` for a part of its `states [N, H]`."""
        return self.target.logits(states[part])


def _previous_states(blocks: Blocks, last_hidden_state: torch.Tensor) -> torch.Tensor:
    """Return `last_hidden_state [B, S, H]` at the token before each predicted one that has a loss, `[N, H]`.

    From these the target predicts the same tokens.
    """
    mask = blocks.block_loss_mask
    rows = torch.arange(len(mask), device=mask.device)[:, None, None].expand_as(mask)
    return last_hidden_state[rows[mask], blocks.predecessor_columns[mask]]
