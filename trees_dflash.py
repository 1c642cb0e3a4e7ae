# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Build trees of the likeliest texts after an anchor, on the device in fixed shapes.

This file travels with every pushed draft. One forward of a draft scores every position of a block. The weight of a path
is the product of the scores of its tokens. The N heaviest paths are a tree, since no path outweighs its beginning. So
they are the tree of N nodes with the most accepted tokens to expect, as in DDTree (arXiv 2604.12989). A beam of N paths
for each depth finds them exactly. Where a draft scores pairs of adjacent tokens, the same beam follows them, as in
UBTree (arXiv 2609.39972).

Shapes: B rows, T drafted positions, K candidates for each, V vocabulary, N nodes without the root, W paths of one
depth, M paths of all depths.
"""

from functools import lru_cache
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

import torch

NUM_CANDIDATES = 16
"""K at most. A tree of 128 nodes rarely asks for more."""

BRANCHES_PER_TOKEN = 2
"""So many nodes beside the spine may come before each of its tokens, however unlikely the draft holds it. The d-th is
among the first 3 d nodes: a tree of N nodes holds N / 3 tokens of the chain at least, or all of it."""


class Candidates(NamedTuple):
    """Hold the likeliest tokens of every position.

    Args:
        tokens `[B, T, K]`.
        log_probs `[B, T, A, K]`: their logarithms; A is 1 where a position does not depend on the token before it. Else
            A is K, the candidates of the position before; at the first position all A are the same.
        spine `[B, T]`: which candidates are the chain's.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    spine: torch.Tensor

    @property
    def spine_tokens(self) -> torch.Tensor:
        """The chain, `[B, T]`."""
        return self.tokens.gather(-1, self.spine[..., None])[..., 0]

    @property
    def usable(self) -> torch.Tensor:
        """The logarithms without NaN, which counts as no chance, and none above 0."""
        return self.log_probs.nan_to_num(nan=-torch.inf).clamp_max(0)


class Tree(NamedTuple):
    """Hold the nodes of a tree, without its root. The first n of them are a tree too, the best of that size.

    Args:
        tokens `[B, N]`.
        parents `[B, N]`: 0 for the root, and k for the k-th node.
        depths `[B, N]`: how far each node is from the root, 1 or more.
        weights `[B, N]`: the chance that the draft gives to the path from the root to each node.
        spine_tokens `[B, T]`: the chain, whether all of it is among the nodes or not.
        spine_weights `[B, T]`: the chance of each token of the chain.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    weights: torch.Tensor
    spine_tokens: torch.Tensor
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


def paired(scores: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the logarithms `[B, T, K, K]` of the chance of each candidate after each one before it.

    What is not among the candidates has the chance that `scores` alone give it.

    Args:
        scores `[B, T, V]`: of single tokens.
        tokens `[B, T, K]`: the candidates.
        pairs `[B, T, K, K]`: the scores of the candidates, the last K, after each candidate before.
    """
    scores = scores.float()
    best = scores.gather(-1, tokens).logsumexp(dim=-1)
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
    layout = _layout(widths, count, weights.device)
    order = _order(weights, layout)
    # A path of one token extends the root, whose place is 0.
    place = torch.zeros_like(order[:, :1]).expand(-1, 1 + order.shape[1]).contiguous()
    place.scatter_(1, 1 + order, layout.places.expand_as(order))
    nodes = order[:, :num_nodes]
    picked = chosen.gather(1, nodes)
    before = layout.before[nodes] + picked // count
    tokens = candidates.tokens.flatten(1).gather(1, layout.positions[nodes] + picked % count)
    weights = weights.exp()
    return Tree(
        tokens,
        place.gather(1, before * (layout.depths[nodes] > 1)),
        layout.depths[nodes],
        weights.gather(1, nodes),
        candidates.spine_tokens,
        weights[:, layout.firsts],
    )


class _Node(NamedTuple):
    """Hold a node of one row: its parent as in `Tree`, its depth, its last candidate, the logarithm of its weight."""

    parent: int
    depth: int
    candidate: int
    log_weight: float


class _Heap:
    """Grow the tree of one row, the heaviest path first.

    Args:
        log_probs: `[T, A, K]` as lists, see `Candidates`.
        spine: `[T]`.
    """

    def __init__(self, log_probs: list[list[list[float]]], spine: list[int]):
        self.log_probs, self.spine = log_probs, spine
        self.depends = len(log_probs[0]) > 1
        self.ranked: dict[tuple[int, int], list[int]] = {}
        """By depth and candidate before: the candidates after it, the likeliest first."""
        self.nodes: list[_Node] = []
        self.waiting: list[tuple[float, int, int, int]] = []
        """Paths that may come next: minus the logarithm of the weight, parent, candidate before, rank."""
        self.spine_ends = [0]
        """The root, and the nodes of the spine."""

    def grow(self, num_nodes: int) -> list[_Node]:
        """Return `num_nodes` nodes, or all that there are."""
        self._wait(0, 0, 0)
        spine_added = set()
        while self.waiting and len(self.nodes) < num_nodes:
            path = heappop(self.waiting)
            parent, before = path[1:3]
            rank = path[3]
            depth = self._depth(parent)
            candidate = self._ranked(depth, before)[rank]
            self._wait(parent, before, rank + 1)
            if (parent, candidate) in spine_added:
                continue
            of_spine = len(self.spine_ends)
            is_spine = parent == self.spine_ends[-1] and candidate == self.spine[depth]
            branches = len(self.nodes) + 1 - of_spine
            is_due = of_spine <= len(self.spine) and branches >= BRANCHES_PER_TOKEN * of_spine
            if is_due and not is_spine:
                end = self.spine_ends[-1]
                spine_added.add((end, self.spine[of_spine - 1]))
                self._add(end, self.spine[of_spine - 1], is_spine=True)
            if len(self.nodes) < num_nodes:
                self._add(parent, candidate, is_spine)
        return self.nodes

    def spine_weights(self) -> list[float]:
        """Return the logarithms of the weights of the spine's tokens."""
        before, total = 0, 0.0
        found = []
        for depth, candidate in enumerate(self.spine):
            total += self._given(depth, before)[candidate]
            found.append(total)
            before = candidate
        return found

    def _depth(self, parent: int) -> int:
        return self.nodes[parent - 1].depth if parent else 0

    def _given(self, depth: int, before: int) -> list[float]:
        return self.log_probs[depth][before if self.depends else 0]

    def _ranked(self, depth: int, before: int) -> list[int]:
        key = (depth, before if self.depends else 0)
        if key not in self.ranked:
            given = self._given(depth, before)
            self.ranked[key] = sorted(range(len(given)), key=given.__getitem__, reverse=True)
        return self.ranked[key]

    def _wait(self, parent: int, before: int, rank: int) -> None:
        """Let the path wait that extends a parent by its candidate of this rank, if there is one."""
        depth = self._depth(parent)
        if depth == len(self.log_probs):
            return
        ranked = self._ranked(depth, before)
        if rank < len(ranked):
            weight = self._weight(parent) + self._given(depth, before)[ranked[rank]]
            heappush(self.waiting, (-weight, parent, before, rank))

    def _weight(self, parent: int) -> float:
        return self.nodes[parent - 1].log_weight if parent else 0.0

    def _add(self, parent: int, candidate: int, is_spine: bool) -> None:
        depth = self._depth(parent)
        before = self.nodes[parent - 1].candidate if parent else 0
        weight = self._weight(parent) + self._given(depth, before)[candidate]
        self.nodes.append(_Node(parent, depth + 1, candidate, weight))
        if is_spine:
            self.spine_ends.append(len(self.nodes))
        self._wait(len(self.nodes), candidate, 0)


def tree_on_host(candidates: Candidates, num_nodes: int) -> Tree:
    """Return what `best_tree` does, from a heap in Python; of equal weights it may prefer another path.

    For eager blocks on a CPU, where each of the many small operations of `best_tree` takes as long as a node here.
    """
    log_probs = candidates.usable
    nodes: list[list[tuple[int, int, int]]] = []
    weights: list[list[float]] = []
    alongs: list[list[float]] = []
    for row, spine in zip(log_probs.tolist(), candidates.spine.tolist(), strict=True):
        heap = _Heap(row, spine)
        grown = heap.grow(num_nodes)
        nodes.append([(node.parent, node.depth, node.candidate) for node in grown])
        weights.append([node.log_weight for node in grown])
        alongs.append(heap.spine_weights())
    found = torch.tensor(nodes)  # [B, N, 3]
    depths = found[..., 1]
    count = candidates.tokens.shape[-1]
    return Tree(
        candidates.tokens.flatten(1).gather(1, (depths - 1) * count + found[..., 2]),
        found[..., 0],
        depths,
        torch.tensor(weights).exp(),
        candidates.spine_tokens,
        torch.tensor(alongs).exp(),
    )


class _Layout(NamedTuple):
    """Say where the paths of every length lie among all M, the shortest first. These are constants.

    Args:
        firsts `[T]`: the first path of each length.
        allowed `[T]`: how many branches may come before each token of the spine.
        num_allowed: one more than the largest of them.
        places `[M]`: 1, 2, 3 ...
        depths `[M]`: the length of each path.
        positions `[M]`: K times the position of its last token.
        before `[M]`: one more than where the paths begin that are one token shorter.
    """

    firsts: torch.Tensor
    allowed: torch.Tensor
    num_allowed: int
    places: torch.Tensor
    depths: torch.Tensor
    positions: torch.Tensor
    before: torch.Tensor


@lru_cache
def _layout(widths: tuple[int, ...], count: int, device: torch.device) -> _Layout:
    """Return the layout of so many paths of every length, with `count` candidates at each position."""
    firsts = list(accumulate(widths, initial=0))[:-1]
    depths: list[int] = []
    positions: list[int] = []
    before: list[int] = []
    for depth, width in enumerate(widths):
        depths += [1 + depth] * width
        positions += [count * depth] * width
        before += [1 + firsts[max(depth - 1, 0)]] * width
    most = len(depths) - 1
    allowed = [min(BRANCHES_PER_TOKEN * (1 + depth), most) for depth in range(len(widths))]
    places = list(range(1, 1 + len(depths)))

    def constant(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return _Layout(
        constant(firsts),
        constant(allowed),
        1 + allowed[-1],
        constant(places),
        constant(depths),
        constant(positions),
        constant(before),
    )


class _Level(NamedTuple):
    """Hold the heaviest paths of one length.

    Args:
        weights `[B, W]`: their logarithms.
        chosen `[B, W]`: K times the path that each extends, a place in the level before, plus its last candidate.
    """

    weights: torch.Tensor
    chosen: torch.Tensor


def _levels(candidates: Candidates, num_nodes: int) -> list[_Level]:
    """Return the heaviest paths of every length, `num_nodes` at most, the spine first."""
    log_probs = candidates.usable
    level = _Level(log_probs.new_zeros(len(log_probs), 1), candidates.spine[:, :1])
    levels = []
    for depth, following in enumerate(log_probs.unbind(dim=1)):  # [B, A, K]
        spine = candidates.spine[:, depth : depth + 1]
        level = _extended(level, following, spine, num_nodes)
        levels.append(level)
    return levels


def _extended(
    level: _Level, following: torch.Tensor, spine: torch.Tensor, num_nodes: int
) -> _Level:
    """Return the heaviest paths that are one token longer, the spine's first.

    Args:
        following `[B, A, K]`: as in `Candidates`, for one position.
        spine `[B, 1]`: the spine's candidate there.
    """
    if following.shape[1] > 1:
        count = following.shape[-1]
        last = level.chosen % count
        following = following.gather(1, last[..., None].expand(-1, -1, count))
    paths = (level.weights[..., None] + following).flatten(1)  # [B, W * K]
    # The first path is the spine's, and goes on as the spine, whatever else has its weight.
    ranked = paths.scatter(1, spine, torch.inf)
    chosen = ranked.topk(min(num_nodes, paths.shape[1])).indices
    return _Level(paths.gather(1, chosen), chosen)


def _order(weights: torch.Tensor, layout: "_Layout") -> torch.Tensor:
    """Return the paths `[B, M]` in the order of their weights, those of the spine moved forward.

    Every path comes after the one that it extends: of equal weights the shorter comes first.

    Args:
        weights `[B, M]`: by length.
    """
    branches = weights.index_fill(1, layout.firsts, -torch.inf)
    heaviest = branches.topk(layout.num_allowed).values
    # As many branches may come before each token of the spine; it then outweighs the next one.
    latest = heaviest[:, layout.allowed]
    above = torch.nextafter(latest, latest.new_full((), torch.inf))
    spine = weights[:, layout.firsts].maximum(above)
    keys = weights.index_copy(1, layout.firsts, spine)
    return keys.argsort(dim=1, descending=True, stable=True)
