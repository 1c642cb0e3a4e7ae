# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""How drafts are written on disk: every published layout read into one set of fields, and the engines layout written.

This file travels with every pushed draft. It works on plain dicts, and is the only place that knows the names
other projects use. A field may stand in several places of a config.json: equal copies are fine, contradicting ones
are refused with both places named. Layouts read: z-lab (flat and nested), NVIDIA Model Optimizer and NeMo AutoModel,
SpecForge, the Muse assistant of transformers, and this package's hub and engines layouts.
"""

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
MUSE = "MuseGlimmerAssistantModel"
DRAFT_ARCHITECTURES = {
    "dflash": ("DFlashDraftModel", "Qwen3DFlashDraftModel", MUSE),
    "dflash2": ("DFlash2DraftModel", "Qwen3DFlash2DraftModel"),
}

# Field -> every place where it may stand; "dflash_config.x" is the key x of the nested dict.
_PLACES = {
    "block_size": ("block_size", "dflash_config.block_size"),
    "mask_token_id": ("mask_token_id", "dflash_config.mask_token_id", "pard_token", "ptd_token_id"),
    "num_target_layers": ("num_target_layers", "dflash_config.num_target_layers"),
    "target_hidden_size": ("target_hidden_size", "dflash_config.target_hidden_size"),
    "is_causal": ("is_causal", "dflash_config.causal", "dflash_config.is_causal", "dflash_query_causal"),
    "final_logit_softcapping": ("final_logit_softcapping", "dflash_config.final_logit_softcapping"),
    "dtype": ("dtype", "torch_dtype"),
}
_TAP_PLACES = ("target_layer_ids", "dflash_config.target_layer_ids")
# hidden_states indices, where 0 is the embedding: one more than the layer whose output they are.
_SHIFTED_TAP_PLACES = ("eagle_aux_hidden_state_layer_ids", "dflash_config.eagle_aux_hidden_state_layer_ids")
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
# What DFlash 2 adds: all of the first, and these of the second that are not 1.
_SECOND = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_SECOND_SCALES = ("output_multiplier", "input_embedding_scale")
# Feature -> (place, values that mean "not used"); a value outside them asks for something this model does not have.
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
    ("a head of its own (Domino, DSpark ...)", "projector_type", (*_OFF, "dflash")),
    ("a Domino head", "gru_hidden_dim", _OFF),
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
    ("a draft without target features", "use_aux_hidden_state", (None, True)),
    ("an output multiplier", "output_multiplier", (None, 1.0)),
    ("a scale on the input embeddings", "input_embedding_scale", (None, 1.0)),
    ("partial rotary embeddings", "partial_rotary_factor", (None, 1.0)),
    ("interleaved (not NeoX-style) rotary embeddings", "is_neox_style", (None, True)),
    ("interleaved (not NeoX-style) rotary embeddings", "rope_is_neox_style", (None, True)),
)
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
    """ "dflash2" where a config.json, in whatever layout, says anything of DFlash 2; else "dflash"."""
    nested = config.get("dflash_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    named = [config.get("foreign_model_type", config.get("model_type")), config.get("speculators_model_type")]
    said = any(place.get(name) not in _OFF for place in places for name in _SECOND)
    return "dflash2" if said or "dflash2" in named or "DFlash2" in str(config.get("architectures")) else "dflash"


def read_layout(config: dict[str, Any], given: dict[str, Any], variant: str = "dflash") -> dict[str, Any]:
    """Translate the config.json of any published layout into the keywords of `DFlashConfig` or `DFlash2Config`.

    Args:
        config: the file's content.
        given: fields said by the caller, which replace what the file says or lacks.
        variant: "dflash" or "dflash2", which the file must be.

    Raises:
        ValueError: a field is missing or contradicts itself, or the draft needs a feature that is not here.
    """
    return _Layout(config, given, variant).fields()


class _Layout:
    """One config.json, asked for fields by their places."""

    def __init__(self, config: dict[str, Any], given: dict[str, Any], variant: str):
        self.config, self.given, self.variant = config, given, variant
        self.nested = config.get("dflash_config") or {}
        architectures = config.get("architectures") or []
        if not isinstance(self.nested, dict) or not isinstance(architectures, list | tuple):
            raise ValueError(
                f"The draft's config.json is malformed: dflash_config is {self.nested!r} (it must be a dict), "
                f"architectures is {architectures!r} (it must be a list)."
            )
        self.architecture = next(iter(architectures), None)
        model_type = config.get("foreign_model_type") or config.get("model_type")
        self.muse = self.architecture == MUSE or model_type == "muse_glimmer_assistant"
        if model_type == "laguna":
            raise ValueError(_refusal("per-tap norms and attention gates (Laguna)", "model_type", model_type))

    def at(self, place: str) -> Any:
        outer, _, inner = place.rpartition(".")
        return (self.nested if outer else self.config).get(inner)

    def agreed(self, field: str, places: tuple[str, ...]) -> Any:
        """The value of `field`: the caller's, or the one that all places which say something agree on."""
        if field in self.given:
            return self.given[field]
        said = {place: self.at(place) for place in places if self.at(place) is not None}
        if field == "dtype":
            said = {place: str(value).removeprefix("torch.") for place, value in said.items()}
        return _one_of(field, said)

    def fields(self) -> dict[str, Any]:
        self.refuse_foreign()
        fields = {field: self.agreed(field, places) for field, places in _PLACES.items()}
        fields |= {field: self.agreed(field, (field,)) for field in _SAME_NAME}
        added = (*_SECOND, *_SECOND_SCALES) if self.variant == "dflash2" else ()
        fields |= {field: self.agreed(field, (field, f"dflash_config.{field}")) for field in added}
        fields["target_layer_ids"] = self.taps()
        self.require(fields)
        fields["layer_types"] = self.layer_types(fields["num_hidden_layers"])
        fields["sliding_window"] = self.sliding_window(fields["layer_types"])
        fields["is_causal"] = self.causality(fields)
        fields["rope_parameters"] = self.rope()
        self.refuse_shapes(fields)
        # In the hub layout it names the code of the repository, which AutoModel looks for on the config.
        auto_map = self.at("auto_map") or {}
        fields["auto_map"] = auto_map if "AutoConfig" in auto_map else None
        return {name: value for name, value in fields.items() if value is not None}

    def refuse_foreign(self) -> None:
        """Refuse, by name, what this model cannot run, and what is no draft at all."""
        for part, feature in _HEADS_BY_ARCHITECTURE:
            if part in (self.architecture or ""):
                raise ValueError(_refusal(feature, "architectures", self.architecture))
        self.refuse_other_variant()
        for feature, key, unused in _FEATURES:
            if key in _SECOND_SCALES and self.variant == "dflash2":
                continue
            for place in (key, f"dflash_config.{key}"):
                if self.at(place) not in unused:
                    raise ValueError(_refusal(feature, place, self.at(place)))
        known = DRAFT_ARCHITECTURES[self.variant]
        no_draft = not self.nested and self.at("target_layer_ids") is None and self.at("mask_token_id") is None
        if (self.architecture not in (None, *known)) or (no_draft and not self.given):
            raise ValueError(
                f"This config.json describes {self.architecture or self.config.get('model_type')}, not a DFlash draft "
                f"(architectures known here: {', '.join(known)}). Pass the draft's repository, not its target's."
            )

    def refuse_other_variant(self) -> None:
        """Refuse a DFlash 2 draft where a DFlash 1 draft is read, and the reverse, saying what reads it."""
        found = variant_of(self.config | self.given)
        names = {"dflash": ("DFlash 1", "DFlashDraftModel"), "dflash2": ("DFlash 2", "DFlash2DraftModel")}
        is_draft = self.architecture in DRAFT_ARCHITECTURES[found] or found == "dflash2"
        if found != self.variant and is_draft:
            (name, reader), (_, ours) = names[found], names[self.variant]
            raise ValueError(
                f"This config.json describes a {name} draft, which {ours} does not run, so it is refused; load it "
                f"with {reader}.from_pretrained, or with dflash_hub.load_draft, which tells them apart."
            )

    def refuse_shapes(self, fields: dict[str, Any]) -> None:
        places = ("draft_vocab_size", "dflash_config.draft_vocab_size")
        vocab, reduced = fields.get("vocab_size"), self.agreed("draft_vocab_size", places)
        if reduced is not None and reduced != vocab:
            raise ValueError(_refusal(f"a reduced vocabulary (of {vocab})", "draft_vocab_size", reduced))
        if self.at("v_head_dim") not in (None, fields["head_dim"]):
            raise ValueError(_refusal("values of another width than keys", "v_head_dim", self.at("v_head_dim")))

    def taps(self) -> list[int] | None:
        if "target_layer_ids" in self.given:
            return self.given["target_layer_ids"]
        said = {place: list(self.at(place)) for place in _TAP_PLACES if self.at(place) is not None}
        for place in _SHIFTED_TAP_PLACES:
            if self.at(place) is not None:
                said[f"{place} (counted from the embedding)"] = [index - 1 for index in self.at(place)]
        return _one_of("target_layer_ids", said)

    def require(self, fields: dict[str, Any]) -> None:
        added = (*_SECOND, "vocab_size") if self.variant == "dflash2" else ()
        for name in (*_REQUIRED, *added):
            if fields[name] is None:
                raise ValueError(
                    f"The draft's config.json does not say {name}, and it is not guessed; supply it: "
                    f"from_pretrained(..., {name}=...)."
                )

    def layer_types(self, layers: int) -> list[str]:
        """Which layers slide. `use_swa` makes all of them slide where `layer_types` names none, as vLLM reads it."""
        if "layer_types" in self.given:
            return self.given["layer_types"]
        said, forced = self.at("layer_types"), self.at("dflash_config.use_swa")
        for place in ("use_sliding_window", "dflash_config.use_swa"):
            if SLIDING in (said or ()) and self.at(place) is False:
                raise ValueError(_contradiction("layer_types", {"layer_types": said, place: False}))
        if forced and SLIDING not in (said or ()):
            return [SLIDING] * layers
        if said:
            return list(said)
        if self.muse:
            return [SLIDING] * layers
        if self.at("use_sliding_window") and self.at("sliding_window"):
            raise ValueError(
                "The draft's config.json turns use_sliding_window on but does not say which layers slide; supply it: "
                "from_pretrained(..., layer_types=[...])."
            )
        return [FULL] * layers

    def sliding_window(self, layer_types: list[str]) -> int | None:
        if SLIDING not in layer_types:
            return None
        window = self.agreed("sliding_window", ("sliding_window", "dflash_config.swa_window_size"))
        if window is None:
            raise ValueError(
                "The draft has sliding layers, but its config.json says neither sliding_window nor "
                "dflash_config.swa_window_size; supply it: from_pretrained(..., sliding_window=...)."
            )
        return window

    def causality(self, fields: dict[str, Any]) -> bool | list[bool] | None:
        """What was said; else False for the two dialects whose sliding layers are bidirectional without saying so."""
        said = fields["is_causal"]
        bidirectional = self.muse or (
            self.at("dflash_config.use_swa") and SLIDING not in (self.at("layer_types") or ())
        )
        return False if said is None and bidirectional else said

    def rope(self) -> dict[str, Any]:
        """`rope_parameters`, from either form or both. A theta is never guessed."""
        places = ("rope_parameters", "rope_scaling")
        if "rope_parameters" in self.given:
            forms = {"rope_parameters": _modern_rope("rope_parameters", self.given["rope_parameters"])}
        else:
            forms = {place: _modern_rope(place, self.at(place)) for place in places}
        merged: dict[str, Any] = {}
        for key in {key for form in forms.values() for key in form} - {"rope_theta"}:
            said = {f"{place}.{key}": form[key] for place, form in forms.items() if key in form}
            merged[key] = _one_of("rope_parameters", said)
        merged["rope_theta"] = self.rope_theta(forms)
        if len(merged) > 1 and "rope_type" not in merged:
            raise ValueError(
                f"The draft's config.json scales its rotary embeddings ({merged}) without saying rope_type; supply it: "
                "from_pretrained(..., rope_parameters={'rope_type': ..., ...})."
            )
        return {"rope_type": "default"} | merged

    def rope_theta(self, forms: dict[str, dict[str, Any]]) -> float:
        """The caller's, in either keyword; else the one that all places which say something agree on."""
        said = {f"{place}.rope_theta": form["rope_theta"] for place, form in forms.items() if "rope_theta" in form}
        if "rope_theta" in self.given:
            said = {"rope_theta": self.given["rope_theta"]}
        elif self.at("rope_theta") is not None and not ("rope_parameters" in self.given and said):
            said["rope_theta"] = self.at("rope_theta")
        theta = _one_of("rope_theta", said)
        if theta is None:
            raise ValueError(
                "The draft's config.json says no rope_theta, and a wrong one ruins long contexts silently; supply it: "
                "from_pretrained(..., rope_theta=...)."
            )
        if isinstance(theta, str | bool) or theta <= 0:
            raise ValueError(f"rope_theta is {theta!r}; it must be a number above 0.")
        return theta


def _modern_rope(place: str, form: dict[str, Any] | None) -> dict[str, Any]:
    """One rope dict with `type` under its present name; {} where nothing was said."""
    form = {key: value for key, value in (form or {}).items() if value is not None}
    nested = [key for key, value in form.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            _refusal("rotary embeddings that differ by layer type", f"{place}.{nested[0]}", form[nested[0]])
        )
    if form.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            _refusal("partial rotary embeddings", f"{place}.partial_rotary_factor", form["partial_rotary_factor"])
        )
    form.pop("partial_rotary_factor", None)
    if "rope_dim" in form:
        raise ValueError(_refusal("partial rotary embeddings", f"{place}.rope_dim", form["rope_dim"]))
    old_type = form.pop("type", None)
    if old_type is not None:
        said = {f"{place}.type": old_type} | ({f"{place}.rope_type": form["rope_type"]} if "rope_type" in form else {})
        form["rope_type"] = _one_of("rope_parameters", said)
    return form


def _one_of(field: str, said: dict[str, Any]) -> Any:
    """The value that all places agree on; None where no place says any."""
    values = list(said.values())
    if any(value != values[0] for value in values):
        raise ValueError(_contradiction(field, said))
    return values[0] if values else None


def _contradiction(field: str, said: dict[str, Any]) -> str:
    places = " but ".join(f"{place} is {value}" for place, value in said.items())
    return (
        f"The draft's config.json contradicts itself about {field}: {places}. Correct the file, or say which holds: "
        f"from_pretrained(..., {field}=...)."
    )


def _refusal(feature: str, place: str, value: Any) -> str:
    return (
        f"This draft uses {feature} ({place} is {value!r}), which this version of dflash-hub does not run; it would "
        "load and draft nonsense, so it is refused."
    )


def engines_layout(config: Any) -> dict[str, Any]:
    """The config.json that vLLM, SGLang, TensorRT-LLM, llama.cpp and the MLX readers load unmodified.

    Args:
        config: a `DFlashConfig` or `DFlash2Config`.

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
        | _engines_second(config),
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


def _engines_second(config: Any) -> dict[str, Any]:
    """What DFlash 2 adds, where engines read it; {} for a DFlash 1 draft."""
    if config.model_type != "dflash2":
        return {}
    scales = {name: getattr(config, name) for name in _SECOND_SCALES if getattr(config, name) != 1}
    cap = config.final_logit_softcapping
    return (
        {name: getattr(config, name) for name in _SECOND} | scales | ({"final_logit_softcapping": cap} if cap else {})
    )


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
