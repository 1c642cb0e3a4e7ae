"""The right draft for a checkpoint, never a draft that merely loads."""

import dataclasses
import json
import warnings

import pytest
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from packaging.version import parse
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto

import tiny
from dflash_hub import (
    DFLASH_DRAFT_REGISTRY,
    DFlashConfig,
    DFlashDraftModel,
    DFlashDraftSpec,
    Qwen3DFlash2DraftModel,
    Qwen3DFlashDraftModel,
    build_target_layer_ids,
    catalogue,
    dflash_generate,
    load_draft,
    register_dflash_draft,
    resolve_dflash_draft_spec,
)
from dflash_hub.catalogue import is_hub_id
from dflash_hub.families import FAMILIES, families_of, siblings_of
from dflash_hub.layouts import layout_findings, variant_of
from dflash_hub.published import refusal, target_refusal
from dflash_hub.registry import CATALOGUE, drafts_for, explain_resolution, spread_taps
from dflash_hub.support_dflash import TESTED
from paths import DATA, ROOT

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


def test_every_draft_loads_and_decodes_or_has_a_reason():
    for spec in CATALOGUE:
        assert spec.loads == (spec.unsupported is None)
        assert spec.decodes == (spec.reason is None)
        assert spec.loads or not spec.decodes
        assert spec.reason is None or spec.reason[0].islower()
        if spec.decodes:
            assert any(family in TESTED for name in spec.architectures for family in families_of(name))


ROW = {"repo_id": "me/draft", "variant": "dflash", "layout": "z-lab", "quantization": None, "unsupported": None}


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("z-lab", "z-lab__Qwen3-4B-DFlash-b16"),
        ("z-lab", "z-lab__Qwen3.8-27B-DFlash2"),
        ("muse", "meta-models__Muse-Glimmer-30B-assistant"),
        ("speculators", "RedHatAI__gemma-4-31B-it-speculator.dflash"),
    ],
)
def test_the_layouts_that_the_catalogue_calls_readable_are_those_that_are_read(layout, file):
    content = json.loads((DATA / "published_configs" / f"{file}.json").read_text())
    row = ROW | {"variant": variant_of(content), "layout": layout}
    assert (refusal(row) is None) == (not [*layout_findings(content)])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, None),
        ({"layout": None}, None),
        ({"unsupported": "it is odd"}, "it is odd"),
        ({"layout": "laguna"}, "it is a DFlash draft in the laguna layout, which is not read"),
        ({"variant": "dflash2", "layout": "muse"}, "it is a DFlash 2 draft in the muse layout, which is not read"),
        ({"quantization": "compressed-tensors W4A16"}, None),
        (
            {"quantization": "modelopt NVFP4"},
            "its weights are quantised to modelopt NVFP4; transformers has no loader for that format",
        ),
    ],
)
def test_a_row_loads_by_its_kind_its_layout_and_the_format_of_its_weights(row, reason):
    assert refusal(ROW | row) == reason


def test_a_target_of_an_unknown_or_untested_family_is_not_decoded():
    assert target_refusal(("Qwen3ForCausalLM",)) is None
    assert target_refusal(()) == "the architecture of its target is not known"
    assert "(GlmMoeDsaForCausalLM)" in target_refusal(("GlmMoeDsaForCausalLM",))
    assert "(Unheard)" in target_refusal(("Unheard",))


@pytest.mark.quick
def test_the_readme_counts_the_rows_that_load_and_decode():
    counts = [len(CATALOGUE), sum(spec.loads for spec in CATALOGUE), sum(spec.decodes for spec in CATALOGUE)]
    words = "list the {} published drafts: {} can be loaded, {} of them with targets that this package decodes"
    assert words.format(*counts) in (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize(
    ("field", "value", "known"), [("variant", "dflash1", "dflash, "), ("layout", "hf", "z-lab, muse")]
)
def test_a_row_of_an_unknown_variant_or_layout_is_an_error_at_import(field, value, known, tmp_path, monkeypatch):
    rows = json.loads((ROOT / "drafts.json").read_text())
    rows[1][field] = value
    (tmp_path / "drafts.json").write_text(json.dumps(rows))
    monkeypatch.setattr(catalogue, "__file__", str(tmp_path / "catalogue.py"))
    with pytest.raises(ValueError, match=f"z-lab/Qwen3-8B-DFlash-b16: {field} is '{value}'.*not one of {known}"):
        catalogue.read_entries()


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
    assert len({(spec.repo_id, spec.subfolder) for spec in CATALOGUE}) == len(CATALOGUE) >= 115
    assert len({tuple(spec.details) for spec in CATALOGUE}) == 1
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


# Lines that are written for the reference implementation ------------------------------------------------------------

FIRST, SECOND = Qwen3DFlashDraftModel, Qwen3DFlash2DraftModel


@pytest.mark.quick
@pytest.mark.parametrize(
    ("positional", "named", "expected"),
    [
        ((), {"draft_cls": FIRST}, (None, FIRST)),
        ((), {"draft_cls": FIRST, "draft2_cls": SECOND}, (None, FIRST)),
        ((FIRST,), {}, (None, FIRST)),
        ((SECOND,), {}, (None, SECOND)),
        ((FIRST, SECOND), {}, (None, FIRST)),
        ((FIRST, "org/draft"), {}, ("org/draft", FIRST)),
        ((SECOND,), {"repo_id": "org/draft"}, ("org/draft", SECOND)),
        (("org/draft",), {}, ("org/draft", FIRST)),
        (("org/draft", SECOND), {}, ("org/draft", SECOND)),
        (("org/draft",), {"draft_cls": SECOND}, ("org/draft", SECOND)),
        ((ROOT,), {}, (str(ROOT), FIRST)),
        ((), {"repo_id": "org/draft"}, ("org/draft", FIRST)),
    ],
)
def test_a_spec_takes_class_and_repository_in_either_order(positional, named, expected):
    spec = DFlashDraftSpec(*positional, **named, revision="a commit")
    assert (spec.repo_id, spec.draft_cls, spec.draft2_cls, spec.revision) == (*expected, SECOND, "a commit")
    assert DFlashDraftSpec(*(*positional, None, None)[:2], "a commit", **named) == spec
    assert dataclasses.replace(spec, license="mit").draft_cls is spec.draft_cls


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        ((7,), {}, "repo_id is 7; it must be a Hub id"),
        ((AutoConfig,), {}, "draft_cls is .*AutoConfig.*; it must be dflash_hub.DFlashDraftModel"),
        ((FIRST, FIRST), {}, "draft2_cls is .*; it must be dflash_hub.DFlash2DraftModel"),
        (("org/draft",), {"repo_id": "org/other"}, "repo_id is given twice, as 'org/other' and 'org/draft'"),
    ],
)
def test_what_is_neither_a_repository_nor_a_draft_is_refused(positional, named, message):
    with pytest.raises(ValueError, match=message):
        DFlashDraftSpec(*positional, **named)


def test_the_originals_line_registers_an_architecture_whose_drafts_are_built_or_loaded(registry, tmp_path):
    registry["MyForCausalLM"] = DFlashDraftSpec(draft_cls=Qwen3DFlashDraftModel)
    target = tiny.target("qwen3")
    target.config.architectures = ["MyForCausalLM"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = resolve_dflash_draft_spec(["MyForCausalLM"])
        assert resolve_dflash_draft_spec(target=target) is spec
    assert spec.repo_id is None
    assert "names no repository" in explain_resolution(["MyForCausalLM"])[1]
    with pytest.raises(ValueError, match=r"names no repository.*spec.load\('org/draft'\).*spec.build\("):
        spec.load()
    with pytest.raises(ValueError, match="names no repository"):
        target.generate(tiny.prompt(4), custom_generate=dflash_generate, max_new_tokens=2)
    with pytest.raises(ValueError, match="MyForCausalLM"):  # among the supported ones
        resolve_dflash_draft_spec(["Unheard"])
    built = spec.build(target.config, mask_token_id=3, target_layer_ids=[0, 2], num_hidden_layers=1)
    built.save_pretrained(tmp_path)
    assert spec.load(tmp_path).config == built.config
    register_dflash_draft("MyForCausalLM", DFlashDraftSpec(tmp_path, Qwen3DFlashDraftModel), overwrite=True)
    assert resolve_dflash_draft_spec(["MyForCausalLM"]).load().config == built.config


def test_a_repository_given_to_load_is_not_asked_for_the_specs_own_commit(tmp_path):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    spec = DFlashDraftSpec("org/draft", subfolder="elsewhere", unsupported="attention sinks", license="mit")
    assert spec.load(tmp_path).card_known == {}
    with pytest.raises(ValueError, match="attention sinks"):
        spec.load("org/draft")


def test_a_spec_builds_with_its_own_classes():
    class Mine(Qwen3DFlash2DraftModel):
        pass

    shape = {"mask_token_id": 3, "target_layer_ids": [0, 2], "num_hidden_layers": 1, "selector_top_k": 4}
    config = tiny.target("qwen3").config
    assert type(DFlashDraftSpec(FIRST, Mine).build(config, "dflash2", **shape)) is Mine
    assert type(DFlashDraftSpec(Mine).build(config, **shape)) is Mine


@pytest.mark.parametrize(("layers", "taps"), [(36, [18]), (5, [2]), (2, [1]), (1, [0])])
def test_a_single_tap_is_the_middle_layer(layers, taps):
    assert build_target_layer_ids(layers, 1) == taps


def test_a_draft_of_one_tap_decodes_its_target():
    target = tiny.target("qwen3")
    taps = build_target_layer_ids(target.config.num_hidden_layers, 1)
    draft = DFlashDraftSpec().build(
        target.config, mask_token_id=3, target_layer_ids=taps, num_hidden_layers=1, block_size=4
    )
    assert draft.fc.weight.shape == (32, 32)
    assert draft.spec_generate(target, tiny.prompt(5), max_new_tokens=20).equal(tiny.greedy(target, tiny.prompt(5), 20))


@pytest.mark.parametrize(("layers", "taps"), [(36, 0), (0, 1)])
def test_numbers_of_taps_or_layers_that_make_no_sense_are_refused(layers, taps):
    with pytest.raises(ValueError, match="must be at least 1"):
        build_target_layer_ids(layers, taps)


QWEN3_DRAFT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "num_target_layers": 12,
    "rope_theta": 5e5,
}
NESTED = {"mask_token_id": 7, "target_layer_ids": [1, 5], "block_size": 8}
WINDOW = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16, "use_sliding_window": True}
SCALES = {"output_multiplier": 1.0, "final_logit_softcapping": None, "input_embedding_scale": 1.0}
TARGETS_OWN = {"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("draft_cls", "fields", "expected"),
    [
        (FIRST, {"dflash_config": NESTED}, {}),
        (FIRST, {"dflash_config": {"mask_token_id": 7, "target_layer_ids": [1, 5]}, "block_size": 8}, {}),
        (FIRST, {"dflash_config": {"mask_token_id": 7, "block_size": 8}}, {"target_layer_ids": [1, 9]}),
        (
            FIRST,
            {"dflash_config": {"mask_token_id": 7, "block_size": 8}, "num_hidden_layers": 1},
            {"target_layer_ids": [6], "num_hidden_layers": 1},
        ),
        (FIRST, {"dflash_config": NESTED | SCALES, "is_causal": False}, {}),
        (FIRST, {"dflash_config": NESTED, "attn_implementation": "eager"}, {}),
        (FIRST, {"dflash_config": NESTED} | TARGETS_OWN, {}),
        (FIRST, {"dflash_config": NESTED} | WINDOW, {"sliding_window": 16}),
        (FIRST, {"dflash_config": NESTED | {"causal": True}} | WINDOW, {"is_causal": True, "sliding_window": 16}),
        (SECOND, {"dflash_config": NESTED | {"selector_rank": 4}}, {"selector_rank": 4, "selector_top_k": 16}),
    ],
)
def test_the_originals_config_builds_the_originals_draft(draft_cls, fields, expected):
    """A `Qwen3Config` with a `dflash_config`; what it leaves out is as there, and blocks are bidirectional."""
    config = AutoConfig.for_model("qwen3", **(QWEN3_DRAFT | fields))
    draft = draft_cls(config)
    common = {"block_size": 8, "mask_token_id": 7, "target_layer_ids": [1, 5], "is_causal": False} | expected
    assert {name: getattr(draft.config, name) for name in common} == common
    assert draft.config.rope_parameters["rope_theta"] == 5e5
    assert draft.config._attn_implementation == fields.get("attn_implementation", "sdpa")
    assert getattr(draft.config, "quantization_config", None) is None
    assert draft.fc.in_features == 32 * len(common["target_layer_ids"])
    attributes = (draft.block_size, draft.mask_token_id, draft.target_layer_ids)
    assert attributes == (8, 7, common["target_layer_ids"])


@pytest.mark.parametrize(
    ("draft_cls", "fields", "message"),
    [
        (FIRST, {}, "describes qwen3, not a DFlash draft"),
        (FIRST, TARGETS_OWN, "describes Qwen3ForCausalLM, not a DFlash draft"),
        (FIRST, {"dflash_config": {"block_size": 8, "target_layer_ids": [1]}}, "does not say mask_token_id"),
        (FIRST, {"dflash_config": NESTED | {"projector_type": "lilicorr"}}, "a head of its own"),
        (FIRST, {"dflash_config": NESTED, "block_size": 4}, "contradicts itself about block_size"),
        (FIRST, {"dflash_config": NESTED | {"selector_rank": 4}}, "describes a DFlash 2 draft"),
    ],
)
def test_a_qwen3_config_that_is_no_drafts_says_what_to_call(draft_cls, fields, message):
    config = AutoConfig.for_model("qwen3", **(QWEN3_DRAFT | fields))
    with pytest.raises(ValueError, match=rf"This Qwen3Config .*{message}(.|\n)*DFlashDraftSpec\(\).build\("):
        draft_cls(config)


@pytest.mark.parametrize("said", [None, False])
def test_a_config_that_was_loaded_is_read_as_its_file(said, tmp_path):
    """A sliding draft whose file says nothing of causality is causal, as in serving engines."""
    draft = tiny.draft(tiny.target("qwen3"), layer_types=["sliding_attention"] * 2, sliding_window=8, is_causal=False)
    draft.save_pretrained(tmp_path, layout="engines")
    content = json.loads((tmp_path / "config.json").read_text())
    content["is_causal"] = content["dflash_config"]["causal"] = said
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.model_type == "qwen3"
    assert DFlashDraftModel(read).config.is_causal is (said is None)
    assert DFlashDraftModel(read).config == DFlashConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["dflash", "dflash2"])
@pytest.mark.parametrize(("given", "causal"), [({}, False), ({"is_causal": True}, True)])
def test_a_fresh_sliding_draft_is_bidirectional_and_says_so_in_each_layout(variant, given, causal, tmp_path):
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "num_hidden_layers": 2}
    shape = window | given | {"mask_token_id": 3, "target_layer_ids": [0, 2]}
    if variant == "dflash2":
        shape["selector_top_k"] = 4
    config = DFlashDraftSpec().build(tiny.target("qwen3").config, variant, **shape).config
    assert config.is_causal is causal
    for layout in ("hub", "engines"):
        config.save_pretrained(tmp_path / layout, layout=layout)
        content = json.loads((tmp_path / layout / "config.json").read_text())
        assert content["is_causal"] is causal
    assert content["dflash_config"]["causal"] is causal


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


NAMES = ["org/name", "name", "_x", "x_", "x-", "x.", "-x", ".x", "x/", "/x", "a/b/c", "a--b", "a..b", "x.git"]


@pytest.mark.parametrize("name", [*NAMES, "a b", "", "x/.y", "n" * 96, "n" * 97, "org/" + "n" * 96, "org/" + "n" * 97])
def test_a_hub_id_is_what_the_hubs_own_library_takes(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_hub_id(name)
    else:
        assert is_hub_id(name)


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
