# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What is wrong with options, all of it at once; and options of Trainer that would do nothing for a draft."""

from collections.abc import Iterable, Iterator
from typing import Any

WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the loss is the draft's own"),
    "neftune_noise_alpha": (None, "the embedding is the target's, which is frozen"),
    "use_liger_kernel": (False, "its kernels know no draft"),
    "liger_kernel_config": (None, "its kernels know no draft"),
    "use_cache": (False, "a forward of training has no cache"),
    "label_names": (None, "the labels are the tokens of the text"),
    "prediction_loss_only": (False, "the metrics are what an evaluation is for"),
    "batch_eval_metrics": (False, "metrics are sums over all rows"),
    "eval_do_concat_batches": (True, "metrics are sums over all rows"),
    "include_for_metrics": ([], "metrics are counts of tokens"),
    "include_num_input_tokens_seen": ("no", "the tokens of a step are the target's input"),
    "average_tokens_across_devices": (True, "the loss is a mean over all processes"),
    "parallelism_config": (
        None,
        "a block needs the whole of its text on one device; fsdp shards the draft",
    ),
}
"""For each option its only value, and why it cannot have another."""


class Mistakes(ValueError):
    """Hold what is wrong with options; as a string, list all of it."""

    def __init__(self, found: list[str]):
        self.found = found
        listed = "\n".join(f"- {one}" for one in found)
        super().__init__(
            found[0] if len(found) == 1 else f"{len(found)} things are wrong:\n{listed}"
        )


def refuse(found: Iterable[str]) -> None:
    """Raise an error that lists these mistakes.

    Raises:
        Mistakes: there is one.
    """
    listed = list(found)
    if listed:
        raise Mistakes(listed)


def wrong_values(options: Any, checks: dict[str, tuple[bool, str]]) -> Iterator[str]:
    """Yield a message for each option that has a wrong value.

    Args:
        checks: by name, whether the value is right, and what it must be.
    """
    for name, (valid, wanted) in checks.items():
        if not valid:
            yield f"{name} is {getattr(options, name)!r}; it must be {wanted}."


def without_effect(args: Any) -> Iterator[str]:
    """Yield a message for each option of Trainer that is set and would do nothing."""
    for name, (value, reason) in WITHOUT_EFFECT.items():
        found = getattr(args, name, value)
        if found != value:
            yield f"{name} is {found!r}, which does nothing for a draft: {reason}. Leave it at {value!r}."
