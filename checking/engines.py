# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List what each engine would do with a draft as it is stored: it loads it, refuses it, or computes something else.

A rule is a row: what happens, where in the engine's release that stands, and a function that finds it. The rules were
read in those releases' code; no engine was started. To check another release, correct its rows and its version.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..findings_dflash import Finding
from ..layouts_dflash import SLIDING, shown
from .remarks import finding_as_dict, listed
from .stored import StoredDraft

LOADS, REFUSES, WRONG = "loads", "refuses", "loads, and is wrong"
Check = Callable[[StoredDraft], Finding | None]

_ENGINES_LAYOUT = (
    'Write the engines layout: load_draft(...).save_pretrained(folder, layout="engines"), or push it, which writes the '
    "branch engines"
)
_NOT_HERE = "Serve it with another engine"
_WINDOW = f"Write layer_types as {SLIDING!r}, sliding_window, use_sliding_window: true and dflash_config.use_swa: true"


@dataclass(frozen=True)
class Rule:
    """One way in which an engine does not serve a draft as it was trained.

    Args:
        name: the same in every release; for machines.
        effect: `REFUSES` or `WRONG`.
        source: the file of the engine's release where this stands.
        check: returns a finding if it applies.
    """

    name: str
    effect: str
    source: str
    check: Check


@dataclass(frozen=True)
class Engine:
    """An engine, at the release whose code was read.

    Args:
        name: for options and machines.
    """

    name: str
    title: str
    version: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Reason:
    """A rule that applies to a draft, and what it found."""

    rule: Rule
    finding: Finding


@dataclass(frozen=True)
class EngineVerdict:
    """What an engine would do with a draft, and why."""

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


# Checks that several engines share -----------------------------------------------------------------------------------


def _unregistered(draft: StoredDraft) -> Finding | None:
    """Find a model_type that AutoConfig does not know."""
    if draft.is_speculators or draft.model_type in CONFIG_MAPPING_NAMES:
        return None
    what = f"model_type is {shown(draft.model_type)}, which transformers does not register"
    return Finding(what, draft.model_type, "qwen3", _ENGINES_LAYOUT)


def _speculators(draft: StoredDraft) -> Finding | None:
    """Find the speculators layout, for readers that do not know it."""
    if not draft.is_speculators:
        return None
    what = (
        "The speculators layout has no model_type and other keys, which this reader does not know"
    )
    return Finding(what, "speculators", "a layout with model_type", "Serve it with vLLM")


def _knows(*architectures: str) -> Check:
    """Find an architecture that is none of these."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.architecture in architectures or draft.is_speculators:
            return None
        what = f"architectures is {shown(draft.top('architectures'))}, and no class has that name"
        advice = _NOT_HERE
        if draft.architecture.startswith("Qwen3DFlash"):
            advice = f'Write architectures: ["{draft.architecture.removeprefix("Qwen3")}"]'
        return Finding(what, draft.architecture, architectures, advice)

    return check


def _needs(*keys: str, advice: str = _ENGINES_LAYOUT, consequence: str = "") -> Check:
    """Find that none of these keys has a value; "dflash_config.x" is the key x inside."""

    def value(draft: StoredDraft, key: str) -> Any:
        name = key.removeprefix("dflash_config.")
        return draft.top(key) if name == key else draft.inner(name)

    def check(draft: StoredDraft) -> Finding | None:
        if draft.is_speculators or any(value(draft, key) is not None for key in keys):
            return None
        what = f"{' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} missing{consequence}"
        return Finding(what, None, keys, advice)

    return check


def _nulled_window(draft: StoredDraft) -> Finding | None:
    """Find sliding layers whose window Qwen3Config sets to None."""
    on = draft.top("use_sliding_window") is True
    if draft.model_type != "qwen3" or not draft.names_sliding_layers or on:
        return None
    what = (
        f"layer_types has sliding layers, but use_sliding_window is {shown(draft.top('use_sliding_window'))}, so "
        "Qwen3Config sets sliding_window to None"
    )
    return Finding(what, None, True, "Write use_sliding_window: true")


def _nulled_window_alone(draft: StoredDraft) -> Finding | None:
    """Find the same, for readers that look for a window in dflash_config first."""
    return _nulled_window(draft) if draft.inner("swa_window_size") is None else None


def _window_unseen(draft: StoredDraft) -> Finding | None:
    """Find a window that only dflash_config names, for readers of layer_types."""
    if not draft.inner("use_swa") or draft.names_sliding_layers:
        return None
    what = "dflash_config.use_swa is on, but layer_types are all full, which counts here: no layer slides"
    return Finding(what, draft.layer_types, [SLIDING], _WINDOW)


def _expects_causal(of_engine: Callable[[StoredDraft], list[bool]]) -> Check:
    """Find layers whose causality an engine takes otherwise than the draft was trained."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.is_speculators:
            return None
        ours, theirs = draft.causal, of_engine(draft)
        if ours == theirs:
            return None
        words = {True: "causal", False: "bidirectional"}
        wrong = [
            index for index, one in enumerate(zip(ours, theirs, strict=False)) if one[0] != one[1]
        ]
        first = wrong[0] if wrong else 0
        what = f"Layer {first} would run {words[not ours[first]]}, and was trained {words[ours[first]]}"
        advice = "Write is_causal at the top and dflash_config.causal, both"
        if len(set(ours)) > 1 or theirs == [False] * len(theirs):
            advice = _NOT_HERE
        return Finding(what, theirs, ours, advice)

    return check


def _by_types(draft: StoredDraft, flag: Any) -> list[bool]:
    """Return a flag for every layer; without one, sliding layers are causal."""
    if isinstance(flag, bool):
        return [flag] * draft.layers
    if draft.is_muse:
        return [False] * draft.layers
    return [one == SLIDING for one in draft.layer_types] or [False] * draft.layers


def _top_flag(draft: StoredDraft) -> list[bool]:
    return _by_types(draft, draft.top("is_causal"))


def _either_flag(draft: StoredDraft) -> list[bool]:
    top = draft.top("is_causal")
    return _by_types(draft, draft.inner("causal") if top is None else top)


def _by_types_alone(draft: StoredDraft) -> list[bool]:
    return _by_types(draft, None)


def _inner_first(draft: StoredDraft) -> list[bool]:
    flags = (draft.inner("causal"), draft.top("dflash_query_causal"), draft.top("is_causal"))
    return [bool(next((flag for flag in flags if flag is not None), False))] * draft.layers


def _never(draft: StoredDraft) -> list[bool]:
    return [False] * draft.layers


def _unless_said(draft: StoredDraft) -> list[bool]:
    top, inner = draft.top("is_causal"), draft.inner("causal")
    flag = inner if top is None else top
    return [bool(flag)] * draft.layers


_OF_HEADS = {
    "dflash2": ("attention_conv", "mlp_conv", "candidate_selector."),
    "dspark": ("markov_head.", "confidence_head."),
    "domino": ("prefix_gru.", "embed_proj."),
}
"""Head -> parts of the names of its tensors that engines know."""


def _strict(*heads: str, shipped: tuple[str, ...] = ()) -> Check:
    """Find tensors that a reader which takes no unknown ones does not know.

    Args:
        heads: whose tensors it knows besides those of the body.
        shipped: tensors of a vocabulary that it takes.
    """
    parts = [part for head in heads for part in _OF_HEADS[head]]

    def check(draft: StoredDraft) -> Finding | None:
        unknown = [
            name for name in draft.further_tensors if not any(part in name for part in parts)
        ]
        unknown += [name for name in draft.ships if name not in shipped]
        if not unknown or draft.is_speculators:
            return None
        what = f"Tensors that this reader does not know are an error: {listed(unknown)}"
        return Finding(
            what, sorted(unknown), parts, "Leave them out if the draft does not need them"
        )

    return check


def _no_head(*heads: str, verb: str = "does not run") -> Check:
    """Find a kind of draft that an engine does not run."""

    def check(draft: StoredDraft) -> Finding | None:
        if draft.head not in heads:
            return None
        what = f"This is a draft of the kind {draft.head}, which this engine {verb}"
        return Finding(what, draft.head, "another kind", _NOT_HERE)

    return check


def _reduced(draft: StoredDraft) -> Finding | None:
    """Find a reduced vocabulary, for engines that ignore its tables of ids."""
    if not draft.is_reduced:
        return None
    what = "The draft predicts a reduced vocabulary; d2t and its own head are ignored, so ids mean other tokens"
    return Finding(what, draft.ships, "the target's whole vocabulary", "Serve it with vLLM")


def _anchor_unread(draft: StoredDraft) -> Finding | None:
    """Find a draft that predicts from its anchor, of a kind whose anchor predicts nothing in engines."""
    nested = bool(draft.inner("sample_from_anchor"))
    if draft.is_speculators or draft.head not in ("dflash", "dflash2"):
        return None
    if not nested and not draft.top("sample_from_anchor"):
        return None
    what = "sample_from_anchor is true, and the anchor's position is taken to predict nothing"
    return Finding(what, True, False, "Decode it with dflash-hub")


def _dangling(draft: StoredDraft) -> Finding | None:
    """Find an entry of auto_map whose file is not there."""
    for name, reference in draft.auto_map.items():
        file = f"{str(reference).rpartition('.')[0]}.py"
        if name and "--" not in str(reference) and draft.files and file not in draft.files:
            what = f"auto_map names {file} for {name}, and there is no such file"
            advice = "Load the draft with load_draft and save it, which writes the code too"
            return Finding(what, reference, file, advice)
    return None


# vLLM ----------------------------------------------------------------------------------------------------------------

_VLLM_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel", "LiLiCorrDraftModel"),
    *("MuseGlimmerAssistantModel", "DFlashMuseGlimmerAssistantModel", "DFlashLagunaForCausalLM"),
    *("Qwen3XPressModel", "DFlashQwen3XPressModel", "K3DSparkModel", "DSparkDraftModel"),
    *("Qwen3DSparkModel", "Qwen3OmniDSparkModel", "Gemma4DSparkModel", "MuseSparkDSparkModel"),
)


def _null_nested(draft: StoredDraft) -> Finding | None:
    if "dflash_config" not in draft.config or draft.top("dflash_config") is not None:
        return None
    return Finding("dflash_config is null, and its update fails", None, "a dict", "Remove the key")


def _prefixed(draft: StoredDraft) -> Finding | None:
    found = [name for name in draft.tensors if name.startswith("model.")]
    if not found:
        return None
    what = (
        f"Names begin with `model.`, which the loader adds itself or does not know: {listed(found)}"
    )
    return Finding(
        what, sorted(found), "no prefix", "Load the draft with load_draft and save it again"
    )


def _reduced_without_table(draft: StoredDraft) -> Finding | None:
    if not draft.is_reduced or not draft.tensors or "d2t" in draft.ships:
        return None
    what = f"draft_vocab_size is {draft.either('draft_vocab_size')}, and there is no tensor d2t"
    return Finding(what, draft.ships, "d2t", "Export the draft with its table of ids")


def _scalar_heads_top(draft: StoredDraft) -> Finding | None:
    """Find a DFlash 2 draft whose fields are not all in dflash_config."""
    keys = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    missing = [key for key in keys if draft.inner(key) is None]
    if draft.head != "dflash2" or draft.is_speculators or not missing:
        return None
    what = f"dflash_config lacks {listed(missing)}"
    return Finding(what, missing, keys, _ENGINES_LAYOUT)


def _speculators_causal(draft: StoredDraft) -> Finding | None:
    dflash = draft.top("speculators_model_type") == "dflash"
    all_slide = bool(draft.layer_types) and {*draft.layer_types} == {SLIDING}
    if not dflash or draft.top("sliding_window_non_causal") is not False or all_slide:
        return None
    what = (
        "sliding_window_non_causal is false, which 0.26 to 0.33 take for causal blocks in every layer; full layers of "
        "speculators are bidirectional"
    )
    advice = "Write sliding_window_non_causal: true (see vLLM pull request 56692)"
    return Finding(what, draft.top("sliding_window_non_causal"), True, advice)


def _speculators_anchor(draft: StoredDraft) -> Finding | None:
    dflash = draft.top("speculators_model_type") == "dflash"
    if not dflash or not draft.top("sample_from_anchor"):
        return None
    what = "sample_from_anchor is true, which is refused for dflash"
    return Finding(what, True, False, "Train it without, or as dspark")


def _speculators_untyped(draft: StoredDraft) -> Finding | None:
    if not draft.is_speculators or draft.top("speculators_model_type"):
        return None
    what = "speculators_config is there, and speculators_model_type is not"
    return Finding(what, None, "dflash", "Write speculators_model_type")


def _speculators_lacking(draft: StoredDraft) -> Finding | None:
    keys = ("mask_token_id", "aux_hidden_state_layer_ids")
    missing = [key for key in keys if draft.top(key) is None]
    if not draft.is_speculators or not missing:
        return None
    what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return Finding(what, None, keys, "Export the draft with a newer release of speculators")


def _other_markov(draft: StoredDraft) -> Finding | None:
    """Find a Markov head that is not a plain table, for engines that run that one alone."""
    head = draft.either("markov_head_type")
    if head in (None, "vanilla") or not draft.uses("markov_rank"):
        return None
    what = f"markov_head_type is {shown(head)}, and only 'vanilla' runs here"
    return Finding(what, head, "vanilla", "Serve it with SGLang")


def _flat_dspark(draft: StoredDraft) -> Finding | None:
    """Find Model Optimizer's names of DSpark tensors."""
    flat = [name for name in draft.tensors if name.startswith(("markov_w", "confidence_proj"))]
    if not flat:
        return None
    what = f"The DSpark head has names of its own: {listed(flat)}"
    return Finding(what, flat, "markov_head.*, confidence_head.*", "Rename the tensors")


def _other_width(draft: StoredDraft) -> Finding | None:
    ours, theirs = draft.top("hidden_size"), draft.target_hidden_size
    if theirs is None or ours is None or ours == theirs:
        return None
    what = f"hidden_size is {ours}, and the target's is {theirs}"
    return Finding(what, ours, theirs, "Use the draft that was made for this target")


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
        Rule("model-type", REFUSES, _VLLM_CONFIG, _unregistered),
        Rule(
            "architecture", REFUSES, "vllm/model_executor/models/registry.py", _knows(*_VLLM_KNOWN)
        ),
        Rule("speculators-type", REFUSES, f"{_VLLM_SPECULATORS}base.py", _speculators_untyped),
        Rule("speculators-fields", REFUSES, f"{_VLLM_SPECULATORS}algos.py", _speculators_lacking),
        Rule("speculators-anchor", REFUSES, _VLLM_SPECULATOR, _speculators_anchor),
        Rule("speculators-causal", WRONG, f"{_VLLM_SPECULATORS}algos.py", _speculators_causal),
        Rule("null-config", REFUSES, "vllm/config/speculative.py", _null_nested),
        Rule(
            "mask-token",
            REFUSES,
            "vllm/v1/worker/gpu/spec_decode/utils.py",
            _needs("dflash_config.mask_token_id", "mask_token_id", "pard_token", "ptd_token_id"),
        ),
        Rule(
            "taps",
            WRONG,
            "vllm/v1/worker/gpu/spec_decode/eagle/eagle3_utils.py",
            _needs(
                "dflash_config.target_layer_ids",
                "target_layer_ids",
                "eagle_aux_hidden_state_layer_ids",
                consequence=", so the layers that EAGLE-3 taps are taken",
            ),
        ),
        Rule("window", REFUSES, _VLLM_MODEL, _nulled_window_alone),
        Rule("causality", WRONG, _VLLM_MODEL, _expects_causal(_either_flag)),
        Rule("prefix", REFUSES, _VLLM_MODEL, _prefixed),
        Rule(
            "tensors",
            REFUSES,
            _VLLM_MODEL,
            _strict("dflash2", "dspark", shipped=StoredDraft.vocabulary_tensors),
        ),
        Rule("reduced-vocabulary", REFUSES, _VLLM_MODEL, _reduced_without_table),
        Rule("dflash2-fields", REFUSES, _VLLM_MODEL, _scalar_heads_top),
        Rule("domino", REFUSES, _VLLM_MODEL, _no_head("domino")),
        Rule("dspark-names", REFUSES, _VLLM_DSPARK, _flat_dspark),
        Rule("markov-head", REFUSES, _VLLM_DSPARK, _other_markov),
        Rule("anchor", WRONG, _VLLM_SPECULATOR, _anchor_unread),
        Rule("width", REFUSES, _VLLM_MODEL, _other_width),
    ),
)

# SGLang --------------------------------------------------------------------------------------------------------------

_SGLANG_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel", "LiLiCorrDraftModel"),
    *("MiniMaxDFlash2DraftModel", "MuseGlimmerAssistantModel", "DFlashLagunaForCausalLM"),
    *("Qwen3DSparkModel", "DSparkDraftModel", "LingDSparkModel", "Lfm2DSparkDraftModel"),
)


def _unscaled(draft: StoredDraft) -> Finding | None:
    scale = draft.either("input_embedding_scale")
    if scale in (None, 1, 1.0):
        return None
    what = f"input_embedding_scale is {scale:g}, which is not read: the draft runs on unscaled embeddings"
    return Finding(what, scale, 1, "Serve it with vLLM or llama.cpp")


def _own_vocabulary(draft: StoredDraft) -> Finding | None:
    """Find a trained embedding or head of the draft's own, for engines that take the target's."""
    for key in ("has_own_lm_head", "has_lm_head", "train_embed_tokens"):
        if draft.uses(key):
            what = f"{key} is on, and the target's embedding and head are used all the same"
            return Finding(what, True, False, "Serve it with vLLM")
    return None


def _wide_taps(draft: StoredDraft) -> Finding | None:
    ours, taps = draft.top("hidden_size"), draft.either("target_hidden_size")
    if taps in (None, ours) or draft.is_speculators:
        return None
    what = f"target_hidden_size is {taps}, and the feature projection is taken to be taps x hidden_size ({ours})"
    return Finding(what, taps, ours, "Serve it with vLLM")


def _raw_taps_of_muse(draft: StoredDraft) -> Finding | None:
    muse = str(draft.target_type or "").startswith("muse_glimmer")
    if not muse or draft.architecture != "DFlashDraftModel":
        return None
    what = (
        "For Muse targets the architecture DFlashDraftModel has its taps taken one layer too early"
    )
    advice = "Write it in the Muse layout, or as DFlash2DraftModel if it is one"
    return Finding(what, draft.architecture, "MuseGlimmerAssistantModel", advice)


_SGLANG_UTILS = "sglang/srt/speculative/dflash_utils.py"
_SGLANG_MODEL = "sglang/srt/models/dflash.py"
_SGLANG_CONFIG = "sglang/srt/utils/hf_transformers/config.py"
_SGLANG = Engine(
    "sglang",
    "SGLang",
    "0.5.23",
    (
        Rule("speculators", REFUSES, _SGLANG_CONFIG, _speculators),
        Rule("model-type", REFUSES, _SGLANG_CONFIG, _unregistered),
        Rule("architecture", REFUSES, _SGLANG_MODEL, _knows(*_SGLANG_KNOWN)),
        Rule(
            "taps",
            WRONG,
            _SGLANG_UTILS,
            _needs(
                "dflash_config.target_layer_ids",
                "target_layer_ids",
                consequence=", so taps are guessed by a formula",
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _SGLANG_UTILS,
            _needs(
                "dflash_config.mask_token_id",
                "mask_token_id",
                consequence=", so the token <|MASK|> is looked for",
            ),
        ),
        Rule(
            "block-size",
            WRONG,
            _SGLANG_UTILS,
            _needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window", REFUSES, _SGLANG_MODEL, _nulled_window),
        Rule("window-unseen", WRONG, _SGLANG_MODEL, _window_unseen),
        Rule("causality", WRONG, _SGLANG_MODEL, _expects_causal(_top_flag)),
        Rule("reduced-vocabulary", WRONG, _SGLANG_MODEL, _reduced),
        Rule("own-vocabulary", WRONG, _SGLANG_MODEL, _own_vocabulary),
        Rule("embedding-scale", WRONG, _SGLANG_MODEL, _unscaled),
        Rule("tap-width", REFUSES, _SGLANG_MODEL, _wide_taps),
        Rule("muse-taps", WRONG, _SGLANG_MODEL, _raw_taps_of_muse),
        Rule("dflash2-fields", WRONG, _SGLANG_UTILS, _scalar_heads_top),
        Rule("dspark-names", WRONG, _SGLANG_MODEL, _flat_dspark),
        Rule("anchor", WRONG, "sglang/srt/speculative/dflash_worker_v2.py", _anchor_unread),
        Rule("width", REFUSES, _SGLANG_MODEL, _other_width),
    ),
)

# TensorRT-LLM --------------------------------------------------------------------------------------------------------


def _needs_both_windows(draft: StoredDraft) -> Finding | None:
    """Find a window that is not named in both places that must agree."""
    both = bool(draft.inner("use_swa")) and draft.names_sliding_layers
    if not draft.slides or both or draft.is_speculators:
        return None
    what = (
        "A layer slides only if dflash_config.use_swa is on and its entry of layer_types is "
        f"{SLIDING!r}; one of the two is missing, so all attention is full"
    )
    return Finding(what, draft.layer_types, [SLIDING], _WINDOW)


def _no_backbone(draft: StoredDraft) -> Finding | None:
    if not draft.is_muse:
        return None
    what = f"There is no backbone for model_type {draft.model_type!r}"
    return Finding(what, draft.model_type, "qwen3", _ENGINES_LAYOUT)


_TRTLLM_MODEL = "tensorrt_llm/_torch/models/modeling_dflash.py"
_TRTLLM_SPEC = "tensorrt_llm/_torch/speculative/dflash.py"
_TRTLLM = Engine(
    "tensorrt-llm",
    "TensorRT-LLM",
    "1.3.0rc (PyTorch backend)",
    (
        Rule("speculators", REFUSES, _TRTLLM_MODEL, _speculators),
        Rule("model-type", REFUSES, _TRTLLM_MODEL, _unregistered),
        Rule("backbone", REFUSES, _TRTLLM_MODEL, _no_backbone),
        Rule(
            "taps",
            REFUSES,
            _TRTLLM_SPEC,
            _needs(
                "dflash_config.target_layer_ids",
                advice="Pass target_layer_ids in the DFlashDecodingConfig, or write the engines layout",
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _TRTLLM_SPEC,
            _needs(
                "dflash_config.mask_token_id",
                "mask_token_id",
                consequence=", so vocab_size is taken, which is no row",
            ),
        ),
        Rule("window", WRONG, _TRTLLM_MODEL, _needs_both_windows),
        Rule("causality", WRONG, _TRTLLM_MODEL, _expects_causal(_never)),
        Rule("reduced-vocabulary", WRONG, _TRTLLM_MODEL, _reduced),
        Rule(
            "heads",
            WRONG,
            _TRTLLM_MODEL,
            _no_head("domino", "dspark", verb="runs without its head"),
        ),
        Rule("own-vocabulary", WRONG, _TRTLLM_MODEL, _own_vocabulary),
        Rule("anchor", WRONG, _TRTLLM_SPEC, _anchor_unread),
    ),
)

# llama.cpp -----------------------------------------------------------------------------------------------------------

_LLAMACPP_KNOWN = (
    *("DFlashDraftModel", "DFlash2DraftModel", "Qwen3DSparkModel", "DSparkDraftModel"),
    *("DSparkSpeculator", "Gemma4DSparkModel", "MuseGlimmerAssistantModel", "LingDSparkModel"),
    *("Lfm2DSparkDraftModel", "DeepseekV4DSparkModel"),
)


def _speculators_but_dspark(draft: StoredDraft) -> Finding | None:
    if draft.top("speculators_model_type") == "dspark":
        return None
    return _speculators(draft)


def _needs_a_window_switch(draft: StoredDraft) -> Finding | None:
    switched = draft.top("use_sliding_window") is True or bool(draft.inner("use_swa"))
    other_converter = draft.is_speculators or draft.is_muse
    if not draft.names_sliding_layers or switched or other_converter:
        return None
    what = "layer_types slide only if use_sliding_window or dflash_config.use_swa is true; all would be full"
    return Finding(what, False, True, _WINDOW)


def _nested_mask(draft: StoredDraft) -> Finding | None:
    of_dflash = draft.architecture in ("DFlashDraftModel", "DFlash2DraftModel")
    if not of_dflash or "mask_embedding.pt" in draft.files:
        return None
    consequence = ", so no mask token is written for the draft"
    return _needs("dflash_config.mask_token_id", consequence=consequence)(draft)


def _llamacpp_tensors(draft: StoredDraft) -> Finding | None:
    """Find tensors that the converter does not map; it takes tables of ids for DSpark alone."""
    shipped = StoredDraft.vocabulary_tensors[: 4 if draft.head == "dspark" else 2]
    return _strict("dflash2", "dspark", shipped=shipped)(draft)


_CONVERSION = "conversion/qwen.py"
_LLAMACPP = Engine(
    "llama.cpp",
    "llama.cpp",
    "ggml-org/llama.cpp@0c1e57098",
    (
        Rule("speculators", REFUSES, _CONVERSION, _speculators_but_dspark),
        Rule("architecture", REFUSES, "conversion/__init__.py", _knows(*_LLAMACPP_KNOWN)),
        Rule("mask-token", REFUSES, _CONVERSION, _nested_mask),
        Rule(
            "taps",
            REFUSES,
            _CONVERSION,
            _needs("dflash_config.target_layer_ids", "target_layer_ids"),
        ),
        Rule(
            "block-size",
            WRONG,
            _CONVERSION,
            _needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window", WRONG, _CONVERSION, _needs_a_window_switch),
        Rule("causality", WRONG, "common/speculative.cpp", _expects_causal(_unless_said)),
        Rule("tensors", REFUSES, _CONVERSION, _llamacpp_tensors),
        Rule("dflash2-fields", REFUSES, _CONVERSION, _scalar_heads_top),
        Rule("markov-head", REFUSES, _CONVERSION, _other_markov),
        Rule("anchor", WRONG, _CONVERSION, _anchor_unread),
        Rule("domino", REFUSES, _CONVERSION, _no_head("domino")),
    ),
)

# transformers --------------------------------------------------------------------------------------------------------


def _no_class(draft: StoredDraft) -> Finding | None:
    """Find that the Auto class takes the class of another model, silently."""
    native = draft.model_type in CONFIG_MAPPING_NAMES and not draft.is_muse
    if not native or "AutoModel" in draft.auto_map:
        return None
    what = (
        f"auto_map names no class, so AutoModel takes that of model_type {draft.model_type!r}: fc and hidden_norm are "
        "dropped, and the embedding is random"
    )
    return Finding(what, draft.auto_map, "AutoModel", "Load it with dflash_hub.load_draft")


def _no_config_class(draft: StoredDraft) -> Finding | None:
    return None if "AutoConfig" in draft.auto_map else _unregistered(draft)


def _no_code(draft: StoredDraft) -> Finding | None:
    """Find that the class of the draft does not have what `generate` calls."""
    if draft.is_muse or draft.is_speculators:
        return None
    reference = str(draft.auto_map.get("AutoModel") or "")
    if f"{reference.rpartition('.')[0]}.py" in draft.own_code:
        return None
    what = "The class of this draft is neither transformers' own nor dflash-hub's, so it lacks what generate calls"
    advice = (
        "Use custom_generate=draft.speculate with dflash-hub, or save the draft with dflash-hub"
    )
    return Finding(what, reference, "a class with noise_embeds", advice)


_GENERATOR = "transformers/generation/candidate_generator.py"
_AUTO = "transformers/models/auto/auto_factory.py"
_AUTOMODEL = Engine(
    "transformers",
    "transformers, AutoModel with trust_remote_code",
    "5.23.0",
    (
        Rule(
            "speculators", REFUSES, "transformers/models/auto/configuration_auto.py", _speculators
        ),
        Rule(
            "model-type",
            REFUSES,
            "transformers/models/auto/configuration_auto.py",
            _no_config_class,
        ),
        Rule("class", WRONG, _AUTO, _no_class),
        Rule("code", REFUSES, "transformers/dynamic_module_utils.py", _dangling),
        Rule("window", WRONG, "transformers/models/qwen3/configuration_qwen3.py", _nulled_window),
    ),
)
_NATIVE = Engine(
    "transformers-generate",
    'transformers, generate(assistant_model=draft, speculation_type="dflash")',
    "5.23.0",
    (
        *_AUTOMODEL.rules,
        Rule("interface", REFUSES, _GENERATOR, _no_code),
        Rule("taps", REFUSES, _GENERATOR, _needs("target_layer_ids")),
        Rule("mask-token", REFUSES, _GENERATOR, _needs("mask_token_id")),
        Rule("block-size", REFUSES, _GENERATOR, _needs("block_size")),
        Rule("anchor", WRONG, _GENERATOR, _anchor_unread),
        Rule(
            "heads",
            WRONG,
            _GENERATOR,
            _no_head("dflash2", "domino", "dspark", verb="runs without its head"),
        ),
    ),
)

# MLX -----------------------------------------------------------------------------------------------------------------


def _needs_a_package(draft: StoredDraft) -> Finding | None:
    named = isinstance(draft.top("dflash_config"), dict)
    muse = draft.is_muse and not named
    own = draft.head in ("dspark", "dflash2") and named
    if draft.is_speculators or muse or own or (named and draft.model_type in ("qwen3", "gemma4")):
        return None
    package = f"{draft.model_type}_dflash" if named else draft.model_type
    what = f"A drafter {package!r} is looked for, and there is none"
    return Finding(what, draft.model_type, "qwen3, with a dflash_config", _ENGINES_LAYOUT)


_MLX_MODEL = "dflash/model_mlx.py"
_ZLAB_MLX = Engine(
    "dflash-zlab-mlx",
    "dflash (z-lab, MLX)",
    "0.1.0",
    (
        Rule("speculators", REFUSES, _MLX_MODEL, _speculators),
        Rule("head-dim", REFUSES, _MLX_MODEL, _needs("head_dim")),
        Rule("anchor", WRONG, _MLX_MODEL, _anchor_unread),
        Rule("layers", REFUSES, _MLX_MODEL, _needs("num_target_layers")),
        Rule("taps", REFUSES, _MLX_MODEL, _needs("dflash_config.target_layer_ids")),
        Rule("mask-token", REFUSES, _MLX_MODEL, _needs("dflash_config.mask_token_id")),
        Rule(
            "rope",
            WRONG,
            _MLX_MODEL,
            _needs("rope_theta", "rope_parameters", consequence=", so 10000 is taken"),
        ),
        Rule(
            "block-size",
            WRONG,
            _MLX_MODEL,
            _needs("dflash_config.block_size", "block_size", consequence=", so 16 is taken"),
        ),
        Rule("window-unseen", WRONG, _MLX_MODEL, _window_unseen),
        Rule("causality", WRONG, _MLX_MODEL, _expects_causal(_top_flag)),
        Rule("tensors", REFUSES, _MLX_MODEL, _strict("dflash2")),
        Rule("prefix", REFUSES, _MLX_MODEL, _prefixed),
        Rule("heads", REFUSES, _MLX_MODEL, _no_head("domino", "dspark")),
    ),
)
_BST_MODEL = "dflash_mlx/model.py"
_BST_MLX = Engine(
    "dflash-mlx",
    "dflash-mlx (bstnxbt)",
    "0.1.8",
    (
        Rule("speculators", REFUSES, _BST_MODEL, _speculators),
        Rule("rope", REFUSES, _BST_MODEL, _needs("rope_theta")),
        Rule("block-size", REFUSES, _BST_MODEL, _needs("block_size")),
        Rule("layers", REFUSES, _BST_MODEL, _needs("num_target_layers")),
        Rule("tie", REFUSES, _BST_MODEL, _needs("tie_word_embeddings")),
        Rule("head-dim", REFUSES, _BST_MODEL, _needs("head_dim")),
        Rule("anchor", WRONG, _BST_MODEL, _anchor_unread),
        Rule(
            "taps",
            WRONG,
            _BST_MODEL,
            _needs(
                "dflash_config.target_layer_ids", consequence=", so taps are spread by a formula"
            ),
        ),
        Rule(
            "mask-token",
            WRONG,
            _BST_MODEL,
            _needs("dflash_config.mask_token_id", consequence=", so token 0 is taken"),
        ),
        Rule("window-unseen", WRONG, _BST_MODEL, _window_unseen),
        Rule("causality", WRONG, _BST_MODEL, _expects_causal(_by_types_alone)),
        Rule("tensors", REFUSES, _BST_MODEL, _strict()),
        Rule("prefix", REFUSES, _BST_MODEL, _prefixed),
        Rule("heads", REFUSES, _BST_MODEL, _no_head("dflash2", "domino", "dspark")),
    ),
)


def _needs_block_size_at_top(draft: StoredDraft) -> Finding | None:
    if draft.head != "dflash":  # whose drafters have configs of their own
        return None
    return _needs("block_size", consequence=" at the top, so 16 is taken")(draft)


_VLM_MODEL = "mlx_vlm/speculative/drafters/qwen3_dflash/config.py"
_VLM_WEIGHTS = "mlx_vlm/speculative/drafters/qwen3_dflash/dflash.py"
_MLX_VLM = Engine(
    "mlx-vlm",
    "mlx-vlm",
    "0.7.10",
    (
        Rule("speculators", REFUSES, "mlx_vlm/utils.py", _speculators),
        Rule("drafter", REFUSES, "mlx_vlm/utils.py", _needs_a_package),
        Rule("anchor", WRONG, _VLM_WEIGHTS, _anchor_unread),
        Rule(
            "block-size",
            WRONG,
            _VLM_MODEL,
            _needs_block_size_at_top,
        ),
        Rule("window-unseen", WRONG, _VLM_MODEL, _window_unseen),
        Rule("causality", WRONG, _VLM_MODEL, _expects_causal(_inner_first)),
        Rule(
            "tensors",
            REFUSES,
            _VLM_WEIGHTS,
            _strict("dflash2", "dspark", shipped=("embed_tokens.weight",)),
        ),
        Rule("domino", REFUSES, "mlx_vlm/utils.py", _no_head("domino")),
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
