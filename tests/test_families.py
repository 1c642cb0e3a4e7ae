"""Families that no test decodes by name are held to the text of their own `generate` by the benchmark's rules."""

import functools
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

import tiny
from dflash_hub.support_dflash import TESTED, check_target
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import families

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = (
    *("phi", "phi3", "granite", "olmo2", "smollm3", "cohere2", "ernie4_5", "exaone4", "seed_oss", "hy_v3", "codegen"),
    *("bamba", "falcon_h1", "granitemoehybrid", "deepseek_v2", "laguna", "mimo_v2_flash", "beam", "mellum"),
)
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32}
# Model type of a whole model whose text part has no causal model of its own -> the type and fields of that part, the
# fields of its vision part, and those of the whole.
WHOLE = {
    "kimi_k25": ("deepseek_v3", tiny.FAMILIES["deepseek_v3"], EYES, {}),
    "muse_glimmer": ("muse_glimmer_text", tiny.SLIDING, EYES, {"projector_hidden_size": 16}),
    "step3p7": (
        "step3p5",
        tiny.SLIDING | ROUTED | {"mlp_layer_types": ["dense", "sparse"] * 2},
        {"width": 32, "layers": 1, "heads": 2, "patch_size": 4, "image_size": 16},
        {},
    ),
}


@pytest.fixture
def shorter(monkeypatch):
    """The benchmark's rules with fewer blocks and less text, of families whose own batches are known to be sound."""
    monkeypatch.setattr(families, "ROWS", ((40, 16),))
    monkeypatch.setattr(families, "BATCH_BLOCKS", (6,))
    monkeypatch.setattr(families, "batch_is_sound", lambda model, inputs: True)
    monkeypatch.setattr(families, "decode_both", functools.partial(families.decode_both, new=12))


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.usefixtures("shorter")
def test_a_family_of_the_table_decodes_exactly(family):
    word, why = families.outcome(family)
    if word == families.NOT_BUILT and "does not recognize" in why:
        pytest.skip(f"this transformers has no {family}; a newer one runs this")
    assert word == families.EXACT, why
    assert family in TESTED


@pytest.mark.parametrize("model_type", WHOLE)
@pytest.mark.usefixtures("shorter")
def test_the_text_part_of_a_model_that_sees_images_decodes_exactly(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}; a newer one runs this")
    family, text, vision, whole = WHOLE[model_type]
    text = tiny.SMALL | text | {"model_type": family}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **whole)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model = tiny.scaled(model, model_type)
    check_target(model)
    assert families.decode_all(model) == (families.EXACT, "")
    assert family in TESTED


@pytest.mark.quick
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v32", "keeps state that cannot be put back"),
        ("llama4_text", "chunked attention"),
        ("mamba", "no attention layer at all"),
        ("bloom", "takes no position_ids"),
        ("trocr", "takes no position_ids"),
        ("openai-gpt", "takes no cache"),
    ],
)
def test_what_cannot_be_taken_back_is_refused_before_any_forward(family, reason):
    word, why = families.outcome(family)
    assert word == families.REFUSED
    assert reason in why


@pytest.mark.parametrize("family", ["xglm", "zamba2", "jamba", "doge"])
def test_what_runs_otherwise_as_a_block_is_stopped_by_the_self_check(family):
    assert families.outcome(family)[0] == families.CAUGHT
