# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What one step computes: the target's features of the text, the draft's states of the blocks, loss and counts.

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions, N counted positions, H hidden size of draft
and target, F taps * target hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from ..drafter_dflash import layer_kinds
from ..taps_dflash import FeatureTaps
from ..target_dflash import decoder_layers, embed_noise
from .blocks import Blocks, Rows, default_gamma
from .loss import Scores, Selection, weighted_loss


@dataclass(frozen=True)
class Recipe:
    """What the loss depends on beside the draft's config.

    Args:
        gamma: how slowly the weights fall inside a block; None for the published one.
        distillation: share of the divergence from the target's own distribution in the loss, 0 to 1.
        selector_weight: of the selector's cross-entropy beside the draft's, for DFlash 2.
        attention: "flex" (FlexAttention with a block mask), "dense", or "auto": flex on a GPU.
    """

    gamma: float | None = None
    distillation: float = 0.0
    attention: str = "auto"
    selector_weight: float = 1.0


class FrozenTarget:
    """The target as the trainer uses it: features of the tapped layers, embedding and head; nothing of it learns."""

    def __init__(self, model: Any, taps: list[int]):
        self.model = model.eval().requires_grad_(False)
        self.decoder = model.get_decoder()
        text = model.config.get_text_config(decoder=True)
        self.taps = FeatureTaps(decoder_layers(model), tuple(taps), text.hidden_size)
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.soft_cap, self.vocab_size = getattr(text, "final_logit_softcapping", None), text.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def read(self, rows: Rows, final: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context features `[B, S, F]`, and the states `[B, S, H]` that its head reads if `final` asks for them.

        Every document goes through the target from its own first token on, beside others of about its length, so that
        whatever layers the target has, a document knows nothing of its neighbours in the row. A document's padding
        comes after it, where a causal model does not look; so no mask is needed.
        """
        features = states = torch.empty(0)
        for number, group in enumerate(_alike(rows.spans())):
            longest = group[0][2]
            row = torch.tensor([span[0] for span in group], device=rows.input_ids.device)[:, None]
            first = torch.tensor([span[1] for span in group], device=rows.input_ids.device)[:, None]
            lengths = torch.tensor([span[2] for span in group], device=rows.input_ids.device)[:, None]
            steps = torch.arange(longest, device=rows.input_ids.device)
            columns = first + steps.minimum(lengths - 1)
            with self.taps.collecting():
                output = self.decoder(input_ids=rows.input_ids[row, columns].to(self.device), use_cache=False)
                tapped = self.taps.pop()
            if number == 0:
                features = tapped.new_zeros(*rows.input_ids.shape, tapped.shape[-1])
                states = output[0].new_zeros(*rows.input_ids.shape, output[0].shape[-1]) if final else states
            kept = (steps < lengths).to(tapped.device)
            where = [index.to(tapped.device) for index in (row.expand_as(columns), columns)]
            features[where[0][kept], where[1][kept]] = tapped[kept]
            if final:
                states[where[0][kept], where[1][kept]] = output[0].to(states.device)[kept.to(states.device)]
        return features, states if final else None

    def own_logits(self, states: torch.Tensor) -> torch.Tensor:
        """The target's own logits `[n, V]` after `states [n, H]`."""
        logits = self.head(states)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def draft_logits(self, draft: Any, states: torch.Tensor) -> torch.Tensor:
        """The logits `[n, V]` of `draft` from its `states [n, H]`, as when decoding."""
        return draft.logits(states.to(next(self.head.parameters()).device, self.model.dtype), self.head)


class Objective:
    """The loss of a draft on rows of text, and the counts from which accuracy and acceptance follow."""

    def __init__(self, config: Any, target: Any, recipe: Recipe):
        self.config, self.recipe = config, recipe
        self.target = FrozenTarget(target, config.target_layer_ids)
        self.gamma = default_gamma(config.block_size) if recipe.gamma is None else recipe.gamma

    def blocks(self, rows: Rows, anchors: torch.Tensor) -> Blocks:
        return Blocks(rows, anchors, self.config.block_size)

    def __call__(self, draft: Any, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of losses, to be divided by the sum of weights, and counts `[B, 5, Q - 1]`, see `count`.

        Args:
            draft: the model, wrapped or not.
        """
        # A target has one dtype in training and in decoding; only the draft's forward is in mixed precision.
        with torch.autocast(blocks.anchors.device.type, enabled=False):
            features, final = self.target.read(blocks.rows, self.recipe.distillation > 0)
            noise_embeds = embed_noise(
                self.target.embed, blocks.noise_ids(self.config.mask_token_id).to(self.target.device)
            )
        states = self.states(draft, blocks, noise_embeds, features)
        states = states[blocks.counted.flatten(1)]  # [N, H]
        with torch.autocast(blocks.anchors.device.type, enabled=False):
            scores = self._scores(extract_model_from_parallel(draft), blocks, states, final)
            loss = weighted_loss(states, scores, self.target.vocab_size)
        return loss, count(blocks.counted, scores.correct, scores.found)

    def states(self, draft: Any, blocks: Blocks, noise_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The draft's states `[B, A * Q, H]` of the blocks, from `noise_embeds [B, A * Q, H]`, `features [B, S, F]`."""
        flex = self.flex(blocks.anchors.device)
        kinds = set(zip(self.config.layer_types, layer_kinds(self.config), strict=True))
        make = blocks.flex_mask if flex else blocks.dense_mask
        weights = next(draft.parameters())
        return draft(
            noise_embeds=noise_embeds.to(weights.device, weights.dtype),
            context_hidden_states=features.to(weights.device, weights.dtype),
            attention_mask={(name, causal): make(window, causal) for name, (window, causal) in kinds},
            position_ids=torch.cat([blocks.rows.positions, blocks.positions], dim=1),
        ).last_hidden_state

    def flex(self, device: torch.device) -> bool:
        """Whether blocks are masked by a `BlockMask` on this device."""
        wanted = self.recipe.attention
        return wanted == "flex" or (wanted == "auto" and device.type == "cuda")

    def _scores(self, draft: Any, blocks: Blocks, states: torch.Tensor, final: torch.Tensor | None) -> Scores:
        """What the draft's `states [N, H]` are scored against."""
        counted = blocks.counted
        scores = Scores(
            partial(self.target.draft_logits, draft),
            blocks.tokens[counted],
            blocks.weights(self.gamma)[counted],
            distillation=self.recipe.distillation,
        )
        if final is not None:
            before = blocks.columns[counted] - 1  # [N], whose distribution the target has for the token
            row = torch.arange(len(counted), device=counted.device)[:, None, None].expand_as(counted)[counted]
            own = final[row, before]  # [N, H]

            def teacher(part: slice) -> torch.Tensor:
                with torch.no_grad():
                    return self.target.own_logits(own[part])

            scores.teacher = teacher
        selector = getattr(draft, "candidate_selector", None)
        if selector is not None:
            before = blocks.tokens.roll(1, dims=-1)[counted]  # [N], the true token before each position
            gates = selector.gates(states.to(selector.hidden_projection.weight.dtype), before[:, None])[:, 0]
            weight = self.recipe.selector_weight
            scores.selection = Selection(gates, selector.successor_codebook, selector.top_k, weight)
        return scores


def _alike(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Documents in groups, the longest of a group first and no other less than half as long: padding stays small."""
    groups: list[list[tuple[int, int, int]]] = []
    for span in sorted(spans, key=lambda span: -span[2]):
        if groups and 2 * span[2] > groups[-1][0][2]:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def count(counted: torch.Tensor, correct: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """What adds up to figures: `[B, 5, Q - 1]`, for each row and position k of its blocks how many

    0. were counted, 1. of those were right, 2. were counted with all before them right, 3. of those were right, 4. had
    the text's token among the candidates of a DFlash 2 draft.

    Args:
        counted `[B, A, Q]`: positions with something to learn.
        correct `[N]`: of the counted ones, in order, whether the draft's token was the text's.
        found `[N]`: of those, whether the text's token was a candidate.
    """
    right, candidate = torch.zeros_like(counted), torch.zeros_like(counted)
    right[counted], candidate[counted] = correct, found
    counted, right, candidate = counted[..., 1:], right[..., 1:], candidate[..., 1:]
    kept = right.int().cumprod(-1).bool()
    reached = counted & torch.nn.functional.pad(kept[..., :-1], (1, 0), value=True)
    return torch.stack([part.sum(1) for part in (counted, right, reached, kept, candidate)], dim=1)


@dataclass(frozen=True)
class Figures:
    """What counts amount to.

    Args:
        accuracy: share of right tokens over all positions.
        by_position: the same for each position after the anchor.
        acceptance_length: tokens per cycle to expect, the target's own included: 1 + the sum over k of the chance
            that positions 1 to k are all right. A position counts where its block reaches it, so a block at the end of
            a text does not weigh it down.
        candidate_recall: of a DFlash 2 draft, share of positions whose token was among the selector's candidates; 0
            for a draft without a selector.
        selector_accuracy: share of right tokens over those positions.
    """

    accuracy: float
    by_position: tuple[float, ...]
    acceptance_length: float
    candidate_recall: float
    selector_accuracy: float

    @classmethod
    def of(cls, counts: torch.Tensor) -> "Figures":
        """From counts `[5, Q - 1]`, summed over whatever they shall cover."""
        counted, right, reached, kept, found = counts.double().cpu()
        by_position = right / counted.clamp_min(1)
        survival = (kept / reached.clamp_min(1)).cumprod(0)
        shares = [right.sum() / counted.sum(), found.sum() / counted.sum(), right.sum() / found.sum()]
        accuracy, recall, selector = (float(share.nan_to_num(posinf=0.0)) for share in shares)
        return cls(accuracy, tuple(by_position.tolist()), 1 + float(survival.sum()), recall, selector)

    def named(self) -> dict[str, float]:
        """For a log; the selector's only of a draft that has one."""
        chosen = {"candidate_recall": self.candidate_recall, "selector_accuracy": self.selector_accuracy}
        figures = {"accuracy": self.accuracy, "acceptance_length": self.acceptance_length}
        return figures | (chosen if self.candidate_recall else {})
