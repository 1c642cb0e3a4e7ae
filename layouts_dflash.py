# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read and write drafts in the hub and the engines layout, and define which values each field may hold.

This file travels with every pushed draft, and works on plain dicts. `layouts.py` reads every other published layout;
it stays in the package.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from .findings_dflash import ONE_SENTENCE, Finding, must, raise_first

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
DTYPES = ("bfloat16", "float16", "float32", "float64")


# The kinds of drafts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftLayout:
    """List the fields that a kind of draft adds to a config.json.

    Args:
        fields: required fields that only this kind has. They may stand at the top or in dflash_config.
        required: fields of all kinds that this kind requires.
        scales: optional fields that it adds; 1 means unused. They may stand in the same two places.
        mirrored: further fields that engines read in dflash_config too.
        optional: further fields that only this kind has, which a file may lack. They stand where `fields` do.
        on_top: those of `fields` and `optional` that engines read at the top too.
        engines_architecture: the name of its class in engines, where it is not that of its own.
        renamed: field -> its key in dflash_config, where engines have a name of their own for it.
        projectors: names of this kind in the key projector_type of dflash_config; the first is written.
        anchor_predicts: whether engines run drafts of this kind that predict from the anchor.
    """

    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    mirrored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    on_top: tuple[str, ...] = ()
    engines_architecture: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    projectors: tuple[str, ...] = ()
    anchor_predicts: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The fields that only this kind has."""
        return (*self.fields, *self.optional)


_DSPARK_FIELDS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)

DRAFT_LAYOUTS = {
    "dflash": DraftLayout(),
    "dspark": DraftLayout(
        fields=_DSPARK_FIELDS[:1],
        optional=_DSPARK_FIELDS[1:],
        on_top=_DSPARK_FIELDS,
        engines_architecture="Qwen3DSparkModel",
        anchor_predicts=True,
    ),
    "dflash2": DraftLayout(
        fields=("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
        required=("vocab_size",),
        scales=("output_multiplier", "input_embedding_scale"),
        mirrored=("final_logit_softcapping",),
    ),
    "domino": DraftLayout(
        fields=("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"),
        required=("vocab_size", "sample_from_anchor"),
        on_top=("emb_dim",),
        engines_architecture="DFlashDraftModel",
        renamed={"sample_from_anchor": "shift_label"},
        projectors=("domino", "causal_v5"),
        anchor_predicts=True,
    ),
}
"""The kinds by name, which is their `model_type` in the hub layout. The first is the one that others extend."""
BASE = next(iter(DRAFT_LAYOUTS))


# Which values are valid -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldRule:
    """Define which values a field may hold: `words` for error messages, and the test `accepts`, cheap for any value."""

    words: str
    accepts: Callable[[Any], bool]


def int_from(low: int, high: int, step: int = 1) -> FieldRule:
    """Accept multiples of `step` from `low` to `high`."""

    def accepts(value: Any) -> bool:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int and low <= value <= high and value % step == 0

    return FieldRule(f"an {'int' if step == 1 else 'even int'} from {low} to {high}", accepts)


def _number(low: float, high: float) -> FieldRule:
    """Accept finite numbers from `low` to `high`."""

    def accepts(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high

    return FieldRule(f"a number from {low:g} to {high:g}", accepts)


def _positive(high: float) -> FieldRule:
    """Accept finite numbers above 0, up to `high`."""
    number = _number(0, high)
    return FieldRule(
        f"a number above 0, at most {high:g}", lambda value: number.accepts(value) and value != 0
    )


def list_of(words: str, item: FieldRule, longest: int = 1000, ascending: bool = False) -> FieldRule:
    """Accept lists of 1 to `longest` items, strictly ascending if that is required."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list) or not 0 < len(value) <= longest:
            return False
        if not all(map(item.accepts, value)):
            return False
        return not ascending or all(a < b for a, b in pairwise(value))

    return FieldRule(words, accepts)


def _choice(names: tuple[str, ...]) -> FieldRule:
    return FieldRule(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str | torch.dtype) and str(value).removeprefix("torch.") in DTYPES


def _is_activation(value: Any) -> bool:
    from transformers.activations import ACT2FN  # slow to import

    return isinstance(value, str) and value in ACT2FN


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)


BOOL = FieldRule("True or False", lambda value: isinstance(value, bool))
DICT = FieldRule("a dict", lambda value: isinstance(value, dict))
STR = FieldRule("a string", lambda value: isinstance(value, str))
LAYERS = 1000
_WIDTH = int_from(1, 2**20)
_HEADS = int_from(1, 4096)
_POSITIONS = int_from(1, 2**30)
_ID = int_from(0, 2**24 - 1)
_FACTOR = _positive(1e6)
_FACTORS = list_of("a list of numbers above 0", _FACTOR, longest=2**16)
_BOOLS = list_of("a list of True or False", BOOL, LAYERS)

# Field -> its rule. Upper bounds exceed every real draft, yet refuse sizes that would exhaust memory.
FIELDS = {
    "block_size": int_from(2, 1024),
    "mask_token_id": _ID,
    "target_layer_ids": list_of(
        "a list of 0-based layers of the target, ints, at least one, ascending",
        int_from(0, LAYERS - 1),
        ascending=True,
    ),
    "num_target_layers": int_from(1, LAYERS),
    "target_hidden_size": _WIDTH,
    "is_causal": FieldRule(
        "True or False, or a list of them, one per layer",
        lambda value: BOOL.accepts(value) or _BOOLS.accepts(value),
    ),
    "layer_types": list_of(
        f"a list of {FULL!r} or {SLIDING!r}, one per layer", _choice((FULL, SLIDING)), LAYERS
    ),
    "sliding_window": _POSITIONS,
    "window_from_anchor": BOOL,
    "rope_parameters": DICT,
    "rope_theta": _positive(1e15),
    "sample_from_anchor": BOOL,
    "vocab_size": int_from(1, 2**24),
    "draft_vocab_size": int_from(1, 2**24),
    "has_own_embed_tokens": BOOL,
    "has_own_lm_head": BOOL,
    "unscaled_embeddings": BOOL,
    "has_own_mask_embedding": BOOL,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": int_from(1, LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": int_from(2, 2**14, step=2),
    "hidden_act": FieldRule(
        "the name of an activation that transformers has, such as 'silu'", _is_activation
    ),
    "rms_norm_eps": _positive(1),
    "max_position_embeddings": _POSITIONS,
    "initializer_range": _number(0, 1e3),
    "attention_bias": BOOL,
    "attention_dropout": _number(0, 1),
    "final_logit_softcapping": _number(0, 1e6),
    "tie_word_embeddings": BOOL,
    "use_cache": BOOL,
    "dtype": FieldRule(f"one of {', '.join(DTYPES)}", _is_dtype),
    "conv_kernel_size": int_from(1, 1024),
    "conv_group_size": _WIDTH,
    "selector_rank": _WIDTH,
    "selector_top_k": int_from(1, 2**16),
    "output_multiplier": _FACTOR,
    "input_embedding_scale": _FACTOR,
    "markov_rank": int_from(0, 2**20),
    "markov_head_type": _choice(("vanilla", "gated", "rnn")),
    "enable_confidence_head": BOOL,
    "confidence_head_with_markov": BOOL,
    "emb_dim": _WIDTH,
    "gru_hidden_dim": _WIDTH,
    "pure_draft_prefix_len": int_from(0, 1024),
    # No fields of a draft, but transformers stores them on every config.
    "architectures": FieldRule(
        "a list of names of classes",
        lambda value: (
            isinstance(value, list) and len(value) <= 1000 and all(map(STR.accepts, value))
        ),
    ),
    "model_type": STR,
    "rope_scaling": DICT,
    "num_labels": int_from(0, 2**20),
    "id2label": FieldRule("a dict of ids to names", _is_labels),
}
# Key of a rope dict -> its rule. The mrope keys of image models are allowed: they do not change text positions.
ROPE = {
    "rope_type": _choice(ROPE_TYPES),
    "rope_theta": FIELDS["rope_theta"],
    "original_max_position_embeddings": _POSITIONS,
    "truncate": BOOL,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "mrope_section": list_of("a list of ints from 0 up", _ID),
    "mrope_interleaved": BOOL,
    **dict.fromkeys(
        ("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), _FACTOR
    ),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), _number(0, 1e6)),
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def shown(value: Any, longest: int = 160) -> str:
    """Return `repr(value)`, shortened where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits, or lists nested too deep
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= longest else f"{text[:longest]} ..."


def check_field(field: str, value: Any, rule: FieldRule | None = None) -> None:
    """Refuse a value that its field may not hold.

    Raises:
        ValueError: with the field, the value, and the valid values.
    """
    raise_first(field_findings(field, value, rule=rule))


def field_findings(
    field: str, value: Any, found: str | None = None, rule: FieldRule | None = None
) -> Iterator[Finding]:
    """Yield a finding if a field may not hold this value.

    By default, its message begins with the keyword and its value, and the field's rule in `FIELDS` is used.
    """
    rule = rule or FIELDS[field]
    if not rule.accepts(value):
        advice = f"it must be {rule.words}"
        if found is None:
            found, advice = f"{field} is {shown(value)}", f"{advice} (pass {field}=...)"
        yield Finding(found, value, rule.words, advice, ONE_SENTENCE)


def check_content(config: Any) -> dict[str, Any]:
    """Return the content of a config.json; raise a ValueError if it is no dict."""
    if not isinstance(config, dict):
        raise ValueError(
            f"The draft's config.json is {shown(config)}; it must be a dict of fields."
        )
    return config


def modern_rope(key: str, rope: dict[str, Any] | None) -> dict[str, Any]:
    """Return a rope dict without empty entries, its old key `type` renamed to `rope_type`; {} for None.

    Args:
        key: the key that holds it, for errors.

    Raises:
        ValueError: a key is unknown or has an invalid value, or this package does not run these rotary embeddings.
    """
    if rope is not None:
        check_field(key, rope, rule=DICT)
        raise_first(rope_key_findings(key, rope))
    rope = {name: as_list(value) for name, value in (rope or {}).items() if value is not None}
    rope.pop("partial_rotary_factor", None)
    old_type = rope.pop("type", None)
    if old_type is not None:
        rope["rope_type"] = old_type
    return rope


def rope_key_findings(key: str, rope: dict[str, Any]) -> Iterator[Finding]:
    """Yield unknown and contradicting keys of a rope dict, invalid values, and features that are not here."""
    yield from _unknown_rope_keys(key, rope)
    rope = {name: as_list(value) for name, value in rope.items() if value is not None}
    yield from _rope_features(key, rope)
    old_type = rope.pop("type", None)
    if old_type is not None:
        types = {f"{key}.type": old_type, f"{key}.rope_type": rope.get("rope_type", old_type)}
        yield from contradictions("rope_parameters", types)
        rope.setdefault("rope_type", old_type)
    for name, value in rope.items():
        if name in ROPE and not isinstance(value, dict):
            yield from field_findings(name, value, f"{key}.{name} is {shown(value)}", ROPE[name])


def rope_findings(
    rope: dict[str, Any], head_dim: int, found: str | None = None
) -> Iterator[Finding]:
    """Yield the keys that a whole `rope_parameters` lacks, and the factors that are not one per frequency.

    By default, a message begins with the keyword and its value; with `found`, it begins with that.
    """
    rope_type = rope.get("rope_type", "default")
    for key in _ROPE_NEEDS.get(rope_type, ()):
        if key not in rope:
            what = found or f"rope_parameters is {shown(rope)}"
            what += f": for rope_type {rope_type!r}, {key} is None"
            yield must(what, None, ROPE[key].words)
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if factors is not None and len(factors) != head_dim // 2:
            what = f"rope_parameters.{key} is {shown(factors)}, {len(factors)} numbers"
            right = f"{head_dim // 2}, half of head_dim, {head_dim}"
            yield must(what, factors, right, "hold")


def _unknown_rope_keys(key: str, rope: dict[str, Any]) -> Iterator[Finding]:
    """Yield unknown keys of a rope dict, except nested dicts, which `_rope_features` yields."""
    known = (*ROPE, "type", "partial_rotary_factor", "rope_dim")
    for name, value in rope.items():
        if name not in known and not isinstance(value, dict):
            nearest = difflib.get_close_matches(str(name).lower(), ROPE, n=1)
            advice = f"it must be one of {', '.join(ROPE)}."
            if nearest:
                advice = f"is {nearest[0]} meant?"
            what = f"{key}.{name} is {shown(value)}, but no such key is known, so it is refused"
            yield Finding(what, value, tuple(ROPE), advice, "{what}: {advice}")


def _rope_features(key: str, rope: dict[str, Any]) -> Iterator[Finding]:
    """Yield rotary embeddings of a part of the channels, and different ones by layer."""
    for name, value in rope.items():
        if isinstance(value, dict):
            feature = "rotary embeddings that differ by layer type"
            yield refusal(feature, f"{key}.{name}", value)
    feature = "partial rotary embeddings"
    factor = rope.get("partial_rotary_factor", 1.0)
    if not is_among(factor, (1.0,)):
        yield refusal(feature, f"{key}.partial_rotary_factor", factor, (None, 1.0))
    if "rope_dim" in rope:
        yield refusal(feature, f"{key}.rope_dim", rope["rope_dim"], (None,))


def as_list(value: Any) -> Any:
    """Return a new list for a list or tuple, so that the caller's is never changed; any other value as it is."""
    return list(value) if isinstance(value, list | tuple) else value


def is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Return whether a value is one of `choices`; unlike in Python, True is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices)


def contradictions(
    field: str, values: dict[str, Any], meanings: dict[str, Any] | None = None
) -> Iterator[Finding]:
    """Yield a finding if two keys hold different values of a field.

    Args:
        values: key -> its value in the file, None where it has none.
        meanings: key -> the same value in a form that can be compared; by default `values`.
    """
    values = {key: value for key, value in values.items() if value is not None}
    found = [(meanings or values)[key] for key in values]
    if any(value != found[0] for value in found):
        differing = " but ".join(f"{key} is {shown(value)}" for key, value in values.items())
        what = f"The draft's config.json contradicts itself about {field}: {differing}"
        advice = f"Correct the file, or choose a value: from_pretrained(..., {field}=...)"
        yield Finding(what, values, "equal values", advice)


def refusal(feature: str, key: str, value: Any, unused: tuple[Any, ...] = ()) -> Finding:
    """Return the finding for a feature that this package does not run; `unused` values would turn it off."""
    right = f" (it must be {' or '.join(map(repr, unused))})" if unused else ""
    what = f"This draft uses {feature} ({key} is {shown(value)}), which this version of dflash-hub does not run{right}"
    advice = "it would load and draft nonsense, so it is refused"
    return Finding(what, value, unused, advice, ONE_SENTENCE)


# Our own layouts -------------------------------------------------------------------------------------------------

# Fields that every file must have; all others have a default that is the same in every layout.
REQUIRED = (
    *("block_size", "mask_token_id", "target_layer_ids", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "max_position_embeddings"),
)
_USUAL = (
    *("num_target_layers", "vocab_size", "hidden_act", "initializer_range", "attention_bias"),
    *("attention_dropout", "use_cache"),
)
_RARE = (
    *("target_hidden_size", "is_causal", "window_from_anchor", "sample_from_anchor"),
    *("draft_vocab_size", "has_own_embed_tokens", "has_own_lm_head", "unscaled_embeddings"),
    *("has_own_mask_embedding", "final_logit_softcapping", "dtype", "quantization_config"),
)
DEFAULTED = (*_USUAL, *_RARE)
# Key inside dflash_config of the engines layout -> the key at the top that holds the same value.
_REPEATED = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")
_NESTED = {name: name for name in _REPEATED}
_NESTED |= {
    "causal": "is_causal",
    "use_swa": "use_sliding_window",
    "swa_window_size": "sliding_window",
}
for _layout in DRAFT_LAYOUTS.values():
    _NESTED |= {name: name for name in (*_layout.own, *_layout.scales, *_layout.mirrored)}
    _NESTED |= {key: name for name, key in _layout.renamed.items()}
_NESTED["projector_type"] = "projector_type"


def model_type_of(config: dict[str, Any]) -> Any:
    """Return the `model_type` in the file, which `get_config_dict` renames to `source_model_type`."""
    return config.get("source_model_type", config.get("model_type"))


def read_own_layout(
    config: dict[str, Any], overrides: dict[str, Any], variant: str = BASE
) -> dict[str, Any]:
    """Translate a config.json in the hub or the engines layout into the keywords of its config class.

    A copy of this code in a repository reads these two alone. With dflash_hub imported, `layouts.read_layout` reads
    every layout.

    Args:
        config: the file's content.
        overrides: fields that the caller passes, which replace those of the file or supply missing ones.
        variant: the kind of draft that the file must describe, a name in `DRAFT_LAYOUTS`.

    Raises:
        ValueError: another layout, a missing field, or a copy inside dflash_config that differs.
    """
    raise_first(_own_layout_findings(check_content(config), overrides, variant))
    nested = {_NESTED[key]: value for key, value in (config.get("dflash_config") or {}).items()}
    values = nested | {key: value for key, value in config.items() if value is not None}
    values |= overrides
    kind = DRAFT_LAYOUTS[variant]
    names = [*REQUIRED, *DEFAULTED, *kind.own, *kind.scales]
    names += ["layer_types", "sliding_window", "rope_parameters"]
    fields = {name: values[name] for name in names if values.get(name) is not None}
    if {"rope_theta", "rope_parameters"} & overrides.keys():
        check_field("rope_parameters", fields.get("rope_parameters", {}))
        fields["rope_parameters"] = _with_theta(
            fields.get("rope_parameters", {}), config, overrides
        )
    raise_first(_missing_findings(fields, kind))
    auto_map = own_auto_map(config)
    if auto_map is not None:
        fields["auto_map"] = auto_map
    return fields


def _with_theta(
    rope: dict[str, Any], config: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return `rope` with the caller's theta; with the file's where the caller passes none."""
    stored = (config.get("rope_parameters") or {}).get("rope_theta")
    theta = overrides.get("rope_theta", rope.get("rope_theta", stored))
    return rope | {"rope_theta": theta}


def own_auto_map(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `auto_map` says of the draft's own code, which AutoModel looks for on the config; None for engines.

    Any other entry may name another repository's code, which a push must not pass on.
    """
    auto_map = config.get("auto_map") or {}
    if "AutoConfig" not in auto_map:
        return None
    return {name: auto_map[name] for name in ("AutoConfig", "AutoModel") if name in auto_map}


def _own_layout_findings(
    config: dict[str, Any], overrides: dict[str, Any], variant: str
) -> Iterator[Finding]:
    """Yield why a config.json is in neither of our two layouts, and keys of dflash_config that differ from the top."""
    auto_map = config.get("auto_map") or {}
    entry = str(auto_map.get("AutoModel") if isinstance(auto_map, dict) else auto_map)
    # transformers may put a repository and "--" before the module
    module = entry.rpartition("--")[2].partition(".")[0]
    model_type = model_type_of(config)
    if variant not in (model_type, module):
        yield _unknown(f"model_type is {shown(model_type)}, auto_map is {shown(auto_map)}")
    for key, value in (config.get("dflash_config") or {}).items():
        name = _NESTED.get(key)
        if name is None:
            yield _unknown(f"dflash_config.{key} is {shown(value)}")
        elif name not in overrides:
            values = {name: config.get(name), f"dflash_config.{key}": value}
            yield from contradictions(name, values)


def _missing_findings(fields: dict[str, Any], kind: DraftLayout) -> Iterator[Finding]:
    """Yield the required fields that have no value."""
    for name in (*REQUIRED, *kind.fields, *kind.required, "rope_parameters"):
        if name not in fields:
            advice = (
                f"supply it: from_pretrained(..., {name}=...), or install dflash-hub, which reads every published "
                "layout: pip install dflash-hub"
            )
            what = f"The draft's config.json lacks {name}"
            yield Finding(what, None, "a value", advice, "{what}; {advice}")


def _unknown(found: str) -> Finding:
    what = (
        f"Another program than dflash-hub wrote this config.json ({found}); this copy of dflash-hub's code does not "
        "read it"
    )
    advice = "Install the package, which reads every published layout, and import it: pip install dflash-hub"
    return Finding(what, found, "the hub or the engines layout", advice, "{what}. {advice}")


def engines_layout(config: Any) -> dict[str, Any]:
    """Return the config.json that vLLM, SGLang, TensorRT-LLM, llama.cpp and the MLX readers load unmodified.

    Args:
        config: the config of a draft of any kind.

    Raises:
        ValueError: the config lacks a field that engines need, or has a value that this layout cannot express.
    """
    for name in ("num_target_layers", "vocab_size"):
        if getattr(config, name) is None:
            raise ValueError(
                f"The engines layout needs {name}, which this draft does not have: set config.{name}."
            )
    if config.window_from_anchor:
        raise ValueError(
            "window_from_anchor is True: engines count a window from each position of the block, so the engines "
            'layout cannot express it. Save the hub layout: layout="hub".'
        )
    if config.has_own_mask_embedding:
        raise ValueError(
            "has_own_mask_embedding is True: engines read that vector from a pickle, mask_embedding.pt, which is not "
            "written. Save the draft in the hub layout."
        )
    kind = DRAFT_LAYOUTS[config.model_type]
    if config.sample_from_anchor and not kind.anchor_predicts:
        raise ValueError(
            "sample_from_anchor is True: engines take the first token of such a draft from the position after the "
            'anchor, so the engines layout cannot express it. Save the hub layout: layout="hub".'
        )
    content = {name: getattr(config, name) for name in (*REQUIRED, *_USUAL, "sliding_window")}
    content["architectures"] = [kind.engines_architecture or config.architecture]
    content["model_type"] = "qwen3"
    content["auto_map"] = {"AutoModel": f"{config.model_type}.{config.architecture}"}
    content["layer_types"] = list(config.layer_types)
    content["use_sliding_window"] = SLIDING in config.layer_types
    content["max_window_layers"] = config.num_hidden_layers
    content["tie_word_embeddings"] = False
    content.update({name: getattr(config, name) for name in kind.on_top})
    content.update(_engines_rare(config))
    content.update(_engines_rope(config))
    content["dflash_config"] = _engines_nested(config, content)
    return content


def engines_remarks(config: Any) -> list[str]:
    """Return what engines that load the engines layout compute otherwise than here, a sentence each; [] for nothing.

    Args:
        config: the config of a draft of any kind.
    """
    remarks = list(config.engines_remarks)
    scale = getattr(config, "input_embedding_scale", 1)
    if scale != 1:
        remarks.append(
            f"input_embedding_scale is {scale:g}, which SGLang (0.5.23) does not read. It runs this draft on unscaled "
            "embeddings, so it accepts fewer tokens there. vLLM and llama.cpp read it."
        )
    if config.draft_vocab_size is not None:
        remarks.append(
            f"draft_vocab_size is {config.draft_vocab_size}, of {config.vocab_size} tokens of the target; SGLang "
            "(0.5.23) reads neither that nor the draft's head, so it accepts hardly any token. vLLM reads them."
        )
    elif config.has_own_embed_tokens or config.has_own_lm_head:
        remarks.append(
            "The draft has an embedding or a head of its own, which SGLang (0.5.23) and TensorRT-LLM do not read. If "
            "it differs from the target's, they accept fewer tokens. vLLM and llama.cpp read it."
        )
    return remarks + _mixed_remarks(config)


def _mixed_remarks(config: Any) -> list[str]:
    """Return what engines compute otherwise where some layers slide and others are full."""
    if len(set(config.layer_types)) == 1:
        return []
    remarks = ["Some layers slide and others are full: TensorRT-LLM runs all of them as full ones."]
    if isinstance(config.is_causal, list):
        remarks.append(
            "Sliding layers are causal and full ones are not: llama.cpp runs all of them bidirectionally, so it "
            "proposes other tokens, of which fewer are accepted."
        )
    return remarks


def _engines_rare(config: Any) -> dict[str, Any]:
    """Return the fields that are written only where the draft uses them."""
    rare = {
        "is_causal": _engines_causality(config),
        "final_logit_softcapping": config.final_logit_softcapping,
        "quantization_config": getattr(config, "quantization_config", None),
    }
    flags = ("has_own_embed_tokens", "has_own_lm_head", "unscaled_embeddings", "sample_from_anchor")
    for name in flags:
        usual = type(config).__dataclass_fields__[name].default
        rare[name] = getattr(config, name) or (False if usual else None)
    rare["draft_vocab_size"] = config.draft_vocab_size
    if config.target_hidden_size != config.hidden_size:
        rare["target_hidden_size"] = config.target_hidden_size
    if config.dtype is not None:
        rare["dtype"] = str(config.dtype).removeprefix("torch.")
    return {name: value for name, value in rare.items() if value is not None}


def _engines_nested(config: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Return dflash_config, where engines look first."""
    nested = {name: content[name] for name in _REPEATED}
    if "is_causal" in content:
        nested["causal"] = content["is_causal"]
    if FULL not in config.layer_types:  # llama.cpp would make the full layers slide too
        nested["use_swa"] = True
        nested["swa_window_size"] = config.sliding_window
    kind = DRAFT_LAYOUTS[config.model_type]
    nested |= {name: getattr(config, name) for name in (*kind.own, *kind.scales, *kind.mirrored)}
    unused = [name for name in kind.scales if nested[name] == 1]
    unused += [name for name in kind.mirrored if not nested[name]]
    nested |= {key: getattr(config, name) for name, key in kind.renamed.items()}
    if kind.projectors:
        nested["projector_type"] = kind.projectors[0]
    return {name: value for name, value in nested.items() if name not in unused}


def _engines_causality(config: Any) -> bool | None:
    """Return one bool for all layers; or None, which engines read as: sliding layers are causal, full ones not."""
    if isinstance(config.is_causal, bool):
        return config.is_causal
    if config.is_causal != [layer_type == SLIDING for layer_type in config.layer_types]:
        raise ValueError(
            f"is_causal is {config.is_causal} for layers {config.layer_types}. The engines layout stores one value "
            "for all layers, or none, which makes sliding layers causal and full layers bidirectional."
        )
    return None


def _engines_rope(config: Any) -> dict[str, Any]:
    """Return both forms: rope_theta and rope_scaling for readers of transformers 4, rope_parameters for those of 5."""
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }
