# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Set up the writing of features, and runs that are trained from them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from ..findings_dflash import LOADING, explained
from ..generate_dflash import check_compatible
from .arguments import DFlashTrainingArguments
from .data import DropReport, prepare
from .digests import config_digest, tokenizer_digest, weights_digest
from .feature_data import Features, open_features
from .feature_writer import Plan, plan, tensors_of_row
from .features import DTYPES, FEATURES, LACKS_STATES, STATES, Origin
from .objective import FrozenTarget, check_trainable, needs_target
from .options import Mistakes, refuse, wrong_values
from .reading import BadRow, with_file
from .setup import TrainOptions, known, load_target, make_draft, split_rows
from .trainer import DFlashTrainer, placed, preprocess_config

FROM_FEATURES = (
    "max_length",
    "packing",
    "last_answer_only",
    "eval_rows",
    "block_size",
    "mask_token_id",
    "target_layer_ids",
)
"""Options of a run that say which rows and features there are; left out, they are those of the features."""
_OF_DATA = {
    "data": "",
    "data_name": None,
    "data_split": "train",
    "streaming": False,
    "inspect": None,
}
"""Options that features take the place of, and their values where they are left out."""
_TIMED = 4
"""Rows by which the time of all is estimated; the first is warm-up."""


@dataclass
class FeatureArguments:
    """Hold the options of writing features, beside those of the target, the draft and the data."""

    output_dir: str = field(
        default="dflash-features", metadata={"help": "Folder to write; resumes if it exists."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "What features are stored in: auto (the target's own dtype, exact), bfloat16 or fp8.",
            "choices": list(DTYPES),
        },
    )
    shard_size: float = field(
        default=1.0,
        metadata={
            "help": "Size of a file in GB (1e9 bytes), about: 0.5 for many small ones, 5 for few large ones."
        },
    )
    loss: str | None = field(
        default=None,
        metadata={"help": "As of train: kl and tv need the target's last hidden states too."},
    )
    max_length: int = field(
        default=3072, metadata={"help": "Maximum number of tokens of a packed row."}
    )
    packing: bool = field(default=True, metadata={"help": "Pack several documents into a row."})
    last_answer_only: bool = field(
        default=False, metadata={"help": "Learn from the last answer of each conversation alone."}
    )
    seed: int = field(
        default=42,
        metadata={"help": "Seed of the runs: rows are written in the order of their first epoch."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run the target on the CPU."})

    def __post_init__(self) -> None:
        checks = {
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "shard_size": (self.shard_size > 0, "above 0"),
        }
        found = list(wrong_values(self, checks))
        try:
            _ = self.for_training
        except Mistakes as error:
            found += error.found
        refuse(found)

    @cached_property
    def for_training(self) -> DFlashTrainingArguments:
        """The options of a run, which prepares rows alike."""
        return DFlashTrainingArguments(
            self.output_dir,
            loss=self.loss,
            max_length=self.max_length,
            packing=self.packing,
            last_answer_only=self.last_answer_only,
            seed=self.seed,
            use_cpu=self.use_cpu,
            report_to="none",
        )


_OF_KNOWN_ROWS = ("streaming", "features", "inspect")
NOT_WRITTEN_WITH = (*_OF_KNOWN_ROWS, "tune", "tune_steps")
"""Options of train that features are not written with."""


def check_writing(options: TrainOptions) -> None:
    """Refuse options that features are not written with.

    Raises:
        ValueError: names them.
    """
    found = []
    for name in _OF_KNOWN_ROWS:
        if getattr(options, name) not in (None, False):
            found.append(
                f"{name} is {getattr(options, name)!r}, but features are written of rows whose number is known. Leave "
                "it out."
            )
    if options.tune is not None:
        found.append("tune compares runs of train, and features are of all of them. Leave it out.")
    refuse(found)


# Writing ----------------------------------------------------------------------------------------------------------


class FeatureJob:
    """Prepare rows and plan their features; the target's weights are loaded when they are needed.

    Raises:
        ValueError, OSError: the options, the target or the data are invalid.
    """

    def __init__(self, options: TrainOptions, given: FeatureArguments):
        check_writing(options)
        self.options, self.args = options, given.for_training
        self.tokenizer, shape = load_target(options, with_weights=False)
        self.config = _draft_config(options, shape, self.tokenizer)
        check_trainable(self.config)
        self.reports: dict[str, DropReport] = {}
        rows = self._rows(preprocess_config(self.tokenizer, shape, self.config, self.args))
        dtype = self._target_dtype(shape)
        self.plan: Plan = plan(self._origin(given, dtype), rows, int(given.shard_size * 1e9))

    def _rows(self, config: Any) -> dict[str, Any]:
        """Return the prepared rows of each part."""
        found = {}
        parts = zip(("train", "eval"), split_rows(self.options, self.args), strict=True)
        for name, rows in parts:
            if rows is None:
                continue
            try:
                found[name], self.reports[name] = prepare(rows, config)
            except BadRow as error:
                raise with_file(error, self.options.data) from error
        return found

    def _target_dtype(self, shape: Any) -> str:
        """Return the dtype that the target will have; where its config does not say, it is loaded."""
        if self.options.target_dtype != "auto":
            return self.options.target_dtype
        dtype = shape.config.dtype or self.target.model.dtype
        return str(dtype).removeprefix("torch.")

    def _origin(self, given: FeatureArguments, target_dtype: str) -> Origin:
        """Return what the features are of, all but the digest of the rows."""
        name = self.options.target
        config, commit = config_digest(name)
        with explained(f"The weights of {name} could not be read", LOADING):
            weights = weights_digest(name, download=True)
        if weights is None:
            raise ValueError(
                f"{name} has no weights in safetensors or pytorch_model.bin, so its features could not "
                "be distinguished from those of another target. Save it with save_pretrained, and pass that folder."
            )
        holds = [FEATURES, STATES] if needs_target(self.config, self.args.recipe) else [FEATURES]
        return Origin(
            target=name,
            commit=commit,
            config=config,
            weights=weights,
            tokenizer=tokenizer_digest(self.tokenizer),
            target_dtype=target_dtype,
            dtype=target_dtype if given.dtype == "auto" else given.dtype,
            hidden_size=self.config.hidden_size,
            target_layer_ids=list(self.config.target_layer_ids),
            holds=holds,
            block_size=self.config.block_size,
            mask_token_id=self.config.mask_token_id,
            max_length=given.max_length,
            packing=given.packing,
            last_answer_only=given.last_answer_only,
            data=self.options.data,
            rows="",
            eval_rows=self.options.eval_rows,
            seed=given.seed,
        )

    @cached_property
    def target(self) -> FrozenTarget:
        """The target with its weights, on the device of the run."""
        model = placed(load_target(self.options)[1], self.args.device)
        check_compatible(self.config, model)
        return FrozenTarget(model, self.config.target_layer_ids)

    def load(self) -> FrozenTarget:
        """Return the target.

        Raises:
            ValueError: it has another dtype than its config says.
        """
        found = str(self.target.model.dtype).removeprefix("torch.")
        planned = self.plan.origin.target_dtype
        if found != planned:
            raise ValueError(
                f"The target is in {found}, but its config.json says {planned}. Pass --target-dtype {found}."
            )
        return self.target

    def tokens_per_second(self) -> float:
        """Measure how fast features are computed, by the first rows."""
        target, origin = self.load(), self.plan.origin
        rows = self.plan.rows["train"]
        order = self.plan.parts["train"].order[:_TIMED].tolist()
        tokens, started = 0, 0.0
        for place, number in enumerate(order):
            if place == 1:
                started = time.perf_counter()
            row = rows[number]
            tensors_of_row(row, target, origin)
            tokens += len(row["input_ids"]) if place else 0
        if not tokens:  # a single row
            started = time.perf_counter()
            tensors_of_row(rows[order[0]], target, origin)
            tokens = len(rows[order[0]]["input_ids"])
        return tokens / (time.perf_counter() - started)


def _draft_config(options: TrainOptions, shape: Any, tokenizer: Any) -> Any:
    """Return the config of the draft that will be trained; a fresh one takes no memory."""
    if options.draft is not None:
        return make_draft(options, shape, tokenizer).config
    with torch.device("meta"):
        return make_draft(options, shape, tokenizer).config


# Training ---------------------------------------------------------------------------------------------------------


def build_from_features(options: TrainOptions, args: DFlashTrainingArguments) -> DFlashTrainer:
    """Open the features, check the options against them, and return the trainer.

    The whole target is loaded only if held-out prompts are decoded.

    Raises:
        ValueError, OSError: the features are incomplete, or of another target, draft or data; names what differs.
    """
    features = open_features(str(options.features))
    check_options(options, args, features)
    options.target = options.target or features.origin.target
    target = features.target()
    if args.eval_acceptance_prompts:
        target = _whole_target(options, features)
    set_seed(args.seed)  # before the draft, whose fresh weights are random
    draft = make_draft(options, target, None)
    draft.card_metadata = draft.card_metadata | known(options)
    states = needs_target(draft.config, args.recipe)
    if states and STATES not in features.origin.holds:
        raise ValueError(LACKS_STATES)
    train, held_out = (features.rows(part, draft.config, states) for part in ("train", "eval"))
    return DFlashTrainer(draft, target, args, train, held_out)


def check_options(options: TrainOptions, args: DFlashTrainingArguments, features: Features) -> None:
    """Refuse options that are not those of the features, and features of another target.

    Raises:
        ValueError: naming what differs.
    """
    refuse(with_features(options, args))
    given: dict[str, Any] = {}
    for name in FROM_FEATURES:
        given[name] = getattr(options if hasattr(options, name) else args, name)
    if options.draft is not None:  # has its own shape, which is checked with its config
        given = {key: given[key] for key in FROM_FEATURES[:4]}
    if options.target_dtype != "auto":
        given["target_dtype"] = options.target_dtype
    advice = (
        f"Leave these options out, or write features with them; these are {features.shards.name}."
    )
    features.origin.check(given, advice)
    if options.target:
        _check_target(options, features)


def with_features(options: TrainOptions, args: DFlashTrainingArguments) -> Iterator[str]:
    """Yield what cannot be given beside features."""
    for name, default in _OF_DATA.items():
        value = getattr(options, name)
        if value != default:
            yield f"{name} is {value!r}, but features hold prepared rows. Leave it out, or leave features out."
    if args.regenerate_every is not None or options.tune is not None:
        yield (
            "regenerate_every and tune need the whole target, and features hold its states for one text. Leave them "
            "out, or leave features out."
        )


def _check_target(options: TrainOptions, features: Features) -> None:
    """Refuse features of another target than that of the options.

    Raises:
        ValueError: naming what differs, or the weights are not here to be compared.
    """
    origin, trust = features.origin, {"trust_remote_code": options.trust_remote_code}
    with explained(f"The target {options.target} could not be read", LOADING):
        tokenizer = AutoTokenizer.from_pretrained(options.target, **trust)
        config, commit = config_digest(options.target)
    given = {"config": config, "tokenizer": tokenizer_digest(tokenizer)}
    if commit is None or commit != origin.commit:
        weights = weights_digest(options.target, download=False)
        if weights is None:
            raise ValueError(
                f"{options.target} is at commit {commit}, and the features are of {origin.target} at {origin.commit}. "
                f"Its weights are not here to be compared: `hf download {options.target}`, or leave --target out."
            )
        given["weights"] = weights
    advice = (
        f"{features.shards.name} is of the target {origin.target}. Pass that one or leave --target out, or write "
        f"features of {options.target}."
    )
    origin.check(given, advice)


def _whole_target(options: TrainOptions, features: Features) -> Any:
    """Load the target that the features are of, to decode with it.

    Raises:
        ValueError: it is another one now.
    """
    if options.target_dtype == "auto":
        options.target_dtype = features.origin.target_dtype
    target = load_target(options)[1]
    _check_target(options, features)
    return target
