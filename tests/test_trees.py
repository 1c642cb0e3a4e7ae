"""Trees of the likeliest texts: the best of their size, exact in every family, and drawn with the target's noise."""

import itertools
import math

import pytest
import torch

import tiny
from dflash_hub import DecodeStatistics, trees_dflash
from dflash_hub.drafter_dflash import Walk
from dflash_hub.proposals_dflash import Proposal, TreeProposer, ancestors, paths, tree_proposal
from dflash_hub.trees_dflash import Candidates, best_tree, likeliest, paired, tree_on_host

pytestmark = pytest.mark.usefixtures("unchecked")

RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "nemotron_h")
KINDS = {
    "dflash": {},
    "dflash2": tiny.SECOND,
    "dspark": tiny.DSPARK,
    "dspark-rnn": tiny.DSPARK | {"markov_head_type": "rnn"},
    "dspark-gated": tiny.DSPARK | {"markov_head_type": "gated"},
    "domino": tiny.DOMINO,
}


def all_paths(log_probs):
    """Every path through the candidates `[T, A, K]` of one row, with the logarithm of its weight."""
    found = {}
    depths, given, count = log_probs.shape
    for depth in range(1, depths + 1):
        for path in itertools.product(range(count), repeat=depth):
            before, weight = 0, 0.0
            for position, candidate in enumerate(path):
                weight += log_probs[position, before if given > 1 else 0, candidate].item()
                before = candidate
            found[path] = weight
    return found


def some_candidates(given, seed, count=4):
    """Candidates of two rows and four positions, whose tokens say where they stand; in `given` ways."""
    torch.manual_seed(seed)
    scores = 2 * torch.randn(2, 4, given, count)
    if given > 1:
        scores[:, 0] = scores[:, 0, :1]
    log_probs = scores.log_softmax(dim=-1)
    spine = torch.zeros(2, 4, dtype=torch.long)
    if given == 1:
        log_probs = log_probs.sort(dim=-1, descending=True).values
    else:
        for row, position in itertools.product(range(2), range(4)):
            before = spine[row, position - 1] if position else 0
            spine[row, position] = log_probs[row, position, before].argmax()
    return Candidates(torch.arange(2 * 4 * count).view(2, 4, count), log_probs, spine)


def paths_of(tree, candidates, row):
    """The candidates on the path to each node of a tree."""
    found = {0: ()}
    for number, (token, parent) in enumerate(zip(tree.tokens[row], tree.parents[row], strict=True), 1):
        assert parent < number, "a parent comes before its children"
        before = found[int(parent)]
        assert tree.depths[row, number - 1] == 1 + len(before)
        choices = candidates.tokens[row, len(before)].tolist()
        found[number] = (*before, choices.index(int(token)))
    return [found[number] for number in range(1, len(found))]


@pytest.mark.quick
@pytest.mark.parametrize("given", [1, 4], ids=["marginal", "pairs"])
@pytest.mark.parametrize("size", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("build", [best_tree, tree_on_host])
@pytest.mark.parametrize("seed", range(2))
def test_a_tree_has_the_heaviest_paths_of_all_and_the_beginning_of_the_spine(given, size, build, seed, monkeypatch):
    candidates = some_candidates(given, seed)
    free = 10**6
    for branches in (free, trees_dflash.BRANCHES_PER_TOKEN):
        monkeypatch.setattr(trees_dflash, "BRANCHES_PER_TOKEN", branches)
        trees_dflash._layout.cache_clear()
        tree = build(candidates, size)
        for row in range(2):
            weights = all_paths(candidates.log_probs[row])
            found = paths_of(tree, candidates, row)
            assert len(set(found)) == size
            for path, weight in zip(found, tree.weights[row], strict=True):
                assert math.isclose(weight, math.exp(weights[path]), rel_tol=1e-4)
            best = sorted(weights, key=lambda path: -weights[path])[:size]
            if branches == free and (given == 1 or size >= 5):
                assert set(found) == set(best)
            spine = tuple(candidates.spine[row].tolist())
            for number in range(1, size + 1):
                for depth in range(1, 1 + min(4, number // (1 + branches))):
                    assert spine[:depth] in found[:number]
            assert tree.spine_tokens[row].tolist() == [candidates.tokens[row, d, k].item() for d, k in enumerate(spine)]
            expected = [math.exp(weights[spine[: depth + 1]]) for depth in range(4)]
            assert torch.allclose(tree.spine_weights[row], torch.tensor(expected), rtol=1e-4)
    trees_dflash._layout.cache_clear()


@pytest.mark.parametrize("build", [best_tree, tree_on_host])
def test_certain_tokens_impossible_tokens_and_broken_scores_still_make_a_tree(build):
    scores = torch.full((1, 3, 6), -torch.inf)
    scores[:, :, 2] = 0.0  # the only token at every position: all weights on its path are equal
    scores[:, 1, 3] = torch.nan
    for size in (1, 3, 9):
        tree = build(likeliest(scores, 4), size)
        assert tree.tokens.shape == (1, size)
        assert bool((tree.parents <= torch.arange(size)).all())
        pairs = set(zip(tree.parents[0].tolist(), tree.tokens[0].tolist(), strict=True))
        assert len(pairs) == size, "no two children of a node are the same token"


def test_pairs_share_the_chance_that_the_single_tokens_give_to_the_candidates():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 9)
    top = scores.topk(4)
    same = top.values[:, :, None].expand(-1, -1, 4, -1)
    expected = scores.log_softmax(dim=-1).topk(4).values
    assert torch.allclose(paired(scores, top.indices, same), expected[:, :, None].expand_as(same), atol=1e-5)


def inputs_of(draft, target, rows=3):
    """Scores, states and the walk of random blocks."""
    torch.manual_seed(1)
    number = draft.config.num_drafted
    states = torch.randn(rows, number, draft.config.hidden_size)
    anchor = torch.arange(rows)[:, None]
    head = draft.lm_head or target.lm_head
    return draft.logits(states, head), states, Walk(anchor, target.get_input_embeddings())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_spine_of_every_kind_is_the_chain_that_it_proposes(kind):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **KINDS[kind])
    arguments = inputs_of(draft, target)
    chain = draft.select_tokens(*arguments).tokens
    tree = best_tree(draft.candidates(*arguments, 6), 30)
    assert torch.equal(tree.spine_tokens, chain)
    for row in range(3):
        found = paths(torch.cat([torch.tensor([[-1]]), tree.parents[row : row + 1]], dim=1))[0]
        texts = [[tree.tokens[row, node - 1].item() for node in path[1:]] for path in found]
        assert chain[row].tolist() in texts


@torch.no_grad()
def test_a_dspark_tree_scores_pairs_as_its_chain_does_and_knows_a_reduced_vocabulary():
    target = tiny.target("qwen3")
    draft = tiny.reduce(tiny.draft(target, **tiny.DSPARK, **tiny.REDUCED))
    scores, states, walk = inputs_of(draft, target)
    found = draft.candidates(scores, states, walk, 9)
    ids = draft.target_ids
    assert bool(torch.isin(found.tokens, ids).all())
    for first in range(9):
        before = found.tokens[:, 0, first]
        bias = draft.markov_head.biases(states[:, 1:2], before[:, None])[:, 0]
        expected = (scores[:, 1][:, ids] + bias).log_softmax(dim=-1)
        places = torch.searchsorted(ids, found.tokens[:, 1].contiguous())
        assert torch.allclose(found.log_probs[:, 1, first], expected.gather(1, places), atol=1e-4)


@pytest.mark.parametrize("family", tiny.KINDS_OF_CACHE)
def test_text_is_the_targets_own_whatever_the_tree(family):
    """A padded batch; by turns a tree narrower and one wider than the block. Recurrent targets get the chain."""
    target = tiny.target(family)
    draft, accepted, tokens = tiny.draft(target, block_size=6), 0, set()
    widths = (3, 20) if family == "qwen3" else (3, 20)[[*tiny.KINDS_OF_CACHE].index(family) % 2 :][:1]
    for inputs, width in [(tiny.batch(20, pads=(0, 19, 7, 13)), width) for width in widths]:
        asked = inputs | {"max_new_tokens": 14, "do_sample": False}
        expected = target.generate(**asked)
        tokens |= set(expected[:, -14:].flatten().tolist())
        statistics = DecodeStatistics()
        more = {"custom_generate": draft.speculate, "statistics": statistics, "proposal": "tree", "width": width}
        assert torch.equal(target.generate(**asked, **more), expected)
        kind = "chain of 5" if family in RECURRENT else f"tree of {width}"
        assert set(statistics.proposed) == {kind}
        accepted += sum(statistics.accepted_at)
    assert len(tokens) > 5, "a text of a few tokens proves nothing"
    assert accepted, "nothing was accepted"
    assert min(statistics.committed) < 6, "nothing was rejected"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_trees_of_every_kind_write_what_its_chains_write(kind, sampled):
    """Sampled too: noise belongs to slots, so one seed gives one text."""
    target = tiny.target("gemma3_text")
    draft = tiny.draft(target, **KINDS[kind])
    asked = tiny.batch(11, pads=(0, 4)) | {"max_new_tokens": 16, "custom_generate": draft.speculate}
    asked |= {"do_sample": sampled, "temperature": 1.5 if sampled else None, "top_k": 8 if sampled else None}
    texts, committed = [], []
    ways = [{"proposal": "chain"}, {"proposal": "tree", "width": 16}]
    ways += [{"proposal": "plain"}] if kind == "dflash" else []  # it asks no draft
    for more in ways:
        torch.manual_seed(3)
        statistics = DecodeStatistics()
        texts.append(target.generate(**asked, **more, statistics=statistics))
        committed.append(statistics.acceptance_length)
    assert all(torch.equal(texts[0], text) for text in texts[1:])
    assert committed[2:] == [1] * (len(ways) - 2)
    assert committed[1] > 1.05


@pytest.mark.parametrize(
    "option", [{"repetition_penalty": 1.3}, {"prefix_allowed_tokens_fn": lambda row, ids: range(9)}]
)
def test_processors_judge_the_nodes_of_a_tree_by_their_own_paths(option):
    target = tiny.target("qwen3")
    draft, statistics = tiny.draft(target), DecodeStatistics()
    asked = tiny.batch(9, pads=(0, 3)) | option | {"max_new_tokens": 24, "do_sample": False}
    more = {"custom_generate": draft.speculate, "proposal": "tree", "width": 14, "statistics": statistics}
    assert torch.equal(target.generate(**asked, **more), target.generate(**asked))
    assert statistics.acceptance_length > 1.05


class Compared(TreeProposer):
    """Runs each tree, and each path of it as a chain, and compares the logits of all nodes."""

    compared = 0

    def propose(self, state):
        proposal = super().propose(state)
        target, target_state = state.target, state.target_state
        target_state.cache.reserve(max(state.last_slots) + proposal.size)
        tree = target.verify(target_state, proposal.tokens, state.slots, proposal.ancestors)
        logits, features = tree.logits.clone(), tree.features.clone()
        for row, row_paths in enumerate(paths(proposal.parents)):
            for path in row_paths[:: max(1, len(row_paths) // 3)]:
                tokens = proposal.tokens[:, path]
                chain = target.verify(target_state, tokens, state.slots)
                assert torch.allclose(logits[row, path], chain.logits[row], rtol=1e-4, atol=5e-4)
                assert torch.allclose(features[row, path], chain.features[row], rtol=1e-4, atol=2e-3)
                Compared.compared += len(path)
        return proposal


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_every_node_gets_the_logits_of_its_path_across_the_border_of_a_window(family):
    target = tiny.target(family)
    Compared.compared = 0
    asked = tiny.batch(8, pads=(0, 3)) | {"max_new_tokens": 10, "do_sample": False}
    draft = tiny.draft(target)
    make = {"proposer": lambda chain: Compared(chain.drafter, chain.draft_state, chain.sampler, 12)}
    text = target.generate(**asked, custom_generate=draft.speculate, **make)
    assert torch.equal(text, target.generate(**asked))
    assert Compared.compared > 80


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_after_many_trees_the_caches_of_target_and_draft_are_those_of_the_text(family):
    target = tiny.target(family)
    draft, kept = tiny.draft(target), []

    class Kept(TreeProposer):
        def commit(self, features, slots):
            super().commit(features, slots)
            kept[:] = [self]

    asked = {"max_new_tokens": 36, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    ids = tiny.prompt(9)
    mask = torch.ones_like(ids)
    name = tiny.CACHE
    plain = target.generate(ids, attention_mask=mask, **asked)
    more = {"proposer": lambda chain: Kept(chain.drafter, chain.draft_state, chain.sampler, 12)}
    found = target.generate(ids, attention_mask=mask, **asked, **more, custom_generate=draft.speculate)
    assert torch.equal(found.sequences, plain.sequences)
    for ours, theirs in zip(found[name].layers, plain[name].layers, strict=True):
        length = theirs.keys.shape[2]
        assert torch.allclose(ours.keys[:, :, -length:], theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values[:, :, -length:], theirs.values, atol=1e-4)
    drafter, state = kept[0].drafter, kept[0].draft_state
    slots = found.sequences.shape[1] - 1
    states = target(found.sequences[:, :slots], output_hidden_states=True).hidden_states
    fresh = torch.cat([states[1], states[3]], dim=-1)
    once = [layer.keys[:, :slots].clone() for layer in state.cache.slot_layers.values()]
    drafter.cache_context(state, fresh, 0)
    for before, layer in zip(once, state.cache.slot_layers.values(), strict=True):
        assert torch.allclose(before, layer.keys[:, :slots], atol=1e-4)


def test_a_chain_given_as_a_tree_is_the_chain():
    target = tiny.target("gemma3_text")
    draft, asked = tiny.draft(target), tiny.batch(12, pads=(0, 5)) | {"max_new_tokens": 30, "do_sample": False}

    def as_tree(proposal, state):
        parents = torch.arange(-1, proposal.size - 1).expand_as(proposal.tokens)
        return Proposal(proposal.tokens, parents)

    found = []
    for more in ({"proposal": "chain"}, {"proposer": tiny.steered(as_tree)}):
        statistics = DecodeStatistics()
        text = target.generate(**asked, **more, custom_generate=draft.speculate, statistics=statistics)
        found.append((text.tolist(), statistics.committed, statistics.accepted_at))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_trees_are_built_inside_a_recorded_block(kind):
    target = tiny.target("gemma3_text")
    draft = tiny.draft(target, **KINDS[kind])
    asked = tiny.batch(12, pads=(0, 5, 9)) | {"max_new_tokens": 12, "do_sample": False}
    expected = target.generate(**asked)
    found = []
    for capture in ("eager", "graphs"):
        statistics = DecodeStatistics()
        more = {"proposal": "tree", "width": 10, "capture": capture, "statistics": statistics}
        assert torch.equal(target.generate(**asked, **more, custom_generate=draft.speculate), expected)
        found.append(statistics.committed)
    assert found[0] == found[1]


def test_the_real_pair_accepts_more_from_a_tree_than_from_the_chain(tiny_target, tiny_draft):
    ids = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])
    asked = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    lengths = []
    for more in ({"proposal": "chain"}, *({"proposal": "tree", "width": width} for width in (7, 31))):
        statistics = DecodeStatistics()
        tiny_target.generate(ids, **asked, **more, custom_generate=tiny_draft.speculate, statistics=statistics)
        lengths.append(statistics.acceptance_length)
    assert lengths[0] < lengths[2]
    assert lengths[1] <= lengths[2]


def test_a_proposal_from_the_first_nodes_of_a_tree_is_a_tree():
    candidates = some_candidates(1, 0)
    tree = best_tree(candidates, 20)
    for size in (1, 4, 19):
        proposal = tree_proposal(torch.zeros(2, 1, dtype=torch.long), tree, size)
        assert proposal.tokens.shape == (2, 1 + size)
        lineage = ancestors(proposal.parents)
        assert torch.equal(lineage.sum(-1)[:, 1:] - 1, tree.depths[:, :size])
