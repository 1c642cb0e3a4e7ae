"""Drafts as each project stores them: its config.json, its names, types and files of tensors, on tiny weights.

Every row is written out by hand, with the same draft in our words beside it. `load_draft` must give that draft: its
tensors, its hidden states in every cycle, its proposals. Read in one point otherwise, it is another one.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import tiny
from dflash_hub import DecodeStatistics, load_draft

pytestmark = pytest.mark.usefixtures("unchecked")

FULL, SLIDING = "full_attention", "sliding_attention"
AUTO = {"AutoModel": "dflash.DFlashDraftModel"}
NESTED = {"mask_token_id": 3, "target_layer_ids": [0, 2]}
THETA = {"rope_theta": 10000.0}
PLAIN = THETA | {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 6}
SWA = {"layer_types": [SLIDING, SLIDING], "sliding_window": 6}
WHOLE = {"layer_types": [FULL, FULL], "sliding_window": None, "use_sliding_window": False, "max_window_layers": 2}
SHAPE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": tiny.VOCAB,
}


def qwen3(architecture: str = "DFlashDraftModel", **more) -> dict:
    """A config.json of transformers' Qwen3Config; a value of None that the caller passes takes the key out."""
    content = {"architectures": [architecture], "model_type": "qwen3", "dtype": "bfloat16", "num_target_layers": 4}
    content |= SHAPE | WHOLE | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    content |= more
    return {key: value for key, value in content.items() if key not in more or value is not None}


def optimized(dflash_config: dict | None = None, **more) -> dict:
    """As NVIDIA Model Optimizer writes it by hand: no auto_map, the older name of dtype."""
    content = qwen3(dtype=None, use_cache=None, use_sliding_window=None, max_window_layers=None, block_size=5)
    content |= THETA | {"rope_scaling": None, "torch_dtype": "bfloat16"}
    return content | more | {"dflash_config": NESTED | {"causal": False} | (dflash_config or {})}


def served(**more) -> dict:
    """As NVIDIA serves drafts: mask and taps in several places, no block size."""
    nested = {"attention_sink_bias": False, "causal": False, "use_swa": False, "sample_from_anchor": False}
    content = qwen3(num_target_layers=None, use_sliding_window=None, dflash_config=NESTED | nested)
    content |= THETA | NESTED | {"rope_parameters": YARN | THETA, "pard_token": 3, "num_aux_layers": 2}
    content |= {"eagle_aux_hidden_state_layer_ids": [1, 3], "dflash_query_causal": False, "train_embed_tokens": False}
    content |= {"attention_sink_bias": False, "sample_from_anchor": False}
    content |= dict.fromkeys(("draft_vocab_size", "dspark_fixup_head_type", "dspark_markov_rank"))
    return content | {"has_embed_tokens": True, "has_lm_head": False} | more


def speculators(kind: str, body: dict | None = None, **more) -> dict:
    """As speculators writes it."""
    greedy = {"proposal_type": "greedy", "speculative_tokens": 4, "accept_tolerance": 0.0, "verifier_accept_k": 1}
    about = {"algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [greedy]}
    about["verifier"] = {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "example/tiny-target"}
    names = {"dflash": "DFlash", "dflash2": "DFlash2", "dspark": "DSpark"}
    content = {
        "architectures": [f"{names[kind]}DraftModel"],
        "auto_map": {"": f"config.{names[kind]}SpeculatorConfig"},
        "aux_hidden_state_layer_ids": [1, 3],
        "block_size": 5,
        "draft_vocab_size": tiny.VOCAB,
        "dtype": "bfloat16",
        "mask_token_id": 3,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "speculators_config": about,
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {"model_type": "qwen3", **SHAPE, **WHOLE, "rope_parameters": PLAIN} | (body or {}),
    }
    content |= more
    return {key: value for key, value in content.items() if key not in more or value is not None}


OF_SPECULATORS = {"num_target_layers": None, "unscaled_embeddings": True}
MARKOV = {"markov_rank": 8, "markov_head_type": "vanilla"}
MARKOV |= {"enable_confidence_head": True, "confidence_head_with_markov": True}
GATED = MARKOV | {"markov_head_type": "gated", "confidence_head_with_markov": False}
RADIX = {"attention_mode": "gqa", "confidence_head_alpha": 1.0, "projector_type": "dspark"}
HEAD = {"projector_type": "domino", "shift_label": True, "pure_draft_prefix_len": 1}
HEAD |= {"gru_hidden_dim": 10, "emb_dim": 12}
UNSHIFTED = tiny.DOMINO | {"sample_from_anchor": False, "pure_draft_prefix_len": 0}
MUSE = {
    "architectures": ["MuseGlimmerAssistantModel"],
    "model_type": "muse_glimmer_assistant",
    "block_size": 5,
    "dtype": "bfloat16",
    "rope_parameters": PLAIN,
    **SHAPE,
    **NESTED,
    **SWA,
}
del MUSE["vocab_size"], MUSE["attention_bias"], MUSE["initializer_range"], MUSE["use_cache"]


def renaming(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Return the names that another project stores, by patterns of ours."""

    def rename(name: str) -> str:
        for pattern, theirs in pairs:
            name = re.sub(pattern, theirs, name)
        return name

    return rename


MUSE_NAMES = renaming((r"^fc\.", "encoder.fc."), (r"^hidden_norm\.", "encoder.output_norm_enc."))
EARLY_NAMES = renaming((r"^(markov|confidence|prefix_gru|embed_proj)", r"logit_head.\1"))
FLAT_NAMES = renaming((r"^markov_head\.", ""), (r"^confidence_head\.proj", "confidence_proj"))
PREFIXED = renaming(("^", "model."))
BUFFER = {"model.rotary_emb.inv_freq": torch.ones(4)}


def known_bools() -> dict[str, torch.Tensor]:
    """What speculators stores beside the ids of a reduced vocabulary, and of its target in training."""
    known = torch.zeros(tiny.VOCAB, dtype=torch.bool)
    known[[0, 1, 3, 4, 6, 7, 8, 10, 11]] = True
    return {"t2d": known, "verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(9, 32)}


@dataclass(frozen=True)
class Dialect:
    """A draft as a project stores it.

    Args:
        config: its config.json.
        ours: fields of the same draft here.
        misread: a keyword of loading that contradicts the file.
        names: ours -> the stored name of a tensor.
        extra: tensors that are stored besides.
        asked: keywords without which loading fails.
        shards: number of files.
        family: of the target.
        seed: of random weights that draft at least one right token.
    """

    config: dict
    ours: dict
    misread: dict
    names: Callable[[str], str] = str
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    asked: dict = field(default_factory=dict)
    shards: int = 1
    family: str = "qwen3"
    seed: int = 1


TAPS = {"target_layer_ids": [1, 3]}
OTHER_THETA = {"rope_theta": 5e5}
UNSCALED = {"rope_parameters": {"rope_type": "default"}}
DIALECTS = {
    "z-lab, older": Dialect(
        qwen3(auto_map=AUTO, block_size=5, rope_scaling=None, dflash_config=NESTED, **THETA),
        ours=THETA,
        misread=TAPS,
    ),
    "z-lab, newer": Dialect(
        qwen3(auto_map=AUTO, rope_parameters=PLAIN, dflash_config=NESTED | {"block_size": 5}, **MIXED)
        | {"use_sliding_window": True},
        ours=THETA | MIXED | {"is_causal": [True, False]},
        misread={"is_causal": False},
        shards=2,
    ),
    "z-lab, for Gemma": Dialect(
        qwen3(final_logit_softcapping=30.0, block_size=5, dflash_config=NESTED, **THETA, **MIXED)
        | {"use_sliding_window": True},
        ours=THETA | MIXED | {"is_causal": [True, False], "final_logit_softcapping": 30.0},
        misread={"unscaled_embeddings": True},
        family="gemma3_text",
    ),
    "z-lab, DFlash 2": Dialect(
        qwen3("DFlash2DraftModel", rope_parameters=PLAIN, is_causal=False, **SWA)
        | {"use_sliding_window": True}
        | {"dflash_config": NESTED | tiny.SECOND | {"block_size": 5, "output_multiplier": 0.2}},
        ours=THETA | SWA | tiny.SECOND | {"is_causal": False, "output_multiplier": 0.2},
        misread={"sliding_window": 3},
        seed=2,
    ),
    "names with a prefix": Dialect(
        qwen3(auto_map=AUTO, block_size=5, dflash_config=NESTED, **THETA),
        ours=THETA,
        misread=OTHER_THETA,
        names=PREFIXED,
        extra=BUFFER,
        shards=2,
    ),
    "NeMo AutoModel": Dialect(
        qwen3("Qwen3DFlashDraftModel", rope_parameters=PLAIN, block_size=5)
        | {"dflash_config": NESTED | {"block_size": 5, "output_multiplier": 1.0, "input_embedding_scale": 1.0}}
        | {"id2label": {"0": "LABEL_0"}, "return_dict": True, "chunk_size_feed_forward": 0},
        ours=THETA,
        misread=OTHER_THETA,
    ),
    "NeMo AutoModel, a window": Dialect(
        qwen3("Qwen3DFlashDraftModel", rope_parameters=PLAIN, block_size=5, is_causal=False, **SWA)
        | {"use_sliding_window": True, "dflash_config": NESTED | {"block_size": 5}},
        ours=THETA | SWA | {"is_causal": False},
        misread={"is_causal": True},
    ),
    "NeMo AutoModel, JetSpec": Dialect(
        qwen3("Qwen3DFlashDraftModel", rope_parameters=PLAIN, block_size=5, is_causal=False)
        | {"dflash_config": NESTED | {"block_size": 5, "causal": True}},
        ours=THETA | {"is_causal": True},
        asked={"is_causal": True},
        misread={"is_causal": False},
    ),
    "NeMo AutoModel, DFlash 2": Dialect(
        qwen3("Qwen3DFlash2DraftModel", rope_parameters=PLAIN, block_size=5, is_causal=False)
        | {"dflash_config": NESTED | tiny.SECOND | {"block_size": 5}},
        ours=THETA | tiny.SECOND,
        misread=TAPS,
        seed=3,
    ),
    "NeMo AutoModel, Domino": Dialect(
        qwen3("Qwen3DFlashDraftModel", rope_parameters=PLAIN, block_size=5, is_causal=False)
        | {"dflash_config": NESTED | HEAD | {"block_size": 5}},
        ours=THETA | tiny.DOMINO,
        misread={"pure_draft_prefix_len": 4},
    ),
    "NVIDIA, served, its embedding": Dialect(
        served(),
        ours={"rope_parameters": YARN | THETA, "num_target_layers": None, "has_own_embed_tokens": True},
        asked={"block_size": 5},
        misread=TAPS,
    ),
    "NVIDIA, served, its embedding and head": Dialect(
        served(has_lm_head=True),
        ours={"rope_parameters": YARN | THETA, "num_target_layers": None}
        | {"has_own_embed_tokens": True, "has_own_lm_head": True},
        asked={"block_size": 5},
        misread=UNSCALED,
    ),
    "Model Optimizer": Dialect(optimized(torch_dtype="float16"), ours=THETA, misread=OTHER_THETA),
    "Model Optimizer, a window": Dialect(
        optimized({"use_swa": True, "swa_window_size": 6}, sliding_window=6),
        ours=THETA | SWA | {"is_causal": False},
        misread={"layer_types": [FULL, FULL]},
    ),
    "Model Optimizer, YaRN": Dialect(
        optimized(
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
            | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        ),
        ours={"rope_parameters": YARN | THETA | {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        misread=UNSCALED,
    ),
    "SpecForge": Dialect(
        qwen3(auto_map=AUTO, block_size=5, dflash_config=NESTED, rope_parameters=PLAIN, **THETA),
        ours=THETA,
        misread=TAPS,
    ),
    "SpecForge, YaRN": Dialect(
        qwen3(auto_map=AUTO, block_size=5, dflash_config=NESTED, **THETA)
        | {"rope_parameters": YARN | THETA, "rope_scaling": YARN},
        ours={"rope_parameters": YARN | THETA},
        misread=UNSCALED,
        seed=4,
    ),
    "JetSpec": Dialect(
        qwen3(block_size=5, rope_parameters=PLAIN, dflash_config=NESTED | {"causal_head": True}),
        ours=THETA | {"is_causal": True},
        misread={"is_causal": False},
    ),
    "Muse assistant": Dialect(
        MUSE,
        ours=THETA | SWA | {"is_causal": False, "vocab_size": None, "num_target_layers": None},
        misread={"is_causal": True},
        names=MUSE_NAMES,
    ),
    "speculators": Dialect(
        speculators("dflash", draft_vocab_size=9),
        ours=THETA | OF_SPECULATORS | tiny.REDUCED,
        misread=TAPS,
        extra=known_bools(),
        seed=2,
    ),
    "speculators, for Gemma": Dialect(
        speculators("dflash"),
        ours=THETA | OF_SPECULATORS,
        misread={"unscaled_embeddings": False},
        family="gemma3_text",
    ),
    "speculators, a causal window": Dialect(
        speculators("dflash", MIXED | {"use_sliding_window": True}),
        ours=THETA | MIXED | OF_SPECULATORS | {"is_causal": [True, False], "window_from_anchor": True},
        misread={"window_from_anchor": False},
    ),
    "speculators, older, with all parts": Dialect(
        speculators("dflash", {"rope_parameters": None, "rope_scaling": None} | THETA)
        | {"speculators_version": "0.5.0"},
        ours=THETA | OF_SPECULATORS | {"has_own_embed_tokens": True, "has_own_lm_head": True},
        misread=OTHER_THETA,
        extra={"d2t": torch.zeros(tiny.VOCAB, dtype=torch.long), "t2d": torch.ones(tiny.VOCAB, dtype=torch.bool)},
    ),
    "speculators, DFlash 2": Dialect(
        speculators("dflash2", SWA | {"use_sliding_window": True}, sliding_window_non_causal=None, **tiny.SECOND),
        ours=THETA | SWA | OF_SPECULATORS | tiny.SECOND | {"is_causal": False, "window_from_anchor": True},
        misread={"is_causal": True},
        seed=2,
    ),
    "speculators, DSpark": Dialect(
        speculators("dspark", draft_vocab_size=9, sample_from_anchor=True, **MARKOV),
        ours=THETA | OF_SPECULATORS | tiny.REDUCED | MARKOV,
        misread={"sample_from_anchor": False},
        extra=known_bools(),
        seed=2,
    ),
    "speculators, older, DSpark": Dialect(
        speculators("dspark", sample_from_anchor=None, **MARKOV),
        ours=THETA | OF_SPECULATORS | MARKOV | {"sample_from_anchor": False},
        asked={"sample_from_anchor": False},
        misread=TAPS,
    ),
    "deepseek-ai, DSpark": Dialect(
        qwen3("Qwen3DSparkModel", block_size=5, num_anchors=512, rope_parameters=PLAIN, **NESTED, **MARKOV),
        ours=THETA | MARKOV | {"has_own_embed_tokens": True, "has_own_lm_head": True},
        misread={"sample_from_anchor": False},
        shards=2,
        seed=5,
    ),
    "deepseek-ai, DSpark, without a head": Dialect(
        qwen3("Qwen3DSparkModel", block_size=5, num_anchors=512, rope_parameters=PLAIN, **NESTED)
        | {"dtype": "float32", "markov_rank": 0, "enable_confidence_head": False},
        ours=THETA | {"markov_rank": 0, "has_own_embed_tokens": True, "has_own_lm_head": True},
        misread={"sample_from_anchor": False},
    ),
    "SpecForge, DSpark": Dialect(
        qwen3("DSparkDraftModel", auto_map={"AutoModel": "dspark.DSparkDraftModel"}, block_size=5, **GATED)
        | {"rope_parameters": YARN | THETA, "dflash_config": NESTED | RADIX | GATED},
        ours=GATED | {"rope_parameters": YARN | THETA},
        misread=UNSCALED,
        seed=2,
    ),
    "SpecForge, early, DSpark": Dialect(
        qwen3("DSparkDraftModel", block_size=5, **THETA, dflash_config=NESTED | RADIX | MARKOV),
        ours=THETA | MARKOV,
        misread=TAPS,
        names=EARLY_NAMES,
    ),
    "Model Optimizer, DSpark": Dialect(
        optimized(
            {"projector_type": "dspark", "shift_label": True, "use_confidence_head": True}
            | {"markov_rank": 8, "markov_head_type": "rnn"}
        ),
        ours=THETA | MARKOV | {"markov_head_type": "rnn"},
        misread=TAPS,
        names=FLAT_NAMES,
        seed=8,
    ),
    "Domino's author": Dialect(
        qwen3(auto_map=AUTO, block_size=5, emb_dim=12, dflash_config=NESTED | HEAD, **THETA),
        ours=THETA | tiny.DOMINO,
        misread={"pure_draft_prefix_len": 4},
    ),
    "Domino's author, older": Dialect(
        qwen3(auto_map=AUTO, block_size=5, emb_dim=12, **THETA)
        | {"dflash_config": NESTED | HEAD | {"projector_type": "causal_v5"}},
        ours=THETA | tiny.DOMINO,
        misread=TAPS,
    ),
    "SpecForge, Domino": Dialect(
        qwen3("DominoDraftModel", auto_map={"AutoModel": "domino.DominoDraftModel"}, emb_dim=12, block_size=5)
        | {"rope_parameters": PLAIN, "dflash_config": NESTED | HEAD | {"shift_label": False}}
        | {"dflash_config": NESTED | HEAD | {"shift_label": False, "pure_draft_prefix_len": 0}},
        ours=THETA | UNSHIFTED,
        misread={"sample_from_anchor": True},
        seed=4,
    ),
    "SpecForge, early, Domino": Dialect(
        qwen3("DominoDraftModel", emb_dim=12, block_size=5, dflash_config=NESTED | HEAD, **THETA),
        ours=THETA | tiny.DOMINO,
        misread=OTHER_THETA,
        names=EARLY_NAMES,
    ),
    "Model Optimizer, Domino": Dialect(
        optimized(HEAD, emb_dim=12),
        ours=THETA | tiny.DOMINO,
        misread={"pure_draft_prefix_len": 4},
    ),
}


class Decoded(NamedTuple):
    """What a decode did: the draft's hidden states and proposals in every cycle, acceptances and the text."""

    states: list
    drafted: list
    committed: list
    text: list


INPUTS = tiny.batch(9, pads=(0, 3, 5))
ASKED = {"do_sample": False, "max_new_tokens": 7}


@pytest.fixture(scope="module")
def targets():
    """Family -> the target, and its own text."""
    found = {}
    for family in ("qwen3", "gemma3_text"):
        target = tiny.target(family)
        found[family] = target, target.generate(**INPUTS, **ASKED).tolist()
    return found


def decoded(target, draft, **asked) -> Decoded:
    states, drafted, statistics = [], [], DecodeStatistics()
    hook = draft.norm.register_forward_hook(lambda module, inputs, output: states.append(output.tolist()))
    ways = {"custom_generate": draft.speculate, "statistics": statistics}
    ways["proposer"] = tiny.steered(lambda proposal, state: drafted.append(proposal.tokens.tolist()) or proposal)
    text = target.generate(**INPUTS, **ASKED | asked, **ways)
    hook.remove()
    return Decoded(states, drafted, statistics.committed, text.tolist())


def write(folder, dialect: Dialect, draft) -> None:
    """Store a draft as its project does."""
    (folder / "config.json").write_text(json.dumps(dialect.config))
    tensors = {dialect.names(name): tensor.contiguous() for name, tensor in draft.state_dict().items()}
    tensors |= dialect.extra
    names = sorted(tensors)
    if dialect.shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for index in range(dialect.shards):
        file = f"model-{index + 1:05}-of-{dialect.shards:05}.safetensors"
        held = names[index :: dialect.shards]
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def original(target, dialect: Dialect):
    """The draft in our words; what it has of an embedding and a head is not the target's."""
    dtype = getattr(torch, dialect.config.get("dtype") or dialect.config["torch_dtype"])
    draft = tiny.draft(target, dialect.seed, **dialect.ours).to(dtype)
    return tiny.reduce(draft) if draft.config.draft_vocab_size else draft


@pytest.mark.parametrize("name", DIALECTS)
def test_a_draft_is_the_same_as_its_project_stores_it_and_another_one_if_misread(name, targets, tmp_path):
    dialect = DIALECTS[name]
    target, text = targets[dialect.family]
    draft = original(target, dialect)
    write(tmp_path, dialect, draft)
    if dialect.asked:
        with pytest.raises(ValueError, match=rf"(from_pretrained|load_draft)\(\.\.\., {next(iter(dialect.asked))}="):
            load_draft(tmp_path)
    loaded = load_draft(tmp_path, **dialect.asked)
    assert type(loaded) is type(draft)
    assert loaded.dtype == draft.dtype
    for field_name in {*draft.config.own_fields()} - {"dtype"}:
        assert getattr(loaded.config, field_name) == getattr(draft.config, field_name), field_name
    expected, found = draft.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    runs = [decoded(target, one) for one in (draft, loaded)]
    assert runs[0] == runs[1]
    assert max(runs[0].committed) > 1
    assert runs[1].text == text
    misread = decoded(target, load_draft(tmp_path, **dialect.asked | dialect.misread), max_new_tokens=2)
    assert (misread.states[0], misread.drafted[0]) != (runs[1].states[0], runs[1].drafted[0])
