"""Targets that were changed after they were loaded: adapters, weights of fewer bits."""

import pytest
import torch

import tiny
from dflash_hub import DecodeStatistics

# Both libraries warn of what they will change themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft", reason="peft is not installed; pip install 'dflash-hub[peft]' runs these")
quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed; pip install 'dflash-hub[int8]' runs these"
)
PROMPT = {"input_ids": tiny.prompt(12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
ASKED = PROMPT | {"max_new_tokens": 40, "do_sample": False}


def adapted(seed: int = 0, modules: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"), **settings):
    """A target with low-rank adapters that do change its text."""
    torch.manual_seed(seed)
    settings |= {"r": 4, "target_modules": list(modules), "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    settings = peft.LoraConfig(**settings)
    return peft.get_peft_model(tiny.target("qwen3"), settings).eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_target_with_adapters_gives_its_own_text(seed):
    target = adapted(seed)
    draft, statistics = tiny.draft(target), DecodeStatistics()
    expected = target.generate(**ASKED)
    assert len(set(expected[0, 12:].tolist())) > 3
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate, statistics=statistics), expected)
    assert torch.equal(draft.spec_generate(target, PROMPT["input_ids"], max_new_tokens=40), expected)
    with target.disable_adapter():
        assert not torch.equal(target.generate(**ASKED), expected)


def test_a_target_with_an_adapter_on_its_embedding_gives_its_own_text():
    target = adapted(modules=("q_proj", "embed_tokens"))
    text = target.generate(**ASKED, custom_generate=tiny.draft(target).speculate)
    assert torch.equal(text, target.generate(**ASKED))


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
