# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decoding with a draft: draft, verify, accept, commit. The text is exactly the target's; only the time falls.

This file travels with every pushed draft. After DFlash (arXiv 2602.06036) and z-lab/dflash. Acceptance is by *match*:
at each position the target chooses its own token, from its own distribution, and a drafted token stays if it equals
that choice. At a temperature the choice is Gumbel-max with noise keyed by position, so that the text equals, token for
token, what plain sampling with the same noise gives.

Shapes: B = 1 row, P prompt tokens, Q block positions, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .cache_dflash import rewind, rewindable_cache


@dataclass
class DecodeStatistics:
    """What a decode did: counts by cycle, seconds by phase."""

    committed: list[int] = field(default_factory=list)
    """Tokens committed in each cycle, the target's own included."""
    prefill_seconds: float = 0.0
    """Until the first token, which prefill gives and no cycle counts."""
    decode_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per cycle, pooled: tokens / cycles; 0 without cycles."""
        return sum(self.committed) / len(self.committed) if self.committed else 0.0


@dataclass
class DecodeOutput:
    """`sequences [1, P + new]`, prompt included, and what it took."""

    sequences: torch.Tensor
    statistics: DecodeStatistics


@dataclass
class DecodeOptions:
    """How to decode: the budget, where to stop, how to sample, whom to tell.

    Args:
        max_new_tokens: budget of new tokens.
        stop_token_ids: the text ends right after the first of these.
        temperature: 0 for the target's argmax; above, its distribution at this temperature.
        on_commit: called with each commit's tokens, a list, in order.
    """

    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    on_commit: Callable[[list[int]], None] | None = None

    def __post_init__(self) -> None:
        self.stop_token_ids = _token_ids(self.stop_token_ids)
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; it must be an int, 0 or more.")
        if not isinstance(self.temperature, int | float) or not (
            self.temperature == 0 or 1e-5 <= self.temperature < float("inf")
        ):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number from 1e-5 up.")


def spec_generate(
    self: Any,
    target: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int = 256,
    stop_token_ids: list[int] | int | None = None,
    temperature: float = 0.0,
) -> torch.Tensor:
    """Generate with `target`, sped up by this draft; the same call as z-lab/dflash's.

    Args:
        target: a causal language model of transformers.
        input_ids `[1, P]`: the prompt.
        max_new_tokens: budget of new tokens.
        stop_token_ids: the text ends right after the first of these; None to use the whole budget.
        temperature: 0 for exactly the target's greedy text; above, exactly its distribution.

    Returns:
        `[1, P + new]`: prompt and new tokens.

    Raises:
        ValueError: the target does not fit this draft, cannot be decoded exactly, or an argument is out of range.
    """
    options = DecodeOptions(max_new_tokens, _token_ids(stop_token_ids), temperature)
    return decode(self, target, input_ids, options).sequences


@torch.no_grad()
def decode(draft: Any, target: Any, input_ids: torch.Tensor, options: DecodeOptions) -> DecodeOutput:
    """The decode loop. Arguments and errors as in `spec_generate`."""
    _check_prompt(input_ids)
    pair = Pair(draft, target, options.temperature)
    text, statistics = _Text(input_ids, options), DecodeStatistics()
    if options.max_new_tokens == 0:
        return DecodeOutput(input_ids, statistics)
    started = time.perf_counter()
    with pair.tapped() as taps:
        anchor = pair.prefill(input_ids)  # the target's first token, [1, 1]
        text.commit(anchor[0].tolist())
        statistics.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        context = taps.take()  # context features of the prompt, [1, P, taps * target_hidden]
        while not text.finished:
            block = pair.propose(anchor, context)  # draft: [1, Q], the anchor and Q - 1 drafted tokens
            choices = pair.verify(block, text.length - 1)  # [1, Q]: the target's own token after each of them
            accepted = accept(block, choices)  # how many drafted tokens stay
            rewind(pair.target_cache, block.shape[1] - 1 - accepted)
            statistics.committed.append(text.commit(choices[0, : accepted + 1].tolist()))
            anchor, context = choices[:, accepted : accepted + 1], taps.take()[:, : accepted + 1]
    statistics.decode_seconds = time.perf_counter() - started
    return DecodeOutput(text.ids(), statistics)


def accept(block: torch.Tensor, choices: torch.Tensor) -> int:
    """How many drafted tokens stay: those before the first that is not the target's own choice.

    Args:
        block `[1, Q]`: the anchor, then Q - 1 drafted tokens.
        choices `[1, Q]`: at k, the target's token after position k of the block.
    """
    matches = block[:, 1:] == choices[:, :-1]  # [1, Q - 1]
    return int(matches.cumprod(dim=1).sum())


class Pair:
    """A draft and its target while they decode one row: their caches, and the two forwards of a cycle."""

    def __init__(self, draft: Any, target: Any, temperature: float = 0.0):
        check_pair(draft.config, target)
        self.draft, self.target = draft, target
        self.embed, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.layers = decoder_layers(target)
        self.target_cache = rewindable_cache(target.config.get_text_config(decoder=True))
        self.draft_cache = rewindable_cache(draft.config)
        self.noise = PositionNoise(temperature) if temperature > 0 else None
        self.masks = torch.full((1, draft.config.block_size - 1), draft.config.mask_token_id, device=self.embed_device)

    @property
    def embed_device(self) -> torch.device:
        return next(self.embed.parameters()).device

    @contextmanager
    def tapped(self) -> Iterator["Taps"]:
        """Collect the outputs of the tapped layers during every target forward inside this context."""
        taps = Taps(self.draft)
        hooks = [self.layers[index].register_forward_hook(taps.keep) for index in self.draft.config.target_layer_ids]
        try:
            yield taps
        finally:
            for hook in hooks:
                hook.remove()

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids [1, P]` through the target; its first token `[1, 1]`."""
        logits = self._target_logits(input_ids, logits_to_keep=1)
        rewind(self.target_cache, 0)
        return self._choose(logits, input_ids.shape[1])

    def propose(self, anchor: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The anchor `[1, 1]` and the draft's argmax for the rest of the block: `[1, Q]`."""
        noise_ids = torch.cat([anchor.to(self.embed_device), self.masks], dim=1)
        noise_embeds = embed_noise(self.embed, noise_ids).to(self.draft.device, self.draft.dtype)
        hidden = self.draft(noise_embeds, context, past_key_values=self.draft_cache).last_hidden_state
        rewind(self.draft_cache, noise_ids.shape[1])
        weight = next(self.head.parameters())
        logits = self.head(hidden[:, 1:].to(weight.device, self.target.dtype))  # [1, Q - 1, V]
        return torch.cat([anchor, logits.argmax(dim=-1).to(anchor.device)], dim=1)

    def verify(self, block: torch.Tensor, position: int) -> torch.Tensor:
        """The target's own token after each of `block [1, Q]`, whose anchor is at `position`: `[1, Q]`."""
        return self._choose(self._target_logits(block), position + 1)

    def _target_logits(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs |= {"past_key_values": self.target_cache, "use_cache": True, "return_dict": True}
        return self.target(input_ids=input_ids, **kwargs).logits

    def _choose(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """`[1, Q]`: the target's token at `position` and on, from its `logits [1, Q, V]`."""
        scores = logits if self.noise is None else self.noise.perturb(logits, position)
        return scores.argmax(dim=-1)


class Taps:
    """Outputs of the tapped layers in one target forward."""

    def __init__(self, draft: Any):
        self.draft = draft
        self.kept: list[torch.Tensor] = []  # [B, N, target_hidden] per tap, in layer order

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.kept.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> torch.Tensor:
        """The context features `[B, N, taps * target_hidden]`, on the draft's device and in its dtype; forgets them."""
        features = torch.cat([kept.to(self.draft.device) for kept in self.kept], dim=-1)
        self.kept = []
        return features.to(self.draft.dtype)


class PositionNoise:
    """Gumbel noise, one row of V per absolute position, from one seed: argmax(logits / T + row) samples softmax."""

    def __init__(self, temperature: float, seed: int | None = None):
        self.temperature = temperature
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed  # torch.manual_seed governs it

    def row(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """`[V]` for this position, the same however often and in whatever block it is asked for."""
        generator = torch.Generator(like.device).manual_seed((self.seed + position) % 2**63)
        noise = torch.empty(like.shape[-1], device=like.device, dtype=torch.float32)
        return -noise.exponential_(generator=generator).log()

    def perturb(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """`logits [1, Q, V]` of `position` and on, tempered and perturbed, in float32."""
        rows = torch.stack([self.row(position + offset, logits) for offset in range(logits.shape[1])])
        return logits.float() / self.temperature + rows


class _Text:
    """The committed tokens, counted by position: a token that happens to be the mask is a token like any other."""

    def __init__(self, input_ids: torch.Tensor, options: DecodeOptions):
        self.prompt, self.options, self.finished = input_ids, options, False
        self.new: list[int] = []

    @property
    def length(self) -> int:
        return self.prompt.shape[1] + len(self.new)

    def commit(self, tokens: list[int]) -> int:
        """Make tokens final, up to the budget and the first stop token; how many were."""
        tokens = tokens[: self.options.max_new_tokens - len(self.new)]
        stop = next((index for index, token in enumerate(tokens) if token in self.options.stop_token_ids), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        self.new.extend(tokens)
        self.finished = stop is not None or len(self.new) >= self.options.max_new_tokens
        if self.options.on_commit is not None:
            self.options.on_commit(tokens)
        return len(tokens)

    def ids(self) -> torch.Tensor:
        return torch.cat([self.prompt, self.prompt.new_tensor([self.new])], dim=1)


def check_pair(config: Any, target: Any) -> None:
    """Refuse a target that a draft with this config was not made for, or that no draft can decode.

    Raises:
        ValueError: with both numbers.
    """
    if not hasattr(target, "get_output_embeddings"):
        raise ValueError(f"target is {target!r}; pass the loaded model, not its name.")
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(f"{type(target).__name__} is no decoder-only language model; a draft needs one as its target.")
    text = target.config.get_text_config(decoder=True)
    _refuse_moving_rope(text)
    rows = target.get_input_embeddings().num_embeddings
    config.check_target(text.hidden_size, text.num_hidden_layers, text.vocab_size, rows)
    decoder_layers(target)


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
    layers = getattr(target.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"{type(target).__name__} shows no decoder layers to tap (`get_decoder().layers` is missing).")
    return layers


def embed_noise(embed: Any, ids: torch.Tensor) -> torch.Tensor:
    """The target's embeddings of `ids [B, Q]`: `[B, Q, H]`. Drafts are trained without a norm inside the embedding."""
    if getattr(embed, "embed_norm", None) is not None:
        return nn.functional.embedding(ids, embed.weight)
    return embed(ids)


def _token_ids(tokens: Any) -> tuple[int, ...]:
    """One id, several, a tensor of them, or None, as a tuple."""
    if tokens is None:
        return ()
    found = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else tokens
    found = [found] if isinstance(found, int) else found
    if isinstance(found, str) or not all(isinstance(token, int) for token in found):
        raise ValueError(f"stop_token_ids is {tokens!r}; it must be token ids, such as [tokenizer.eos_token_id].")
    return tuple(found)


def _check_prompt(input_ids: torch.Tensor) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
        raise ValueError(f"input_ids is {type(input_ids).__name__}; pass a tensor of token ids, [1, P].")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or shape[0] != 1 or shape[1] == 0:
        raise ValueError(f"input_ids has shape {shape}; decoding takes one row with at least one token, [1, P].")
