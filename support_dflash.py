# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Hold support as data: the families of targets, and checks of targets and options that yield findings.

This file travels with every pushed draft. Decoding raises the first finding as a ValueError.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, StaticCache
from transformers.utils import logging

from .cache_dflash import RecurrentLayers
from .compat_dflash import (
    CACHE_NAMES,
    adapters_in_use,
    cache_in,
    cache_name,
    is_offloaded,
    loader_of,
    makes_own_cache,
    parameters,
    without_compiler,
)
from .families_dflash import TESTED
from .findings_dflash import Finding, raise_first
from .target_dflash import decoder_layers

logger = logging.get_logger(__name__)

_CACHE_LAYERS = {
    *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
    *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
}
"""The layers of transformers' caches whose state can be taken back."""

_NOT_DECODED = "It is not decoded here: its text could come out wrong"


# Targets --------------------------------------------------------------------------------------------------------------


def base_model(target: Any) -> Any:
    """Return the model inside the wrappers of PEFT and `torch.compile`, with its adapters; any other as it is."""
    target = without_compiler(target)
    return target.get_base_model() if hasattr(target, "get_base_model") else target


def check_target(target: Any, strict: bool = False) -> None:
    """Refuse a target that cannot be decoded exactly, before the first token.

    Args:
        strict: refuse families that the tests do not decode, too; so does DFLASH_STRICT=1 in the environment.

    Raises:
        ValueError: saying what the target is, and why it is refused.
    """
    raise_first(target_findings(target, strict))


def draft_findings(draft_config: Any, target: Any, strict: bool = False) -> Iterator[Finding]:
    """Yield every reason not to decode with a target, then every misfit of a draft with this config."""
    yield from target_findings(target, strict)
    if _is_language_model(target):
        text = target.config.get_text_config(decoder=True)
        rows = target.get_input_embeddings().weight.shape[0]
        yield from draft_config.fit_findings(
            text.hidden_size, text.num_hidden_layers, text.vocab_size, rows
        )


def _is_language_model(target: Any) -> bool:
    return not target.config.is_encoder_decoder and target.get_output_embeddings() is not None


def target_findings(target: Any, strict: bool = False) -> Iterator[Finding]:
    """Yield every reason not to decode with a target. A later one may rely on what an earlier one has checked."""
    name = type(target).__name__
    if not _is_language_model(target):
        what = f"{name} is no decoder-only language model"
        yield Finding(
            what, name, "a causal language model with a head", "A draft needs one as its target"
        )
        return
    yield from _adapter_findings(target)
    target = base_model(target)
    yield from _offload_findings(target)
    text = target.config.get_text_config(decoder=True)
    yield from _rope_findings(text)
    yield from _state_findings(text)
    bidirectional = getattr(text, "use_bidirectional_attention", None)
    if bidirectional in (True, "all"):
        what = (
            f"{text.model_type} with bidirectional attention writes no text that could be continued"
        )
        yield Finding(
            what,
            bidirectional,
            "causal attention",
            "Set use_bidirectional_attention to None in its config",
        )
    if text.model_type not in TESTED and (
        strict or os.environ.get("DFLASH_STRICT", "").lower() not in ("", "0", "false", "no", "off")
    ):
        what = f"{text.model_type} is not a family that the tests decode, and strict=True or DFLASH_STRICT=1 refuses it"
        yield Finding(
            what,
            text.model_type,
            sorted(TESTED),
            "Leave both out to decode where the self-check passes",
        )
    yield from _forward_findings(target)
    yield from _raised_by(
        lambda: RecurrentLayers(DynamicCache(config=text).layers, decoder_layers(target))
    )


def warn_of_new_family(target: Any) -> None:
    """Warn once about a family that the tests do not decode: what a self-check that passed proves, and what not."""
    family = target.config.get_text_config(decoder=True).model_type
    if family not in TESTED:
        logger.warning_once(
            f"{family} is not a family that the tests decode. The self-check passed: on a short text, a block gives "
            "what the target's own forward gives, and rejected tokens are taken back. That does not prove long texts "
            "or other batches. DFLASH_STRICT=1 refuses such targets."
        )


def warn_of_right_padding(mask: Any) -> None:
    """Say once that text follows padding, where a target predicts nothing sensible, with draft or without.

    Args:
        mask: `[B, P]`, 0 at padding; None for none.
    """
    if mask is None or mask.dim() != 2 or bool((mask[:, -1] != 0).all()):
        return
    logger.warning_once(
        "Prompts are padded on the right, so the shorter ones go on after their padding, as with plain generate. "
        'Pad on the left: tokenizer.padding_side = "left".'
    )


def warn_of_length(target: Any, length: int) -> None:
    """Warn before the first token if a text of `length` tokens would end beyond the target's positions."""
    text = target.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        logger.warning_once(
            f"The text may become {length:,} tokens long, prompt included, but this {text.model_type} was made for "
            f"{positions:,} (max_position_embeddings). What is written beyond them may be nonsense, or fail. Pass a "
            "smaller max_new_tokens=."
        )


def _raised_by(check: Callable[[], Any]) -> Iterator[Finding]:
    """Yield the ValueError of a check as a finding."""
    try:
        check()
    except ValueError as error:
        yield Finding(str(error).removesuffix("."), None, None, _NOT_DECODED)


def _adapter_findings(target: Any) -> Iterator[Finding]:
    """Refuse PEFT methods that depend on the prompt; adapters inside the layers that are always on are fine."""
    # PEFT puts its own method there
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", target)
    for config in adapters_in_use(wrapper):
        kind = config.peft_type.value
        if config.is_prompt_learning:
            what = (
                f"The target is wrapped by PEFT with {kind}, which puts virtual tokens before the prompt that have no "
                "ids, so a draft cannot read it"
            )
            yield Finding(
                what, kind, "adapters inside the layers", "Merge or leave out that adapter"
            )
        invocation = getattr(config, "alora_invocation_tokens", None)
        if invocation is not None:
            what = (
                "The target has an activated LoRA adapter (alora_invocation_tokens). It looks at the tokens of each "
                "forward, so a block does not get the weights that plain decoding gets"
            )
            yield Finding(what, invocation, "adapters that are always on", "Leave out that adapter")


def _offload_findings(target: Any) -> Iterator[Finding]:
    """Refuse an embedding or head that the draft cannot use: without weights, which no hook of its own brings."""
    parts = {"embedding": target.get_input_embeddings(), "head": target.get_output_embeddings()}
    for part, module in parts.items():
        if is_offloaded(module) and loader_of(module) is None:
            what = (
                f"The {part} of {type(target).__name__} is on the meta device. If anything loads its weights, a "
                "larger part of the model does, but a draft uses it alone"
            )
            expected = "weights, or a hook of its own that brings them"
            advice = "Load the target with its embedding and head on a device, by device_map"
            yield Finding(what, "meta", expected, advice)


def _forward_findings(target: Any) -> Iterator[Finding]:
    """Refuse models whose forward cannot be run over slots of a cache."""
    name = type(target).__name__
    known = parameters(target.forward) | parameters(target.get_decoder().forward)
    for argument in ("position_ids", "attention_mask"):
        if argument not in known:
            what = f"{name} takes no {argument}, so it counts the tokens of a text by itself, rejected ones included"
            yield Finding(what, sorted(known), argument, _NOT_DECODED)
    yield from _raised_by(lambda: cache_name(target.forward))
    if makes_own_cache(target):
        what = (
            f"{name} makes a cache of its own kind, which cannot be put back after a rejected token"
        )
        yield Finding(what, "a cache of its own", "a DynamicCache", _NOT_DECODED)
    width = target.get_input_embeddings().weight.shape[-1]
    hidden_size = target.config.get_text_config(decoder=True).hidden_size
    if width != hidden_size:
        what = f"{name} embeds its tokens {width} wide and has hidden states of {hidden_size}"
        yield Finding(
            what, width, hidden_size, "A draft is made for targets where both are one width"
        )


def _state_findings(text: Any) -> Iterator[Finding]:
    """Refuse layers whose state is neither keys and values in slots nor recurrent state that can be rolled back."""
    layers = DynamicCache(config=text).layers
    kinds = sorted({type(layer).__name__ for layer in layers} - _CACHE_LAYERS)
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        kinds.append("chunked attention")
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        kinds.append("no attention layer at all")
    if kinds:
        found = ", ".join(kinds)
        what = f"{text.model_type} keeps state that cannot be put back exactly after a rejected token ({found})"
        yield Finding(what, found, sorted(_CACHE_LAYERS), _NOT_DECODED)


def _rope_findings(text: Any) -> Iterator[Finding]:
    """Refuse rotary frequencies that depend on the length so far: a rejected token would change them for good."""
    rope = getattr(text, "rope_parameters", None) or {}
    forms = [rope, *(form for form in rope.values() if isinstance(form, dict))]
    kinds = [form.get("rope_type") for form in forms]
    for kind in sorted({"dynamic", "longrope"}.intersection(kinds)):
        what = (
            f"{text.model_type} uses rotary embeddings of type {kind}, which change with the length of the text and "
            "are not put back after a rejected token"
        )
        yield Finding(what, kind, "frequencies that do not depend on the length", _NOT_DECODED)


# Options of `generate` ------------------------------------------------------------------------------------------------


def check_options(
    model: Any, config: GenerationConfig, input_ids: torch.Tensor, inputs: dict[str, Any]
) -> None:
    """Refuse options that have no meaning with a draft for this target.

    Args:
        input_ids `[B, P]`.
        inputs: everything else that `generate` would hand to the target's forward.

    Raises:
        ValueError: saying what, why, and what to do.
    """
    raise_first(config_findings(config))
    raise_first(input_findings(config, input_ids, inputs))
    raise_first(forward_findings(model, inputs))
    warn_of_right_padding(inputs.get("attention_mask"))


IGNORED = ("assistant_model", "synced_gpus")
"""Arguments that `generate` drops for every decoding function."""

_OF_ASSISTANTS = (
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("max_matching_ngram_size", "is_assistant", "continuous_batching_config"),
)
"""Keywords that only another way of decoding reads."""


def check_arguments(draft: Any, asked: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Refuse arguments of `generate` that it would ignore beside a draft.

    Args:
        asked: the values of `IGNORED`; the draft itself may be the assistant.
        keywords: the other keywords that `generate` was called with.

    Raises:
        ValueError: naming the argument.
    """
    raise_first(argument_findings(draft, asked, keywords))


def argument_findings(
    draft: Any, asked: dict[str, Any], keywords: dict[str, Any]
) -> Iterator[Finding]:
    """Yield the arguments that `generate` ignores beside a draft; the same as for `check_arguments`."""
    if asked["assistant_model"] not in (None, draft):
        yield _option_finding("assistant_model", "the draft proposes the tokens")
    if asked["synced_gpus"]:
        yield _option_finding("synced_gpus", "each process accepts other numbers of tokens")
    for name in _OF_ASSISTANTS:
        if keywords.get(name) is not None:
            why = "it belongs to another way of decoding; a draft's block has its own size"
            yield _option_finding(name, why)


_OTHER_WAYS = {
    "prompt_lookup_num_tokens": "it chooses transformers' own look-ups; ours are `custom_generate=lookup_generate`",
    "assistant_early_exit": "the draft proposes the tokens, not early layers of the target",
    "force_words_ids": "words are forced by a search with beams",
    "constraints": "constraints are met by a search with beams",
}
"""Settings that choose another way of decoding, and why they have no meaning with a draft."""


def config_findings(config: GenerationConfig) -> Iterator[Finding]:
    """Yield the settings of a generation config that have no meaning with a draft."""
    if (config.num_beams or 1) > 1:
        why = "beams are searched with the scores of whole texts, a draft speeds up one text at a time"
        yield _option_finding("num_beams above 1", why)
    if config.penalty_alpha:
        yield _option_finding(
            "penalty_alpha", "contrastive search ranks several tokens by hidden states"
        )
    if config.dola_layers:
        yield _option_finding("dola_layers", "DoLa takes its scores from two layers")
    layers = config.output_hidden_states or config.output_attentions
    if layers and config.return_dict_in_generate and config.use_cache is False:
        why = "plain decoding then returns those of the whole text at every step"
        yield _option_finding("hidden states or attentions without a cache", why)
    for name, why in _OTHER_WAYS.items():
        if getattr(config, name, None) is not None:
            yield _option_finding(name, why)
    if (getattr(config, "num_beam_groups", None) or 1) > 1:
        yield _option_finding("num_beam_groups above 1", "groups are groups of beams")
    if getattr(config, "diversity_penalty", None):
        yield _option_finding("diversity_penalty", "it compares groups of beams")
    if getattr(config, "use_mtp", None):
        yield _option_finding("use_mtp", "the draft proposes the tokens, not heads of the target")
    if getattr(config, "speculation_type", None) not in (None, "dflash"):
        why = "this draft is a DFlash draft, and decodes in its own loop"
        yield _option_finding(f"speculation_type={config.speculation_type!r}", why)


def input_findings(
    config: GenerationConfig, input_ids: torch.Tensor, inputs: dict[str, Any]
) -> Iterator[Finding]:
    """Yield the inputs, caches included, that have no meaning with a draft."""
    cache = cache_in(inputs)
    kind, implementation = type(cache).__name__, config.cache_implementation
    known = cache is None or isinstance(cache, DynamicCache | StaticCache)
    if not known and implementation is None:
        what = (
            f"The cache is a {kind}; with a draft only a DynamicCache or a StaticCache carries on"
        )
        yield Finding(what, kind, "a DynamicCache or a StaticCache", "Pass one, or no cache")
    embeds = inputs.get("inputs_embeds")
    if embeds is not None and cache is not None and cache.get_seq_length():
        why = "which slots the embeddings belong to is not known; pass input_ids"
        yield _option_finding("inputs_embeds and a cache that is not empty", why)
    yield from _embeds_findings(inputs)
    if implementation == "quantized" or "Quantized" in kind:
        why = "its keys are not those of plain decoding once a token was rejected"
        yield _option_finding("cache_implementation='quantized'", why)
    if "offloaded" in str(implementation) or getattr(cache, "offloading", False):
        yield _option_finding("an offloaded cache", "keys are kept on the target's device here")
    if input_ids.shape[1] == 0 and embeds is None:
        what = f"input_ids has shape {tuple(input_ids.shape)}; a prompt needs at least one token"
        yield Finding(what, tuple(input_ids.shape), "[B, P] with P of 1 or more", "Give it one")


_FORWARD_INPUTS = frozenset(
    {
        *("attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "use_cache"),
        *("logits_to_keep", "cache_position", "num_items_in_batch", *CACHE_NAMES),
    }
)
"""What a text model's forward may be given besides ids; the `output_...` options too."""


def _embeds_findings(inputs: dict[str, Any]) -> Iterator[Finding]:
    """Yield masks and positions of another length than the embeddings; a mask may be inferred from longer ids."""
    embeds = inputs.get("inputs_embeds")
    for name in ("attention_mask", "position_ids"):
        given = inputs.get(name)
        if embeds is None or given is None or given.shape[-1] == embeds.shape[1]:
            continue
        what = f"inputs_embeds has {embeds.shape[1]} positions, and {name} covers {given.shape[-1]}"
        yield Finding(
            what,
            given.shape[-1],
            embeds.shape[1],
            f"Pass {name} of that length, and as many input_ids or none",
        )


def forward_findings(model: Any, inputs: dict[str, Any]) -> Iterator[Finding]:
    """Yield inputs of a text model's forward that a block cannot be given.

    With images, sound or video, the target's own preparation decides what its forward is given.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        return
    for name, value in inputs.items():
        if value is not None and name not in _FORWARD_INPUTS and not name.startswith("output_"):
            why = "plain decoding gives it to the forward of every token, and a block has none"
            yield _option_finding(name, why)


def _option_finding(option: str, why: str) -> Finding:
    what = f"A draft cannot be used with {option}: {why}"
    return Finding(what, option, f"generate without {option}", "Leave one of the two out")
