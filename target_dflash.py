# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run the target's side of a decode: prefill, the verify forward over a block, and what is tapped from both.

This file travels with every pushed draft. The beginning of a prompt goes through the target exactly as in plain
`generate`: its own attention, its own masks. Later forwards read slots of a cache under masks of our own. Afterwards
the target is as it was found.

Shapes: B rows, N new positions, Q block positions, V vocabulary, F taps * target hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from .attention_dflash import BlockAttention, BlockMasks, BlockState, LayerKind, pad_to
from .cache_dflash import RecurrentLayers, SlotCache, Snapshot
from .compat_dflash import cache_name, difference, loaded, parameters, without_cache
from .execution_dflash import BlockRunner, as_written
from .sequences_dflash import Prompt
from .taps_dflash import FeatureTaps

LEAST_REACH = 32
"""Slots by which rows may move between two blocks of one size, at least, before their masks are written anew."""

LAYER_OUTPUTS = ("hidden_states", "attentions")
"""What a forward returns for every layer, if asked for with the keyword `output_<name>`."""


@dataclass
class TargetOutput:
    """Hold what a forward of the target returned for some positions.

    Args:
        logits `[B, N, V]`.
        features `[B, N, F]`: the outputs of the tapped layers, side by side; F is 0 where none is tapped.
        hidden_states: `[B, N, D]` of each layer, where they were asked for.
        attentions: `[B, heads, N, slots]` of each layer with attention, where they were asked for.
    """

    logits: torch.Tensor
    features: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()

    def part(self, first: int, last: int | None) -> "TargetOutput":
        """Return the positions from `first` to before `last`."""
        logits = self.logits[:, first:last]
        return TargetOutput(logits, self.features[:, first:last])


@dataclass
class Verified(TargetOutput):
    """Hold what the verify forward returned for a block, `[B, Q, ...]`.

    Args:
        snapshot: what takes the block back from recurrent layers.
    """

    snapshot: Snapshot = field(kw_only=True)


@dataclass
class TargetState(BlockState):
    """Hold what a target has of one decode.

    Args:
        position_offset `[B, 1]` or `[3, B, 1]`: position minus slot, for the slots after the prompt.
        token_types `[B, P]`: of the prompt's slots; None if the target is given none. Later slots have the last one.
        layer_outputs: of `LAYER_OUTPUTS`, those that every forward is asked for.
        last_slot: a tensor, of the last token that plain decoding would feed. Blocks look beyond it, where a target
            that learned its positions has none; None without an end.
    """

    recurrent: RecurrentLayers
    position_offset: torch.Tensor
    token_types: torch.Tensor | None = None
    layer_outputs: tuple[str, ...] = ()
    last_slot: torch.Tensor | None = None

    def inputs_at(
        self, slots: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, Any]:
        """Return the inputs of a forward over `slots [B, N]`.

        Args:
            ids `[B, N]`.
            positions `[B, N]` or `[3, B, N]`.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        inputs |= asking_for(self.layer_outputs)
        if self.token_types is not None:
            last = self.token_types.shape[1] - 1
            inputs["token_type_ids"] = self.token_types.gather(1, slots.clamp_max(last))
        return inputs


class Target:
    """Run a target's forwards while a draft speeds it up. It holds no tensors between decodes."""

    def __init__(self, model: Any, taps: tuple[int, ...]):
        text = model.config.get_text_config(decoder=True)
        self.model, self.text = model, text
        self.layers, self.name = decoder_layers(model), type(model).__name__
        self.cache_name = cache_name(model.forward)
        self.takes_logits_to_keep = "logits_to_keep" in parameters(model.forward)
        self.attention = BlockAttention(
            model, [LayerKind(window, True) for window in windows(text)]
        )
        self.taps = FeatureTaps(self.layers, taps, text.hidden_size)
        self.runner = BlockRunner(
            self._run_block, lambda state: (state.cache.length, state.cache.capacity)
        )

    @contextmanager
    def decoding(
        self, prompt: Prompt, mode: str, last_slot: torch.Tensor | None = None
    ) -> Iterator[TargetState]:
        """Watch the target during one decode of `prompt`, and leave it as it was found.

        Args:
            mode: "eager", "graphs" or "compile".
            last_slot: as in `TargetState`.
        """
        cache = SlotCache(DynamicCache(config=self.text))
        recurrent = RecurrentLayers(cache.layers, self.layers)
        with (
            as_written(self.model),
            self.taps.collecting(),
            recurrent.recording(),
            self.runner.using(mode),
            self.attention.installed(),
        ):
            yield TargetState(
                cache,
                prompt.padding_mask,
                recurrent,
                prompt.position_offset,
                self._token_types(prompt),
                prompt.layer_outputs,
                last_slot,
            )

    def prefill(
        self, state: TargetState, inputs: dict[str, Any], num_logits: int = 1
    ) -> TargetOutput:
        """Run the beginning of a text, as plain `generate` does.

        Args:
            inputs: what `prepare_inputs_for_generation` made of the prompt, N tokens.
            num_logits: how many of the last positions get logits.

        Returns:
            Logits `[B, num_logits, V]` and features `[B, N, F]`.

        Raises:
            ValueError: the target did not cache the text, or gave the logits of other positions.
        """
        length = num_tokens(inputs)
        state.cache.reserve(length)
        inputs = without_cache(inputs) | asking_for(state.layer_outputs)
        arguments = self._arguments(inputs, state.cache.at_start(), num_logits)
        with self.attention.uninstalled():
            found = self.model(**arguments)
        output = self._output(found, length, num_logits)
        state.cache.check_written(length, self.name)
        state.cache.num_prefilled = length
        return output

    def prefill_chunk(
        self, state: TargetState, ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> TargetOutput:
        """Run a further part of a text: logits `[B, 1, V]` of its last position, and features `[B, N, F]`.

        Args:
            ids `[B, N]`.
            slots `[B, N]`: consecutive in every row.
            positions `[B, N]` or `[3, B, N]`.
        """
        length = ids.shape[1]
        end = int(slots.max()) + 1
        state.cache.reserve(end)
        padding_mask = pad_to(state.padding_mask, state.cache.capacity)
        masks = BlockMasks(padding_mask, slots[:, 0], length)
        inputs = state.inputs_at(slots, ids, positions)
        padding = padding_mask[:, :end]
        padded = padding[:, -length:].any()
        if state.recurrent.states and bool(padded):
            # Our attention needs no mask; the target hides padding from its recurrent layers by this one.
            inputs["attention_mask"] = (~padding).long()
        arguments = self._arguments(inputs, state.cache.at(slots), 1)
        with self.attention.under(masks):
            found = self.model(**arguments)
        self._check_block(state, length)
        return self._output(found, length, 1)

    def plain_forward(self, inputs: dict[str, Any], cache: Any) -> TargetOutput:
        """Run a forward as plain `generate` does, over a cache of its own; all positions get logits."""
        length = num_tokens(inputs)
        arguments = self._arguments(without_cache(inputs), cache, length)
        with self.attention.uninstalled():
            found = self.model(**arguments)
        return self._output(found, length, length)

    def verify(
        self,
        state: TargetState,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        ancestors: torch.Tensor | None = None,
    ) -> Verified:
        """Run a block over the cache: the draft's proposal after its anchor.

        Args:
            tokens `[B, Q]`.
            slots `[B]`: of each row's anchor. Position q of the block takes the q-th slot after it.
            ancestors `[B, Q, Q]`: of a tree; None for a chain.

        Raises:
            ValueError: a tree for a target with recurrent state.
        """
        if ancestors is not None and state.recurrent.states:
            raise ValueError(
                f"{self.name} keeps recurrent state, which branches of a tree cannot share."
            )
        size = tokens.shape[1]
        masks = state.masks_for(slots, size, self.attention, reach=max(size, LEAST_REACH))
        snapshot = state.recurrent.snapshot()
        with self.attention.under(masks):
            tree = () if ancestors is None else (ancestors,)
            logits, *rest = self.runner(state, tokens, slots, *tree)
        state.recurrent.record_inputs(snapshot, self.name)
        return Verified(logits.to(slots.device), *rest, snapshot=snapshot)

    def move_path(
        self, state: TargetState, verified: Verified, slots: torch.Tensor, path: torch.Tensor
    ) -> Verified:
        """Move the accepted path of a tree, its keys, values and features, to the front of its block.

        Args:
            slots `[B]`: of each row's anchor.
            path `[B, Q]`: positions of the tree from the root on; only the first ones count.
        """
        steps = torch.arange(path.shape[1], device=slots.device)
        first = slots[:, None]
        state.cache.copy_slots(first + path, first + steps)
        return replace(verified, features=gather_path(verified.features, path))

    def _run_block(
        self,
        state: TargetState,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        ancestors: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Return the fields of `TargetOutput`, for a block. What changes from cycle to cycle are the arguments."""
        length = tokens.shape[1]
        masks = state.masks[length]
        masks.move(slots, ancestors)
        text_slots = slots[:, None] + masks.depths
        # What lies beyond is never committed, so its position is free.
        if state.last_slot is not None:
            text_slots = torch.minimum(text_slots, state.last_slot)
        positions = state.position_offset + text_slots
        block_slots = slots[:, None] + masks.offsets
        inputs = state.inputs_at(block_slots, tokens, positions)
        found = self.model(**self._arguments(inputs, state.cache.at(block_slots), length))
        if not torch.compiler.is_compiling():
            self._check_block(state, length)
        output = self._output(found, length, length)
        return output.logits, output.features, output.hidden_states, output.attentions

    def _token_types(self, prompt: Prompt) -> torch.Tensor | None:
        """Return the token types by slot, `[B, P]`, for a target that takes text alone; else None.

        Where they mark images, they count in the prompt only.
        """
        types = prompt.inputs.get("token_type_ids")
        if types is None or self.text is not self.model.config:
            return None
        return nn.functional.pad(types, (prompt.width - types.shape[1], 0))

    def _check_block(self, state: TargetState, length: int) -> None:
        """Check that the forward wrote every slot, and that every layer used our attention; both only read counters."""
        state.cache.check_written(length, self.name)
        self.attention.check_layers(set(state.cache.slot_layers), self.name)

    def _arguments(self, inputs: dict[str, Any], cache: Any, num_logits: int) -> dict[str, Any]:
        """Return the arguments of a forward whose last `num_logits` positions get logits; it is about to run."""
        self.taps.clear()
        arguments = {**inputs, self.cache_name: cache, "use_cache": True, "return_dict": True}
        if self.takes_logits_to_keep:
            arguments["logits_to_keep"] = self._logits_to_keep(num_tokens(inputs), num_logits)
        return arguments

    def _output(self, found: Any, length: int, num_logits: int) -> TargetOutput:
        """Return the logits `[B, num_logits, V]` of the last positions, and the features of all `length`.

        Raises:
            ValueError: the model gave the logits of other positions.
        """
        expected = num_logits if self.takes_logits_to_keep else length
        given = found.logits.shape[1]
        if given != expected:
            raise difference(
                f"{self.name} gave logits of {given} positions where {expected} were asked for"
            )
        layers = [tuple(found.get(name) or ()) for name in LAYER_OUTPUTS]
        logits = found.logits[:, -num_logits:]
        if not self.taps.ids:
            return TargetOutput(logits, logits.new_empty(len(logits), length, 0), *layers)
        return TargetOutput(logits, self.taps.pop(), *layers)

    def _logits_to_keep(self, length: int, num_logits: int) -> Any:
        """Return 0 for all positions, else a tensor: given a number, some models skip positions in upper layers."""
        if num_logits == length:
            return 0
        # On the CPU, it indexes on every device.
        return torch.arange(length - num_logits, length, device="cpu")


def num_tokens(inputs: dict[str, Any]) -> int:
    """Return how many tokens a forward gets, as ids `[B, N]` or as embeddings `[B, N, D]`."""
    found = inputs.get("input_ids")
    return (inputs["inputs_embeds"] if found is None else found).shape[1]


def asking_for(layer_outputs: tuple[str, ...]) -> dict[str, bool]:
    """Return the keywords that ask a forward for these of `LAYER_OUTPUTS`."""
    return {f"output_{name}": True for name in layer_outputs}


def gather_path(values: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Return `values [B, Q, D]` in the order of `path [B, Q]`."""
    index = path.to(values.device)[..., None]
    return values.gather(1, index.expand_as(values))


def windows(text: Any) -> list[int | None]:
    """Return the sliding window of each layer, None where it sees everything, from a text config."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [
            getattr(layer, "sliding_window", None) for layer in DynamicCache(config=text).layers
        ]
    found: list[int | None] = [None] * len(kinds)
    for layer, kind in enumerate(kinds):
        if kind == "sliding_attention":
            found[layer] = text.sliding_window
    return found


def attention_windows(model: Any) -> list[int | None]:
    """Return the sliding window of each layer with attention, None where it sees everything."""
    text = model.config.get_text_config(decoder=True)
    found = windows(text)
    kinds = getattr(text, "layer_types", None) or ["attention"] * len(found)
    kept = []
    for window, kind in zip(found, kinds, strict=True):
        if "attention" in kind and kind != "linear_attention":
            kept.append(window)
    return kept


def is_recurrent(model: Any) -> bool:
    """Tell whether a target keeps state that is not keys and values in slots."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionLayer) for layer in layers)


def decoder_layers(target: Any) -> nn.ModuleList:
    """Return the target's decoder layers, whose outputs are tapped.

    Raises:
        ValueError: they are not where transformers' models keep them.
    """
    decoder, count = (
        target.get_decoder(),
        target.config.get_text_config(decoder=True).num_hidden_layers,
    )
    layers = getattr(decoder, "layers", None)
    if not layers:
        lists = (one for one in decoder.modules() if isinstance(one, nn.ModuleList))
        layers = next((one for one in lists if len(one) == count), None)
    if layers is None or len(layers) != count:
        raise ValueError(
            f"{type(target).__name__} shows no decoder layers to tap: its decoder has no list of {count} modules, "
            "which is num_hidden_layers."
        )
    return layers


def embed_noise(embed: Any, ids: torch.Tensor, unscaled: bool = False) -> torch.Tensor:
    """Embed `ids [B, Q]`, without a norm inside the embedding, as drafts are trained: `[B, Q, H]`.

    With `unscaled`, without a scale inside it either.
    """
    if getattr(embed, "embed_norm", None) is None and not unscaled:
        return embed(ids)
    with loaded(embed):
        return nn.functional.embedding(ids.to(embed.weight.device), embed.weight)
