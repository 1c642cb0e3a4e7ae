"""The doctor: every published config, and for every mistake that users report, what it says and its exit status."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from dflash_hub import DFlashConfig, DSparkConfig, DSparkDraftModel, load_draft
from dflash_hub.checking import CheckOptions, check_draft, runs, verdicts
from dflash_hub.checking.configs import config_remarks, draft_config, layout_of
from dflash_hub.checking.engines import ENGINES
from dflash_hub.checking.pairs import Target, mask_remarks, open_target, pair_remarks
from dflash_hub.checking.remarks import STATUS, status_of
from dflash_hub.checking.runs import AS_CONFIGURED, Acceptance, acceptance_remarks, run_draft, with_fields
from dflash_hub.checking.sources import open_draft
from dflash_hub.checking.stored import StoredDraft
from dflash_hub.checking.tensors import name_remarks
from paths import DATA, TINY

PUBLISHED = DATA / "published_configs"
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"layer_types": [SLIDING, SLIDING], "sliding_window": 8}


def outcomes(draft: StoredDraft) -> dict[str, str]:
    """Engine -> "" where it loads the draft; else the rules that say no, and a ! before those that nobody notices."""
    found = {}
    for one in verdicts(draft):
        marks = {"refuses": "", "loads, and is wrong": "!"}
        rules = [f"{marks[reason.rule.effect]}{reason.rule.name}" for reason in one.reasons]
        found[one.engine.name] = " ".join(rules)
    return found


def names(report) -> dict[str, str]:
    """Check -> level, of a report's remarks."""
    return {remark.name: remark.level for remark in report.remarks}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good draft in the engines layout, with a window."""
    folder = tmp_path_factory.mktemp("drafts") / "engines"
    draft = tiny.draft(tiny.target("qwen3"), is_causal=False, **WINDOW)
    draft.save_pretrained(folder, layout="engines")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "draft")


# Published configs ---------------------------------------------------------------------------------------------------

READS = {
    "z-lab__Qwen3-4B-DFlash-b16": "z-lab, older",
    "z-lab__Qwen3.5-4B-DFlash": "z-lab, newer",
    "z-lab__gemma-4-26B-A4B-it-DFlash": "z-lab, older",
    "meta-models__Muse-Glimmer-30B-assistant": "the Muse assistant of transformers",
    "z-lab__Qwen3.8-27B-DFlash2": "z-lab, newer",
    "z-lab__Muse-Glimmer-30B-DFlash2": "z-lab, newer",
    "incoai__GLM-5.3-Flash-DFlash2": "z-lab, newer",
    "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash": "z-lab, older",
    "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash": "NVIDIA, served",
    "RedHatAI__gemma-4-31B-it-speculator.dflash": "speculators",
    "converted_z-lab__Qwen3.6-35B-A3B-DFlash": "speculators",
    "early_speculators_test_repo": "speculators",
}
NOT_SPECULATORS = dict.fromkeys(ENGINES, "speculators")
NO_CODE = {"transformers": "!class", "transformers-generate": "!class interface taps mask-token block-size !heads"}
SECOND = NO_CODE | {"tensorrt-llm": "!window", "dflash-mlx": "rope block-size !causality heads"}
VERDICTS: dict[str, dict[str, str]] = {
    "z-lab__Qwen3-4B-DFlash-b16": {"transformers-generate": "interface taps mask-token"},
    "z-lab__Qwen3.5-4B-DFlash": {
        "transformers-generate": "interface taps mask-token block-size",
        "tensorrt-llm": "!window !causality",
        "llama.cpp": "!causality",
        "dflash-mlx": "rope block-size",
        "mlx-vlm": "!block-size !causality",
    },
    "z-lab__gemma-4-26B-A4B-it-DFlash": {
        "transformers": "!class",
        "transformers-generate": "!class interface taps mask-token",
        "tensorrt-llm": "!window !causality",
        "llama.cpp": "!causality",
        "mlx-vlm": "!causality",
    },
    "meta-models__Muse-Glimmer-30B-assistant": {
        "tensorrt-llm": "backbone taps !window",
        "dflash-zlab-mlx": "layers taps mask-token",
        "dflash-mlx": "rope layers tie !taps !mask-token",
    },
    "z-lab__Qwen3.8-27B-DFlash2": SECOND,
    "z-lab__Muse-Glimmer-30B-DFlash2": SECOND,
    "incoai__GLM-5.3-Flash-DFlash2": SECOND,
    "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash": {
        "transformers-generate": "interface taps mask-token",
        "sglang": "!window-unseen",
        "tensorrt-llm": "!window",
        "dflash-zlab-mlx": "!window-unseen",
        "dflash-mlx": "!window-unseen",
        "mlx-vlm": "!window-unseen",
    },
    "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash": {
        "transformers": "!class",
        "transformers-generate": "!class interface block-size",
        "sglang": "!block-size",
        "llama.cpp": "!block-size",
        "dflash-zlab-mlx": "layers !block-size",
        "dflash-mlx": "block-size layers tie",
        "mlx-vlm": "!block-size",
    },
    "RedHatAI__gemma-4-31B-it-speculator.dflash": NOT_SPECULATORS
    | {"vllm": ""}
    | dict.fromkeys(("sglang", "tensorrt-llm"), "speculators !reduced-vocabulary"),
    "converted_z-lab__Qwen3.6-35B-A3B-DFlash": NOT_SPECULATORS | {"vllm": "!speculators-causal"},
    "early_speculators_test_repo": NOT_SPECULATORS
    | {"vllm": "speculators-fields"}
    | dict.fromkeys(("sglang", "tensorrt-llm"), "speculators !reduced-vocabulary"),
}


SMALL = {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1]}}


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (SMALL | {"architectures": ["Qwen3DFlashDraftModel"], "rope_parameters": {}}, "NVIDIA NeMo AutoModel"),
        ({"dflash_config": {"causal_head": True}}, "JetSpec"),
        ({"dflash_config": {"causal": True}, "rope_theta": 1e6}, "NVIDIA Model Optimizer"),
        (SMALL | {"rope_theta": 1e6, "rope_parameters": {}}, "SpecForge"),
        ({"architectures": ["Qwen3DSparkModel"], "markov_rank": 4}, "DeepSpec (DSpark)"),
        (SMALL | {"architectures": ["DSparkDraftModel"], "markov_rank": 4}, "SpecForge (DSpark)"),
        ({"dflash_config": {"gru_hidden_dim": 4}}, "Domino"),
        ({"model_type": "llama"}, "unknown"),
    ],
)
def test_other_layouts_are_recognised(content, layout):
    assert layout_of(content) == layout


def test_every_published_config_is_in_the_tables():
    assert {path.stem for path in PUBLISHED.glob("*.json")} == set(READS) == set(VERDICTS)


@pytest.mark.quick
@pytest.mark.parametrize("name", READS)
def test_the_layout_of_a_published_config_and_what_engines_do_with_it(name):
    config = json.loads((PUBLISHED / f"{name}.json").read_text())
    assert layout_of(config) == READS[name]
    found = outcomes(StoredDraft(config))
    assert {engine: rules for engine, rules in found.items() if rules} == {
        engine: rules for engine, rules in VERDICTS[name].items() if rules
    }
    broken = status_of(config_remarks(config)) == STATUS["error"]
    assert broken == (draft_config(config) is None)


@pytest.mark.parametrize("fields", [{}, WINDOW | {"is_causal": False}, tiny.SECOND])
def test_the_engines_layout_loads_everywhere_where_its_kind_is_run(fields, tmp_path):
    draft = tiny.draft(tiny.target("qwen3"), **fields)
    draft.save_pretrained(tmp_path, layout="engines")
    report = check_draft(tmp_path)
    assert (report.status, report.layout) == (0, "the engines layout of dflash-hub")
    refused = {one.engine.name for one in report.engines if one.reasons}
    expected = {"selector_rank": {"transformers-generate", "dflash-mlx"}, "is_causal": {"dflash-mlx"}}
    assert refused == next((names for field, names in expected.items() if field in fields), set())


def test_the_hub_layout_is_good_and_every_engine_that_refuses_it_is_sent_to_the_other(tmp_path):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    report = check_draft(tmp_path)
    assert (report.status, report.layout) == (0, "the hub layout of dflash-hub")
    found = {one.engine.name: one for one in report.engines}
    assert {name for name, one in found.items() if one.outcome == "loads"} == {
        "transformers",
        "transformers-generate",
    }
    assert "--layout engines" in found["vllm"].reasons[0].finding.advice


# Mistakes in files ---------------------------------------------------------------------------------------------------


def changed(content: dict, **changes) -> dict:
    """A config.json with other values, None for none; "dflash_config__x" is the key x inside."""
    content = content | {"dflash_config": dict(content["dflash_config"])}
    for key, value in changes.items():
        place, name = (content["dflash_config"], key[15:]) if "__" in key else (content, key)
        place.pop(name, None)
        if value is not None:
            place[name] = value
    return content


def config(**changes):
    """A mistake: config.json with other values, as in `changed`."""

    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(changed(json.loads(path.read_text()), **changes)))

    return apply


def tensors(change):
    """A mistake: weights that `change` makes of the good ones."""

    def apply(folder):
        path = folder / "model.safetensors"
        weights = change(load_file(path))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)

    return apply


def filled(name: str, value: float):
    def change(weights):
        weights[name].view(-1)[:1] = value
        return weights

    return tensors(change)


def zeros(*keep: str):
    return tensors(lambda old: {name: one if name in keep else one * 0 for name, one in old.items()})


def without(name: str):
    return tensors(lambda old: {key: one for key, one in old.items() if key != name})


def untrained(folder):
    draft = load_draft(folder)
    type(draft)(draft.config).save_pretrained(folder, layout="engines")


def pickled(name: str, keeps_safetensors: bool = True):
    def apply(folder):
        torch.save({"weight": torch.ones(1)}, folder / name)
        if not keeps_safetensors:
            (folder / "model.safetensors").unlink()

    return apply


def written(name: str, text: str):
    def apply(folder):
        (folder / name).write_text(text)

    return apply


def edited(folder):
    path = folder / "drafter_dflash.py"
    path.write_text(path.read_text() + "\nprint('mine')\n")


def removed(*files: str):
    def apply(folder):
        for name in files:
            (folder / name).unlink()

    return apply


Q, FC = "layers.0.self_attn.q_proj.weight", "fc.weight"


def quantised(folder):
    config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)
    eight = torch.float8_e4m3fn
    tensors(lambda old: old | {Q: old[Q].to(eight), f"{Q}_scale_inv": torch.ones(1, 1)})(folder)


NO_ROPE = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"))
MISTAKES = {
    "a tensor with NaN": (filled(Q, float("nan")), "tensor-nan", 2),
    "a tensor with an infinite value": (filled("norm.weight", float("-inf")), "tensor-nan", 2),
    "a zero tensor": (tensors(lambda old: old | {Q: old[Q] * 0}), "tensor-zero", 1),
    "zeros alone": (zeros("norm.weight"), "tensors-all-zero", 2),
    "a norm of zeros": (tensors(lambda old: old | {"norm.weight": old["norm.weight"] * 0}), "norm-zero", 2),
    "a missing tensor": (without(FC), "tensor-missing", 2),
    "an unknown tensor": (tensors(lambda old: old | {"gru.weight": torch.ones(2)}), "tensor-unknown", 2),
    "a tensor of another shape": (tensors(lambda old: old | {FC: old[FC][:, 1:]}), "tensor-shape", 2),
    "integers": (tensors(lambda old: old | {Q: old[Q].int()}), "tensor-dtype", 2),
    "a quantisation of the target's": (
        config(quantization_config={"quant_method": "fp8"}),
        "quantization-copied",
        1,
    ),
    "a draft that is quantised": (quantised, "quantised", 0),
    "float16": (tensors(lambda old: {key: one.half() for key, one in old.items()}), "tensor-float16", 1),
    "the prefix model.": (
        tensors(lambda old: {f"model.{key}": one for key, one in old.items()}),
        "tensor-prefix",
        1,
    ),
    "weights that were never trained": (untrained, "untrained", 2),
    "damaged weights": (written("model.safetensors", "no header"), "weights-broken", 2),
    "no weights": (removed("model.safetensors"), "weights-missing", 2),
    "no rope base": (config(**NO_ROPE), "config-invalid", 2),
    "two rope bases": (config(rope_theta=5.0), "config-invalid", 2),
    "two causalities": (config(dflash_config__causal=True), "config-invalid", 2),
    "an unknown key inside": (config(dflash_config__swa_windw_size=3), "config-invalid", 2),
    "an anchor of which nothing is said": (config(speculators_model_type="dspark"), "anchor-unsaid", 2),
    "a misspelt key": (
        config(num_target_layer=4, num_target_layers=None, dflash_config__num_target_layers=None),
        "key-misspelt",
        1,
    ),
    "a misspelt key beside the right one": (config(block_sizes=4), "key-misspelt", 1),
    "no taps": (config(target_layer_ids=None, dflash_config__target_layer_ids=None), "config-invalid", 2),
    "a target's config": (config(architectures=["Qwen3ForCausalLM"]), "config-invalid", 2),
    "a model type that nobody registers": (config(model_type="my_dflash"), "model-type-unregistered", 1),
    "a window that Qwen3Config drops": (config(use_sliding_window=None), "window-nulled", 1),
    "a window in one place": (
        config(layer_types=[FULL, FULL], use_sliding_window=None),
        "window-in-one-place",
        1,
    ),
    "a config that is no JSON": (written("config.json", "{"), "config-unreadable", 2),
    "no config": (removed("config.json"), "config-unreadable", 2),
    "code that auto_map names and is not there": (removed("dflash.py"), "auto-map-dangling", 1),
    "code in another repository": (
        config(auto_map={"AutoModel": "other/repo--dflash.DFlashDraftModel"}),
        "auto-map-elsewhere",
        1,
    ),
    "code that was edited": (edited, "code-edited", 1),
    "code of others": (written("utils.py", "x = 1\n"), "code-foreign", 0),
    "a pickle alone": (pickled("pytorch_model.bin", keeps_safetensors=False), "pickle", 2),
    "a pickle beside safetensors": (pickled("pytorch_model.bin"), "pickle", 1),
    "a pickle of training": (pickled("training_args.bin"), "pickle-of-training", 1),
    "a trained mask embedding": (pickled("mask_embedding.pt"), "mask-embedding", 2),
    "a card that cannot be read": (written("README.md", "---\n: [\n---\n"), "card-broken", 1),
}


def test_without_a_mistake_nothing_is_found(saved):
    assert names(check_draft(saved)) == {"base-model-missing": "note"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_files_is_found(mistake, folder):
    apply, name, status = MISTAKES[mistake]
    apply(folder)
    report = check_draft(folder)
    found = names(report)
    assert report.status == status, found
    assert STATUS[found[name]] == status or name == "anchor-unsaid"  # in a layout that is broken for other reasons
    remark = next(one for one in report.remarks if one.name == name)
    assert remark.finding.advice or remark.finding.form == "{what}"


def test_a_quantised_draft_names_its_format_and_that_engines_were_not_checked(folder):
    quantised(folder)
    (remark,) = [one for one in check_draft(folder).remarks if one.section == "config"]
    assert (remark.name, remark.level, remark.finding.found) == ("quantised", "note", "fp8")
    assert "was not checked" in remark.finding.what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mask_embedding.pt"])
def test_a_pickle_comes_with_the_command_that_converts_it(name, folder):
    pickled(name, keeps_safetensors=False)(folder)
    advices = [one.finding.advice for one in check_draft(folder).remarks]
    assert f"Make a copy in safetensors: dflash-hub convert {folder} NEW_FOLDER --layout hub" in advices


# The pair ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_files():
    return open_draft(TINY / "draft", {})


def pair(tiny_files, target: Target | None = None, raw: dict | None = None, **fields) -> dict[str, str]:
    """Check -> level, for the built-in draft with other fields, and a target."""
    draft = draft_config(tiny_files.config)
    for name, value in fields.items():
        setattr(draft, name, value)
    target = target or open_target(TINY / "target")
    return {remark.name: remark.level for remark in pair_remarks(tiny_files, draft, target)}


@pytest.mark.parametrize(
    ("fields", "name", "level"),
    [
        ({}, None, None),
        ({"mask_token_id": 40}, "mask-ordinary", "warning"),
        ({"mask_token_id": 0}, "mask-ordinary", "warning"),
        ({"mask_token_id": 511, "vocab_size": 400}, "mask-ordinary", "warning"),
        ({"mask_token_id": 600}, "misfit", "error"),
        ({"hidden_size": 64, "target_hidden_size": 64}, "misfit", "error"),
        ({"target_layer_ids": [1, 2, 9], "num_target_layers": None}, "misfit", "error"),
        ({"target_layer_ids": [1, 2, 5]}, "tap-last", "warning"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope-differs", "note"),
        ({"max_position_embeddings": 64}, "positions", "note"),
    ],
)
def test_what_does_not_fit_the_target_is_found(tiny_files, fields, name, level):
    found = pair(tiny_files, **fields)
    assert found == {} if name is None else found[name] == level


@pytest.mark.parametrize(
    ("made_for", "target", "warns"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", True),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", False),
        ("Qwen/Qwen3-8B", "someone/Qwen3-8B-AWQ", False),
    ],
)
def test_a_sibling_of_the_target_on_the_card_is_warned_of(folder, made_for, target, warns):
    (folder / "README.md").write_text(f"---\nbase_model: {made_for}\n---\n")
    known = open_target(TINY / "target")
    named = Target(target, tiny.target("qwen3").config, known.tokenizer)
    files = open_draft(folder, {})
    found = [one.name for one in pair_remarks(files, draft_config(files.config), named)]
    assert ("other-target" in found) == warns


def test_the_mask_tokens_text_must_be_the_targets(tiny_files):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    found = [*mask_remarks(2, tokenizer, {"dflash_config": {"mask_token": "<|mask|>"}})]
    assert [one.name for one in found] == ["mask-text", "mask-ordinary"]
    assert (found[0].finding.found, found[0].finding.expected) == (2, 1)


def test_a_tokenizer_of_another_target_is_found(folder):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    files = open_draft(folder, {})
    found = pair_remarks(files, draft_config(files.config), open_target(TINY / "target"))
    assert "tokenizer-differs" in [one.name for one in found]


# Engines -------------------------------------------------------------------------------------------------------------

NONE = dict.fromkeys(("is_causal", "dflash_config__causal"))
ENGINE_CASES = [
    ({"model_type": "my_dflash"}, (), "vllm", "model-type"),
    ({"model_type": "my_dflash"}, (), "sglang", "model-type"),
    ({"model_type": "my_dflash"}, (), "tensorrt-llm", "model-type"),
    ({"model_type": "my_dflash"}, (), "transformers", "model-type"),
    ({"model_type": "my_dflash"}, (), "mlx-vlm", "drafter"),
    ({"model_type": "my_dflash"}, (), "llama.cpp", ""),
    ({"architectures": ["Qwen3DFlashDraftModel"]}, (), "vllm", "architecture"),
    ({"architectures": ["Qwen3DFlashDraftModel"]}, (), "sglang", "architecture"),
    ({"architectures": ["Qwen3DFlashDraftModel"]}, (), "llama.cpp", "architecture"),
    ({"use_sliding_window": None, "dflash_config__swa_window_size": None}, (), "vllm", "window"),
    ({"use_sliding_window": None}, (), "vllm", ""),
    ({"use_sliding_window": None}, (), "sglang", "window"),
    ({"use_sliding_window": None}, (), "transformers", "!window"),
    ({"use_sliding_window": None, "dflash_config__use_swa": None}, (), "llama.cpp", "!window"),
    ({"dflash_config__use_swa": None}, (), "tensorrt-llm", "!window"),
    ({"layer_types": [SLIDING, FULL]}, (), "llama.cpp", "!window-everywhere"),
    ({"layer_types": [SLIDING, FULL], "dflash_config__use_swa": None}, (), "llama.cpp", ""),
    ({"layer_types": [FULL, FULL]}, (), "sglang", "!window-unseen"),
    ({"layer_types": [FULL, FULL]}, (), "vllm", ""),
    ({"is_causal": None}, (), "vllm", ""),
    (NONE, (), "llama.cpp", "!causality"),
    (NONE, (), "tensorrt-llm", "!causality"),
    ({"is_causal": True, "dflash_config__causal": True}, (), "tensorrt-llm", "!causality"),
    ({"mask_token_id": None}, (), "transformers-generate", "mask-token"),
    ({"dflash_config__mask_token_id": None}, (), "vllm", ""),
    ({"dflash_config__mask_token_id": None}, (), "llama.cpp", "mask-token"),
    ({"mask_token_id": None, "dflash_config__mask_token_id": None}, (), "vllm", "mask-token"),
    ({"mask_token_id": None, "dflash_config__mask_token_id": None}, (), "sglang", "!mask-token"),
    ({"mask_token_id": None, "dflash_config__mask_token_id": None}, (), "tensorrt-llm", "!mask-token"),
    ({"dflash_config__target_layer_ids": None}, (), "tensorrt-llm", "taps"),
    ({"block_size": None, "dflash_config__block_size": None}, (), "sglang", "!block-size"),
    ({"rope_theta": None, "rope_parameters": None}, (), "dflash-zlab-mlx", "!rope"),
    ({"rope_theta": None}, (), "dflash-mlx", "rope !causality"),
    ({"auto_map": None}, (), "transformers", "!class"),
    ({"target_hidden_size": 64}, (), "sglang", "tap-width"),
    ({"dflash_config__sample_from_anchor": True}, (), "llama.cpp", "!anchor"),
    ({"dflash_config__input_embedding_scale": 8.0}, (), "sglang", "!embedding-scale"),
    ({"draft_vocab_size": 6}, ("d2t", "t2d", "lm_head.weight"), "vllm", ""),
    ({"draft_vocab_size": 6}, ("lm_head.weight",), "vllm", "reduced-vocabulary"),
    ({"draft_vocab_size": 6}, ("d2t", "lm_head.weight"), "sglang", "!reduced-vocabulary"),
    ({}, ("model.norm.weight",), "vllm", "prefix"),
    ({}, ("model.norm.weight",), "sglang", ""),
    ({}, ("aux.weight",), "vllm", "tensors"),
    ({}, ("aux.weight",), "sglang", ""),
    ({}, ("lm_head.weight",), "mlx-vlm", "tensors"),
    ({"quantization_config": {"quant_method": "fp8"}}, ("layers.0.mlp.up_proj.weight_scale",), "vllm", ""),
    ({"quantization_config": {"quant_method": "fp8"}}, ("fc.weight_scale",), "llama.cpp", ""),
    ({"quantization_config": {"quant_method": "awq"}}, ("fc.qweight",), "llama.cpp", "quantisation"),
    ({"quantization_config": {"quant_method": "fp8"}}, ("fc.weight_scale",), "dflash-zlab-mlx", "quantisation"),
    ({"quantization_config": {"quant_method": "fp8"}}, (), "dflash-zlab-mlx", ""),
    ({}, ("layers.0.mlp.up_proj.weight_scale",), "vllm", "tensors"),
    ({"markov_rank": 4, "markov_head_type": "gated"}, (), "llama.cpp", "markov-head"),
    ({"dflash_config__gru_hidden_dim": 4}, (), "tensorrt-llm", "!heads"),
    ({"dflash_config__gru_hidden_dim": 4, "dflash_config__pure_draft_prefix_len": 1}, (), "sglang", ""),
    (
        {"dflash_config__gru_hidden_dim": 4, "dflash_config__pure_draft_prefix_len": 0},
        (),
        "sglang",
        "!domino-prefix",
    ),
    ({"markov_rank": 4, "has_own_lm_head": True}, ("lm_head.weight",), "sglang", ""),
    ({"has_own_lm_head": True}, ("lm_head.weight",), "sglang", "!own-vocabulary"),
    ({"speculators_config": {}}, (), "vllm", "speculators-type speculators-fields"),
    (
        {"speculators_model_type": "dflash", "sample_from_anchor": True, "aux_hidden_state_layer_ids": [1]},
        (),
        "vllm",
        "speculators-anchor",
    ),
]


@pytest.fixture(scope="module")
def good(saved):
    """What engines find of the good draft."""
    files = open_draft(saved, {})
    return StoredDraft(files.config, {*files.tensors}, {*files.names}, {"dflash.py"})


@pytest.mark.parametrize(("changes", "names", "engine", "rules"), ENGINE_CASES)
def test_an_engines_rules_find_what_it_takes_otherwise(good, changes, names, engine, rules):
    draft = replace(good, config=changed(good.config, **changes), tensors={*good.tensors, *names})
    assert outcomes(draft)[engine] == rules


DOMINO = {"dflash_config__gru_hidden_dim": 4, "dflash_config__projector_type": "domino"}
GATED = {"architectures": ["Qwen3DSparkModel"], "markov_rank": 4, "markov_head_type": "gated"}
NO_TAPS = {"target_layer_ids": None, "dflash_config__target_layer_ids": None}
ALL_ENGINES: list[tuple[dict, tuple[str, ...], dict[str, str]]] = [
    (
        {"sample_from_anchor": True},
        (),
        dict.fromkeys(set(ENGINES) - {"transformers"}, "!anchor")
        | {"transformers-generate": "anchor", "dflash-mlx": "!anchor !causality"},
    ),
    (
        DOMINO,
        ("prefix_gru.weight_ih_l0",),
        dict.fromkeys(("vllm", "llama.cpp", "mlx-vlm"), "tensors domino")
        | dict.fromkeys(("transformers-generate", "tensorrt-llm"), "!heads")
        | {"dflash-zlab-mlx": "tensors heads", "dflash-mlx": "!causality tensors heads"},
    ),
    (
        GATED,
        ("markov_w1.weight", "d2t"),
        {
            "transformers-generate": "own-vocabulary !heads",
            "vllm": "tensors dspark-names markov-head",
            "sglang": "!reduced-vocabulary !dspark-names",
            "tensorrt-llm": "!reduced-vocabulary !heads",
            "llama.cpp": "tensors markov-head",
            "dflash-zlab-mlx": "tensors heads",
            "dflash-mlx": "!causality tensors heads",
            "mlx-vlm": "tensors",
        },
    ),
    (
        GATED,
        ("markov_head.markov_w1.weight",),
        {
            "transformers-generate": "!heads",
            "vllm": "markov-head",
            "tensorrt-llm": "!heads",
            "llama.cpp": "markov-head",
            "dflash-zlab-mlx": "tensors heads",
            "dflash-mlx": "!causality tensors heads",
        },
    ),
    (
        {"architectures": ["DFlash2DraftModel"], "selector_rank": 4},
        ("model.norm.weight",),
        {
            "transformers-generate": "!heads",
            "vllm": "prefix dflash2-fields",
            "sglang": "!dflash2-fields",
            "llama.cpp": "dflash2-fields",
            "dflash-zlab-mlx": "prefix",
            "dflash-mlx": "!causality prefix heads",
        },
    ),
    (
        NO_TAPS | {"head_dim": None, "has_own_lm_head": True},
        ("aux.weight",),
        {
            "transformers-generate": "taps own-vocabulary",
            "vllm": "!taps tensors",
            "sglang": "!taps !own-vocabulary",
            "tensorrt-llm": "taps !own-vocabulary",
            "llama.cpp": "taps tensors",
            "dflash-zlab-mlx": "head-dim taps tensors",
            "dflash-mlx": "head-dim !taps !causality tensors",
            "mlx-vlm": "tensors",
        },
    ),
    (
        {},
        ("mask_embedding",),
        dict.fromkeys(("vllm", "sglang", "tensorrt-llm"), "!mask-embedding")
        | dict.fromkeys(("llama.cpp", "dflash-zlab-mlx", "mlx-vlm"), "tensors")
        | {"dflash-mlx": "!causality tensors"},
    ),
    (
        {"is_causal": False, "dflash_config__causal": True},
        (),
        dict.fromkeys(("dflash-mlx", "mlx-vlm"), "!causality"),
    ),
    (
        {"is_causal": None},
        (),
        dict.fromkeys(("sglang", "dflash-zlab-mlx", "dflash-mlx"), "!causality"),
    ),
    (
        NONE | {"dflash_config__causal_head": True, "layer_types": [FULL, FULL], "dflash_config__use_swa": None},
        (),
        dict.fromkeys(set(ENGINES) - {"transformers", "transformers-generate"}, "!causality"),
    ),
    (
        {"auto_map": {"AutoModel": "gone.DFlashDraftModel"}},
        (),
        {"transformers": "code", "transformers-generate": "code interface", "dflash-mlx": "!causality"},
    ),
]


@pytest.mark.parametrize(("changes", "names", "expected"), ALL_ENGINES)
def test_one_mistake_in_the_eyes_of_all_engines(good, changes, names, expected):
    found = outcomes(replace(good, config=changed(good.config, **changes), tensors={*good.tensors, *names}))
    assert {engine: rules for engine, rules in found.items() if rules} == expected


@pytest.mark.parametrize(
    ("changes", "names", "engine", "advice"),
    [
        (DOMINO, ("prefix_gru.weight_ih_l0",), "vllm", "This engine does not run Domino"),
        (DOMINO, ("prefix_gru.weight_ih_l0",), "llama.cpp", "This engine does not run Domino"),
        ({"markov_rank": 4}, ("markov_head.markov_w1.weight",), "dflash-mlx", "This engine does not run DSpark"),
        ({"draft_vocab_size": 6}, ("d2t", "lm_head.weight"), "mlx-vlm", "Serve it with another engine"),
        ({}, ("aux.weight",), "vllm", "Leave them out if the draft does not need them"),
    ],
)
def test_nobody_is_advised_to_leave_out_what_a_draft_needs(good, changes, names, engine, advice):
    draft = replace(good, config=changed(good.config, **changes), tensors={*good.tensors, *names})
    found = next(one for one in verdicts(draft) if one.engine.name == engine)
    assert [one.finding.advice for one in found.reasons if one.rule.name == "tensors"] == [advice]


@pytest.mark.parametrize(("further", "copies"), [((), True), (("d2t", "t2d"), False)])
def test_the_head_of_a_reduced_vocabulary_is_no_copy(further, copies):
    (remark,) = name_remarks(["lm_head.weight", *further])
    assert (remark.finding.advice.startswith("Leave out what is a copy")) == copies


def test_a_dflash_config_that_is_null_is_refused_by_vllm_alone(folder):
    config(dflash_config=None, is_causal=False)(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dflash_config": None}))
    report = check_draft(folder)
    assert names(report)["dflash-config-null"] == "warning"
    assert report.status == 1
    assert "null-config" in outcomes(StoredDraft(open_draft(folder, {}).config))["vllm"].split()


def test_the_target_decides_too_what_an_engine_does(folder):
    files = open_draft(folder, {})
    names = {"target_hidden_size": 64, "target_type": "muse_glimmer_text"}
    found = outcomes(StoredDraft(files.config, **names))
    assert found["vllm"] == "width"
    assert found["sglang"] == "!muse-taps width"


def test_every_rule_says_where_it_stands_and_has_a_name_of_its_own():
    for engine in ENGINES.values():
        rules = [rule.name for rule in engine.rules]
        assert len(rules) == len(set(rules)), engine.name
        assert all(rule.source.endswith(".py") or rule.source.endswith(".cpp") for rule in engine.rules)
        assert engine.version


# The run -------------------------------------------------------------------------------------------------------------

PROMPTS = [json.loads(line)["prompt"][-120:] for line in (TINY / "prompts.jsonl").read_text().splitlines()[12:]]
"""Eight short rows: they have as many anchors as four of twice the tokens, in half the cycles."""
NEW = 14


@pytest.fixture(scope="module")
def pair_to_run():
    model = AutoModelForCausalLM.from_pretrained(TINY / "target").eval()
    return load_draft(TINY / "draft").eval(), open_target(model)


@pytest.fixture(scope="module")
def good_run(pair_to_run):
    """The report of the built-in draft as it is, and its prompts and texts."""
    draft, target = pair_to_run
    inputs = runs.encode(target, PROMPTS, NEW)
    return run_draft(draft, target, PROMPTS, NEW), inputs, runs.write(target.model, inputs, NEW)


@pytest.fixture
def few_variants(monkeypatch):
    """Ask in a run only the draft as configured, an untrained one, and the variants that are added here."""
    names, every = {AS_CONFIGURED, runs.UNTRAINED}, runs.variants

    def few(draft, target):
        return (found for found in every(draft, target) if found[0] in names)

    monkeypatch.setattr(runs, "variants", few)
    return names


def test_a_good_draft_runs_without_a_remark(good_run):
    report, *_ = good_run
    assert report.remarks == ()
    assert report.exact
    assert report.tokens_per_cycle > 1.5
    own, *others, fresh = report.acceptances
    assert own.name == AS_CONFIGURED
    assert len(own.agreed) == len(PROMPTS) * (NEW - 1)
    assert list(own.by_position) == sorted(own.by_position, reverse=True)
    assert sum(own.by_position) == pytest.approx(own.length - 1)
    assert own.length > max(one.length for one in others) > fresh.length


RUNS = {
    "taps one layer too late": ({"target_layer_ids": [2, 3, 5]}, "taps one layer earlier"),
    "taps one layer too early": ({"target_layer_ids": [0, 1, 3]}, "taps one layer later"),
    "a causal mask": ({"is_causal": True}, "every layer bidirectional"),
    "another rope base": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "the target's rotary embeddings",
    ),
    "blocks that predict from the anchor": ({"sample_from_anchor": True}, "sample_from_anchor false"),
}


@pytest.mark.parametrize("mistake", RUNS)
def test_a_run_shows_how_the_weights_were_trained(mistake, pair_to_run, good_run):
    """The config is the mistaken one; among its variants is the one that is right, and its run is known."""
    draft, target = pair_to_run
    report, inputs, texts = good_run
    fields, best = RUNS[mistake]
    mistaken = with_fields(draft, fields)
    right = with_fields(mistaken, runs.changes(mistaken.config, target)[best])
    assert right.config == draft.config
    agreed = runs.agreement(mistaken, target.model, inputs, texts)
    own = Acceptance(AS_CONFIGURED, tuple(agreed), mistaken.config.num_drafted)
    found = [own, replace(report.acceptances[0], name=best), report.acceptances[-1]]
    (remark,) = acceptance_remarks(found)
    assert (remark.name, remark.level) == ("better-otherwise", "warning")
    assert f" with {best} and " in remark.finding.what
    assert remark.finding.expected == report.acceptances[0].length


def test_a_difference_that_may_be_chance_is_no_warning():
    own = Acceptance(AS_CONFIGURED, (2, 1, 0, 3, 1, 2) * 3, 7)
    better = replace(own, name="taps one layer later", agreed=(3, 1, 1, 3, 1, 1) * 2 + (2, 1, 0, 3, 2, 4))
    fresh = replace(own, name="untrained", agreed=(0,) * 18)
    (remark,) = acceptance_remarks([own, better, fresh])
    assert (remark.name, remark.level) == ("better-perhaps", "note")
    assert "--max-new-tokens" in remark.finding.advice
    assert [*acceptance_remarks([own, replace(better, agreed=own.agreed), fresh])] == []


def test_agreement_is_what_the_draft_proposes_at_each_token(pair_to_run):
    """Counted apart: after every prefix of the text, one cycle with the draft alone."""
    draft, target = pair_to_run
    model, inputs = target.model, runs.encode(target, PROMPTS[:1], 6)
    text = runs.write(model, inputs, 6)
    counted = runs.agreement(draft, model, inputs, text)
    width = inputs["input_ids"].shape[1]
    for index, count in enumerate(counted[:-1]):
        seen = []

        def note(proposal, state, seen=seen):
            seen.append(proposal.tokens[0, 1:].tolist())
            return proposal

        prefix = text[:, : width + index]
        options = {"proposer": tiny.steered(note), "capture": "eager", "custom_generate": draft.speculate}
        model.generate(prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=2, do_sample=False, **options)
        truth = text[0, width + index + 1 :].tolist()
        agreeing = [ours == theirs for ours, theirs in zip(seen[0], truth, strict=False)]
        assert count == [*agreeing, False].index(False)


@pytest.mark.parametrize("golden", ["dspark-a", "domino-a"])
def test_other_kinds_show_too_whether_their_anchor_predicts(golden):
    folder = DATA / "golden" / golden
    model = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    draft = load_draft(folder / "draft").eval()
    ids = load_file(folder / "golden.safetensors")["prompt_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.generation_config.eos_token_id = None
    texts = runs.write(model, inputs, 20)
    wrong = with_fields(draft, {"sample_from_anchor": not draft.config.sample_from_anchor})
    found = []
    for one in (wrong, draft):
        agreed = runs.agreement(one, model, inputs, texts)
        found.append(Acceptance("either", tuple(agreed), one.config.num_drafted))
    assert found[1].exceeds(found[0])
    assert not found[0].exceeds(found[1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_tells_how_the_weights_were_trained_where_the_config_does_not(pair_to_run, tmp_path, few_variants):
    """The built-in draft as a DSpark draft without a bias, in the layout whose older files may mean either."""
    draft, target = pair_to_run
    few_variants |= {"sample_from_anchor false", "sample_from_anchor true"}
    fields = {name: getattr(draft.config, name) for name in DFlashConfig.own_fields()}
    dspark = DSparkDraftModel(DSparkConfig(**fields, markov_rank=0))
    dspark.load_state_dict(draft.state_dict())
    dspark.card_metadata = {"base_model": "org/target"}
    dspark.save_pretrained(tmp_path, layout="speculators")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sample_from_anchor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = check_draft(tmp_path, target.model, CheckOptions(prompts=PROMPTS[:4], max_new_tokens=10))
    found = {remark.name: remark for remark in report.remarks}
    assert found["config-invalid"].level == "error"  # nothing loads it without the keyword
    assert "trained with false" in found["anchor-trained"].finding.what
    assert "sample_from_anchor=False" in found["anchor-trained"].finding.advice


@pytest.mark.parametrize(
    ("without", "within", "name"),
    [((0, 0, 1) * 6, (2, 1, 3) * 6, "trained with true"), ((1, 0, 1) * 6, (0, 1, 1) * 6, "does not tell")],
)
def test_the_convention_of_the_anchor_is_that_which_accepts_more(without, within, name):
    found = [Acceptance(AS_CONFIGURED, without, 4), Acceptance("sample_from_anchor true", within, 5)]
    assert name in runs.anchor_remark(found).finding.what


def test_the_draft_of_a_sibling_is_found_by_its_run():
    config = AutoModelForCausalLM.from_pretrained(TINY / "target").config
    torch.manual_seed(3)
    sibling = tiny.scaled(AutoModelForCausalLM.from_config(config).eval(), "qwen3")
    options = CheckOptions(prompts=PROMPTS[:2], max_new_tokens=5)
    report = check_draft(TINY / "draft", sibling, options)
    assert names(report)["no-acceptance"] == "error"
    assert report.status == 2
    assert "untrained" in report.remarks[-1].finding.what


def test_nothing_runs_while_the_draft_is_broken(folder, pair_to_run):
    filled(Q, float("nan"))(folder)
    report = check_draft(folder, pair_to_run[1].model)
    assert report.run is None
    assert names(report)["not-run"] == "note"
    assert names(report)["misfit"] == "error"


def test_a_decode_that_fails_leaves_the_report(folder):
    target = tiny.target("qwen3")
    target.config._name_or_path = str(TINY / "target")  # whose tokens this one has no rows for
    report = check_draft(folder, target, CheckOptions(prompts=["Hello"], max_new_tokens=4))
    remark = report.remarks[-1]
    assert (remark.section, remark.name, remark.level) == ("run", "not-decoded", "error")
    assert report.engines


@pytest.mark.parametrize(("misspelt", "level"), [({}, "warning"), ({"block_sizes": 4}, "note")])
def test_what_a_run_shows_is_a_note_where_a_warning_may_explain_it(
    misspelt, level, pair_to_run, tmp_path, few_variants
):
    draft, target = pair_to_run
    few_variants.add("sample_from_anchor false")
    with_fields(draft, {"sample_from_anchor": True}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | misspelt))
    report = check_draft(tmp_path, target.model, CheckOptions(prompts=PROMPTS[:4], max_new_tokens=10))
    remark = next(one for one in report.remarks if one.name == "better-otherwise")
    assert remark.level == level
    assert ("shows how they were trained" in remark.finding.what) == (level == "warning")
    assert ("correct those first" in remark.finding.advice) == (level == "note")
    assert report.status == 1
