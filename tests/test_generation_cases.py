"""Ways of calling `generate`, as a list of cases: with a draft, each gives what it gives without one.

The list follows transformers' own tests of generation. A case is what is passed to `generate`, on top of `DEFAULTS` and
of two left-padded prompts where it has none. Those that need a fresh object are functions of the target.
"""

import asyncio
import copy
import functools
import sys

import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation import logits_process, stopping_criteria

import tiny
from dflash_hub import DecodeStatistics
from dflash_hub.compat_dflash import cache_in
from paths import ROOT, TINY

sys.path.insert(0, str(ROOT / "benchmarks"))
import families

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, which says that an option has no effect

ROW = tiny.batch(9, (0,))
BATCH = {name: value[::2] for name, value in tiny.batch(9, (0, 0, 4)).items()}
LONG = tiny.batch(40, (0,))
DEFAULTS = {"max_new_tokens": 11, "do_sample": False}
WHOLE = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ENDS = {"eos_token_id": [2, 9], "pad_token_id": 11}
FAMILIES = ("gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_next")
TWINS = ("opt", "lfm2")
"""Families whose positions or states are of a kind that another one has; they get every second case."""


@functools.cache
def pair(family: str):
    """A target and its draft; one pair of a family is enough, since decoding leaves both as they were.

    Of layers that are all of one kind, two are enough too.
    """
    if family == "qwen3":
        return tiny.shallow()
    target = tiny.target(family) if family in tiny.FAMILIES else families.build(family)
    return target, tiny.draft(target)


# Processors, criteria and streamers of one's own ----------------------------------------------------------------------


class Rotated(logits_process.LogitsProcessor):
    """Rotates the scores by the last token; it depends on the text, not on earlier calls."""

    def __call__(self, input_ids, scores):
        return torch.stack([line.roll(int(ids[-1])) for ids, line in zip(input_ids, scores, strict=True)])


def two_after(row, ids):
    """Two tokens after the last one; fails where the last one of a generated text is neither of two after its last."""
    last = ids[-2:].tolist()
    if len(ids) > 9 and (last[1] - last[0]) % tiny.VOCAB not in (1, 2):
        raise KeyError(f"{last} was not allowed")
    return [(last[-1] + step) % tiny.VOCAB for step in (1, 2)]


class Counting(logits_process.LogitsProcessor):
    """Favours another token at each call: it has state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, 5 * self.calls % scores.shape[1]] += 40
        return scores


class EndsAfter(StoppingCriteria):
    """Ends a row with its third 5, or with its tenth call where it `counts`."""

    def __init__(self, counts: bool = False):
        self.counts, self.calls = counts, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        over = self.counts and self.calls >= 10
        return ((input_ids == 5).sum(dim=1) >= 3) | over


class EndsAtScores(StoppingCriteria):
    """Ends a row by the scores of the last token, of which `generate` hands over one tensor a step."""

    def __call__(self, input_ids, scores, **kwargs):
        sure = torch.stack([one.softmax(-1).max(-1).values for one in scores])
        return (sure > 0.999).sum(dim=0) >= 4


class Received:
    """A streamer that stores what it receives."""

    def __init__(self):
        self.received, self.ends = [], 0

    def put(self, value):
        self.received.append(value.tolist())

    def end(self):
        self.ends += 1


def processors(*chosen):
    """The option that hands these to `generate`."""
    return {"logits_processor": logits_process.LogitsProcessorList(chosen)}


def criteria(*chosen):
    """The option that hands these to `generate`."""
    return {"stopping_criteria": StoppingCriteriaList(chosen)}


# Caches and embeddings, made anew for each call -----------------------------------------------------------------------


def prefilled(target, slots: int = 6, inputs=LONG):
    """A cache that holds the first slots of the prompt, filled by the target's own forward."""
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(inputs["input_ids"][:, :slots], **{tiny.CACHE: cache})
    return cache


def second_turn(target, new_ids_only: bool = False, rows: int = 1):
    """A prompt that goes on after a turn of plain `generate`, whose cache is passed."""
    first = {name: value[:rows] for name, value in BATCH.items()}
    out = target.generate(**first, **DEFAULTS, return_dict_in_generate=True)
    said = tiny.batch(5, (0,) * rows)["input_ids"]
    ids = torch.cat([out.sequences, said], dim=1)
    mask = pad(first["attention_mask"], (0, ids.shape[1] - 9), value=1)
    if new_ids_only:
        ids = ids[:, cache_in(out).get_seq_length() :]
    return {"input_ids": ids, "attention_mask": mask, tiny.CACHE: cache_in(out)}


def embedded(target, inputs=BATCH, with_ids: bool = False, **more):
    """A prompt as embeddings."""
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    found = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **more}
    return {"input_ids": inputs["input_ids"]} | found if with_ids else found


def shifted(by: int, inputs=BATCH):
    """Positions that begin elsewhere than at 0."""
    positions = inputs["attention_mask"].cumsum(-1) - 1
    return {"position_ids": positions.clamp_min(0) + by}


SYNTH_ID = {"ngram_len": 3, "keys": [11, 23, 47, 5], "context_history_size": 64}

# The cases ------------------------------------------------------------------------------------------------------------

LENGTHS = {
    "one new token": {"max_new_tokens": 1},
    "two new tokens": {"max_new_tokens": 2},
    "a whole block": {"max_new_tokens": 6},
    "max_length": {"max_new_tokens": None, "max_length": 21},
    "both lengths": {"max_new_tokens": 7, "max_length": 30},
    "no length, which is 20": {"max_new_tokens": None},
    "min_new_tokens": {**ENDS, "min_new_tokens": 9},
    "min_length": {**ENDS, "min_length": 16},
    "min_new_tokens beyond the length": {**ENDS, "min_new_tokens": 40},
    "max_time that is not reached": {"max_time": 600.0},
    "max_time of nothing": {"max_time": 0.0},
    "a limit of one's own": lambda target: criteria(stopping_criteria.MaxLengthCriteria(max_length=15)),
}
PROMPTS = {
    "no prompt": {"input_ids": None, "attention_mask": None},
    "a prompt of one token": tiny.batch(1, (0,)),
    "two prompts of one token": tiny.batch(1, (0, 0)),
    "as the first argument": lambda target: {"inputs": ROW["input_ids"]},
    "one row": ROW,
    "longer than a window": LONG,
    "just below 256 tokens, where buffers grow": tiny.batch(250, (0,)),
    "padded to the last token": tiny.batch(9, (8, 0, 3)),
    "no mask, some tokens are padding": {"input_ids": BATCH["input_ids"], "attention_mask": None},
    "no mask, no padding token": {"input_ids": BATCH["input_ids"], "attention_mask": None, "pad_token_id": 99},
    "a mask with holes": {**ROW, "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1]])},
    "padded on the right": {**BATCH, "attention_mask": BATCH["attention_mask"].flip(-1)},
    "a mask of truth values": {**BATCH, "attention_mask": BATCH["attention_mask"].bool()},
    "a mask of numbers": {**BATCH, "attention_mask": BATCH["attention_mask"].float()},
    "ids of 32 bits": {**ROW, "input_ids": ROW["input_ids"].int()},
    "positions": {**BATCH, **shifted(0)},
    "positions further on": {**BATCH, **shifted(7)},
    "positions of one row for all": {**tiny.batch(9, (0, 0)), "position_ids": torch.arange(3, 12)[None]},
    "chunks of the prompt": {**LONG, "prefill_chunk_size": 8},
    "chunks of padded prompts": {"prefill_chunk_size": 4},
    "all logits of the prompt": {"logits_to_keep": 0},
    "some logits of the prompt": {"logits_to_keep": 3, **WHOLE},
}
ENDINGS = {
    "an end token": {"eos_token_id": 7, "pad_token_id": 0},
    "end tokens": ENDS,
    "end tokens as a tensor": {"eos_token_id": torch.tensor([2, 9]), "pad_token_id": 11},
    "an end token that never comes": {"eos_token_id": -1, "pad_token_id": 11},
    "an end token outside the vocabulary": {"eos_token_id": [99, 7], "pad_token_id": 11},
    "no padding token but the end token": {"eos_token_id": 7, "pad_token_id": None},
    "every token is an end token": {"eos_token_id": list(range(tiny.VOCAB)), "pad_token_id": 11},
    "no end token": {"eos_token_id": None},
    "a criterion of one's own": lambda target: criteria(EndsAfter()),
    "a criterion and end tokens": lambda target: {**ENDS, **criteria(EndsAfter())},
    "end tokens by a criterion": lambda target: {
        **criteria(stopping_criteria.EosTokenCriteria(eos_token_id=7)),
        "pad_token_id": 0,
    },
    "a criterion that gives one truth value": lambda target: criteria(lambda ids, scores, **more: ids.shape[1] >= 16),
    "a criterion that counts its calls": lambda target: criteria(EndsAfter(counts=True)),
    "a criterion that counts, and end tokens": lambda target: {**ENDS, **criteria(EndsAfter(counts=True))},
    "a criterion that reads scores": lambda target: {**WHOLE, **criteria(EndsAtScores())},
    "the confidence criterion": lambda target: {
        **ROW,
        **WHOLE,
        **criteria(stopping_criteria.ConfidenceCriteria(assistant_confidence_threshold=0.5)),
    },
}
OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "repetition_penalty below 1": {"repetition_penalty": 0.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [4, 5], [1, 2, 3]]},
    "sequence_bias": {"sequence_bias": [[[5], 9.0], [[1, 2], -30.0], [[5, 5], -50.0]]},
    "suppress_tokens": {"suppress_tokens": [7, 3]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 4, 5, 8]},
    "begin_suppress_tokens after one token": {**tiny.batch(1, (0,)), "begin_suppress_tokens": [1, 4, 5, 8]},
    "forced_bos_token_id": {**tiny.batch(1, (0,)), "forced_bos_token_id": 6},
    "forced_bos_token_id and begin_suppress_tokens": {
        **tiny.batch(1, (0,)),
        "forced_bos_token_id": 6,
        "begin_suppress_tokens": [1, 4, 5, 8],
    },
    "forced_eos_token_id": {"forced_eos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0},
    "forced_eos_token_id, several": {"forced_eos_token_id": [4, 6]},
    "exponential_decay_length_penalty": {**ENDS, "exponential_decay_length_penalty": (3, 1.6)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [row, int(ids[-1]), 7, 8]},
    "prefix_allowed_tokens_fn that knows only what it allowed": {"prefix_allowed_tokens_fn": two_after},
    "remove_invalid_values": {"remove_invalid_values": True, **WHOLE},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3, **WHOLE},
    "a watermark": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "a SynthID watermark": {
        "watermarking_config": SynthIDTextWatermarkingConfig(**SYNTH_ID),
        "do_sample": True,
        "top_k": 1,
    },
    "a SynthID watermark of greedy text": {"watermarking_config": SynthIDTextWatermarkingConfig(**SYNTH_ID), **WHOLE},
    "guidance_scale": {"guidance_scale": 1.7},
    "guidance_scale and scores": {**ROW, "guidance_scale": 1.7, **WHOLE},
    "guidance away from a text": {
        **ROW,
        "guidance_scale": 1.7,
        "negative_prompt_ids": tiny.prompt(5, seed=8),
        "negative_prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
    },
    "guidance without a cache": {**ROW, "guidance_scale": 1.7, "use_cache": False},
    "several options": {
        **ENDS,
        **WHOLE,
        "min_new_tokens": 4,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3]],
        "suppress_tokens": [7],
    },
}
PROCESSORS = {
    "a processor of one's own": lambda target: {**processors(Rotated()), **WHOLE},
    "one's own and options": lambda target: {**processors(Rotated()), "repetition_penalty": 1.3, "top_k": 5},
    "one's own in place of an option": lambda target: {
        **processors(logits_process.RepetitionPenaltyLogitsProcessor(2.5)),
        "repetition_penalty": 1.1,
    },
    "a processor that counts its calls": lambda target: processors(Counting()),
    "a processor that counts, and end tokens": lambda target: {**ENDS, **processors(Counting())},
    "a penalty that ignores the prompt": lambda target: processors(
        logits_process.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=9)
    ),
    "temperature": lambda target: {**processors(logits_process.TemperatureLogitsWarper(0.3)), **WHOLE},
    "top_k": lambda target: {**processors(logits_process.TopKLogitsWarper(3)), **WHOLE},
    "top_p": lambda target: {**processors(logits_process.TopPLogitsWarper(0.6)), **WHOLE},
    "top_h": lambda target: {**processors(logits_process.TopHLogitsWarper(0.4)), **WHOLE},
    "min_p": lambda target: {**processors(logits_process.MinPLogitsWarper(0.2)), **WHOLE},
    "typical": lambda target: {**processors(logits_process.TypicalLogitsWarper(0.3)), **WHOLE},
    "epsilon": lambda target: {**processors(logits_process.EpsilonLogitsWarper(0.05)), **WHOLE},
    "eta": lambda target: {**processors(logits_process.EtaLogitsWarper(0.05)), **WHOLE},
    "lengths by processors": lambda target: {
        **ENDS,
        **processors(
            logits_process.MinLengthLogitsProcessor(13, [2, 9]),
            logits_process.MinNewTokensLengthLogitsProcessor(9, 6, [2, 9]),
        ),
    },
}
LIKELIEST = {
    # Of the tokens that these leave, one has all the probability.
    "sampling of one token": {"do_sample": True, "top_k": 1},
    "sampling at a low temperature": {"do_sample": True, "temperature": 1e-4},
    "sampling with a narrow top_p": {"do_sample": True, "top_p": 1e-6, "temperature": 0.8},
    "sampling with min_p of 1": {"do_sample": True, "min_p": 1.0},
    "sampling with every option": {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.9,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 1e-3,
        "temperature": 0.7,
        "renormalize_logits": True,
        **WHOLE,
    },
    "num_return_sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 3, **ENDS},
    "num_return_sequences and a function of the prefix": {
        "do_sample": True,
        "top_k": 1,
        "num_return_sequences": 2,
        "prefix_allowed_tokens_fn": lambda row, ids: [row, row + 1, int(ids[-1]), 7, 8],
    },
    "num_return_sequences of 1": {"num_return_sequences": 1, "num_beams": 1},
}
OUTPUTS = {
    "a dict": {"return_dict_in_generate": True},
    "a dict with scores": {"return_dict_in_generate": True, "output_scores": True},
    "a dict with scores and logits": {**WHOLE, "repetition_penalty": 1.3},
    "a dict of rows that end apart": {**ENDS, **WHOLE},
    "scores without a dict": {"output_scores": True, "output_logits": True},
    "hidden states": {**ROW, "return_dict_in_generate": True, "output_hidden_states": True},
    "hidden states of padded prompts": {**WHOLE, "output_hidden_states": True},
}
CACHES = {
    "no cache": {"use_cache": False},
    "no cache, in a dict": {"use_cache": False, **WHOLE},
    "a dynamic cache": {"cache_implementation": "dynamic", "return_dict_in_generate": True},
    "a static cache": {"cache_implementation": "static"},
    "a static cache, longer": {"cache_implementation": "static", "max_cache_len": 64},
    "a static cache, returned": {"cache_implementation": "static", "return_dict_in_generate": True},
    "a static cache without compilation": {"cache_implementation": "static", "disable_compile": True},
    "an empty cache": lambda target: {**ROW, tiny.CACHE: DynamicCache(config=target.config)},
    "an empty cache and padded prompts": lambda target: {tiny.CACHE: DynamicCache(config=target.config)},
    "a cache filled by a forward": lambda target: {**LONG, tiny.CACHE: prefilled(target)},
    "a cache filled but for one token": lambda target: {**LONG, tiny.CACHE: prefilled(target, 39)},
    "a cache of an earlier turn": lambda target: second_turn(target),
    "a cache of an earlier turn, new ids only": lambda target: {**second_turn(target, new_ids_only=True), **WHOLE},
    "a cache of an earlier turn of padded prompts": lambda target: second_turn(target, rows=2),
    "a cache of an earlier turn, scores": lambda target: {**second_turn(target), **WHOLE},
    "a static cache of one's own": lambda target: {
        **ROW,
        tiny.CACHE: StaticCache(config=target.config, max_cache_len=64),
    },
    "a static cache of one's own and padded prompts": lambda target: {
        tiny.CACHE: StaticCache(config=target.config, max_cache_len=64)
    },
}
EMBEDDINGS = {
    "embeddings": embedded,
    "embeddings of one row": lambda target: embedded(target, ROW),
    "embeddings and ids": lambda target: embedded(target, with_ids=True),
    "embeddings in a dict": lambda target: embedded(target, ROW, **WHOLE),
    "embeddings of no token": lambda target: {**embedded(target, ROW), "inputs_embeds": torch.ones(1, 9, 32)},
    "embeddings and an end token": lambda target: embedded(target, **ENDS),
}
CALLS = {
    "a config": {"max_new_tokens": None, "generation_config": GenerationConfig(max_new_tokens=10, top_k=5)},
    "a config and options": {
        "generation_config": GenerationConfig(max_new_tokens=99, repetition_penalty=1.4, eos_token_id=7, pad_token_id=0)
    },
    "greedy with options of sampling": {"temperature": 0.4, "top_p": 0.5, "top_k": 3},
    "one process": {"synced_gpus": False},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "an option of beams": {"length_penalty": 1.5, "early_stopping": False},
    "a streamer": lambda target: {**ROW, "streamer": Received(), **ENDS},
    "a streamer of padded prompts": lambda target: {"streamer": Received(), **ENDS},
    "a streamer and a dict": lambda target: {"streamer": Received(), **WHOLE},
    "attentions that the attention does not give": {"output_attentions": True, "return_dict_in_generate": True},
}
if tiny.CACHE == "cache":  # before transformers 5.24, plain `generate` hides the tokens that it feeds again
    CALLS["a cache as long as the prompt"] = lambda target: {**ROW, tiny.CACHE: prefilled(target, 9, ROW)}
CASES = LENGTHS | PROMPTS | ENDINGS | OPTIONS | PROCESSORS | LIKELIEST | OUTPUTS | CACHES | EMBEDDINGS | CALLS
COMMON = (
    *("a prompt of one token", "chunks of the prompt", "padded to the last token", "a mask with holes"),
    *("padded on the right", "positions further on", "a dict of rows that end apart", "no cache, in a dict"),
    *("a static cache", "a cache filled but for one token", "a cache of an earlier turn, new ids only"),
    "embeddings",
)
"""The cases that touch caches, masks and positions, which every family decodes.

`test_outputs.py` has the hidden states of a family of each kind, `test_stepwise.py` has guidance.
"""
OF_ONE_FAMILY = {
    "gpt2": {
        "token types": lambda target: {**BATCH, "token_type_ids": torch.tensor([[1, 5, 2] * 3] * 2)},
        "token types after a cache": lambda target: {
            **LONG,
            tiny.CACHE: prefilled(target),
            "token_type_ids": torch.tensor([[1, 5, 2, 7] * 10]),
        },
    },
    "bert": {"token types": {**BATCH, "token_type_ids": torch.ones(2, 9, dtype=torch.long)}},
}
"""Cases of inputs that few families take."""
SAMPLED = {
    "sampling": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8, "temperature": 3.0},
    "min_p": {"min_p": 0.02, "temperature": 3.0},
    "top_h": {"top_h": 0.8, "temperature": 3.0},
    "typical_p": {"typical_p": 0.8, "temperature": 3.0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01, "temperature": 3.0},
    "eta_cutoff": {"eta_cutoff": 0.01, "temperature": 3.0},
    "num_return_sequences": {"num_return_sequences": 3},
    "an end token": {**ENDS, "temperature": 2.0},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "temperature": 2.0},
    "a watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "a function of the prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [row, int(ids[-1]), 7, 8, 10]},
    "a processor of one's own": lambda target: processors(Rotated()),
    "normalised": {"renormalize_logits": True, "top_k": 5},
}
"""Ways of sampling: a draft draws other tokens of the same distribution, which other tests compare."""
ERRORS = {
    "a misspelt option": {"max_new_token": 5},
    "no new token": {"max_new_tokens": 0},
    "fewer than no new tokens": {"max_new_tokens": -3},
    "a prompt as long as max_length": {"max_new_tokens": None, "max_length": 9},
    "a prompt twice": {"inputs": ROW["input_ids"], "input_ids": ROW["input_ids"]},
    "ids that are no integers": {"input_ids": torch.ones(1, 9)},
    "ids of one dimension": {"input_ids": torch.ones(9, dtype=torch.long)},
    "ids outside the vocabulary": {"input_ids": torch.full((1, 9), 99)},
    "a mask of four dimensions": {**ROW, "attention_mask": torch.ones(1, 1, 9, 9)},
    "several greedy texts of one prompt": {"num_return_sequences": 2},
    "a temperature of 0": {"do_sample": True, "temperature": 0.0},
    "a temperature below 0": {"do_sample": True, "temperature": -1.0},
    "top_k below 0": {"do_sample": True, "top_k": -1},
    "top_p below 0": {"do_sample": True, "top_p": -0.1},
    "top_h above 1": {"do_sample": True, "top_h": 2.0},
    "min_p above 1": {"do_sample": True, "min_p": 2.0},
    "typical_p below 0": {"do_sample": True, "typical_p": -1.0},
    "a penalty below 0": {"repetition_penalty": -1.0},
    "a penalty that is no number": {"repetition_penalty": "much"},
    "part of an n-gram": {"no_repeat_ngram_size": 1.5},
    "bad words that are no lists": {"bad_words_ids": [3]},
    "no bad words": {"bad_words_ids": []},
    "a bias without lists": {"sequence_bias": [[5, 1.0]]},
    "a bias outside the vocabulary": {"sequence_bias": [[[99], 1.0]]},
    "a decay without an end token": {"exponential_decay_length_penalty": (3, 1.6)},
    "a function that allows nothing": {"prefix_allowed_tokens_fn": lambda row, ids: []},
    "a watermark of no context": {"watermarking_config": WatermarkingConfig(context_width=0)},
    "a watermark of more than all tokens": {"watermarking_config": WatermarkingConfig(greenlist_ratio=2.0)},
    "a watermark with an unknown field": {"watermarking_config": {"colour": 5}},
    "stop strings without a tokenizer": {"stop_strings": ["a"]},
    "token healing without a tokenizer": {"token_healing": True},
    "an unknown cache": {"cache_implementation": "elastic"},
    "a cache and the name of one": lambda target: {
        **ROW,
        tiny.CACHE: DynamicCache(config=target.config),
        "cache_implementation": "static",
    },
    "a tuple as the cache": {tiny.CACHE: ((torch.zeros(1, 2, 3, 8),) * 2,) * 4},
    "another kind of compile_config": {"compile_config": 3},
    "another kind of config": {"generation_config": 5},
    "another kind of streamer": {"streamer": 5},
    "guidance for twice as many rows": lambda target: processors(
        logits_process.ClassifierFreeGuidanceLogitsProcessor(2.0)
    ),
    "a processor that fails": lambda target: processors(lambda ids, scores: scores[0, 99]),
    "a criterion that fails": lambda target: criteria(lambda ids, scores, **more: ids[0, 99]),
}
"""Calls that fail: with a draft by the same error as without."""
REFUSED = {
    "beams": ({"num_beams": 2}, "num_beams above 1: beams are searched with the scores of whole texts"),
    "beams, sampled": ({"num_beams": 2, "do_sample": True}, "num_beams above 1"),
    "groups of beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "num_beams above 1"),
    "forced words": ({"force_words_ids": [[3]]}, "force_words_ids: words are forced by a search with beams"),
    "constraints": ({"constraints": [3]}, "constraints: constraints are met by a search with beams"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: contrastive search"),
    "DoLa": ({"dola_layers": "low"}, "dola_layers: DoLa takes its scores from two layers"),
    "hidden states without a cache": (
        {"use_cache": False, "output_hidden_states": True, "return_dict_in_generate": True},
        "hidden states or attentions without a cache",
    ),
    "tokens of the prompt proposed": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: it chooses"),
    "another model as the assistant": (
        lambda target: {"assistant_model": tiny.target("llama", seed=3)},
        "assistant_model: the draft proposes",
    ),
    "ranks in step": ({"synced_gpus": True}, "synced_gpus: each process accepts other numbers of tokens"),
    "an offloaded static cache": ({"cache_implementation": "offloaded_static"}, "an offloaded cache"),
    "a cache longer than the prompt": (
        lambda target: {**ROW, tiny.CACHE: prefilled(target, 20)},
        "The cache holds 20 slots, more than the prompt of 9 tokens",
    ),
}
"""Calls that have no meaning with a draft, and the words that say so."""


def cases(names, family):
    """The parameters of these cases for one family."""
    found = []
    for name in names:
        found.append(pytest.param(family, name, id=f"{family}, {name}"))
    return found


def fresh(case, target):
    """What a case passes to `generate`, with objects of its own."""
    asked = case(target) if callable(case) else copy.deepcopy(case)
    prompted = {"input_ids", "inputs", "inputs_embeds"} & asked.keys()
    return DEFAULTS | asked if prompted else DEFAULTS | copy.deepcopy(BATCH) | asked


def text_of(output) -> torch.Tensor:
    """The ids that a call returned."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def lengths(ids: torch.Tensor, steps: int, asked: dict) -> list[int]:
    """How many of its last `steps` tokens each row generated until its end token, that included."""
    ends = asked.get("eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    rows = ids[:, ids.shape[1] - steps :].tolist()
    return [next((step + 1 for step, token in enumerate(row) if token in ends), steps) for row in rows]


def padded_slots(asked: dict) -> int:
    """How many of the first slots are padding in some row, where nothing is compared."""
    mask = asked.get("attention_mask")
    return 0 if mask is None else int((mask == 0).any(dim=0).sum())


def assert_same_returned_caches(plain, ours, asked: dict):
    """Every tensor of every layer is the same, but for the slots that are padding in some row."""
    if plain is None or ours is None:
        assert plain is ours
        return
    assert type(plain) is type(ours)
    slots = int(plain.get_seq_length())
    assert int(ours.get_seq_length()) == slots
    padded = padded_slots(asked)
    for one, other in zip(plain.layers, ours.layers, strict=True):
        assert type(one) is type(other)
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                mine = getattr(other, name)
                assert mine.shape == value.shape
                # A layer with a window stores the last slots only.
                first = max(0, padded - slots + value.shape[2]) if name in ("keys", "values") else 0
                close(value[:, :, first:], mine[:, :, first:])


def close(plain: torch.Tensor, ours: torch.Tensor):
    finite = plain[plain.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * max(1.0, size))


def assert_same_outputs(plain, ours, asked: dict):
    """The outputs of two calls are the same, field for field."""
    assert set(plain.keys()) - set(ours.keys()) <= {tiny.CACHE}  # the caches are compared below
    steps = lengths(plain.sequences, len(plain.get("scores") or ()), asked)
    for name in ("scores", "logits"):
        assert (plain.get(name) is None) == (ours.get(name) is None)
        for step, (one, other) in enumerate(zip(plain.get(name) or (), ours.get(name) or (), strict=True)):
            alive = [step < count for count in steps]
            close(one[alive], other[alive])
    for one, other in zip(plain.get("hidden_states") or (), ours.get("hidden_states") or (), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.shape == theirs.shape
            first = padded_slots(asked) if mine.shape[1] > 1 else 0
            close(mine[:, first:], theirs[:, first:])


def slots_not_returned(asked: dict) -> int:
    """How many slots lie before the first id that a call returns: those of embeddings, or of a cache."""
    if "inputs_embeds" in asked and "input_ids" not in asked:
        return asked["inputs_embeds"].shape[1]
    if tiny.CACHE not in asked:
        return 0
    cached = int(asked[tiny.CACHE].get_seq_length())
    return cached if cached >= asked["input_ids"].shape[1] else 0


def hooks(target) -> int:
    """The number of hooks on a target; transformers leaves its own there once hidden states were asked for."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())


def assert_accepted_and_rejected(counted: DecodeStatistics):
    """In a decode of several cycles, tokens were accepted, and in a cycle before the last, some were rejected."""
    if counted.cycles >= 4:
        assert max(counted.committed) > 1
        assert min(counted.committed[: -len(BATCH["input_ids"])]) < 5


def assert_as_without_a_draft(target, draft, case):
    """Run a case without and with the draft, whose proposals are partly right, and compare everything."""
    asked, counted = fresh(case, target), DecodeStatistics()
    plain = target.generate(**asked)
    expected, again = text_of(plain), fresh(case, target)
    expected = pad(expected, (slots_not_returned(again), 40))
    before = hooks(target)
    more = {"custom_generate": draft.speculate, "statistics": counted}
    ours = target.generate(**again, **more, proposer=tiny.partly_right(expected))
    assert hooks(target) == before
    assert type(plain) is type(ours)
    assert text_of(plain).dtype == text_of(ours).dtype
    assert text_of(plain).tolist() == text_of(ours).tolist()
    if not isinstance(plain, torch.Tensor):
        assert_same_outputs(plain, ours, asked)
        assert_same_returned_caches(cache_in(plain), cache_in(ours), asked)
    assert_same_returned_caches(asked.get(tiny.CACHE), again.get(tiny.CACHE), asked)
    if "streamer" in asked:
        assert vars(asked["streamer"]) == vars(again["streamer"])
    assert_accepted_and_rejected(counted)


@pytest.mark.parametrize(("family", "name"), cases(CASES, "qwen3"))
def test_a_case_gives_what_it_gives_without_a_draft(family, name):
    assert_as_without_a_draft(*pair(family), CASES[name])


@pytest.mark.parametrize(
    ("family", "name"),
    [one for family in FAMILIES for one in cases(COMMON, family)]
    + [one for number, family in enumerate(TWINS) for one in cases(COMMON[number % 2 :: 2], family)],
)
def test_every_family_gives_what_it_gives_without_a_draft(family, name):
    assert_as_without_a_draft(*pair(family), CASES[name])


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in OF_ONE_FAMILY for name in OF_ONE_FAMILY[family]]
)
def test_an_input_of_few_families_is_given_to_every_token(family, name):
    assert_as_without_a_draft(*pair(family), OF_ONE_FAMILY[family][name])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.float16), ("gemma3_text", torch.bfloat16), ("lfm2", torch.float16), ("lfm2", torch.bfloat16)],
)
def test_half_precision_gives_the_same_text_and_scores_of_the_same_kind(family, dtype):
    target = tiny.target(family).to(dtype)
    plain = target.generate(**BATCH, **DEFAULTS, **WHOLE)
    draft = tiny.draft(target).to(dtype)
    proposer = tiny.partly_right(pad(plain.sequences, (0, 40)))
    ours = target.generate(**BATCH, **DEFAULTS, **WHOLE, custom_generate=draft.speculate, proposer=proposer)
    assert torch.equal(plain.sequences, ours.sequences)
    for name in ("scores", "logits"):
        assert [one.dtype for one in plain[name]] == [one.dtype for one in ours[name]]


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_is_governed_by_the_seed_and_returns_what_it_returns_without_a_draft(name):
    target, draft = pair("qwen3")
    outputs = []
    for seed in (0, 0, 1, None):
        torch.manual_seed(seed or 0)
        more = {} if seed is None else {"custom_generate": draft.speculate}
        asked = fresh(SAMPLED[name], target) | {"do_sample": True, "max_new_tokens": 6}
        outputs.append(target.generate(**asked, **WHOLE, **more))
    first, again, other, plain = outputs
    assert torch.equal(first.sequences, again.sequences)
    assert other.sequences.tolist() != first.sequences.tolist()
    assert list(first.keys()) == list(plain.keys())
    assert len(first.sequences) == len(plain.sequences)
    steps = lengths(first.sequences, len(first.scores), asked)
    for step, scores in enumerate(first.scores):
        assert scores.shape == plain.scores[0].shape
        alive = [step < count for count in steps]
        chosen = scores.gather(1, first.sequences[:, 9 + step, None])
        assert chosen[alive].isfinite().all()  # what the options forbid is not drawn


def error_of(target, case, **more) -> BaseException:
    """What a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        target.generate(**fresh(case, target), **more)
    return caught.value


@pytest.mark.parametrize("name", ERRORS)
def test_a_call_that_fails_fails_with_the_same_error(name):
    target, draft = pair("qwen3")
    plain = error_of(target, ERRORS[name])
    ours = error_of(target, ERRORS[name], custom_generate=draft.speculate)
    assert (type(ours), str(ours)) == (type(plain), str(plain))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_with_a_draft_is_refused(name):
    if name == "an offloaded static cache" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("transformers makes this cache before we are asked; a CUDA build of torch needs a GPU for it")
    target, draft = pair("qwen3")
    case, words = REFUSED[name]
    error = error_of(target, case, custom_generate=draft.speculate)
    assert isinstance(error, ValueError)
    assert words in str(error)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_attention_mask", "task_type_ids"])
def test_an_input_of_every_token_that_a_block_is_not_given_is_refused(name):
    target, draft = pair("gpt2" if "encoder" in name else "ernie")
    with pytest.raises(ValueError, match=f"{name}: plain decoding gives it to the forward of every token"):
        target.generate(**ROW, **DEFAULTS, custom_generate=draft.speculate, **{name: torch.ones(1, 9)})


# Cases of text, on the built-in pair ---------------------------------------------------------------------------------


class Printed(TextStreamer):
    """A streamer that stores what it would print."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.printed = []

    def on_finalized_text(self, text, stream_end=False):
        self.printed.append((text, stream_end))


async def collected(streamer: AsyncTextIteratorStreamer) -> list[str]:
    """What an asynchronous streamer gives."""
    return [text async for text in streamer]


TEXTS = {
    "a stop string": lambda tokenizer: {"stop_strings": "get_f", "tokenizer": tokenizer},
    "stop strings": lambda tokenizer: {"stop_strings": ["get_f", "from"], "tokenizer": tokenizer},
    "stop strings and an end token": lambda tokenizer: {
        "stop_strings": ["get_f", "never"],
        "tokenizer": tokenizer,
        "eos_token_id": [0, 299],
    },
    "a stop string by a criterion": lambda tokenizer: criteria(
        stopping_criteria.StopStringCriteria(tokenizer=tokenizer, stop_strings=["get_f"])
    ),
    "a watermark by its context": lambda tokenizer: {
        "watermarking_config": WatermarkingConfig(bias=5.0, seeding_scheme="selfhash", context_width=3),
        "max_new_tokens": 5,
    },
}
"""Cases that need a tokenizer or its vocabulary."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target", padding_side="left")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", TEXTS)
def test_a_case_of_text_gives_what_it_gives_without_a_draft(name, rows, tokenizer, tiny_target, tiny_draft):
    prompts = ["def main():\n    return", "import os\nfor one in"][:rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    asked = {**inputs, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    texts = []
    for more in ({}, {"custom_generate": tiny_draft.speculate}):
        texts.append(tiny_target.generate(**asked | TEXTS[name](tokenizer), **more))
    assert texts[0].tolist() == texts[1].tolist()
    if rows == 1:
        assert texts[0].shape[1] < inputs["input_ids"].shape[1] + 20  # a stop string ended it


NEW_TEXT = {"skip_prompt": True, "skip_special_tokens": True}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Printed, {}), (Printed, NEW_TEXT), (TextIteratorStreamer, NEW_TEXT), (AsyncTextIteratorStreamer, {})],
)
def test_a_streamer_of_text_gives_the_same_pieces(kind, options, tokenizer, tiny_target, tiny_draft):
    inputs = tokenizer("def main():\n    return", return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}

    async def pieces(**more):
        streamer = kind(tokenizer, **options)
        tiny_target.generate(**asked, streamer=streamer, **more)
        if kind is Printed:
            return streamer.printed
        return list(streamer) if kind is TextIteratorStreamer else await collected(streamer)

    plain = asyncio.run(pieces())
    assert asyncio.run(pieces(custom_generate=tiny_draft.speculate)) == plain
    assert len(plain) > 5


def test_a_streamer_of_text_takes_one_row_with_a_draft_too(tokenizer):
    target, draft = pair("qwen3")
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        target.generate(**BATCH, **DEFAULTS, streamer=Printed(tokenizer), custom_generate=draft.speculate)


def test_transition_scores_are_those_of_the_text():
    target, draft = pair("qwen3")
    found = []
    for more in ({}, {"custom_generate": draft.speculate}):
        out = target.generate(**BATCH, **DEFAULTS, **WHOLE, **more)
        found.append(target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True))
    close(*found)
