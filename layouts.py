# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Every published layout of a draft's config.json, read into the fields of a config.

This is the only place that knows the names other projects use. A field may stand in several places of a config.json:
equal copies are fine, contradicting ones are refused with both places named. Layouts read: z-lab (flat and nested),
NVIDIA Model Optimizer and NeMo AutoModel, SpecForge, the Muse assistant of transformers, and this package's hub and
engines layouts. Importing `dflash_hub` makes `DFlashConfig.from_dict` read them all.
"""

import difflib
from typing import Any

from .layouts_dflash import (
    BASE,
    DEFAULTED,
    DRAFT_LAYOUTS,
    FIELDS,
    FULL,
    LAYERS,
    MUSE,
    REQUIRED,
    ROPE,
    SLIDING,
    Kind,
    check_content,
    check_field,
    check_rope,
    contradiction,
    int_from,
    is_among,
    list_of,
    listed,
    model_type_of,
    modern_rope,
    one_of,
    refusal,
    shown,
)

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
_SHIFTED_TAP_PLACES = (
    "eagle_aux_hidden_state_layer_ids",
    "dflash_config.eagle_aux_hidden_state_layer_ids",
)
_SHIFTED_TAPS = list_of(
    "a list of indices of hidden_states, ints from 1 up, at least one, ascending",
    int_from(1, LAYERS),
    ascending=True,
)
_WINDOW_PLACES = ("sliding_window", "dflash_config.swa_window_size", "dflash_config.sliding_window")
_REDUCED_PLACES = ("draft_vocab_size", "dflash_config.draft_vocab_size")
_ONLY_AT_TOP = ("layer_types", "rope_theta", "rope_parameters", "rope_scaling")
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
        *(
            f"dflash_config.{key}"
            for kind in DRAFT_LAYOUTS.values()
            for key in (*kind.fields, *kind.scales)
        ),
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
    named = {
        "model_type": model_type_of(config),
        "speculators_model_type": config.get("speculators_model_type"),
    }
    named |= {
        f"{outer}projector_type": place.get("projector_type")
        for outer, place in outer_places.items()
    }
    signs |= {place: value for place, value in named.items() if value == name}
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    if any(
        isinstance(architecture, str) and layout.name_part in architecture for architecture in names
    ):
        signs["architectures"] = architectures
    return signs


def read_layout(
    config: dict[str, Any], given: dict[str, Any], variant: str = BASE
) -> dict[str, Any]:
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


class _Layout:
    """One config.json, asked for fields by their places."""

    def __init__(self, config: dict[str, Any], given: dict[str, Any], variant: str):
        self.config, self.variant, self.kind = config, variant, DRAFT_LAYOUTS[variant]
        self.given = {field: listed(value) for field, value in given.items()}
        for field in {*self.given} & {*FIELDS}:
            if self.given[field] is not None:
                check_field(field, self.given[field])
        self.nested: dict[str, Any] = self.value("dflash_config", "dflash_config") or {}
        self.architectures = self.value("architectures", "architectures") or []
        self.architecture = next(iter(self.architectures), None)
        model_type = model_type_of(config)
        if model_type is not None:
            check_field(
                "model_type",
                model_type,
                f"The draft's config.json says model_type is {shown(model_type)}",
            )
        self.muse = self.architecture == MUSE or model_type == "muse_glimmer_assistant"
        if model_type == "laguna":
            raise ValueError(
                refusal("per-tap norms and attention gates (Laguna)", "model_type", model_type)
            )

    def at(self, place: str) -> Any:
        outer, _, inner = place.rpartition(".")
        return listed((self.nested if outer else self.config).get(inner))

    def value(self, field: str, place: str, kind: Kind | None = None) -> Any:
        """What `place` says of `field`, which is right for it; None where it says nothing."""
        value = self.at(place)
        if value is not None:
            where = "" if place == field else f" ({place})"
            check_field(
                field, value, f"The draft's config.json says {field} is {shown(value)}{where}", kind
            )
        return value

    def agreed(self, field: str, places: tuple[str, ...]) -> Any:
        """The value of `field`: the caller's, or the one that all places which say something agree on."""
        if field in self.given:
            return self.given[field]
        said = {place: self.value(field, place) for place in places}
        if field == "dtype":
            return one_of(
                field,
                said,
                {place: str(value).removeprefix("torch.") for place, value in said.items()},
            )
        return one_of(field, said)

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
        names = [field for field in (*REQUIRED, *DEFAULTED) if field != "target_layer_ids"]
        places = {field: _PLACES.get(field, (field,)) for field in names}
        places.update(
            {
                field: (field, f"dflash_config.{field}")
                for field in (*self.kind.fields, *self.kind.scales)
            }
        )
        return places

    def refuse_foreign(self) -> None:
        """Refuse, by name, what this model cannot run, and what is no draft at all."""
        for part, feature in _HEADS_BY_ARCHITECTURE:
            if part in (self.architecture or ""):
                raise ValueError(refusal(feature, "architectures", self.architectures))
        self.refuse_other_variant()
        for feature, key, unused in _FEATURES:
            if key in self.kind.scales:
                continue
            for place in (key,) if "." in key else (key, f"dflash_config.{key}"):
                if not is_among(self.at(place), unused):
                    raise ValueError(refusal(feature, place, self.at(place), unused))
        self.refuse_no_draft()

    def refuse_no_draft(self) -> None:
        known = self.kind.architectures
        silent = (
            not self.nested
            and self.at("target_layer_ids") is None
            and self.at("mask_token_id") is None
        )
        if self.architecture in known or (self.architecture is None and (self.given or not silent)):
            return
        raise ValueError(
            f"This config.json describes {self.architecture or model_type_of(self.config)}, not a {self.kind.title} "
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
                at_top = self.places().get(key) == (key,) or key in _ONLY_AT_TOP
                advice = (
                    f"is {nearest[0]} meant?"
                    if nearest
                    else "remove it if the draft does not need it."
                )
                raise ValueError(
                    f"{said}, so it is refused: {'it belongs at the top.' if at_top else advice}"
                )

    def refuse_lengths(self, layers: int) -> None:
        """Refuse what is said layer by layer for another number of layers."""
        places = [
            ("layer_types", "layer_types"),
            *(("is_causal", place) for place in _PLACES["is_causal"]),
        ]
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
            raise ValueError(
                refusal(
                    f"a reduced vocabulary (of vocab_size, {vocab})", "draft_vocab_size", reduced
                )
            )
        width = self.value("v_head_dim", "v_head_dim")
        if width not in (None, fields["head_dim"]):
            keys = f"values of another width than keys (head_dim, {fields['head_dim']})"
            raise ValueError(refusal(keys, "v_head_dim", width))

    def taps(self) -> list[int] | None:
        if "target_layer_ids" in self.given:
            return self.agreed("target_layer_ids", ())
        said = {place: self.value("target_layer_ids", place) for place in _TAP_PLACES}
        meant = dict(said)
        for place in _SHIFTED_TAP_PLACES:
            indices = self.value("target_layer_ids", place, _SHIFTED_TAPS)
            label = f"{place} (counted from the embedding)"
            said[label], meant[label] = indices, indices and [index - 1 for index in indices]
        return one_of("target_layer_ids", said, meant)

    def require(self, fields: dict[str, Any]) -> None:
        places = {**self.places(), "target_layer_ids": (*_TAP_PLACES, *_SHIFTED_TAP_PLACES)}
        for name in (*REQUIRED, *self.kind.fields, *self.kind.required):
            if fields[name] is None:
                raise ValueError(
                    f"The draft's config.json does not say {name} ({self.unsaid(places[name])}), and it is not "
                    f"guessed; supply it: from_pretrained(..., {name}=...), {FIELDS[name].words}."
                )

    def unsaid(self, places: tuple[str, ...]) -> str:
        """How places say nothing: they are not there, null, or empty."""
        if "dflash_config" in self.config and not self.nested:
            places = tuple(
                dict.fromkeys("dflash_config" if "." in place else place for place in places)
            )
        there = [
            place.rpartition(".")[2] in (self.nested if "." in place else self.config)
            for place in places
        ]
        told = zip(places, there, strict=True)
        return ", ".join(
            f"{place} is {shown(self.at(place))}" if found else f"no {place}"
            for place, found in told
        )

    def layer_types(self, layers: int) -> list[str]:
        """Which layers slide. `use_swa` makes all of them slide where `layer_types` names none, as vLLM reads it."""
        if "layer_types" in self.given:
            return self.agreed("layer_types", ())
        said, forced = (
            self.value("layer_types", "layer_types"),
            self.value("use_swa", "dflash_config.use_swa"),
        )
        used = self.value("use_sliding_window", "use_sliding_window")
        for place, value in (("use_sliding_window", used), ("dflash_config.use_swa", forced)):
            if SLIDING in (said or ()) and value is False:
                raise ValueError(contradiction("layer_types", {"layer_types": said, place: False}))
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
            why = " and ".join(
                f"{place} is {shown(value)}" for place, value in said.items() if value
            )
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
            forms = {
                "rope_parameters": modern_rope("rope_parameters", self.given["rope_parameters"])
            }
        else:
            forms = {
                place: modern_rope(place, self.value(place, place))
                for place in ("rope_parameters", "rope_scaling")
            }
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(
            key for form in forms.values() for key in form if key != "rope_theta"
        ):
            said = {f"{place}.{key}": form[key] for place, form in forms.items() if key in form}
            merged[key] = one_of("rope_parameters", said)
        merged["rope_theta"] = self.rope_theta(forms)
        if len(merged) > 1 and "rope_type" not in merged:
            raise ValueError(
                f"The draft's config.json scales its rotary embeddings ({shown(merged)}), but rope_type is None; it "
                f"must be {ROPE['rope_type'].words}; supply it: from_pretrained(..., "
                "rope_parameters={'rope_type': ..., ...})."
            )
        said_there = {place: self.given.get(place, self.at(place)) for place in forms}
        check_rope(
            merged,
            head_dim,
            " and ".join(f"{place} is {shown(form)}" for place, form in said_there.items()),
        )
        return {"rope_type": "default"} | merged

    def rope_theta(self, forms: dict[str, dict[str, Any]]) -> float:
        """The caller's, in either keyword; else the one that all places which say something agree on."""
        said = {
            f"{place}.rope_theta": form["rope_theta"]
            for place, form in forms.items()
            if "rope_theta" in form
        }
        top = self.agreed("rope_theta", ("rope_theta",))
        if "rope_theta" in self.given:
            said = {"rope_theta": top}
        elif top is not None and not ("rope_parameters" in self.given and said):
            said["rope_theta"] = top
        theta = one_of("rope_theta", said)
        if theta is None:
            raise ValueError(
                f"The draft's config.json says no rope_theta ({self.unsaid(('rope_theta', *forms))}), and a wrong one "
                "ruins long contexts silently; supply it: from_pretrained(..., rope_theta=...), "
                f"{FIELDS['rope_theta'].words}."
            )
        return theta
