# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How this package writes drafts on disk: what each field may hold, and the hub and the engines layout.

This file travels with every pushed draft, and works on plain dicts. Every other published layout is read by
`layouts.py`, which stays in the package.
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
    "dflash": DraftLayout(
        "DFlash", "DFlashDraftModel", ("DFlashDraftModel", "Qwen3DFlashDraftModel", MUSE)
    ),
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


def int_from(low: int, high: int, step: int = 1) -> Kind:
    def fits(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and low <= value <= high
            and value % step == 0
        )

    return Kind(f"an {'int' if step == 1 else 'even int'} from {low} to {high}", fits)


def _number(low: float, high: float, above: bool = False) -> Kind:
    """A finite number from `low`, or above it, to `high`."""

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and low <= value <= high and not (above and value == low)

    return Kind(
        f"a number above {low:g}, at most {high:g}"
        if above
        else f"a number from {low:g} to {high:g}",
        fits,
    )


def list_of(words: str, item: Kind, longest: int = 1000, ascending: bool = False) -> Kind:
    def fits(value: Any) -> bool:
        right = isinstance(value, list) and 0 < len(value) <= longest and all(map(item.fits, value))
        return right and not (ascending and any(a >= b for a, b in pairwise(value)))

    return Kind(words, fits)


def _choice(names: tuple[str, ...]) -> Kind:
    return Kind(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str | torch.dtype) and str(value).removeprefix("torch.") in DTYPES


def _is_activation(value: Any) -> bool:
    from transformers.activations import ACT2FN  # here, since it imports much

    return isinstance(value, str) and value in ACT2FN


def _is_auto_map(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str | list | None) for name in value.values()
    )


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(str(key).isdecimal() for key in value)


_BOOL = Kind("True or False", lambda value: isinstance(value, bool))
_STR = Kind("a string", lambda value: isinstance(value, str))
_DICT = Kind("a dict", lambda value: isinstance(value, dict))
LAYERS = 1000
_WIDTH, _HEADS, _POSITIONS, _ID = (
    int_from(1, 2**20),
    int_from(1, 4096),
    int_from(1, 2**30),
    int_from(0, 2**24 - 1),
)
_FACTOR = _number(0, 1e6, above=True)
_FACTORS = list_of("a list of numbers above 0", _FACTOR, longest=2**16)
_BOOLS = list_of("a list of True or False", _BOOL, LAYERS)

# Field -> what is right for it. Upper bounds are beyond every draft, and low enough that nothing is built of them.
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
    "is_causal": Kind(
        "True or False, or a list of them, one per layer",
        lambda value: _BOOL.fits(value) or _BOOLS.fits(value),
    ),
    "layer_types": list_of(
        f"a list of {FULL!r} or {SLIDING!r}, one per layer", _choice((FULL, SLIDING)), LAYERS
    ),
    "sliding_window": _POSITIONS,
    "rope_parameters": _DICT,
    "rope_theta": _number(0, 1e15, above=True),
    "vocab_size": int_from(1, 2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": int_from(1, LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": int_from(2, 2**14, step=2),
    "hidden_act": Kind(
        "the name of an activation that transformers has, such as 'silu'", _is_activation
    ),
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
    "conv_kernel_size": int_from(1, 1024),
    "conv_group_size": _WIDTH,
    "selector_rank": _WIDTH,
    "selector_top_k": int_from(1, 2**16),
    "output_multiplier": _FACTOR,
    "input_embedding_scale": _FACTOR,
    # What is no field of a draft, but read beside them, or taken by transformers.
    "use_sliding_window": _BOOL,
    "use_swa": _BOOL,
    "draft_vocab_size": int_from(1, 2**24),
    "v_head_dim": int_from(1, 2**14),
    "dflash_config": _DICT,
    "architectures": Kind(
        "a list of names of classes",
        lambda value: isinstance(value, list) and len(value) <= 1000 and all(map(_STR.fits, value)),
    ),
    "model_type": _STR,
    "auto_map": Kind("a dict of names of classes", _is_auto_map),
    "rope_scaling": _DICT,
    "num_labels": int_from(0, 2**20),
    "id2label": Kind("a dict of ids to names", _is_labels),
}
# Key of a rope dict -> what is right for it. The sections that images have are kept: text turns in all of them alike.
ROPE = {
    "rope_type": _choice(ROPE_TYPES),
    "rope_theta": FIELDS["rope_theta"],
    "original_max_position_embeddings": _POSITIONS,
    "truncate": _BOOL,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "mrope_section": list_of("a list of ints from 0 up", _ID),
    "mrope_interleaved": _BOOL,
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
    """`repr(value)`, shortened where it is long."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # more digits than Python writes; lists in lists in lists ...
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
        raise ValueError(
            f"{said or f'{field} is {shown(value)}'}; it must be {kind.words}{advice}."
        )


def check_content(config: Any) -> dict[str, Any]:
    """The content of a config.json, or a ValueError where it is no dict."""
    if not isinstance(config, dict):
        raise ValueError(
            f"The draft's config.json is {shown(config)}; it must be a dict of fields."
        )
    return config


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
    form = {key: listed(value) for key, value in (form or {}).items() if value is not None}
    _refuse_partial_rope(place, form)
    old_type = form.pop("type", None)
    if old_type is not None:
        said = {f"{place}.type": old_type} | (
            {f"{place}.rope_type": form["rope_type"]} if "rope_type" in form else {}
        )
        form["rope_type"] = one_of("rope_parameters", said)
    for key, value in form.items():
        check_field(key, value, f"{place}.{key} is {shown(value)}", ROPE[key])
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
            raise ValueError(
                f"{said}: for rope_type {rope_type!r}, {key} is None; it must be {ROPE[key].words}."
            )
    for key in ("short_factor", "long_factor"):
        if key in rope and len(rope[key]) != head_dim // 2:
            raise ValueError(
                f"rope_parameters.{key} is {shown(rope[key])}, {len(rope[key])} numbers; it must hold "
                f"{head_dim // 2}, half of head_dim, {head_dim}."
            )


def _refuse_unknown_rope(place: str, form: dict[str, Any]) -> None:
    for key, value in form.items():
        if key not in (*ROPE, "type", "partial_rotary_factor", "rope_dim") and not isinstance(
            value, dict
        ):
            nearest = difflib.get_close_matches(str(key).lower(), ROPE, n=1)
            advice = (
                f"is {nearest[0]} meant?" if nearest else f"it must be one of {', '.join(ROPE)}."
            )
            said = f"{place}.{key} is {shown(value)}, but no such key is known"
            raise ValueError(f"{said}, so it is refused: {advice}")


def _refuse_partial_rope(place: str, form: dict[str, Any]) -> None:
    """Refuse what turns only some of the channels, or turns layers differently; drop a factor of 1."""
    nested = [key for key, value in form.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            refusal(
                "rotary embeddings that differ by layer type",
                f"{place}.{nested[0]}",
                form[nested[0]],
            )
        )
    factor = form.pop("partial_rotary_factor", 1.0)
    if not is_among(factor, (1.0,)):
        raise ValueError(
            refusal(
                "partial rotary embeddings", f"{place}.partial_rotary_factor", factor, (None, 1.0)
            )
        )
    if "rope_dim" in form:
        raise ValueError(
            refusal("partial rotary embeddings", f"{place}.rope_dim", form["rope_dim"], (None,))
        )


def listed(value: Any) -> Any:
    """A list of our own, also where the caller's dict holds a tuple."""
    return list(value) if isinstance(value, list | tuple) else value


def is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; True is not 1 here."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices)


def one_of(field: str, said: dict[str, Any], meant: dict[str, Any] | None = None) -> Any:
    """The value that all places agree on, in what they mean; None where no place says any."""
    said = {place: value for place, value in said.items() if value is not None}
    values = [(meant or said)[place] for place in said]
    if any(value != values[0] for value in values):
        raise ValueError(contradiction(field, said))
    return values[0] if values else None


def contradiction(field: str, said: dict[str, Any]) -> str:
    places = " but ".join(f"{place} is {shown(value)}" for place, value in said.items())
    return (
        f"The draft's config.json contradicts itself about {field}: {places}. Correct the file, or say which holds: "
        f"from_pretrained(..., {field}=...)."
    )


def refusal(feature: str, place: str, value: Any, unused: tuple[Any, ...] = ()) -> str:
    right = f" (it must be {' or '.join(map(repr, unused))})" if unused else ""
    return (
        f"This draft uses {feature} ({place} is {shown(value)}), which this version of dflash-hub does not run{right}; "
        "it would load and draft nonsense, so it is refused."
    )


# Our own layouts -------------------------------------------------------------------------------------------------

# What no reader may guess; everything else has a default that is the same in every layout.
REQUIRED = (
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
_USUAL = (
    "num_target_layers",
    "vocab_size",
    "hidden_act",
    "initializer_range",
    "attention_bias",
    "attention_dropout",
    "use_cache",
)
_RARE = (
    "target_hidden_size",
    "is_causal",
    "final_logit_softcapping",
    "dtype",
    "quantization_config",
)
DEFAULTED = (*_USUAL, *_RARE)
# Key inside dflash_config of the engines layout -> the key at the top that says the same.
_REPEATED = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")
_NESTED = dict(zip(_REPEATED, _REPEATED, strict=True))
_NESTED.update(
    {"causal": "is_causal", "use_swa": "use_sliding_window", "swa_window_size": "sliding_window"}
)
for _layout in DRAFT_LAYOUTS.values():
    _NESTED.update({name: name for name in (*_layout.fields, *_layout.scales, *_layout.mirrored)})


def model_type_of(config: dict[str, Any]) -> Any:
    """The file's own, which `get_config_dict` puts aside."""
    return config.get("foreign_model_type", config.get("model_type"))


def read_own_layout(
    config: dict[str, Any], given: dict[str, Any], variant: str = BASE
) -> dict[str, Any]:
    """Translate a config.json in the hub or the engines layout into the keywords of its config class.

    A copy of this code in a repository reads these two alone; with dflash_hub imported, `layouts.read_layout` reads
    every layout.

    Args:
        config: the file's content.
        given: fields that the caller passes, which replace what the file has or lacks.
        variant: the kind of draft that the file must describe, a name in `DRAFT_LAYOUTS`.

    Raises:
        ValueError: another layout, a missing field, or a copy inside dflash_config that differs.
    """
    _refuse_other_layouts(check_content(config), variant)
    values = config | _nested_values(config, given) | given
    kind = DRAFT_LAYOUTS[variant]
    names = [
        *REQUIRED,
        *DEFAULTED,
        *kind.fields,
        *kind.scales,
        "layer_types",
        "sliding_window",
        "rope_parameters",
    ]
    fields = {name: values[name] for name in names if values.get(name) is not None}
    if "rope_theta" in given:
        fields["rope_parameters"] = fields.get("rope_parameters", {}) | {
            "rope_theta": given["rope_theta"]
        }
    for name in (*REQUIRED, *kind.fields, *kind.required, "rope_parameters"):
        if name not in fields:
            raise ValueError(
                f"The draft's config.json lacks {name}; supply it: from_pretrained(..., {name}=...), or install "
                "dflash-hub, which reads every published layout: pip install dflash-hub"
            )
    # In the hub layout it names the code of the repository, which AutoModel looks for on the config.
    if "AutoConfig" in (config.get("auto_map") or {}):
        fields["auto_map"] = config["auto_map"]
    return fields


def _refuse_other_layouts(config: dict[str, Any], variant: str) -> None:
    """Refuse a config.json that is in neither of our two layouts."""
    auto_map = config.get("auto_map") or {}
    entry = str(auto_map.get("AutoModel") if isinstance(auto_map, dict) else auto_map)
    module = entry.rpartition("--")[2].partition(".")[
        0
    ]  # transformers may put a repository before the "--"
    if variant not in (model_type_of(config), module):
        raise ValueError(
            _unknown(f"model_type is {shown(model_type_of(config))}, auto_map is {shown(auto_map)}")
        )


def _nested_values(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return what dflash_config says, by the key at the top; a key that stands there too must have the same value."""
    found: dict[str, Any] = {}
    for key, value in (config.get("dflash_config") or {}).items():
        if key not in _NESTED:
            raise ValueError(_unknown(f"dflash_config.{key} is {shown(value)}"))
        name = _NESTED[key]
        if name not in given:
            found[name] = one_of(name, {name: config.get(name), f"dflash_config.{key}": value})
    return found


def _unknown(found: str) -> str:
    return (
        f"Another program than dflash-hub wrote this config.json ({found}); this copy of dflash-hub's code does not "
        "read it. Install the package, which reads every published layout, and import it: pip install dflash-hub"
    )


def engines_layout(config: Any) -> dict[str, Any]:
    """The config.json that vLLM, SGLang, TensorRT-LLM, llama.cpp and the MLX readers load unmodified.

    Args:
        config: the config of a draft of any kind.

    Raises:
        ValueError: the config lacks what engines need, or has what that layout cannot express.
    """
    for name in ("num_target_layers", "vocab_size"):
        if getattr(config, name) is None:
            raise ValueError(
                f"The engines layout needs {name}, which this draft does not say: set config.{name}."
            )
    content = {name: getattr(config, name) for name in (*REQUIRED, *_USUAL, "sliding_window")}
    content["architectures"] = [config.architecture]
    content["model_type"] = "qwen3"
    content["auto_map"] = {"AutoModel": f"{config.model_type}.{config.architecture}"}
    content["layer_types"] = list(config.layer_types)
    content["use_sliding_window"] = SLIDING in config.layer_types
    content["max_window_layers"] = config.num_hidden_layers
    content["tie_word_embeddings"] = False
    content.update(_engines_rare(config))
    content.update(_engines_rope(config))
    content["dflash_config"] = _engines_nested(config, content)
    return content


def _engines_rare(config: Any) -> dict[str, Any]:
    """Return the fields that are written only where the draft uses them."""
    rare = {
        "is_causal": _engines_causality(config),
        "final_logit_softcapping": config.final_logit_softcapping,
        "quantization_config": getattr(config, "quantization_config", None),
    }
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
    if content["use_sliding_window"]:
        nested["use_swa"] = True
        nested["swa_window_size"] = config.sliding_window
    layout = DRAFT_LAYOUTS[config.model_type]
    nested.update({name: getattr(config, name) for name in layout.fields})
    nested.update(
        {name: getattr(config, name) for name in layout.scales if getattr(config, name) != 1}
    )
    nested.update(
        {name: getattr(config, name) for name in layout.mirrored if getattr(config, name)}
    )
    return nested


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


def _engines_rope(config: Any) -> dict[str, Any]:
    """Both forms: readers of transformers 4 look for rope_theta and rope_scaling, readers of 5 for rope_parameters."""
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }
