"""What a GPU needs of the blocks, as far as a machine without one can show it."""

import pytest
import torch

import tiny
from dflash_hub import DecodeStatistics, capture_dflash
from dflash_hub.cache_dflash import Masks
from dflash_hub.drafting_dflash import Drafter
from dflash_hub.generation_dflash import Pair, Proposal
from dflash_hub.target_dflash import Target
from recording import record

META = torch.device("meta")
# Their experts are chosen by the data, so that their blocks are not captured by default.
BY_DATA = {name for name in tiny.FAMILIES if "expert" in str(tiny.FAMILIES[name])}
DENSE = [name for name in tiny.FAMILIES if name not in BY_DATA]
CAPTURED = ("qwen3", "gemma3_text", "mistral", "gemma4_text-shared")


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("second", [{}, tiny.SECOND], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_blocks_of_a_family_need_neither_the_data_nor_another_device(family, second, rows):
    model = tiny.target(family)
    draft = tiny.draft(model, **second).to(META)
    model = model.to(META)
    ids, size = torch.zeros(rows, 20, dtype=torch.long, device=META), draft.config.block_size
    hidden = torch.zeros(rows, 20, dtype=torch.bool, device=META)
    start, anchor = torch.zeros(rows, dtype=torch.long, device=META), ids[:, :1]
    target, drafter = Target(model, (0, 2)), Drafter(draft, model)
    with torch.no_grad(), target.decoding("off"), drafter.decoding(hidden, "off"):
        target.begin({"input_ids": ids})
        target.taps.take()
        target.cache.reserve(20 + size)
        masks = Masks(torch.zeros(rows, target.cache.capacity, dtype=torch.bool, device=META), start, size)
        logits = target.verify(ids[:, :size], start, masks, masks.chain, torch.zeros(rows, 1, device=META).long())
        assert logits.device == target.features.device == META
        proposed = drafter.propose(anchor, start, 20 + size)
        assert proposed.device == drafter.picked.device == META
        assert logits.shape == (rows, size, tiny.VOCAB)
        assert proposed.shape == (rows, size - 1, tiny.VOCAB)


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize("second", [{}, tiny.SECOND], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_recording_that_is_replayed_without_python_gives_the_same_text(family, second, sampled, monkeypatch):
    target = tiny.target(family)
    draft, inputs = tiny.draft(target, **second), tiny.batch(20, pads=(0, 9, 3))
    asked = inputs | {"max_new_tokens": 60, "do_sample": sampled, "custom_generate": draft.speculate}
    torch.manual_seed(0)
    plain = target.generate(**asked)
    recorded, replayed = [], []

    def counted(run):
        replay, outputs = record(run)
        recorded.append(run)
        return lambda: (replayed.append(run), replay()), outputs

    monkeypatch.setattr(capture_dflash, "record", counted)
    torch.manual_seed(0)
    assert torch.equal(target.generate(**asked, capture="graphs"), plain)
    assert len(recorded) == 2
    assert len(replayed) > 20


TREES = (
    torch.tensor([-1, 0, 0, 1, 2, 4]),
    torch.tensor([-1, 0, 1, 2, 3, 4]),
    torch.tensor([-1, 0, 0, 0, 3, 4]),
    torch.tensor([-1, 0, 0, 1, 2]),
)


@pytest.mark.parametrize("capture", ["off", "graphs"])
def test_a_tree_that_changes_from_cycle_to_cycle_is_replayed_as_it_is_now(capture, monkeypatch):
    target = tiny.target("gemma3_text")
    inputs = tiny.batch(12, pads=(0, 5, 9, 2))
    expected = target.generate(**inputs, max_new_tokens=60, do_sample=False)
    honest, turn = Pair.propose, []

    def propose(self):
        tokens, parents = honest(self).tokens[:, :1].repeat(1, 6), TREES[len(turn) % 3]
        turn.append(1)
        for row, column in enumerate(self.columns):
            depth = 0
            for position in range(1, 6):  # the last child of each parent is right, at least while its way is
                way = [position]
                while parents[way[-1]] >= 0:
                    way.append(int(parents[way[-1]]))
                depth = len(way) - 1
                last = max(range(6), key=lambda other, parent=parents[position]: (parents[other] == parent, other))
                truth = expected[row, min(column + depth, expected.shape[1] - 1)]
                tokens[row, position] = truth if last == position else (truth + 1) % tiny.VOCAB
        return Proposal(tokens, parents)

    monkeypatch.setattr(capture_dflash, "record", record)
    monkeypatch.setattr(Pair, "propose", propose)
    draft, statistics = tiny.draft(target, block_size=6), DecodeStatistics()
    more = {"custom_generate": draft.speculate, "statistics": statistics, "capture": capture}
    assert torch.equal(target.generate(**inputs, max_new_tokens=60, do_sample=False, **more), expected)
    assert len(set(statistics.committed)) > 1


@pytest.mark.parametrize("second", [{}, tiny.SECOND], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_cycle_brings_one_tensor_to_the_host(second, sampled, tree, monkeypatch):
    target, brought = tiny.target("qwen3"), []
    draft, inputs = tiny.draft(target, **second), tiny.batch(9, pads=(0, 3, 5))
    asked = inputs | {"max_new_tokens": 40, "do_sample": sampled, "custom_generate": draft.speculate}
    target.generate(**asked)  # checks itself
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        honest = getattr(torch.Tensor, name)

        def bring(self, *args, honest=honest, name=name, **kwargs):
            if self is not TREES[3]:  # which is the host's
                brought.append(name)
            return honest(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, bring)
    per_cycle, honest_propose = [], Pair.propose

    def propose(self):
        per_cycle.append(list(brought))
        proposal = honest_propose(self)
        if tree:
            proposal = Proposal(proposal.tokens, TREES[3])
        brought.clear()
        return proposal

    monkeypatch.setattr(Pair, "propose", propose)
    target.generate(**asked)
    assert len(per_cycle) > 8
    assert all(names == ["tolist"] for names in per_cycle[1:]), per_cycle[1:3]
