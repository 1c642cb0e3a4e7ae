# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The decoding function that a target's `generate` calls: `target.generate(..., custom_generate=draft.speculate)`.

This file travels with every pushed draft. `generate` prepares everything, as for plain decoding; what has no meaning
with a draft is refused here, with the reason.

Shapes: B rows, P prompt tokens, T tokens of the longest text, V vocabulary.
"""

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .capture_dflash import CAPTURE, settled
from .compat_dflash import (
    attention_name,
    cache_field,
    cache_in,
    keep_tokenizer,
    local_of_generate,
    made_by_user,
    padding_token,
)
from .drafting_dflash import Drafter
from .generation_dflash import DecodeStatistics, Pair, decode
from .handover_dflash import give_back
from .sampling_dflash import Chooser, PositionNoise, refuse_processors
from .selfcheck_dflash import check_alone, circumstances
from .target_dflash import Target, check_target, recurrent, warn_of_new_family
from .text_dflash import Prompt, Stops, Texts

DRAFT_SAMPLING = ("greedy", "coupled")


class Speculate:
    """A draft, as the decoding function of its target's `generate`.

    Besides all that `generate` takes, it takes four keywords, none of which changes the text:

    statistics: a `DecodeStatistics`, to be filled.
    draft_sampling: "coupled" (when sampling, the draft draws its tokens with the very noise that the target draws
        with) or "greedy" (it always proposes its likeliest tokens, which are accepted less often).
    capture: how blocks run. "auto" is CUDA graphs for dense targets on a GPU and nothing elsewhere; "graphs" and
        "compile" (torch.compile, which takes its time at first) ask for one; "off" is neither.
    strict: refuse a target whose family the tests do not decode, where otherwise its self-check decides.
    """

    def __init__(self, draft: Any):
        self.draft = draft
        self.compiled: Session | None = None
        """The last session, if it was compiled: what it was compiled to is good for the next text."""
        self.checked: weakref.WeakKeyDictionary[Any, set] = weakref.WeakKeyDictionary()
        """For each target, the traits and circumstances that a self-check has passed in."""

    def __reduce__(self) -> tuple:
        return Speculate, (self.draft,)

    def _session(self, model: Any) -> "Session":
        kept = self.compiled
        if kept is None or kept.target.model is not model or kept.traits != traits(self.draft, model):
            return Session(self.draft, model, self.checked.setdefault(model, set()))
        return kept

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        tokenizer: Any = None,
        statistics: DecodeStatistics | None = None,
        draft_sampling: str = "coupled",
        capture: str = "auto",
        strict: bool = False,
        **inputs: Any,
    ) -> torch.Tensor | ModelOutput:
        """Decode `input_ids [B, P]`; as `generate` returns it: `[B, T]`, or a dict with `sequences`.

        Raises:
            ValueError: the draft does not fit the target, the target cannot be decoded exactly, or something was asked
                for that has no meaning with a draft.
        """
        streamer = streamer or local_of_generate("streamer", sys._getframe(1))
        check_pair(self.draft.config, model, strict)
        refuse(generation_config, logits_processor, input_ids, inputs)
        _one_of("draft_sampling", draft_sampling, DRAFT_SAMPLING)
        _one_of("capture", capture, CAPTURE)
        noise = PositionNoise() if generation_config.do_sample else None
        texts = Texts(input_ids, Stops.of(stopping_criteria), padding_token(generation_config), streamer)
        prompt = Prompt(input_ids, inputs, generation_config.return_dict_in_generate)
        chooser = Chooser(logits_processor, noise, coupled=draft_sampling == "coupled")
        if len(input_ids) > 1 and made_by_user(prompt.cache, unmarked=False):
            refuse_recurrent(model)
        session, how = self._session(model), settled(capture, model, recurrent(model))
        self.compiled = session if how == "compile" else None
        pair = session.decode(prompt, texts, chooser, how, _kept(generation_config), statistics)
        return _output(pair) if generation_config.return_dict_in_generate else texts.sequences()

    @property
    def __signature__(self) -> inspect.Signature:
        """What `generate` reads to learn which arguments of ours it may be given.

        It is about to drop `tokenizer`, which stop strings need; here it is put back among the arguments.
        """
        keep_tokenizer(sys._getframe(1))
        return inspect.signature(Speculate.__call__.__get__(self))


class Session:
    """A target and a draft that decode together."""

    _locks: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()

    def __init__(self, draft: Any, model: Any, checked: set):
        self.checked = checked
        self.target = Target(model, tuple(draft.config.target_layer_ids))
        self.drafter = Drafter(draft, model)
        self.traits = traits(draft, model)

    def decode(
        self,
        prompt: Prompt,
        texts: Texts,
        chooser: Chooser,
        how: str = "off",
        keep: tuple[str, ...] = (),
        statistics: DecodeStatistics | None = None,
    ) -> Pair:
        """Decode to the end, one decode of a target at a time; both models are left as they were found."""
        lock = self._locks.setdefault(self.target.model, threading.RLock())
        with lock:
            self._check(prompt)
            with self.target.decoding(how), self.drafter.decoding(prompt.hidden, how):
                pair = Pair(self.target, self.drafter, prompt, texts, chooser, keep)
                pair.unchecked = not self.target.recurrence.states and self._circumstances(prompt) not in self.checked
                decode(pair, statistics)
                give_back(pair)
            if pair.has_checked:
                self.checked.add(self._circumstances(prompt))
        if texts.streamer is not None:
            texts.streamer.end()
        return pair

    def _check(self, prompt: Prompt) -> None:
        """Check the block path on a short text, unless that was done for such prompts."""
        alone = ("alone", *self._circumstances(prompt)[:-1])
        if alone not in self.checked:
            with self.target.decoding("off"):
                check_alone(self.target, self.drafter.size, prompt)
            self.checked.add(alone)
            warn_of_new_family(self.target.model)

    def _circumstances(self, prompt: Prompt) -> tuple:
        """What a check of `prompt` holds for: its windows last."""
        return (*self.traits, *circumstances(self.target, prompt))


def traits(draft: Any, model: Any) -> tuple:
    """What a session was made for, and may have changed since."""
    return tuple(
        (one.dtype, one.device, attention_name(one.config.get_text_config(decoder=True))) for one in (draft, model)
    )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")


def spec_generate(
    self: Any,
    target: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int = 256,
    stop_token_ids: list[int] | int | None = None,
    temperature: float = 0.0,
) -> torch.Tensor:
    """Generate with `target`, sped up by this draft; the same call as z-lab/dflash's.

    The target's own generation config plays no part in it: no penalties, no top-k. `target.generate(...,
    custom_generate=draft.speculate)` honours it.

    Args:
        target: a causal language model of transformers.
        input_ids `[B, P]`: the prompts, without padding.
        max_new_tokens: budget of new tokens.
        stop_token_ids: a text ends right after the first of these; None to use the whole budget.
        temperature: 0 for exactly the target's greedy text; above, exactly its distribution.

    Returns:
        `[B, T]`: prompts and new tokens.

    Raises:
        ValueError: the target does not fit this draft, cannot be decoded exactly, or an argument is out of range.
    """
    _check_arguments(target, input_ids, max_new_tokens, temperature)
    stops = Stops(input_ids.shape[1] + max_new_tokens, frozenset(_token_ids(stop_token_ids)), has_eos=True)
    check_pair(self.config, target)
    target = target.get_base_model() if hasattr(target, "get_base_model") else target  # of PEFT, with its adapters in
    if max_new_tokens == 0:
        return input_ids
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))] if temperature > 0 else [])
    texts = Texts(input_ids, stops)
    prompt = Prompt(input_ids, {"attention_mask": torch.ones_like(input_ids), "use_cache": True})
    chooser = Chooser(warpers, PositionNoise() if temperature > 0 else None)
    with torch.no_grad():
        self.speculate._session(target).decode(prompt, texts, chooser, settled("auto", target, recurrent(target)))
    return texts.sequences()


def check_pair(config: Any, target: Any, strict: bool = False) -> None:
    """Refuse a target that a draft with this config was not made for, or that no draft can decode.

    Raises:
        ValueError: with both numbers.
    """
    check_target(target, strict)
    text = target.config.get_text_config(decoder=True)
    rows = target.get_input_embeddings().num_embeddings
    config.check_target(text.hidden_size, text.num_hidden_layers, text.vocab_size, rows)


def refuse(
    config: GenerationConfig, processors: LogitsProcessorList, input_ids: torch.Tensor, inputs: dict[str, Any]
) -> None:
    """Refuse what has no meaning with a draft.

    Raises:
        ValueError: saying what, why, and what to do.
    """
    refuse_processors(processors)
    cache = cache_in(inputs)
    reasons: dict[str, Callable[[], Any]] = {
        "num_beams above 1: beams are searched with the scores of whole texts, a draft speeds up one text at a time": (
            lambda: (config.num_beams or 1) > 1
        ),
        "penalty_alpha: contrastive search ranks several tokens by hidden states": lambda: config.penalty_alpha,
        "dola_layers: DoLa takes its scores from two layers": lambda: config.dola_layers,
        "output_attentions: attention over a block is not that of single tokens": lambda: config.output_attentions,
        "output_hidden_states: of a block, only those of accepted tokens would count": (
            lambda: config.output_hidden_states
        ),
        "inputs_embeds: the draft needs the token ids; pass input_ids": lambda: inputs.get("inputs_embeds") is not None,
        "cache_implementation='quantized': its keys are not those of plain decoding once a token was rejected": (
            lambda: config.cache_implementation == "quantized" or "Quantized" in type(cache).__name__
        ),
        "an offloaded cache: keys are kept on the target's device here": (
            lambda: "offloaded" in str(config.cache_implementation) or getattr(cache, "offloading", False)
        ),
    }
    if cache is not None and not isinstance(cache, DynamicCache) and config.cache_implementation is None:
        raise ValueError(f"The cache is a {type(cache).__name__}; with a draft only a DynamicCache carries on.")
    for reason, asked in reasons.items():
        if asked():
            raise ValueError(f"A draft cannot be used with {reason}. Leave one of the two out.")
    if input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; a prompt needs at least one token.")


def refuse_recurrent(model: Any) -> None:
    """Refuse to leave the state of several rows, which end at different columns, in one cache.

    Raises:
        ValueError: the target keeps recurrent state.
    """
    if recurrent(model):
        raise ValueError(
            f"{type(model).__name__} keeps recurrent state, and rows of a batch may end at different columns, so no "
            "cache of theirs can be carried on. Leave the cache out, or give one row at a time."
        )


def _kept(config: GenerationConfig) -> tuple[str, ...]:
    """What a returned dict is to hold of every token."""
    wanted = {"scores": config.output_scores, "logits": config.output_logits}
    return tuple(name for name, asked in wanted.items() if asked and config.return_dict_in_generate)


def _output(pair: Pair) -> ModelOutput:
    return GenerateDecoderOnlyOutput(
        sequences=pair.texts.sequences(),
        scores=pair.every_step("scores"),
        logits=pair.every_step("logits"),
        **{cache_field(GenerateDecoderOnlyOutput): pair.prompt.cache},
    )


def _token_ids(tokens: Any) -> tuple[int, ...]:
    """One id, several, a tensor of them, or None, as a tuple."""
    if tokens is None:
        return ()
    found = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else tokens
    found = [found] if isinstance(found, int) else found
    if isinstance(found, str) or not all(isinstance(token, int) for token in found):
        raise ValueError(f"stop_token_ids is {tokens!r}; it must be token ids, such as [tokenizer.eos_token_id].")
    return tuple(found)


def _check_arguments(target: Any, input_ids: torch.Tensor, max_new_tokens: int, temperature: float) -> None:
    if not hasattr(target, "get_output_embeddings"):
        raise ValueError(f"target is {target!r}; pass the loaded model, not its name.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
        raise ValueError(f"input_ids is {type(input_ids).__name__}; pass a tensor of token ids, [B, P].")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids has shape {shape}; decoding takes rows of at least one token, [B, P].")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be an int, 0 or more.")
    if not isinstance(temperature, int | float) or not (temperature == 0 or 1e-5 <= temperature < float("inf")):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a number from 1e-5 up.")
