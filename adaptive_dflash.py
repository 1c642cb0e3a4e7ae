# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Choose in every cycle what brings the most tokens per second: a tree, a chain, a look-up, or nothing at all.

This file travels with every pushed draft. What a block costs was measured (`costs_dflash`), and is followed while
decoding. What it brings is estimated from the chances that the draft gives to its tokens, corrected by how often such
tokens were accepted. None of this changes the text. After CAST (arXiv 2610.00321) and CaDDTree (arXiv 2606.01813).

Shapes: B rows, Q block positions, T drafted positions, N nodes of a tree.
"""

import time
from collections import Counter
from typing import Any

import torch

from .costs_dflash import BLOCK_SIZES, CostTable, cost_table, known_costs
from .execution_dflash import BlockRunner
from .experience_dflash import Estimate, Experience
from .lookup_dflash import Lookup, Match, chain_of
from .proposals_dflash import (
    ChainProposer,
    Proposal,
    Proposer,
    TreeProposer,
    rooted,
    tree_proposal,
)
from .trees_dflash import Tree

CHOICES = ("plain", "chain", "tree", "lookup", "branch")
"""What a cycle may verify; a branch is a look-up beside a tree."""

SIZES = tuple(size - 1 for size in BLOCK_SIZES[1:])
"""Positions after the anchor to choose from: with it, the sizes whose costs are measured."""

WIDEST = 3.0
"""Trees that cost more than so many steps of plain decoding are not built."""

MEASURED_FROM = 64
"""New tokens from which on a text is long enough to measure costs that nobody knows, unless a tree is asked for."""

RECORDING_SECONDS = 0.15
"""What a size of blocks costs that is new to a decode, where blocks are recorded as CUDA graphs."""

RECORDING_BLOCKS = 4
"""The same in eager blocks, where operations are recorded."""

SAVED_PER_LAYER = 0.3e-3
"""Seconds for each layer that recorded operations are held to save in a block, before one was recorded."""

NOT_REPLAYED = 3
"""How many of the first blocks of a size run eagerly at most, where blocks are recorded: to record, and to compare."""

UNKNOWN_LENGTH = 1024
"""Tokens that are expected of a text without a limit."""

PENDING_LIMIT = 1024
"""Tokens of context that wait for the draft at most."""


class AutoProposer:
    """Proposes by experience once costs are known, and until then the draft's chain.

    Args:
        chain: the draft's own proposer.
        experiences: by the number of rows and the mode in which blocks run; it is added to.
        mode: "eager" or "graphs".
        kinds: to choose from.
        measured_from: new tokens from which on a text is long enough to measure costs that nobody knows; by default
            `MEASURED_FROM`.
    """

    def __init__(
        self,
        chain: ChainProposer,
        experiences: dict[Any, Experience],
        mode: str,
        kinds: tuple[str, ...] = CHOICES,
        measured_from: int | None = None,
    ):
        self.chain, self.experiences = chain, experiences
        self.mode = mode_of_costs(mode, chain.draft_state.noise_ids.device)
        self.selects = self.mode != mode
        self.kinds = kinds
        self.measured_from = MEASURED_FROM if measured_from is None else measured_from
        self.proposer: Proposer = chain
        self.has_begun = False

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        self.chain.append_context(features, first_slot)

    def propose(self, state: Any) -> Proposal:
        if not self.has_begun:
            self.has_begun = True
            self._begin(state)
        return self.proposer.propose(state)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        self.proposer.commit(features, slots)

    def _begin(self, state: Any) -> None:
        """Find what is known of such decodes, or measure where the text is long enough."""
        kinds = self.kinds
        if state.target_state.recurrent.states:  # branches cannot share it
            kinds = tuple(kind for kind in kinds if kind not in ("tree", "branch"))
        target, drafter = state.target, self.chain.drafter
        # They begin before costs are measured, which are those of eager blocks.
        runners = (target.runner, drafter.runner) if self.selects else ()
        selections = tuple(map(Selection, runners))
        experience = self._experience(state) if kinds else None
        if experience is None:
            for runner in runners:  # the chain has one size
                runner.asked = None
            return
        experience.pause = 0  # another text may suit the draft better
        experience.saved.first = SAVED_PER_LAYER * len(target.layers)
        # The head and the choice of tokens take about as long to start as another layer.
        experience.saved_drafting.first = SAVED_PER_LAYER * (1 + len(drafter.draft.layers))
        self.proposer = AdaptiveProposer(self.chain, experience, self.mode, kinds, selections)

    def _experience(self, state: Any) -> Experience | None:
        key = (len(state.anchor), self.mode)
        if key not in self.experiences:
            limit = state.sequences.stop_conditions.max_length
            is_long = limit - state.sequences.prompt.shape[1] >= self.measured_from
            costs = cost_table(state, self.mode) if is_long else known_costs(state, self.mode)
            if costs is None:
                return None
            self.experiences[key] = Experience(costs)
        return self.experiences[key]


class Selection:
    """Has blocks recorded, where recordings are of operations, if that saves more than it takes.

    Args:
        runner: of the blocks; from now on it records none that was not asked for.
    """

    def __init__(self, runner: BlockRunner):
        self.asked = runner.asked = set()
        self.blocks: Counter[int] = Counter()
        """By positions, how many blocks came since their recording was asked for."""

    def ask(self, size: int, expected: float, eager: float, recorded: float) -> None:
        """Ask for recordings of blocks of a size, if `expected` more of them will repay it.

        Args:
            eager: seconds that an eager block takes.
            recorded: seconds that a recorded one takes.
        """
        if self.blocks[size] or expected * (eager - recorded) > RECORDING_BLOCKS * eager:
            self.asked.add(size)
            self.blocks[size] += 1

    def has(self, size: int) -> bool:
        """Tell whether blocks of a size are recorded."""
        return self.blocks[size] > 0

    def is_usual(self, size: int) -> bool:
        """Tell whether the last block of a size took the time that the next ones will take."""
        return not 0 < self.blocks[size] <= NOT_REPLAYED

    def seconds(self, eager: float, recorded: float, share: float) -> float:
        """Return what blocks are to cost that are not recorded yet, if that is done where it pays.

        Args:
            share: of a recording that each of them has to repay.
        """
        return min(eager, recorded + RECORDING_BLOCKS * eager * share)


class AdaptiveProposer(TreeProposer):
    """Proposes what is expected to bring the most tokens per second.

    Args:
        chain: the draft's own proposer.
        mode: "eager" or "graphs".
        kinds: to choose from.
        selections: of the target's and of the draft's blocks to record; empty if none are selected.
    """

    def __init__(
        self,
        chain: ChainProposer,
        experience: Experience,
        mode: str,
        kinds: tuple[str, ...],
        selections: tuple[Selection, ...] = (),
    ):
        self.experience, self.mode = experience, mode
        self.kinds = kinds
        num_nodes = 1
        if "tree" in kinds:
            num_nodes = min(widest_tree(experience.costs), 2 * experience.widest_used + 1)
        super().__init__(chain.drafter, chain.draft_state, chain.sampler, num_nodes)
        experience.widest_used = max(1, experience.widest_used // 2)
        self.lookup = Lookup()
        self.matches: list[Match | None] = []
        self.chosen: Estimate | None = None
        self.lengths: list[int] = []
        """Generated tokens of each row when a block was proposed last."""
        self.started = 0.0
        self.uses: Counter[int] = Counter()
        """How often this decode has verified each size."""
        self.num_drafts = 0
        self.verified: Selection | None = None
        self.drafted: Selection | None = None
        if selections:
            self.verified, self.drafted = selections
        self.active: list[bool] = []
        self.tokens_left = 1

    def propose(self, state: Any) -> Proposal:
        self._learn(state)
        if "lookup" in self.kinds:
            self.matches = self.lookup.find(state, SIZES[-1])
        estimates = self._without_draft(state)
        best = max(estimates, key=rate_of)
        drafts = self._drafts(best)
        if drafts:
            best, proposal = self._draft(state, estimates[0])
        elif best.kind == "plain":
            proposal = Proposal(state.anchor)
        else:
            proposal = chain_of(self.matches, state, 1 + best.size)
        proposal.kind, proposal.reason = best.kind, str(best)
        self.chosen = best
        self.lengths = [len(tokens) for tokens in state.sequences.generated]
        self.uses[best.size] += 1
        self.experience.add_size(best.size, drafts)
        self._select(best, drafts)
        self.started = time.perf_counter()
        return proposal

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Take the features of the accepted path."""
        pending = self.draft_state.pending
        self.drafter.add_pending(self.draft_state, features, slots)
        if sum(context.features.shape[1] for context in pending) > PENDING_LIMIT:
            self.drafter.flush_pending(self.draft_state)

    # What the last cycle has shown

    def _learn(self, state: Any) -> None:
        """Compare the last cycle with what was expected of it."""
        chosen, experience = self.chosen, self.experience
        if chosen is None:
            return
        size, verified = chosen.size, self.verified
        is_recorded = verified is not None and verified.has(1 + size)
        if self._is_usual(self.uses[size], verified, 1 + size):
            elapsed = time.perf_counter() - self.started
            experience.add_cycle(chosen.kind, size, elapsed, is_recorded)
        new_tokens = []
        for length, tokens in zip(self.lengths, state.sequences.generated, strict=True):
            new_tokens.append(tokens[length:])
        experience.cycle_tokens.add(max(map(len, new_tokens)))
        for match, new in zip(self.matches, new_tokens, strict=bool(self.matches)):
            if match is not None and new:
                right = common(match.tokens, new)
                experience.odds_of(match).add(right, right + (right < len(new)))
        if chosen.masses and not state.sequences.row_ended:
            accepted = [len(new) - 1 for new in new_tokens]
            experience.add_accepted(chosen.kind, chosen.masses, accepted)

    # What may be chosen

    def _estimate(
        self, kind: str, size: int, masses: list[float], drafted: float, more: float = 0.0
    ) -> Estimate:
        """Return the estimate of a kind and size.

        Args:
            masses: as in `Estimate`.
            drafted: how many drafted tokens are expected to be accepted, over all rows.
            more: seconds of the cycle beside those of verifying.
        """
        rows = sum(self.active)
        tokens = min(rows + drafted, rows * self.tokens_left)
        seconds = self._cycle_seconds(kind, size, tokens / max(rows, 1)) + more
        if self.mode != "eager" and not self.uses[size]:
            # A cycle commits about three tokens.
            seconds += 3 * RECORDING_SECONDS / self.tokens_left
        return Estimate(kind, size, masses, tokens, seconds)

    def _cycle_seconds(self, kind: str, size: int, tokens: float) -> float:
        """Return what cycles cost that each bring `tokens` to a row, with recordings where those pay to the end."""
        experience = self.experience
        is_recorded = self.verified is not None and self.verified.has(1 + size)
        if is_recorded:
            return experience.cycle_seconds(kind, size, is_recorded=True)
        eager = experience.cycle_seconds(kind, size)
        if self.verified is None or kind in ("tree", "branch"):  # rarely of one size for long
            return eager
        recorded = experience.cycle_seconds(kind, size, is_recorded=True)
        return self.verified.seconds(eager, recorded, tokens / self.tokens_left)

    def _draft_seconds(self) -> float:
        """Return what drafting costs in the same way; a cycle commits about three tokens."""
        eager, recorded = self.experience.drafting
        if self.drafted is None:
            return eager
        if self.drafted.has(1):
            return recorded
        return self.drafted.seconds(eager, recorded, 3 / self.tokens_left)

    def _select(self, chosen: Estimate, drafts: bool) -> None:
        """Have blocks recorded that come often: of the chosen size, and of the draft."""
        if self.verified is None or self.drafted is None:
            return
        experience = self.experience
        cycles = self.tokens_left / experience.cycle_tokens.mean
        expected = cycles * experience.shares[chosen.size].mean
        eager = experience.cycle_seconds(chosen.kind, chosen.size)
        recorded = experience.cycle_seconds(chosen.kind, chosen.size, is_recorded=True)
        self.verified.ask(1 + chosen.size, expected, eager, recorded)
        if drafts:
            self.drafted.ask(1, cycles * experience.draft_share.mean, *experience.drafting)

    def _is_usual(self, uses: int, selection: Selection | None, size: int) -> bool:
        """Tell whether the last of `uses` blocks of `size` positions took the time that the next ones will take."""
        if selection is not None:
            return selection.is_usual(size)
        return self.mode == "eager" or uses > NOT_REPLAYED

    def _without_draft(self, state: Any) -> list[Estimate]:
        """Return the estimates of a plain step, which comes first, and of look-ups."""
        self.active = state.sequences.active
        self.tokens_left = tokens_left(state)
        found = [self._estimate("plain", 0, [], 0.0)]
        if "lookup" in self.kinds and any(self.matches):
            chances = self._match_chances()
            for size in SIZES:
                drafted = sum(geometric_sum(chance, size) for chance in chances)
                found.append(self._estimate("lookup", size, [], drafted))
        return found

    def _match_chances(self) -> list[float]:
        """Return for each row with a match the chance that its next token is right."""
        matches = [match for match in self.matches if match is not None]
        return [self.experience.odds_of(match).mean for match in matches]

    def _drafts(self, other: Estimate) -> bool:
        """Tell whether to ask the draft, where `other` is the best without it."""
        experience = self.experience
        if not {"chain", "tree"} & set(self.kinds):
            return False
        if experience.pause > 0 and "plain" in self.kinds:
            experience.pause -= 1
            return False
        known = experience.draft_rate
        return other.kind == "plain" or not known.weight or known.mean > other.rate

    def _draft(self, state: Any, plain: Estimate) -> tuple[Estimate, Proposal]:
        """Ask the draft; return the best of what can be made of its tree, and that."""
        started = time.perf_counter()
        tree = self.grow(state)
        spine, by_size = self._masses(tree, state)
        experience = self.experience
        self.num_drafts += 1
        self._learn_drafting(time.perf_counter() - started)
        seconds = self._draft_seconds()
        found = []
        if "chain" in self.kinds:
            for size in self._chain_sizes():
                found.append(self._of_draft("chain", size, spine[:size], seconds))
        for size, masses in by_size.items():
            found.append(self._of_draft("tree", size, masses, seconds))
            fits = 2 * size + 1 <= SIZES[-1]
            if fits and "branch" in self.kinds and any(self.matches):
                both = self._beside(masses, size + 1)
                found.append(self._of_draft("branch", 2 * size + 1, both, seconds))
        best = max(found, key=rate_of)
        if "plain" in self.kinds:
            experience.add_draft_rate(best.rate, plain.rate)
            nothing = self._estimate("plain", 0, [], 0.0, seconds)
            best = max(best, nothing, key=rate_of)
        return best, self._made_of(tree, state, best)

    def _learn_drafting(self, seconds: float) -> None:
        """Learn what drafting cost."""
        experience, known = self.experience, self.experience.draft_seconds
        is_usual = self._is_usual(self.num_drafts, self.drafted, 1)
        if self.drafted is not None and self.drafted.has(1):
            if is_usual:
                experience.saved_drafting.add(known.mean - seconds)
        elif is_usual or not known.weight:
            known.add(seconds)

    def _of_draft(self, kind: str, size: int, masses: list[float], seconds: float) -> Estimate:
        """Return an estimate of what the draft proposes, for `seconds` of drafting."""
        drafted = self.experience.odds[kind].corrected(masses)
        return self._estimate(kind, size, masses, drafted, seconds)

    def _beside(self, masses: list[float], size: int) -> list[float]:
        """Return in how many rows a tree or a look-up of `size` beside it is right, if they err independently."""
        rows, chances = sum(self.active), self._match_chances()
        found = []
        for depth in range(size):
            tree = masses[depth] / rows if depth < len(masses) else 0.0
            copied = sum(chance ** (depth + 1) for chance in chances) / rows
            found.append(rows * (tree + copied - tree * copied))
        return found

    def _chain_sizes(self) -> list[int]:
        whole = self.drafter.num_drafted
        return [*(size for size in SIZES if size < whole), whole]

    def _masses(self, tree: Tree, state: Any) -> tuple[list[float], dict[int, list[float]]]:
        """Return what the draft expects of the chain, by depth; and of the first nodes of the tree, by their number.

        This is the draft's one transfer to the host.
        """
        weights, spine = tree.weights, tree.spine_weights
        depths = spine.shape[1]
        if not all(self.active):
            active = torch.tensor(self.active, device=weights.device)[:, None]
            weights, spine = weights * active, spine * active
        by_depth = weights.new_zeros(len(weights), depths, weights.shape[1])
        by_depth.scatter_(1, tree.depths[:, None] - 1, weights[:, None])
        # A short block of few candidates has fewer paths.
        num_nodes = min(self.num_nodes, weights.shape[1])
        sizes = [size for size in SIZES if 1 < size <= num_nodes]
        columns = [spine.sum(dim=0)]
        if sizes:
            first = by_depth.sum(dim=0).cumsum(dim=-1)  # [T, N]
            columns += [first[:, size - 1] for size in sizes]
        of_spine, *others = torch.stack(columns).tolist()
        return of_spine, dict(zip(sizes, others, strict=True))

    # What was chosen

    def _made_of(self, tree: Tree, state: Any, best: Estimate) -> Proposal:
        """Return the proposal of an estimate, from what the draft returned."""
        if best.kind == "tree":
            self.experience.widest_used = max(self.experience.widest_used, best.size)
            return tree_proposal(state.anchor, tree, best.size)
        if best.kind == "branch":
            return self._branch(state, tree, best.size // 2)
        drafted = tree.spine_tokens[:, : best.size].to(state.anchor.device)
        return Proposal(torch.cat([state.anchor, drafted], dim=1))

    def _branch(self, state: Any, tree: Tree, size: int) -> Proposal:
        """Return the first `size` nodes of a tree, and as many tokens and one more of a look-up beside them."""
        tokens, parents = rooted(state.anchor, tree, size)
        copied = chain_of(self.matches, state, 2 + size).tokens[:, 1:]  # [B, size + 1]
        # Each of its tokens follows the one before it, and the first one the root.
        before = torch.arange(size, 2 * size + 1, device=copied.device)
        before = before.masked_fill(before == size, 0)
        parents = torch.cat([parents, before.expand_as(copied)], dim=1)
        tokens = torch.cat([tokens, copied], dim=1)
        return Proposal(tokens, parents, max_depth=max(self.drafter.num_drafted, 1 + size))


def mode_of_costs(mode: str, device: torch.device) -> str:
    """Return how most blocks run: recordings of operations take as long as several blocks, so sizes are selected."""
    return "eager" if mode == "graphs" and device.type != "cuda" else mode


def widest_tree(costs: CostTable) -> int:
    """Return how many nodes to build; 1 where no tree is worth it, which still tells the chances of the chain."""
    limit = WIDEST * costs.seconds(1)
    fitting = [size for size in SIZES if costs.seconds(1 + size) <= limit]
    return max(fitting, default=1)


def rate_of(estimate: Estimate) -> float:
    """Return the tokens per second of an estimate."""
    return estimate.rate


def common(first: list[int], second: list[int]) -> int:
    """Return how many tokens two lists have in common from their beginning."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def geometric_sum(chance: float, count: int) -> float:
    """Return chance + chance ** 2 + ..., `count` terms: the tokens to expect if each is right with that chance."""
    return count if chance >= 1 else chance * (1 - chance**count) / (1 - chance)


def tokens_left(state: Any) -> int:
    """Return how many tokens the row that is furthest may still get."""
    longest = max(len(tokens) for tokens in state.sequences.generated)
    limit = state.sequences.stop_conditions.max_length - state.sequences.prompt.shape[1]
    return max(1, min(limit - longest, UNKNOWN_LENGTH))
