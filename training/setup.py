# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Set up a run: load the target, the draft and the data, and build the trainer."""

import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from ..catalogue import out_of_cache
from ..findings_dflash import LOADING, check_path, explained
from ..kinds import KINDS, kind_named
from ..registry import DFlashDraftSpec, check_folder, load_draft, read_config
from .arguments import DFlashTrainingArguments
from .contradictions import HEAD_OPTIONS, cut_mistakes, parallel_mistakes
from .data import documents_of_rows
from .loading import (
    QUANTIZATIONS,
    add_absent_layers,
    cut_config,
    is_parallel,
    parallel_options,
    quantization_config,
)
from .options import refuse, wrong_values
from .reading import BadRow, load_rows, with_file
from .trainer import DFlashTrainer, preprocess_config

_ENOUGH = 8
"""Layers of a target from which five taps can be spread evenly, see `build_target_layer_ids`."""


@dataclass
class TrainOptions:
    """Hold the options of the target, the draft and the data."""

    target: str = field(
        metadata={
            "help": "Hub id or folder of the target; for the commands, demo is the built-in one."
        }
    )
    data: str = field(
        metadata={
            "help": "A file (JSONL, JSON, Parquet, CSV, text), a folder or a Hub dataset (formats: docs/training.md)."
        }
    )
    data_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset; needs --max-steps."}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "In place of --data: a folder that `dflash-hub features` wrote or writes, or a dataset repository "
            "with one."
        },
    )
    eval_rows: int = field(
        default=0, metadata={"help": "Number of rows to hold out for evaluation."}
    )
    draft: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a draft to start from; for the commands, demo is a built-in one."
        },
    )
    draft_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of that draft."}
    )
    mask_token_id: int | None = field(
        default=None,
        metadata={
            "help": "Mask token: one that never occurs in text. Default: the first unused row of the embedding."
        },
    )
    variant: str = field(
        default="dflash", metadata={"help": "Kind of a fresh draft.", "choices": list(KINDS)}
    )
    selector_rank: int | None = field(
        default=None,
        metadata={"help": "Selector rank of a fresh draft with a selector. Default: 256."},
    )
    selector_top_k: int | None = field(
        default=None, metadata={"help": "Candidates of a fresh draft with a selector. Default: 16."}
    )
    markov_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of a fresh draft's bias by the token before; 0 for none. Default: 256."
        },
    )
    markov_head_type: str | None = field(
        default=None,
        metadata={
            "help": "What that bias reads beside the token before: vanilla (nothing), gated (the state), rnn (the "
            "state and all tokens of the block). Default: vanilla."
        },
    )
    enable_confidence_head: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a fresh draft with that bias estimates the chance of acceptance. Default: yes."
        },
    )
    emb_dim: int | None = field(
        default=None,
        metadata={
            "help": "Width of a fresh draft's correction by all tokens before. Default: 256."
        },
    )
    gru_hidden_dim: int | None = field(
        default=None,
        metadata={"help": "Width of the recurrent state that it reads. Default: 1024."},
    )
    block_size: int = field(
        default=16, metadata={"help": "Number of positions of a block, including the anchor."}
    )
    num_layers: int = field(default=5, metadata={"help": "Number of layers of a fresh draft."})
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "Target layers whose states the draft reads, counted from 0. Default: five, spread evenly."
        },
    )
    sliding_window: int | None = field(
        default=None, metadata={"help": "Sliding window for all draft layers except the last."}
    )
    causal: bool = field(
        default=False, metadata={"help": "Causal attention inside a fresh draft's blocks."}
    )
    target_dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16 ..., or auto: the dtype of the checkpoint."},
    )
    target_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Hold the target's linear layers in fewer bits: 8bit or 4bit (bitsandbytes), int8 (torchao).",
            "choices": list(QUANTIZATIONS),
        },
    )
    tensor_parallel: bool = field(
        default=False,
        metadata={"help": "Spread the target over all processes (torchrun), by its plan."},
    )
    cut_target: bool = field(
        default=False,
        metadata={
            "help": "Do not load the target's layers above the last tapped one; not for losses that need its "
            "distribution, nor for decoding in evaluations."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow remote code for the target and its tokenizer."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Tell the memory of a step, run a few, save, reload and check; estimate the time of the whole run."
        },
    )
    tune: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options to compare, such as learning_rate=3e-4,1e-3 block_size=8,16. Each combination is trained "
            "for --tune-steps, held-out prompts are decoded, and a table says which accepts most."
        },
    )
    tune_steps: int = field(
        default=200, metadata={"help": "Number of steps of each of these short runs."}
    )
    inspect: int | None = field(
        default=None,
        metadata={
            "help": "Print what is trained on of this many rows (default: 3), and end.",
            "nargs": "?",
            "const": 3,
        },
    )

    def __post_init__(self) -> None:
        checks = {
            "eval_rows": (self.eval_rows >= 0, "at least 0"),
            "tune_steps": (self.tune_steps >= 1, "at least 1"),
            "inspect": (self.inspect is None or self.inspect >= 1, "at least 1"),
        }
        refuse(wrong_values(self, checks))


def build(
    options: TrainOptions, args: DFlashTrainingArguments, loaded: tuple[Any, Any] | None = None
) -> DFlashTrainer:
    """Load everything, check the options, the pair and the data, and return the trainer.

    Args:
        loaded: tokenizer and target, if they are loaded already.
    """
    if options.cut_target:
        check_cut(options, args)
    if options.tensor_parallel:
        refuse(parallel_mistakes(options, args))
    rows, held_out = split_rows(options, args)
    tokenizer, target = loaded or load_target(options)
    set_seed(args.seed)  # before the draft, whose fresh weights are random
    draft = make_draft(options, target, tokenizer)
    draft.card_metadata = draft.card_metadata | known(options)
    try:
        return DFlashTrainer(draft, target, args, rows, held_out, tokenizer)
    except BadRow as error:
        raise with_file(error, options.data) from error


def known(options: TrainOptions) -> dict[str, Any]:
    """Return what the names of target and data tell the card, where they are names of the Hub."""
    found: dict[str, Any] = {}
    target = out_of_cache(options.target)
    if not Path(target).exists():
        found["base_model"] = target
    if not Path(options.data).exists() and options.data.count("/") <= 1:
        found["datasets"] = [options.data]
    return found


def shape_of(options: TrainOptions) -> tuple[Any, Any]:
    """Return the draft's config, checked for the target's, and the target's generation config. No weights are loaded.

    Raises:
        ValueError: there can be no such draft.
    """
    tokenizer, target = _without_weights(options)
    if options.draft is not None:
        config = read_config(options.draft, revision=options.draft_revision)
    else:
        with torch.device("meta"):
            config = make_draft(options, target, tokenizer).config
    return config, getattr(target, "generation_config", None)


def inspect(
    options: TrainOptions, args: DFlashTrainingArguments
) -> tuple[Any, Iterator[tuple[str, list[tuple[list[int], list[int], str]]]]]:
    """Return the tokenizer, and the place and the documents of each row, in their order. No target is loaded."""
    tokenizer, target = _without_weights(options)
    draft = _draft_for(options, target, tokenizer)
    config = preprocess_config(tokenizer, target, draft.config, args)
    rows = load_rows(options.data, options.data_name, options.data_split, options.streaming)
    return tokenizer, (
        documents_of_rows([row], [number], config)[0] for number, row in enumerate(rows)
    )


def _draft_for(options: TrainOptions, target: Any, tokenizer: Any) -> Any:
    """Return the draft for a target on the meta device; only a draft that is loaded has weights."""
    with torch.device("meta") if options.draft is None else nullcontext():
        return make_draft(options, target, tokenizer)


def models_without_weights(options: TrainOptions) -> tuple[Any, Any]:
    """Return the draft and the target of a run on the meta device, the target in the dtype that it is loaded in."""
    tokenizer, target = _without_weights(options)
    draft = _draft_for(options, target, tokenizer)
    if options.cut_target:
        target = _without_weights(options, 1 + max(draft.config.target_layer_ids))[1]
    return draft, target


def check_cut(options: TrainOptions, args: DFlashTrainingArguments) -> None:
    """Refuse to cut a target of which more is needed.

    Raises:
        ValueError: says for what.
    """
    refuse(cut_mistakes(args, shape_of(options)[0]))


def load_target(options: TrainOptions, with_weights: bool = True) -> tuple[Any, Any]:
    """Load tokenizer and target, or a target on the meta device."""
    if not with_weights:
        return _without_weights(options)
    trust = {"trust_remote_code": options.trust_remote_code}
    layers = None
    if options.cut_target:
        draft, _ = models_without_weights(replace(options, cut_target=False))
        layers = 1 + max(draft.config.target_layer_ids)
    tokenizer, config = _tokenizer_and_config(options)
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    quantized = quantization_config(options.target_quantization, _dtype(options, config))
    spread = _spread(options)
    with (
        explained(f"The target {options.target} could not be loaded", LOADING),
        nullcontext() if layers is None else cut_config(config, layers),
    ):
        target = AutoModelForCausalLM.from_pretrained(
            options.target,
            config=config,
            dtype=options.target_dtype,
            quantization_config=quantized,
            **spread,
            **trust,
        )
    if options.tensor_parallel and not is_parallel(target):
        raise ValueError(
            f"tensor_parallel is True, but {type(target).__name__} has no plan to be spread by; leave it out."
        )
    if layers is not None:
        own = target.config.get_text_config(decoder=True)
        for name, value in vars(text).items():
            if name == "num_hidden_layers" or isinstance(value, list):
                setattr(own, name, value)
        add_absent_layers(target, layers, whole)
    return tokenizer, target


def _spread(options: TrainOptions) -> dict[str, Any]:
    """Return what `from_pretrained` needs to spread the target over processes, if the options say so.

    Raises:
        ValueError: there is one process.
    """
    if not options.tensor_parallel:
        return {}
    return parallel_options()


def _tokenizer_and_config(options: TrainOptions) -> tuple[Any, Any]:
    trust = {"trust_remote_code": options.trust_remote_code}
    check_path("target", options.target)
    check_folder(options.target)
    with explained(f"The target {options.target} could not be loaded", LOADING):
        tokenizer = AutoTokenizer.from_pretrained(options.target, **trust)
        return tokenizer, AutoConfig.from_pretrained(options.target, **trust)


def _without_weights(options: TrainOptions, layers: int | None = None) -> tuple[Any, Any]:
    """Load the tokenizer, and make the target on the meta device, with its first `layers` or all of them."""
    tokenizer, config = _tokenizer_and_config(options)
    with (
        torch.device("meta"),
        nullcontext() if layers is None else cut_config(config, layers),
    ):
        target = AutoModelForCausalLM.from_config(
            config, dtype=_dtype(options, config), trust_remote_code=options.trust_remote_code
        )
    with suppress(OSError):  # a target need not have one
        target.generation_config = GenerationConfig.from_pretrained(options.target)
    return tokenizer, target


def _dtype(options: TrainOptions, config: Any) -> torch.dtype:
    """Return the dtype that the target's weights are loaded in."""
    if options.target_dtype != "auto":
        return getattr(torch, options.target_dtype)
    return config.get_text_config(decoder=True).dtype or config.dtype or torch.float32


def split_rows(options: TrainOptions, args: DFlashTrainingArguments) -> tuple[Any, Any]:
    """Return the rows to train on, and those held out or None."""
    rows = load_rows(options.data, options.data_name, options.data_split, options.streaming)
    if not options.eval_rows:
        return rows, None
    if options.streaming:
        return rows.skip(options.eval_rows), rows.take(options.eval_rows)
    if options.eval_rows >= len(rows):
        raise ValueError(
            f"eval_rows is {options.eval_rows}, but the data has only {len(rows)} rows. Hold out fewer."
        )
    parts = rows.train_test_split(test_size=options.eval_rows, seed=args.seed)
    return parts["train"], parts["test"]


def make_draft(options: TrainOptions, target: Any, tokenizer: Any) -> Any:
    """Return the draft to start from, in float32, which optimizers need."""
    if options.draft is not None:
        return load_draft(options.draft, revision=options.draft_revision, dtype=torch.float32)
    if options.mask_token_id is None:
        options.mask_token_id = unused_token(target, tokenizer)
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    spec = DFlashDraftSpec(options.target, targets=(options.target,))
    return spec.build(
        target.config,
        options.variant,
        mask_token_id=options.mask_token_id,
        dtype=torch.float32,
        **_fresh_fields(options, layers),
    )


def _fresh_fields(options: TrainOptions, layers: int) -> dict[str, Any]:
    """Return the config fields of a fresh draft that the options set, for a target of so many layers."""
    fields: dict[str, Any] = {
        "block_size": options.block_size,
        "num_hidden_layers": options.num_layers,
        "is_causal": options.causal,
    }
    fields.update(kind_named(options.variant).trained_with)
    for name in HEAD_OPTIONS:
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    taps = options.target_layer_ids or taps_of_few_layers(layers)
    if taps:
        fields["target_layer_ids"] = taps
    if options.sliding_window:
        sliding = ["sliding_attention"] * (options.num_layers - 1)
        fields["layer_types"] = [*sliding, "full_attention"]
        fields["sliding_window"] = options.sliding_window
    return fields


def unused_token(target: Any, tokenizer: Any) -> int:
    """Return the first unused row of the target's embedding, which published drafts use as the mask token.

    Where every row belongs to a token, return the first that its tokenizer reserves or names a mask. Failing that, a
    byte that no text has, or the padding if it ends no text.

    Raises:
        ValueError: there is none.
    """
    first = max(tokenizer.get_vocab().values()) + 1
    rows = target.get_input_embeddings().num_embeddings
    if first < rows:
        return first
    for find in (_spare_token, _impossible_byte, _padding):
        found = find(tokenizer)
        if found is not None:
            return found
    raise ValueError(
        f"Every one of the {rows} rows of the target's embedding belongs to a token. So --mask-token-id must be "
        "given: a token that does not occur in text. `tokenizer.convert_tokens_to_ids(TOKEN)` returns its number."
    )


def _spare_token(tokenizer: Any) -> int | None:
    """Return the first added token whose name says that it hardly occurs in text; None without one."""
    added = tokenizer.get_added_vocab()
    spare = [token for token in added if re.search("reserved|unused|mask", token, re.IGNORECASE)]
    return tokenizer.convert_tokens_to_ids(spare[0]) if spare else None


def _impossible_byte(tokenizer: Any) -> int | None:
    """Return the token of the byte FF, which no text in UTF-8 has; None without one."""
    vocabulary = tokenizer.get_vocab()
    for name in ("<0xFF>", "\u00ff"):  # in SentencePiece, and in byte-level BPE
        token = vocabulary.get(name)
        if token is not None and tokenizer.decode([token]) == "\ufffd":
            return token
    return None


def _padding(tokenizer: Any) -> int | None:
    """Return the padding token, if it neither begins nor ends texts; None without one."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return None if tokenizer.pad_token_id in others else tokenizer.pad_token_id


def taps_of_few_layers(layers: int) -> list[int] | None:
    """Return the layers to tap of a target that is too shallow to spread five; None where it is not.

    Neither the first layer nor the last is among them, unless there is no other.
    """
    if layers >= _ENOUGH:
        return None
    return list(range(1, layers - 1)) or [0]
