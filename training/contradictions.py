# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What the options of a run say against each other, by options and configs alone: nothing is loaded for it."""

from collections.abc import Iterator
from typing import Any

from ..findings_dflash import Finding
from ..kinds import KINDS, kind_of
from ..layouts_dflash import field_findings, shown
from .arguments import DFlashTrainingArguments
from .best import DECODED, no_metric
from .objective import mix_of, needs_target

_FRESH = {"block_size": "block_size", "num_layers": "num_hidden_layers"}
"""Options of a fresh draft that always have a value, and its config's fields."""
HEAD_OPTIONS = tuple(name for kind in KINDS.values() for name in kind.head_fields)
"""Options that set fields of a further head; None means the config's default."""
_FRESH_OR_NONE = (*HEAD_OPTIONS, "mask_token_id", "sliding_window")
"""Options that are fields of a fresh draft's config, where they are given."""
SHAPE_OPTIONS = (*_FRESH, *_FRESH_OR_NONE, "target_layer_ids", "causal")
"""Options that give the shape of a fresh draft; a draft to go on from has its own."""
NO_FSDP = "eval_acceptance_prompts needs a whole draft on each process; leave it out with FSDP."
DECODES_SPREAD = (
    "eval_acceptance_prompts and regenerate_every decode, which a target that is spread over processes does not; leave "
    "them out."
)
_DECODE = ("eval_acceptance_prompts", "regenerate_every")
"""Options that decode with the target."""


def fresh_mistakes(options: Any) -> Iterator[str]:
    """Yield what is wrong with single values that shape a fresh draft."""
    fields = dict(_FRESH)
    fields.update({name: name for name in _FRESH_OR_NONE if getattr(options, name) is not None})
    for name, field in fields.items():
        value = getattr(options, name)
        findings: Iterator[Finding] = field_findings(
            field, value, found=f"{name} is {shown(value)}"
        )
        yield from map(str, findings)


def contradictions(
    options: Any, args: DFlashTrainingArguments, config: Any = None
) -> Iterator[str]:
    """Yield what the options of a run say against each other.

    Args:
        options: `TrainOptions`.
        config: of the draft; None where it is not known, and what depends on it is left out.
    """
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if evaluates and not options.eval_rows:
        yield "--eval-strategy asks for evaluations, and no rows are held out for them; pass --eval-rows 100."
    if args.eval_acceptance_prompts and not options.eval_rows:
        yield "--eval-acceptance-prompts decodes held-out prompts, and none are held out; pass --eval-rows 100."
    if options.streaming and args.max_steps <= 0:
        yield "--streaming reads data of an unknown length, so --max-steps must be given."
    if options.draft_revision is not None and options.draft is None:
        yield "--draft-revision is given without --draft; pass both or none."
    if options.cut_target:
        yield from cut_mistakes(args, config)
    if options.tensor_parallel:
        yield from parallel_mistakes(options, args)
    if args.regenerate_every is not None:
        yield from round_mistakes(args, not options.streaming)
    if args.eval_acceptance_prompts and args.fsdp:
        yield NO_FSDP
    if config is not None and options.eval_rows:
        yield from metric_mistakes(args, config)


def cut_mistakes(args: DFlashTrainingArguments, config: Any) -> Iterator[str]:
    """Yield for what more of a target is needed than its layers up to the last tap.

    Args:
        config: of the draft; None where it is not known.
    """
    for name in _DECODE:
        if getattr(args, name):
            yield f"cut_target is True, but {name} decodes with the whole target; leave one of them out."
    if config is not None and needs_target(config, args.recipe):
        yield (
            f"cut_target is True, but the loss of this {config.model_type} draft, {mix_of(config, args.recipe)}, needs "
            "the target's own distribution; leave cut_target out."
        )


def parallel_mistakes(options: Any, args: DFlashTrainingArguments) -> Iterator[str]:
    """Yield what is not implemented for a target that is spread over processes."""
    for name in ("target_quantization", "dry_run"):
        if getattr(options, name):
            yield f"tensor_parallel is True, which {name} is not implemented with; leave one out."
    if any(getattr(args, name) for name in _DECODE):
        yield DECODES_SPREAD


def round_mistakes(args: DFlashTrainingArguments, has_length: bool) -> Iterator[str]:
    """Yield what rounds cannot work with.

    Args:
        has_length: whether the data can be gone through again.
    """
    if args.max_steps <= 0:
        yield "regenerate_every needs max_steps: rounds differ in length, so epochs say nothing."
    if not has_length:
        yield "regenerate_every needs data that can be gone through again; leave out streaming."
    if args.dataloader_num_workers:
        yield (
            f"dataloader_num_workers is {args.dataloader_num_workers}, but the target writes answers in the process "
            "that trains. Leave it at 0 with regenerate_every."
        )
    order = getattr(args, "train_sampling_strategy", "random")  # which former versions lack
    if order != "random":
        yield f"train_sampling_strategy is {order!r}; with regenerate_every it must be 'random'."


def greedy_mistakes(args: DFlashTrainingArguments, generation_config: Any) -> Iterator[str]:
    """Yield that all rounds would be alike, by the target's generation config."""
    own = args.regenerate_temperature is None and args.regenerate_server is None
    if (
        args.regenerate_every is not None
        and own
        and not getattr(generation_config, "do_sample", False)
    ):
        yield (
            "The target's own settings are greedy, so each round would have the same answers. Pass "
            "regenerate_temperature, such as 1.0."
        )


def metric_mistakes(args: DFlashTrainingArguments, config: Any) -> Iterator[str]:
    """Yield that no evaluation of a draft with this config gives the metric that chooses the best checkpoint."""
    metric, names = args.metric_for_best_model, metric_names(args, config)
    if metric is not None and metric.removeprefix("eval_") not in names:
        yield no_metric(metric, names)


def metric_names(args: DFlashTrainingArguments, config: Any) -> list[str]:
    """Return the names of what an evaluation of a draft with this config gives."""
    names = ["loss", *kind_of(config).metrics]
    names += [f"accuracy_{k}" for k in range(1, config.num_drafted + 1)]
    return [*names, DECODED] if args.eval_acceptance_prompts else names
