# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List the architectures of every family of targets that the registry knows.

`TESTED` in `families_dflash.py` lists the families that the tests decode. It travels; this table does not.
"""

FAMILIES: dict[str, tuple[str, ...]] = {
    "beam": ("BeamForCausalLM",),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "KimiK25ForConditionalGeneration",
        "Kimi_K25ForConditionalGeneration",
    ),
    "deepseek_v4": ("DeepseekV4ForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    "gemma4_text": ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    "gemma4_unified_text": ("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    "glm4_moe": ("Glm4MoeForCausalLM",),
    "glm5_next_text": ("Glm5NextForConditionalGeneration",),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM",),
    "gpt_oss": ("GptOssForCausalLM",),
    "hy_v3": ("HYV3ForCausalLM",),
    "inkling_text": ("InklingForCausalLM", "InklingForConditionalGeneration"),
    "kimi_linear": ("KimiK3ForConditionalGeneration", "KimiLinearForCausalLM"),
    "laguna": ("LagunaForCausalLM",),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2VlForConditionalGeneration"),
    "llama": (
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLHybridForConditionalGeneration",
        "GlmAsrForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "JanusForConditionalGeneration",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "OmniASRForConditionalGeneration",
        "PerceptionLMForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "VideoLlavaForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
        "VoxtralForConditionalGeneration",
    ),
    "mellum": ("MellumForCausalLM",),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM",),
    "minimax_m2": ("MiniMaxM2ForCausalLM",),
    "mistral": (
        "Idefics2ForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
    ),
    "mistral4": ("Mistral4ForCausalLM",),
    "muse_glimmer_text": ("MuseGlimmerForConditionalGeneration",),
    "nemotron_h": (
        "Nemotron3_5TranscribeForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronH_Omni_Reasoning_V3",
    ),
    "qwen2": (
        "FastVlmForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Ovis2ForConditionalGeneration",
        "Qwen2AudioForConditionalGeneration",
        "Qwen2ForCausalLM",
        "VibeVoiceAsrForConditionalGeneration",
        "VideoLlama3ForConditionalGeneration",
    ),
    "qwen3": (
        "FunAsrNanoForConditionalGeneration",
        "LightOnOcrForConditionalGeneration",
        "MossTranscribeDiarizeForConditionalGeneration",
        "QianfanOCRForConditionalGeneration",
        "Qwen3ASRForConditionalGeneration",
        "Qwen3ForCausalLM",
    ),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5_text": (
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "qwen3_next": ("Qwen3NextForCausalLM",),
    "sarvam_mla": ("DeepseekV3ForCausalLM", "SarvamMLAForCausalLM"),
    "sarvam_moe": ("Glm4MoeForCausalLM", "SarvamMoEForCausalLM"),
    "step3p5": ("Step3p7ForConditionalGeneration",),
}
"""Text model type -> the architectures (class names of whole models) whose text part it is."""


def families_of(architecture: str) -> frozenset[str]:
    """Return the text model types of whole models of this class; an empty set if the table does not list it."""
    return frozenset(family for family, members in FAMILIES.items() if architecture in members)


def siblings_of(architecture: str) -> tuple[str, ...]:
    """Return the architectures with the same text part, this one first."""
    members = (name for family in sorted(families_of(architecture)) for name in FAMILIES[family])
    return tuple(dict.fromkeys([architecture, *members]))
