"""Tiny checkpoints of the real architectures that targets of the catalogue have, composite configs whole."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

import tiny

TEXT = tiny.SMALL | {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
DELTA = tiny.DELTA | {"layer_types": ["linear_attention", "full_attention"]}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = ROUTED | {"shared_expert_intermediate_size": 16}
LATENT = tiny.FAMILIES["deepseek_v3"] | {"num_key_value_heads": 2}
INDEXED = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
COMPRESSED = {
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["moe", "moe"],
    "head_dim": 16,
    "num_key_value_heads": 1,
    "q_lora_rank": 8,
    "o_groups": 1,
    "o_lora_rank": 8,
    "n_routed_experts": 4,
}
NO_ROTARY = {
    "head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "hc_mult": 2,
    "index_kpool": 2,
}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4}
QWEN_EYES = {"num_heads": 2, "depth": 1, "out_hidden_size": 16, "num_position_embeddings": 16}
QWEN_EYES |= {key: EYES[key] for key in ("hidden_size", "intermediate_size", "patch_size")}
STEP = {"model_type": "step3p5", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STEP |= SLIDING | {"share_expert_dim": 16, "mlp_layer_types": ["dense", "sparse"]}
STEP_EYES = {"width": 16, "layers": 1, "heads": 2, "patch_size": 4, "image_size": 16}
GLM_EYES = QWEN_EYES | {"image_size": 16, "projection_intermediate_size": 16}

# Architecture -> model type, fields of its text part, fields of its vision part; None where its config has no parts.
ARCHITECTURES: dict[str, tuple[str, dict, dict | None]] = {
    "Qwen3ForCausalLM": ("qwen3", {}, None),
    "Qwen3MoeForCausalLM": ("qwen3_moe", ROUTED, None),
    "Qwen3NextForCausalLM": ("qwen3_next", DELTA | SHARED, None),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", DELTA, QWEN_EYES),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", DELTA | SHARED, QWEN_EYES),
    "LlamaForCausalLM": ("llama", {}, None),
    "GptOssForCausalLM": ("gpt_oss", tiny.FAMILIES["gpt_oss"] | SLIDING, None),
    "Gemma4ForConditionalGeneration": (
        "gemma4",
        tiny.FAMILIES["gemma4_text"] | SLIDING,
        EYES | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
    ),
    "Gemma4UnifiedForConditionalGeneration": ("gemma4_unified", tiny.FAMILIES["gemma4_unified_text"] | SLIDING, {}),
    "MiniMaxM2ForCausalLM": ("minimax_m2", tiny.FAMILIES["minimax_m2"], None),
    "KimiK25ForConditionalGeneration": ("kimi_k25", LATENT | {"model_type": "deepseek_v3"}, EYES),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", LATENT | INDEXED, None),
    "Glm5NextForConditionalGeneration": ("glm5_next", LATENT | INDEXED | NO_ROTARY, GLM_EYES),
    "MuseGlimmerForConditionalGeneration": ("muse_glimmer", SLIDING, EYES),
    "HYV3ForCausalLM": ("hy_v3", ROUTED, None),
    "NemotronHForCausalLM": ("nemotron_h", tiny.FAMILIES["nemotron_h"], None),
    "LagunaForCausalLM": ("laguna", SHARED, None),
    "BeamForCausalLM": ("beam", ROUTED | SLIDING | {"n_group": 1, "topk_group": 1}, None),
    "MellumForCausalLM": ("mellum", {"num_local_experts": 4} | ROUTED, None),
    "Step3p7ForConditionalGeneration": ("step3p7", STEP, STEP_EYES),
    "DeepseekV4ForCausalLM": ("deepseek_v4", ROUTED | INDEXED | COMPRESSED, None),
}
NOT_BUILT = {"KimiK3ForConditionalGeneration", "InklingForConditionalGeneration"}
"""Architectures that transformers does not know, or builds only with packages that the tests do not install."""


def config_of(architecture: str):
    """A tiny config of the class that checkpoints of an architecture have on the Hub."""
    model_type, text, vision = ARCHITECTURES[architecture]
    if vision is None:
        return AutoConfig.for_model(model_type, **(TEXT | text))
    text = {"model_type": f"{model_type}_text"} | TEXT | text
    whole = {"projector_hidden_size": 16} if model_type == "muse_glimmer" else {}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision or None, **whole)


def save(architecture: str, folder) -> None:
    """Write a tiny checkpoint of an architecture, as it would lie on the Hub."""
    config = config_of(architecture)
    auto = AutoModelForCausalLM if ARCHITECTURES[architecture][2] is None else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
