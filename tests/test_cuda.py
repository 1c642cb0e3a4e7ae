"""What a GPU alone can show: `DFLASH_TEST_DEVICE=cuda python -m pytest tests/test_cuda.py`.

With `DFLASH_TEST_DEVICE=cpu` the same tests run on a CPU, whose recordings are lists of operations.
"""

import itertools
import os
import threading
import warnings

import pytest
import torch
from huggingface_hub import constants

import tiny
from dflash_hub import DecodeStatistics, execution_dflash
from dflash_hub.costs_dflash import CostTable
from dflash_hub.experience_dflash import Experience
from dflash_hub.target_dflash import is_recurrent

if "DFLASH_TEST_DEVICE" not in os.environ:  # as a mark, it would be asked of 328 tests one by one
    pytest.skip("asked for by DFLASH_TEST_DEVICE", allow_module_level=True)
ON_GPU = tiny.DEVICE.type == "cuda"
KINDS = {
    "dflash": {},
    "dflash2": tiny.SECOND,
    "dspark": tiny.DSPARK | tiny.REDUCED,
    "domino": tiny.DOMINO,
}
GREEDY = {"max_new_tokens": 40, "do_sample": False}
SAMPLED = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.8, "top_k": 6}
DENSE = [name for name in tiny.FAMILIES if "expert" not in str(tiny.FAMILIES[name])]
PADS = ((0,), (0, 9, 3))


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The recordings of this test."""
    made, honest = [], execution_dflash.record

    def counted(run, device):
        result = honest(run, device)
        made.append(device)
        return result

    monkeypatch.setattr(execution_dflash, "record", counted)
    return made


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", ["eager", "graphs", "auto"])
def test_text_is_plain_greedy_text(family, kind, capture, recorded):
    target = tiny.target(family)
    for pads in PADS:
        inputs = tiny.batch(20, pads)
        expected = target.generate(**inputs, **GREEDY)
        draft, statistics = tiny.draft(target, **KINDS[kind]), DecodeStatistics()
        ours = {"custom_generate": draft.speculate, "capture": capture}
        assert torch.equal(target.generate(**inputs, **GREEDY, **ours), expected)
        ours |= {"statistics": statistics, "proposer": tiny.partly_right(expected)}
        assert torch.equal(target.generate(**inputs, **GREEDY, **ours), expected)
        assert {1, 1 + draft.config.num_drafted} <= set(statistics.committed)
    mode = execution_dflash.resolve_mode(capture, target, is_recurrent(target), GREEDY["max_new_tokens"])
    if mode == "graphs" and family in DENSE:
        assert len(recorded) >= 4


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_5_text", "qwen3_moe"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", PADS, ids=len)
def test_sampled_text_is_the_same_by_every_way(family, kind, rows):
    target, inputs = tiny.target(family), tiny.batch(20, rows)
    draft = tiny.draft(target, **KINDS[kind])

    def text(**more):
        torch.manual_seed(3)
        return target.generate(**inputs, **SAMPLED, custom_generate=draft.speculate, **more)

    expected = text(capture="eager")
    assert torch.equal(text(capture="graphs"), expected)
    assert torch.equal(text(capture="graphs", draft_sampling="greedy"), expected)
    assert torch.equal(text(capture="eager", proposer=tiny.partly_right(expected)), expected)
    assert torch.equal(text(capture="graphs", repetition_penalty=1.0001), text(repetition_penalty=1.0001))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("capture", ["eager", "graphs"])
def test_eager_attention_gives_its_own_text(family, capture):
    target = tiny.target(family)
    target.set_attn_implementation("eager")
    draft = tiny.draft(target)
    draft.set_attn_implementation("eager")
    inputs = tiny.batch(20, PADS[1])
    expected = target.generate(**inputs, **GREEDY)
    ours = {"custom_generate": draft.speculate, "proposer": tiny.partly_right(expected), "capture": capture}
    assert torch.equal(target.generate(**inputs, **GREEDY, **ours), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_texts_that_outgrow_their_buffers_are_recorded_again(family, recorded, monkeypatch):
    monkeypatch.setattr("dflash_hub.cache_dflash.BUCKET", 16)
    target, inputs = tiny.target(family), tiny.batch(20, PADS[1])
    asked = {"max_new_tokens": 120, "do_sample": False}
    expected = target.generate(**inputs, **asked)
    ours = {"custom_generate": tiny.draft(target).speculate, "proposer": tiny.partly_right(expected)}
    assert torch.equal(target.generate(**inputs, **asked, **ours, capture="graphs"), expected)
    assert len(recorded) > 8


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_outputs_of_recorded_blocks_are_those_of_plain_generate(family):
    target, inputs = tiny.target(family), tiny.batch(20, PADS[1])
    names = ("scores", "logits", "hidden_states")
    asked = GREEDY | {"return_dict_in_generate": True} | {f"output_{name}": True for name in names}
    expected = target.generate(**inputs, **asked)
    ours = {"custom_generate": tiny.draft(target).speculate, "proposer": tiny.partly_right(expected.sequences)}
    found = target.generate(**inputs, **asked, **ours, capture="graphs")
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert torch.allclose(torch.stack(found[name]), torch.stack(expected[name]), atol=1e-2, rtol=1e-3)
    for own, plain in zip(found.hidden_states[1:], expected.hidden_states[1:], strict=True):
        for layer, plain_layer in zip(own, plain, strict=True):
            assert torch.allclose(layer, plain_layer, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "minimax_m2"])  # its experts turn there
def test_half_precision_passes_its_self_check(family, dtype):
    target = tiny.target(family).to(dtype)
    draft, inputs = tiny.draft(target).to(dtype), tiny.batch(20, PADS[1])
    ours = target.generate(**inputs, **GREEDY, custom_generate=draft.speculate)
    assert ours.shape == (3, 60)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_give_plain_greedy_text(family, kind, recorded):
    target, inputs = tiny.target(family), tiny.batch(20, PADS[1])
    expected = target.generate(**inputs, **GREEDY)
    draft, told = tiny.draft(target, **KINDS[kind]), []
    ours = {"custom_generate": draft.speculate, "capture": "compile"}
    for proposer in (tiny.partly_right(expected), None, tiny.partly_right(expected, seed=1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(execution_dflash.logger, "warning_once", told.append)
            assert torch.equal(target.generate(**inputs, **GREEDY, **ours, proposer=proposer), expected)
    assert not told
    assert len(recorded) == (6 if ON_GPU else 0)


def test_a_recording_that_fails_leaves_the_device_as_it_was():
    if not ON_GPU:
        pytest.skip("a failure of CUDA's own")
    device = torch.device("cuda", 0)
    before, one = torch.cuda.current_stream(), torch.ones(4, device=device)
    for _ in range(2):
        with pytest.raises(Exception, match="captur"):
            execution_dflash.record(lambda: (one * 2).sum().item(), device)
        assert torch.cuda.current_stream() == before
        torch.rand(5, device=device)
        torch.multinomial(torch.ones(2, 5, device=device), 2)
    replay, doubled = execution_dflash.record(lambda: one * 2, device)
    one.fill_(7)
    replay()
    assert doubled.tolist() == [14.0] * 4
    torch.cuda.empty_cache()
    torch.rand(5, device=device)


def test_blocks_are_recorded_from_a_stream_of_the_users():
    if not ON_GPU:
        pytest.skip("streams are CUDA's")
    target, inputs = tiny.target("qwen3"), tiny.batch(20, PADS[1])
    expected = target.generate(**inputs, **GREEDY)
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        text = target.generate(**inputs, **GREEDY, custom_generate=tiny.draft(target).speculate)
        assert torch.cuda.current_stream() == own
    own.synchronize()
    assert torch.equal(text, expected)


def test_a_prompt_on_the_cpu_is_refused_with_both_devices():
    if not ON_GPU:
        pytest.skip("needs two devices")
    target, ids = tiny.target("qwen3"), tiny.prompt(9).cpu()
    with pytest.raises(ValueError, match=r"input_ids are on cpu, but Qwen3ForCausalLM is on cuda:0.*Move them"):
        target.generate(ids, **GREEDY, custom_generate=tiny.draft(target).speculate)


def test_threads_record_in_turn():
    pairs, faults = [], []
    for family in ("qwen3", "gemma3_text", "llama"):
        target = tiny.target(family)
        inputs = tiny.batch(20, PADS[1])
        pairs.append((target, tiny.draft(target), inputs, target.generate(**inputs, **GREEDY)))

    def work(target, draft, inputs, expected):
        try:
            for _ in range(4):
                text = target.generate(**inputs, **GREEDY, custom_generate=draft.speculate, capture="graphs")
                assert torch.equal(text, expected)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("capture", ["eager", "graphs"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_cycle_waits_for_the_device_once(family, capture, sampled):
    if not ON_GPU:
        pytest.skip("waits are counted by CUDA")
    target, inputs = tiny.target(family), tiny.batch(20, PADS[1])
    asked = inputs | (SAMPLED if sampled else GREEDY)
    draft, waits = tiny.draft(target), []

    def count(proposal, state):
        waits.append(len(caught))
        return proposal

    more = {"custom_generate": draft.speculate, "capture": capture, "proposer": tiny.steered(count)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.generate(**asked, **more)  # checks itself
        waits.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            target.generate(**asked, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    per_cycle = [after - before for before, after in itertools.pairwise(waits[4:])]
    places = [f"{one.filename.rsplit('/', 1)[-1]}:{one.lineno}" for one in caught[waits[4] : waits[6]]]
    # More only where a row ends.
    assert sorted(per_cycle)[len(per_cycle) // 2] == 1, places


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", ["eager", "graphs"])
def test_trees_look_ups_and_what_is_chosen_give_plain_text(family, kind, capture):
    target = tiny.target(family)
    draft = tiny.draft(target, **KINDS[kind])
    mode = execution_dflash.resolve_mode(capture, target, is_recurrent(target), GREEDY["max_new_tokens"])
    for pads in PADS:
        inputs = tiny.batch(24, pads)
        inputs["input_ids"][:, 16:] = inputs["input_ids"][:, 8:16]
        expected = target.generate(**inputs, **GREEDY)
        ours = {"custom_generate": draft.speculate, "capture": capture}
        for more in ({"proposal": "tree", "width": 20}, {"proposal": "lookup"}, {"proposal": "plain"}):
            assert torch.equal(target.generate(**inputs, **GREEDY, **ours, **more), expected)
        for seconds in ([1e-3, 1.01e-3], [1e-3, 5e-3]):
            known = {(len(pads), mode): Experience(CostTable([1, 128], list(seconds)))}
            draft.speculate.experiences[target] = known
            assert torch.equal(target.generate(**inputs, **GREEDY, **ours), expected)
        torch.manual_seed(3)
        chain = target.generate(**inputs, **SAMPLED, **ours, proposal="chain")
        torch.manual_seed(3)
        assert torch.equal(target.generate(**inputs, **SAMPLED, **ours, proposal="tree", width=12), chain)


def test_costs_are_measured_as_blocks_run(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    target, statistics = tiny.target("gemma3_text"), DecodeStatistics()
    draft, asked = tiny.draft(target), {"max_new_tokens": 150, "do_sample": False}
    inputs = tiny.batch(20, PADS[1])
    text = target.generate(**inputs, **asked, custom_generate=draft.speculate, capture="graphs", statistics=statistics)
    assert torch.equal(text, target.generate(**inputs, **asked))
    (experience,) = draft.speculate.experiences[target].values()
    print(experience.costs, statistics.proposed)
    assert experience.costs.sizes[-1] == 128
