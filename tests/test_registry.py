"""The right draft for a checkpoint, never a draft that merely loads."""

import dataclasses
import json
import sys
import warnings

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import parse
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto

import tiny
from dflash_hub import (
    DFLASH_DRAFT_REGISTRY,
    DFlashDraftModel,
    DFlashDraftSpec,
    Qwen3DFlashDraftModel,
    load_draft,
    register_dflash_draft,
    resolve_dflash_draft_spec,
)
from dflash_hub.families import FAMILIES, families_of, siblings_of
from dflash_hub.registry import CATALOGUE, NOT_DECODED, drafts_for, spread_taps
from paths import ROOT

# What code in repositories on the Hub calls models of these families.
OF_REPOSITORIES = {
    "KimiK25ForConditionalGeneration",
    "KimiK3ForConditionalGeneration",
    "SarvamMLAForCausalLM",
    "SarvamMoEForCausalLM",
}
QWEN3 = ["Qwen3ForCausalLM"]


@pytest.fixture
def registry():
    """The registry and the catalogue, put back afterwards."""
    before, catalogue = dict(DFLASH_DRAFT_REGISTRY), list(CATALOGUE)
    yield DFLASH_DRAFT_REGISTRY
    DFLASH_DRAFT_REGISTRY.clear()
    DFLASH_DRAFT_REGISTRY.update(before)
    CATALOGUE[:] = catalogue


def qwen3_config(name: str = "", **shape):
    shape = {"hidden_size": 2560, "num_hidden_layers": 36, "vocab_size": 151936} | shape
    config = AutoConfig.for_model("qwen3", **shape)
    config.name_or_path = name
    return config


@pytest.mark.quick
def test_every_architecture_has_a_default_that_runs():
    named = {name for spec in CATALOGUE if not spec.unsupported for name in spec.architectures}
    assert set(DFLASH_DRAFT_REGISTRY) == {sibling for name in named for sibling in siblings_of(name)}
    for architecture, spec in DFLASH_DRAFT_REGISTRY.items():
        assert resolve_dflash_draft_spec([architecture]) is spec
        assert issubclass(spec.draft_cls, Qwen3DFlashDraftModel)
        assert spec.unsupported is None
        assert spec.serves(architecture)
    for causal, whole in (("Qwen3_5", "Qwen3_5"), ("Qwen3_5Moe", "Qwen3_5Moe"), ("Gemma4", "Gemma4")):
        whole_default = DFLASH_DRAFT_REGISTRY[f"{whole}ForConditionalGeneration"]
        assert DFLASH_DRAFT_REGISTRY[f"{causal}ForCausalLM"] is whole_default


def test_the_families_are_those_of_the_installed_transformers():
    """Only whole models count: a draft such as Gemma4UnifiedAssistantForCausalLM is no target."""
    if parse(transformers.__version__) < parse("5.24"):
        pytest.skip("the table is that of transformers 5.24")
    found: dict[str, set[str]] = {}
    tables = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for model_type, names in (item for table in tables for item in table.items()):
        try:
            family = CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type
        except (ValueError, StrictDataclassError):  # configs that have no default, of models with no text of their own
            continue
        found.setdefault(family, set()).update([names] if isinstance(names, str) else names)
    for family, members in FAMILIES.items():
        assert list(members) == sorted(members)
        assert {*members} - OF_REPOSITORIES == {name for name in found[family] if "Assistant" not in name}
    assert list(FAMILIES) == sorted(FAMILIES)


def test_each_architecture_of_the_catalogue_has_a_family_and_the_refused_ones_say_so():
    for spec in CATALOGUE:
        assert all(families_of(name) for name in spec.architectures)
    states = {name: spec.target_state for spec in CATALOGUE for name in spec.architectures}
    refused = {"GlmMoeDsaForCausalLM", "Glm5NextForConditionalGeneration", "KimiK3ForConditionalGeneration"}
    assert {name for name, state in states.items() if state} >= refused
    assert states["KimiK25ForConditionalGeneration"] is None
    assert states["Qwen3_5ForConditionalGeneration"] is None
    assert set(FAMILIES) >= NOT_DECODED


def test_the_first_registered_architecture_in_the_list_wins():
    spec = resolve_dflash_draft_spec(["Unheard", "LlamaForCausalLM", "Qwen3ForCausalLM"])
    assert spec is DFLASH_DRAFT_REGISTRY["LlamaForCausalLM"]


def test_none_registered_names_what_was_given_and_what_is_supported():
    with pytest.raises(ValueError, match=r"registered for Unheard, Unseen.*Supported.*Qwen3ForCausalLM") as caught:
        resolve_dflash_draft_spec(["Unheard", "Unseen"])
    assert all(
        architecture in str(caught.value)
        for spec in CATALOGUE
        if not spec.unsupported
        for architecture in spec.architectures
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Qwen3ForCausalLM", "is the string 'Qwen3ForCausalLM', not a list"),
        ([], "is empty"),
        (None, "is None, not a list"),
        ([1], r"is \[1\], not a list of strings"),
        (7, "is 7, not a list"),
    ],
)
def test_what_is_no_list_of_names_is_told_so(given, said):
    with pytest.raises(ValueError, match=f"{said}.*target.config.architectures"):
        resolve_dflash_draft_spec(given)


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16"),
        ("qwen/qwen3-8b", "z-lab/Qwen3-8B-DFlash-b16"),
        ("Qwen/Qwen3.6-27B", "z-lab/Qwen3.6-27B-DFlash"),
        ("openai/gpt-oss-120b", "z-lab/gpt-oss-120b-DFlash"),
    ],
)
def test_a_checkpoint_finds_the_draft_made_for_it_by_id_config_or_model(target, draft):
    architectures = list(drafts_for(target)[0].architectures)
    assert resolve_dflash_draft_spec(architectures, target=target).repo_id == draft
    config = qwen3_config(target)
    assert resolve_dflash_draft_spec(architectures, target=config).repo_id == draft
    model = tiny.target("qwen3")
    model.config.name_or_path = target
    assert resolve_dflash_draft_spec(architectures, target=model).repo_id == draft


def test_known_commits_are_pinned():
    assert resolve_dflash_draft_spec(QWEN3).revision == "b74e3a329c4d963783143b1e970d95b002be72bd"
    assert all(spec.revision is None or len(spec.revision) == 40 for spec in CATALOGUE)


def test_a_row_of_an_unknown_variant_is_an_error_at_import_that_names_it(tmp_path, monkeypatch):
    rows = json.loads((ROOT / "drafts.json").read_text())
    rows[1]["variant"] = "dflash1"
    (tmp_path / "drafts.json").write_text(json.dumps(rows))
    module = sys.modules[DFlashDraftSpec.__module__]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "registry.py"))
    with pytest.raises(
        ValueError, match=r"z-lab/Qwen3-8B-DFlash-b16: variant is 'dflash1'.*not one of dflash, dflash2"
    ):
        module._read_catalogue()


def test_siblings_of_equal_shape_are_told_apart_by_name():
    names = ("Qwen/Qwen3.5-27B", "Qwen/Qwen3.6-27B")
    found = [resolve_dflash_draft_spec(["Qwen3_5ForConditionalGeneration"], target=name) for name in names]
    assert found[0].repo_id != found[1].repo_id
    assert found[0].hidden_size == found[1].hidden_size


def test_an_unknown_checkpoint_of_known_shape_gets_a_draft_with_a_warning_that_names_its_own_target():
    with pytest.warns(UserWarning, match=r"does not know me/my-finetune.*was made for Qwen/Qwen3-4B"):
        spec = resolve_dflash_draft_spec(QWEN3, target=qwen3_config("me/my-finetune"))
    assert spec is DFLASH_DRAFT_REGISTRY["Qwen3ForCausalLM"]
    with pytest.warns(UserWarning, match="was made for Qwen/Qwen3-8B"):
        spec = resolve_dflash_draft_spec(QWEN3, target=qwen3_config("me/other", hidden_size=4096))
    assert spec.repo_id == "z-lab/Qwen3-8B-DFlash-b16"


@pytest.mark.parametrize("shape", [{"hidden_size": 2048}, {"num_hidden_layers": 35}, {"vocab_size": 32000}])
def test_an_unknown_checkpoint_of_another_shape_gets_none(shape):
    with pytest.raises(ValueError, match=r"does not know me/odd, and no draft .* fits its shape") as caught:
        resolve_dflash_draft_spec(QWEN3, target=qwen3_config("me/odd", **shape))
    assert str(next(iter(shape.values()))) in str(caught.value)
    assert "hidden_size 2560, 36 layers, vocab_size 151936" in str(caught.value)


@pytest.mark.parametrize("rows", [151669, 151937, 152064, 180000])
def test_rows_added_to_a_vocabulary_or_padding_taken_away_are_no_other_shape(rows):
    with pytest.warns(UserWarning, match=f"but 151936 tokens where this one has {rows}. The text stays exact"):
        spec = resolve_dflash_draft_spec(QWEN3, target=qwen3_config("me/more", vocab_size=rows))
    assert spec.target == "Qwen/Qwen3-4B"
    copy = qwen3_config("me/Qwen3-8B-AWQ", hidden_size=4096, vocab_size=rows)
    assert resolve_dflash_draft_spec(QWEN3, target=copy).target == "Qwen/Qwen3-8B"


def test_the_vocabulary_nearest_in_size_comes_first(registry):
    shape = {"hidden_size": 8, "num_target_layers": 2, "architectures": tuple(QWEN3)}
    small, large = (
        DFlashDraftSpec(f"me/{rows}", targets=(f"me/of-{rows}",), vocab_size=rows, **shape) for rows in (100, 120)
    )
    CATALOGUE[:] = [small, large]
    for rows, spec in ((100, small), (104, small), (120, large), (125, large)):
        config = qwen3_config("me/odd", hidden_size=8, num_hidden_layers=2, vocab_size=rows)
        with pytest.warns(UserWarning, match="acceptance may be low"):
            assert resolve_dflash_draft_spec(QWEN3, target=config) is spec


def test_an_unknown_hub_id_is_judged_by_its_config(hub, repo_id):
    qwen3_config().push_to_hub(repo_id)
    with pytest.warns(UserWarning, match="was made for Qwen/Qwen3-4B"):
        assert resolve_dflash_draft_spec(QWEN3, target=repo_id).repo_id == "z-lab/Qwen3-4B-DFlash-b16"
    with pytest.raises(OSError, match="not a valid model identifier"):
        resolve_dflash_draft_spec(QWEN3, target="tester/nowhere")


@pytest.mark.parametrize(
    ("target", "architecture", "reason"),
    [
        ("XiaomiMiMo/MiMo-V2.5-Pro-FP4-DFlash", "MiMoV2ForCausalLM", "attention sinks"),
        ("poolside/Laguna-S-2.1", "LagunaForCausalLM", "per-tap norms"),
    ],
)
def test_a_target_whose_drafts_cannot_be_run_is_told_why(target, architecture, reason):
    with pytest.raises(ValueError, match=f"cannot be run by this version.*{reason}"):
        resolve_dflash_draft_spec([architecture], target=target)


def test_a_spec_that_cannot_be_run_does_not_load():
    with pytest.raises(ValueError, match="cannot be run"):
        next(spec for spec in CATALOGUE if spec.unsupported).load()


def test_the_catalogue_is_clean():
    assert len(CATALOGUE) == 90
    assert len({(spec.repo_id, spec.subfolder) for spec in CATALOGUE}) == 90
    for spec in CATALOGUE:
        assert spec.repo_id.count("/") == 1
        assert all(name.count("/") == 1 and " " not in name for name in spec.targets)
        assert "unknown" not in str(spec)


def test_registering_adds_a_draft_and_refuses_to_replace_one_silently(registry):
    spec = DFlashDraftSpec("me/my-draft", targets=("me/my-target",))
    register_dflash_draft("MyForCausalLM", spec)
    assert resolve_dflash_draft_spec(["MyForCausalLM"]).repo_id == "me/my-draft"
    assert resolve_dflash_draft_spec(["MyForCausalLM"], target="me/my-target").repo_id == "me/my-draft"
    register_dflash_draft("MyForCausalLM", spec)  # the same again changes nothing
    register_dflash_draft("MyOtherForCausalLM", spec)
    assert registry["MyOtherForCausalLM"].repo_id == "me/my-draft"
    other = DFlashDraftSpec("me/other-draft")
    with pytest.raises(ValueError, match=r"has a draft already, me/my-draft.*overwrite=True"):
        register_dflash_draft("MyForCausalLM", other)
    with pytest.raises(ValueError, match="z-lab/Qwen3-4B-DFlash-b16"):
        register_dflash_draft("Qwen3ForCausalLM", other)
    with pytest.raises(ValueError, match=r"Qwen/Qwen3-4B has a draft already, z-lab"):
        register_dflash_draft("NewForCausalLM", DFlashDraftSpec("me/third", targets=("Qwen/Qwen3-4B",)))
    register_dflash_draft("MyForCausalLM", other, overwrite=True)
    assert resolve_dflash_draft_spec(["MyForCausalLM"]).repo_id == "me/other-draft"


def test_a_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_dflash_draft_spec(QWEN3).repo_id = "me/other"


def test_a_spec_downloads_and_instantiates_our_class_and_runs_no_code_of_the_repository(hub, repo_id):
    from huggingface_hub import HfApi

    draft = tiny.draft(tiny.target("qwen3"))
    draft.push_to_hub(repo_id)
    trap = b"raise RuntimeError('code of the repository ran')"
    HfApi().upload_file(path_or_fileobj=trap, path_in_repo="modeling_dflash.py", repo_id=repo_id)
    loaded = DFlashDraftSpec(repo_id).load(dtype="bfloat16")
    assert type(loaded) is DFlashDraftModel
    assert str(loaded.dtype) == "torch.bfloat16"


def test_a_spec_loads_from_a_subfolder_and_names_its_target_on_the_next_card(tmp_path):
    draft = tiny.draft(tiny.target("qwen3"))
    draft.save_pretrained(tmp_path / "dflash")
    spec = DFlashDraftSpec(str(tmp_path), subfolder="dflash", targets=("org/target",), license="mit")
    loaded = spec.load()
    loaded.save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "org/target" in card
    assert "license: mit" in card


# Building --------------------------------------------------------------------------------------------------------


def test_a_fresh_draft_has_the_published_shape():
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=64,
        num_hidden_layers=36,
        vocab_size=300,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    draft = resolve_dflash_draft_spec(QWEN3).build(config, mask_token_id=299)
    built = draft.config
    assert (built.num_hidden_layers, built.block_size, built.mask_token_id) == (5, 16, 299)
    assert built.target_layer_ids == [1, 9, 17, 25, 33]
    assert (built.num_target_layers, built.hidden_size, built.vocab_size) == (36, 64, 300)
    assert (built.intermediate_size, built.num_attention_heads, built.num_key_value_heads) == (96, 4, 2)
    assert built.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert built.is_causal is False
    assert draft.fc.weight.shape == (64, 5 * 64)


@pytest.mark.parametrize(
    ("layers", "taps"),
    [(36, [1, 9, 17, 25, 33]), (40, [1, 10, 19, 28, 37]), (8, [1, 2, 3, 4, 5]), (28, [1, 7, 13, 19, 25])],
)
def test_taps_are_spread_from_the_second_to_the_third_last_layer(layers, taps):
    assert spread_taps(layers) == taps


def test_a_built_draft_decodes_its_target():
    target = tiny.target("qwen3")
    draft = resolve_dflash_draft_spec(QWEN3).build(
        target.config, mask_token_id=3, target_layer_ids=[0, 2], num_hidden_layers=1, block_size=4
    )
    ids = tiny.prompt(5)
    assert draft.spec_generate(target, ids, max_new_tokens=20).equal(tiny.greedy(target, ids, 20))


def test_every_family_of_config_builds():
    spec = resolve_dflash_draft_spec(QWEN3)
    for family in tiny.FAMILIES:
        config = tiny.target(family).config
        built = spec.build(config, mask_token_id=3, target_layer_ids=[1]).config
        assert built.num_target_layers == config.num_hidden_layers


def test_a_target_whose_layers_differ_in_width_builds():
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=12)
    draft = resolve_dflash_draft_spec(["Gemma4ForConditionalGeneration"]).build(
        config, mask_token_id=4, num_hidden_layers=1, intermediate_size=8, rope_theta=5e5, dtype="bfloat16"
    )
    assert draft.config.target_layer_ids == [1, 3, 5, 7, 9]
    assert draft.config.rope_parameters["rope_theta"] == 5e5
    assert str(draft.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "mask_token_id must be given"),
        ({"mask_token_id": 12, "target_layer_ids": [1]}, "mask_token_id is 12, but vocab_size is 12"),
        ({"mask_token_id": 3}, r"4 layers, too few to spread 5 taps.*target_layer_ids="),
        ({"mask_token_id": 3, "target_layer_ids": [1, 4]}, "asks for layer 4, but the target has 4 layers"),
        ({"mask_token_id": 3, "target_layer_ids": [1], "hidden_size": 8}, "hidden_size is 8 in the draft"),
        ({"mask_token_id": 3, "target_layer_ids": [1], "block_sise": 8}, "block_sise: no such field"),
    ],
)
def test_a_draft_that_cannot_fit_its_target_is_not_built(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve_dflash_draft_spec(QWEN3).build(tiny.target("qwen3").config, **overrides)


def test_resolving_a_known_target_asks_the_hub_nothing_and_warns_of_nothing(hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_dflash_draft_spec(QWEN3, target="Qwen/Qwen3-4B")
    assert hub.calls() == []


@pytest.mark.parametrize("name", ["/tmp/no such folder", "./neither", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_taken_for_a_hub_id(name):
    for look in (load_draft, lambda name: resolve_dflash_draft_spec(target=name)):
        with pytest.raises(OSError, match=f"There is no folder {name}"):
            look(name)


@pytest.mark.parametrize(
    ("config", "variant", "message"),
    [
        ("Qwen/Qwen3-4B", None, "target_config is 'Qwen/Qwen3-4B'; pass the config"),
        (AutoConfig.for_model("mamba"), None, "mamba has no num_attention_heads"),
        (AutoConfig.for_model("qwen3"), [], r"variant is \[\]; it must be one of dflash"),
    ],
)
def test_a_draft_is_built_for_configs_of_targets_only(config, variant, message):
    with pytest.raises(ValueError, match=message):
        DFlashDraftSpec("new").build(config, variant, mask_token_id=3)
