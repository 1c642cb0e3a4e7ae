# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read the config that the reference implementation's classes take: Qwen3's, with a `dflash_config`.

It stays in the package: a repository's draft has a config of its own. Source: z-lab/dflash.
"""

from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .layouts import read_layout
from .layouts_dflash import DRAFT_LAYOUTS, LAYERS, check_field, int_from


def read_qwen3(config_class: Any, config: PretrainedConfig) -> Any:
    """Translate a Qwen3 config into one of `config_class`.

    One that was loaded from a draft is read as its file. A new one has the reference's defaults: blocks are
    bidirectional, and taps are spread by `build_target_layer_ids`, one for each layer of the draft.

    Raises:
        ValueError: as in `from_dict`; its message says how a draft for a target is built.
    """
    variant, content = config_class.model_type, config.to_dict()
    names = content.get("architectures") or []
    is_new = not config.name_or_path or all(map(_is_targets, names))
    if is_new and content.get("dflash_config") and all(map(_is_targets, names)):
        content["architectures"] = None  # of a target, whose config was copied to be changed
    try:
        overrides = _original_defaults(config_class, content) if is_new else {}
        fields = read_layout(content, overrides, variant)
    except ValueError as error:
        raise ValueError(
            f"This {type(config).__name__} does not describe a draft. {error}\nSet what is missing in the config "
            "or in its dflash_config; or build a draft for a target: "
            "dflash_hub.DFlashDraftSpec().build(target.config, mask_token_id=...)."
        ) from None
    if is_new and fields.get("is_causal") is None:
        fields["is_causal"] = False
    fields.pop("quantization_config", None)  # a copied target's: what is built is not quantised
    return config_class(**fields)


def _original_defaults(config_class: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Return the values that the reference implementation has for fields that a `dflash_config` may leave out."""
    nested, layers = content.get("dflash_config"), content.get("num_target_layers")
    if not nested:
        return {}
    missing, variant = {}, config_class.model_type
    if config_class.has_usual_head:
        for name in DRAFT_LAYOUTS[variant].fields:
            missing[name] = config_class.__dataclass_fields__[name].default
    if layers:
        missing["target_layer_ids"] = build_target_layer_ids(layers, content["num_hidden_layers"])
    given = {*content, *nested}
    return {name: value for name, value in missing.items() if name not in given}


def _is_targets(architecture: str) -> bool:
    """Return whether this is the name of a class of targets, not of drafts."""
    return architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))


def build_target_layer_ids(num_target_layers: int, num_draft_layers: int = 5) -> list[int]:
    """Return `num_draft_layers` layers to tap, spread evenly from the second to the third-last, as in z-lab/dflash.

    A single one is the middle layer. The name and the arguments are the original's, which has a tap for each layer of
    the draft.

    Raises:
        ValueError: the target is too shallow for that many.
    """
    taps = num_draft_layers
    for name, value in (("num_target_layers", num_target_layers), ("num_draft_layers", taps)):
        check_field(name, value, rule=int_from(-LAYERS, LAYERS))
    first, last = 1, num_target_layers - 3
    if min(taps, num_target_layers) < 1:
        raise ValueError(
            f"{taps} taps of a target with {num_target_layers} layers are asked for; both must be at least 1."
        )
    if taps == 1:
        return [num_target_layers // 2]
    if last - first + 1 < taps:
        raise ValueError(
            f"The target has {num_target_layers} layers, too few to spread {taps} taps from the second to the "
            "third-last; choose them yourself: target_layer_ids=[...]."
        )
    return [round(first + index * (last - first) / (taps - 1)) for index in range(taps)]
