# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Extend the DFlash draft to DFlash 2: a dynamic convolution around every sublayer, and a selector of one path.

This file travels with every pushed DFlash 2 draft. After DFlash 2
(inco.ai/blog/dflash2) and its reference implementation, z-lab/dflash.

Shapes: B batch, N positions of one or several blocks, Q block positions, H hidden size. K conv_kernel_size, G groups of
channels, R selector_rank, k selector_top_k, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers import initialization as init

from .configuration_dflash2 import DFlash2Config
from .drafter_dflash import Choice, Walk
from .modeling_dflash import DFlashDecoderLayer, DFlashDraftModel
from .trees_dflash import Candidates, paired

TRAVELS_TOO = """
import .dflash2
"""
"""As in `repository_dflash.py`."""


class DynamicConv(nn.Module):
    """Apply two convolutions over the positions of a block, one before a sublayer and one after it.

    conv(x)_t = sum over i of k_{t,i} x_{t-i}, channel by channel; positions before the block are zero. A kernel is a
    learned one plus a correction. The correction is predicted from the sublayer's input, and shared by a group of
    channels.
    """

    def __init__(self, config: DFlash2Config):
        super().__init__()
        self.taps, self.group_size = config.conv_kernel_size, config.conv_group_size
        self.block_size = config.block_size
        groups = config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * self.taps * groups, bias=False)

    def before(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sublayer's input, of `states [B, N, H]`; and the corrections `[B, N, K, G]` for `after`."""
        corrections = self.kernel_projection(states).unflatten(-1, (2, self.taps, -1))
        before, after = corrections.unbind(2)
        return self._convolve(states, before, 0), after

    def after(self, states: torch.Tensor, corrections: torch.Tensor) -> torch.Tensor:
        """Return the convolved output of the sublayer, `[B, N, H]`."""
        return self._convolve(states, corrections, 1)

    def _convolve(self, states: torch.Tensor, corrections: torch.Tensor, side: int) -> torch.Tensor:
        shape = (-1, min(self.block_size, states.shape[1]))
        blocks = states.unflatten(-1, (-1, self.group_size)).unflatten(1, shape)
        base = self.base_kernel[side].unflatten(-1, (-1, self.group_size))  # [K, G, channels]
        corrections = corrections[..., None].unflatten(1, shape)
        # A kernel is not put together, which would hold as much as the states, for each tap.
        result = torch.addcmul(blocks * corrections[..., 0, :, :], blocks, base[0])
        for tap in range(1, self.taps):
            earlier, later = blocks[:, :, :-tap], result[:, :, tap:]
            later.addcmul_(earlier, corrections[:, :, tap:, tap])
            later.addcmul_(earlier, base[tap])
        return result.flatten(1, 2).flatten(-2)


class CandidateSelector(nn.Module):
    """Score pairs of adjacent candidates: S_t(a, b) = U_t(b) + <A(a) * H(h_t), B(b)>."""

    def __init__(self, config: DFlash2Config):
        super().__init__()
        self.top_k = config.selector_top_k
        shape = (config.vocab_size or 0, config.selector_rank)  # the config requires vocab_size
        self.predecessor_codebook = nn.Parameter(torch.zeros(shape))
        self.successor_codebook = nn.Parameter(torch.zeros(shape))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def gates(self, states: torch.Tensor, predecessors: torch.Tensor) -> torch.Tensor:
        """Return A(a) * H(h), `[..., p, R]`, of `states [..., H]` and p `predecessors [..., p]` of each."""
        projected = self.hidden_projection(states).unsqueeze(-2)
        return embedding(predecessors, self.predecessor_codebook) * projected

    def pairs(
        self, scores: torch.Tensor, states: torch.Tensor, walk: Walk
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best candidates of each position, and the scores of all pairs of adjacent ones.

        Args:
            scores `[B, Q - 1, V]`: of single tokens.
            states `[B, Q - 1, H]`: the draft's.

        Returns:
            Tokens `[B, Q - 1, k]`, and scores `[B, Q - 1, k, k]`, predecessor by candidate.
        """
        # a target's head may be padded beyond its vocabulary
        known = len(self.predecessor_codebook)
        unary, candidates = scores[..., :known].topk(self.top_k)  # [B, Q - 1, k]
        first = walk.anchor.clamp_max(known - 1)[:, None].expand(-1, 1, self.top_k)
        predecessors = torch.cat([first, candidates[:, :-1]], dim=1)  # [B, Q - 1, k]
        gates = self.gates(states, predecessors)  # [B, Q - 1, k, R]
        pairs = gates @ embedding(candidates, self.successor_codebook).mT
        totals = unary.float()[:, :, None] + walk.pair_scale * pairs.float()
        return candidates, totals

    def path(self, totals: torch.Tensor) -> torch.Tensor:
        """Return the candidates of one path, `[B, Q - 1]`, of the scores that `pairs` returned.

        All pairs are scored at once. So this only gathers, and never waits for the device.
        """
        best = totals.argmax(dim=-1)  # [B, Q - 1, k]
        steps = [best[:, 0, :1]]
        for position in range(1, best.shape[1]):
            steps.append(best[:, position].gather(1, steps[-1]))
        return torch.cat(steps, dim=1)


class DFlash2DecoderLayer(DFlashDecoderLayer):
    """Compute DFlash 1's layer, with a convolution before and after attention and MLP."""

    def __init__(self, config: DFlash2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_conv, self.mlp_conv = DynamicConv(config), DynamicConv(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[B, N, H]` as in DFlash 1; the keywords are those of its attention."""
        states, corrections = self.attention_conv.before(self.input_layernorm(hidden_states))
        states, _ = self.self_attn(states, **kwargs)
        hidden_states = hidden_states + self.attention_conv.after(states, corrections)
        states, corrections = self.mlp_conv.before(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.mlp_conv.after(self.mlp(states), corrections)


class DFlash2DraftModel(DFlashDraftModel):
    """Draft as DFlash 2 does. A fresh draft drafts as a DFlash 1 draft with the same weights would."""

    config_class = DFlash2Config
    layer_class = DFlash2DecoderLayer
    engines_files = ("dflash.py", "dflash2.py")
    _no_split_modules = ["DFlash2DecoderLayer"]

    def __init__(self, config: DFlash2Config):
        super().__init__(config)
        self.candidate_selector = CandidateSelector(self.config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize convolutions to the identity, and the selector to scores of 0 that can be trained."""
        super()._init_weights(module)
        if isinstance(module, DynamicConv):
            kernel = torch.zeros_like(module.base_kernel)
            kernel[:, 0] = 1.0
            init.copy_(module.base_kernel, kernel)
            init.zeros_(module.kernel_projection.weight)
        if isinstance(module, CandidateSelector):
            init.normal_(module.predecessor_codebook, std=self.config.initializer_range)
            init.zeros_(module.successor_codebook)

    def scale_embeds(self, noise_embeds: torch.Tensor) -> torch.Tensor:
        """Return `noise_embeds [B, N, H]` scaled; in training they hold several blocks, one after the other.

        Raises:
            ValueError: N is not a multiple of the block size.
        """
        length, size = noise_embeds.shape[1], self.config.block_size
        scale = self.config.input_embedding_scale
        if length > size and length % size:
            raise ValueError(
                f"noise_embeds has {length} positions, which are no whole blocks of {size}."
            )
        return noise_embeds if scale == 1 else noise_embeds * scale

    def draft_logits(self, states: torch.Tensor, head: Any) -> torch.Tensor:
        """Return logits of the draft's tokens, of `states [..., H]`, multiplied and then soft-capped."""
        logits, cap = head(states), self.config.final_logit_softcapping
        if self.config.output_multiplier != 1:
            logits = logits * self.config.output_multiplier
        return cap * torch.tanh(logits / cap) if cap else logits

    def select_tokens(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk) -> Choice:
        """Return the path that the selector chooses; as in `DFlashDraftModel`."""
        tokens, totals = self.candidate_selector.pairs(scores, states, walk)
        path = self.candidate_selector.path(totals)
        return Choice(tokens.gather(-1, path[..., None])[..., 0])

    def candidates(
        self, scores: torch.Tensor, states: torch.Tensor, walk: Walk, num_candidates: int
    ) -> Candidates:
        """Return the selector's candidates, whose number the config gives, with the chances of their pairs."""
        tokens, totals = self.candidate_selector.pairs(scores, states, walk)
        return Candidates(
            tokens, paired(scores, tokens, totals), self.candidate_selector.path(totals)
        )


Qwen3DFlash2DraftModel = DFlash2DraftModel
