# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Tell rounding from bugs where two greedy texts differ."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .decoding import Job, Models, decode, generate, padded
from .ways import Drafting, Way

CLOSE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Two logits that are closer than this may change places by rounding alone, by the dtype of the target."""
ROUNDING = "rounding"
BUG = "bug"
UNKNOWN = "unknown"
"""What a difference is from."""
SAME = "same"
DIFFERS = "differs"
NOT_CHECKED = "not checked"
"""What the two texts are in float32."""
Divergence = dict[str, Any]


class _LogitsAt(LogitsProcessor):
    """Note the logits `[B, V]` of one step of plain decoding, and change nothing."""

    def __init__(self, length: int):
        self.length = length
        self.found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            self.found = scores.clone()
        return scores


def first_difference(plain: list[int], other: list[int]) -> int | None:
    """Return the position of the first token that differs, or at which one text ends; None if the texts are equal."""
    for position, (one, two) in enumerate(zip(plain, other, strict=False)):
        if one != two:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))


def divergence(
    models: Models, job: Job, row: int, plain: list[int], other: list[int]
) -> Divergence | None:
    """Return where two texts of a row part, and how far apart the two tokens were for plain decoding.

    Args:
        job: with which both texts were decoded.
    """
    position, margin = first_difference(plain, other), None
    if position is not None and position < min(len(plain), len(other)):
        logits = _plain_logits(models.target, job, row, position)
        margin = float(logits[plain[position]] - logits[other[position]])
    return parting(models.target.dtype, margin, plain, other)


def parting(
    dtype: torch.dtype, margin: float | None, plain: list[int], other: list[int]
) -> Divergence | None:
    """Return the entry of a record for two texts, with what is known before any check; None if they are equal.

    In float32 no check is needed: rounding explains nothing but a near-tie.
    """
    position = first_difference(plain, other)
    if position is None:
        return None
    found: Divergence = {"position": position, "plain_token": None, "other_token": None}
    for name, text in (("plain_token", plain), ("other_token", other)):
        if position < len(text):
            found[name] = text[position]
    found |= {"margin": margin, "float32": NOT_CHECKED, "verdict": UNKNOWN}
    if dtype == torch.float32:
        found["float32"] = DIFFERS
        found["verdict"] = ROUNDING if is_close(margin, torch.float32) else BUG
    return found


def check_in_float32(
    models: Models, way: Way, job: Job, row: int, found: Divergence, dtype: torch.dtype
) -> None:
    """Decode a batch in float32, plainly and in this way, and set the verdict of a divergence by it.

    Args:
        models: in float32.
        found: the divergence; `float32` and `verdict` are set.
        dtype: of the target in the run in which the texts differed.
    """
    plain = decode(models, Way(Drafting(), way.condition), job)[row]["token_ids"]
    other = decode(models, way, job)[row]["token_ids"]
    again = divergence(models, job, row, plain, other)
    if again is None:
        found["float32"] = SAME
        found["verdict"] = ROUNDING if is_close(found["margin"], dtype) else UNKNOWN
    else:
        found["float32"] = DIFFERS
        found["verdict"] = again["verdict"]


def is_close(margin: float | None, dtype: torch.dtype) -> bool:
    """Return whether rounding may swap two tokens whose logits are this far apart."""
    return margin is not None and abs(margin) <= CLOSE.get(dtype, 0.0)


def _plain_logits(target: Any, job: Job, row: int, position: int) -> torch.Tensor:
    """Return the logits `[V]` from which plain decoding took the token at `position` of a row."""
    inputs = padded(job.rows, target)
    at = _LogitsAt(inputs["input_ids"].shape[1] + position)
    shorter = Job(job.rows, position + 1, job.seed)
    processors = {"logits_processor": LogitsProcessorList([at]), "do_sample": False}
    generate(target, inputs, shorter, processors)
    if at.found is None:
        raise RuntimeError(
            f"Plain decoding ended before token {position}, though it did not end there the first time."
        )
    return at.found[row].float()
