# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say where the speculators layout has the fields of a draft. `layouts.py` reads it by this table.

Its config.json has no `model_type`. What a Qwen3 config holds stands in one dict of it, all else at the top. The
defaults that differ by kind are in `kinds.py`.
"""

import re
from typing import Any

from .layouts_dflash import SLIDING

TYPE = "speculators_model_type"
"""Names the kind; no other layout has this key."""
BODY = "transformer_layer_config"
"""Holds what a Qwen3 config holds."""
TAPS = "aux_hidden_state_layer_ids"
"""Indices of hidden_states, where 0 is the embedding: one more than the layer with that output."""
NON_CAUSAL = "sliding_window_non_causal"
"""Whether sliding layers are bidirectional inside a block; full layers always are."""
ABOUT = "speculators_config"
"""Describes how the draft is used, and names its target, the "verifier"."""

IN_BODY = (
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
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
"""Fields of a draft, under the same names, in `BODY`."""
AT_TOP = (
    "block_size",
    "mask_token_id",
    "target_hidden_size",
    "draft_vocab_size",
    "sample_from_anchor",
    "dtype",
)
"""Fields of a draft of any kind, under the same names, at the top. Those that a kind adds stand there too."""


def key_of(field: str) -> str:
    """Return the key of a field; a dotted one is inside a dict of the file."""
    if field == "target_layer_ids":
        return TAPS
    return f"{BODY}.{field}" if field in IN_BODY else field


def rope_in_use(rope: Any) -> Any:
    """Return the part of a rope dict that speculators computes with.

    Where layer types have dicts of their own, that is the one of sliding layers, for all layers. The rotary embeddings
    of the type "default" are Qwen3's, which rotate all channels whatever `partial_rotary_factor` says.
    """
    if not isinstance(rope, dict):
        return rope
    if isinstance(rope.get(SLIDING), dict):
        rope = rope[SLIDING]
    kinds = (rope.get("rope_type"), rope.get("type"))
    if any(kind not in (None, "default") for kind in kinds):
        return rope
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def _about(config: dict[str, Any], *keys: str) -> Any:
    """Return a value inside `ABOUT`, from dict to dict; None if one of them is missing."""
    value: Any = config.get(ABOUT)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def target_named(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the target that a config.json names; None for a folder, or without one."""
    name = _about(config, "verifier", "name_or_path")
    is_id = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return name if is_id else None


def tokens_named(config: dict[str, Any]) -> int | None:
    """Return how many tokens a block drafts by the file's first proposal method; None where it does not say."""
    methods = _about(config, "proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    found = first.get("speculative_tokens") if isinstance(first, dict) else None
    return found if isinstance(found, int) else None
