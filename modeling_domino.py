# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Extend the DFlash draft to Domino: logits are corrected by a recurrent state of the tokens chosen before.

This file travels with every pushed Domino draft. After Domino (arXiv 2605.29707); names of tensors are the published
ones.

Shapes: B batch, T drafted tokens of a block, H hidden size, E width of the target's embeddings, G gru_hidden_dim,
V vocabulary of the head.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers import initialization as init

from .configuration_domino import DominoConfig
from .drafter_dflash import Choice, Walk
from .modeling_dflash import DFlashDraftModel
from .trees_dflash import Candidates, likeliest

TRAVELS_TOO = """
import .domino
"""
"""As in `repository_dflash.py`."""


class PrefixGRU(nn.Module):
    """Run a `torch.nn.GRU` of one layer without biases, a step at a time, because a step decides on the next token."""

    def __init__(self, config: DominoConfig):
        super().__init__()
        width = config.gru_hidden_dim
        self.weight_ih_l0 = nn.Parameter(torch.zeros(3 * width, config.hidden_size))
        self.weight_hh_l0 = nn.Parameter(torch.zeros(3 * width, width))

    def initial_state(self, shape: torch.Size) -> torch.Tensor:
        """Return the state `[..., G]` before the first token, for blocks of this shape."""
        return self.weight_hh_l0.new_zeros(*shape, self.weight_hh_l0.shape[1])

    def step(self, embeds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the state `[..., G]` after a token.

        Args:
            embeds `[..., E]`: of the token.
            state `[..., G]`: before it.
        """
        width = state.shape[-1]
        read = linear(embeds.to(self.weight_ih_l0.dtype), self.weight_ih_l0)
        held = linear(state, self.weight_hh_l0)
        gates = torch.sigmoid(read[..., : 2 * width] + held[..., : 2 * width])
        reset, update = gates.chunk(2, dim=-1)
        new = torch.tanh(read[..., 2 * width :] + reset * held[..., 2 * width :])
        return new + update * (state - new)


class DominoDraftModel(DFlashDraftModel):
    """Draft as Domino does: choose the tokens of a block one after another."""

    config_class = DominoConfig
    engines_files = ("dflash.py", "domino.py")

    def __init__(self, config: DominoConfig):
        super().__init__(config)
        own = self.config
        self.prefix_gru = PrefixGRU(own)
        self.embed_proj = nn.Sequential(
            nn.Linear(own.hidden_size + own.gru_hidden_dim, own.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(own.emb_dim, own.vocab_size or 0, bias=False),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the recurrent weights too, as torch does."""
        super()._init_weights(module)
        if isinstance(module, PrefixGRU):
            bound = self.config.gru_hidden_dim**-0.5
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)

    def correction(
        self, states: torch.Tensor, prefix: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """Return what is added to logits, in the dtype and over the tokens of `like [..., V]`.

        A target's head may be padded beyond the vocabulary; nothing is added there.

        Args:
            states `[..., H]`: the draft's.
            prefix `[..., G]`: of the GRU.
        """
        added = self.embed_proj[2](self.correction_features(states, prefix))
        return pad(added, (0, like.shape[-1] - added.shape[-1])).to(like.dtype)

    def correction_features(self, states: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Return what the last matrix of the correction reads, `[..., emb_dim]`; for the arguments see `correction`."""
        features = torch.cat([states.to(prefix.dtype), prefix], dim=-1)
        return self.embed_proj[1](self.embed_proj[0](features))

    def prefixes(
        self, predecessors: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the states `[B, T, G]` of the GRU after each token before a drafted one.

        Args:
            predecessors `[B, T]`: those tokens, the anchor first.
            embed: returns the embeddings `[B, T, E]` of tokens `[B, T]`.
        """
        prefix, prefixes = self.prefix_gru.initial_state(predecessors.shape[:-1]), []
        for embeds in embed(predecessors).unbind(dim=-2):
            prefix = self.prefix_gru.step(embeds, prefix)
            prefixes.append(prefix)
        return torch.stack(prefixes, dim=-2)

    def select_tokens(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk) -> Choice:
        """Return the best tokens of a block, each by its score and the correction of those before.

        Args:
            scores `[B, T, V]`: of single tokens.
            states `[B, T, H]`: the draft's.

        Raises:
            ValueError: the walk has no embeddings.
        """
        embed = embedding_of(walk)
        token, chosen = walk.anchor, []
        prefix = self.prefix_gru.initial_state(walk.anchor.shape)  # [B, 1, G]
        for position in range(scores.shape[1]):
            prefix = self.prefix_gru.step(embed(token), prefix)
            found = scores[:, position : position + 1]
            if position >= self.config.pure_draft_prefix_len:
                state = states[:, position : position + 1]
                found = found + walk.pair_scale * self.correction(state, prefix, found)
            token = found.argmax(dim=-1)
            chosen.append(token)
        return Choice(torch.cat(chosen, dim=1))

    def candidates(
        self, scores: torch.Tensor, states: torch.Tensor, walk: Walk, num_candidates: int
    ) -> Candidates:
        """Return the likeliest tokens of each position, each after the chain's tokens before it."""
        chain = self.select_tokens(scores, states, walk).tokens
        predecessors = torch.cat([walk.anchor, chain[:, :-1]], dim=1)
        nothing = torch.zeros_like(scores)
        added = self.corrected_logits(nothing, states, predecessors, embedding_of(walk))
        return likeliest(scores + walk.pair_scale * added, num_candidates)

    def corrected_logits(
        self,
        logits: torch.Tensor,
        states: torch.Tensor,
        predecessors: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the logits `[B, T, V]` of blocks whose tokens are known, as a walk that chose them would see them.

        Args:
            logits `[B, T, V]`: of single tokens.
            states `[B, T, H]`: the draft's.
            predecessors `[B, T]`: the token before each drafted one, the anchor first.
            embed: returns the embeddings `[B, T, E]` of tokens `[B, T]`.
        """
        pure = self.config.pure_draft_prefix_len
        gru = self.prefixes(predecessors, embed)[..., pure:, :]
        alone, later = logits[..., :pure, :], logits[..., pure:, :]
        corrected = later + self.correction(states[..., pure:, :], gru, later)
        return torch.cat([alone, corrected], dim=-2)


def embedding_of(walk: Walk) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what embeds the tokens of a walk.

    Raises:
        ValueError: the walk has no embeddings.
    """
    if walk.embed is None:
        raise ValueError(
            "A Domino draft reads the tokens that it chooses: pass Walk(..., embed=...)."
        )
    return walk.embed
