# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check a config.json: whose layout it is, what is wrong in it, and what other readers would take otherwise."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from ..configuration_dflash import DFlashConfig
from ..kinds import KINDS, MUSE
from ..layouts import layout_findings, read_layout, variant_of
from ..layouts_dflash import DRAFT_LAYOUTS, FIELDS, SLIDING, shown
from .remarks import Remark, Section
from .stored import architecture_in, nested_in

_SECTION = Section("config")
_KEYS = {*FIELDS, "sliding_window", "dflash_config", "auto_map", "use_sliding_window"}


def _is_hub(config: dict[str, Any]) -> bool:
    return "dflash_hub_version" in config or config.get("model_type") in DRAFT_LAYOUTS


def _is_engines(config: dict[str, Any]) -> bool:
    own = {"block_size", "mask_token_id", "target_layer_ids", "num_target_layers"}
    both = own <= config.keys() and own <= nested_in(config).keys()
    return both and {"rope_theta", "rope_parameters", "max_window_layers"} <= config.keys()


def _is_model_optimizer(config: dict[str, Any]) -> bool:
    own = {"causal", "use_swa", "swa_window_size"} & nested_in(config).keys()
    return bool(own) and "auto_map" not in config


# Layout -> how it is recognised; the first that fits counts.
LAYOUTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the hub layout of dflash-hub": _is_hub,
    "speculators": lambda config: bool(
        {"speculators_model_type", "speculators_config"} & config.keys()
    ),
    "the Muse assistant of transformers": lambda config: (
        config.get("model_type") == "muse_glimmer_assistant" or architecture_in(config) == MUSE
    ),
    "JetSpec": lambda config: bool(
        {"causal_head", "hidden_dim_adapter"} & {*nested_in(config), *config}
    ),
    "NVIDIA, served": lambda config: "eagle_aux_hidden_state_layer_ids" in config,
    "the engines layout of dflash-hub": _is_engines,
    "NVIDIA NeMo AutoModel": lambda config: architecture_in(config).startswith("Qwen3DFlash"),
    "SpecForge (DSpark)": lambda config: (
        "DSpark" in architecture_in(config) and "dflash_config" in config
    ),
    "DeepSpec (DSpark)": lambda config: "DSpark" in architecture_in(config),
    "Domino": lambda config: "gru_hidden_dim" in {*nested_in(config), *config},
    "NVIDIA Model Optimizer": _is_model_optimizer,
    "SpecForge": lambda config: {"rope_theta", "rope_parameters", "dflash_config"} <= config.keys(),
    "z-lab, older": lambda config: {"rope_theta", "dflash_config"} <= config.keys(),
    "z-lab, newer": lambda config: {"rope_parameters", "dflash_config"} <= config.keys(),
}


def layout_of(config: dict[str, Any]) -> str:
    """Return whose layout a config.json has, in words; "unknown" for no layout that is known here."""
    return next((name for name, fits in LAYOUTS.items() if fits(config)), "unknown")


ANCHOR = "sample_from_anchor"


def draft_config(
    config: dict[str, Any], supplied: dict[str, Any] | None = None
) -> DFlashConfig | None:
    """Return the config that a config.json is read into, with the `supplied` fields; None if it cannot be read."""
    try:
        variant = variant_of(config)
        return KINDS[variant].config_class(**read_layout(config, supplied or {}, variant))
    except ValueError:
        return None


def readable_config(config: dict[str, Any]) -> tuple[DFlashConfig | None, dict[str, Any]]:
    """Return the config of a config.json; and the field that was supplied, where the anchor's convention alone lacks.

    Both conventions read such a file, and only a run tells which one the weights were trained for.
    """
    found = draft_config(config)
    if found is not None:
        return found, {}
    supplied = {ANCHOR: False}
    found = draft_config(config, supplied)
    return found, {} if found is None else supplied


def config_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Yield everything that is wrong in a config.json, and what readers take in different ways."""
    yield from _SECTION.errors("config-invalid", layout_findings(config))
    yield from _null_remarks(config)
    if "speculators_model_type" not in config and not _is_hub(config):
        yield from _model_type_remarks(config)
    yield from _window_remarks(config)
    yield from _anchor_remarks(config)
    yield from _spelling_remarks(config)


def _null_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Warn of a dflash_config that is null; one of another wrong kind is an error of the layout."""
    if "dflash_config" in config and config["dflash_config"] is None:
        what = "dflash_config is null, at which vLLM fails"
        yield _SECTION.warning("dflash-config-null", what, None, "a dict, or no key", "Remove it")


def _model_type_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Warn of a model_type that no release of transformers registers, which AutoConfig refuses."""
    model_type = config.get("model_type")
    auto_map = config.get("auto_map")
    has_config = isinstance(auto_map, dict) and "AutoConfig" in auto_map
    if model_type in CONFIG_MAPPING_NAMES or has_config:
        return
    what = f"model_type is {shown(model_type)}, which transformers does not register, and auto_map has no AutoConfig"
    advice = 'Set model_type to "qwen3", or: dflash-hub convert DRAFT FOLDER --layout engines'
    yield _SECTION.warning("model-type-unregistered", what, model_type, "qwen3", advice)


def _window_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Warn of windows that some readers see and others do not."""
    nested, types = nested_in(config), config.get("layer_types") or []
    slides = isinstance(types, list) and SLIDING in types
    is_qwen3 = config.get("model_type") == "qwen3"
    if slides and is_qwen3 and config.get("use_sliding_window") is not True:
        what = (
            f"layer_types has sliding layers, but use_sliding_window is {shown(config.get('use_sliding_window'))}: "
            "transformers' Qwen3Config then sets sliding_window to None"
        )
        advice = "Write use_sliding_window: true; vLLM and SGLang refuse the file as it is"
        yield _SECTION.warning("window-nulled", what, None, True, advice)
    if nested.get("use_swa") and not slides:
        what = (
            "dflash_config.use_swa is on, but layer_types are all full: vLLM, llama.cpp and dflash-hub apply the "
            "window, and SGLang, TensorRT-LLM and the MLX readers do not"
        )
        advice = (
            f"Write layer_types as {SLIDING!r}, with sliding_window and use_sliding_window: true"
        )
        yield _SECTION.warning("window-in-one-place", what, types, [SLIDING], advice)


def _anchor_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Warn of a DSpark draft of speculators that does not say whether its anchor predicts."""
    is_dspark = config.get("speculators_model_type") == "dspark"
    if is_dspark and config.get("sample_from_anchor") is None:
        what = (
            "sample_from_anchor is missing: speculators before July 2026 trained without, newer releases with it, and "
            "readers take either"
        )
        advice = "Write it; a run with --target compares both"
        yield _SECTION.warning("anchor-unsaid", what, None, "true or false", advice)


def _spelling_remarks(config: dict[str, Any]) -> Iterator[Remark]:
    """Warn of keys at the top that resemble a known key, but are none. Keys in dflash_config are checked as errors."""
    known = sorted(_KEYS)
    others = {*Qwen3Config().to_dict(), *config.keys()} & {*Qwen3Config().to_dict()}
    for key in sorted(config.keys() - _KEYS - others):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
        if not near:
            continue
        what = f"{key} is a key that nobody reads; is {near[0]} meant?"
        advice = "Correct the name"
        if near[0] in config:
            what = f"{key} is a key that nobody reads; {near[0]} stands beside it, and counts"
            advice = "Remove it, or move its value there if that is the right one"
        yield _SECTION.warning("key-misspelt", what, key, near[0], advice)
