# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read every published layout of a draft's config.json into the fields of a config.

This is the only file that knows the names other projects use. A field may have several keys in a config.json: equal
copies are fine, contradicting ones are refused with both keys named. Layouts read: z-lab (flat and nested), NVIDIA
Model Optimizer and NeMo AutoModel, SpecForge, speculators. So are the Muse assistant of transformers, and this
package's hub and engines layouts. Importing `dflash_hub` makes `DFlashConfig.from_dict` read them all.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from .findings_dflash import ONE_SENTENCE, Finding, must, raise_first
from .kinds import KINDS, MUSE, SpeculatorsDefaults
from .layouts_dflash import (
    BASE,
    BOOL,
    DEFAULTED,
    DICT,
    DRAFT_LAYOUTS,
    FIELDS,
    FULL,
    LAYERS,
    REQUIRED,
    ROPE,
    SLIDING,
    FieldRule,
    as_list,
    check_content,
    contradictions,
    field_findings,
    int_from,
    is_among,
    list_of,
    model_type_of,
    modern_rope,
    own_auto_map,
    refusal,
    rope_findings,
    rope_key_findings,
    shown,
)
from .layouts_speculators import (
    ABOUT,
    BODY,
    NON_CAUSAL,
    TAPS,
    TYPE,
    key_of,
    rope_in_use,
    tokens_named,
)

# Rules and keys --------------------------------------------------------------------------------------------------


def _is_auto_map(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str | list | None) for name in value.values()
    )


# Further fields that are read, but that drafts do not have as typed fields.
_RULES = {
    **FIELDS,
    "quantization_config": DICT,
    "use_sliding_window": BOOL,
    "use_swa": BOOL,
    "v_head_dim": int_from(1, 2**14),
    "dflash_config": DICT,
    "auto_map": FieldRule("a dict of names of classes", _is_auto_map),
    BODY: DICT,
    NON_CAUSAL: BOOL,
}
# Field -> every key that may hold it; "dflash_config.x" is the key x of the nested dict.
_KEYS = {
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
    "sample_from_anchor": (
        "sample_from_anchor",
        "dflash_config.sample_from_anchor",
        "shift_label",
        "dflash_config.shift_label",
    ),
    "enable_confidence_head": ("use_confidence_head", "dflash_config.use_confidence_head"),
    "draft_vocab_size": ("draft_vocab_size", "dflash_config.draft_vocab_size"),
    "has_own_embed_tokens": (
        "has_own_embed_tokens",
        "has_embed_tokens",
        "dflash_config.has_embed_tokens",
    ),
    "has_own_lm_head": (
        "has_own_lm_head",
        "has_lm_head",
        "dflash_config.has_own_lm_head",
        "dflash_config.has_lm_head",
    ),
    "dtype": ("dtype", "torch_dtype"),
}
_TAP_KEYS = ("target_layer_ids", "dflash_config.target_layer_ids")
# These hold indices of hidden_states, where 0 is the embedding: one more than the layer with that output.
_SHIFTED_TAP_KEYS = (
    "eagle_aux_hidden_state_layer_ids",
    "dflash_config.eagle_aux_hidden_state_layer_ids",
)
_COUNTED_FROM_EMBEDDING = (*_SHIFTED_TAP_KEYS, TAPS)
_SHIFTED_TAPS = list_of(
    "a list of indices of hidden_states, ints from 1 up, at least one, ascending",
    int_from(1, LAYERS),
    ascending=True,
)
_WINDOW_KEYS = ("sliding_window", "dflash_config.swa_window_size", "dflash_config.sliding_window")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Field whose keys need not agree, or not before other fields are known -> its keys.
_OTHER_KEYS = {
    "layer_types": ("layer_types",),
    "use_swa": ("dflash_config.use_swa",),
    "use_sliding_window": ("use_sliding_window",),
    "sliding_window": _WINDOW_KEYS,
    "rope_parameters": ("rope_parameters",),
    "rope_scaling": ("rope_scaling",),
    "rope_theta": ("rope_theta",),
    "v_head_dim": ("v_head_dim",),
    "auto_map": ("auto_map",),
    NON_CAUSAL: (NON_CAUSAL,),
}
# Field -> the keyword with which the caller replaces it, where that has another name.
_REPLACED_BY = {
    "use_swa": "layer_types",
    "use_sliding_window": "layer_types",
    "rope_scaling": "rope_parameters",
    "sliding_window": "",  # none: the file's windows are always checked
    NON_CAUSAL: "is_causal",
}
_ONLY_AT_TOP = ("layer_types", "rope_theta", "rope_parameters", "rope_scaling")
_PROJECTORS = [*DRAFT_LAYOUTS]  # every projector_type of a kind
for _kind in DRAFT_LAYOUTS.values():
    _PROJECTORS += [name for name in _kind.projectors if name not in _PROJECTORS]
# (feature, key, values that mean "not used"). Any other value is refused. A plain key is looked up at the top and in
# dflash_config.
_OFF = (None, False, 0)
_FEATURES = (
    ("a Markov head inside the target's checkpoint", "dspark_markov_rank", _OFF),
    ("a DSpark head", "dspark_fixup_head_type", _OFF),
    ("a head of its own", "projector_type", (*_OFF, *_PROJECTORS)),
    ("a gate on Domino's correction", "use_bias_gate", _OFF),
    ("a norm of Domino's correction", "use_bias_norm", _OFF),
    ("attention sinks", "attention_sink_bias", _OFF),
    ("scaled attention values", "attention_value_scale", (None, 1.0)),
    ("per-tap norms", "aux_hidden_norms", _OFF),
    ("MLA attention", "attention_mode", (None, "gqa", "mha")),
    ("MLA attention", "kv_lora_rank", _OFF),
    ("an attention gate", "g_proj", _OFF),
    ("an adapter between the target's width and its own (JetSpec)", "hidden_dim_adapter", _OFF),
    ("a draft without target features", "use_aux_hidden_state", (None, True)),
    ("an output multiplier", "output_multiplier", (None, 1.0)),
    ("a scale on the input embeddings", "input_embedding_scale", (None, 1.0)),
    ("partial rotary embeddings", "partial_rotary_factor", (None, 1.0)),
    ("interleaved (not NeoX-style) rotary embeddings", "is_neox_style", (None, True)),
    ("interleaved (not NeoX-style) rotary embeddings", "rope_is_neox_style", (None, True)),
)
# Keys published inside dflash_config that can be ignored -> their meaning.
_HARMLESS = {
    "num_anchors": "training: blocks per row",
    "train_embed_tokens": "training: whether an embedding that it has was trained",
    "max_anchors": "training: blocks per row, as speculators calls it",
    "loss_decay_gamma": "training: how the loss falls along a block",
    "confidence_head_alpha": "training: weight of the loss of a head that has a switch of its own",
    "backbone_rotary_base": "the target's rotary base, for information",
    "mask_token": "the text of the mask token; its id is read",
}


def _keys_inside_dflash_config() -> set[str]:
    """Return every key that may stand inside dflash_config, without that prefix."""
    dotted = [*_TAP_KEYS, *_SHIFTED_TAP_KEYS, *_WINDOW_KEYS]
    for keys in _KEYS.values():
        dotted += keys
    prefix = "dflash_config."
    found = {key.removeprefix(prefix) for key in dotted if key.startswith(prefix)}
    found |= {key.removeprefix(prefix) for _, key, _ in _FEATURES}
    for kind in DRAFT_LAYOUTS.values():
        found |= {*kind.own, *kind.scales}
    return found | {*_HARMLESS, "use_swa"}


# How drafts of the speculators layout are trained, though their files do not say so.
_ALWAYS = {"window_from_anchor": True, "unscaled_embeddings": True}
_NESTED = _keys_inside_dflash_config()
_HEADS_BY_ARCHITECTURE = (
    ("DFlash2Beam", "DFlash 2's beam head"),
    ("MiniMaxDFlash2", "MiniMax's own kind of DFlash 2"),
    ("Gemma4DSpark", "Gemma 4's own layers (DSpark)"),
    ("K3DSpark", "MLA attention (DSpark of Kimi K3)"),
    ("MuseSparkDSpark", "Muse Spark's own layers (DSpark)"),
    ("DSparkMiniMax", "MiniMax's own layers (DSpark)"),
    ("Laguna", "per-tap norms and attention gates (Laguna)"),
    ("LiLiCorr", "a LiLiCorr re-ranking head"),
    ("XPress", "an XPress mixing head"),
)


def variant_of(config: dict[str, Any]) -> str:
    """Return the name of the kind of draft that a config.json of any layout describes."""
    return next(iter(_signs(config)), BASE)


def _signs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the kinds that a file shows signs of, each with key -> value of them.

    The base kind has none but the name that speculators writes.
    """
    found = {}
    for name in DRAFT_LAYOUTS:
        if name == BASE and config.get(TYPE) in _OFF:
            continue
        signs = _signs_of(name, config)
        if signs:
            found[name] = signs
    return found


def _signs_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return key -> value of everything that only a draft of this kind has.

    In the speculators layout one key decides: its architectures are those of other kinds elsewhere.
    """
    if config.get(TYPE) not in _OFF:
        return {TYPE: name} if config[TYPE] == name else {}
    nested = config.get("dflash_config")
    levels = {"": config, "dflash_config.": nested if isinstance(nested, dict) else {}}
    signs = {}
    for prefix, level in levels.items():
        for field in DRAFT_LAYOUTS[name].own:
            if level.get(field) not in _OFF:
                signs[f"{prefix}{field}"] = level.get(field)
    if model_type_of(config) == name:
        signs["model_type"] = name
    for prefix, level in levels.items():
        projector = level.get("projector_type")
        if is_among(projector, (name, *DRAFT_LAYOUTS[name].projectors)):
            signs[f"{prefix}projector_type"] = projector
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list | tuple) else [architectures]
    part = KINDS[name].name_part
    if part and any(isinstance(name, str) and part in name for name in names):
        signs["architectures"] = architectures
    return signs


def read_layout(
    config: dict[str, Any], overrides: dict[str, Any], variant: str = BASE
) -> dict[str, Any]:
    """Translate the config.json of any published layout into the keywords of its kind's config.

    Args:
        config: the file's content.
        overrides: fields that the caller passes, which replace those of the file or supply missing ones.
        variant: the kind of draft that the file must describe, a name in `DRAFT_LAYOUTS`.

    Raises:
        ValueError: a field is missing, contradicts itself or has an invalid value. Or a key inside dflash_config is
            not known, or the draft needs a feature that is not here.
    """
    return _LayoutReader(check_content(config), overrides, variant).fields()


def layout_findings(config: Any) -> Iterator[Finding]:
    """Yield every independent fault of the content of a config.json, in any layout and of any kind of draft.

    If there is none, yield the first fault among fields that are valid alone, if there is one.
    """
    try:
        variant = variant_of(check_content(config))
        reader = _LayoutReader(config, {}, variant)
        found = [*reader.findings()]
        yield from found
        if not found:
            KINDS[variant].config_class(**reader.fields())
    except ValueError as error:
        yield Finding(str(error), None, None, "", "{what}")


def _one_of(field: str, values: dict[str, Any], meanings: dict[str, Any] | None = None) -> Any:
    """Return the value of `field` that all keys agree on; None where no key has a value.

    For the arguments see `contradictions`.

    Raises:
        ValueError: two keys differ.
    """
    raise_first(contradictions(field, values, meanings))
    found = [(meanings or values)[key] for key, value in values.items() if value is not None]
    return next(iter(found), None)


class _LayoutReader:
    """Read fields from one config.json by their keys."""

    def __init__(self, config: dict[str, Any], overrides: dict[str, Any], variant: str):
        self.config = config
        self.variant = variant
        self.layout = DRAFT_LAYOUTS[variant]
        self.overrides = {field: as_list(value) for field, value in overrides.items()}
        nested = config.get("dflash_config")
        self.nested: dict[str, Any] = nested if isinstance(nested, dict) else {}
        architectures = as_list(config.get("architectures"))
        valid = FIELDS["architectures"].accepts(architectures)
        self.architectures: list[str] = architectures if valid else []
        self.architecture = next(iter(self.architectures), None)
        self.is_speculators = config.get(TYPE) not in _OFF
        body = config.get(BODY) if self.is_speculators else None
        self.body: dict[str, Any] = body if isinstance(body, dict) else {}
        muse_type = model_type_of(config) == "muse_glimmer_assistant"
        self.is_muse = muse_type or self.architecture == MUSE

    def get(self, key: str) -> Any:
        """Return the file's value of a key, which may be dotted; None without one."""
        name = key.rpartition(".")[2]
        value = as_list(self.level(key).get(name))
        return rope_in_use(value) if self.is_speculators and name in _ROPE_KEYS else value

    def level(self, key: str) -> dict[str, Any]:
        """Return the dict that holds a key: one of the nested ones for a dotted key, else the file's top."""
        outer = self.place(key).rpartition(".")[0]
        return {"": self.config, "dflash_config": self.nested, BODY: self.body}[outer]

    def place(self, key: str) -> str:
        """Return where a key stands in this file: in the speculators layout, it may be another dict or name."""
        return key_of(key) if self.is_speculators else key

    def copies(self, keys: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a field's values by their keys, and the same in a form that can be compared."""
        values, meanings = {}, {}
        for key in keys:
            value = self.get(key)
            shifted = value is not None and key in _COUNTED_FROM_EMBEDDING
            place = self.place(key)
            label = f"{place} (counted from the embedding)" if shifted else place
            values[label] = meanings[label] = value
            if shifted:
                meanings[label] = [index - 1 for index in value]
            if key in _KEYS["dtype"]:
                meanings[label] = str(value).removeprefix("torch.")
        return values, meanings

    def resolve(self, field: str, keys: tuple[str, ...]) -> Any:
        """Return the value of `field`: the caller's, or the one that all its keys agree on."""
        if field in self.overrides:
            return self.overrides[field]
        return _one_of(field, *self.copies(keys))

    def fields(self) -> dict[str, Any]:
        """Return the keywords of the config class, without those that are None."""
        raise_first(self.findings())
        fields = {field: self.resolve(field, keys) for field, keys in self.keys().items()}
        self.check_lengths(fields["num_hidden_layers"])
        fields["layer_types"] = self.layer_types(fields["num_hidden_layers"])
        fields["sliding_window"] = self.sliding_window(fields["layer_types"])
        fields["is_causal"] = self.is_causal(fields)
        if self.is_speculators:
            self.fill_speculators(fields)
        fields["rope_parameters"] = self.rope(fields["head_dim"])
        self.check_widths(fields)
        fields["auto_map"] = own_auto_map({"auto_map": self.get("auto_map")})
        return {name: value for name, value in fields.items() if value is not None}

    def keys(self) -> dict[str, tuple[str, ...]]:
        """Return field -> its keys, for the fields whose keys must simply agree."""
        names = [field for field in (*REQUIRED, *DEFAULTED) if field != "target_layer_ids"]
        keys = {field: _KEYS.get(field, (field,)) for field in names}
        for field in (*self.layout.own, *self.layout.scales):
            more = _KEYS.get(field, ())
            keys[field] = (field, f"dflash_config.{field}", *more)
        keys["target_layer_ids"] = (*_TAP_KEYS, *_SHIFTED_TAP_KEYS)
        if self.is_speculators:
            keys = {field: (key_of(field),) for field in keys}
        return keys

    # Findings ------------------------------------------------------------------------------------------------------

    def findings(self) -> Iterator[Finding]:
        """Yield every fault that shows without the values of other fields; without one, the fields can be resolved."""
        refused = [*self.structure_findings(), *self.feature_findings()]
        yield from refused
        if not refused and not self.is_draft():
            yield self.not_a_draft()
            return
        yield from self.nested_key_findings()
        for field, keys in self.keys().items():
            wrong = [*self.content_findings(field, keys)]
            yield from wrong
            if field not in self.overrides and not wrong:
                yield from contradictions(field, *self.copies(keys))
        yield from self.missing_findings()
        for field, keys in _OTHER_KEYS.items():
            yield from self.content_findings(field, keys)

    def structure_findings(self) -> Iterator[Finding]:
        """Yield the caller's invalid values, and what the file holds in place of its dict, its class or its kind."""
        for field, value in self.overrides.items():
            if field in _RULES and value is not None:
                yield from field_findings(field, value, rule=_RULES[field])
        for key in ("dflash_config", "architectures", BODY):
            yield from self.content_findings(key, (key,))
        yield from self.speculators_findings()
        model_type = model_type_of(self.config)
        if model_type is not None:
            found = f"The draft's config.json says model_type is {shown(model_type)}"
            yield from field_findings("model_type", model_type, found)
        if model_type == "laguna":
            yield refusal("per-tap norms and attention gates (Laguna)", "model_type", model_type)

    def feature_findings(self) -> Iterator[Finding]:
        """Yield, by name, the features that this model cannot run."""
        for part, feature in _HEADS_BY_ARCHITECTURE:
            if part in (self.architecture or "") and not self.is_speculators:
                yield refusal(feature, "architectures", self.architectures)
        yield from self.variant_findings()
        for feature, key, unused in _FEATURES:
            if key in self.layout.scales:
                continue
            for full_key in (key,) if "." in key else (key, f"dflash_config.{key}"):
                value = self.get(full_key)
                if not is_among(value, unused):
                    yield refusal(feature, full_key, value, unused)

    def variant_findings(self) -> Iterator[Finding]:
        """Yield that this is a draft of another kind, with the class that loads it."""
        kinds = _signs(self.config | self.overrides) or {BASE: {}}
        for name, signs in kinds.items():
            found = KINDS[name]
            is_draft = self.architecture in found.architectures or bool(signs)
            if name == self.variant or not is_draft:
                continue
            key, value = next(iter((signs or {"architectures": self.architectures}).items()))
            what = (
                f"This config.json describes a {found.title} draft ({key} is {shown(value)}), which "
                f"{KINDS[self.variant].reader} does not run, so it is refused"
            )
            advice = (
                f"load it with {found.reader}.from_pretrained, or with dflash_hub.load_draft, "
                "which detects the kind"
            )
            yield Finding(what, name, self.variant, advice, ONE_SENTENCE)

    def speculators_findings(self) -> Iterator[Finding]:
        """Yield a kind of the speculators layout that is not run here, or that the file does not name."""
        names = [name for name, kind in KINDS.items() if kind.speculators]
        right = f"one of {', '.join(names)}"
        found = self.config.get(TYPE)
        if self.is_speculators and found not in names:
            what = (
                f"This draft is of the kind {shown(found)} ({TYPE}), which this version of dflash-hub does not run, so "
                f"it is refused"
            )
            yield Finding(
                what, found, right, f"in the speculators layout, it must be {right}", ONE_SENTENCE
            )
        for key in (BODY, TAPS, ABOUT):
            value = self.config.get(key)
            if not self.is_speculators and value not in _OFF:
                what = (
                    f"The draft's config.json has {key} of the speculators layout ({shown(value)})"
                )
                yield must(f"{what}, but {TYPE} is {shown(found)}", found, right)

    def is_draft(self) -> bool:
        """Return whether this config.json is a draft's, and not that of another model, such as the target's."""
        if self.is_speculators:
            return True
        has_keys = bool(self.nested)
        has_keys |= any(self.get(key) is not None for key in ("target_layer_ids", "mask_token_id"))
        unnamed = self.architecture is None and bool(self.overrides or has_keys)
        known = KINDS[self.variant].architectures
        if self.variant in _signs(self.config | self.overrides):
            known += KINDS[BASE].architectures  # of drafts whose head shows in other keys alone
        return self.architecture in known or unnamed

    def not_a_draft(self) -> Finding:
        """Return the finding that this config.json is that of another model."""
        kind = KINDS[self.variant]
        what = (
            f"This config.json describes {self.architecture or model_type_of(self.config)}, not a {kind.title} draft "
            f"(architectures is {shown(self.get('architectures'))}; known here: {', '.join(kind.architectures)})"
        )
        advice = "Pass the draft's repository, not its target's"
        return Finding(what, self.architecture, kind.architectures, advice)

    def nested_key_findings(self) -> Iterator[Finding]:
        """Yield the unknown keys inside dflash_config, because they may change what the draft computes."""
        for key, value in self.nested.items():
            if key in _NESTED:
                continue
            nearest = difflib.get_close_matches(str(key).lower(), sorted(_NESTED), n=1)
            if self.keys().get(key) == (key,) or key in _ONLY_AT_TOP:
                advice = "it belongs at the top."
            elif nearest:
                advice = f"is {nearest[0]} meant?"
            else:
                advice = "remove it if the draft does not need it."
            what = (
                f"The draft's config.json has dflash_config.{key}, which is {shown(value)}; no such key is known, "
                "so it is refused"
            )
            yield Finding(what, value, sorted(_NESTED), advice, "{what}: {advice}")

    def content_findings(self, field: str, keys: tuple[str, ...]) -> Iterator[Finding]:
        """Yield each value of a field that it may not hold, unless the caller passes one that replaces it."""
        if _REPLACED_BY.get(field, field) in self.overrides:
            return
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            place = self.place(key)
            where = "" if place == field else f" ({place})"
            found = f"The draft's config.json says {field} is {shown(value)}{where}"
            rule = _SHIFTED_TAPS if key in _COUNTED_FROM_EMBEDDING else _RULES[field]
            yield from field_findings(field, value, found, rule)
            if key in _ROPE_KEYS and isinstance(value, dict):
                yield from rope_key_findings(place, value)

    def missing_findings(self) -> Iterator[Finding]:
        """Yield the required fields that neither the file nor the caller has a value for."""
        for name in (*REQUIRED, *self.layout.fields, *self.layout.required):
            keys = self.keys()[name]
            values = [self.get(key) for key in keys]
            if name in self.overrides:
                values = [self.overrides[name]]
            if all(value is None for value in values):
                what = (
                    f"The draft's config.json does not say {name} ({self.describe_missing(keys)}), and it is not "
                    "guessed"
                )
                right = FIELDS[name].words
                advice = f"supply it: from_pretrained(..., {name}=...), {right}"
                yield Finding(what, None, right, advice, ONE_SENTENCE)
        if self.speculators.sample_from_anchor is None:
            yield from self.anchor_findings()

    def anchor_findings(self) -> Iterator[Finding]:
        """Yield that nobody says whether the anchor's position predicts a token, where files without it differ."""
        if self.resolve("sample_from_anchor", ("sample_from_anchor",)) is not None:
            return
        drafted = tokens_named(self.config)
        hint = (
            ""
            if drafted is None
            else f". It names {drafted} speculative_tokens for a block_size of {self.get('block_size')}"
        )
        what = (
            "The draft's config.json does not say sample_from_anchor; files without it were trained either way"
            f"{hint}"
        )
        advice = (
            "Supply it: load_draft(..., sample_from_anchor=False) if a block drafts block_size - 1 tokens, as in "
            "speculators before July 2026; sample_from_anchor=True if it drafts block_size. The wrong one decodes the "
            "same text, but hardly any draft is accepted; dflash-hub check DRAFT --target TARGET finds it by a run"
        )
        yield Finding(what, None, "True or False", advice)

    # Refusing while reading ----------------------------------------------------------------------------------------

    def check_lengths(self, layers: int) -> None:
        """Refuse lists with one entry per layer that are made for another number of layers."""
        keys = [("layer_types", "layer_types")]
        keys += [("is_causal", key) for key in self.keys()["is_causal"]]
        for field, key in keys:
            value = None if field in self.overrides else self.get(key)
            if isinstance(value, list) and len(value) != layers:
                raise ValueError(
                    f"The draft's config.json says {field} is {shown(value)} ({self.place(key)}) but "
                    f"num_hidden_layers is {layers}; it must be {FIELDS[field].words}."
                )

    def check_widths(self, fields: dict[str, Any]) -> None:
        """Refuse values of another width than keys."""
        head_dim = fields["head_dim"]
        width = self.get("v_head_dim")
        if width not in (None, head_dim):
            feature = f"values of another width than keys (head_dim, {head_dim})"
            raise refusal(feature, "v_head_dim", width).error()

    def describe_missing(self, keys: tuple[str, ...]) -> str:
        """Return how each key is missing: "no x" where it is absent, "x is None" where it is null or empty."""
        if "dflash_config" in self.config and not self.nested:
            keys = tuple(dict.fromkeys(key.partition(".")[0] for key in keys))
        words = []
        for key in keys:
            place = self.place(key)
            present = place.rpartition(".")[2] in self.level(key)
            words.append(f"{place} is {shown(self.get(key))}" if present else f"no {place}")
        return ", ".join(words)

    # Fields with rules of their own --------------------------------------------------------------------------------

    def layer_types(self, layers: int) -> list[str]:
        """Return each layer's type. As in vLLM, `use_swa` makes all layers slide where `layer_types` names none."""
        if "layer_types" in self.overrides:
            return self.overrides["layer_types"]
        types = self.get("layer_types")
        forced = self.get("dflash_config.use_swa")
        used = self.get("use_sliding_window")
        slides = SLIDING in (types or ())
        for key, value in (("use_sliding_window", used), ("dflash_config.use_swa", forced)):
            if slides and value is False:
                values = {self.place("layer_types"): types, self.place(key): value}
                raise_first(contradictions("layer_types", values))
        if forced and not slides:
            return [SLIDING] * layers
        if types:
            return types
        if self.is_muse:
            return [SLIDING] * layers
        if used and self.get("sliding_window"):
            raise ValueError(
                "The draft's config.json turns use_sliding_window on but does not say which layers slide "
                f"({self.describe_missing(('layer_types',))}); supply it: from_pretrained(..., layer_types=[...]), "
                f"{FIELDS['layer_types'].words}."
            )
        return [FULL] * layers

    def sliding_window(self, layer_types: list[str] | None) -> int | None:
        """Return the window of the sliding layers; None if no layer slides, even where the file has a window."""
        if SLIDING not in (layer_types or ()):
            return None
        window = self.resolve("sliding_window", _WINDOW_KEYS)
        if window is None:
            keys = [key for key in ("layer_types", "dflash_config.use_swa") if self.get(key)]
            reasons = " and ".join(f"{self.place(key)} is {shown(self.get(key))}" for key in keys)
            raise ValueError(
                f"The draft has sliding layers{f' ({reasons})' if reasons else ''}, but its config.json does not say "
                f"how far they see ({self.describe_missing(_WINDOW_KEYS)}); supply it: from_pretrained(..., "
                f"sliding_window=...), {FIELDS['sliding_window'].words}."
            )
        return window

    def is_causal(self, fields: dict[str, Any]) -> bool | list[bool] | None:
        """Return the file's value; without one, False for the two dialects whose sliding layers are bidirectional."""
        value = fields["is_causal"]
        forced = self.get("dflash_config.use_swa") and SLIDING not in (
            self.get("layer_types") or ()
        )
        return False if value is None and (self.is_muse or forced) else value

    @property
    def speculators(self) -> SpeculatorsDefaults:
        """What keys mean that a file in the speculators layout lacks."""
        found = KINDS[self.variant].speculators if self.is_speculators else None
        return found or SpeculatorsDefaults()

    def fill_speculators(self, fields: dict[str, Any]) -> None:
        """Add what the speculators layout says otherwise, or leaves to its defaults."""
        defaults = self.speculators
        if fields["sample_from_anchor"] is None:
            fields["sample_from_anchor"] = defaults.sample_from_anchor
        for field, value in {**_ALWAYS, **defaults.others}.items():
            if fields[field] is None:
                fields[field] = value
        non_causal = self.get(NON_CAUSAL)
        if non_causal is None:
            non_causal = defaults.sliding_window_non_causal
        if fields["is_causal"] is None:
            slides = (layer == SLIDING for layer in fields["layer_types"])
            fields["is_causal"] = [layer and not non_causal for layer in slides]

    def rope(self, head_dim: int) -> dict[str, Any]:
        """Return `rope_parameters`, from rope_parameters, rope_scaling or both. A theta is never guessed."""
        if "rope_parameters" in self.overrides:
            found = {"rope_parameters": self.overrides["rope_parameters"]}
        else:
            found = {self.place(key): self.get(key) for key in _ROPE_KEYS}
        forms = {key: modern_rope(key, rope) for key, rope in found.items()}
        merged = self.merge_rope(forms)
        merged["rope_theta"] = self.rope_theta(forms)
        if len(merged) > 1 and "rope_type" not in merged:
            raise ValueError(
                f"The draft's config.json scales its rotary embeddings ({shown(merged)}), but rope_type is None; it "
                f"must be {ROPE['rope_type'].words}; supply it: from_pretrained(..., "
                "rope_parameters={'rope_type': ..., ...})."
            )
        raw = {key: self.overrides.get(key, self.get(key)) for key in forms}
        described = " and ".join(f"{key} is {shown(rope)}" for key, rope in raw.items())
        raise_first(rope_findings(merged, head_dim, described))
        return {"rope_type": "default"} | merged

    def merge_rope(self, forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the entries of both rope dicts but the theta; an entry of both must be equal."""
        merged: dict[str, Any] = {}
        names: dict[str, None] = {}
        for form in forms.values():
            names |= dict.fromkeys(form)
        names.pop("rope_theta", None)
        for name in names:
            values = {f"{key}.{name}": form[name] for key, form in forms.items() if name in form}
            merged[name] = _one_of("rope_parameters", values)
        return merged

    def rope_theta(self, forms: dict[str, dict[str, Any]]) -> float:
        """Return the caller's theta, from either keyword; else the one that all its keys agree on."""
        values = _thetas(forms)
        if "rope_parameters" in self.overrides and not values:
            values = _thetas({self.place(key): self.get(key) or {} for key in _ROPE_KEYS})
        top = self.resolve("rope_theta", ("rope_theta",))
        if "rope_theta" in self.overrides:
            values = {"rope_theta": top}
        elif top is not None and not ("rope_parameters" in self.overrides and values):
            values[self.place("rope_theta")] = top
        theta = _one_of("rope_theta", values)
        if theta is None:
            missing = self.describe_missing(("rope_theta", *forms))
            raise ValueError(
                f"The draft's config.json says no rope_theta ({missing}), and a wrong one ruins long contexts "
                f"silently; supply it: from_pretrained(..., rope_theta=...), {FIELDS['rope_theta'].words}."
            )
        return theta


def _thetas(forms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the theta of each rope dict that has one, by its place."""
    return {
        f"{key}.rope_theta": form["rope_theta"]
        for key, form in forms.items()
        if "rope_theta" in form
    }
