# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Tell what memory a training step needs, from configs alone.

What stays all the time is counted: weights and the optimizer's state. The draft's forward, the loss and the backward
run with tensors that have shapes and no memory. A `Tracker` counts what exists at once. So every kind of draft, mixed
precision and checkpointing are what PyTorch makes of them. The target's forward, of which nothing stays, has a formula.

Shapes: B rows, S tokens of a row, A anchors of a row, Q block positions, N positions with a loss, H hidden size, F
taps * target hidden size, V vocabulary, D head width.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..drafter_dflash import layer_kinds
from ..kinds import kind_of
from ..modeling_dflash import DFlashRMSNorm
from .attention import GROUPED, GroupedMask, GroupMask, group_size
from .heads import SelectorLossInputs
from .loss import Correction, LossInputs, chunk_positions, weighted_loss
from .objective import Recipe, mix_of, needs_target
from .weights import FixedWeights

KERNEL = "memory_of_a_kernel"
"""Name of an attention function that keeps what a kernel of a GPU keeps."""
_STATE_BYTES = {"adafactor": 0.1, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion": 4, "ademamix": 12}
"""Bytes of an optimizer's state for each weight, by a part of its name; Adam and others have two numbers."""


@dataclass(frozen=True)
class StepShape:
    """Say what the memory of a step depends on beside the models.

    Args:
        rows, length, anchors: B, S and A.
        recipe: its losses.
        on_gpu: whether the draft's attention and norms are kernels of a GPU.
        mixed: whether the draft's forward is in bfloat16 mixed precision.
        checkpointing: whether the draft's layers are computed again in the backward.
        optim: the Trainer's name of the optimizer.
        target_bits: of a weight of the target's linear layers; None where they are as loaded.
    """

    rows: int = 1
    length: int = 3072
    anchors: int = 512
    recipe: Recipe = field(default_factory=Recipe)
    on_gpu: bool = False
    mixed: bool = False
    checkpointing: bool = False
    optim: str = "adamw_torch"
    target_bits: float | None = None

    @classmethod
    def of(cls, args: Any, device: torch.device, target_bits: float | None = None) -> "StepShape":
        """Return that of a run with these training arguments."""
        optim = str(getattr(args.optim, "value", args.optim))
        return cls(
            args.per_device_train_batch_size,
            args.max_length,
            min(args.num_anchors, args.max_length - 1),
            args.recipe,
            device.type == "cuda",
            bool(args.bf16 or args.fp16),
            checkpoints(args),
            optim,
            target_bits,
        )

    def chunk(self, vocab_size: int) -> int:
        """Return the number of positions whose logits exist at once."""
        return chunk_positions(vocab_size, torch.device("cuda" if self.on_gpu else "cpu"))


def checkpoints(args: Any) -> bool:
    """Return whether training arguments ask for activation checkpointing, under its old name or its new one."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(getattr(args, name, False) for name in names)


def checkpoint_layers(draft: Any) -> None:
    """Let a draft compute its layers again in the backward; the Trainer does it by an option."""
    enable = getattr(draft, "activation_checkpointing_enable", None)  # from transformers 5.24 on
    (enable or draft.gradient_checkpointing_enable)(
        {"use_reentrant": False, "preserve_rng_state": False}
    )


@dataclass(frozen=True)
class Memory:
    """Hold the bytes that a step needs.

    Args:
        lasting: what is there all the time, by name.
        phases: what each part of a step needs beside it, at its peak, by name.
        kept: of the draft's forward, what its backward needs.
    """

    lasting: dict[str, int]
    phases: dict[str, int]
    kept: int

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return sum(self.lasting.values()) + max(self.phases.values())


def memory_of_step(draft: Any, target: Any, shape: StepShape) -> Memory:
    """Return what a step needs.

    Args:
        draft, target: the models, which may be on the meta device.
    """
    weights, states = bytes_of(draft), _state_bytes(draft, shape.optim)
    of_target = bytes_of(target) - _saved_bytes(target, shape.target_bits)
    lasting = {"target, weights": of_target, "draft, weights": weights}
    lasting["optimizer, state"] = states
    text = target.config.get_text_config(decoder=True)
    found = _simulated(draft, target, shape)
    phases = {
        "target, activations": _target_bytes(text, target.dtype, draft.config, shape),
        "draft, activations, and the loss": found.forward,
        "backward, with gradients": found.backward,
        "optimizer, with gradients": weights,
    }
    return Memory(lasting, phases, found.kept)


def bytes_of(model: Any) -> int:
    """Return the bytes of a model's weights and buffers; those that two modules share count once."""
    tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    return sum(_bytes_of_tensor(one) for one in tensors.values())


def _bytes_of_tensor(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised one holds others
        names = tensor.__tensor_flatten__()[0]
        return sum(_bytes_of_tensor(getattr(tensor, name)) for name in names)
    scales = getattr(
        getattr(tensor, "quant_state", None), "absmax", None
    )  # of bitsandbytes, in 4 bits
    size = tensor.numel() * tensor.element_size()
    return size if scales is None else size + _bytes_of_tensor(scales)


def _saved_bytes(target: Any, bits: float | None) -> int:
    """Return the bytes that linear layers in so many bits take less than as they are."""
    if bits is None:
        return 0
    layers = target.get_decoder().modules()
    weights = [layer.weight for layer in layers if isinstance(layer, torch.nn.Linear)]
    return int(sum(one.numel() * (one.element_size() - bits / 8) for one in weights))


def _state_bytes(draft: Any, optim: str) -> int:
    count = sum(weight.numel() for weight in draft.parameters() if weight.requires_grad)
    size = next((size for name, size in _STATE_BYTES.items() if name in optim), 8.0)
    if "4bit" in optim:
        size /= 8
    elif "8bit" in optim:
        size /= 4
    return int(size * count)


def _target_bytes(text: Any, dtype: torch.dtype, config: Any, shape: StepShape) -> int:
    """Return the bytes of the target's forward: of one layer at its peak, and of the taps so far.

    A layer holds its input, the normed one in float32 too. Besides it holds queries, keys and values, before and after
    the rotation, or three times the MLP's width.
    """
    width = text.hidden_size
    heads = getattr(text, "num_attention_heads", 1)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    attention = 2 * (heads + 2 * key_heads) * head_dim
    inner = max(attention, 3 * (getattr(text, "intermediate_size", None) or 4 * width))
    values = 3 * width + inner + 2 * config.fc_width
    return shape.rows * shape.length * (values * dtype.itemsize + 4 * width)


# A step without memory --------------------------------------------------------------------------------------------


class Tracker(TorchDispatchMode):
    """Count the bytes of the tensors that exist at once, of those that are made in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {id(one.untyped_storage()) for one in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._seen:
                self._count(storage)
        return found

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        weakref.finalize(storage, self._drop, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, size: int) -> None:
        self.now -= size

    def restart(self) -> None:
        """Begin to look for a new peak."""
        self.peak = self.now


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, torch.Tensor))


def _norms_of_a_kernel(model: torch.nn.Module) -> None:
    """Let the norms of a model keep what the kernel of a GPU keeps."""
    for module in model.modules():
        if isinstance(module, DFlashRMSNorm):
            module.forward = partial(_normalised, module)  # type: ignore[method-assign]


def _normalised(norm: DFlashRMSNorm, states: torch.Tensor) -> torch.Tensor:
    if states.dtype != norm.weight.dtype:
        return type(norm).forward(norm, states)
    return _Norm.apply(states, norm.weight)


class _Norm(torch.autograd.Function):
    """Keep the input, the weight and a number for each row."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight, states.new_empty(states.shape[:-1]))
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, weight = ctx.saved_tensors[:2]
        return torch.empty_like(states), torch.empty_like(weight)


class _Kernel(torch.autograd.Function):
    """Keep queries, keys, values, the output, and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(tensors[0])
        sums = tensors[0].new_empty(output.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*tensors, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as a kernel of a GPU would, in the dtype of the values."""
    output = _Kernel.apply(query.to(value.dtype), key.to(value.dtype), value)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(KERNEL, _attend)


class _Simulated(NamedTuple):
    """Hold the bytes that the draft's forward keeps, and those at the peaks of forward with loss, and of backward."""

    kept: int
    forward: int
    backward: int


def _simulated(draft: Any, target: Any, shape: StepShape) -> _Simulated:
    """Run the draft's forward, the loss and the backward with tensors that have no memory."""
    config = draft.config
    with _simulation() as tracker:
        model = type(draft)(config).train()
        model.set_attn_implementation(KERNEL if shape.on_gpu else GROUPED)
        if shape.on_gpu:
            _norms_of_a_kernel(model)
        if shape.checkpointing:
            checkpoint_layers(model)
        head = _head_of(target)
        before = tracker.now
        tracker.restart()
        states = _states(model, config, target.dtype, shape)
        kept = tracker.now - before
        loss = _loss(model, states, head, shape)
        forward = tracker.peak - before
        tracker.restart()
        loss.backward()
        return _Simulated(kept, forward, tracker.peak - before)


@contextmanager
def _simulation() -> Iterator[Tracker]:
    """Make tensors without memory in this context, and count what they would take."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Tracker())


def _states(model: Any, config: Any, dtype: torch.dtype, shape: StepShape) -> torch.Tensor:
    """Run the draft's forward: `[B, A * Q, H]`."""
    queries = shape.anchors * config.block_size
    features = torch.empty(shape.rows, shape.length, config.fc_width, dtype=dtype)
    embeds = torch.empty(shape.rows, queries, config.hidden_size)
    masks = {}
    for name, kind in zip(config.layer_types, layer_kinds(config), strict=True):
        masks[name, kind.causal] = None if shape.on_gpu else _masks(config.block_size, shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.mixed):
        return model(
            noise_embeds=embeds,
            context_hidden_states=features.float(),
            attention_mask=masks,
            position_ids=torch.empty(shape.rows, shape.length + queries, dtype=torch.long),
        ).last_hidden_state


def _masks(size: int, shape: StepShape) -> GroupedMask:
    """Return masks of the shapes that they have on a CPU, for anchors that are spread evenly."""
    step = group_size(shape.anchors)
    groups = []
    for first in range(0, shape.anchors, step):
        last = min(first + step, shape.anchors)
        context = slice(0, shape.length * last // shape.anchors)
        queries = slice(first * size, last * size)
        keys = context.stop + queries.stop - queries.start
        values = torch.empty(shape.rows, 1, queries.stop - queries.start, keys)
        groups.append(GroupMask(queries, context, values))
    return GroupedMask(groups, shape.length)


def _head_of(target: Any) -> torch.Tensor:
    """Return a weight `[V, H]` of the shape of the target's head, whatever kind of head that is."""
    text = target.config.get_text_config(decoder=True)
    return torch.empty(text.vocab_size, text.hidden_size, dtype=target.dtype)


def _loss(model: Any, states: torch.Tensor, head: torch.Tensor, shape: StepShape) -> torch.Tensor:
    """Compute the loss of all positions that predict a token.

    Args:
        states `[B, A * Q, H]`: the draft's.
        head `[V, H]`: the target's.
    """
    config, size = model.config, model.config.block_size
    predicting = states.unflatten(1, (-1, size))[:, :, size - config.num_drafted :].flatten(0, 2)
    predicting = predicting + 0  # as rows are picked, they are copied
    count = len(predicting)
    mix = mix_of(config, shape.recipe)
    has_confidence = getattr(config, "enable_confidence_head", False)
    target_logits = None
    if needs_target(config, shape.recipe):
        final = torch.empty(count, head.shape[1], dtype=head.dtype)
        target_logits = lambda part: linear(final[part], head)  # noqa: E731
    inputs = LossInputs(
        lambda part: linear(part.to(head.dtype), head),
        labels=torch.zeros(count, dtype=torch.long),
        weights=_OneChunk(torch.empty(count), shape.chunk(len(head))),
        mix=mix,
        target_logits=target_logits,
        wants_overlap=has_confidence,
        **_head_inputs(model, kind_of(config).head, predicting),
    )
    found = weighted_loss(predicting, inputs, len(head))
    return found.total + found.head_total


@dataclass(frozen=True)
class _OneChunk(FixedWeights):
    """Hold weights of which one chunk is computed, of `size` positions, since all are alike."""

    size: int

    def chunks(self, size: int) -> list[slice]:
        return [slice(0, self.size)]


def _head_inputs(model: Any, head: str | None, states: torch.Tensor) -> dict[str, Any]:
    """Return what a head of the draft adds to the inputs of the loss, of the same shapes as in training."""
    if head is None:
        return {}
    if head == "selector":
        selector = model.candidate_selector
        gates = selector.hidden_projection(states)
        codebook = selector.successor_codebook
        return {"further_head": SelectorLossInputs(gates, codebook, selector.top_k)}
    if head == "markov":
        if model.markov_head is None:
            return {}
        codebook = model.markov_head.markov_w2.weight
    else:
        codebook = model.embed_proj[2].weight
    gates = states[:, :1] * torch.empty(codebook.shape[1])
    return {"correction": Correction(gates, codebook)}
