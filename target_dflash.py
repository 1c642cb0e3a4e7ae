# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The target while a draft speeds it up: which targets can be, their forwards over a block, and taking a block back.

This file travels with every pushed draft. A prompt goes through the target exactly as in plain `generate`: its own
attention, its own masks. After that the target's attention reads columns of a cache (`cache_dflash`), under masks of
our own, until the decode ends; the target is then as it was found.

Shapes: B rows, P prompt columns, N new positions, Q block positions, V vocabulary, F taps * target hidden size.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_dflash import ColumnCache, ColumnLayer, Masks, widen
from .capture_dflash import Captured
from .compat_dflash import (
    attention_name,
    cache_name,
    difference,
    makes_own_cache,
    names_attention,
    own_eager,
    parameters,
    set_attention_name,
    without_cache,
)
from .recurrence_dflash import Recurrence
from .support_dflash import TESTED
from .taps_dflash import Taps

logger = logging.get_logger(__name__)

_LAYERS = {
    *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
    *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
}
"""The layers of transformers' caches whose state can be taken back."""


class BlockAttention:
    """Attention over columns of a cache, under masks by position, in place of a model's own.

    Args:
        kinds: of each layer, its window (None for all) and whether it is causal.

    While active, the model's configs name this attention, for which transformers builds no masks. The model's
    `sdpa` attention runs with its query heads packed by key head, so that keys are never repeated; `eager` attention,
    and what only it can do (sinks, soft caps), is the model's own.
    """

    def __init__(self, model: Any, kinds: list[tuple[int | None, bool]]):
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        self.configs = [config for config in configs.values() if names_attention(config)]
        self.kinds, self.name = kinds, f"dflash_columns_{id(self):x}"
        self.masks: Masks | None = None
        self.length = 0
        self.held = False
        self.before: list[str] = []
        self.asked: list[int | None] = []
        """The layers that have asked this attention since somebody looked; one that several share knows no number."""
        self.wanted: set[tuple] = set()
        """Which masks this model's layers asked for: made, the next time, before anything runs."""
        self.own = attention_name(model.config.get_text_config(decoder=True))

    @contextmanager
    def active(self, masks: Masks, length: int) -> Iterator[None]:
        """Attention reads `length` columns under `masks`."""
        self.masks, self.length = masks, length
        if not masks.kept:
            for kind in self.wanted:
                masks.get(*kind)
        try:
            with nullcontext() if self.held else self.hold():
                yield
        finally:
            self.masks = None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The model's configs name this attention; compiled code is quicker if they do so all the time."""
        self.before = [attention_name(config) for config in self.configs]
        ALL_ATTENTION_FUNCTIONS[self.name] = self.attend
        try:
            self._name([self.name] * len(self.configs))
            self.held = True
            yield
        finally:
            self.held = False
            self._name(self.before)
            del ALL_ATTENTION_FUNCTIONS[self.name]

    @contextmanager
    def released(self) -> Iterator[None]:
        """The model's own attention, also while this one is held."""
        if not self.held:
            yield
            return
        self._name(self.before)
        try:
            yield
        finally:
            self._name([self.name] * len(self.configs))

    def _name(self, names: list[str]) -> None:
        for config, name in zip(self.configs, names, strict=True):
            set_attention_name(config, name)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query [B, G * H, Q, D]` over `key, value [B, H, L, D]`: `[B, Q, G * H, D]`, and no weights."""
        if attention_mask is not None:
            raise difference(f"{type(module).__name__} brings a mask of its own, which is not read over columns")
        if not torch.compiler.is_compiling():
            self.asked.append(module.layer_idx)
        special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))  # which `sdpa` passes over
        eager = self.own == "eager" or (special and self.own != "sdpa")
        groups = 1 if eager else query.shape[1] // key.shape[1]
        mask = self._mask(module, groups, query)
        if eager:
            return own_eager(module)(module, query, key, value, mask, scaling=scaling, **kwargs)
        packed = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # [B, H, G * Q, D]
        output = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
        return output.unflatten(2, (groups, query.shape[2])).flatten(1, 2).transpose(1, 2).contiguous(), None

    def check_asked(self, layers: set[int], whose: str) -> None:
        """Refuse to go on where one of `layers` has not asked this attention.

        Raises:
            ValueError: naming the first of them.
        """
        missing, asked, self.asked = layers - set(self.asked), len(self.asked), []
        if missing and asked != len(layers):
            raise difference(f"Layer {min(missing)} of {whose} did not ask the attention that its config names")

    def _kind(self, module: Any) -> tuple[int | None, bool]:
        """The window of a layer, and whether it is causal.

        Raises:
            ValueError: layers differ, and this one does not know which it is.
        """
        if len(set(self.kinds)) == 1:
            return self.kinds[0]
        if module.layer_idx not in range(len(self.kinds)):
            raise difference(f"{type(module).__name__} does not know which of {len(self.kinds)} layers it is")
        return self.kinds[module.layer_idx]

    def _mask(self, module: Any, groups: int, query: torch.Tensor) -> torch.Tensor:
        """`[B, 1, G * Q, L]`, additive."""
        if self.masks is None:
            raise RuntimeError(
                "The target was called from elsewhere while a draft decodes with it; call it afterwards."
            )
        window, causal = self._kind(module)
        kind = (window, causal, groups, query.dtype, query.device)
        if kind not in self.masks.kept:
            self.wanted.add(kind)
        return self.masks.get(*kind)[..., : self.length]


class Target:
    """A target's forwards while it decodes, over a cache of columns.

    One of these is kept for a target and used for one decode after another; between decodes it holds no tensors.
    """

    def __init__(self, model: Any, taps: tuple[int, ...]):
        text = model.config.get_text_config(decoder=True)
        self.model, self.text = model, text
        self.layers, self.name = decoder_layers(model), type(model).__name__
        self.cache_name = cache_name(model.forward)
        self.keeps_logits = "logits_to_keep" in parameters(model.forward)
        self.attention = BlockAttention(model, [(window, True) for window in windows(text)])
        self.taps = Taps(self.layers, taps, text.hidden_size)
        self.block = Captured(self._block, lambda: (self.cache.length, self.cache.capacity))
        self.clear()

    def clear(self) -> None:
        """Back to no text at all."""
        self.cache = ColumnCache(DynamicCache(config=self.text))
        self.recurrence = Recurrence(self.cache, self.layers)
        self.masks: Any = None  # of the block, `Masks`
        self.end: Any = None  # [B, 1] or [3, B, 1], position minus column
        self.features: Any = None  # [B, Q, F], of the last block

    @contextmanager
    def decoding(self, how: str) -> Iterator[None]:
        """Everything that watches the target, put in place, and taken away again whatever happens.

        Args:
            how: blocks are run, see `Captured`.
        """
        held = self.attention.hold() if how == "compile" else nullcontext()
        with self.taps.collecting(), self.recurrence.recording(), self.block.running(how), held:
            try:
                yield
            finally:
                self.clear()

    def begin(self, inputs: dict[str, Any], wanted: int = 1) -> torch.Tensor:
        """The beginning of a text, as plain `generate` computes it; logits of its last positions, `[B, wanted, V]`.

        Args:
            inputs: what `prepare_inputs_for_generation` made of the prompt.

        Raises:
            ValueError: the target did not cache the text, or gave the logits of other positions.
        """
        self.cache.writes = None
        length = inputs["input_ids"].shape[1]
        self.cache.reserve(length)
        with self.attention.released():
            logits = self._forward(without_cache(inputs), length, wanted)
        self.cache.check_written(length, self.name)
        self.cache.seen = length
        return logits

    def plainly(self, inputs: dict[str, Any], cache: Any) -> torch.Tensor:
        """A forward as plain `generate` runs it, over a cache of its own: logits of all positions, `[B, N, V]`."""
        self.taps.clear()
        ours = {self.cache_name: cache, "use_cache": True, "return_dict": True}
        ours |= {"logits_to_keep": 0} if self.keeps_logits else {}
        with self.attention.released():
            logits = self.model(**(without_cache(inputs) | ours)).logits
        return self._only(logits, inputs["input_ids"].shape[1])

    def go_on(
        self, ids: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """A further part of a text, `ids [B, N]` at the same `columns [B, N]` in every row; logits as in `begin`.

        Args:
            positions `[B, N]` or `[3, B, N]`.
            hidden `[B, P]`: columns that nothing but themselves may see, True where padded.
        """
        self.cache.reserve(int(columns[0, -1]) + 1)
        self.cache.write_at(columns)
        masks = Masks(widen(hidden, self.cache.capacity), columns[:, 0], ids.shape[1])
        with self.attention.active(masks, self.cache.length):
            logits = self._forward({"input_ids": ids, "position_ids": positions}, ids.shape[1], 1)
        self._check_block(ids.shape[1])
        return logits[:, -1]

    def verify(
        self, tokens: torch.Tensor, start: torch.Tensor, masks: Masks, tree: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[B, Q, V]` of a block of `tokens [B, Q]` at the columns from `start [B]` on.

        Args:
            masks: for blocks of this size.
            tree `[Q, Q]`: `chain` or `ancestors` of the block; an input of it, since it may change every cycle.
            end `[B, 1]` or `[3, B, 1]`: position minus column, for the columns after the prompt.
        """
        self.masks, self.end = masks, end
        self.recurrence.keep()
        with self.attention.active(masks, self.cache.length):
            logits, self.features = self.block(tokens, start, tree)
        return logits

    def _block(
        self, tokens: torch.Tensor, start: torch.Tensor, tree: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[B, Q, V]` and context features `[B, Q, F]`; nothing here depends on anything but tensors."""
        self.masks.move(start, tree)
        self.cache.write_at(start[:, None] + self.masks.steps)
        positions = self.end + start[:, None] + self.masks.depth
        length = tokens.shape[1]
        logits = self._forward({"input_ids": tokens, "position_ids": positions}, length, length)
        if not torch.compiler.is_compiling():
            self._check_block(length)
        return logits, self.taps.take()

    def _check_block(self, length: int) -> None:
        """What costs nothing to check after a forward over columns."""
        self.cache.check_written(length, self.name)
        layers = {index for index, layer in enumerate(self.cache.layers) if isinstance(layer, ColumnLayer)}
        self.attention.check_asked(layers, self.name)
        self.recurrence.check_given()

    def _forward(self, inputs: dict[str, Any], length: int, wanted: int) -> torch.Tensor:
        """Logits `[B, wanted, V]` of the last of `length` positions.

        Raises:
            ValueError: the model gave those of other positions.
        """
        self.taps.clear()
        ours = {self.cache_name: self.cache, "use_cache": True, "return_dict": True}
        if self.keeps_logits:
            # As a tensor: given a number, some models skip positions in their upper layers, and taps need them all.
            ours["logits_to_keep"] = (
                0 if wanted == length else torch.arange(length - wanted, length, device=self.model.device)
            )
        logits = self.model(**(inputs | ours)).logits
        return self._only(logits, wanted if self.keeps_logits else length)[:, -wanted:]

    def _only(self, logits: torch.Tensor, expected: int) -> torch.Tensor:
        """`logits [B, N, V]`, or an error where N is not what is expected."""
        if logits.shape[1] != expected:
            raise difference(f"{self.name} gave logits of {logits.shape[1]} positions where {expected} were asked for")
        return logits


def windows(text: Any) -> list[int | None]:
    """The sliding window of each layer; None where it sees everything."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=text).layers]
    return [text.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def recurrent(model: Any) -> bool:
    """Whether the target keeps state that is no keys and values by column."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionLayer) for layer in layers)


def check_target(target: Any, strict: bool = False) -> None:
    """Refuse what cannot be decoded exactly, by name, before the first token.

    Args:
        strict: refuse families that the tests do not decode, too; so does DFLASH_STRICT=1 in the environment.

    Raises:
        ValueError: saying what the target is, and why it is refused.
    """
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(f"{type(target).__name__} is no decoder-only language model; a draft needs one as its target.")
    _refuse_virtual_tokens(target)
    target = target.get_base_model() if hasattr(target, "get_base_model") else target  # of PEFT, with its adapters in
    text = target.config.get_text_config(decoder=True)
    _refuse_moving_rope(text)
    _refuse_unknown_state(text)
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(f"{text.model_type} with bidirectional attention writes no text that could be continued.")
    if text.model_type not in TESTED and (strict or os.environ.get("DFLASH_STRICT") not in (None, "", "0")):
        raise ValueError(
            f"{text.model_type} is not a family that the tests decode, and strict=True or DFLASH_STRICT=1 asks to "
            "refuse it. Leave both out to decode where the self-check passes."
        )
    _refuse_own_positions(target)
    cache_name(target.forward)
    if makes_own_cache(target):
        raise ValueError(
            f"{type(target).__name__} makes a cache of its own kind, which cannot be put back after a rejected token, "
            "so it is not decoded here."
        )
    width = target.get_input_embeddings().weight.shape[-1]
    if width != text.hidden_size:
        raise ValueError(
            f"{type(target).__name__} embeds its tokens {width} wide and has hidden states of {text.hidden_size}; a "
            "draft is made for targets where both are one width."
        )
    Recurrence(DynamicCache(config=text), decoder_layers(target))  # which knows where a state is kept, or refuses


def warn_of_new_family(target: Any) -> None:
    """Say once what a self-check that passed proves of a family that the tests do not decode, and what not."""
    family = target.config.get_text_config(decoder=True).model_type
    if family not in TESTED:
        logger.warning_once(
            f"{family} is not a family that the tests decode. The self-check passed: on a short text, a block gives "
            "what the target's own forward gives, and what it keeps is taken back. That does not prove long texts or "
            "other batches. DFLASH_STRICT=1 refuses such targets."
        )


def _refuse_virtual_tokens(target: Any) -> None:
    """Refuse PEFT methods that put tokens of their own before the prompt; adapters inside the layers are welcome."""
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", target)  # PEFT puts its own method there
    for config in (getattr(wrapper, "peft_config", None) or {}).values():
        if config.is_prompt_learning:
            raise ValueError(
                f"The target is wrapped by PEFT with {config.peft_type.value}, which puts virtual tokens before the "
                "prompt that have no ids, so a draft cannot read it. Merge or leave out that adapter."
            )


def _refuse_own_positions(target: Any) -> None:
    """Refuse models that take no positions or no masks: they count tokens by themselves, also rejected ones."""
    known = parameters(target.forward) | parameters(target.get_decoder().forward)
    for name in ("position_ids", "attention_mask"):
        if name not in known:
            raise ValueError(
                f"{type(target).__name__} takes no {name}, so it counts the tokens of a text by itself, rejected ones "
                "included; it is not decoded here: its text could come out wrong."
            )


def _refuse_unknown_state(text: Any) -> None:
    """Refuse layers whose state is neither keys and values by column nor put back by `Recurrence`."""
    layers = DynamicCache(config=text).layers
    kinds = sorted({type(layer).__name__ for layer in layers} - _LAYERS)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    if kinds or chunked or not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        what = ", ".join(kinds) or ("chunked attention" if chunked else "no attention layer at all")
        raise ValueError(
            f"{text.model_type} keeps state that cannot be put back exactly after a rejected token ({what}), so it is "
            "not decoded here: its text could come out wrong."
        )


def _refuse_moving_rope(text: Any) -> None:
    """Refuse rotary frequencies that depend on the length so far: a rejected token would change them for good."""
    rope = getattr(text, "rope_parameters", None) or {}
    forms = [rope, *(form for form in rope.values() if isinstance(form, dict))]
    for kind in {form.get("rope_type") for form in forms} & {"dynamic", "longrope"}:
        raise ValueError(
            f"{text.model_type} uses rotary embeddings of type {kind}, which change with the length of the text and "
            "are not put back after a rejected token, so it is not decoded here: its text could come out wrong."
        )


def decoder_layers(target: Any) -> nn.ModuleList:
    """The target's decoder layers, whose outputs are tapped.

    Raises:
        ValueError: they are not where transformers' models keep them.
    """
    decoder, count = target.get_decoder(), target.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    layers = getattr(decoder, "layers", None) or next(iter(lists), None)
    if layers is None or len(layers) != count:
        raise ValueError(
            f"{type(target).__name__} shows no decoder layers to tap: its decoder has no list of {count} modules, "
            "which is num_hidden_layers."
        )
    return layers


def embed_noise(embed: Any, ids: torch.Tensor) -> torch.Tensor:
    """The target's embeddings of `ids [B, Q]`: `[B, Q, H]`. Drafts are trained without a norm inside the embedding."""
    if getattr(embed, "embed_norm", None) is not None:
        return nn.functional.embedding(ids, embed.weight)
    return embed(ids)
