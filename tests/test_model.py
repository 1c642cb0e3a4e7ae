"""The draft's forward against the original implementations, and against attention written out in this file."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

import tiny
from dflash_hub import DFlashConfig, DFlashDraftModel, load_draft
from dflash_hub.cache_dflash import rewindable_cache
from dflash_hub.modeling_dflash import (
    DFlashRMSNorm,
    DFlashRotaryEmbedding,
    Qwen3DFlashDraftModel,
    rotate,
    visible_keys,
)
from paths import DATA, TINY

FULL, SLIDING = "full_attention", "sliding_attention"
GOLDEN = ("qwen3-full", "qwen3-sliding")


def golden(name: str):
    return load_file(DATA / "golden" / name / "golden.safetensors"), DATA / "golden" / name


def inputs(draft, context: int, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, draft.config.block_size, draft.config.hidden_size, generator=generator)
    return noise, torch.randn(1, context, draft.config.fc_width, generator=generator)


def small(**fields):
    """A draft of its own; embeddings and head come from nowhere, so it needs no target."""
    return tiny.draft(tiny.target("qwen3"), **fields)


@pytest.mark.quick
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*GOLDEN, "dflash2", "dspark-a", "dspark-b", "dspark-rank0", "domino-a", "domino-b"])
@torch.no_grad()
def test_hidden_states_agree_with_the_original_code_without_and_with_cache(name, attention):
    data, home = golden(name)
    draft = load_draft(home / "draft", attn_implementation=attention)
    noise, context = data["noise_embeds"], data["context_features"]
    plain = draft(noise, context, position_ids=data["position_ids"]).last_hidden_state
    torch.testing.assert_close(plain, data["hidden"], atol=2e-5, rtol=0)

    cache, half = rewindable_cache(draft.config), context.shape[1] // 2
    draft(noise, context[:, :half], past_key_values=cache)
    cache.crop(-noise.shape[1])
    cached = draft(noise, context[:, half:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(cached, data["hidden_cached"], atol=2e-5, rtol=0)


def reference_mask(
    context: int, block: int, window: int | None, causal: bool, from_anchor: bool = False
) -> torch.Tensor:
    """Which keys a block after `context` tokens sees, spelled out key by key: `[block, context + block]`."""
    rows = []
    for query in range(context, context + block):
        near = [window is None or abs(query - key) < window for key in range(context + block)]
        if from_anchor:
            near = [window is None or key >= context - window for key in range(context + block)]
        rows.append([ok and not (causal and key > query) for key, ok in enumerate(near)])
    return torch.tensor(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 30])
def test_a_query_sees_keys_at_a_distance_strictly_below_the_window(window, causal):
    block = torch.arange(11, 16)[None]
    seen = visible_keys(block, 16, window, causal)[0]
    assert torch.equal(seen, reference_mask(11, 5, window, causal))


LAYERS = [
    {"layer_types": [FULL, FULL], "is_causal": False},
    {"layer_types": [FULL, FULL], "is_causal": True},
    {"layer_types": [SLIDING, SLIDING], "sliding_window": 4, "is_causal": False},
    {"layer_types": [SLIDING, FULL], "sliding_window": 4},
    {"layer_types": [SLIDING, SLIDING], "sliding_window": 40, "is_causal": False},
    {"layer_types": [FULL, SLIDING], "sliding_window": 6, "is_causal": [True, False]},
    {"layer_types": [SLIDING, SLIDING], "sliding_window": 4, "is_causal": False, "window_from_anchor": True},
    {"layer_types": [SLIDING, FULL], "sliding_window": 2, "window_from_anchor": True},
]


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@torch.no_grad()
def test_each_layers_attention_is_the_one_its_config_asks_for(layers):
    """Masks built by the model against masks spelled out here, per layer, through the eager kernel."""
    draft = small(**layers)
    noise, context = inputs(draft, 11)
    config = draft.config
    masks = []
    for layer_type, causal in zip(config.layer_types, config.causal_layers, strict=True):
        window = config.sliding_window if layer_type == SLIDING else None
        visible = reference_mask(11, 5, window, causal, config.window_from_anchor)
        masks.append(torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None])
    reference = copy.deepcopy(draft)
    reference.set_attn_implementation("eager")
    for layer, mask in zip(reference.layers, masks, strict=True):
        force = layer.forward
        layer.forward = lambda *args, force=force, mask=mask, **kwargs: force(
            *args, **(kwargs | {"attention_mask": mask})
        )
    expected = reference(noise, context).last_hidden_state
    for attention in ("eager", "sdpa"):
        draft.set_attn_implementation(attention)
        torch.testing.assert_close(draft(noise, context).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@torch.no_grad()
def test_context_fed_in_pieces_through_a_cache_gives_what_one_call_gives(layers):
    draft = small(**layers)
    noise, context = inputs(draft, 23)
    expected = draft(noise, context).last_hidden_state
    cache, start = rewindable_cache(draft.config), 0
    for piece in (9, 1, 6, 2, 5, 0):
        hidden = draft(noise, context[:, start : start + piece], past_key_values=cache).last_hidden_state
        cache.crop(-noise.shape[1])
        start += piece
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    draft = small(layer_types=[SLIDING, FULL], sliding_window=6)
    noise, context = inputs(draft, 7)
    junk = torch.full((1, 4, context.shape[-1]), 9.0)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 12)], dim=1).long()
    positions = (torch.arange(16)[None] - 4).clamp(min=0)
    padded = draft(noise, torch.cat([junk, context], dim=1), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded.last_hidden_state, draft(noise, context).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [layers for layers in LAYERS if "window_from_anchor" not in layers], ids=str)
def test_flash_attention_is_called_with_what_says_the_same(layers, monkeypatch):
    """The kernels need a GPU. What reaches them here is answered by their documented semantics, written out."""
    from transformers import AttentionInterface

    draft = small(**layers)
    noise, context = inputs(draft, 11)
    expected = draft(noise, context).last_hidden_state

    def flash(module, query, key, value, attention_mask, sliding_window=None, scaling=None, **kwargs):
        """Keys end with the queries; causal hides later keys; a window of W reaches W - 1 to each side."""
        assert attention_mask is None
        assert "position_ids" not in kwargs
        visible = reference_mask(key.shape[2] - query.shape[2], query.shape[2], sliding_window, module.is_causal)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register("flash_written_out", flash)
    draft.config._attn_implementation = "flash_written_out"
    torch.testing.assert_close(draft(noise, context).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_flash_attention_refuses_a_window_that_is_counted_from_the_anchor():
    draft = small(**LAYERS[-1])
    draft.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"window_from_anchor is True.*attn_implementation='sdpa'"):
        draft(*inputs(draft, 11))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and flash-attn; runs where both are")
@torch.no_grad()
def test_flash_attention_agrees_with_sdpa_on_a_gpu():
    pytest.importorskip("flash_attn")
    draft = small(layer_types=[SLIDING, FULL], sliding_window=6).to("cuda", torch.bfloat16)
    noise, context = (tensor.to("cuda", torch.bfloat16) for tensor in inputs(draft, 11))
    expected = draft(noise, context).last_hidden_state
    draft.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(draft(noise, context).last_hidden_state, expected, atol=3e-2, rtol=3e-2)


def no_further(ours, theirs, exact):
    """Whether our numbers are, on average, as near to the exact ones as transformers', in the same dtype."""
    assert ours.dtype == theirs.dtype
    ours, theirs = (states.double().sub(exact).square().mean() for states in (ours, theirs))
    return ours <= 1.05 * theirs + 1e-12


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_norm_is_as_precise_as_qwen3s_and_gives_its_dtype(dtype, weight):
    torch.manual_seed(0)
    ours, theirs, states = DFlashRMSNorm(64), Qwen3RMSNorm(64), torch.randn(50, 64).mul(9).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(-1, 2, 64).to(weight)
    exact = states.double() * (states.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * theirs.weight.double()
    assert no_further(ours(states), theirs(states), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_rotation_is_as_precise_as_transformers_own(dtype):
    torch.manual_seed(0)
    config, positions = small().config, torch.tensor([[5, 6, 40]])
    embedding, states = DFlashRotaryEmbedding(config), torch.randn(1, 4, 3, config.head_dim)
    ours = rotate(states.to(dtype), *embedding(states.to(dtype), positions))
    theirs, _ = apply_rotary_pos_emb(
        states.to(dtype), states.to(dtype), *Qwen3RotaryEmbedding(config)(states.to(dtype), positions)
    )
    angles = positions[..., None] * embedding.inv_freq.double()
    first, second = states.to(dtype).double().chunk(2, dim=-1)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    assert no_further(ours, theirs, torch.cat(turned, dim=-1))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "yarn", "factor": 4.0}])
def test_rotary_frequencies_stay_float32_and_exact_whatever_happens_to_the_model(rope, tmp_path):
    draft = small(rope_parameters=rope)
    exact = draft.rotary_emb.inv_freq.clone()
    draft.save_pretrained(tmp_path)
    meta = copy.deepcopy(draft).to("meta").to_empty(device="cpu")
    treated = {
        "to(bfloat16)": copy.deepcopy(draft).to(torch.bfloat16),
        "half()": copy.deepcopy(draft).half(),
        "bfloat16().float()": copy.deepcopy(draft).bfloat16().float(),
        "to(device)": copy.deepcopy(draft).to("cpu", torch.float16),
        "meta and back": meta,
        "from_pretrained(dtype)": DFlashDraftModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
    }
    for how, model in treated.items():
        for buffer in (model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq):
            assert buffer.dtype == torch.float32, how
            assert torch.equal(buffer, exact), how
    assert treated["to(bfloat16)"].fc.weight.dtype == torch.bfloat16


def test_it_has_no_embedding_and_no_head_and_only_the_published_tensors():
    draft = small()
    layer = {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"self_attn.{name}_norm.weight" for name in "qk"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    names = {f"layers.{index}.{name}" for index in range(2) for name in layer}
    assert set(draft.state_dict()) == names | {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert Qwen3DFlashDraftModel is DFlashDraftModel


def test_widths_and_lengths_that_do_not_fit_are_refused_with_both_numbers():
    draft = small()
    noise, context = inputs(draft, 6)
    with pytest.raises(ValueError, match=r"96 wide, but this draft's fc expects 64 \(2 taps x 32\)"):
        draft(noise, torch.cat([context, context[..., :32]], dim=-1))
    with pytest.raises(ValueError, match="16 wide, but this draft's hidden_size is 32"):
        draft(noise[..., :16], context)
    with pytest.raises(ValueError, match=r"covers 7 positions.*pass 11"):
        draft(noise, context, position_ids=torch.arange(7)[None])
    padded = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask covers 4 positions, but past, context and block are 11"):
        draft(noise, context, attention_mask=padded)


@torch.no_grad()
def test_the_muse_layouts_two_renamed_tensors_load_and_are_saved_under_our_names(tmp_path):
    draft = small(layer_types=[SLIDING, SLIDING], sliding_window=8, is_causal=False)
    muse = tmp_path / "muse"
    muse.mkdir()
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    weights = {renamed.get(name, name): weight.contiguous() for name, weight in draft.state_dict().items()}
    save_file(weights, muse / "model.safetensors", metadata={"format": "pt"})
    fields = draft.config.to_dict() | {"model_type": "muse_glimmer_assistant", "vocab_size": None}
    fields |= {"architectures": ["MuseGlimmerAssistantModel"], "is_causal": None}
    import json

    (muse / "config.json").write_text(json.dumps(fields))
    loaded = DFlashDraftModel.from_pretrained(muse)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in draft.state_dict().items())
    loaded.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(draft.state_dict())


@torch.no_grad()
def test_transformers_own_muse_assistant_computes_the_same():
    from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    draft = small(layer_types=[FULL, SLIDING], sliding_window=64, is_causal=False)
    config = draft.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "rms_norm_eps", "rope_parameters", "sliding_window", "layer_types", "target_layer_ids")
    native = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**{name: getattr(config, name) for name in names}))
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    native.load_state_dict({renamed.get(name, name): weight for name, weight in draft.state_dict().items()})
    noise, context = inputs(draft, 11)
    expected = native.eval()(noise, context).last_hidden_state
    torch.testing.assert_close(draft(noise, context).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.weight"), r"lacks tensors, which would be random: fc.weight"),
        (lambda w: w.update({"fc.weight": torch.zeros(32, 96)}), r"fc.weight: \(32, 96\) in the file, \(32, 64\) here"),
    ],
)
def test_a_checkpoint_that_would_load_and_be_wrong_is_refused(change, message, tmp_path):
    small().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DFlashDraftModel.from_pretrained(tmp_path)


def test_a_shipped_embedding_is_loaded_although_the_config_does_not_name_it(tmp_path):
    draft = small()
    draft.save_pretrained(tmp_path)
    embedding = torch.randn(draft.config.vocab_size or 10, 32)
    weights = load_file(tmp_path / "model.safetensors") | {"embed_tokens.weight": embedding}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = DFlashDraftModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.fc.weight, draft.fc.weight)
    assert loaded.config.has_own_embed_tokens
    assert torch.equal(loaded.embed_tokens.weight, embedding)


def test_pickled_weights_are_never_read(tmp_path):
    small().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DFlashDraftModel.from_pretrained(tmp_path)


def test_a_config_alone_builds_a_draft():
    config = DFlashConfig.from_pretrained(TINY / "draft")
    assert DFlashDraftModel(config).num_parameters() == 443_264


def test_gradients_reach_every_parameter():
    draft = small(layer_types=[SLIDING, FULL], sliding_window=6).train()
    noise, context = inputs(draft, 9)
    draft(noise, context).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in draft.parameters())
