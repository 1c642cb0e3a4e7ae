# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How drafts are written on disk: every published layout read into one set of fields, and the engines layout written.

This file travels with every pushed draft. It works on plain dicts, and is the only place that knows the names
other projects use. A field may stand in several places of a config.json: equal copies are fine, contradicting ones
are refused with both places named. Layouts read: z-lab (flat and nested), NVIDIA Model Optimizer and NeMo AutoModel,
SpecForge, the Muse assistant of transformers, and this package's hub and engines layouts.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"
MUSE = "MuseGlimmerAssistantModel"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
DTYPES = ("bfloat16", "float16", "float32", "float64")


# The kinds of drafts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftLayout:
    """Describe how a kind of draft is told from others in a config.json, and what it adds there.

    Args:
        title: the kind's name in errors.
        reader: the class that loads it.
        architectures: names of its model class in config.json.
        name_part: a part of the architecture that no other kind has; "" for the kind that others extend.
        fields: required fields that only this kind has. They may stand at the top or in dflash_config.
        required: fields of all kinds that this kind requires.
        scales: optional fields that it adds; 1 means unused. They may stand in the same two places.
        mirrored: further fields that engines read in dflash_config too.
    """

    title: str
    reader: str
    architectures: tuple[str, ...]
    name_part: str = ""
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    mirrored: tuple[str, ...] = ()


DRAFT_LAYOUTS = {
    "dflash": DraftLayout("DFlash", "DFlashDraftModel", ("DFlashDraftModel", "Qwen3DFlashDraftModel", MUSE)),
    "dflash2": DraftLayout(
        "DFlash 2",
        "DFlash2DraftModel",
        ("DFlash2DraftModel", "Qwen3DFlash2DraftModel"),
        name_part="DFlash2",
        fields=("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
        required=("vocab_size",),
        scales=("output_multiplier", "input_embedding_scale"),
        mirrored=("final_logit_softcapping",),
    ),
}
"""The kinds by name, which is their `model_type` in the hub layout. The first is the one that others extend."""
BASE = next(iter(DRAFT_LAYOUTS))


# What is right --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a field may hold: the words that say it in an error, and the test. Every test costs the same."""

    words: str
    fits: Callable[[Any], bool]


def _int(low: int, high: int, step: int = 1) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high and value % step == 0

    return Kind(f"an {'int' if step == 1 else 'even int'} from {low} to {high}", fits)


def _number(low: float, high: float, above: bool = False) -> Kind:
    """A finite number from `low`, or above it, to `high`."""

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and low <= value <= high and not (above and value == low)

    return Kind(f"a number above {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}", fits)


def _list(words: str, item: Kind, longest: int = 1000, ascending: bool = False) -> Kind:
    def fits(value: Any) -> bool:
        right = isinstance(value, list) and 0 < len(value) <= longest and all(map(item.fits, value))
        return right and not (ascending and any(a >= b for a, b in pairwise(value)))

    return Kind(words, fits)


def _choice(names: tuple[str, ...]) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str | torch.dtype) and str(value).removeprefix("torch.") in DTYPES


def _is_activation(value: Any) -> bool:
    from transformers.activations import ACT2FN  # here, since it imports much

    return isinstance(value, str) and value in ACT2FN


def _is_auto_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str | list | None) for name in value.values())


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)


_BOOL = Kind("True or False", lambda value: isinstance(value, bool))
_STR = Kind("a string", lambda value: isinstance(value, str))
_DICT = Kind("a dict", lambda value: isinstance(value, dict))
_LAYERS = 1000
_WIDTH, _HEADS, _POSITIONS, _ID = _int(1, 2**20), _int(1, 4096), _int(1, 2**30), _int(0, 2**24 - 1)
_FACTOR = _number(0, 1e6, above=True)
_FACTORS = _list("a list of numbers above 0", _FACTOR, longest=2**16)
_BOOLS = _list("a list of True or False", _BOOL, _LAYERS)

# Field -> what is right for it. Upper bounds are beyond every draft, and low enough that nothing is built of them.
FIELDS = {
    "block_size": _int(2, 1024),
    "mask_token_id": _ID,
    "target_layer_ids": _list(
        "a list of 0-based layers of the target, ints, at least one, ascending", _int(0, _LAYERS - 1), ascending=True
    ),
    "num_target_layers": _int(1, _LAYERS),
    "target_hidden_size": _WIDTH,
    "is_causal": Kind(
        "True or False, or a list of them, one per layer", lambda value: _BOOL.fits(value) or _BOOLS.fits(value)
    ),
    "layer_types": _list(f"a list of {FULL!r} or {SLIDING!r}, one per layer", _choice((FULL, SLIDING)), _LAYERS),
    "sliding_window": _POSITIONS,
    "rope_parameters": _DICT,
    "rope_theta": _number(0, 1e15, above=True),
    "vocab_size": _int(1, 2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _int(1, _LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _int(2, 2**14, step=2),
    "hidden_act": Kind("the name of an activation that transformers has, such as 'silu'", _is_activation),
    "rms_norm_eps": _number(0, 1, above=True),
    "max_position_embeddings": _POSITIONS,
    "initializer_range": _number(0, 1e3),
    "attention_bias": _BOOL,
    "attention_dropout": _number(0, 1),
    "final_logit_softcapping": _number(0, 1e6),
    "tie_word_embeddings": _BOOL,
    "use_cache": _BOOL,
    "dtype": Kind(f"one of {', '.join(DTYPES)}", _is_dtype),
    "quantization_config": _DICT,
    "conv_kernel_size": _int(1, 1024),
    "conv_group_size": _WIDTH,
    "selector_rank": _WIDTH,
    "selector_top_k": _int(1, 2**16),
    "output_multiplier": _FACTOR,
    "input_embedding_scale": _FACTOR,
    # What is no field of a draft, but read beside them, or taken by transformers.
    "use_sliding_window": _BOOL,
    "use_swa": _BOOL,
    "draft_vocab_size": _int(1, 2**24),
    "v_head_dim": _int(1, 2**14),
    "dflash_config": _DICT,
    "architectures": Kind(
        "a list of names of classes",
        lambda value: isinstance(value, list) and len(value) <= 1000 and all(map(_STR.fits, value)),
    ),
    "model_type": _STR,
    "auto_map": Kind("a dict of names of classes", _is_auto_map),
    "rope_scaling": _DICT,
    "num_labels": _int(0, 2**20),
    "id2label": Kind("a dict of ids to names", _is_labels),
}
# Key of a rope dict -> what is right for it. The sections that images have are kept: text turns in all of them alike.
_ROPE = {
    "rope_type": _choice(ROPE_TYPES),
    "rope_theta": FIELDS["rope_theta"],
    "original_max_position_embeddings": _POSITIONS,
    "truncate": _BOOL,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "mrope_section": _list("a list of ints from 0 up", _ID),
    "mrope_interleaved": _BOOL,
    **dict.fromkeys(("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), _FACTOR),
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
    """`repr(value)`, shortened where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes; lists in lists in lists ...
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= longest else f"{text[:longest]} ..."


def check_field(field: str, value: Any, said: str | None = None, kind: Kind | None = None) -> None:
    """Refuse a value that is not right for its field.

    Args:
        said: the beginning of the error; by default, what a keyword said.
        kind: what is right; by default, what `FIELDS` has.

    Raises:
        ValueError: with the field, the value, and what would be right.
    """
    kind = kind or FIELDS[field]
    if not kind.fits(value):
        advice = "" if said else f" (pass {field}=...)"
        raise ValueError(f"{said or f'{field} is {shown(value)}'}; it must be {kind.words}{advice}.")


# Where it stands ------------------------------------------------------------------------------------------------

# Field -> every place where it may stand; "dflash_config.x" is the key x of the nested dict.
_PLACES = {
    "block_size": ("block_size", "dflash_config.block_size"),
    "mask_token_id": ("mask_token_id", "dflash_config.mask_token_id", "pard_token", "ptd_token_id"),
    "num_target_layers": ("num_target_layers", "dflash_config.num_target_layers"),
    "target_hidden_size": ("target_hidden_size", "dflash_config.target_hidden_size"),
    "is_causal": (
        "is_causal",
        "dflash_config.causal",
        "dflash_config.is_causal",
        "dflash_config.causal_head",  # JetSpec
        "dflash_query_causal",
    ),
    "final_logit_softcapping": ("final_logit_softcapping", "dflash_config.final_logit_softcapping"),
    "dtype": ("dtype", "torch_dtype"),
}
_TAP_PLACES = ("target_layer_ids", "dflash_config.target_layer_ids")
# hidden_states indices, where 0 is the embedding: one more than the layer whose output they are.
_SHIFTED_TAP_PLACES = ("eagle_aux_hidden_state_layer_ids", "dflash_config.eagle_aux_hidden_state_layer_ids")
_SHIFTED_TAPS = _list(
    "a list of indices of hidden_states, ints from 1 up, at least one, ascending", _int(1, _LAYERS), ascending=True
)
_WINDOW_PLACES = ("sliding_window", "dflash_config.swa_window_size", "dflash_config.sliding_window")
_REDUCED_PLACES = ("draft_vocab_size", "dflash_config.draft_vocab_size")
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "use_cache",
    "quantization_config",
)
# What no reader may guess; everything else has a default that is the same in every layout.
_REQUIRED = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
# (feature, key, values that mean "not used"); a value outside them asks for something this model does not have. A key
# is looked for at the top and in dflash_config, or there alone where that is written.
_OFF = (None, False, 0)
_FEATURES = (
    ("the speculators layout", "speculators_model_type", _OFF),
    ("the speculators layout", "speculators_config", _OFF),
    ("the speculators layout", "transformer_layer_config", _OFF),
    ("the speculators layout", "aux_hidden_state_layer_ids", _OFF),
    ("a Markov head", "markov_rank", _OFF),
    ("a Markov head", "dspark_markov_rank", _OFF),
    ("a Markov head", "markov_head_type", _OFF),
    ("a DSpark head", "dspark_fixup_head_type", _OFF),
    ("a confidence head", "enable_confidence_head", _OFF),
    ("a confidence head", "dflash_config.confidence_head_with_markov", _OFF),
    ("a head of its own (Domino, DSpark ...)", "projector_type", (*_OFF, *DRAFT_LAYOUTS)),
    ("a Domino head", "gru_hidden_dim", _OFF),
    ("a Domino head", "dflash_config.emb_dim", _OFF),
    ("a Domino head", "dflash_config.pure_draft_prefix_len", _OFF),
    ("a Domino head", "dflash_config.use_bias_gate", _OFF),
    ("a Domino head", "dflash_config.use_bias_norm", _OFF),
    ("a Domino head (shifted labels)", "shift_label", _OFF),
    ("a block whose anchor predicts (sample_from_anchor)", "sample_from_anchor", _OFF),
    ("attention sinks", "attention_sink_bias", _OFF),
    ("scaled attention values", "attention_value_scale", (None, 1.0)),
    ("per-tap norms", "aux_hidden_norms", _OFF),
    ("MLA attention", "attention_mode", (None, "gqa", "mha")),
    ("MLA attention", "kv_lora_rank", _OFF),
    ("an attention gate", "g_proj", _OFF),
    ("a head of its own", "has_lm_head", _OFF),
    ("a head of its own", "has_own_lm_head", _OFF),
    ("a trained embedding of its own", "train_embed_tokens", _OFF),
    ("an adapter between the target's width and its own (JetSpec)", "hidden_dim_adapter", _OFF),
    ("a draft without target features", "use_aux_hidden_state", (None, True)),
    ("an output multiplier", "output_multiplier", (None, 1.0)),
    ("a scale on the input embeddings", "input_embedding_scale", (None, 1.0)),
    ("partial rotary embeddings", "partial_rotary_factor", (None, 1.0)),
    ("interleaved (not NeoX-style) rotary embeddings", "is_neox_style", (None, True)),
    ("interleaved (not NeoX-style) rotary embeddings", "rope_is_neox_style", (None, True)),
)
# Keys published inside dflash_config that say nothing a reader needs, each with what it is.
_HARMLESS = {
    "num_anchors": "training: blocks per row",
    "max_anchors": "training: blocks per row, as speculators calls it",
    "loss_decay_gamma": "training: how the loss falls along a block",
    "confidence_head_alpha": "training: weight of the loss of a head that has a switch of its own",
    "backbone_rotary_base": "the target's rotary base, for information",
    "mask_token": "the text of the mask token; its id is read",
}
# Every key that may stand inside dflash_config.
_NESTED = {
    place.removeprefix("dflash_config.")
    for place in (
        *(place for places in _PLACES.values() for place in places),
        *(*_TAP_PLACES, *_SHIFTED_TAP_PLACES, *_WINDOW_PLACES, *_REDUCED_PLACES),
        *(f"dflash_config.{key.removeprefix('dflash_config.')}" for _, key, _ in _FEATURES),
        *(f"dflash_config.{key}" for kind in DRAFT_LAYOUTS.values() for key in (*kind.fields, *kind.scales)),
        *(f"dflash_config.{key}" for key in (*_HARMLESS, "use_swa")),
    )
    if place.startswith("dflash_config.")
}
_HEADS_BY_ARCHITECTURE = (
    ("DFlash2Beam", "DFlash 2's beam head"),
    ("MiniMaxDFlash2", "MiniMax's own kind of DFlash 2"),
    ("DSpark", "a DSpark (Markov) head"),
    ("Domino", "a Domino head"),
    ("Laguna", "per-tap norms and attention gates (Laguna)"),
    ("LiLiCorr", "a LiLiCorr re-ranking head"),
    ("XPress", "an XPress mixing head"),
    ("Speculator", "the speculators layout"),
)


def variant_of(config: dict[str, Any]) -> str:
    """Return the name of the kind of draft that a config.json, in whatever layout, describes."""
    return _kind_and_signs(config)[0]


def _kind_and_signs(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the kind, and place -> value of what shows it; the base kind has no signs of its own."""
    for name in DRAFT_LAYOUTS:
        signs = {} if name == BASE else _signs_of(name, config)
        if signs:
            return name, signs
    return BASE, {}


def _signs_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return place -> value of everything that only a draft of this kind has."""
    layout = DRAFT_LAYOUTS[name]
    nested = config.get("dflash_config")
    outer_places = {"": config, "dflash_config.": nested if isinstance(nested, dict) else {}}
    signs = {}
    for outer, place in outer_places.items():
        for field in layout.fields:
            if place.get(field) not in _OFF:
                signs[f"{outer}{field}"] = place.get(field)
    named = {"model_type": _model_type(config), "speculators_model_type": config.get("speculators_model_type")}
    named |= {f"{outer}projector_type": place.get("projector_type") for outer, place in outer_places.items()}
    signs |= {place: value for place, value in named.items() if value == name}
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    if any(isinstance(architecture, str) and layout.name_part in architecture for architecture in names):
        signs["architectures"] = architectures
    return signs


def _model_type(config: dict[str, Any]) -> Any:
    """The file's own, which `get_config_dict` puts aside."""
    return config.get("foreign_model_type", config.get("model_type"))


def read_layout(config: dict[str, Any], given: dict[str, Any], variant: str = BASE) -> dict[str, Any]:
    """Translate the config.json of any published layout into the keywords of its kind's config.

    Args:
        config: the file's content.
        given: fields said by the caller, which replace what the file says or lacks.
        variant: the kind of draft that the file must describe, a name in `DRAFT_LAYOUTS`.

    Raises:
        ValueError: a field is missing, contradicts itself or holds what it cannot, a key inside dflash_config is not
            known, or the draft needs a feature that is not here.
    """
    return _Layout(check_content(config), given, variant).fields()


def check_content(config: Any) -> dict[str, Any]:
    """The content of a config.json, or a ValueError where it is no dict."""
    if not isinstance(config, dict):
        raise ValueError(f"The draft's config.json is {shown(config)}; it must be a dict of fields.")
    return config


class _Layout:
    """One config.json, asked for fields by their places."""

    def __init__(self, config: dict[str, Any], given: dict[str, Any], variant: str):
        self.config, self.variant, self.kind = config, variant, DRAFT_LAYOUTS[variant]
        self.given = {field: _listed(value) for field, value in given.items()}
        for field in {*self.given} & {*FIELDS}:
            if self.given[field] is not None:
                check_field(field, self.given[field])
        self.nested: dict[str, Any] = self.value("dflash_config", "dflash_config") or {}
        self.architectures = self.value("architectures", "architectures") or []
        self.architecture = next(iter(self.architectures), None)
        model_type = _model_type(config)
        if model_type is not None:
            check_field("model_type", model_type, f"The draft's config.json says model_type is {shown(model_type)}")
        self.muse = self.architecture == MUSE or model_type == "muse_glimmer_assistant"
        if model_type == "laguna":
            raise ValueError(_refusal("per-tap norms and attention gates (Laguna)", "model_type", model_type))

    def at(self, place: str) -> Any:
        outer, _, inner = place.rpartition(".")
        return _listed((self.nested if outer else self.config).get(inner))

    def value(self, field: str, place: str, kind: Kind | None = None) -> Any:
        """What `place` says of `field`, which is right for it; None where it says nothing."""
        value = self.at(place)
        if value is not None:
            where = "" if place == field else f" ({place})"
            check_field(field, value, f"The draft's config.json says {field} is {shown(value)}{where}", kind)
        return value

    def agreed(self, field: str, places: tuple[str, ...]) -> Any:
        """The value of `field`: the caller's, or the one that all places which say something agree on."""
        if field in self.given:
            return self.given[field]
        said = {place: self.value(field, place) for place in places}
        return _one_of(field, said, {place: _dtype_name(value) for place, value in said.items() if field == "dtype"})

    def fields(self) -> dict[str, Any]:
        self.refuse_foreign()
        self.refuse_unknown()
        fields = {field: self.agreed(field, places) for field, places in self.places().items()}
        fields["target_layer_ids"] = self.taps()
        self.require(fields)
        self.refuse_lengths(fields["num_hidden_layers"])
        fields["layer_types"] = self.layer_types(fields["num_hidden_layers"])
        fields["sliding_window"] = self.sliding_window(fields["layer_types"])
        fields["is_causal"] = self.causality(fields)
        fields["rope_parameters"] = self.rope(fields["head_dim"])
        self.refuse_shapes(fields)
        # In the hub layout it names the code of the repository, which AutoModel looks for on the config.
        auto_map = self.value("auto_map", "auto_map") or {}
        fields["auto_map"] = auto_map if "AutoConfig" in auto_map else None
        return {name: value for name, value in fields.items() if value is not None}

    def places(self) -> dict[str, tuple[str, ...]]:
        """Every field that all its places must agree on; those that are read in their own way are not among them."""
        same = {field: (field,) for field in _SAME_NAME}
        added = (*self.kind.fields, *self.kind.scales)
        return _PLACES | same | {field: (field, f"dflash_config.{field}") for field in added}

    def refuse_foreign(self) -> None:
        """Refuse, by name, what this model cannot run, and what is no draft at all."""
        for part, feature in _HEADS_BY_ARCHITECTURE:
            if part in (self.architecture or ""):
                raise ValueError(_refusal(feature, "architectures", self.architectures))
        self.refuse_other_variant()
        for feature, key, unused in _FEATURES:
            if key in self.kind.scales:
                continue
            for place in (key,) if "." in key else (key, f"dflash_config.{key}"):
                if not _is_among(self.at(place), unused):
                    raise ValueError(_refusal(feature, place, self.at(place), unused))
        self.refuse_no_draft()

    def refuse_no_draft(self) -> None:
        known = self.kind.architectures
        silent = not self.nested and self.at("target_layer_ids") is None and self.at("mask_token_id") is None
        if self.architecture in known or (self.architecture is None and (self.given or not silent)):
            return
        raise ValueError(
            f"This config.json describes {self.architecture or _model_type(self.config)}, not a {self.kind.title} "
            f"draft (architectures is {shown(self.at('architectures'))}; known here: {', '.join(known)}). Pass the "
            "draft's repository, not its target's."
        )

    def refuse_other_variant(self) -> None:
        """Refuse a draft of another kind, and name the class that loads it."""
        name, signs = _kind_and_signs(self.config | self.given)
        found = DRAFT_LAYOUTS[name]
        is_draft = self.architecture in found.architectures or bool(signs)
        if name != self.variant and is_draft:
            place, value = next(iter((signs or {"architectures": self.architectures}).items()))
            raise ValueError(
                f"This config.json describes a {found.title} draft ({place} is {shown(value)}), which "
                f"{self.kind.reader} does not run, so it is refused; load it with {found.reader}.from_pretrained, or "
                "with dflash_hub.load_draft, which tells them apart."
            )

    def refuse_unknown(self) -> None:
        """Refuse a key inside dflash_config that is not known: it may ask for anything."""
        for key, value in self.nested.items():
            if key not in _NESTED:
                said = f"The draft's config.json has dflash_config.{key}, which is {shown(value)}; no such key is known"
                nearest = difflib.get_close_matches(str(key).lower(), sorted(_NESTED), n=1)
                at_top = key in {*_SAME_NAME, "layer_types", "rope_theta", "rope_parameters", "rope_scaling"}
                advice = f"is {nearest[0]} meant?" if nearest else "remove it if the draft does not need it."
                raise ValueError(f"{said}, so it is refused: {'it belongs at the top.' if at_top else advice}")

    def refuse_lengths(self, layers: int) -> None:
        """Refuse what is said layer by layer for another number of layers."""
        places = [("layer_types", "layer_types"), *(("is_causal", place) for place in _PLACES["is_causal"])]
        for field, place in places:
            said = None if field in self.given else self.value(field, place)
            if isinstance(said, list) and len(said) != layers:
                raise ValueError(
                    f"The draft's config.json says {field} is {shown(said)} ({place}) but num_hidden_layers is "
                    f"{layers}; it must be {FIELDS[field].words}."
                )

    def refuse_shapes(self, fields: dict[str, Any]) -> None:
        vocab, reduced = fields.get("vocab_size"), self.agreed("draft_vocab_size", _REDUCED_PLACES)
        if reduced is not None and reduced != vocab:
            raise ValueError(_refusal(f"a reduced vocabulary (of vocab_size, {vocab})", "draft_vocab_size", reduced))
        width = self.value("v_head_dim", "v_head_dim")
        if width not in (None, fields["head_dim"]):
            keys = f"values of another width than keys (head_dim, {fields['head_dim']})"
            raise ValueError(_refusal(keys, "v_head_dim", width))

    def taps(self) -> list[int] | None:
        if "target_layer_ids" in self.given:
            return self.agreed("target_layer_ids", ())
        said = {place: self.value("target_layer_ids", place) for place in _TAP_PLACES}
        meant = dict(said)
        for place in _SHIFTED_TAP_PLACES:
            indices = self.value("target_layer_ids", place, _SHIFTED_TAPS)
            label = f"{place} (counted from the embedding)"
            said[label], meant[label] = indices, indices and [index - 1 for index in indices]
        return _one_of("target_layer_ids", said, meant)

    def require(self, fields: dict[str, Any]) -> None:
        places = {**self.places(), "target_layer_ids": (*_TAP_PLACES, *_SHIFTED_TAP_PLACES)}
        for name in (*_REQUIRED, *self.kind.fields, *self.kind.required):
            if fields[name] is None:
                raise ValueError(
                    f"The draft's config.json does not say {name} ({self.unsaid(places[name])}), and it is not "
                    f"guessed; supply it: from_pretrained(..., {name}=...), {FIELDS[name].words}."
                )

    def unsaid(self, places: tuple[str, ...]) -> str:
        """How places say nothing: they are not there, null, or empty."""
        if "dflash_config" in self.config and not self.nested:
            places = tuple(dict.fromkeys("dflash_config" if "." in place else place for place in places))
        there = [place.rpartition(".")[2] in (self.nested if "." in place else self.config) for place in places]
        told = zip(places, there, strict=True)
        return ", ".join(f"{place} is {shown(self.at(place))}" if found else f"no {place}" for place, found in told)

    def layer_types(self, layers: int) -> list[str]:
        """Which layers slide. `use_swa` makes all of them slide where `layer_types` names none, as vLLM reads it."""
        if "layer_types" in self.given:
            return self.agreed("layer_types", ())
        said, forced = self.value("layer_types", "layer_types"), self.value("use_swa", "dflash_config.use_swa")
        used = self.value("use_sliding_window", "use_sliding_window")
        for place, value in (("use_sliding_window", used), ("dflash_config.use_swa", forced)):
            if SLIDING in (said or ()) and value is False:
                raise ValueError(_contradiction("layer_types", {"layer_types": said, place: False}))
        if forced and SLIDING not in (said or ()):
            return [SLIDING] * layers
        if said:
            return said
        if self.muse:
            return [SLIDING] * layers
        if used and self.at("sliding_window"):
            raise ValueError(
                "The draft's config.json turns use_sliding_window on but does not say which layers slide "
                f"({self.unsaid(('layer_types',))}); supply it: from_pretrained(..., layer_types=[...]), "
                f"{FIELDS['layer_types'].words}."
            )
        return [FULL] * layers

    def sliding_window(self, layer_types: list[str] | None) -> int | None:
        for place in _WINDOW_PLACES:
            self.value("sliding_window", place)
        if SLIDING not in (layer_types or ()):
            return None
        window = self.agreed("sliding_window", _WINDOW_PLACES)
        if window is None:
            said = {place: self.at(place) for place in ("layer_types", "dflash_config.use_swa")}
            why = " and ".join(f"{place} is {shown(value)}" for place, value in said.items() if value)
            raise ValueError(
                f"The draft has sliding layers{f' ({why})' if why else ''}, but its config.json does not say how far "
                f"they see ({self.unsaid(_WINDOW_PLACES)}); supply it: from_pretrained(..., sliding_window=...), "
                f"{FIELDS['sliding_window'].words}."
            )
        return window

    def causality(self, fields: dict[str, Any]) -> bool | list[bool] | None:
        """What was said; else False for the two dialects whose sliding layers are bidirectional without saying so."""
        said = fields["is_causal"]
        bidirectional = self.muse or (
            self.at("dflash_config.use_swa") and SLIDING not in (self.at("layer_types") or ())
        )
        return False if said is None and bidirectional else said

    def rope(self, head_dim: int) -> dict[str, Any]:
        """`rope_parameters`, from either form or both. A theta is never guessed."""
        if "rope_parameters" in self.given:
            forms = {"rope_parameters": modern_rope("rope_parameters", self.given["rope_parameters"])}
        else:
            forms = {
                place: modern_rope(place, self.value(place, place)) for place in ("rope_parameters", "rope_scaling")
            }
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(key for form in forms.values() for key in form if key != "rope_theta"):
            said = {f"{place}.{key}": form[key] for place, form in forms.items() if key in form}
            merged[key] = _one_of("rope_parameters", said)
        merged["rope_theta"] = self.rope_theta(forms)
        if len(merged) > 1 and "rope_type" not in merged:
            raise ValueError(
                f"The draft's config.json scales its rotary embeddings ({shown(merged)}), but rope_type is None; it "
                f"must be {_ROPE['rope_type'].words}; supply it: from_pretrained(..., "
                "rope_parameters={'rope_type': ..., ...})."
            )
        said_there = {place: self.given.get(place, self.at(place)) for place in forms}
        check_rope(merged, head_dim, " and ".join(f"{place} is {shown(form)}" for place, form in said_there.items()))
        return {"rope_type": "default"} | merged

    def rope_theta(self, forms: dict[str, dict[str, Any]]) -> float:
        """The caller's, in either keyword; else the one that all places which say something agree on."""
        said = {f"{place}.rope_theta": form["rope_theta"] for place, form in forms.items() if "rope_theta" in form}
        top = self.agreed("rope_theta", ("rope_theta",))
        if "rope_theta" in self.given:
            said = {"rope_theta": top}
        elif top is not None and not ("rope_parameters" in self.given and said):
            said["rope_theta"] = top
        theta = _one_of("rope_theta", said)
        if theta is None:
            raise ValueError(
                f"The draft's config.json says no rope_theta ({self.unsaid(('rope_theta', *forms))}), and a wrong one "
                "ruins long contexts silently; supply it: from_pretrained(..., rope_theta=...), "
                f"{FIELDS['rope_theta'].words}."
            )
        return theta


def modern_rope(place: str, form: dict[str, Any] | None) -> dict[str, Any]:
    """One rope dict with `type` under its present name; {} where nothing was said.

    Args:
        place: where it stands, for errors.

    Raises:
        ValueError: a key is not known or holds what it cannot, or the rotary embeddings are of a kind not run here.
    """
    if form is not None:
        check_field(place, form)
    _refuse_unknown_rope(place, form or {})
    form = {key: _listed(value) for key, value in (form or {}).items() if value is not None}
    _refuse_partial_rope(place, form)
    old_type = form.pop("type", None)
    if old_type is not None:
        said = {f"{place}.type": old_type} | ({f"{place}.rope_type": form["rope_type"]} if "rope_type" in form else {})
        form["rope_type"] = _one_of("rope_parameters", said)
    for key, value in form.items():
        check_field(key, value, f"{place}.{key} is {shown(value)}", _ROPE[key])
    return form


def check_rope(rope: dict[str, Any], head_dim: int, said: str | None = None) -> None:
    """Refuse a whole `rope_parameters` that lacks what its type needs, or whose factors are not one per frequency.

    Args:
        said: the beginning of the error; by default, what the keyword said.

    Raises:
        ValueError: with what is missing, or of another length.
    """
    rope_type = rope.get("rope_type", "default")
    for key in _ROPE_NEEDS.get(rope_type, ()):
        if key not in rope:
            said = said or f"rope_parameters is {shown(rope)}"
            raise ValueError(f"{said}: for rope_type {rope_type!r}, {key} is None; it must be {_ROPE[key].words}.")
    for key in ("short_factor", "long_factor"):
        if key in rope and len(rope[key]) != head_dim // 2:
            raise ValueError(
                f"rope_parameters.{key} is {shown(rope[key])}, {len(rope[key])} numbers; it must hold "
                f"{head_dim // 2}, half of head_dim, {head_dim}."
            )


def _refuse_unknown_rope(place: str, form: dict[str, Any]) -> None:
    for key, value in form.items():
        if key not in (*_ROPE, "type", "partial_rotary_factor", "rope_dim") and not isinstance(value, dict):
            nearest = difflib.get_close_matches(str(key).lower(), _ROPE, n=1)
            advice = f"is {nearest[0]} meant?" if nearest else f"it must be one of {', '.join(_ROPE)}."
            said = f"{place}.{key} is {shown(value)}, but no such key is known"
            raise ValueError(f"{said}, so it is refused: {advice}")


def _refuse_partial_rope(place: str, form: dict[str, Any]) -> None:
    """Refuse what turns only some of the channels, or turns layers differently; drop a factor of 1."""
    nested = [key for key, value in form.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            _refusal("rotary embeddings that differ by layer type", f"{place}.{nested[0]}", form[nested[0]])
        )
    factor = form.pop("partial_rotary_factor", 1.0)
    if not _is_among(factor, (1.0,)):
        raise ValueError(_refusal("partial rotary embeddings", f"{place}.partial_rotary_factor", factor, (None, 1.0)))
    if "rope_dim" in form:
        raise ValueError(_refusal("partial rotary embeddings", f"{place}.rope_dim", form["rope_dim"], (None,)))


def _listed(value: Any) -> Any:
    """A list of our own, also where the caller's dict holds a tuple."""
    return list(value) if isinstance(value, list | tuple) else value


def _dtype_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; True is not 1 here."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices)


def _one_of(field: str, said: dict[str, Any], meant: dict[str, Any] | None = None) -> Any:
    """The value that all places agree on, in what they mean; None where no place says any."""
    said = {place: value for place, value in said.items() if value is not None}
    values = [(meant or said)[place] for place in said]
    if any(value != values[0] for value in values):
        raise ValueError(_contradiction(field, said))
    return values[0] if values else None


def _contradiction(field: str, said: dict[str, Any]) -> str:
    places = " but ".join(f"{place} is {shown(value)}" for place, value in said.items())
    return (
        f"The draft's config.json contradicts itself about {field}: {places}. Correct the file, or say which holds: "
        f"from_pretrained(..., {field}=...)."
    )


def _refusal(feature: str, place: str, value: Any, unused: tuple[Any, ...] = ()) -> str:
    right = f" (it must be {' or '.join(map(repr, unused))})" if unused else ""
    return (
        f"This draft uses {feature} ({place} is {shown(value)}), which this version of dflash-hub does not run{right}; "
        "it would load and draft nonsense, so it is refused."
    )


def engines_layout(config: Any) -> dict[str, Any]:
    """The config.json that vLLM, SGLang, TensorRT-LLM, llama.cpp and the MLX readers load unmodified.

    Args:
        config: the config of a draft of any kind.

    Raises:
        ValueError: the config lacks what engines need, or says what they cannot be told.
    """
    for name in ("num_target_layers", "vocab_size"):
        if getattr(config, name) is None:
            raise ValueError(f"The engines layout needs {name}, which this draft does not say: set config.{name}.")
    shared = {name: getattr(config, name) for name in ("block_size", "mask_token_id", "target_layer_ids")}
    shared["num_target_layers"] = config.num_target_layers
    causal = _engines_causality(config)
    window = _engines_window(config)
    content = {
        "architectures": [config.architecture],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": f"{config.model_type}.{config.architecture}"},
        **shared,
        "dflash_config": shared
        | ({} if causal is None else {"causal": causal})
        | window.pop("dflash_config")
        | _engines_added(config),
        **({} if causal is None else {"is_causal": causal}),
        **window,
        **_engines_rope(config),
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": False,
    }
    names = [name for name in _SAME_NAME if name not in ("quantization_config",)]
    content |= {name: getattr(config, name) for name in names}
    optional = {"final_logit_softcapping": None, "target_hidden_size": config.hidden_size, "quantization_config": None}
    extras = {name: getattr(config, name, usual) for name, usual in optional.items()}
    content |= {name: value for name, value in extras.items() if value != optional[name]}
    content |= {"dtype": str(config.dtype).removeprefix("torch.")} if config.dtype is not None else {}
    return content


def _engines_added(config: Any) -> dict[str, Any]:
    """Return what a kind of draft adds, where engines read it; {} for the base kind."""
    layout = DRAFT_LAYOUTS[config.model_type]
    added = {name: getattr(config, name) for name in layout.fields}
    scales = {name: getattr(config, name) for name in layout.scales}
    mirrored = {name: getattr(config, name) for name in layout.mirrored}
    added |= {name: value for name, value in scales.items() if value != 1}
    return added | {name: value for name, value in mirrored.items() if value}


def _engines_causality(config: Any) -> bool | None:
    """One bool, or None where it must go unsaid: engines then take sliding layers as causal and full ones as not."""
    if isinstance(config.is_causal, bool):
        return config.is_causal
    if config.is_causal != [layer_type == SLIDING for layer_type in config.layer_types]:
        raise ValueError(
            f"is_causal is {config.is_causal} for layers {config.layer_types}: engines can only be told one value for "
            "all layers, or none, which makes sliding layers causal and full layers bidirectional."
        )
    return None


def _engines_window(config: Any) -> dict[str, Any]:
    slides = SLIDING in config.layer_types
    return {
        "layer_types": list(config.layer_types),
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "dflash_config": {"use_swa": True, "swa_window_size": config.sliding_window} if slides else {},
    }


def _engines_rope(config: Any) -> dict[str, Any]:
    """Both forms: readers of transformers 4 look for rope_theta and rope_scaling, readers of 5 for rope_parameters."""
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }
