# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Trees of the likeliest texts after an anchor, built on the device in fixed shapes.

This file travels with every pushed draft. One forward of a draft scores every position of a block. The weight of a path
is the product of the scores of its tokens. The N heaviest paths are a tree, since no path outweighs its beginning. So
they are the tree of N nodes with the most accepted tokens to expect, as in DDTree (arXiv 2604.12989). A beam of N paths
for each depth finds them exactly. Where a draft scores pairs of adjacent tokens, the same beam follows them, as in
UBTree (arXiv 2609.39972).

Shapes: B rows, T drafted positions, K candidates for each, V vocabulary, N nodes without the root, W paths of one
depth, M paths of all depths.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

NUM_CANDIDATES = 16
"""K at most. A tree of 128 nodes rarely asks for more."""

BRANCHES_PER_TOKEN = 2
"""So many nodes beside the spine may come before each of its tokens, however unlikely the draft holds it. The d-th is
among the first 3 d nodes: a tree of N nodes holds N / 3 tokens of the chain at least, or all of it."""


class Candidates(NamedTuple):
    """The likeliest tokens of every position.

    Args:
        tokens `[B, T, K]`.
        log_probs `[B, T, A, K]`: their logarithms; A is 1 where a position does not depend on the token before it. Else
            A is K, the candidates of the position before; at the first position all A are the same.
        spine `[B, T]`: which candidates are the chain's.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    spine: torch.Tensor


class Tree(NamedTuple):
    """The nodes of a tree, without its root. The first n of them are a tree too, the best of that size.

    Args:
        tokens `[B, N]`.
        parents `[B, N]`: 0 for the root, and k for the k-th node.
        depths `[B, N]`: how far each node is from the root, 1 or more.
        weights `[B, N]`: the chance that the draft gives to the path from the root to each node.
        spine_weights `[B, T]`: the same of the chain's tokens, whether they are among the nodes or not.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    weights: torch.Tensor
    spine_weights: torch.Tensor


def likeliest(scores: torch.Tensor, num_candidates: int) -> Candidates:
    """Return the likeliest tokens of positions that do not depend on each other.

    Args:
        scores `[B, T, V]`: logits.
    """
    scores = scores.float()
    top = scores.topk(min(num_candidates, scores.shape[-1]))
    log_probs = top.values - scores.logsumexp(dim=-1, keepdim=True)
    return Candidates(top.indices, log_probs[:, :, None], top.indices.new_zeros(scores.shape[:2]))


def paired(scores: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the logarithms `[B, T, K, K]` of the chance of each candidate after each one before it.

    What is not among the candidates has the chance that `scores` alone give it.

    Args:
        scores `[B, T, V]`: of single tokens. The K candidates have the best of them.
        pairs `[B, T, K, K]`: the scores of the candidates, the last K, after each candidate before.
    """
    scores = scores.float()
    best = scores.topk(pairs.shape[-1]).values.logsumexp(dim=-1)
    whole = scores.logsumexp(dim=-1)
    others = whole + torch.log1p(-(best - whole).exp().clamp_max(1))  # [B, T]
    total = pairs.logsumexp(dim=-1).logaddexp(others[..., None])
    return pairs - total[..., None]


def best_tree(candidates: Candidates, num_nodes: int) -> Tree:
    """Return the heaviest paths, the heaviest first; and the spine, the paths of the chain, not far behind.

    A draft that is too sure of a wrong branch would push the spine out of a small tree.

    Args:
        num_nodes: N.
    """
    count = candidates.tokens.shape[-1]
    levels = _levels(candidates, num_nodes)
    weights = torch.cat([level.weights for level in levels], dim=1)  # [B, M]
    chosen = torch.cat([level.chosen for level in levels], dim=1)
    widths = tuple(level.weights.shape[1] for level in levels)
    depths, firsts, firsts_before = _layout(widths, weights.device)
    tokens = candidates.tokens.flatten(1).gather(1, depths * count + chosen % count)
    order = _order(weights, firsts)
    places = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    place = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    # A path of one token extends the root.
    before = place.gather(1, firsts_before + chosen // count)
    parents = torch.where(depths > 0, before, 0)
    nodes = order[:, :num_nodes]
    return Tree(
        tokens.gather(1, nodes),
        parents.gather(1, nodes),
        1 + depths.expand_as(order).gather(1, nodes),
        weights.gather(1, nodes).exp(),
        weights[:, firsts].exp(),
    )


@lru_cache
def _layout(
    widths: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return where the paths of every length lie, if there are `widths` of them: constants, made once.

    Returns:
        For each path its length minus one, `[M]`; the first path of each length, `[T]`; and for each path the first of
        those that are one token shorter, `[M]`.
    """
    firsts = list(accumulate(widths, initial=0))[:-1]
    depths, before = [], []
    for depth, width in enumerate(widths):
        depths += [depth] * width
        before += [firsts[max(depth - 1, 0)]] * width
    return (
        torch.tensor(depths, device=device),
        torch.tensor(firsts, device=device),
        torch.tensor(before, device=device),
    )


class _Level(NamedTuple):
    """The heaviest paths of one length.

    Args:
        weights `[B, W]`: their logarithms.
        chosen `[B, W]`: K times the path that each extends, a place in the level before, plus its last candidate.
    """

    weights: torch.Tensor
    chosen: torch.Tensor


def _levels(candidates: Candidates, num_nodes: int) -> list[_Level]:
    """Return the heaviest paths of every length, `num_nodes` at most, the spine first."""
    log_probs = candidates.log_probs.nan_to_num(nan=-torch.inf).clamp_max(0)
    count = log_probs.shape[-1]
    weights = log_probs.new_zeros(len(log_probs), 1)
    last = torch.zeros_like(weights, dtype=torch.long)
    levels = []
    for depth in range(log_probs.shape[1]):
        following = log_probs[:, depth]  # [B, A, K]
        if following.shape[1] > 1:
            index = last[..., None].expand(-1, -1, count)
            following = following.gather(1, index)
        paths = (weights[..., None] + following).flatten(1)  # [B, W * K]
        width = min(num_nodes, paths.shape[1])
        # The path in the first place is the spine's, which goes on from itself.
        first = candidates.spine[:, depth : depth + 1]
        chosen = paths.scatter(1, first, torch.inf).topk(width).indices
        weights = paths.gather(1, chosen)
        last = chosen % count
        levels.append(_Level(weights, chosen))
    return levels


def _order(weights: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """Return the paths `[B, M]` in the order of their weights, those of the spine moved forward.

    Every path comes after the one that it extends: of equal weights the shorter comes first.

    Args:
        weights `[B, M]`: by depth.
        firsts `[T]`: the first path of every length, which is the spine's.
    """
    order = weights.argsort(dim=1, descending=True, stable=True)
    is_branch = torch.ones_like(order).index_fill_(1, firsts, 0)
    # How many branches come before each path in that order.
    branches = is_branch.gather(1, order)
    before = torch.empty_like(order).scatter_(1, order, branches.cumsum(dim=1) - branches)
    steps = torch.arange(1, len(firsts) + 1, device=weights.device)
    allowed = before[:, firsts].minimum(BRANCHES_PER_TOKEN * steps)
    # A path of the spine comes right before the branch of the same number.
    key = before.float().index_copy(1, firsts, allowed - 1 + steps / (len(firsts) + 1))
    return key.argsort(dim=1)
