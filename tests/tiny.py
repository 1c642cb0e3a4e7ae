"""Tiny random targets and drafts of real architectures, made so that their text is not one token over and over."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dflash_hub import DFlashConfig, DFlashDraftModel

VOCAB = 12
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES = {
    "qwen3": {},
    "llama": {},
    "qwen3_moe": MOE,
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
}


def target(family: str, seed: int = 0):
    """A target in float32; its weights are scaled up so that context matters and its text varies.

    Gemma scales its embeddings itself.
    """
    extra = dict(FAMILIES[family])
    config = AutoConfig.for_model(extra.pop("model_type", family), **(SMALL | extra))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scales = {"embed": 10 if "gemma" in family else 50, "lm_head": 5, "": 30}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(next(scale for part, scale in scales.items() if part in name))
    model.generation_config.eos_token_id = None
    return model


def draft(model, seed: int = 1, **fields):
    """A random draft for `model`. Its mask token is an ordinary token of the vocabulary, so it is generated too."""
    text = model.config.get_text_config(decoder=True)
    shape = {
        "block_size": 5,
        "mask_token_id": 3,
        "target_layer_ids": [0, 2],
        "num_target_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(seed)
    model = DFlashDraftModel(DFlashConfig(**(shape | fields))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
    return model


def prompt(length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The target's own greedy text."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
