"""Families that no test decodes by name are held to the text of their own `generate` by the benchmark's rules."""

import sys

import pytest

from dflash_hub.support_dflash import TESTED
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import families

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = (
    *("phi", "phi3", "granite", "olmo2", "smollm3", "cohere2", "ernie4_5", "exaone4", "seed_oss", "hy_v3", "codegen"),
    *("bamba", "falcon_h1", "granitemoehybrid", "deepseek_v2", "laguna", "mimo_v2_flash"),
)


@pytest.mark.parametrize("family", EXACT)
def test_a_family_of_the_table_decodes_exactly(family, monkeypatch):
    monkeypatch.setattr(families, "BATCH_BLOCKS", (6,))
    word, why = families.outcome(family)
    if word == families.NOT_BUILT and "does not recognize" in why:
        pytest.skip(f"this transformers has no {family}; a newer one runs this")
    assert word == families.EXACT, why
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
