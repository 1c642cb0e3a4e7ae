"""Conversion: every kind of draft into every layout that can hold it, bit for bit, and refused by name elsewhere."""

import functools
import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import tiny
from dflash_hub import DFlashConfig, DFlashDraftModel, load_draft
from dflash_hub.configuration_dflash import EXTENSIONS, LAYOUTS
from dflash_hub.kinds import KINDS
from dflash_hub.layouts import read_layout, variant_of
from dflash_hub.publishing.convert import ALL_LAYOUTS, ConvertOptions, convert, plan_conversion
from dflash_hub.publishing.layouts import OTHER_LAYOUTS, layout_findings
from paths import DATA, ROOT, TINY

TARGET = "org/target"
DRAFTS = {
    "dflash": {},
    "dflash, a reduced vocabulary": {"draft_vocab_size": 9},
    "dflash, its own embedding": {"has_own_embed_tokens": True},
    "dflash, its own head": {"has_own_lm_head": True},
    "dflash, from the anchor": {"sample_from_anchor": True},
    "dflash, causal": {"is_causal": True},
    "dflash, windows": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "dflash, windows from the anchor": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "window_from_anchor": True,
    },
    "dflash2": tiny.SECOND,
    "dflash2, scaled": tiny.SECOND | {"output_multiplier": 0.5},
    "dspark": tiny.DSPARK,
    "dspark, gated, a reduced vocabulary": tiny.DSPARK | {"markov_head_type": "gated", "draft_vocab_size": 9},
    "dspark, no head": {"markov_rank": 0},
    "domino": tiny.DOMINO,
}
REFUSED = {
    ("dflash, a reduced vocabulary", "muse"): "draft_vocab_size",
    ("dflash, its own embedding", "muse"): "has_own_embed_tokens",
    ("dflash, its own embedding", "speculators"): "has_own_embed_tokens",
    ("dflash, its own head", "muse"): "has_own_lm_head",
    ("dflash, its own head", "speculators"): "has_own_lm_head",
    ("dflash, from the anchor", "engines"): "sample_from_anchor",
    ("dflash, from the anchor", "muse"): "sample_from_anchor",
    ("dflash, causal", "muse"): "is_causal",
    ("dflash, causal", "speculators"): "is_causal",
    ("dflash, windows", "muse"): "is_causal",
    ("dflash, windows", "speculators"): "window_from_anchor",
    ("dflash, windows from the anchor", "muse"): "is_causal",
    ("dflash, windows from the anchor", "engines"): "window_from_anchor",
    ("dflash2", "muse"): "model_type",
    ("dflash2, scaled", "muse"): "model_type",
    ("dflash2, scaled", "speculators"): "output_multiplier",
    ("dspark", "muse"): "model_type",
    ("dspark, gated, a reduced vocabulary", "muse"): "model_type",
    ("dspark, no head", "muse"): "model_type",
    ("domino", "muse"): "model_type",
    ("domino", "speculators"): "model_type",
}


@pytest.fixture(scope="module")
def target():
    return tiny.target("qwen3")


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory):
    """Return a function: the name of a draft -> its folder in the hub layout."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("draft")
            draft = tiny.draft(target, **DRAFTS[name])
            if draft.config.draft_vocab_size is not None:
                draft.d2t.copy_(torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3]))
            draft.card_metadata = {"base_model": TARGET}
            draft.save_pretrained(folders[name])
        return folders[name]

    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    """Return a function: the name of a draft -> what loads from its folder."""
    return functools.cache(lambda name: load_draft(saved(name)))


def same_tensors(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_is_the_same_in_every_layout_or_refused_by_the_fields_name(name, layout, saved, loaded, tmp_path):
    source = saved(name)
    if (name, layout) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, layout]):
            convert(source, tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
        return
    convert(source, tmp_path / "out", layout)
    before, after = loaded(name), load_draft(tmp_path / "out")
    assert type(after) is type(before)
    assert after.config == before.config
    assert same_tensors(before.state_dict(), after.state_dict())
    if layout != "hub":
        source = tmp_path / "saved"
        before.save_pretrained(source, layout=layout)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((source / "config.json").read_text()) == written


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_conversion_back_gives_the_same_files(layout, saved, tmp_path):
    convert(saved("dflash"), tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "hub")
    first = load_file(saved("dflash") / "model.safetensors")
    assert same_tensors(first, load_file(tmp_path / "back" / "model.safetensors"))


def test_the_muse_layout_loads_in_transformers_without_code_and_computes_the_same(saved, tmp_path):
    convert(saved("dflash"), tmp_path, "muse")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    native, ours = AutoModel.from_pretrained(tmp_path).eval(), load_draft(saved("dflash")).eval()
    assert type(native).__name__ == "MuseGlimmerAssistantModel"
    assert native.config.is_causal is False  # else SGLang runs sliding layers causally
    noise, context = torch.randn(1, 5, 32), torch.randn(1, 7, 64)
    positions = torch.arange(12)[None]
    with torch.no_grad():
        expected = ours(noise, context, position_ids=positions).last_hidden_state
        found = native(noise, context, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_speculators_keeps_which_tokens_a_draft_knows_and_names_the_target(saved, tmp_path):
    convert(saved("dflash, a reduced vocabulary"), tmp_path, "speculators")
    tensors = load_file(tmp_path / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(9)
    assert tensors["t2d"].nonzero()[:, 0].tolist() == ids.tolist()
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["aux_hidden_state_layer_ids"] == [1, 3]
    assert content["speculators_config"]["verifier"]["name_or_path"] == TARGET
    assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert content["sliding_window_non_causal"]  # false means causal to vLLM 0.26 to 0.33


def test_speculators_asks_for_a_target_that_no_card_names(target, tmp_path):
    tiny.draft(target).save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match="--base-model"):
        convert(tmp_path / "draft", tmp_path / "out", "speculators")
    convert(tmp_path / "draft", tmp_path / "out", "speculators", ConvertOptions(base_model=TARGET))


@pytest.mark.parametrize("path", sorted((DATA / "published_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_published_config_reads_back_equal_from_every_layout_that_can_hold_it(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        kind = KINDS[variant_of(content)]
        config = kind.config_class.from_dict(content)
    except ValueError:
        pytest.skip("this package does not read it, or asks for a field; tests/test_config.py checks which")
    for layout, rules in OTHER_LAYOUTS.items():
        refused = [*layout_findings(config, layout)]
        if not refused:
            written = json.loads(json.dumps(rules.config(config, TARGET)))
            assert kind.config_class(**read_layout(written, {}, kind.name)) == config


@pytest.mark.parametrize("on_hub", [False, True], ids=["folder", "hub"])
def test_pickles_become_safetensors(on_hub, saved, tmp_path, hub, repo_id):
    tensors = load_file(saved("dflash") / "model.safetensors")
    source, mask = tmp_path / "source", torch.randn(32)
    source.mkdir()
    torch.save(tensors, source / "pytorch_model.bin")
    torch.save(mask, source / "mask_embedding.pt")
    (source / "config.json").write_bytes((saved("dflash") / "config.json").read_bytes())
    if on_hub:
        HfApi().create_repo(repo_id)
        HfApi().upload_folder(repo_id=repo_id, folder_path=source)
    convert(repo_id if on_hub else source, tmp_path / "out", "hub")
    draft = load_draft(tmp_path / "out")
    assert torch.equal(draft.mask_embedding, mask)
    assert same_tensors(tensors | {"mask_embedding": mask}, draft.state_dict())


def test_the_target_says_what_the_config_lacks_and_copies_of_its_parts_are_left_out(tmp_path):
    """The golden draft of deepseek-ai's code ships its target's embedding and head."""
    golden = DATA / "golden" / "dspark-a"
    with pytest.raises(ValueError, match=r"has_own_embed_tokens is True.*--target"):
        convert(golden / "draft", tmp_path / "no", "speculators", ConvertOptions(base_model=TARGET))
    options = ConvertOptions(base_model=TARGET, target=str(golden / "target"))
    done = convert(golden / "draft", tmp_path / "spec", "speculators", options)
    assert sorted(done.left_out) == ["embed_tokens.weight", "lm_head.weight"]
    content = json.loads((tmp_path / "spec" / "config.json").read_text())
    del content["num_target_layers"]
    (tmp_path / "spec" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"num_target_layers.*pass target="):
        convert(tmp_path / "spec", tmp_path / "no", "engines")
    convert(tmp_path / "spec", tmp_path / "engines", "engines", replace(options, base_model=None))
    again = load_draft(tmp_path / "engines")
    assert again.config.num_target_layers == 8
    assert f"base_model: {TARGET}" in (tmp_path / "engines" / "README.md").read_text()
    assert not again.config.has_own_lm_head


def test_a_revision_of_a_folder_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="is a folder, which has none"):
        convert(saved("dflash"), tmp_path / "out", "hub", ConvertOptions(revision="main"))


def test_a_dry_run_tells_what_would_change_and_writes_nothing(saved, tmp_path):
    plan = plan_conversion(saved("dflash"), "muse")
    assert plan.renamed == {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    assert plan.source_layout == "hub"
    assert plan.config["model_type"] == "muse_glimmer_assistant"
    assert not any(tmp_path.iterdir())


def test_the_documented_table_of_kinds_and_layouts_is_that_of_the_code():
    text = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    header = "| kind | " + " | ".join(ALL_LAYOUTS) + " |"
    rows = text.partition(header)[2].partition("\n\n")[0].strip().splitlines()[1:]
    documented = {}
    for row in rows:
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        documented[name] = {layout for layout, cell in zip(ALL_LAYOUTS, cells, strict=True) if cell == "yes"}
    written = {name: set(LAYOUTS) for name in KINDS}
    for layout, rules in OTHER_LAYOUTS.items():
        for name in rules.kinds:
            written[name].add(layout)
    assert documented == written


def test_an_unknown_layout_is_refused_with_those_there_are(saved, tmp_path):
    assert (*LAYOUTS, *EXTENSIONS.other_layouts) == ALL_LAYOUTS
    with pytest.raises(ValueError, match=r"'gguf'; it must be one of 'hub', 'engines', 'speculators', 'muse'"):
        convert(saved("dflash"), tmp_path, "gguf")


# Large drafts, and interrupted runs -----------------------------------------------------------------------------------


WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2}
CONVERT = "from dflash_hub.publishing.convert import convert; convert({source!r}, {out!r}, {layout!r})"
MEASURED = """
import threading, time
most, first = 0, None

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.002)

import dflash_hub.modeling_dflash, dflash_hub.publishing.convert
first = anonymous()
threading.Thread(target=watch, daemon=True).start()
{convert}
print(most - first)
"""
KILLED = """
import os, signal, threading, time

def watch():
    while not os.path.exists({partial!r}):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
{convert}
"""


@pytest.fixture(scope="module")
def wide(target, tmp_path_factory):
    """The folder of a draft of more than 100 MiB, and that size in MiB."""
    folder = tmp_path_factory.mktemp("wide")
    fields = tiny.draft(target).config.to_dict() | WIDE | {"target_hidden_size": None, "layer_types": None}
    with torch.device("meta"):
        draft = DFlashDraftModel(DFlashConfig.from_dict(fields))
    draft.config.save_pretrained(folder)
    tensors = {name: torch.zeros(one.shape) + 0.5 for name, one in draft.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, (folder / "model.safetensors").stat().st_size / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; runs on Linux")
def test_a_large_draft_is_converted_without_being_in_memory(wide, tmp_path, servers):
    folder, size = wide
    step = CONVERT.format(source=str(folder), out=str(tmp_path / "out"), layout="muse")
    done = servers.models.run(code=MEASURED.format(convert=step))
    assert done.returncode == 0, done.stderr
    assert size > 100
    assert float(done.stdout) < size / 2
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["encoder.fc.weight"], load_file(folder / "model.safetensors")["fc.weight"])


def test_a_conversion_that_is_killed_leaves_the_folder_as_it_was(wide, tmp_path, servers):
    out = tmp_path / "out"
    convert(TINY / "draft", out, "engines")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    step = CONVERT.format(source=str(wide[0]), out=str(out), layout="hub")
    done = servers.models.run(code=KILLED.format(partial=str(out / "_partial"), convert=step))
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "_partial"}
    assert after == before
    assert load_draft(out).config.hidden_size == load_draft(TINY / "draft").config.hidden_size


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_converted(value, tmp_path):
    draft = tiny.draft(tiny.target("qwen3"))
    draft.norm.weight.data[1] = value
    draft.save_pretrained(tmp_path / "from")
    for convert_or_plan in (
        lambda: convert(tmp_path / "from", tmp_path / "to"),
        lambda: plan_conversion(tmp_path / "from"),
    ):
        with pytest.raises(ValueError, match="NaN or infinite: norm"):
            convert_or_plan()
    assert not (tmp_path / "to").exists()
