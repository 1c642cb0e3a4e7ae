"""vLLM 0.33.0 decides what a draft is, and its classes take the weights.

`config/speculative.py::SpeculativeConfig`, `transformers_utils/configs/{eagle,speculators/algos}.py`,
`models/registry.py::ModelRegistry`, `models/qwen3_dflash.py::_resolve_layer_attention` and the `load_weights` of the
class that it finds. No forward runs: its attention needs a GPU.
"""

import pytest

from jobs import LAYOUTS, windows

UNSUPPORTED = {"domino": "embed_proj", "dspark-gated": "markov_head"}
"""Drafts that it refuses, with a part of its message."""

CLASSES = {
    "dflash": ("dflash", "DFlashQwen3ForCausalLM"),
    "dflash2": ("dflash", "DFlash2Qwen3ForCausalLM"),
    "dspark": ("dspark", "Qwen3DSparkForCausalLM"),
}
BORROWED = {"lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding"}
"""Parameters that it fills with the target's, and one that another file may hold."""


def check(job, layout: str, name: str) -> None:
    found = job.read_by("vllm", layout, name)
    if name in UNSUPPORTED:
        assert UNSUPPORTED[name] in found["error"]
        return
    config = job.drafts[name].config
    method, model_class = CLASSES[config.model_type]
    expected = {
        "method": method,
        "class": model_class,
        "layer_ids": [1, 3],  # the embedding's output is 0
        "mask_token_id": 3,
        "causal": config.causal_layers,
        "windows": windows(config),
        "rope": config.rope_parameters,
    }
    if config.sample_from_anchor or layout == "speculators":  # otherwise the user passes it
        expected["proposed"] = config.block_size - (not config.sample_from_anchor)
    assert {key: found[key] for key in expected} == expected
    own = {"lm_head.weight"} if config.has_own_lm_head else set()
    assert set(found["empty"]) == BORROWED - own


@pytest.mark.parametrize("name", LAYOUTS["engines"])
def test_it_reads_the_engines_layout(job, name):
    check(job, "engines", name)


@pytest.mark.parametrize("name", LAYOUTS["speculators"])
def test_it_reads_the_speculators_layout(job, name):
    check(job, "speculators", name)


@pytest.mark.parametrize("name", LAYOUTS["muse"])
def test_it_reads_the_muse_layout(job, name):
    check(job, "muse", name)
