"""Every published layout is read into the same fields; what cannot be run or contradicts itself is refused by name."""

import json

import pytest

from dflash_hub import DFlash2Config, DFlashConfig, DominoConfig, DSparkConfig, load_draft
from dflash_hub.configuration_dflash import EXTENSIONS
from dflash_hub.layouts import _HARMLESS, read_layout
from dflash_hub.layouts_dflash import engines_layout, engines_remarks, read_own_layout
from paths import DATA, TINY

PUBLISHED = DATA / "published_configs"
FULL, SLIDING = "full_attention", "sliding_attention"

READ = {
    "z-lab__Qwen3-4B-DFlash-b16": dict(
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=[1, 9, 17, 25, 33],
        num_target_layers=36,
        is_causal=False,
        layer_types=[FULL] * 5,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000},
        hidden_size=2560,
        intermediate_size=9728,
        head_dim=128,
        vocab_size=151936,
        final_logit_softcapping=None,
    ),
    "z-lab__Qwen3.5-4B-DFlash": dict(
        block_size=16,
        mask_token_id=248077,
        target_layer_ids=[1, 5, 9, 13, 17, 21, 25, 29],
        num_target_layers=32,
        is_causal=[True] * 5 + [False],
        layer_types=[SLIDING] * 5 + [FULL],
        sliding_window=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000},
        hidden_size=2560,
        vocab_size=248320,
    ),
    "z-lab__gemma-4-26B-A4B-it-DFlash": dict(
        block_size=16,
        mask_token_id=4,
        target_layer_ids=[1, 6, 11, 17, 22, 27],
        is_causal=[True] * 4 + [False],
        sliding_window=2048,
        final_logit_softcapping=30.0,
        hidden_size=2816,
        vocab_size=262144,
    ),
    "meta-models__Muse-Glimmer-30B-assistant": dict(
        block_size=16,
        mask_token_id=201818,
        target_layer_ids=[1, 13, 25, 37, 49],
        num_target_layers=None,
        is_causal=False,
        layer_types=[SLIDING] * 5,
        sliding_window=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        vocab_size=None,
    ),
    "RedHatAI__gemma-4-31B-it-speculator.dflash": dict(
        block_size=8,
        mask_token_id=4,
        target_layer_ids=[0, 16, 28, 46, 57],
        num_target_layers=None,
        target_hidden_size=5376,
        is_causal=False,
        layer_types=[FULL] * 5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        hidden_size=5376,
        vocab_size=262144,
        draft_vocab_size=32000,
        has_own_lm_head=True,
        has_own_embed_tokens=False,
        sample_from_anchor=False,
        window_from_anchor=False,
    ),
    "converted_z-lab__Qwen3.6-35B-A3B-DFlash": dict(
        block_size=16,
        mask_token_id=248070,
        target_layer_ids=[1, 10, 19, 28, 37],
        is_causal=False,
        num_hidden_layers=8,
        max_position_embeddings=262144,
        vocab_size=248320,
        draft_vocab_size=None,
        has_own_lm_head=False,
    ),
}
REFUSED = {
    "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash": "attention sinks",
    "z-lab__Qwen3.8-27B-DFlash2": "a DFlash 2 draft",
    "z-lab__Muse-Glimmer-30B-DFlash2": "a DFlash 2 draft",
    "incoai__GLM-5.3-Flash-DFlash2": "a DFlash 2 draft",
}
EARLY = "early_speculators_test_repo"
NEMOTRON = "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash"


def read(name: str, **given):
    return DFlashConfig.from_pretrained(PUBLISHED / f"{name}.json", **given)


def qwen3_4b(**changes) -> dict:
    """The published config of the Qwen3-4B draft, with changes; a change to None removes the key."""
    config = json.loads((PUBLISHED / "z-lab__Qwen3-4B-DFlash-b16.json").read_text())
    config["dflash_config"] |= changes.pop("dflash_config", {})
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


def small(**fields):
    return DFlashConfig(**({"block_size": 4, "mask_token_id": 3, "target_layer_ids": [0, 2]} | fields))


@pytest.mark.quick
@pytest.mark.parametrize("name", READ)
def test_published_configs_are_read_into_these_fields(name):
    config = read(name)
    assert {field: getattr(config, field) for field in READ[name]} == READ[name]


def test_the_config_without_a_block_size_asks_for_it_and_takes_it():
    with pytest.raises(ValueError, match=r"does not say block_size.*from_pretrained\(\.\.\., block_size="):
        read(NEMOTRON)
    config = read(NEMOTRON, block_size=8)
    assert (config.block_size, config.mask_token_id, config.target_layer_ids) == (8, 990, [1, 5, 19, 29, 41, 51])
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["original_max_position_embeddings"] == 8192


def test_an_early_speculators_config_asks_for_what_it_lacks_and_takes_it():
    taps = {"target_layer_ids": [1, 17, 33]}
    with pytest.raises(ValueError, match=r"does not say target_layer_ids \(aux_hidden_state_layer_ids is None\)"):
        read(EARLY, mask_token_id=5)
    with pytest.raises(ValueError, match=r"does not say mask_token_id \(no mask_token_id\)"):
        read(EARLY, **taps)
    config = read(EARLY, mask_token_id=5, **taps)
    assert (config.draft_vocab_size, config.rope_parameters["rope_theta"]) == (32000, 10000.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_sentence_that_names_it(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        read(name)
    assert "refused" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_published_config_is_either_read_or_refused_by_these_tests():
    assert {path.stem for path in PUBLISHED.glob("*.json")} == {*READ, *REFUSED, NEMOTRON, EARLY}


@pytest.mark.parametrize("layout", ["hub", "engines"])
@pytest.mark.parametrize("name", [*READ, NEMOTRON])
def test_reading_back_what_was_written_gives_an_equal_config(name, layout, tmp_path):
    config = read(name, block_size=8) if name == NEMOTRON else read(name)
    if layout == "engines" and config.vocab_size is None:
        config.vocab_size = 202048
    if layout == "engines" and config.num_target_layers is None:
        config.num_target_layers = 60
    config.save_pretrained(tmp_path, layout=layout)
    again = DFlashConfig.from_pretrained(tmp_path)
    assert again == config
    again.block_size += 1
    assert again != config


def test_the_engines_layout_of_a_full_attention_draft_is_this_key_for_key(tmp_path):
    read("z-lab__Qwen3-4B-DFlash-b16").save_pretrained(tmp_path, layout="engines")
    shared = dict(block_size=16, mask_token_id=151669, target_layer_ids=[1, 9, 17, 25, 33], num_target_layers=36)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        **shared,
        "dflash_config": {**shared, "causal": False},
        "is_causal": False,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
        "layer_types": [FULL] * 5,
        "max_window_layers": 5,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def test_the_engines_layout_of_a_sliding_draft_says_the_window_in_every_engines_words(tmp_path):
    config = small(layer_types=[SLIDING] * 5, sliding_window=64, is_causal=False, num_target_layers=8, vocab_size=99)
    config.save_pretrained(tmp_path, layout="engines")
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["use_sliding_window"], written["sliding_window"]) == (True, 64)
    assert written["dflash_config"]["use_swa"] is True
    assert written["dflash_config"]["swa_window_size"] == 64
    assert written["is_causal"] is written["dflash_config"]["causal"] is False


def test_mixed_causality_goes_unsaid_for_engines_whose_rule_it_is_and_is_refused_otherwise(tmp_path):
    read("z-lab__Qwen3.5-4B-DFlash").save_pretrained(tmp_path, layout="engines")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "is_causal" not in written
    assert "causal" not in written["dflash_config"]
    assert "use_swa" not in written["dflash_config"]  # llama.cpp would make all layers slide
    other = small(num_hidden_layers=2, is_causal=[True, False], num_target_layers=8, vocab_size=99)
    with pytest.raises(ValueError, match="engines layout stores one value"):
        other.save_pretrained(tmp_path, layout="engines")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": [SLIDING] * 5}, []),
        ({"layer_types": [SLIDING] * 4 + [FULL], "is_causal": False}, ["TensorRT-LLM"]),
        ({"layer_types": [SLIDING] * 4 + [FULL]}, ["TensorRT-LLM", "llama.cpp"]),
    ],
)
def test_remarks_name_the_engines_that_run_mixed_layers_otherwise(fields, named):
    remarks = engines_remarks(small(sliding_window=64, **fields))
    assert len(remarks) == len(named)
    assert all(name in remark for name, remark in zip(named, remarks, strict=True))


def test_the_hub_layout_says_causality_outright_and_who_wrote_it(tmp_path):
    import dflash_hub

    small().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["is_causal"] is False
    assert written["model_type"] == "dflash"
    assert written["dflash_hub_version"] == dflash_hub.__version__


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"it must be one of 'hub', 'engines'"):
        small().save_pretrained(tmp_path, layout="vllm")


def test_equal_copies_of_a_field_are_fine_in_every_place():
    config = DFlashConfig.from_dict(
        qwen3_4b(
            mask_token_id=151669,
            pard_token=151669,
            target_layer_ids=[1, 9, 17, 25, 33],
            eagle_aux_hidden_state_layer_ids=[2, 10, 18, 26, 34],
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            is_causal=False,
            dflash_config={"block_size": 16, "causal": False, "num_target_layers": 36},
        )
    )
    assert config == read("z-lab__Qwen3-4B-DFlash-b16")


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"dflash_config": {"block_size": 8}}, ["block_size is 16", "dflash_config.block_size is 8"]),
        ({"mask_token_id": 5}, ["mask_token_id is 5", "dflash_config.mask_token_id is 151669"]),
        ({"target_layer_ids": [1, 2]}, ["target_layer_ids is [1, 2]", "dflash_config.target_layer_ids is [1, 9"]),
        ({"eagle_aux_hidden_state_layer_ids": [1, 9, 17, 25, 33]}, ["eagle_aux_hidden_state_layer_ids"]),
        ({"rope_parameters": {"rope_theta": 5e6}}, ["rope_theta is 1000000", "rope_parameters.rope_theta is 5000000"]),
        (
            {"is_causal": False, "dflash_config": {"causal": True}},
            ["is_causal is False", "config.causal is True"],
        ),
        ({"layer_types": [SLIDING] * 5, "sliding_window": 64}, ["layer_types", "use_sliding_window is False"]),
        (
            {"layer_types": [SLIDING] * 5, "sliding_window": 64, "use_sliding_window": True}
            | {"dflash_config": {"swa_window_size": 32}},
            ["sliding_window is 64", "dflash_config.swa_window_size is 32"],
        ),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, ["dtype is 'bfloat16'", "torch_dtype is 'float16'"]),
    ],
)
def test_contradicting_copies_are_refused_with_both_places_named(changes, places):
    with pytest.raises(ValueError, match="contradicts itself") as caught:
        DFlashConfig.from_dict(qwen3_4b(**changes))
    assert all(place in str(caught.value) for place in places), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "keyword"),
    [
        ({"dflash_config": {"block_size": 8}}, {"block_size": 8}),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {"dtype": "float16"}),
        ({"rope_parameters": {"rope_theta": 5e6}}, {"rope_theta": 5e6}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_the_keyword_that_a_contradiction_advises_settles_it(changes, keyword):
    with pytest.raises(ValueError, match=rf"from_pretrained\(\.\.\., {next(iter(keyword))}="):
        DFlashConfig.from_dict(qwen3_4b(**changes))
    DFlashConfig.from_dict(qwen3_4b(**changes), **keyword)


@pytest.mark.parametrize("inside", [False, True], ids=["beside it", "inside it"])
def test_given_rope_parameters_take_their_theta_from_the_file(inside):
    stored = {"rope_theta": None, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}} if inside else {}
    config = DFlashConfig.from_dict(qwen3_4b(**stored), rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000}


def test_dtypes_are_the_same_however_they_are_written():
    config = DFlashConfig.from_dict(qwen3_4b(dtype="torch.bfloat16", torch_dtype="bfloat16"))
    assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("rope", [{"factor": 4.0}, {"rope_type": "banana"}, {"rope_theta": "5000"}])
def test_rotary_parameters_that_make_no_sense_are_refused(rope):
    with pytest.raises(ValueError, match="rope"):
        DFlashConfig.from_dict(qwen3_4b(rope_theta=None, rope_parameters={"rope_theta": 1e6} | rope))


def test_a_keyword_settles_a_contradiction():
    config = DFlashConfig.from_dict(qwen3_4b(dflash_config={"block_size": 8}), block_size=8)
    assert config.block_size == 8


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"architectures": ["Qwen3DSparkModel"], "markov_rank": 0}, "DSpark"),
        ({"markov_rank": 256}, "a DSpark draft"),
        ({"model_type": "laguna"}, "per-tap norms"),
        ({"dflash_config": {"gru_hidden_dim": 1024}}, "Domino"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"rope_scaling": {"rope_type": "default", "rope_dim": 12}}, "partial rotary"),
        ({"architectures": ["DFlashLagunaForCausalLM"], "model_type": "laguna"}, "per-tap norms"),
        ({"aux_hidden_norms": True}, "per-tap norms"),
        ({"dflash_config": {"attention_sink_bias": True}}, "attention sinks"),
        ({"dflash_config": {"projector_type": "domino", "shift_label": True}}, "Domino"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_parameters": {"rope_theta": 1000000, "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"dflash_config": {"input_embedding_scale": 8.0}}, "scale on the input embeddings"),
        ({"dflash_config": {"conv_kernel_size": 2}}, "a DFlash 2 draft"),
        ({"v_head_dim": 64}, "values of another width"),
        ({"dflash_config": {"hidden_dim_adapter": True}}, "an adapter between the target's width and its own"),
        ({"dflash_config": {"confidence_head_with_markov": True}}, "a DSpark draft"),
        ({"architectures": ["Gemma4DSparkModel"], "markov_rank": 8}, "Gemma 4's own layers"),
        ({"architectures": ["K3DSparkModel"], "markov_rank": 8}, "MLA attention"),
        ({"dspark_markov_rank": 8}, "a Markov head inside the target's checkpoint"),
        ({"dflash_config": {"projector_type": "dflash2"}}, "a DFlash 2 draft"),
    ],
)
def test_features_that_are_not_here_are_refused_by_name(changes, feature):
    with pytest.raises(ValueError, match=feature) as caught:
        DFlashConfig.from_dict(qwen3_4b(**changes))
    assert "refused" in str(caught.value)


def test_neutral_values_of_those_features_are_fine():
    neutral = {
        "output_multiplier": 1.0,
        "final_logit_softcapping": None,
        "input_embedding_scale": 1.0,
        "use_swa": False,
        "hidden_dim_adapter": None,
        "causal_head": None,
        "pure_draft_prefix_len": 0,
    }
    config = DFlashConfig.from_dict(
        qwen3_4b(
            partial_rotary_factor=1.0,
            draft_vocab_size=151936,
            markov_rank=0,
            dflash_config=neutral | {"use_swa": False},
        )
    )
    assert config == read("z-lab__Qwen3-4B-DFlash-b16")


@pytest.mark.parametrize(
    "missing", ["mask_token_id", "target_layer_ids", "block_size", "hidden_size", "head_dim", "rope_theta"]
)
def test_what_is_missing_is_asked_for_by_the_keyword_that_supplies_it(missing):
    config = qwen3_4b()
    value = config.pop(missing, None)
    value = config["dflash_config"].pop(missing, value)
    with pytest.raises(ValueError, match=rf"{missing}.*supply it: from_pretrained\(\.\.\., {missing}="):
        DFlashConfig.from_dict(config)
    assert DFlashConfig.from_dict(config, **{missing: value}) == read("z-lab__Qwen3-4B-DFlash-b16")


def test_a_target_passed_as_a_draft_is_told_apart():
    with pytest.raises(ValueError, match="describes Qwen3ForCausalLM, not a DFlash draft"):
        DFlashConfig.from_pretrained(TINY / "target")


def test_nemo_automodels_export_is_read():
    nested = {"block_size": 16, "output_multiplier": 1.0, "final_logit_softcapping": None, "input_embedding_scale": 1.0}
    exported = qwen3_4b(
        architectures=["Qwen3DFlashDraftModel"],
        auto_map=None,
        rope_theta=None,
        rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
        dflash_config=nested,
    )
    assert DFlashConfig.from_dict(exported) == read("z-lab__Qwen3-4B-DFlash-b16")


def test_specforges_export_with_yarn_in_both_forms_is_read():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240}
    exported = qwen3_4b(rope_scaling={**yarn, "type": "yarn"}, rope_parameters={**yarn, "rope_theta": 1000000})
    assert DFlashConfig.from_dict(exported).rope_parameters == {**yarn, "rope_theta": 1000000}


def test_model_optimizers_window_is_honoured_though_its_layer_types_say_full():
    nested = {"use_swa": True, "swa_window_size": 512, "causal": False}
    config = DFlashConfig.from_dict(qwen3_4b(sliding_window=512, auto_map=None, dflash_config=nested))
    assert config.layer_types == [SLIDING] * 5
    assert (config.sliding_window, config.is_causal) == (512, False)


def test_mimos_window_without_layer_types_is_bidirectional():
    nested = {"use_swa": True, "swa_window_size": 1024}
    config = DFlashConfig.from_dict(qwen3_4b(layer_types=None, sliding_window=1024, dflash_config=nested))
    assert config.layer_types == [SLIDING] * 5
    assert config.is_causal is False


def test_jetspecs_causal_draft_is_read():
    config = DFlashConfig.from_dict(qwen3_4b(is_causal=True, dflash_config={"causal": True}))
    assert config.is_causal is True
    assert DFlashConfig.from_dict(qwen3_4b(dflash_config={"causal_head": True})).is_causal is True


def test_a_causal_head_contradicting_another_place_is_refused_with_both_named():
    said = {"causal_head": True, "causal": False}
    with pytest.raises(ValueError, match=r"dflash_config\.causal is False but dflash_config\.causal_head is True"):
        DFlashConfig.from_dict(qwen3_4b(dflash_config=said))


@pytest.mark.parametrize("key", sorted(_HARMLESS))
def test_keys_inside_dflash_config_that_say_nothing_to_a_reader_are_let_through(key):
    assert DFlashConfig.from_dict(qwen3_4b(dflash_config={key: 1.0})) == read("z-lab__Qwen3-4B-DFlash-b16")
    assert _HARMLESS[key]


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("casual", "is causal meant"),
        ("mask_tokn_id", "is mask_token_id meant"),
        ("target_layers_ids", "is target_layer_ids meant"),
        ("hidden_size", "it belongs at the top"),
        ("zzz", "remove it if the draft does not need it"),
    ],
)
def test_any_other_key_inside_dflash_config_is_refused_with_the_nearest_that_is_known(key, advice):
    with pytest.raises(ValueError, match=rf"dflash_config\.{key}, which is True; no such key is known.*{advice}"):
        DFlashConfig.from_dict(qwen3_4b(dflash_config={key: True}))


def test_keys_at_the_top_that_no_reader_knows_are_ignored_whatever_they_hold(tmp_path):
    odd = {"casual": [], "id2label": 5, "transformers_version": {}, "return_dict": "x", "_name_or_path": 1.5}
    odd |= {"configuration_files": 3, "tie_word_embeddings": None, "num_labels": -1, "problem_type": []}
    (tmp_path / "config.json").write_text(json.dumps(qwen3_4b(**odd)))
    assert DFlashConfig.from_pretrained(tmp_path) == read("z-lab__Qwen3-4B-DFlash-b16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dflash_config": {"block_size": "16"}, "block_size": None},
            r"block_size is '16' \(dflash_config.block_size\)",
        ),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000; it must be an int from 1 to 1000"),
        ({"hidden_size": 2560.0}, r"hidden_size is 2560.0; it must be an int"),
        ({"attention_bias": 1}, r"attention_bias is 1; it must be True or False"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan; it must be a number above 0"),
        ({"rope_theta": [1e6]}, r"rope_theta is \[1000000.0\]; it must be a number"),
        ({"architectures": 5}, r"architectures is 5; it must be a list"),
        ({"dtype": {"a": 1}}, r"dtype is \{'a': 1\}; it must be one of bfloat16"),
        ({"hidden_act": "banana"}, r"hidden_act is 'banana'; it must be the name of an activation"),
        ({"layer_types": []}, r"layer_types is \[\]; it must be a list of"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, r"\[0, 1\] \(eagle_aux_hidden_state_layer_ids\).*from 1 up"),
        ({"dflash_config": {"causal_head": [True]}}, r"is_causal is \[True\] \(dflash_config.causal_head\)"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"for rope_type 'yarn', factor is None; it must be a number"),
        ({"num_key_value_heads": True}, r"num_key_value_heads is True; it must be an int"),
        ({"attention_value_scale": True}, r"attention_value_scale is True.*it must be None or 1.0"),
        ({"sliding_window": "4096"}, r"sliding_window is '4096'; it must be an int"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 64}},
            r"short_factor is \[1.0\], 1 numbers; it must hold 64, half of head_dim, 128",
        ),
        ({"rope_parameters": {"factr": 2.0}}, r"rope_parameters.factr is 2.0.*is factor meant"),
        ({"hidden_size": 10**5000}, r"hidden_size is a int too large to be shown; it must be"),
    ],
)
def test_values_that_a_field_cannot_hold_are_refused_with_what_it_may(changes, message):
    with pytest.raises(ValueError, match=message):
        DFlashConfig.from_dict(qwen3_4b(**changes))


@pytest.mark.parametrize("content", [[1], "text", 5, True, {}, {"dflash_config": []}])
def test_a_file_that_holds_no_dict_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    for load in (DFlashConfig.from_pretrained, DFlash2Config.from_pretrained, load_draft):
        with pytest.raises(ValueError, match="it must be a dict"):
            load(tmp_path)


@pytest.mark.parametrize("config", [DFlashConfig, DFlash2Config, DominoConfig])
def test_every_keyword_of_a_config_that_holds_nonsense_is_a_plain_value_error(config):
    shape = {"block_size": 4, "mask_token_id": 3, "target_layer_ids": [0, 2], "vocab_size": 99}
    for field in [*config.own_fields(), "dtype", "torch_dtype", "rope_theta", "id2label", "num_labels"]:
        for value in (object(), [[]], "nonsense", -1.5):
            with pytest.raises(ValueError, match=f"{field} is .*it must be") as caught:
                config(**(shape | {field: value}))
            assert type(caught.value) is ValueError


def test_keywords_of_from_pretrained_are_checked_as_the_file_is():
    with pytest.raises(
        ValueError, match=r"^block_size is '8'; it must be an int from 2 to 1024 \(pass block_size=...\)"
    ):
        read("z-lab__Qwen3-4B-DFlash-b16", block_size="8")
    with pytest.raises(ValueError, match=r"^sliding_window is '8'; it must be an int"):
        read("z-lab__Qwen3-4B-DFlash-b16", sliding_window="8")
    with pytest.raises(ValueError, match=r"^dtype is 'banana'; it must be one of bfloat16"):
        read("z-lab__Qwen3-4B-DFlash-b16", dtype="banana")


def test_a_config_is_read_from_a_json_file_as_from_its_folder():
    name = "z-lab__Qwen3-4B-DFlash-b16"
    assert DFlashConfig.from_json_file(PUBLISHED / f"{name}.json") == read(name)


def test_fields_are_typed_and_required():
    with pytest.raises(ValueError, match=r"block_size is '16'; it must be an int from 2 to 1024"):
        small(block_size="16")
    with pytest.raises(TypeError, match="mask_token_id"):
        DFlashConfig(block_size=16, target_layer_ids=[1])
    config = small()
    with pytest.raises(ValueError, match=r"mask_token_id is '<mask>'; it must be an int"):
        config.mask_token_id = "<mask>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_layer_ids": [2, 1]}, "ascending"),
        ({"target_layer_ids": [1, 1]}, "ascending"),
        ({"target_layer_ids": [-1, 2]}, "ascending"),
        ({"target_layer_ids": []}, "at least one"),
        ({"num_target_layers": 2}, "asks for layer 2, but the target has 2 layers"),
        ({"block_size": 1}, "block_size is 1"),
        ({"vocab_size": 3}, "mask_token_id is 3, but vocab_size is 3"),
        ({"layer_types": [SLIDING] * 5}, "sliding_window is None"),
        ({"layer_types": [FULL] * 4}, "must hold 5 entries"),
        ({"layer_types": ["linear_attention"] * 5}, "full_attention"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"is_causal": [True]}, "is_causal has 1 entries"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_the_callers_rope_dict_is_left_alone():
    rope = {"rope_theta": 5.0}
    small(rope_parameters=rope)
    assert rope == {"rope_theta": 5.0}


# Without the package ------------------------------------------------------------------------------------------------

SHAPE = dict(block_size=8, mask_token_id=0, target_layer_ids=[1, 2], num_target_layers=6, vocab_size=64)
MIXED = [SLIDING, FULL, SLIDING, FULL, SLIDING]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240, "rope_theta": 1e6}
OURS = {
    "plain": DFlashConfig(**SHAPE, rope_theta=1e6),
    "causal": DFlashConfig(**SHAPE, rope_theta=1e6, is_causal=True, dtype="bfloat16", target_hidden_size=32),
    "sliding": DFlashConfig(**SHAPE, rope_theta=1e6, layer_types=MIXED, sliding_window=16),
    "bidirectional": DFlashConfig(**SHAPE, rope_theta=1e6, layer_types=MIXED, sliding_window=16, is_causal=False),
    "yarn": DFlashConfig(**SHAPE, rope_parameters=YARN, final_logit_softcapping=30.0),
    "dflash2": DFlash2Config(**SHAPE, rope_theta=1e6, final_logit_softcapping=30.0, output_multiplier=2.0),
    "dspark": DSparkConfig(**SHAPE, rope_theta=1e6, markov_head_type="gated", enable_confidence_head=True),
    "dspark, rank 0": DSparkConfig(**SHAPE, rope_theta=1e6, markov_rank=0, sample_from_anchor=False),
    "domino": DominoConfig(**SHAPE, rope_theta=1e6, pure_draft_prefix_len=0),
    "domino, not shifted": DominoConfig(**SHAPE, rope_theta=1e6, sample_from_anchor=False),
}


@pytest.fixture
def without_package(monkeypatch):
    """Configs are read as by the copy of this code in a repository."""
    monkeypatch.setattr(EXTENSIONS, "read_layout", read_own_layout)


@pytest.mark.parametrize("layout", ["hub", "engines"])
@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_the_reader_that_travels_reads_our_layouts_as_the_package_does(config, layout, tmp_path, without_package):
    config.auto_map = {"AutoConfig": "configuration_dflash.DFlashConfig"} if layout == "hub" else None
    config.save_pretrained(tmp_path, layout=layout)
    assert type(config).from_pretrained(tmp_path) == config
    content = json.loads((tmp_path / "config.json").read_text())
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    for given in ({}, {"block_size": 4}, {"rope_theta": 5.0}, scaled, scaled | {"rope_theta": 5.0}):
        read = [one(dict(content), given, config.model_type) for one in (read_layout, read_own_layout)]
        assert read[0] == {key: value for key, value in read[1].items() if key in read[0] or key != "sliding_window"}


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_the_reader_that_travels_reads_another_layout_as_the_package_does_or_refuses_it(path, without_package):
    content = json.loads(path.read_text())
    for kind in (DFlashConfig, DFlash2Config, DominoConfig):
        expected, refusal = None, ""
        try:
            config = kind.from_dict(dict(content))
        except ValueError as error:
            refusal = str(error)
        else:
            expected = kind(**read_layout(content, {}, kind.model_type))
        assert config == expected if expected else "pip install dflash-hub" in refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 4}, "contradicts itself about block_size: block_size is 4 but dflash_config.block_size is 8"),
        ({"dflash_config": {"casual": True}}, "dflash_config.casual is True.*pip install dflash-hub"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps; supply it.*pip install dflash-hub"),
        ({"auto_map": None}, "model_type is 'qwen3', auto_map is {}.*pip install dflash-hub"),
    ],
)
def test_the_reader_that_travels_refuses_what_it_does_not_know(changes, message, without_package):
    with pytest.raises(ValueError, match=message):
        DFlashConfig.from_dict(engines_layout(OURS["plain"]) | changes)
