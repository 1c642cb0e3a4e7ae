"""Pickles become safetensors, and no code in them runs."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tiny
from dflash_hub import load_draft
from dflash_hub.publishing.pickles import convert_pickle, pickles_in, without_pickles

VECTOR = torch.arange(8, dtype=torch.bfloat16)


class Command:
    """An object whose pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def converted(path) -> tuple[dict, dict]:
    """The tensors and the metadata of the file that a pickle becomes."""
    new = convert_pickle(path)
    with safe_open(new, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    "content",
    [
        VECTOR,
        VECTOR[None],
        {"mask_embedding": VECTOR},
        {"mask_token_id": 7, "embedding": VECTOR},
        {"embedding": VECTOR[None], "mask_token_id": 7},
        {"weight": torch.nn.Parameter(VECTOR)},
    ],
)
def test_every_published_form_of_a_mask_embedding_becomes_one_named_vector(tmp_path, content):
    torch.save(content, tmp_path / "mask_embedding.pt")
    tensors, metadata = converted(tmp_path / "mask_embedding.pt")
    assert list(tensors) == ["mask_embedding"]
    assert torch.equal(tensors["mask_embedding"], VECTOR)
    assert metadata.get("mask_token_id") == ("7" if len(content) == 2 else None)
    assert (tmp_path / "mask_embedding.pt").exists()


def test_weights_keep_their_names_and_nested_ones_get_dots(tmp_path):
    shared = torch.randn(2, 3)
    torch.save({"fc": {"weight": shared, "same": shared.T}, "step": 3}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(VECTOR, tmp_path / "optimizer.pt")
    assert [path.name for path in pickles_in(tmp_path)] == ["pytorch_model-00001-of-00002.bin"]
    tensors, metadata = converted(tmp_path / "pytorch_model-00001-of-00002.bin")
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
    assert torch.equal(tensors["fc.weight"], shared)
    assert torch.equal(tensors["fc.same"], shared.T)
    assert metadata == {"step": "3", "format": "pt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mask_embedding.pt", torch.zeros(2, 8), r"must hold one vector.*a tensor of shape \(2, 8\)"),
        ("mask_embedding.pt", {"mask_token_id": 7}, "must hold one vector.*mask_token_id, a int"),
        ("mask_embedding.pt", "none", "must hold one vector.*mask_embedding, a str"),
        ("pytorch_model.bin", [VECTOR], "must hold a dict of tensors; it holds a list"),
        ("pytorch_model.bin", {"list": [VECTOR]}, "holds list, a list; only tensors"),
        ("pytorch_model.bin", {"step": 3}, "holds no tensors"),
        ("pytorch_model.bin", {"fc": Command()}, "which could run code"),
    ],
)
def test_what_is_no_pickle_of_tensors_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        convert_pickle(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_damaged_and_existing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*none\.pt"):
        convert_pickle(tmp_path / "none.pt")
    for number, content in enumerate((b"", b"no pickle", b"PK\x03\x04")):
        path = tmp_path / f"damaged{number}.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            convert_pickle(path)
    torch.save(VECTOR, tmp_path / "mask_embedding.pt")
    convert_pickle(tmp_path / "mask_embedding.pt")
    with pytest.raises(ValueError, match=r"mask_embedding.safetensors exists, so mask_embedding.pt was not"):
        convert_pickle(tmp_path / "mask_embedding.pt")


@pytest.mark.parametrize(
    ("fields", "pickled"),
    [({}, "all"), (tiny.SECOND | {"input_embedding_scale": 2.0}, "mask embedding")],
    ids=["DFlash", "DFlash 2"],
)
def test_a_draft_in_pickles_is_refused_with_the_command_and_its_copy_computes_with_its_mask_embedding(
    tmp_path, fields, pickled
):
    target = tiny.target("qwen3")
    draft, vector = tiny.draft(target, **fields), torch.randn(32)
    draft.save_pretrained(tmp_path)
    torch.save(vector, tmp_path / "mask_embedding.pt")
    torch.save({"step": 3}, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match=rf"\(mask_embedding\.pt\).*dflash-hub convert {tmp_path} NEW_FOLDER"):
        load_draft(tmp_path)
    if pickled == "all":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    staged = tmp_path / "staged"
    staged.mkdir()
    loaded = load_draft(without_pickles(tmp_path, staged))
    assert loaded.config.has_own_mask_embedding
    loaded.save_pretrained(tmp_path / "again")
    again = load_draft(tmp_path / "again")
    assert torch.equal(again.mask_embedding, vector)
    with pytest.raises(ValueError, match=r"mask_embedding\.pt, which is not written"):
        again.save_pretrained(tmp_path / "engines", layout="engines")
    mask = draft.config.mask_token_id
    ids = torch.tensor([[mask, *[mask] * 4]])  # an anchor of this id keeps the target's embedding
    noise, context = target.get_input_embeddings()(ids), torch.randn(1, 7, 64)
    replaced = noise.clone()
    replaced[:, 1:] = vector
    with torch.no_grad():
        expected = draft(replaced, context).last_hidden_state
        assert torch.equal(again(noise, context).last_hidden_state, expected)
        assert not torch.equal(draft(noise, context).last_hidden_state, expected)
    prompt = tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
    text = target.generate(prompt, **asked, custom_generate=again.speculate)
    assert torch.equal(text, tiny.greedy(target, prompt, 16))


def test_weights_in_pickles_alone_are_refused_with_the_command(tmp_path):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no model\.safetensors.*\(pytorch_model\.bin\).*dflash-hub convert"):
        load_draft(tmp_path)
