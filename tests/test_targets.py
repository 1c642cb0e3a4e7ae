"""Targets that were changed after they were loaded: adapters, weights of fewer bits."""

import pytest
import torch

import tiny
from dflash_hub import DecodeStatistics, generate_dflash

# Both libraries warn of what they will change themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft", reason="peft is not installed; pip install 'dflash-hub[peft]' runs these")
quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed; pip install 'dflash-hub[int8]' runs these"
)
PROMPT = {"input_ids": tiny.prompt(12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
ASKED = PROMPT | {"max_new_tokens": 20, "do_sample": False}


def settings(modules: tuple[str, ...], **more):
    """Settings of an adapter that does change a text."""
    fixed = {"r": 4, "target_modules": list(modules), "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**fixed, **more)


def adapted(seed: int = 0, modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"), **more):
    """A target with low-rank adapters."""
    torch.manual_seed(seed)
    return peft.get_peft_model(tiny.target("qwen3"), settings(modules, **more)).eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_target_with_adapters_gives_its_own_text(seed):
    target = adapted(seed)
    draft, statistics = tiny.draft(target), DecodeStatistics()
    expected = target.generate(**ASKED)
    assert len(set(expected[0, 12:].tolist())) > 3
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate, statistics=statistics), expected)
    assert torch.equal(draft.spec_generate(target, PROMPT["input_ids"], max_new_tokens=20), expected)
    with target.disable_adapter():
        assert not torch.equal(target.generate(**ASKED), expected)


def test_a_target_with_an_adapter_on_its_embedding_gives_its_own_text():
    target = adapted(modules=("q_proj", "embed_tokens"))
    text = target.generate(**ASKED, custom_generate=tiny.draft(target).speculate)
    assert torch.equal(text, target.generate(**ASKED))


def test_adapters_that_are_switched_merged_and_disabled_between_calls_give_their_own_text():
    target = adapted()
    target.add_adapter("other", settings(("k_proj", "up_proj")))
    draft, texts = tiny.draft(target), []
    speculate = draft.speculate

    def check():
        texts.append(target.generate(**ASKED))
        assert torch.equal(target.generate(**ASKED, custom_generate=speculate), texts[-1])

    check()
    target.set_adapter("other")
    check()
    target.merge_adapter()
    check()
    target.unmerge_adapter()
    with target.disable_adapter():
        check()
    target = target.merge_and_unload()
    check()
    assert len({tuple(text[0].tolist()) for text in texts}) == 3


def test_the_self_check_runs_again_where_the_arrangement_of_weights_has_changed(monkeypatch):
    target, checks = adapted(), []
    target.add_adapter("other", settings(("k_proj",)))
    speculate, own_check = tiny.draft(target).speculate, generate_dflash.check_alone
    monkeypatch.setattr(generate_dflash, "check_alone", lambda *args: checks.append(1) or own_check(*args))

    def count():
        target.generate(**ASKED, custom_generate=speculate)
        return len(checks)

    assert [count(), count()] == [1, 1]
    target.set_adapter("other")
    assert [count(), count()] == [2, 2]
    target.merge_adapter()
    assert count() == 3
    target.unmerge_adapter()
    assert count() == 3, "that arrangement was checked"
    target.get_base_model().resize_token_embeddings(16)
    assert count() == 4


def test_rows_with_adapters_of_their_own_give_their_own_text():
    target = adapted()
    target.add_adapter("other", settings(("k_proj", "up_proj")))
    inputs = tiny.batch(9, pads=(0, 3, 0)) | {"adapter_names": ["default", "other", "__base__"]}
    asked = {"max_new_tokens": 24, "do_sample": False}
    expected = target.generate(**inputs, **asked)
    assert torch.equal(target.generate(**inputs, **asked, custom_generate=tiny.draft(target).speculate), expected)


def test_an_activated_adapter_is_refused_only_while_it_is_in_use():
    target = adapted()
    target.add_adapter("activated", settings(("q_proj",), alora_invocation_tokens=[9, 10]))
    draft = tiny.draft(target)
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate), target.generate(**ASKED))
    target.set_adapter("activated")
    with pytest.raises(ValueError, match="an activated LoRA adapter"):
        target.generate(**ASKED, custom_generate=draft.speculate)
    with target.disable_adapter():
        assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate), target.generate(**ASKED))


def test_dropout_of_an_adapter_in_training_mode_is_refused_by_name():
    target = adapted(lora_dropout=0.3).train()
    with pytest.raises(ValueError, match="is in training mode, and its forward draws random numbers"):
        target.generate(**ASKED, custom_generate=tiny.draft(target).speculate)


def test_an_adapter_that_the_prompt_switches_on_is_refused_by_name():
    target = adapted(alora_invocation_tokens=[9, 10])
    with pytest.raises(ValueError, match="an activated LoRA adapter"):
        target.generate(**ASKED, custom_generate=tiny.draft(target).speculate)


@pytest.mark.quick
def test_virtual_tokens_before_the_prompt_are_refused_by_name():
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    target = peft.get_peft_model(tiny.target("qwen3"), settings).eval()
    draft = tiny.draft(target)
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts virtual tokens before the prompt"):
        target.generate(**ASKED, custom_generate=draft.speculate)
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts virtual tokens before the prompt"):
        draft.spec_generate(target, PROMPT["input_ids"])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_a_target_with_int8_weights_gives_its_own_text(family):
    target = tiny.target(family)
    plain = target.generate(**ASKED)
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    draft, statistics = tiny.draft(target), DecodeStatistics()
    expected = target.generate(**ASKED)
    assert not torch.equal(plain, expected), "the weights are as they were"
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate, statistics=statistics), expected)
    assert len(set(statistics.committed)) > 1
