"""Drafts made to do harm, or worth nothing: refused by name, at once, and before they take memory."""

import json
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from dflash_hub import DFlashConfig, DFlashDraftModel, load_draft
from dflash_hub.weights_dflash import shards_in


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a draft in each layout."""
    home, draft = tmp_path_factory.mktemp("saved"), tiny.draft(tiny.target("qwen3"))
    for layout in ("hub", "engines"):
        draft.save_pretrained(home / layout, layout=layout)
    return home


@pytest.fixture(params=["hub", "engines"])
def folder(request, saved, tmp_path):
    """A draft's folder of the test's own."""
    return shutil.copytree(saved / request.param, tmp_path, dirs_exist_ok=True)


IN_ONE_LAYOUT = pytest.mark.parametrize("folder", ["hub"], indirect=True)
"""For weights, which are stored alike in both."""


def edit_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    content.update(fields)
    for name in set(content.get("dflash_config") or {}) & set(fields):
        content["dflash_config"][name] = fields[name]
    (folder / "config.json").write_text(json.dumps(content))


NUMBERS = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 200, "layer_types": ["full_attention"] * 200},
    {"block_size": 10**9},
    {"vocab_size": 10**12},
    {"hidden_size": 10**9},
    {"hidden_size": 2**20},
    {"intermediate_size": 2**20},
    {"head_dim": 2**14},
    {"num_attention_heads": 4096, "num_key_value_heads": 4096},
    {"target_hidden_size": 2**20},
    {"max_position_embeddings": 10**18},
    {"target_layer_ids": list(range(10**5))},
    {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}, "rope_theta": float("inf")},
    {"rms_norm_eps": float("nan")},
    {"mask_token_id": -1},
]


@pytest.mark.parametrize("fields", NUMBERS, ids=lambda fields: " ".join(map(str, fields)))
def test_a_number_that_no_draft_has_is_refused_at_once_and_takes_no_memory(folder, fields):
    edit_config(folder, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(ValueError, match="|".join(("it must", "other shapes", "lacks tensors"))):
        load_draft(folder)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


CONTENTS = {
    "deep nesting": ('{"model_type": "dflash", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "too large to be read"),
    "a list": ("[1, 2]", "it must be a dict"),
    "null": ("null", "it must be a dict"),
    "an empty dict": ("{}", "it must be a dict"),
    "a number of a million digits": ('{"block_size": ' + "9" * 10**6 + "}", "too large to be read|it must be"),
}


@pytest.mark.parametrize(("content", "complaint"), CONTENTS.values(), ids=CONTENTS)
def test_a_file_that_holds_no_fields_is_refused(folder, content, complaint):
    (folder / "config.json").write_text(content)
    for load in (load_draft, DFlashConfig.from_pretrained):
        with pytest.raises(ValueError, match=complaint):
            load(folder)


@pytest.mark.parametrize("key", ["block_size", "rope_theta"])
def test_a_key_that_stands_twice_is_a_contradiction_where_the_values_differ(folder, key):
    text = (folder / "config.json").read_text()
    assert f'"{key}": ' in text
    (folder / "config.json").write_text(text.replace(f'"{key}": ', f'"{key}": 77, "{key}": '))
    with pytest.raises(ValueError, match=f"contradicts itself about {key}: it is 77 and, further down,"):
        load_draft(folder)
    (folder / "config.json").write_text(text.replace('"vocab_size": 12', '"vocab_size": 12, "vocab_size": 12'))
    load_draft(folder)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def with_fc(value):
    return lambda weights: weights | {"fc.weight": torch.full_like(weights["fc.weight"], value)}


VALUES = {
    "NaN": (with_fc(torch.nan), r"NaN or infinite: fc\.weight"),
    "infinite": (with_fc(torch.inf), r"NaN or infinite: fc\.weight"),
    "all zero": (
        lambda weights: {key: torch.zeros_like(one) for key, one in weights.items()},
        "All weights .* are zero",
    ),
    "integers": (lambda weights: {key: one.to(torch.int8) for key, one in weights.items()}, "that are no floats"),
    "one of integers": (
        lambda weights: weights | {"norm.weight": weights["norm.weight"].int()},
        r"norm\.weight \(I32\)",
    ),
    "another shape": (lambda weights: weights | {"fc.weight": torch.ones(3, 4)}, "other shapes"),
    "one missing": (lambda weights: {key: weights[key] for key in weights if key != "norm.weight"}, "lacks tensors"),
    "one more": (lambda weights: weights | {"head.weight": torch.ones(3)}, "does not know"),
}


@IN_ONE_LAYOUT
@pytest.mark.parametrize(("change", "complaint"), VALUES.values(), ids=VALUES)
def test_weights_that_are_worth_nothing_are_refused_by_name(folder, change, complaint):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=complaint):
        load_draft(folder)


def test_a_single_matrix_that_is_all_zero_is_named(folder, caplog):
    edit_weights(folder, with_fc(0.0))
    load_draft(folder)
    assert "weights that are all zero: fc.weight" in caplog.text


@IN_ONE_LAYOUT
@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3, "..", "a\\b.safetensors"],
)
def test_an_index_that_names_a_file_elsewhere_is_refused(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"fc.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a safetensors file beside it"):
        load_draft(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "{"])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="is no index of shards"):
        shards_in(tmp_path / "index.json")


def test_a_pickle_of_weights_is_not_opened(tmp_path):
    """Unpickling would create a file."""
    trace = tmp_path / "unpickled"

    class Bomb:
        def __reduce__(self):
            return open, (str(trace), "w")

    draft = tiny.draft(tiny.target("qwen3"))
    draft.config.save_pretrained(tmp_path)
    torch.save({"fc.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    for load in (load_draft, DFlashDraftModel.from_pretrained):
        with pytest.raises(OSError, match="safetensors"):
            load(tmp_path)
    assert not trace.exists()
