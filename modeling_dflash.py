# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compute the hidden states of a block from context features and the embeddings of the block, the "noise".

The model is a Qwen3 decoder stack (`transformers.models.qwen3`) with one difference. Queries come from the block alone,
keys and values from the block and the target's tapped hidden states ("context features"). One forward predicts all
positions of the block. After DFlash (arXiv 2602.06036) and its reference implementation, z-lab/dflash.

Shapes: B batch, C context tokens new in this call, Q block positions, K all keys a layer sees (past + C + Q).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
)

from .attention_dflash import LayerKind, visible
from .cache_dflash import rewindable_cache
from .calls_dflash import Signature, of_a_draft
from .compat_dflash import attention_name, cache_field, cache_name, read_by_assisted_generation
from .configuration_dflash import SLIDING, DFlashConfig
from .drafter_dflash import Choice, Walk
from .generate_dflash import SpeculativeGenerate, spec_generate
from .generation_dflash import DecodeStatistics
from .layouts_dflash import shown
from .repository_dflash import RepositoryMixin, own_config
from .trees_dflash import Candidates, likeliest
from .weights_dflash import UNUSED


class DFlashRMSNorm(Qwen3RMSNorm):
    """Normalise as Qwen3 does, by one operation of torch, one kernel on a GPU; it rounds once, after the weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `hidden_states [..., width]` normalised over the width."""
        weight = self.weight
        if hidden_states.dtype != weight.dtype:  # mixed precision, where the weight's dtype counts
            return super().forward(hidden_states)
        return rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


class DFlashRotaryEmbedding(Qwen3RotaryEmbedding):
    """Rotate as Qwen3 does, with frequencies in float32: in bfloat16, rounding lowers acceptance at later positions."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines, as `rotate` takes them, of `position_ids [B, N]` in the dtype of `x`."""
        cos, sin = super().forward(x, position_ids)
        half = sin[..., : sin.shape[-1] // 2]  # the other half is the same
        return cos[:, None], torch.cat([-half, half], dim=-1)[:, None]

    def _apply(self, fn: Callable, recurse: bool = True) -> "DFlashRotaryEmbedding":
        super()._apply(fn, recurse)
        with torch.device("cpu"):
            fresh = Qwen3RotaryEmbedding(self.config)
        for name in ("inv_freq", "original_inv_freq"):
            setattr(self, name, getattr(fresh, name).to(getattr(self, name).device))
        self.max_seq_len_cached = fresh.max_seq_len_cached
        return self


CACHE = cache_name(Qwen3DecoderLayer.forward)
CACHE_FIELD = cache_field(BaseModelOutputWithPast)
"""Names of the cache: the argument that a decoder layer passes to its attention, and the field of an output."""


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `states [B, heads, N, D]` by `cos, sin [B, 1, N, D]`, where sines of the first half are negative."""
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos, swapped, sin)


class DFlashAttention(Qwen3Attention):
    """Attend as Qwen3 does, with keys and values from the context features too; the config says whether causally."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = config.causal_layers[layer_idx]
        self.q_norm = DFlashRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = DFlashRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        context_hidden_states: torch.Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states [B, Q, H]` to the past, `context_hidden_states [B, C, H]` and themselves.

        The past is `cache`, which decoder layers before transformers 5.24 call `past_key_values`.

        `position_ids` and `use_cache` come from the decoder layer and are not passed on: attention kernels would
        read the first as packing.
        """
        sources = torch.cat([context_hidden_states, hidden_states], dim=1)  # [B, C + Q, H]
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        cos, sin = position_embeddings
        length = hidden_states.shape[1]
        query = self.q_norm(query).transpose(1, 2)
        query = rotate(query, cos[:, :, -length:], sin[:, :, -length:])
        key, value = self.keys_and_values(sources, position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # [B, kv heads, K, head_dim]

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_name(self.config), eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def keys_and_values(
        self, sources: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values of `sources [B, N, H]`, both `[B, kv heads, N, head_dim]`."""
        key = self.k_norm(self.k_proj(sources).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        value = self.v_proj(sources).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return rotate(key, *position_embeddings), value


class DFlashDecoderLayer(Qwen3DecoderLayer):
    """Compute Qwen3's layer with DFlash attention, which receives `context_hidden_states` as a keyword."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = DFlashAttention(config, layer_idx)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = DFlashRMSNorm(width, eps=eps)
        self.post_attention_layernorm = DFlashRMSNorm(width, eps=eps)


class DFlashPreTrainedModel(RepositoryMixin, Qwen3PreTrainedModel):
    config_class = DFlashConfig
    main_input_name = "noise_embeds"
    _no_split_modules = ["DFlashDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = UNUSED
    _auto_class = "AutoModel"


class DFlashDraftModel(DFlashPreTrainedModel):
    """Draft as DFlash 1 does. Unless the config says otherwise, its embedding and its head are the target's."""

    spec_generate = spec_generate
    layer_class = DFlashDecoderLayer
    # What `generate` reads of a draft that is passed as `custom_generate`.
    __signature__ = Signature(SpeculativeGenerate.__call__)

    @of_a_draft
    def speculate(self) -> SpeculativeGenerate:
        """Decoding function for the target: `target.generate(..., custom_generate=draft.speculate)`."""
        return SpeculativeGenerate(self)

    @property
    def statistics(self) -> DecodeStatistics:
        """What the last decode with this draft counted; with times too, if `statistics=` was passed."""
        return self.speculate.statistics

    @property
    def block_size(self) -> int:
        """`config.block_size`, under the name of the reference implementation's attribute, as the next two."""
        return self.config.block_size

    @property
    def mask_token_id(self) -> int:
        return self.config.mask_token_id

    @property
    def target_layer_ids(self) -> list[int]:
        return self.config.target_layer_ids

    def __init__(self, config: DFlashConfig):
        """Build an untrained draft.

        Args:
            config: of this kind; or a `Qwen3Config` with a `dflash_config`, as the reference implementation takes it.

        Raises:
            ValueError: the config is another model's, or lacks a field.
        """
        if not isinstance(config, PretrainedConfig):
            raise ValueError(f"config is {shown(config)}; pass a {self.config_class.__name__}.")
        config = own_config(self.config_class, config)
        super().__init__(config)
        self.fc = nn.Linear(config.fc_width, config.hidden_size, bias=False)
        self.hidden_norm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DFlashRotaryEmbedding(config)
        types, causal = self.config.layer_types, self.config.causal_layers
        self.layer_kinds = list(zip(types, causal, strict=True))
        """The type of each layer, and whether it is causal."""
        vocab, width = config.vocab_size or 0, config.hidden_size
        self.embed_tokens: nn.Embedding | None = None
        if config.has_own_embed_tokens:
            self.embed_tokens = nn.Embedding(vocab, width)
        self.lm_head: nn.Linear | None = None
        if config.has_own_lm_head:
            self.lm_head = nn.Linear(width, config.draft_vocab_size or vocab, bias=False)
        self.mask_embedding: nn.Parameter | None = None
        if config.has_own_mask_embedding:
            self.mask_embedding = nn.Parameter(torch.zeros(width))
        if config.draft_vocab_size is not None:
            # As speculators stores it: a token of the draft is that of the target minus this.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.gradient_checkpointing = False
        self.post_init()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; with a target as the first argument, decode: `target.generate(..., custom_generate=draft)`."""
        if args and isinstance(args[0], nn.Module):
            return self.speculate(*args, **kwargs)
        if self.config.needs_own_loop and not torch.compiler.is_compiling():
            self._check_caller(sys._getframe(1))
        return super().__call__(*args, **kwargs)

    def _check_caller(self, frame: Any) -> None:
        """Refuse transformers' own loop, which reads no embedding, head or anchor but those that it knows.

        Raises:
            ValueError: with what to pass instead.
        """
        if read_by_assisted_generation(frame):
            raise ValueError(
                f"assistant_model is a {type(self).__name__} with {', '.join(self.config.needs_own_loop)}, which "
                "transformers' own loop does not read: it would accept next to nothing. Pass it as "
                "custom_generate=draft.speculate."
            )

    @property
    def generation_config(self) -> Any:
        """Refuse to be an assistant of transformers' own assisted generation, which reads this first.

        Raises:
            ValueError: with what to pass instead.
            AttributeError: anybody else asks; a draft has none.
        """
        if read_by_assisted_generation(sys._getframe(1)):
            raise ValueError(
                f"assistant_model is a {type(self).__name__}, which proposes blocks and cannot generate by itself. "
                "Pass it as custom_generate=draft.speculate; or add speculation_type='dflash' for transformers' own "
                "loop, where it knows that."
            )
        raise AttributeError("generation_config")

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | dict[Any, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states of a block, all positions at once.

        Args:
            noise_embeds `[B, Q, hidden_size]`: the target's embeddings of the anchor and of `Q - 1` mask tokens.
            context_hidden_states `[B, C, taps * target_hidden_size]`: the tapped outputs of the target's layers,
                concatenated in the order of `target_layer_ids`, for the committed tokens that the cache lacks.
            attention_mask: None; or `[B, past + C + Q]`, 0 at padding; or a 4D mask `[B, 1, Q, K]` in the form of the
                attention implementation; or a dict of 4D masks by layer type, or by layer type and causality, such as
                `("full_attention", False)`.
            position_ids `[B, C + Q]`: of the context tokens, then of the block; by default they follow the cache.
            cache: keys and values of earlier context. The block's are appended too; crop them afterwards.
            past_key_values: the cache under its name before transformers 5.24.

        Returns:
            `last_hidden_state [B, Q, hidden_size]`: position k predicts the token at anchor + k, for k >= 1; or the one
            after it, where `config.sample_from_anchor`.

        Raises:
            ValueError: a width or length that does not fit this draft, with both numbers; or two caches.
        """
        self._check_inputs(noise_embeds, context_hidden_states)
        cache = _one_cache(cache, past_key_values)
        noise_embeds = self.scale_embeds(self.with_own_masks(noise_embeds))
        if use_cache and cache is None:
            cache = rewindable_cache(self.config)
        context_length, block_length = context_hidden_states.shape[1], noise_embeds.shape[1]
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            end = past + context_length + block_length
            position_ids = torch.arange(past, end, device=noise_embeds.device)[None]
        _check_tensor("position_ids", position_ids, (2,), "[B, C + Q]")
        self._check_positions(position_ids, context_length, block_length)
        masks = self._masks(attention_mask, position_ids, noise_embeds, cache)
        features = self.hidden_norm(self.fc(context_hidden_states))  # [B, C, H]
        hidden_states = noise_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, kind in zip(self.layers, self.layer_kinds, strict=True):
            hidden_states = layer(
                hidden_states,
                context_hidden_states=features,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_FIELD: cache}
        )

    def extend_cache(
        self, context_hidden_states: torch.Tensor, position_ids: torch.Tensor, cache: Cache
    ) -> None:
        """Append context to the cache without predicting a block.

        Args:
            context_hidden_states `[B, C, taps * target_hidden_size]`: as in `forward`.
            position_ids `[B, C]`: of those tokens.
        """
        features = self.hidden_norm(self.fc(context_hidden_states))  # [B, C, H]
        position_embeddings = self.rotary_emb(features, position_ids)
        for index, layer in enumerate(self.layers):
            attention: Any = layer.self_attn
            cache.update(*attention.keys_and_values(features, position_embeddings), index)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the draft's own embedding, which torchao asks for when it quantises; None without one."""
        return self.embed_tokens

    def with_own_masks(self, noise_embeds: torch.Tensor) -> torch.Tensor:
        """Return `noise_embeds [B, Q, H]` of one block, with the draft's own mask embedding after the anchor's."""
        if self.mask_embedding is None:
            return noise_embeds
        masks = self.mask_embedding.expand_as(noise_embeds[:, 1:])
        return torch.cat([noise_embeds[:, :1], masks], dim=1)

    def scale_embeds(self, noise_embeds: torch.Tensor) -> torch.Tensor:
        """Return `noise_embeds [B, Q, H]` unchanged; other kinds override this to scale them."""
        return noise_embeds

    def logits(self, states: torch.Tensor, head: Any) -> torch.Tensor:
        """Return logits `[..., V]` of the target's tokens, -inf for those that the draft does not know.

        Args:
            states `[..., H]`: the draft's.
            head: the draft's own, or the target's.
        """
        return self.over_target_vocabulary(self.draft_logits(states, head))

    def draft_logits(self, states: torch.Tensor, head: Any) -> torch.Tensor:
        """Return logits of the draft's tokens, of `states [..., H]`; other kinds may scale and cap them."""
        return head(states)

    @property
    def target_ids(self) -> torch.Tensor | None:
        """The target's id of each token of a reduced vocabulary, `[draft_vocab_size]`, ascending; None without one."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def over_target_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Return `logits [..., draft_vocab_size]` as those of the target's tokens, `[..., V]`."""
        ids = self.target_ids
        if ids is None:
            return logits
        shape = (*logits.shape[:-1], self.config.vocab_size)
        return logits.new_full(shape, -torch.inf).index_copy(-1, ids.to(logits.device), logits)

    def select_tokens(self, scores: torch.Tensor, states: torch.Tensor, walk: Walk) -> Choice:
        """Return the proposed tokens, the best of each position; other kinds override this.

        Args:
            scores `[B, N, V]`: of single tokens, for the N positions that predict one.
            states `[B, N, H]`: the draft's, for drafts whose tokens depend on each other.
        """
        return Choice(scores.argmax(dim=-1))

    def candidates(
        self, scores: torch.Tensor, states: torch.Tensor, walk: Walk, num_candidates: int
    ) -> Candidates:
        """Return the likeliest tokens of each position, for a tree; the arguments are those of `select_tokens`."""
        return likeliest(scores, num_candidates)

    def _check_inputs(
        self, noise_embeds: torch.Tensor, context_hidden_states: torch.Tensor
    ) -> None:
        given = {"noise_embeds": noise_embeds, "context_hidden_states": context_hidden_states}
        for name, tensor in given.items():
            _check_tensor(name, tensor, (3,), "[B, N, width]")
        taps, width = len(self.config.target_layer_ids), self.config.target_hidden_size
        if context_hidden_states.shape[-1] != self.config.fc_width:
            raise ValueError(
                f"context_hidden_states is {context_hidden_states.shape[-1]} wide, but this draft's fc expects "
                f"{self.config.fc_width} ({taps} taps x {width}): the target is not the one it was made for."
            )
        if noise_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"noise_embeds is {noise_embeds.shape[-1]} wide, but this draft's hidden_size is "
                f"{self.config.hidden_size}: the target is not the one it was made for."
            )

    def _check_positions(
        self, position_ids: torch.Tensor, context_length: int, block_length: int
    ) -> None:
        new = context_length + block_length
        if position_ids.shape[-1] != new:
            raise ValueError(
                f"position_ids covers {position_ids.shape[-1]} positions, but the context has {context_length} tokens "
                f"and the block {block_length}: pass {new}."
            )

    def _masks(
        self,
        attention_mask: torch.Tensor | dict[Any, Any] | None,
        position_ids: torch.Tensor,
        noise_embeds: torch.Tensor,
        cache: Cache | None,
    ) -> dict[tuple[str, bool], torch.Tensor | None]:
        """Return one mask per kind of layer; a kind is a layer type and whether it is causal."""
        kinds: dict[tuple[str, bool], int] = {}
        for index, kind in enumerate(self.layer_kinds):
            kinds.setdefault(kind, index)
        if isinstance(attention_mask, dict):
            masks_by_kind = {}
            for kind in kinds:
                key = kind if kind in attention_mask else kind[0]
                if key not in attention_mask:
                    raise ValueError(
                        f"attention_mask has the keys {shown(list(attention_mask))}; it needs one for layers of the "
                        f"type {key!r}."
                    )
                masks_by_kind[kind] = attention_mask[key]
            return masks_by_kind
        if attention_mask is not None:
            _check_tensor("attention_mask", attention_mask, (2, 4), "[B, N] or a 4D mask")
        if attention_mask is not None and attention_mask.ndim == 4:
            return dict.fromkeys(kinds, attention_mask)
        padding = self._padding(attention_mask, position_ids, cache)
        block = position_ids[:, -noise_embeds.shape[1] :]  # [B, Q]
        masks = {}
        for (layer_type, causal), index in kinds.items():
            length = _kv_length(cache, index, position_ids.shape[-1])
            window = self.config.sliding_window if layer_type == SLIDING else None
            seen = LayerKind(window, causal, self.config.window_from_anchor)
            masks[layer_type, causal] = self._mask(block, length, seen, padding)
        return masks

    def _padding(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        """Return `attention_mask [B, past + C + Q]` as bool; None where nothing is padded."""
        if attention_mask is None:
            return None
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        whole = position_ids.shape[-1] + (cache.get_seq_length() if cache is not None else 0)
        if attention_mask.shape[-1] != whole:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} positions, but past, context and block are {whole}."
            )
        return attention_mask.bool()

    def _mask(
        self, block: torch.Tensor, length: int, kind: LayerKind, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the mask for `length` keys in the form of the attention implementation; None if nothing is hidden.

        Raises:
            ValueError: that implementation takes no masks, and counts windows otherwise than the config.
        """
        padding = None if padding is None else padding[:, -length:]
        window = kind.window
        if "flash" in (attention_name(self.config) or ""):
            if window is not None and kind.from_anchor:
                raise ValueError(
                    f"window_from_anchor is True, but {attention_name(self.config)!r} counts windows from each "
                    "position; load the draft with attn_implementation='sdpa'."
                )
            return padding  # the kernel takes causality and window as arguments
        if not kind.causal and padding is None and (window is None or length <= window):
            return None
        visible = visible_keys(block, length, *kind)
        if padding is not None:
            visible = visible & padding[:, None]
        if attention_name(self.config) == "sdpa":
            return visible[:, None]
        zero = torch.zeros((), dtype=self.dtype, device=block.device)
        return zero.where(visible[:, None], torch.finfo(self.dtype).min)


def _one_cache(cache: Any, past_key_values: Any) -> Cache | None:
    """Return the cache that was passed under one of its two names.

    Raises:
        ValueError: both were passed, or something else than a cache.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values name the same thing; pass one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"cache is {shown(cache)}; pass a DynamicCache, or None.")
    return cache


def _check_tensor(name: str, value: Any, dimensions: tuple[int, ...], shape: str) -> None:
    """Refuse what is no tensor, or one of another number of dimensions.

    Raises:
        ValueError: with the argument, and its shape or value.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {shown(value)}; pass a tensor, {shape}.")
    if value.ndim not in dimensions:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; pass {shape}.")


def visible_keys(
    block: torch.Tensor, length: int, window: int | None, causal: bool, from_anchor: bool = False
) -> torch.Tensor:
    """Return which keys each position of a block sees.

    Args:
        block `[B, Q]`: positions of the block. The keys are the `length` consecutive positions that end with it.
        window, causal, from_anchor: as in `LayerKind`.

    Returns:
        `[B, Q, length]`, True where visible.
    """
    keys = block[:, -1:] - torch.arange(length - 1, -1, -1, device=block.device)  # [B, length]
    anchor = block[:, :1, None] if from_anchor else None
    return visible(block[:, :, None], keys[:, None], window, causal, anchor)


def _kv_length(cache: Cache | None, layer_idx: int, new: int) -> int:
    """Return how many keys layer `layer_idx` will see once `new` are added; a sliding cache drops the oldest."""
    layers = cache.layers if cache is not None else []
    return layers[layer_idx].get_mask_sizes(new)[0] if layer_idx < len(layers) else new


Qwen3DFlashDraftModel = DFlashDraftModel
