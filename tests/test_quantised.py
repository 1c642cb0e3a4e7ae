"""Drafts with quantised weights: made by the real libraries, loaded by transformers, and exact like any draft."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, TorchAoConfig

import tiny
from dflash_hub import DFlashDraftModel, load_draft
from dflash_hub.compat_dflash import dequantises
from dflash_hub.weights_dflash import check_quantization

pytestmark = pytest.mark.filterwarnings("ignore")
EIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FOUR = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
FLOAT = EIGHT | {"type": "float"}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MXFP8 = FLOAT | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
# Format of compressed-tensors -> its arguments, the largest error of a weight by the largest of its tensor, the draft.
FORMATS = {
    "pack-quantized": (EIGHT | {"strategy": "group", "group_size": 16}, 0.01, {}),
    "pack-quantized, 4 bits": (FOUR, 0.1, tiny.SECOND),
    "int-quantized": (EIGHT, 0.01, tiny.DOMINO),
    "float-quantized": (FLOAT, 0.05, tiny.DSPARK),
    "nvfp4-pack-quantized": (NVFP4, 0.2, {}),
    "mxfp8-quantized": (MXFP8, 0.07, {}),
}


@pytest.fixture(scope="module")
def target():
    return tiny.target("qwen3")


@pytest.fixture
def draft(target):
    return tiny.draft(target)


def is_exact(target, draft) -> bool:
    ids = tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "do_sample": False}
    return torch.equal(target.generate(ids, **asked, custom_generate=draft.speculate), tiny.greedy(target, ids, 14))


def error_of(loaded, draft) -> float:
    """The largest error of a weight of `loaded`, by the largest weight of its tensor."""
    errors = [0.0]
    for name, weight in draft.named_parameters():
        errors.append(float((loaded.get_parameter(name) - weight).abs().max() / weight.abs().max()))
    return max(errors)


def describe(folder, quantization: dict) -> None:
    """Write a `quantization_config` into the config.json of a draft."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": quantization}))


def compress(draft, folder, fmt: str, arguments: dict) -> None:
    """Save a draft as compressed-tensors packs it: its linear layers, but for a selector."""
    pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed; pip install 'dflash-hub[quantised]'"
    )
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as prepare
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=fmt)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=fmt, ignore=["re:.*selector.*"], quantization_status="compressed"
    )
    draft.config.save_pretrained(folder)
    prepare(draft, config)
    for module in draft.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.data.unflatten(-1, (-1, args.group_size or module.weight.shape[-1]))
            more = {}
            if args.strategy == "tensor_group":
                more["global_scale"] = generate_gparam(groups.min()[None], groups.max()[None])
                module.weight_global_scale.data.copy_(more["global_scale"])
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, **more)
            module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(draft)
    weights = {name: tensor.contiguous() for name, tensor in draft.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(str(folder))


def is_saved_in_floats(loaded, folder) -> bool:
    loaded.save_pretrained(folder)
    stored = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    described = "quantization_config" in json.loads((folder / "config.json").read_text())
    return stored == {torch.float32} and not described and error_of(load_draft(folder), loaded) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_what_compressed_tensors_packed_is_loaded_in_floats(name, target, tmp_path):
    if not dequantises("compressed-tensors"):
        pytest.skip("this transformers leaves the scales beside the floats; 5.24 runs this")
    arguments, bound, kind = FORMATS[name]
    original = tiny.draft(target, **kind)
    compress(tiny.draft(target, **kind), tmp_path, name.partition(",")[0], arguments)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("weight_scale" in key for key in stored)
    loaded = load_draft(tmp_path)
    assert 0 < error_of(loaded, original) < bound
    assert is_exact(target, loaded)
    assert is_saved_in_floats(loaded, tmp_path / "again")


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 with one scale in float32."""
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)


def in_microblocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in MXFP8: an exponent for 32 values."""
    groups = weight.unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 448))
    scaled = groups / 2 ** exponents[..., None]
    return scaled.flatten(-2).to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)


@pytest.mark.parametrize(
    ("quantise", "config"),
    [
        (in_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
        (in_microblocks, {"quant_method": "mxfp8"}),
    ],
    ids=["fp8", "mxfp8"],
)
def test_what_is_stored_in_eight_bit_floats_is_loaded_in_floats(quantise, config, draft, target, tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate; pip install 'dflash-hub[train]'")
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for key in [key for key, weight in weights.items() if weight.ndim == 2]:
        weights[key], weights[key.replace(".weight", ".weight_scale_inv")] = quantise(weights[key])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    describe(tmp_path, config)
    loaded = DFlashDraftModel.from_pretrained(tmp_path)
    assert 0 < error_of(loaded, draft) < 0.07
    assert is_exact(target, loaded)
    assert is_saved_in_floats(loaded, tmp_path / "again")


def torchao() -> TorchAoConfig:
    reason = "torchao is not installed; pip install 'dflash-hub[int8]'"
    return TorchAoConfig(pytest.importorskip("torchao.quantization", reason=reason).Int8WeightOnlyConfig())


def bitsandbytes() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; pip install 'dflash-hub[quantised]'")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(torchao, {}), (torchao, tiny.DOMINO), (bitsandbytes, tiny.DSPARK)],
    ids=["torchao", "torchao, Domino", "bitsandbytes, DSpark"],
)
def test_a_draft_that_is_quantised_at_loading_decodes_stays_quantised_and_is_saved_so(config, kind, target, tmp_path):
    tiny.draft(target, **kind).save_pretrained(tmp_path)
    loaded = load_draft(tmp_path, quantization_config=config())
    assert is_exact(target, loaded)
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.int8 in {tensor.dtype for tensor in stored.values()}
    assert is_exact(target, load_draft(tmp_path / "again"))


def test_a_package_that_is_missing_is_named_with_what_to_do(draft, monkeypatch, tmp_path):
    from transformers.quantizers import quantizer_bnb_8bit

    draft.save_pretrained(tmp_path)
    monkeypatch.setattr(quantizer_bnb_8bit, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"(?s)could not be loaded: .*pip install.*bitsandbytes.*Install what is"):
        load_draft(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_draft_in_four_bits_of_bitsandbytes_decodes_and_is_loaded_again(monkeypatch, tmp_path):
    """Its blocks of 64 need wider layers than the other tests have."""
    bitsandbytes()
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    for name, value in wide.items():
        monkeypatch.setitem(tiny.SMALL, name, value)
    target = tiny.target("qwen3")
    tiny.draft(target, num_key_value_heads=4, **wide).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    DFlashDraftModel.from_pretrained(tmp_path, quantization_config=config).save_pretrained(tmp_path / "again")
    loaded = DFlashDraftModel.from_pretrained(tmp_path / "again")
    assert type(loaded.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert is_exact(target, loaded)


MIXED = {name: {"targets": [name], "weights": weights} for name, weights in (("a", EIGHT), ("b", FLOAT))}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, r"\(modelopt NVFP4\).*has no loader"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\(modelopt NVFP4\).*has no loader"),
        ({"quant_method": "exl3", "bits": 4}, r"\(exl3\).*has no loader"),
        ({"bits": 4}, r"\(\{'bits': 4\}\).*has no loader"),
        (
            {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": MIXED},
            r"\(compressed-tensors mixed-precision\).*(dequantises one of its config_groups|upgrade it)",
        ),
    ],
)
def test_formats_that_transformers_cannot_load_are_refused_by_name(config, message, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["fc.weight"] = weights["fc.weight"].to(torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    describe(tmp_path, config)
    with pytest.raises(ValueError, match=f"{tmp_path} are quantised {message}.*plain floats"):
        load_draft(tmp_path)


def test_other_formats_are_left_to_transformers(draft):
    for config in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "torchao", "quant_type": {}}):
        draft.config.quantization_config = config
        assert check_quantization(draft.config, "me/draft") is draft.config
