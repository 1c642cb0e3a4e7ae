"""What a GPU needs of the blocks, as far as a machine without one can show it."""

import pytest
import torch

import tiny
from dflash_hub import DecodeStatistics, execution_dflash, weights_dflash
from dflash_hub.drafter_dflash import Drafter
from dflash_hub.proposals_dflash import Proposal
from dflash_hub.sequences_dflash import Prompt
from dflash_hub.target_dflash import Target

META = torch.device("meta")
# One of each kind of cache. Experts are chosen by the data, so that blocks with them are not captured by default.
DENSE = ("qwen3", "mistral", "gemma2", "gemma3_text", "gemma4_text", "gemma4_text-shared", "qwen3_5_text", "lfm2")
RECORD = execution_dflash.record
CAPTURED = ("qwen3", "gemma3_text", "mistral", "gemma4_text-shared")


KINDS = {
    "dflash": ({}, 1),
    "dflash2": (tiny.SECOND, 3),
    "dspark, reduced": (tiny.DSPARK | tiny.REDUCED, 3),
    "dspark, rnn": (tiny.DSPARK | {"markov_head_type": "rnn"}, 1),
    "domino": (tiny.DOMINO, 2),
}
"""Fields of a draft of each kind, and how many rows it drafts for."""


@pytest.mark.parametrize(
    ("family", "second", "rows"),
    [
        *(pytest.param(family, {}, 3, id=family) for family in DENSE),
        *(pytest.param("qwen3", *kind, id=f"qwen3, {name}") for name, kind in KINDS.items()),
        pytest.param("gemma3_text", tiny.SECOND, 3, id="gemma3_text, dflash2"),
    ],
)
def test_the_blocks_of_a_family_need_neither_the_data_nor_another_device(family, second, rows):
    model = tiny.target(family)
    draft = tiny.draft(model, **second).to(META)
    model = model.to(META)
    ids, size = torch.zeros(rows, 20, dtype=torch.long, device=META), 1 + draft.config.num_drafted
    prompt = Prompt(ids, {})
    slots, anchor = torch.zeros(rows, dtype=torch.long, device=META), ids[:, :1]
    target, drafter = Target(model, (0, 2)), Drafter(draft, model)
    with (
        torch.no_grad(),
        target.decoding(prompt, "eager") as target_state,
        drafter.decoding(prompt.padding_mask, "eager") as draft_state,
    ):
        target.prefill(target_state, {"input_ids": ids})
        target_state.cache.reserve(20 + size)
        verified = target.verify(target_state, ids[:, :size], slots)
        assert verified.logits.device == verified.features.device == META
        output = drafter.draft_block(draft_state, anchor, slots, 20 + size)
        assert output.logits.device == output.tokens.device == META
        assert verified.logits.shape == (rows, size, tiny.VOCAB)
        assert output.logits.shape == (rows, size - 1, tiny.VOCAB)


@pytest.mark.parametrize(
    ("family", "second", "sampled"),
    [
        *((family, {}, False) for family in CAPTURED),
        ("gemma3_text", tiny.SECOND, True),
        ("qwen3", tiny.DSPARK | tiny.REDUCED, False),
        ("qwen3", tiny.DOMINO, False),
    ],
    ids=[*CAPTURED, "dflash2, sampled", "dspark, reduced", "domino"],
)
def test_a_recording_that_is_replayed_without_python_gives_the_same_text(family, second, sampled, monkeypatch):
    target = tiny.target(family)
    draft, inputs = tiny.draft(target, **second), tiny.batch(20, pads=(0, 9, 3))
    asked = inputs | {"max_new_tokens": 24, "do_sample": sampled, "custom_generate": draft.speculate}
    torch.manual_seed(0)
    plain = target.generate(**asked)
    recorded, replayed = [], []

    def counted(run, device):
        replay, outputs = RECORD(run, device)
        recorded.append(run)
        return lambda: (replayed.append(run), replay()), outputs

    monkeypatch.setattr(execution_dflash, "record", counted)
    torch.manual_seed(0)
    assert torch.equal(target.generate(**asked, capture="graphs"), plain)
    assert len(recorded) == 2
    assert min(replayed.count(run) for run in recorded) > 10  # the target's block and the draft's


@pytest.mark.parametrize(
    ("family", "second"),
    [
        ("qwen3", {}),
        ("qwen3", tiny.SECOND),
        ("qwen3", tiny.DSPARK | tiny.REDUCED),
        ("qwen3", tiny.DOMINO),
        ("qwen3_5_text", {}),
    ],
    ids=["dflash", "dflash2", "dspark, reduced", "domino", "qwen3_5_text"],
)
def test_the_default_device_of_torch_may_be_any_other(family, second):
    target, inputs = tiny.target(family), tiny.batch(20, pads=(0, 9, 3))
    asked = inputs | {"max_new_tokens": 6, "do_sample": False}
    expected = target.generate(**asked)
    draft = tiny.draft(target, **second)
    torch.set_default_device(META)  # where whatever names no device would be
    try:
        assert torch.equal(target.generate(**asked, custom_generate=draft.speculate), expected)
        target.generate(**asked | {"do_sample": True}, custom_generate=draft.speculate)
    finally:
        torch.set_default_device(None)


def test_the_stored_ids_of_a_reduced_vocabulary_are_checked_whatever_the_default_device(tmp_path):
    draft = tiny.reduce(tiny.draft(tiny.target("qwen3"), **tiny.DSPARK, **tiny.REDUCED))
    draft.save_pretrained(tmp_path)
    with META:
        weights_dflash.check_vocabulary([tmp_path / "model.safetensors"], draft.config, "it")


def test_blocks_are_recorded_again_where_buffers_grew_and_compared_once(monkeypatch):
    monkeypatch.setattr("dflash_hub.cache_dflash.BUCKET", 16)
    target, recorded, runs = tiny.target("gemma3_text"), [], []
    inputs, asked = tiny.batch(20, pads=(0, 9, 3)), {"max_new_tokens": 80, "do_sample": False}
    expected = target.generate(**inputs, **asked)

    def counted(run, device):
        recorded.append(len(runs))
        return RECORD(run, device)

    monkeypatch.setattr(execution_dflash, "record", counted)
    more = {"custom_generate": tiny.draft(target).speculate, "capture": "graphs", "proposal": "chain"}
    hook = target.get_decoder().layers[0].register_forward_hook(lambda module, args, output: runs.append(1))
    assert torch.equal(target.generate(**inputs, **asked, **more), expected)
    hook.remove()
    assert len(recorded) > 10
    # The self-check, the prompt, one block before the first recording, two to compare with, and those recorded.
    assert len(runs) <= 7 + len(recorded) / 2


TREES = torch.tensor([[-1, 0, 0, 1, 2, 4], [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 3, 4]])


@pytest.mark.parametrize("capture", ["eager", "graphs"])
def test_a_tree_that_changes_from_cycle_to_cycle_and_row_to_row_is_replayed_as_it_is_now(capture, monkeypatch):
    target = tiny.target("gemma3_text")
    inputs = tiny.batch(12, pads=(0, 5, 9, 2))
    expected = target.generate(**inputs, max_new_tokens=36, do_sample=False)
    turn = []

    def branch(proposal, state):
        tokens = proposal.tokens[:, :1].repeat(1, 6)
        parents = torch.stack([TREES[(len(turn) + row) % 3] for row in range(len(tokens))])
        turn.append(1)
        for row, slot in enumerate(state.last_slots):
            tree = parents[row]
            for position in range(1, 6):  # the last child of each parent is right, at least while its path is
                path = [position]
                while tree[path[-1]] >= 0:
                    path.append(int(tree[path[-1]]))
                last = max(range(6), key=lambda other: (tree[other] == tree[position], other))
                truth = expected[row, min(slot + len(path) - 1, expected.shape[1] - 1)]
                tokens[row, position] = truth if last == position else (truth + 1) % tiny.VOCAB
        return Proposal(tokens, parents)

    draft, statistics = tiny.draft(target, block_size=6), DecodeStatistics()
    more = {"custom_generate": draft.speculate, "statistics": statistics, "capture": capture}
    more["proposer"] = tiny.steered(branch)
    assert torch.equal(target.generate(**inputs, max_new_tokens=36, do_sample=False, **more), expected)
    assert len(set(statistics.committed)) > 1


@pytest.mark.parametrize(
    ("second", "rows", "tree"),
    [
        *(({}, 1, False), ({}, 3, False), ({}, 3, True), (tiny.SECOND, 3, False)),
        *((tiny.DSPARK, 3, False), (tiny.DOMINO, 3, False), (tiny.DOMINO, 1, True)),
    ],
    ids=["one row", "dflash", "dflash, tree", "dflash2", "dspark", "domino", "domino, tree of one row"],
)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_cycle_brings_one_tensor_to_the_host(second, rows, sampled, tree, monkeypatch):
    (target, draft), brought = tiny.shallow(**second), []
    inputs = tiny.batch(9, pads=(0, 3, 5)[:rows])
    asked = inputs | {"max_new_tokens": 20, "do_sample": sampled, "custom_generate": draft.speculate}
    target.generate(**asked | {"max_new_tokens": 2})  # checks itself
    tiny.record_transfers(monkeypatch, brought)
    per_cycle, parents = [], torch.tensor([[-1, 0, 0, 1, 2]] * rows)

    def count(proposal, state):
        per_cycle.append(list(brought))
        brought.clear()
        return Proposal(proposal.tokens[:, :5], parents) if tree else proposal

    target.generate(**asked, proposer=tiny.steered(count))
    assert len(per_cycle) > 7
    settled = per_cycle[4:]  # on a GPU, blocks are recorded and compared before
    assert all(names == ["tolist"] for names in settled), settled[:3]


def test_a_recording_that_made_room_before_it_was_compared_again_is_not_asked_for():
    """Blocks read 1, 1, 2, 1 and 1 tensors long buffers: the second recording drops the first one."""
    lengths, made = iter([1, 1, 2, 1, 1, 1]), torch.arange(4.0)
    runner = execution_dflash.BlockRunner(lambda state, one: (one + made,), lambda state: state)
    with runner.using("graphs"):
        for length in lengths:
            (result,) = runner(length, torch.full((4,), float(length)))
            assert torch.equal(result, length + made)
