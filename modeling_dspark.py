# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Extend the DFlash draft to DSpark: a bias by the token before, and the chance that a token is accepted.

This file travels with every pushed DSpark draft. After DSpark (arXiv 2607.05147) and its reference code,
deepseek-ai/DeepSpec.

The body is DFlash's. Its logits of a position are corrected by the token before it, W2 W1[token]. So the tokens of a
block are chosen one after the other, by small steps that never wait for the device.

Shapes: B batch, N positions that predict a token, H hidden size, R markov_rank, V the target's vocabulary, D that of
the draft: `draft_vocab_size`, or V.
"""

import torch
from torch import nn
from torch.nn.functional import embedding, pad
from transformers import initialization as init

from .configuration_dspark import DSparkConfig
from .drafter_dflash import Choice, Walk
from .modeling_dflash import DFlashDraftModel
from .trees_dflash import Candidates, likeliest, paired

TRAVELS_TOO = """
import .dspark
"""
"""As in `repository_dflash.py`."""


class BiasProjection(nn.Linear):
    """Project by W2, which is 0 in a fresh draft."""


class MarkovHead(nn.Module):
    """Compute biases by the token before, W2 W1[token]; the subclasses read the hidden states too.

    W1 is indexed by the target's tokens, W2 gives the draft's.
    """

    def __init__(self, config: DSparkConfig):
        super().__init__()
        vocab = config.vocab_size or 0  # the config requires it
        self.markov_w1 = nn.Embedding(vocab, config.markov_rank)
        drafted = config.draft_vocab_size or vocab
        self.markov_w2 = BiasProjection(config.markov_rank, drafted, bias=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return W1 of the target's `tokens [...]`, `[..., R]`."""
        # a target's head may be padded beyond its vocabulary
        return self.markov_w1(tokens.clamp_max(self.markov_w1.num_embeddings - 1))

    def step(
        self, embeds: torch.Tensor, states: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what W2 reads for one position, `[..., R]`, and the memory for the next.

        Args:
            embeds `[..., R]`: W1 of the token before.
            states `[..., H]`: the draft's.
            memory `[..., R]`: of the positions before; None at the first, and for heads that have none.
        """
        return embeds, None

    def biases(self, states: torch.Tensor, predecessors: torch.Tensor) -> torch.Tensor:
        """Return biases `[..., N, D]` of `states [..., N, H]` whose tokens before are `predecessors [..., N]`."""
        return self.markov_w2(self.mixed(states, predecessors))

    def mixed(self, states: torch.Tensor, predecessors: torch.Tensor) -> torch.Tensor:
        """Return what W2 reads for the same arguments, `[..., N, R]`."""
        return self.step(self.embed(predecessors), states, None)[0]


class GatedMarkovHead(MarkovHead):
    """Multiply W1[token] by a gate, which reads the hidden state too."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        rank = config.markov_rank
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank)

    def step(
        self, embeds: torch.Tensor, states: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate = torch.sigmoid(self.gate_proj(torch.cat([states, embeds], dim=-1)))
        return gate.to(embeds.dtype) * embeds, None


class RecurrentMarkovHead(MarkovHead):
    """Remember the tokens of the block: a gate mixes each into a memory, which the next position reads."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def step(
        self, embeds: torch.Tensor, states: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if memory is None:
            memory = torch.zeros_like(embeds, dtype=states.dtype)
        joined = torch.cat([memory, embeds, states], dim=-1)
        parts = self.joint_proj(joined).chunk(3, dim=-1)
        gate, candidate = torch.sigmoid(parts[0]), torch.tanh(parts[1])
        memory = gate * memory + (1 - gate) * candidate
        return torch.tanh(parts[2]), memory

    def mixed(self, states: torch.Tensor, predecessors: torch.Tensor) -> torch.Tensor:
        """Return `[..., N, R]`, as in `MarkovHead`; the memory is empty before the first position."""
        memory, steps = None, []
        for embeds, state in zip(
            self.embed(predecessors).unbind(-2), states.unbind(-2), strict=True
        ):
            mixed, memory = self.step(embeds, state, memory)
            steps.append(mixed)
        return torch.stack(steps, dim=-2)


MARKOV_HEADS = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RecurrentMarkovHead}
"""The heads by `markov_head_type`."""


class ConfidenceHead(nn.Module):
    """Estimate, as a logit, the chance that a token is accepted if those before it are."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.proj = nn.Linear(config.confidence_width, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., N]` of `features [..., N, H + R]`, or `[..., N, H]`, in float32."""
        return self.proj(features).squeeze(-1).float()


class DSparkDraftModel(DFlashDraftModel):
    """Draft as DSpark does. A fresh draft has no bias yet: it drafts as its body does."""

    config_class = DSparkConfig
    engines_files = ("dflash.py", "dspark.py")

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        config = self.config
        self.markov_head: MarkovHead | None = None
        if config.markov_rank:
            self.markov_head = MARKOV_HEADS[config.markov_head_type](config)
        self.confidence_head: ConfidenceHead | None = None
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the biases to 0, in a way that can be trained."""
        if isinstance(module, BiasProjection):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def corrected_logits(
        self, logits: torch.Tensor, states: torch.Tensor, predecessors: torch.Tensor
    ) -> torch.Tensor:
        """Return logits `[..., N, D]` of the draft's tokens with the bias of the tokens before them.

        Args:
            logits `[..., N, D]`: as `draft_logits` returns them.
            states `[..., N, H]`: of the positions of one block that predict a token, in order.
            predecessors `[..., N]`: the target's token before each predicted one; the anchor first.
        """
        if self.markov_head is None:
            return logits
        return logits + self.markov_head.biases(states, predecessors)

    def confidence_logits(
        self, states: torch.Tensor, predecessors: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the logits `[..., N]` of acceptance, in float32; None without a confidence head.

        Their sigmoid is the chance that a token is accepted if those before it are. For the arguments see
        `corrected_logits`.
        """
        if self.confidence_head is None:
            return None
        if self.markov_head is None or not self.config.confidence_head_with_markov:
            return self.confidence_head(states)
        embeds = self.markov_head.embed(predecessors).to(states.dtype)
        return self.confidence_head(torch.cat([states, embeds], dim=-1))

    def select_tokens(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk) -> Choice:
        """Return tokens chosen one after the other, and the chance of each; as in `DFlashDraftModel`."""
        tokens = self._walk(scores, states, walk)
        predecessors = torch.cat([walk.anchor, tokens[:, :-1]], dim=1)
        confidence = self.confidence_logits(states, predecessors)
        return Choice(tokens, None if confidence is None else confidence.sigmoid())

    def candidates(
        self, scores: torch.Tensor, states: torch.Tensor, walk: Walk, num_candidates: int
    ) -> Candidates:
        """Return the likeliest tokens of each position, after those of the position before where a bias reads them.

        A head that remembers more than one token gives its biases along the chain.
        """
        head = self.markov_head
        if head is None:
            return likeliest(scores, num_candidates)
        chain = self._walk(scores, states, walk)
        if isinstance(head, RecurrentMarkovHead):
            predecessors = torch.cat([walk.anchor, chain[:, :-1]], dim=1)
            biases = self.over_target_vocabulary(head.biases(states, predecessors))
            biases = pad(biases, (0, scores.shape[-1] - biases.shape[-1]))
            return likeliest(scores + walk.pair_scale * biases, num_candidates)
        return self._pairs(head, scores, states, walk, chain, num_candidates)

    def _pairs(
        self,
        head: MarkovHead,
        scores: torch.Tensor,
        states: torch.Tensor,
        walk: Walk,
        chain: torch.Tensor,
        num_candidates: int,
    ) -> Candidates:
        """Return the likeliest tokens, those of the `chain [B, N]` among them, with the chances of their pairs."""
        ids = self.target_ids
        known = self._known(head, scores)
        num_candidates = min(num_candidates, known.shape[-1])
        own = chain if ids is None else torch.searchsorted(ids, chain)
        # The chain's token comes first, once.
        first = known.scatter(-1, own[..., None], torch.inf)
        drafted = first.topk(num_candidates).indices  # [B, N, K]
        tokens = drafted if ids is None else ids[drafted]
        anchor = walk.anchor[:, None].expand(-1, 1, num_candidates)
        predecessors = torch.cat([anchor, tokens[:, :-1]], dim=1)
        states = states[:, :, None].expand(-1, -1, num_candidates, -1)
        mixed, _ = head.step(head.embed(predecessors), states, None)
        biases = mixed @ embedding(drafted, head.markov_w2.weight).mT  # [B, N, K, K]
        unary = known.gather(-1, drafted).float()[:, :, None]
        totals = unary + walk.pair_scale * biases.float()
        return Candidates(tokens, paired(known, drafted, totals), torch.zeros_like(chain))

    def _known(self, head: MarkovHead, scores: torch.Tensor) -> torch.Tensor:
        """Return those of `scores [B, N, V]` that are of the draft's tokens, in their order: `[B, N, D]`."""
        ids = self.target_ids
        if ids is not None:
            return scores[..., ids]
        # a target's head may be padded beyond its vocabulary, or lack the padding
        return scores[..., : head.markov_w2.out_features]

    def _walk(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk) -> torch.Tensor:
        """Return the best token of each position, given the one before it: `[B, N]`."""
        head = self.markov_head
        if head is None:
            return scores.argmax(dim=-1)
        ids = self.target_ids
        known = self._known(head, scores)
        memory, token = None, walk.anchor[:, 0]
        tokens = []
        for position in range(known.shape[1]):
            mixed, memory = head.step(head.embed(token), states[:, position], memory)
            bias = head.markov_w2(mixed)[:, : known.shape[-1]]
            best = (known[:, position] + walk.pair_scale * bias).argmax(dim=-1)
            token = best if ids is None else ids[best]
            tokens.append(token)
        return torch.stack(tokens, dim=1)


Qwen3DSparkModel = DSparkDraftModel
