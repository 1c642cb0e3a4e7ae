# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say how long a step takes at least: the time to read all weights, keys and values from memory."""

from dataclasses import dataclass
from typing import Any

import torch

from ..generation_dflash import now

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of a config that name the number of experts, of which a step reads some only."""


@dataclass(frozen=True)
class BytesRead:
    """Count the bytes that a step reads at least.

    Args:
        fixed: weights.
        per_slot: keys and values of one slot of one row.
        per_drafted: weights of an assistant, which reads them for every token that it drafts.
    """

    fixed: float
    per_slot: float
    per_drafted: float = 0.0

    def of(self, slots: float, rows: int = 1) -> float:
        """Return the bytes of a step after `slots` slots in each row."""
        return self.fixed + self.per_slot * slots * rows

    def __add__(self, other: "BytesRead") -> "BytesRead":
        drafted = self.per_drafted + other.per_drafted
        return BytesRead(self.fixed + other.fixed, self.per_slot + other.per_slot, drafted)


def bytes_of_weights(model: Any) -> int:
    """Return the bytes of the weights that a step reads. Of an embedding of its own, it reads nearly nothing."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters())
    return weights if head is embedding else weights - embedding.nbytes


def bytes_of_plain_step(target: Any) -> BytesRead:
    """Return what plain decoding reads for a token."""
    weights = bytes_of_weights(target)
    text = target.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = len(kinds) - kinds.count("linear_attention")
    return BytesRead(weights, layers * bytes_per_layer(target))


def bytes_of_draft(target: Any, draft: Any) -> BytesRead:
    """Return what a cycle reads besides a plain step: the draft, and the head once more."""
    head = target.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in draft.parameters()) + head.nbytes
    return BytesRead(weights, draft.config.num_hidden_layers * bytes_per_layer(target))


def bytes_of_assistant(assistant: Any) -> BytesRead:
    """Return what a cycle reads of an assistant besides a plain step: its weights for every drafted token."""
    return BytesRead(0, 0, bytes_of_weights(assistant))


def bytes_per_layer(target: Any) -> int:
    """Return the bytes of the keys and values of one slot in one layer."""
    text = target.config.get_text_config(decoder=True)
    size = target.get_output_embeddings().weight.element_size()
    return 2 * text.num_key_value_heads * text.head_dim * size


def has_floor(target: Any) -> bool:
    """Return whether the bytes of a step are known: not with experts, nor with keys that are stored in another form."""
    text = target.config.get_text_config(decoder=True)
    if any(getattr(text, name, None) for name in EXPERTS):
        return False
    named = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    return all(isinstance(getattr(text, name, None), int) for name in named)


def measured_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Return the bytes per second, read and written, of a copy of `size` bytes."""
    size = size or (2**28 if device.type == "cpu" else 2**32)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = now(device)
        sink.copy_(source)
        seconds.append(now(device) - started)
    return 2 * size / min(seconds)
