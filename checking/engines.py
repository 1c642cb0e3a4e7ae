# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List what each engine would do with a draft as it is stored: it loads it, refuses it, or computes something else.

A rule is a row: what happens, where in the engine's release that stands, and a function that finds it. The rules were
read in those releases' code; no engine was started. To check another release, correct its rows and its version.
"""

from dataclasses import dataclass, field
from typing import Any

from ..findings_dflash import Finding
from . import rules
from .remarks import finding_as_dict
from .stored import StoredDraft

LOADS = "loads"
REFUSES = "refuses"
WRONG = "loads, and is wrong"


@dataclass(frozen=True)
class Rule:
    """Describe one way in which an engine does not serve a draft as it was trained.

    Args:
        name: the same in every release; for machines.
        effect: `REFUSES` or `WRONG`.
        source: the file of the engine's release where this stands.
        check: returns a finding if it applies.
    """

    name: str
    effect: str
    source: str
    check: rules.Check


@dataclass(frozen=True)
class Engine:
    """Describe an engine, at the release whose code was read.

    Args:
        name: for options and machines.
    """

    name: str
    title: str
    version: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Reason:
    """Hold a rule that applies to a draft, and what it found."""

    rule: Rule
    finding: Finding


@dataclass(frozen=True)
class EngineVerdict:
    """Hold what an engine would do with a draft, and why."""

    engine: Engine
    reasons: tuple[Reason, ...] = field(default=())

    @property
    def outcome(self) -> str:
        """`LOADS`, `REFUSES` or `WRONG`."""
        effects = [reason.rule.effect for reason in self.reasons]
        if not effects:
            return LOADS
        return REFUSES if REFUSES in effects else WRONG

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        reasons = []
        for reason in self.reasons:
            rule = {"rule": reason.rule.name, "effect": reason.rule.effect}
            rule["source"] = reason.rule.source
            reasons.append(rule | finding_as_dict(reason.finding))
        found = {"engine": self.engine.name, "version": self.engine.version}
        return found | {"outcome": self.outcome, "reasons": reasons}


def verdict(engine: Engine, draft: StoredDraft) -> EngineVerdict:
    """Return what an engine would do with a draft."""
    found = []
    for rule in engine.rules:
        finding = rule.check(draft)
        if finding is not None:
            found.append(Reason(rule, finding))
    return EngineVerdict(engine, tuple(found))


def verdicts(draft: StoredDraft) -> tuple[EngineVerdict, ...]:
    """Return what every engine would do with a draft."""
    return tuple(verdict(engine, draft) for engine in ENGINES.values())


# vLLM ----------------------------------------------------------------------------------------------------------------

_VLLM_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel", "LiLiCorrDraftModel"),
    *("MuseGlimmerAssistantModel", "DFlashMuseGlimmerAssistantModel", "DFlashLagunaForCausalLM"),
    *("Qwen3XPressModel", "DFlashQwen3XPressModel", "K3DSparkModel", "DSparkDraftModel"),
    *("Qwen3DSparkModel", "Qwen3OmniDSparkModel", "Gemma4DSparkModel", "MuseSparkDSparkModel"),
)
_VLLM_MODEL = "vllm/model_executor/models/qwen3_dflash.py"
_VLLM_DSPARK = "vllm/model_executor/models/qwen3_dspark.py"
_VLLM_CONFIG = "vllm/transformers_utils/config.py"
_VLLM_SPECULATOR = "vllm/v1/worker/gpu/spec_decode/dflash/speculator.py"
_VLLM_SPECULATORS = "vllm/transformers_utils/configs/speculators/"
_VLLM = Engine(
    "vllm",
    "vLLM",
    "0.33.0",
    (
        Rule("model-type", REFUSES, _VLLM_CONFIG, rules.unregistered),
        Rule(
            "architecture",
            REFUSES,
            "vllm/model_executor/models/registry.py",
            rules.knows(*_VLLM_KNOWN),
        ),
        Rule("speculators-type", REFUSES, f"{_VLLM_SPECULATORS}base.py", rules.speculators_untyped),
        Rule(
            "speculators-fields", REFUSES, f"{_VLLM_SPECULATORS}algos.py", rules.speculators_lacking
        ),
        Rule("speculators-anchor", REFUSES, _VLLM_SPECULATOR, rules.speculators_anchor),
        Rule("speculators-causal", WRONG, f"{_VLLM_SPECULATORS}algos.py", rules.speculators_causal),
        Rule("null-config", REFUSES, "vllm/config/speculative.py", rules.null_nested),
        Rule(
            "mask-token",
            REFUSES,
            "vllm/v1/worker/gpu/spec_decode/utils.py",
            rules.needs(
                "dflash_config.mask_token_id", "mask_token_id", "pard_token", "ptd_token_id"
            ),
        ),
        Rule(
            "taps",
            WRONG,
            "vllm/v1/worker/gpu/spec_decode/eagle/eagle3_utils.py",
            rules.needs(
                "dflash_config.target_layer_ids",
                "target_layer_ids",
                "eagle_aux_hidden_state_layer_ids",
                consequence=", so the layers that EAGLE-3 taps are taken",
            ),
        ),
        Rule("window", REFUSES, _VLLM_MODEL, rules.nulled_window_alone),
        Rule("causality", WRONG, _VLLM_MODEL, rules.expects_causal(rules.either_flag)),
        Rule("prefix", REFUSES, _VLLM_MODEL, rules.prefixed),
        Rule(
            "tensors",
            REFUSES,
            _VLLM_MODEL,
            rules.strict("dflash2", "dspark", "mask", shipped=StoredDraft.vocabulary_tensors),
        ),
        Rule("reduced-vocabulary", REFUSES, _VLLM_MODEL, rules.reduced_without_table),
        Rule("dflash2-fields", REFUSES, _VLLM_MODEL, rules.dflash2_fields_elsewhere),
        Rule("domino", REFUSES, _VLLM_MODEL, rules.no_head("domino")),
        Rule("dspark-names", REFUSES, _VLLM_DSPARK, rules.flat_dspark),
        Rule("markov-head", REFUSES, _VLLM_DSPARK, rules.other_markov),
        Rule("anchor", WRONG, _VLLM_SPECULATOR, rules.anchor_unread),
        Rule("mask-embedding", WRONG, _VLLM_MODEL, rules.mask_embedding_unread),
        Rule("width", REFUSES, _VLLM_MODEL, rules.other_width),
    ),
)

# SGLang --------------------------------------------------------------------------------------------------------------

_SGLANG_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel", "LiLiCorrDraftModel"),
    *("MiniMaxDFlash2DraftModel", "MuseGlimmerAssistantModel", "DFlashLagunaForCausalLM"),
    *("Qwen3DSparkModel", "DSparkDraftModel", "LingDSparkModel", "Lfm2DSparkDraftModel"),
)
_SGLANG_UTILS = "sglang/srt/speculative/dflash_utils.py"
_SGLANG_MODEL = "sglang/srt/models/dflash.py"
_SGLANG_CONFIG = "sglang/srt/utils/hf_transformers/config.py"
_SGLANG = Engine(
    "sglang",
    "SGLang",
    "0.5.23",
    (
        Rule("speculators", REFUSES, _SGLANG_CONFIG, rules.speculators),
        Rule("model-type", REFUSES, _SGLANG_CONFIG, rules.unregistered),
        Rule("architecture", REFUSES, _SGLANG_MODEL, rules.knows(*_SGLANG_KNOWN)),
        Rule(
            "taps",
            WRONG,
            _SGLANG_UTILS,
            rules.needs(
                "dflash_config.target_layer_ids",
                "target_layer_ids",
                consequence=", so taps are guessed by a formula",
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _SGLANG_UTILS,
            rules.needs(
                "dflash_config.mask_token_id",
                "mask_token_id",
                consequence=", so the token <|MASK|> is looked for",
            ),
        ),
        Rule(
            "block-size",
            WRONG,
            _SGLANG_UTILS,
            rules.needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window", REFUSES, _SGLANG_MODEL, rules.nulled_window),
        Rule("window-unseen", WRONG, _SGLANG_MODEL, rules.window_unseen),
        Rule("causality", WRONG, _SGLANG_MODEL, rules.expects_causal(rules.top_flag)),
        Rule("reduced-vocabulary", WRONG, _SGLANG_MODEL, rules.reduced),
        Rule("own-vocabulary", WRONG, _SGLANG_MODEL, rules.own_vocabulary_but_dspark),
        Rule("domino-prefix", WRONG, _SGLANG_UTILS, rules.domino_prefix),
        Rule("embedding-scale", WRONG, _SGLANG_MODEL, rules.unscaled),
        Rule("tap-width", REFUSES, _SGLANG_MODEL, rules.wide_taps),
        Rule("muse-taps", WRONG, _SGLANG_MODEL, rules.raw_taps_of_muse),
        Rule("dflash2-fields", WRONG, _SGLANG_UTILS, rules.dflash2_fields_elsewhere),
        Rule("dspark-names", WRONG, _SGLANG_MODEL, rules.flat_dspark),
        Rule("anchor", WRONG, "sglang/srt/speculative/dflash_worker_v2.py", rules.anchor_unread),
        Rule("mask-embedding", WRONG, _SGLANG_MODEL, rules.mask_embedding_unread),
        Rule("width", REFUSES, _SGLANG_MODEL, rules.other_width),
    ),
)

# TensorRT-LLM --------------------------------------------------------------------------------------------------------
_TRTLLM_MODEL = "tensorrt_llm/_torch/models/modeling_dflash.py"
_TRTLLM_SPEC = "tensorrt_llm/_torch/speculative/dflash.py"
_TRTLLM = Engine(
    "tensorrt-llm",
    "TensorRT-LLM",
    "1.3.0rc (PyTorch backend)",
    (
        Rule("speculators", REFUSES, _TRTLLM_MODEL, rules.speculators),
        Rule("model-type", REFUSES, _TRTLLM_MODEL, rules.unregistered),
        Rule("backbone", REFUSES, _TRTLLM_MODEL, rules.no_backbone),
        Rule(
            "taps",
            REFUSES,
            _TRTLLM_SPEC,
            rules.needs(
                "dflash_config.target_layer_ids",
                advice="Pass target_layer_ids in the DFlashDecodingConfig, or write the engines layout",
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _TRTLLM_SPEC,
            rules.needs(
                "dflash_config.mask_token_id",
                "mask_token_id",
                consequence=", so vocab_size is taken, which is no row",
            ),
        ),
        Rule("window", WRONG, _TRTLLM_MODEL, rules.needs_both_windows),
        Rule("causality", WRONG, _TRTLLM_MODEL, rules.expects_causal(rules.never)),
        Rule("reduced-vocabulary", WRONG, _TRTLLM_MODEL, rules.reduced),
        Rule(
            "heads",
            WRONG,
            _TRTLLM_MODEL,
            rules.no_head("domino", "dspark", verb="runs without its head"),
        ),
        Rule("own-vocabulary", WRONG, _TRTLLM_MODEL, rules.own_vocabulary),
        Rule("anchor", WRONG, _TRTLLM_SPEC, rules.anchor_unread),
        Rule("mask-embedding", WRONG, _TRTLLM_MODEL, rules.mask_embedding_unread),
    ),
)

# llama.cpp -----------------------------------------------------------------------------------------------------------

_LLAMACPP_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "Qwen3DSparkModel", "DSparkDraftModel"),
    *("DSparkSpeculator", "Gemma4DSparkModel", "MuseGlimmerAssistantModel", "LingDSparkModel"),
    *("Lfm2DSparkDraftModel", "DeepseekV4DSparkModel"),
)
_CONVERSION = "conversion/qwen.py"
_LLAMACPP = Engine(
    "llama.cpp",
    "llama.cpp",
    "ggml-org/llama.cpp@0c1e57098",
    (
        Rule("speculators", REFUSES, _CONVERSION, rules.speculators_but_dspark),
        Rule("architecture", REFUSES, "conversion/__init__.py", rules.knows(*_LLAMACPP_KNOWN)),
        Rule("mask-token", REFUSES, _CONVERSION, rules.nested_mask),
        Rule(
            "taps",
            REFUSES,
            _CONVERSION,
            rules.needs("dflash_config.target_layer_ids", "target_layer_ids"),
        ),
        Rule(
            "block-size",
            WRONG,
            _CONVERSION,
            rules.needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window", WRONG, _CONVERSION, rules.needs_a_window_switch),
        Rule("window-everywhere", WRONG, _CONVERSION, rules.full_layers_slide),
        Rule("causality", WRONG, "common/speculative.cpp", rules.expects_causal(rules.unless_said)),
        Rule("tensors", REFUSES, _CONVERSION, rules.llamacpp_tensors),
        Rule(
            "quantisation",
            REFUSES,
            "conversion/base.py",
            rules.unknown_quantisation("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt"),
        ),
        Rule("dflash2-fields", REFUSES, _CONVERSION, rules.dflash2_fields_elsewhere),
        Rule("markov-head", REFUSES, _CONVERSION, rules.other_markov),
        Rule("anchor", WRONG, _CONVERSION, rules.anchor_unread),
        Rule("domino", REFUSES, _CONVERSION, rules.no_head("domino")),
    ),
)

# transformers --------------------------------------------------------------------------------------------------------
_GENERATOR = "transformers/generation/candidate_generator.py"
_AUTO = "transformers/models/auto/auto_factory.py"
_AUTOMODEL = Engine(
    "transformers",
    "transformers, AutoModel with trust_remote_code",
    "5.23.0",
    (
        Rule(
            "speculators",
            REFUSES,
            "transformers/models/auto/configuration_auto.py",
            rules.speculators,
        ),
        Rule(
            "model-type",
            REFUSES,
            "transformers/models/auto/configuration_auto.py",
            rules.no_config_class,
        ),
        Rule("class", WRONG, _AUTO, rules.no_class),
        Rule("code", REFUSES, "transformers/dynamic_module_utils.py", rules.dangling),
        Rule(
            "window", WRONG, "transformers/models/qwen3/configuration_qwen3.py", rules.nulled_window
        ),
    ),
)
_NATIVE = Engine(
    "transformers-generate",
    'transformers, generate(assistant_model=draft, speculation_type="dflash")',
    "5.23.0",
    (
        *_AUTOMODEL.rules,
        Rule("interface", REFUSES, _GENERATOR, rules.no_code),
        Rule("taps", REFUSES, _GENERATOR, rules.needs("target_layer_ids")),
        Rule("mask-token", REFUSES, _GENERATOR, rules.needs("mask_token_id")),
        Rule("block-size", REFUSES, _GENERATOR, rules.needs("block_size")),
        Rule("anchor", REFUSES, _GENERATOR, rules.anchor_unread),
        Rule("own-vocabulary", REFUSES, _GENERATOR, rules.ships_vocabulary),
        Rule(
            "heads",
            WRONG,
            _GENERATOR,
            rules.no_head("dflash2", "domino", "dspark", verb="runs without its head"),
        ),
    ),
)

# MLX -----------------------------------------------------------------------------------------------------------------
_MLX_MODEL = "dflash/model_mlx.py"
_ZLAB_MLX = Engine(
    "dflash-zlab-mlx",
    "dflash (z-lab, MLX)",
    "0.1.0",
    (
        Rule("speculators", REFUSES, _MLX_MODEL, rules.speculators),
        Rule("head-dim", REFUSES, _MLX_MODEL, rules.needs("head_dim")),
        Rule("anchor", WRONG, _MLX_MODEL, rules.anchor_unread),
        Rule("layers", REFUSES, _MLX_MODEL, rules.needs("num_target_layers")),
        Rule("taps", REFUSES, _MLX_MODEL, rules.needs("dflash_config.target_layer_ids")),
        Rule("mask-token", REFUSES, _MLX_MODEL, rules.needs("dflash_config.mask_token_id")),
        Rule(
            "rope",
            WRONG,
            _MLX_MODEL,
            rules.needs("rope_theta", "rope_parameters", consequence=", so 10000 is taken"),
        ),
        Rule(
            "block-size",
            WRONG,
            _MLX_MODEL,
            rules.needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window-unseen", WRONG, _MLX_MODEL, rules.window_unseen),
        Rule("causality", WRONG, _MLX_MODEL, rules.expects_causal(rules.top_flag)),
        Rule("tensors", REFUSES, _MLX_MODEL, rules.strict("dflash2")),
        Rule("quantisation", REFUSES, _MLX_MODEL, rules.quantised),
        Rule("prefix", REFUSES, _MLX_MODEL, rules.prefixed),
        Rule("heads", REFUSES, _MLX_MODEL, rules.no_head("domino", "dspark")),
    ),
)
_BST_MODEL = "dflash_mlx/model.py"
_BST_MLX = Engine(
    "dflash-mlx",
    "dflash-mlx (bstnxbt)",
    "0.1.8",
    (
        Rule("speculators", REFUSES, _BST_MODEL, rules.speculators),
        Rule("rope", REFUSES, _BST_MODEL, rules.needs("rope_theta")),
        Rule("block-size", REFUSES, _BST_MODEL, rules.needs("block_size")),
        Rule("layers", REFUSES, _BST_MODEL, rules.needs("num_target_layers")),
        Rule("tie", REFUSES, _BST_MODEL, rules.needs("tie_word_embeddings")),
        Rule("head-dim", REFUSES, _BST_MODEL, rules.needs("head_dim")),
        Rule("anchor", WRONG, _BST_MODEL, rules.anchor_unread),
        Rule(
            "taps",
            WRONG,
            _BST_MODEL,
            rules.needs(
                "dflash_config.target_layer_ids", consequence=", so taps are spread by a formula"
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _BST_MODEL,
            rules.needs("dflash_config.mask_token_id", consequence=", so token 0 is taken"),
        ),
        Rule("window-unseen", WRONG, _BST_MODEL, rules.window_unseen),
        Rule("causality", WRONG, _BST_MODEL, rules.expects_causal(rules.by_types_alone)),
        Rule("tensors", REFUSES, _BST_MODEL, rules.strict()),
        Rule("prefix", REFUSES, _BST_MODEL, rules.prefixed),
        Rule("heads", REFUSES, _BST_MODEL, rules.no_head("dflash2", "domino", "dspark")),
    ),
)
_VLM_MODEL = "mlx_vlm/speculative/drafters/qwen3_dflash/config.py"
_VLM_WEIGHTS = "mlx_vlm/speculative/drafters/qwen3_dflash/dflash.py"
_MLX_VLM = Engine(
    "mlx-vlm",
    "mlx-vlm",
    "0.7.10",
    (
        Rule("speculators", REFUSES, "mlx_vlm/utils.py", rules.speculators),
        Rule("drafter", REFUSES, "mlx_vlm/utils.py", rules.needs_a_package),
        Rule("anchor", WRONG, _VLM_WEIGHTS, rules.anchor_unread),
        Rule(
            "block-size",
            WRONG,
            _VLM_MODEL,
            rules.needs_block_size_at_top,
        ),
        Rule("window-unseen", WRONG, _VLM_MODEL, rules.window_unseen),
        Rule("causality", WRONG, _VLM_MODEL, rules.expects_causal(rules.inner_first)),
        Rule(
            "tensors",
            REFUSES,
            _VLM_WEIGHTS,
            rules.strict("dflash2", "dspark", shipped=("embed_tokens.weight",)),
        ),
        Rule("domino", REFUSES, "mlx_vlm/utils.py", rules.no_head("domino")),
    ),
)

_ALL = (
    *(_AUTOMODEL, _NATIVE),
    *(_VLLM, _SGLANG, _TRTLLM, _LLAMACPP),
    *(_ZLAB_MLX, _BST_MLX, _MLX_VLM),
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ALL}
"""The engines by name."""


def engine_named(name: str) -> Engine:
    """Return the engine with this name.

    Raises:
        ValueError: there is none.
    """
    if name not in list(ENGINES):
        raise ValueError(f"engine is {name!r}; it must be one of {', '.join(ENGINES)}.")
    return ENGINES[name]
