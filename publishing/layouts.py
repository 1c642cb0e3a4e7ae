# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write drafts in the layouts of other projects: speculators, and the Muse assistant of transformers.

`layouts.py` reads them. The hub and the engines layout are written by the travelling files, these two by the package
alone. Sources: speculators 0.9.0 (`models/*/config.py`, `models/dflash/core.py`), and transformers' model
`muse_glimmer_assistant`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from ..configuration_dflash import write_config
from ..findings_dflash import ONE_SENTENCE, Finding, raise_first
from ..layouts_dflash import BASE, DRAFT_LAYOUTS, FULL, SLIDING
from ..layouts_speculators import ABOUT, AT_TOP, BODY, IN_BODY, NON_CAUSAL, TAPS, TYPE
from ..repository_dflash import check_repo_id

SPECULATORS_VERSION = "0.9.0"
"""The release of speculators whose layout is written."""

_MUSE = (
    "attention_dropout",
    "block_size",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "mask_token_id",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_target_layers",
    "rms_norm_eps",
    "rope_parameters",
    "target_layer_ids",
    "use_cache",
    "vocab_size",
)


@dataclass(frozen=True)
class OtherLayout:
    """Describe a layout of another project.

    Args:
        kinds: of drafts that it can hold.
        config: returns the config.json of a draft, given its target's Hub id or None.
        findings: yields what of a config it cannot say.
        renamed: patterns of names of tensors -> what replaces them.
        remarks: returns what its readers compute otherwise, a sentence each.
    """

    kinds: tuple[str, ...]
    config: Callable[[Any, str | None], dict[str, Any]]
    findings: Callable[[Any], Iterator[Finding]]
    renamed: dict[str, str]
    remarks: Callable[[Any], list[str]]


def write_layout(
    draft: Any,
    folder: Path,
    layout: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> list[str]:
    """Write config and weights of a draft into `folder`, in a layout of `OTHER_LAYOUTS`.

    Args:
        state_dict: its tensors, if they are not in the model; they may lie in files that are mapped into memory.
        max_shard_size: of one file.

    Returns:
        What readers of this layout compute otherwise, a sentence each.

    Raises:
        ValueError: the layout cannot say a field of the config; names it.
    """
    rules, config = OTHER_LAYOUTS[layout], draft.config
    raise_first(layout_findings(config, layout))
    tensors = draft.state_dict() if state_dict is None else state_dict
    tensors = renamed(tensors, rules.renamed)
    if config.draft_vocab_size is not None:
        tensors["t2d"] = known_tokens(tensors["d2t"], config.vocab_size)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    write_config(Path(folder), rules.config(config, base_model_of(draft)))
    return rules.remarks(config)


def layout_findings(config: Any, layout: str) -> Iterator[Finding]:
    """Yield what of a draft's config a layout of `OTHER_LAYOUTS` cannot say."""
    rules = OTHER_LAYOUTS[layout]
    if config.model_type not in rules.kinds:
        yield _unsayable(
            layout, "model_type", config.model_type, f"one of {', '.join(rules.kinds)}"
        )
        return
    if getattr(config, "quantization_config", None) is not None:
        found = config.quantization_config
        yield _unsayable(
            layout, "quantization_config", found, "None: no reader of it loads quantised drafts"
        )
    if config.has_own_mask_embedding:
        yield _unsayable(layout, "has_own_mask_embedding", True, "False")
    if config.vocab_size is None:
        yield _unsayable(layout, "vocab_size", None, "the target's")
    yield from rules.findings(config)


def renamed(tensors: dict[str, Any], patterns: dict[str, str]) -> dict[str, Any]:
    """Return the values under the names that the tensors have in a layout."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def known_tokens(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return which of the target's tokens a draft knows, bool `[V]`, from its `d2t [draft_vocab_size]`."""
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[d2t.cpu() + torch.arange(len(d2t))] = True
    return known


def base_model_of(draft: Any) -> str | None:
    """Return the Hub id of a draft's target: from `card_metadata`, the registry or its card; None if none says it."""
    card = draft.source_card(online=False)
    sources = [draft.card_metadata, draft.card_known]
    if card is not None:
        sources.append(card.data.to_dict())
    for source in sources:
        names = source.get("base_model")
        if names:
            name = names if isinstance(names, str) else names[0]
            check_repo_id(name)
            return name
    return None


def _unsayable(layout: str, field: str, value: Any, right: str) -> Finding:
    what = f"{field} is {value!r}, which the {layout} layout cannot say"
    advice = f"it would have to be {right}; write another layout"
    return Finding(what, value, right, advice, ONE_SENTENCE)


# speculators ------------------------------------------------------------------------------------------------------


def _speculators_config(config: Any, base_model: str | None) -> dict[str, Any]:
    """Return the config.json that speculators writes.

    Raises:
        ValueError: the target is not known, which vLLM loads by this name.
    """
    if base_model is None:
        raise ValueError(
            "The speculators layout names the target, which is not known: pass --base-model org/target, or set "
            'draft.card_metadata = {"base_model": "org/target"}.'
        )
    transformer = {name: getattr(config, name) for name in IN_BODY if hasattr(config, name)}
    transformer |= {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "use_sliding_window": SLIDING in config.layer_types,
    }
    content: dict[str, Any] = {
        "architectures": [config.architecture],
        TYPE: config.model_type,
        "speculators_version": SPECULATORS_VERSION,
        ABOUT: _proposals(config, base_model),
        BODY: transformer,
        TAPS: [layer + 1 for layer in config.target_layer_ids],
        NON_CAUSAL: not any(config.causal_layers),
        "tie_word_embeddings": False,
        # No key of speculators, which keeps keys that it does not know.
        "num_target_layers": config.num_target_layers,
        "unscaled_embeddings": config.unscaled_embeddings,
    }
    for field in (*AT_TOP, *DRAFT_LAYOUTS[config.model_type].own):
        content[field] = getattr(config, field)
    content["draft_vocab_size"] = config.draft_vocab_size or config.vocab_size
    content["target_hidden_size"] = _other_width(config)
    if config.dtype is not None:
        content["dtype"] = str(config.dtype).removeprefix("torch.")
    return content


def _proposals(config: Any, base_model: str) -> dict[str, Any]:
    """Return what speculators says about drafting and about the target."""
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": config.num_drafted,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "algorithm": config.model_type,
        "default_proposal_method": "greedy",
        "proposal_methods": [greedy],
        "verifier": {"name_or_path": base_model, "architectures": _architectures(base_model)},
    }


def _architectures(base_model: str) -> list[str]:
    """Return the architectures of a target, if the catalogue knows them."""
    from ..registry import drafts_for

    for spec in drafts_for(base_model):
        if spec.architectures:
            return list(spec.architectures)
    return []


def _other_width(config: Any) -> int | None:
    """Return the width of a tap where it is not the draft's own."""
    return None if config.target_hidden_size == config.hidden_size else config.target_hidden_size


def _speculators_findings(config: Any) -> Iterator[Finding]:
    """Yield what the speculators layout cannot say."""
    layers = list(zip(config.layer_types, config.causal_layers, strict=True))
    if (FULL, True) in layers:
        right = "False for full layers"
        yield _unsayable("speculators", "is_causal", config.is_causal, right)
    sliding = {causal for kind, causal in layers if kind == SLIDING}
    if len(sliding) > 1:
        right = "the same for all sliding layers"
        yield _unsayable("speculators", "is_causal", config.is_causal, right)
    if sliding and not config.window_from_anchor:
        right = "True, since speculators counts the window from the anchor"
        yield _unsayable("speculators", "window_from_anchor", False, right)
    for name in ("output_multiplier", "input_embedding_scale"):
        value = getattr(config, name, 1)
        if value != 1:
            yield _unsayable("speculators", name, value, "1")
    if config.final_logit_softcapping and config.model_type != BASE:
        value = config.final_logit_softcapping
        yield _unsayable("speculators", "final_logit_softcapping", value, "None")
    if config.has_own_embed_tokens:
        right = "False, since speculators takes the target's; --target leaves out a copy of it"
        yield _unsayable("speculators", "has_own_embed_tokens", True, right)
    if config.has_own_lm_head and config.draft_vocab_size is None:
        right = "False, since speculators takes the target's; --target leaves out a copy of it"
        yield _unsayable("speculators", "has_own_lm_head", True, right)


def _speculators_remarks(config: Any) -> list[str]:
    """Return what readers of the speculators layout compute otherwise."""
    remarks = []
    if any(config.causal_layers) and not all(config.causal_layers):
        remarks.append(
            "vLLM 0.26 to 0.33 runs all layers of this draft causally, also its full ones, and accepts fewer tokens."
        )
    if config.sample_from_anchor and config.model_type == BASE:
        remarks.append("vLLM refuses a DFlash draft whose anchor predicts (sample_from_anchor).")
    return remarks


# The Muse assistant -------------------------------------------------------------------------------------------------


def _muse_config(config: Any, base_model: str | None) -> dict[str, Any]:
    """Return the config.json of the Muse assistant, which transformers loads without code of a repository."""
    content = {name: getattr(config, name) for name in _MUSE}
    slides = SLIDING in config.layer_types
    content |= {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "is_causal": False,  # else SGLang runs sliding layers causally
        "use_sliding_window": slides,
        # Its class requires a number, which full layers do not read.
        "sliding_window": config.sliding_window or config.max_position_embeddings,
        # Its defaults are ids of the Muse tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.dtype is not None:
        content["dtype"] = str(config.dtype).removeprefix("torch.")
    return {name: value for name, value in content.items() if value is not None or "_token" in name}


def _muse_findings(config: Any) -> Iterator[Finding]:
    """Yield what the Muse layout cannot say."""
    if any(config.causal_layers):
        yield _unsayable("muse", "is_causal", config.is_causal, "False")
    unused: dict[str, Any] = {
        "attention_bias": False,
        "sample_from_anchor": False,
        "draft_vocab_size": None,
        "has_own_embed_tokens": False,
        "has_own_lm_head": False,
        "window_from_anchor": False,
        "unscaled_embeddings": False,
    }
    for name, right in unused.items():
        value = getattr(config, name)
        if value != right:
            yield _unsayable("muse", name, value, repr(right))
    if config.hidden_act != "silu":
        yield _unsayable("muse", "hidden_act", config.hidden_act, "'silu'")
    if _other_width(config) is not None:
        width = f"hidden_size, {config.hidden_size}"
        yield _unsayable("muse", "target_hidden_size", config.target_hidden_size, width)


def _muse_remarks(config: Any) -> list[str]:
    """Return what readers of the Muse layout compute otherwise."""
    if SLIDING not in config.layer_types:
        return []
    return [
        "transformers' own class sees one key more at the far end of a window than the engines and this package do."
    ]


OTHER_LAYOUTS: dict[str, OtherLayout] = {
    "speculators": OtherLayout(
        kinds=("dflash", "dflash2", "dspark"),
        config=_speculators_config,
        findings=_speculators_findings,
        renamed={},
        remarks=_speculators_remarks,
    ),
    "muse": OtherLayout(
        kinds=("dflash",),
        config=_muse_config,
        findings=_muse_findings,
        renamed={r"^fc\.": "encoder.fc.", r"^hidden_norm\.": "encoder.output_norm_enc."},
        remarks=_muse_remarks,
    ),
}
