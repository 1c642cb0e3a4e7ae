"""llama.cpp, as in llama-cpp-python 0.3.36, converts our drafts.

`convert_hf_to_gguf.py`, `conversion/qwen.py::DFlashModel` and `DSparkModel`; the file is read back by its `gguf`.
"""

import pytest

from jobs import LAYOUTS, SLIDING

UNSUPPORTED = {"domino": "embed_proj", "dspark-gated": "only 'vanilla' is supported", "reduced": "d2t"}
"""Drafts that it refuses, with a part of its message."""


def check(job, layout: str, name: str) -> None:
    found = job.read_by("llama_cpp", layout, name)
    config = job.drafts[name].config
    if name in UNSUPPORTED:
        assert UNSUPPORTED[name] in found["error"]
        return
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
    if isinstance(config.is_causal, bool):  # else it runs all layers bidirectionally
        assert keys["attention.causal"] is config.is_causal
    assert len(found["tensors"]) == len(job.drafts[name].state_dict())


@pytest.mark.parametrize("name", LAYOUTS["engines"])
def test_it_converts_the_engines_layout(job, name):
    check(job, "engines", name)


def test_it_fails_at_the_muse_layout_for_a_qwen3_target(job):
    """Its class for Muse drafts lacks what the tokenizer of a Qwen3 target is read with."""
    assert "origin_hf_arch" in job.read_by("llama_cpp", "muse", "plain")["error"]
