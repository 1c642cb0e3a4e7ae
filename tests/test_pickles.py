"""Pickles become safetensors, and no code in them runs."""

import os

import pytest
import torch
from safetensors import safe_open

from dflash_hub.publishing.pickles import convert_pickle, pickles_in

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
