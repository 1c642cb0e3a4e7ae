"""Tiny random targets and drafts of real architectures, made so that their text is not one token over and over."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin

from dflash_hub.compat_dflash import cache_name
from dflash_hub.kinds import KINDS
from dflash_hub.layouts_dflash import BASE, DRAFT_LAYOUTS

DEVICE = torch.device(os.environ.get("DFLASH_TEST_DEVICE", "cpu"))
"""Where targets, drafts and prompts lie: `DFLASH_TEST_DEVICE=cuda` decodes on a GPU."""
VOCAB = 12
CACHE = cache_name(GenerationMixin.prepare_inputs_for_generation)
"""What the installed transformers calls a cache that is handed to `generate`."""
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
GROUPED = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
FAMILIES = {
    "qwen3": {},
    "llama": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": 12},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "gemma4_text": SLIDING
    | {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    "gemma4_text-shared": SLIDING
    | {
        "model_type": "gemma4_text",
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
    },
    "gemma4_unified_text": SLIDING | {"global_head_dim": 16},
    "gpt_oss": SLIDING
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
    "glm4_moe": GROUPED | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": GROUPED
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "qwen3_next": DELTA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba", "moe", "attention"],
        "num_hidden_layers": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": None,
        "chunk_size": 16,
    },
}

KINDS_OF_CACHE = {
    "qwen3": "full attention",
    "mistral": "windows in every layer",
    "gemma3_text": "windows in some layers, scaled embeddings",
    "gemma4_text-shared": "layers that share keys and values",
    "gpt_oss": "sinks and routed experts",
    "deepseek_v3": "latent heads",
    "qwen3_next": "linear attention, whose state is recurrent",
    "lfm2": "convolutions",
    "nemotron_h": "state space layers",
}
"""One family of each kind of cache or mask, for what depends on no more; `test_decode.py` decodes every family."""


# Where the usual scale or seed gives a text of few tokens, or chunked and stepwise state space models that differ.
SCALES = {"nemotron_h": 8, "minimax_m2": 12, "lfm2": 20}
SEEDS = {"minimax_m2": 2, "deepseek_v3": 1, "lfm2": 2}


def target(family: str, seed: int | None = None):
    """A target in float32; its weights are scaled up so that context matters and its text varies.

    Gemma scales its embeddings itself.
    """
    seed = SEEDS.get(family, 0) if seed is None else seed
    shape = SMALL | FAMILIES[family]
    return built_once(("target", family, seed, shape, SCALES), lambda: new_target(family, seed, shape))


BUILT: dict[str, tuple["Stored", torch.Tensor]] = {}
"""The models that were built, and the state of the generator of random numbers then."""


def built_once(key: tuple, build: Callable[[], Any]):
    """A copy of what `build` builds; random numbers go on as after the build."""
    name = repr(key)
    if name not in BUILT:
        BUILT[name] = (Stored(build()), torch.get_rng_state())
    stored, generator = BUILT[name]
    torch.set_rng_state(generator)
    return stored.copy()


class Writer(pickle.Pickler):
    """Pickles all but tensors, which it lists."""

    def __init__(self, file, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class Reader(pickle.Unpickler):
    """Reads what `Writer` wrote, with copies of the tensors; those that modules share are shared again."""

    def __init__(self, file, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, number):
        return copy.deepcopy(self.tensors[number], self.copies)


class Stored:
    """A pickled model, of which a copy is made in a sixth of the time of `deepcopy`."""

    def __init__(self, model):
        self.tensors: list[torch.Tensor] = []
        file = io.BytesIO()
        Writer(file, self.tensors).dump(model)
        self.content = file.getvalue()

    def copy(self):
        return Reader(io.BytesIO(self.content), self.tensors).load()


def new_target(family: str, seed: int, shape: dict):
    config = AutoConfig.for_model(shape.pop("model_type", family), **shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return scaled(model, family)


def scaled(model, family: str):
    """The model with its weights scaled up, those that see images apart, and without an end token."""
    scales = {"embed": 10 if "gemma" in family else 50, "lm_head": 5, "visual": 1, "vision": 1}
    scales[""] = SCALES.get(family, 30)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(next(scale for part, scale in scales.items() if part in name))
    model.generation_config.eos_token_id = None
    return model.to(DEVICE)


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_attention_heads": 2, "patch_size": 4}


def seeing(family: str, image: bool):
    """A target that takes images, and two prompts for it, with an image in each or without; the second is padded."""
    if family.startswith("qwen3_5"):
        vision = {"depth": 1, "out_hidden_size": 32, "spatial_merge_size": 2, "num_position_embeddings": 16}
        tokens = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 8, "vision_end_token_id": 9}
        text = SMALL | FAMILIES[f"{family}_text"] | {"model_type": f"{family}_text"}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
    elif family == "gemma4":
        vision = {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}
        vision["position_embedding_size"] = 16
        tokens = {"image_token_id": 10, "video_token_id": 11, "boi_token_id": 8, "eoi_token_id": 9}
        text = SMALL | FAMILIES["gemma4_text"] | {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}
    else:
        vision = {"image_size": 16, "num_hidden_layers": 1, "vision_use_head": False}
        tokens = {"image_token_id": 10, "image_token_index": 10, "boi_token_index": 8, "eoi_token_index": 9}
        tokens["mm_tokens_per_image"] = 4
        text = SMALL | FAMILIES["gemma3_text"] | {"model_type": "gemma3_text"}
    tokens["tie_word_embeddings"] = False
    config = AutoConfig.for_model(family, text_config=text, vision_config=VISION | vision, **tokens)
    torch.manual_seed(1)
    model = scaled(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), family)
    marks = [8, *[10] * 4, 9]  # an image: where it begins, its four tokens, where it ends
    words = torch.randint(0, 8, (2, 14), generator=torch.Generator().manual_seed(3)).tolist()
    ids = torch.tensor([line[:6] + (marks if image else []) + line[6:] for line in words])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :4] = 0
    if image and family.startswith("qwen3_5"):
        inputs["pixel_values"] = torch.randn(32, 3 * 2 * 4 * 4)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        inputs["mm_token_type_ids"] = (ids == 10).int()
    elif image and family == "gemma4":
        inputs["pixel_values"] = torch.rand(2, 16, 3 * 4 * 4)
        inputs["image_position_ids"] = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
        inputs["mm_token_type_ids"] = (ids == 10).int()
    elif image:
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
        inputs["token_type_ids"] = (ids == 10).long()
    return model, {name: value.to(DEVICE) for name, value in inputs.items()}


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
    return built_once(("draft", seed, shape | fields), lambda: new_draft(seed, shape, fields))


def shallow(**fields):
    """A target of two layers of full attention and a draft for it: enough where no kind of cache is at stake."""
    target = built_once(("shallow",), lambda: new_target("qwen3", 13, SMALL | {"num_hidden_layers": 2}))
    return target, draft(target, target_layer_ids=[0, 1], **fields)


def new_draft(seed: int, shape: dict, fields: dict):
    torch.manual_seed(seed)
    kind = KINDS[next((name for name, layout in DRAFT_LAYOUTS.items() if set(layout.own) & set(fields)), BASE)]
    model = kind.model_class(kind.config_class(**(shape | fields))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "conv" in name or "codebook" in name:  # fresh, they do nothing, and neither does the next
                weight.add_(0.3 * torch.randn_like(weight))
            elif "markov_w2" in name:
                weight.add_(3 * torch.randn_like(weight))
            else:
                weight.mul_(10 if weight.ndim > 1 else 1)
    return model.to(DEVICE)


SECOND = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 4}
"""What makes a draft a DFlash 2 draft."""
DSPARK = {"markov_rank": 8, "enable_confidence_head": True}
"""What makes a draft a DSpark draft."""
REDUCED = {"draft_vocab_size": 9}
"""What makes a draft know fewer tokens; `reduce` chooses them."""


def reduce(draft, known=(0, 1, 3, 4, 6, 7, 8, 10, 11)):
    """Let a draft with a reduced vocabulary know these of the target's tokens."""
    draft.d2t.copy_(torch.tensor(known) - torch.arange(len(known)))
    return draft


DOMINO = {"emb_dim": 12, "gru_hidden_dim": 10, "pure_draft_prefix_len": 1, "sample_from_anchor": True}
"""What makes a draft a Domino draft."""


def prompt(length: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (1, length), generator=generator).to(DEVICE)


def greedy(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The target's own greedy text."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)


def batch(length: int, pads: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Four left-padded prompts."""
    ids = torch.cat([prompt(length, seed=seed) for seed in range(len(pads))])
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Steered:
    """A proposer that lets another one run, and then proposes what `change` makes of its proposal.

    Args:
        change: of a proposal and a `DecodeState`, to a proposal.
    """

    def __init__(self, chain, change):
        self.chain, self.change = chain, change

    def append_context(self, features, first_slot):
        self.chain.append_context(features, first_slot)

    def propose(self, state):
        return self.change(self.chain.propose(state), state)

    def commit(self, features, slots):
        self.chain.commit(features, slots)


def steered(change):
    """The keyword `proposer` of a call of `generate`, for `Steered`."""
    return lambda chain: Steered(chain, change)


def partly_right(expected: torch.Tensor, seed: int = 0):
    """A proposer: in each row a random number of tokens is right, and the next one wrong."""
    wanted = torch.Generator().manual_seed(seed)

    def change(proposal, state):
        size = proposal.size
        for row, slot in enumerate(state.last_slots):
            right = int(torch.randint(0, size, (), generator=wanted, device="cpu"))
            truth = expected[row, slot + 1 : slot + 1 + right]
            proposal.tokens[row, 1 : 1 + len(truth)] = truth
            wrong = expected[row, slot + 1 + right : slot + 2 + right]
            proposal.tokens[row, 1 + right : 1 + right + len(wrong[: size - 1 - right])] = (wrong + 1) % VOCAB
        return proposal

    return steered(change)


def record_transfers(monkeypatch, brought: list[str]):
    """Append to `brought`, from now on, each way in which a tensor's values are brought to the host."""
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        honest = getattr(torch.Tensor, name)

        def bring(self, *args, honest=honest, name=name, **kwargs):
            brought.append(name)
            return honest(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, bring)


def as_found(target) -> bool:
    """No hooks, no changed attention, no attribute of ours."""
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in target.modules())
    return not hooks and target.config._attn_implementation in ("sdpa", "eager")
