"""llama.cpp, as in llama-cpp-python 0.3.36, converts our drafts.

`convert_hf_to_gguf.py`, `conversion/qwen.py::DFlashModel` and `DSparkModel`; the file is read back by its `gguf`.
"""

import pytest

from conftest import LAYOUTS, SLIDING

# The tensors of GGUF that a layer and a whole draft have, by what the converter makes of their names.
LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def check(job, layout: str, name: str) -> None:
    found = job.read_by("llama_cpp", layout, name)
    config = job.drafts[name].config
    assert "keys" in found, found
    keys = {key.removeprefix("dflash."): value for key, value in found["keys"].items()}
    sliding = [kind == SLIDING for kind in config.layer_types]
    expected = {
        "general.architecture": "dflash",
        "block_size": config.block_size,
        "target_layers": [1, 3],
        "mask_token_id": 3,
        "block_count": 2,
        "embedding_length": config.hidden_size,
        "rope.freq_base": pytest.approx(config.rope_parameters["rope_theta"]),
    }
    if any(sliding):
        expected["attention.sliding_window"] = config.sliding_window
        expected["attention.sliding_window_pattern"] = sliding
    assert {key: keys.get(key) for key in expected} == expected
    assert keys.get("attention.causal", False) is any(config.causal_layers)
    stored = set(job.drafts[name].state_dict())
    assert len(found["tensors"]) == len(stored)


@pytest.mark.parametrize("name", LAYOUTS["engines"])
def test_it_converts_the_engines_layout(job, name):
    check(job, "engines", name)


@pytest.mark.parametrize("name", LAYOUTS["muse"])
def test_it_converts_the_muse_layout(job, name):
    check(job, "muse", name)
