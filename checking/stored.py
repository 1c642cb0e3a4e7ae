# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Describe a draft as engines find it: the raw config.json, names of tensors, names of files."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..layouts import variant_of
from ..layouts_dflash import BASE, SLIDING, is_among

_OFF = (None, False, 0)
# Names of the tensors that every kind of draft has, by their ends.
_BODY = (
    *("fc.weight", "hidden_norm.weight", "norm.weight"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    *("q_norm.weight", "k_norm.weight"),
    *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    *("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"),
)
# Linear layers, whose quantised tensors have other ends: weight_scale, weight_packed ...
_LINEAR = (
    "fc.",
    "q_proj.",
    "k_proj.",
    "v_proj.",
    "o_proj.",
    "gate_proj.",
    "up_proj.",
    "down_proj.",
)
_MUSE_BODY = ("encoder.fc.weight", "encoder.output_norm_enc.weight")


def nested_in(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dflash_config of a config.json; {} without one."""
    nested = config.get("dflash_config")
    return nested if isinstance(nested, dict) else {}


def architecture_in(config: dict[str, Any]) -> str:
    """Return the first of `architectures` of a config.json; "" without one."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


@dataclass(frozen=True)
class StoredDraft:
    """Describe a draft as its files are.

    Args:
        config: the content of config.json.
        tensors: their names.
        files: their names.
        own_code: names of files that bear dflash-hub's copyright line.
        target_hidden_size, target_type: the target's, where one is checked against.
    """

    config: dict[str, Any]
    tensors: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    own_code: frozenset[str] = frozenset()
    target_hidden_size: int | None = field(default=None, kw_only=True)
    target_type: str | None = field(default=None, kw_only=True)

    @property
    def nested(self) -> dict[str, Any]:
        return nested_in(self.config)

    def top(self, key: str) -> Any:
        """Return the value at the top; None without one."""
        return self.config.get(key)

    def inner(self, key: str) -> Any:
        """Return the value in dflash_config; None without one."""
        return self.nested.get(key)

    def either(self, key: str) -> Any:
        """Return the value in dflash_config, else the one at the top."""
        inner = self.inner(key)
        return self.top(key) if inner is None else inner

    def uses(self, key: str) -> bool:
        """Tell whether a feature is on, in either place."""
        return not is_among(self.either(key), _OFF)

    @property
    def model_type(self) -> Any:
        return self.top("model_type")

    @property
    def architecture(self) -> str:
        return architecture_in(self.config)

    @property
    def auto_map(self) -> dict[str, Any]:
        found = self.top("auto_map")
        return found if isinstance(found, dict) else {}

    @property
    def is_speculators(self) -> bool:
        return "speculators_model_type" in self.config or "speculators_config" in self.config

    @property
    def is_muse(self) -> bool:
        return self.model_type == "muse_glimmer_assistant"

    @cached_property
    def kind(self) -> str:
        """The kind of draft, as `layouts.variant_of` names it."""
        try:
            return variant_of(self.config)
        except (ValueError, TypeError):
            return BASE

    @property
    def head(self) -> str:
        """Which head it has: "dflash", "dflash2", "dspark", "domino" or another project's name for one."""
        projector = self.either("projector_type")
        named = self.top("speculators_model_type") or projector
        if isinstance(named, str):
            return named
        for part in ("DSpark", "Domino", "DFlash2"):
            if part in self.architecture:
                return part.lower()
        if self.uses("markov_rank"):
            return "dspark"
        if self.uses("gru_hidden_dim"):
            return "domino"
        return "dflash2" if self.uses("selector_rank") else "dflash"

    # Layers ----------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        inner = self.top("transformer_layer_config")
        value = (inner if isinstance(inner, dict) else self.config).get("num_hidden_layers")
        return value if isinstance(value, int) and value > 0 else 1

    @property
    def layer_types(self) -> list[Any]:
        """The types that the file names; [] where it names none."""
        inner = self.top("transformer_layer_config")
        types = (inner if isinstance(inner, dict) else self.config).get("layer_types")
        return types if isinstance(types, list) else []

    @property
    def names_sliding_layers(self) -> bool:
        return SLIDING in self.layer_types

    @property
    def slides(self) -> bool:
        """Whether any layer slides as the draft was trained, in whichever words the file says so."""
        muse = self.is_muse and not self.layer_types
        return self.names_sliding_layers or bool(self.inner("use_swa")) or muse

    @property
    def causal(self) -> list[bool]:
        """Whether each layer is causal, as dflash-hub reads the file."""
        for value in (self.top("is_causal"), self.inner("causal"), self.inner("causal_head")):
            if isinstance(value, bool):
                return [value] * self.layers
            if isinstance(value, list):
                return value
        if self.is_muse or not self.names_sliding_layers:
            return [False] * self.layers
        return [one == SLIDING for one in self.layer_types]

    # Tensors ---------------------------------------------------------------------------------------------------------

    @cached_property
    def further_tensors(self) -> list[str]:
        """Names of tensors that the body of a draft does not have, without embedding, head and tables of ids."""
        known = {*self.vocabulary_tensors, *self.quantised_tensors}
        return sorted(name for name in self._besides_body() if name not in known)

    @cached_property
    def quantised_tensors(self) -> list[str]:
        """Names of tensors of quantised layers: a weight's scales, packed weights and the like."""
        if self.top("quantization_config") is None:
            return []
        found = []
        for name in self._besides_body():
            if any(part in name for part in _LINEAR):
                found.append(name)
        return sorted(found)

    def _besides_body(self) -> list[str]:
        """Return the names of tensors, without the prefix, that the body of a draft in floats does not have."""
        found = []
        for name in self.tensors:
            bare = name.removeprefix("model.")
            body = bare in _BODY[:3] or (bare.startswith("layers.") and bare.endswith(_BODY[3:]))
            if not body and bare not in _MUSE_BODY and not bare.endswith("inv_freq"):
                found.append(bare)
        return found

    vocabulary_tensors = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")

    @property
    def ships(self) -> list[str]:
        """Which of the tensors of a vocabulary it ships."""
        bare = {name.removeprefix("model.") for name in self.tensors}
        return [name for name in self.vocabulary_tensors if name in bare]

    @property
    def is_reduced(self) -> bool:
        """Whether it predicts fewer tokens than the target has."""
        inner = self.top("transformer_layer_config")
        vocab = (inner if isinstance(inner, dict) else self.config).get("vocab_size")
        reduced = self.either("draft_vocab_size")
        smaller = isinstance(reduced, int) and isinstance(vocab, int) and reduced != vocab
        return smaller or "d2t" in self.ships


def stored_draft(files: Any, own_code: Iterable[str], target: Any = None) -> StoredDraft:
    """Return what engines find of a draft.

    Args:
        files: the `DraftFiles`.
        own_code: names of files of dflash-hub's.
        target: a `Target` to check against.
    """
    text = None if target is None else target.text
    return StoredDraft(
        files.config,
        frozenset(files.tensors),
        frozenset(files.names),
        frozenset(own_code),
        target_hidden_size=getattr(text, "hidden_size", None),
        target_type=getattr(text, "model_type", None),
    )
