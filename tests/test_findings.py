"""Checks yield every fault as a finding, and loading or decoding raises the first."""

import json

import pytest

import tiny
from dflash_hub import DFlash2Config, DFlashConfig
from dflash_hub.configuration_dflash import EXTENSIONS
from dflash_hub.findings_dflash import reason
from dflash_hub.layouts import layout_findings
from dflash_hub.layouts_dflash import read_own_layout
from dflash_hub.support_dflash import draft_findings
from paths import DATA

PUBLISHED = sorted((DATA / "published_configs").glob("*.json"))
RUN = "which this version of dflash-hub does not run (it must be None or False or 0); it would load and draft nonsense"


def qwen3_4b(**changes) -> dict:
    """The published config of the Qwen3-4B draft, with changes; a change to None removes the key."""
    config = json.loads((DATA / "published_configs" / "z-lab__Qwen3-4B-DFlash-b16.json").read_text())
    config["dflash_config"] |= changes.pop("dflash_config", {})
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


def messages(config: dict) -> list[str]:
    return [str(finding) for finding in layout_findings(config)]


def error_of(kind: type[DFlashConfig], config: dict) -> str | None:
    """The message with which loading fails, if it does."""
    try:
        kind.from_dict(config)
    except ValueError as error:
        return str(error)
    return None


def test_of_an_error_without_a_connection_stays_what_is_wrong_and_the_offline_setting_is_named(monkeypatch):
    error = OSError("We couldn't connect, and it is not cached.\nCheck your internet connection or see how to")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert reason(error) == "We couldn't connect, and it is not cached."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert reason(error).endswith("not cached. HF_HUB_OFFLINE is set; without it the Hub is asked.")
    assert reason(OSError("no\nroom")) == "no\nroom"


@pytest.mark.quick
def test_four_faults_of_different_kinds_are_four_findings_and_loading_raises_the_first():
    config = qwen3_4b(
        attention_sink_bias=True,
        hidden_size="2560",
        head_dim=None,
        rope_theta=-1.0,
        dflash_config={"casual": True, "mask_token_id": 5},
    )
    config["mask_token_id"] = 6
    expected = [
        f"This draft uses attention sinks (attention_sink_bias is True), {RUN}, so it is refused.",
        "The draft's config.json has dflash_config.casual, which is True; no such key is known, so it is refused: is "
        "causal meant?",
        "The draft's config.json contradicts itself about mask_token_id: mask_token_id is 6 but "
        "dflash_config.mask_token_id is 5. Correct the file, or choose a value: from_pretrained(..., "
        "mask_token_id=...).",
        "The draft's config.json says hidden_size is '2560'; it must be an int from 1 to 1048576.",
        "The draft's config.json does not say head_dim (no head_dim), and it is not guessed; supply it: "
        "from_pretrained(..., head_dim=...), an even int from 2 to 16384.",
        "The draft's config.json says rope_theta is -1.0; it must be a number above 0, at most 1e+15.",
    ]
    assert messages(config) == expected
    assert error_of(DFlashConfig, config) == expected[0]


@pytest.mark.quick
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_config_has_findings_exactly_where_it_is_refused(path):
    config = json.loads(path.read_text())
    kind = DFlash2Config if "DFlash2" in path.stem else DFlashConfig
    assert next(iter(messages(config)), None) == error_of(kind, config)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (
            {
                "dflash_config": {"hidden_dim_adapter": 8, "attention_sink_bias": True},
                "kv_lora_rank": 5,
                "model_type": "laguna",
            },
            4,
        ),
        ({"architectures": 5, "model_type": 5, "hidden_size": 0}, 3),
        ({"rope_parameters": {"factr": 2.0, "rope_type": "banana", "partial_rotary_factor": 0.5, "a": {}}}, 4),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": "2"}, "layer_types": ["linear"]}, 3),
        ({"architectures": ["Qwen3ForCausalLM"], "hidden_size": "x"}, 1),
        ({"block_size": [16], "dflash_config": {"block_size": 8}}, 1),
        ({"layer_types": ["full_attention"], "num_key_value_heads": 5}, 1),
        ({"num_key_value_heads": 5}, 1),
    ],
)
def test_independent_faults_are_all_found_and_of_the_others_the_first(changes, count):
    config = qwen3_4b(**changes)
    found = messages(config)
    assert len(found) == count, found
    assert error_of(DFlashConfig, config) == found[0]


def test_a_file_that_holds_no_dict_is_one_finding():
    assert messages([1]) == ["The draft's config.json is [1]; it must be a dict of fields."]
    assert messages(qwen3_4b() | {"dflash_config": []})[0].endswith("dflash_config is []; it must be a dict.")


@pytest.mark.quick
def test_fields_that_contradict_each_other_are_all_found():
    fields = {"block_size": 4, "mask_token_id": 3, "target_layer_ids": [0, 2], "vocab_size": 99}
    config = DFlash2Config(**fields)
    assert list(config.consistency_findings()) == []
    config.num_key_value_heads, config.vocab_size = 5, 3
    config.layer_types, config.num_target_layers = ["full_attention"] * 4, 2
    config.conv_group_size, config.is_causal = 5, [True]
    config.rope_parameters = {"rope_type": "yarn"}
    found = [str(finding) for finding in config.consistency_findings()]
    starts = ("conv_group_size", "selector_top_k", "rope_parameters", "mask_token_id", "target_layer_ids")
    starts += ("layer_types", "num_attention_heads", "is_causal")
    assert len(found) == len(starts)
    assert all(message.startswith(start) for message, start in zip(found, starts, strict=True)), found


def test_findings_of_a_target_come_before_those_of_the_fit():
    target = tiny.target("llama")
    draft = tiny.draft(target)
    assert list(draft_findings(draft.config, target)) == []
    draft.config.num_target_layers, draft.config.vocab_size = 900, 70
    target.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    found = list(draft_findings(draft.config, target))
    assert [finding.found for finding in found] == ["dynamic", 900, 70]
    assert str(found[1]).startswith("This draft does not fit this target: num_target_layers is 900 in the draft, but")
    with pytest.raises(ValueError, match="rotary embeddings of type dynamic"):
        target.generate(tiny.prompt(4), max_new_tokens=4, custom_generate=draft.speculate)


def test_the_reader_that_travels_raises_its_first_finding(monkeypatch):
    monkeypatch.setattr(EXTENSIONS, "read_layout", read_own_layout)
    with pytest.raises(ValueError, match=r"^Another program than dflash-hub wrote .*pip install dflash-hub$"):
        DFlashConfig.from_dict(qwen3_4b(dflash_config={"casual": True}))
