"""What a cycle verifies is chosen by what it brings and costs; the text is the same whatever is chosen."""

import json
import random

import pytest
import torch
from huggingface_hub import constants

import tiny
from dflash_hub import DecodeStatistics, adaptive_dflash, costs_dflash, execution_dflash
from dflash_hub.adaptive_dflash import Selection
from dflash_hub.costs_dflash import BLOCK_SIZES, CostTable
from dflash_hub.execution_dflash import BlockRunner
from dflash_hub.experience_dflash import FIRST_PAUSE, LONGEST_PAUSE, Average, Experience, Odds
from dflash_hub.lookup_dflash import Match
from dflash_hub.proposals_dflash import Proposal

pytestmark = pytest.mark.usefixtures("unchecked")

FLAT = [1e-3, 1.01e-3]
"""Seconds of a block of 1 and of 128 where a wide block costs next to nothing."""
STEEP = [1e-6, 1.0]
"""The same where every further position costs as much as many steps."""


def knowing(draft, target, seconds, rows=1):
    """Let a draft know what blocks cost, and return its experience."""
    experience = Experience(CostTable([1, 128], list(seconds)))
    draft.speculate.experiences[target] = {(rows, mode): experience for mode in ("eager", "graphs")}
    return experience


def kinds(statistics):
    """How many cycles verified each kind of proposal."""
    found = {}
    for label, count in statistics.proposed.items():
        kind = label.split()[0]
        found[kind] = found.get(kind, 0) + count
    return found


def decoded(target, draft, inputs, new, **options):
    """Decode plainly and with the draft, compare, and return the statistics."""
    statistics = DecodeStatistics()
    asked = inputs | {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = target.generate(**asked)
    text = target.generate(**asked, **options, custom_generate=draft.speculate, statistics=statistics)
    assert torch.equal(text, expected)
    return statistics


@pytest.mark.parametrize("family", tiny.KINDS_OF_CACHE)
def test_text_is_the_targets_own_whatever_is_chosen_in_every_cycle(family):
    """Rows that copy from their prompt and go on otherwise, with costs that make every kind pay at times."""
    target = tiny.target(family)
    draft = tiny.draft(target, block_size=6)
    chosen = {}
    for rows, seconds in ((3, [1e-3, 5e-3]), (1, FLAT))[: 2 if family == "qwen3" else 1]:
        inputs = tiny.batch(24, pads=(0, 9, 4)[:rows])
        inputs["input_ids"][:, 16:] = inputs["input_ids"][:, 8:16]
        knowing(draft, target, seconds, rows)
        for kind, count in kinds(decoded(target, draft, inputs, 16)).items():
            chosen[kind] = chosen.get(kind, 0) + count
    assert len(chosen) > 1, chosen


@pytest.mark.parametrize("fields", [{"block_size": 2}, {"block_size": 2} | tiny.DOMINO, {"block_size": 16}], ids=str)
def test_blocks_of_any_size_have_trees_to_choose_from(fields):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **fields)
    knowing(draft, target, FLAT, rows=2)
    decoded(target, draft, tiny.batch(9, pads=(0, 4)), 24)


def test_where_every_position_costs_much_nothing_is_proposed():
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    experience = knowing(draft, target, STEEP)
    found = kinds(decoded(target, draft, tiny.batch(9, pads=(0,)), 60))
    assert found["plain"] > 50
    assert experience.next_pause > FIRST_PAUSE


def test_where_positions_cost_nothing_trees_are_proposed_and_accepted_more_than_chains(tiny_target, tiny_draft):
    inputs = {"input_ids": torch.arange(40, 60)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    chain = decoded(tiny_target, tiny_draft, inputs, 48, proposal="chain")
    knowing(tiny_draft, tiny_target, [1.0, 1.0001])
    auto = decoded(tiny_target, tiny_draft, inputs, 48)
    assert kinds(auto)["tree"] > 10
    assert auto.acceptance_length > chain.acceptance_length
    assert all("tokens expected in" in reason for reason in auto.reasons.values())
    assert set(auto.reasons) == set(auto.proposed)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_text_that_copies_its_prompt_is_copied(sampled):
    """A target that counts; sampled, at a temperature at which it still does."""
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    ids = tiny.prompt(6).repeat(1, 12)
    expected = target.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.cat([ids, expected[:, ids.shape[1] :], ids[:, -6:]], dim=1)
    knowing(draft, target, FLAT)
    statistics = DecodeStatistics()
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 50, "pad_token_id": 0}
    asked |= {"eos_token_id": None, "do_sample": sampled, "temperature": 0.01 if sampled else None}
    texts = []
    for more in ({"proposal": "plain"}, {"statistics": statistics}):
        torch.manual_seed(0)
        texts.append(target.generate(**asked, **more, custom_generate=draft.speculate))
    assert torch.equal(*texts)
    assert kinds(statistics).get("lookup", 0) + kinds(statistics).get("branch", 0) > 0


class Wandering:
    """Proposes the truth, wrong tokens, or nothing, in blocks of any width; every third time it asks the draft.

    What the draft then says is compared with its forward without any cache.
    """

    def __init__(self, chain, text, compare):
        self.chain, self.text, self.compare = chain, text, compare
        self.random, self.turn = random.Random(0), 0

    def append_context(self, features, first_slot):
        self.chain.append_context(features, first_slot)

    def propose(self, state):
        self.turn += 1
        if self.turn % 3 == 0:
            drafter, context = self.chain.drafter, self.chain.draft_state
            output = drafter.draft_block(context, state.anchor, state.slots, max(state.last_slots) + drafter.size)
            self.compare(state, drafter, output)
        size = self.random.choice([1, 1, 2, 7, 15])
        rows = []
        for row, slot in enumerate(state.last_slots):
            truth = self.text[row, slot : slot + size].tolist()
            right = self.random.randint(1, size)
            wrong = [(token + 1) % tiny.VOCAB for token in truth[right:]]
            rows.append((truth[:right] + wrong + [0] * size)[:size])
        return Proposal(torch.tensor(rows))

    def commit(self, features, slots):
        self.chain.commit(features, slots)


@pytest.mark.parametrize(("layers", "capture"), [("full", "eager"), ("sliding", "eager"), ("sliding", "graphs")])
def test_a_draft_that_was_not_asked_for_a_while_still_sees_its_whole_context(layers, capture):
    target = tiny.target("qwen3")
    window = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "is_causal": True}
    draft = tiny.draft(target, **(window if layers == "sliding" else {}))
    inputs, compared = tiny.batch(14, pads=(0, 5)), []
    text = target.generate(**inputs, max_new_tokens=54, do_sample=False)
    embed = target.get_input_embeddings()

    @torch.no_grad()
    def compare(state, drafter, output):
        with state.target.attention.uninstalled(), drafter.attention.uninstalled():
            for row, slot in enumerate(state.last_slots):
                ids = text[row : row + 1, (0, 5)[row] : slot]
                states = target(ids, output_hidden_states=True).hidden_states
                context = torch.cat([states[1], states[3]], dim=-1)
                block = torch.tensor([[int(text[row, slot])] + [3] * 4])
                expected = target.lm_head(draft(embed(block), context).last_hidden_state[:, 1:])[0]
                assert torch.allclose(output.logits[row], expected, atol=1e-4)
                compared.append(slot)

    more = {"proposer": lambda chain: Wandering(chain, text, compare), "capture": capture}
    found = target.generate(**inputs, max_new_tokens=54, do_sample=False, custom_generate=draft.speculate, **more)
    assert torch.equal(found, text)
    assert len(set(compared)) > 6


def test_costs_are_measured_once_and_kept_for_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(adaptive_dflash, "MEASURED_FROM", 24)
    target = tiny.target("qwen3")
    draft, inputs = tiny.draft(target), tiny.batch(200, pads=(0,))
    recorded = {"capture": "graphs"}
    decoded(target, draft, inputs, 12, **recorded)
    assert not list(tmp_path.rglob("*.json")), "a short text is not worth the time"
    decoded(target, draft, inputs, 24, **recorded)
    (file,) = tmp_path.rglob("*.json")
    table = json.loads(file.read_text())
    assert table["sizes"] == list(BLOCK_SIZES[: len(table["sizes"])])
    assert table["seconds"] == sorted(table["seconds"])
    stamp = file.stat().st_mtime_ns
    another = tiny.draft(target)
    decoded(target, another, inputs, 12, **recorded)
    (experience,) = another.speculate.experiences[target].values()
    assert experience.costs.measured == table["seconds"]
    assert file.stat().st_mtime_ns == stamp
    for damage in ("", "[]", '{"sizes": [1], "seconds": [1]}', '{"sizes": [1, 2], "seconds": [-1, 2]}'):
        file.write_text(damage)
        assert costs_dflash._read(file) is None
    decoded(target, tiny.draft(target), inputs, 24, **recorded)
    assert json.loads(file.read_text())["sizes"] == table["sizes"]


def test_a_cache_folder_that_takes_no_files_is_no_trouble(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(adaptive_dflash, "MEASURED_FROM", 16)
    target = tiny.target("qwen3_next")
    draft = tiny.draft(target)
    decoded(target, draft, tiny.batch(9, pads=(0, 3)), 16)
    assert draft.speculate.experiences[target], "nothing was measured, which would be kept"


@pytest.mark.parametrize("capture", ["eager", "graphs"])
def test_blocks_are_recorded_in_inference_mode_too(capture, monkeypatch):
    """There fewer operations are split into others: some give a view of their input at times, and else a copy."""
    target, warned = tiny.target("qwen3"), []
    monkeypatch.setattr(execution_dflash.logger, "warning_once", warned.append)
    with torch.inference_mode():
        decoded(target, tiny.draft(target), tiny.batch(14, pads=(0, 5)), 16, capture=capture, proposal="chain")
    assert not warned, "a block that could not be recorded is named"


@pytest.mark.parametrize(("rows", "new", "recorded"), [(1, 90, True), (3, 90, True), (1, 40, False)])
def test_blocks_that_come_often_in_a_text_are_recorded_on_a_cpu(rows, new, recorded):
    target = tiny.target("qwen3")
    draft, inputs = tiny.draft(target), tiny.batch(14, pads=(0, 5, 2)[:rows])
    experience = knowing(draft, target, STEEP, rows)
    decoded(target, draft, inputs, new)
    found = {key[0] for key, overhead in experience.overheads.items() if key[2] and overhead.weight}
    assert found == ({"plain"} if recorded else set())


def test_a_recording_is_asked_for_where_the_blocks_to_come_repay_it():
    runner = BlockRunner(lambda state: None, lambda state: None)
    with runner.using("graphs"):
        selection = Selection(runner)
        for size, expected, eager, recorded in (
            (1, 9, 4.0, 2.0),
            (8, 7, 4.0, 2.0),
            (16, 99, 4.0, 3.9),
            (32, 5, 4.0, 0.5),
        ):
            selection.ask(size, expected, eager, recorded)
        assert runner.asked == {1, 32}
        selection.ask(1, 0, 4.0, 2.0)  # what is recorded stays so to the end
        assert [selection.has(size) for size in (1, 8)] == [True, False]
    assert runner.asked is None, "the next decode begins anew"


def test_costs_between_and_beyond_what_was_measured_lie_in_line():
    table = CostTable([1, 2, 8], [4.0, 2.0, 5.0])
    found = [table.seconds(size) for size in (1, 2, 5, 8, 14)]
    assert found == [2.0, 2.0, 3.5, 5.0, 8.0]


def test_expectations_are_corrected_by_what_was_accepted():
    odds = Odds()
    assert odds.corrected([0.5, 0.25]) == 0.75
    for _ in range(200):
        odds.add([0, 0], [0.8, 0.6])
    assert odds.corrected([0.8, 0.6]) < 0.25
    for _ in range(200):
        odds.add([1, 1], [0.5, 0.4])
    assert 0.9 < odds.corrected([0.5]) < 1.1
    assert odds.corrected([0.5, 0.4, 0.3]) > odds.corrected([0.5, 0.4])


def test_pauses_of_a_draft_that_does_not_pay_get_longer_and_end_once_it_does():
    experience = Experience(CostTable([1, 2], [1.0, 1.0]))
    pauses = []
    for _ in range(12):
        experience.pause = 0
        experience.add_draft_rate(0.5, plain_rate=1.0)
        pauses.append(experience.pause)
    first = pauses.index(FIRST_PAUSE)
    assert first == 5, "a few bad cycles prove little"
    assert pauses[first:] == [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(7)]
    experience.add_draft_rate(9.0, plain_rate=1.0)
    assert experience.next_pause == FIRST_PAUSE


def test_longer_matches_are_trusted_more_until_they_fail():
    experience = Experience(CostTable([1, 2], [1.0, 1.0]))
    chances = [experience.odds_of(Match(length, [])).mean for length in (3, 5, 12, 40)]
    assert chances == sorted(chances)
    for _ in range(50):
        experience.odds_of(Match(40, [])).add(0, 1)
    assert experience.odds_of(Match(33, [])).mean < 0.1
    assert experience.odds_of(Match(12, [])).mean == chances[2]


def test_a_mean_forgets():
    average = Average(first=3.0)
    assert average.mean == 3.0
    for value in [10.0] * 100 + [0.0] * 100:
        average.add(value)
    assert average.mean < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposal": "trees"}, "must be one of auto, chain, tree, lookup, plain"),
        ({"proposal": None}, "must be one of auto, chain, tree, lookup, plain"),
        ({"width": 3}, "has no width to set"),
        ({"proposal": "tree", "width": 0}, "1 or more"),
        ({"proposal": "chain", "width": True}, "1 or more"),
        ({"proposal": "plain", "width": 2}, "has no width to set"),
        ({"proposal": "tree", "proposer": lambda chain: chain}, "pass one or the others"),
    ],
)
def test_what_no_proposal_is_is_refused(options, message):
    target = tiny.target("qwen3")
    with pytest.raises(ValueError, match=message):
        target.generate(tiny.prompt(5), max_new_tokens=4, custom_generate=tiny.draft(target).speculate, **options)


@pytest.mark.parametrize(("proposal", "width", "label"), [("chain", 2, "chain of 2"), ("chain", 9, "chain of 4")])
def test_a_shorter_part_of_the_chain_is_verified_where_asked_for(proposal, width, label):
    target = tiny.target("qwen3")
    found = decoded(target, tiny.draft(target), tiny.batch(9, pads=(0, 2)), 12, proposal=proposal, width=width)
    assert set(found.proposed) == {label}
