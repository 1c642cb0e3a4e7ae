"""SGLang 0.5.23 reads the fields of a draft from our config.json.

`speculative/dflash_utils.py::parse_dflash_draft_config`, `models/dflash.py::_get_dflash_layer_attention_params` and
`EntryClass`, for DSpark `speculative/dspark_components/dspark_config.py::resolve_runtime_config`.
"""

import pytest

from jobs import LAYOUTS, windows

UNSUPPORTED = ("reduced", "dspark-reduced", "dspark-no-bias")
"""The first two it takes, and does not read their vocabulary, nor their head."""
FILES = {"dflash": "dflash.py", "dflash2": "dflash.py", "dspark": "dspark.py", "domino": "dflash.py"}
FIELDS = {
    "dflash": (),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "output_multiplier"),
    "dspark": ("markov_rank", "markov_head_type", "sample_from_anchor"),
    "domino": ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"),
}


def check(job, layout: str, name: str) -> None:
    found = job.read_by("sglang", layout, name)
    config = job.drafts[name].config
    expected = {
        "file": FILES[config.model_type],
        "layer_ids": config.target_layer_ids,  # its hook adds 1
        "num_target_layers": config.num_target_layers,
        "mask_token_id": 3,
        "causal": config.causal_layers,
        "windows": windows(config),
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    size = "proposed" if config.model_type == "dspark" else "block_size"
    expected[size] = config.block_size
    if config.model_type == "domino":
        expected |= {"projector_type": "domino", "shift_label": True}
    expected |= {field: getattr(config, field) for field in FIELDS[config.model_type]}
    assert found | expected == found


@pytest.mark.parametrize("name", [name for name in LAYOUTS["engines"] if name not in UNSUPPORTED])
def test_it_reads_the_engines_layout(job, name):
    check(job, "engines", name)


@pytest.mark.parametrize("name", LAYOUTS["muse"])
def test_it_reads_the_muse_layout(job, name):
    check(job, "muse", name)


def test_it_refuses_a_dspark_draft_without_a_bias(job):
    assert "markov_rank > 0" in job.read_by("sglang", "engines", "dspark-no-bias")["error"]


def test_it_refuses_the_speculators_layout(job):
    """It has no reader of it, so transformers is asked, which does not know it."""
    assert "ValueError" in job.read_by("sglang", "speculators", "plain")["error"]
