# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check before the first token that a block over our cache gives what the target's own forward gives.

This file travels with every pushed draft. A release of transformers may change what decoding relies on, and code in a
pushed repository is frozen. So the block path is compared with the target itself, once for all its drafts, in two ways:

- **A short text of its own** (`check_alone`). The target runs it as plain `generate` would; then its end runs as a
  block. Logits and tapped features must agree at every position. Recurrent state is rolled back by the code that undoes
  a rejection, continued, and compared with the target's own.
- **The prompt itself** (`check_prompt`), where only keys and values are kept. Its last tokens, a block of them, run
  again over the slots of the cache. That costs one block forward.

A difference is an error, never a warning.

Shapes: B rows, P prompt slots, T tokens of the text, N positions, Q block positions, V vocabulary, D any width,
F taps * target hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .attention_dflash import BlockMasks
from .cache_dflash import restore_states, roll_back, states_of
from .compat_dflash import adapters_of_rows, device_of, difference, visible_in_window
from .sequences_dflash import Prompt
from .taps_dflash import TapWatch
from .target_dflash import Target, TargetOutput, TargetState, Verified

LONGEST = 64
"""Tokens of the short text before its block; windows below this are crossed."""


def circumstances(target: Target, prompt: Prompt) -> tuple[bool, bool, int, tuple[int, ...]]:
    """Return what a check of `prompt` holds for, besides target, taps, block size, dtype, attention and device.

    Whether there are several rows, whether any is padded, the axes of the positions, and the windows it is longer than.
    """
    crossed = sorted(
        {window for window, *_ in target.attention.layer_kinds if window and window < prompt.width}
    )
    return (
        len(prompt.input_ids) > 1,
        bool(prompt.padding_mask.any()),
        prompt.positions.ndim,
        tuple(crossed),
    )


def tolerance(model: Any) -> float:
    """Return how far two forwards of one text may differ, of their size: the square root of the dtype's epsilon.

    3.5e-4 in float32, 0.031 in float16, 0.088 in bfloat16; as in float16 where a GPU multiplies in TF32.
    """
    dtypes = [model.dtype if model.dtype.is_floating_point else torch.float32]
    device = device_of(model).type
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.append(torch.float16)  # whose epsilon is TF32's
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return how far `ours [B, N, D]` is from `theirs`, relative to the spread of theirs: `[B, N]`.

    Equal infinities and equal NaN are no difference: they are the target's own.
    """
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference_size = torch.where(same, 0.0, ours - theirs).norm(dim=-1)
    finite = torch.where(theirs.isfinite(), theirs, 0.0)
    size = (finite - finite.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return (difference_size / size.clamp_min(1e-12)).nan_to_num(nan=torch.inf)


def check_windows(target: Target) -> list[int]:
    """Compare each sliding window with transformers' own mask rule.

    Returns:
        The windows that this version has no rule for, so that only a longer text can tell.

    Raises:
        ValueError: naming the first layer that differs.
    """
    unknown = []
    for layer, (window, *_) in enumerate(target.attention.layer_kinds):
        if window is None:
            continue
        size, start = 4, window + 2
        slots = torch.arange(start + size, device="cpu")
        theirs = visible_in_window(window, slots[start:], slots)
        masks = BlockMasks(
            torch.zeros_like(slots, dtype=torch.bool)[None], slots[start, None], size
        )
        if theirs is None:
            unknown.append(window)
        elif not torch.equal(masks.visible_slots(slots[None], window, causal=True)[0], theirs):
            raise difference(
                f"Layer {layer} of {target.name} slides otherwise than a window of {window} does here"
            )
    return unknown


def probe_ids(model: Any, length: int) -> torch.Tensor:
    """Return tokens of the target's vocabulary without those that its config names (images, ends ...): `[1, T]`."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if "token" in name:
                ids = value if isinstance(value, list) else [value]
                special.update(one for one in ids if isinstance(one, int))
    rows = min(
        model.get_input_embeddings().weight.shape[0],
        model.config.get_text_config(decoder=True).vocab_size,
    )
    # On the CPU, whatever device is the default: the same text for every target.
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        shuffled = torch.randperm(rows, generator=generator)
        ordinary = [token for token in shuffled.tolist() if token not in special]
        chosen = torch.randint(len(ordinary), (1, length), generator=generator)
        return torch.tensor(ordinary)[chosen]


@dataclass
class Probe:
    """Hold a text whose end runs as a block, and the target's own outputs for it.

    Args:
        state: of the target, for this text.
        prompt: that begins with the text.
        last: slots of the text.
        size: positions of the block.
    """

    target: Target
    state: TargetState
    prompt: Prompt
    last: int
    size: int
    steps: TargetOutput | None = None
    """The cached result of `token_by_token`."""

    @property
    def before(self) -> int:
        """Slots before the block."""
        return self.last - self.size

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.target.text)

    def plain(self, cache: Any) -> TargetOutput:
        """Run the whole text by the target itself, `[B, T, ...]`; this fills `cache`."""
        return self.target.plain_forward(
            self.prompt.model_inputs(self.target.model, self.last), cache
        )

    def as_block(self) -> Verified:
        """Run the end of the text as a block over the slots before it, as in a cycle of decoding: `[B, Q, ...]`."""
        slots = torch.full((len(self.prompt.input_ids),), self.before, device=self.prompt.device)
        self.state.cache.reserve(self.last)
        verified = self.target.verify(self.state, self.prompt.ids(self.before, self.last), slots)
        self.state.masks.clear()  # they follow small moves only, and the next block may be far away
        return verified

    def token_by_token(self) -> TargetOutput:
        """Run the block's tokens and the one before it one by one, as plain `generate` does: `[B, 1 + Q, ...]`."""
        if self.steps is None:
            cache, first = self.new_cache(), self.before - 1
            self.target.plain_forward(self.prompt.model_inputs(self.target.model, first), cache)
            outputs = [self._step(slot, cache) for slot in range(first, self.last)]
            logits = torch.cat([output.logits for output in outputs], dim=1)
            self.steps = TargetOutput(
                logits, torch.cat([output.features for output in outputs], dim=1)
            )
        return self.steps

    def _step(self, slot: int, cache: Any) -> TargetOutput:
        """Run one more token by the target itself, `[B, 1, ...]`."""
        inputs = {
            "input_ids": self.prompt.ids(slot, slot + 1),
            "attention_mask": (~self.prompt.padding_mask[:, : slot + 1]).long(),
            "position_ids": self.prompt.positions[..., slot : slot + 1],
        }
        return self.target.plain_forward(inputs, cache)


def short_prompt(target: Target, length: int, like: Prompt) -> Prompt:
    """Return the short text `[B, T]`: two rows where `like` has several, the last padded where `like` is.

    Where rows have adapters of their own, there are as many as `like` has.
    """
    ids = probe_ids(target.model, length).to(like.device)
    several = len(like.input_ids) if adapters_of_rows(target.model) else 2
    count = min(several, len(like.input_ids))
    rows = torch.cat([ids.roll(row, dims=1) for row in range(count)])
    mask = torch.ones_like(rows)
    if bool(like.padding_mask.any()):
        mask[-1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    # [B, T], or as many axes as `like` has.
    positions = positions.expand(*like.positions.shape[:-2], *positions.shape)
    return Prompt(rows, {"attention_mask": mask, "position_ids": positions, "use_cache": True})


@torch.no_grad()
def check_alone(target: Target, size: int, like: Prompt) -> None:
    """Compare a block with the target's own forward, on a short text.

    Args:
        size: of a block.
        like: the prompt that comes next; the short text has its batch and padding.

    Raises:
        ValueError: naming the position or layer, the difference, and the versions. Or the prompt's device, where the
            forward fails because the target's is another.
    """
    try:
        compare(target, size, like)
    except (torch.OutOfMemoryError, ValueError):
        raise
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        what = f"{target.name} ({target.text.model_type}) cannot be run as a block over dflash-hub's cache"
        fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        own = device_of(target.model)
        if like.device != own:
            raise ValueError(
                f"input_ids are on {like.device}, but {target.name} is on {own}, and its forward fails ({fault}). "
                "Move them: input_ids.to(target.device)."
            ) from error
        raise difference(f"{what}: {fault}") from error


def compare(target: Target, size: int, like: Prompt) -> None:
    """Prefill a short text, run its end as a block, roll half of that back; compare each with the target's own."""
    unknown = check_windows(target)
    crossed = [window for window, *_ in target.attention.layer_kinds if window and window < LONGEST]
    before = max([size, *crossed, *unknown]) + 3
    prompt = short_prompt(target, before + size, like)
    with target.decoding(prompt, "eager") as state:
        probe = Probe(target, state, prompt, before + size, size)
        check_chance(probe)
        cache, watch = probe.new_cache(), TapWatch(target.taps)
        with watch.watching():
            own = probe.plain(cache)
        if target.taps.ids:
            watch.check(own.features, target.model.get_decoder(), tolerance(target.model))
        started = target.prefill(state, prompt.model_inputs(target.model, before))
        check_agreement(probe, started.part(-1, None), own, before - 1)
        # In decoding this count stays behind the blocks; a model that takes its positions from it must be found out.
        state.cache.num_prefilled -= 1
        if state.recurrent.states:
            check_recurrence(probe, cache)
        else:
            check_agreement(probe, probe.as_block(), own, before)


def check_chance(probe: Probe) -> None:
    """Refuse a target in training mode whose forward draws random numbers, as dropout does.

    Raises:
        ValueError: saying so.
    """
    target = probe.target
    if not any(module.training for module in target.model.modules()):
        return
    for _ in range(3):  # another thread may draw some meanwhile
        before = random_states(target.model)
        probe.plain(probe.new_cache())
        if all(map(torch.equal, before, random_states(target.model))):
            return
    raise ValueError(
        f"{target.name} is in training mode, and its forward draws random numbers, as dropout does. So no two "
        "forwards agree, and no text can be compared with the target's own. Call `target.eval()`."
    )


def random_states(model: Any) -> list[torch.Tensor]:
    """Return the states of the generators of random numbers on the CPU and on a model's CUDA devices."""
    devices = {weight.device for weight in model.parameters()} | {device_of(model)}
    ordered = sorted((device for device in devices if device.type == "cuda"), key=str)
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, ordered)]


def check_recurrence(probe: Probe, cache: Any) -> None:
    """Run the block, roll it back to its first token, then to its first half; compare what follows.

    The target's own forwards are those of one token each, as plain `generate` runs them. Models may compute one token
    in another way than several.

    Args:
        cache: with the states that the whole text left.

    Raises:
        ValueError: naming the layer or position, and the difference.
    """
    layers, steps = probe.state.recurrent.states, probe.token_by_token()
    started = {index: states_of(layer) for index, layer in layers.items()}
    for committed in sorted({1, max(1, probe.size // 2)}):
        for index, saved in started.items():
            restore_states(layers[index], saved)
        block = probe.as_block()
        check_agreement(probe, block, steps, probe.before)
        check_rollback(probe, block, committed, steps)
    for index, layer in layers.items():
        check_state(probe, index, layer, cache.layers[index])


def check_rollback(probe: Probe, block: Verified, committed: int, steps: TargetOutput) -> None:
    """Roll a block back to its first `committed` tokens, continue from there, and compare with the end of the text."""
    target, state = probe.target, probe.state
    prompt = probe.prompt
    if not any(any(states) for states in block.snapshot.states.values()):
        raise difference(f"The recurrent layers of {target.name} left no state in the cache")
    roll_back(state.recurrent, block.snapshot, [committed] * len(prompt.input_ids), probe.size)
    first = probe.before + committed
    slots = torch.arange(first, probe.last, device=prompt.device).expand(len(prompt.input_ids), -1)
    output = target.prefill_chunk(
        state, prompt.ids(first, probe.last), slots, prompt.positions[..., first:]
    )
    check_agreement(
        probe, TargetOutput(output.logits, output.features[:, -1:]), steps, probe.last - 1
    )


def check_state(probe: Probe, index: int, ours: Any, theirs: Any) -> None:
    """Check that a recurrent state is the target's own.

    Raises:
        ValueError: naming the layer.
    """
    for name in ("conv_states", "recurrent_states"):
        for key, state in getattr(theirs, name).items():
            if state is None:
                continue
            far = float(
                distance(getattr(ours, name)[key].reshape(1, 1, -1), state.reshape(1, 1, -1))
            )
            if far > 16 * tolerance(probe.target.model):
                raise difference(
                    f"Layer {index} of {probe.target.name}: after half a block was rolled back, its recurrent state "
                    f"differs by {far:.2g} of its size from the target's own"
                )


def can_check_prompt(prompt: Prompt, last: int, size: int) -> bool:
    """Tell whether the last `size` of the prompt's slots before `last` are text that a block can repeat."""
    return (
        prompt.is_plain
        and last > size
        and not bool(prompt.padding_mask[:, last - size : last].any())
    )


@torch.no_grad()
def check_prompt(target: Target, state: TargetState, prompt: Prompt, own: TargetOutput) -> None:
    """Run the end of what was just prefilled again as a block, and compare; the slots are left as they were.

    Args:
        own: the target's own output for what was prefilled, with logits for as many positions as a block has.

    Raises:
        ValueError: naming the position, the difference, and the versions.
    """
    size, last = own.logits.shape[1], state.cache.num_prefilled
    slots = slice(last - size, last)
    saved = []
    for layer in state.cache.slot_layers.values():
        saved.append((layer, layer.keys[:, slots].clone(), layer.values[:, slots].clone()))
    probe = Probe(target, state, prompt, last, size)
    block = probe.as_block()
    for layer, keys, values in saved:
        layer.keys[:, slots], layer.values[:, slots] = keys, values
    check_agreement(probe, block, own, last - size)


def check_agreement(probe: Probe, ours: TargetOutput, whole: TargetOutput, first: int) -> None:
    """Compare an output with the target's own for the whole text, and with the one that it gives token by token.

    The second is run only where the first differs by more than the dtype explains. How far those two differ is the
    target's own noise: four times that is allowed, up to sixteen times the tolerance and half the size.

    Args:
        ours `[B, N, ...]`: for the positions from slot `first` on.
        whole: the target's own output, for all slots or the last ones; or the one that it gives token by token.

    Raises:
        ValueError: naming the position, the difference, and the versions.
    """
    positions = ours.logits.shape[1]
    end = first + positions - probe.last  # 0 at the end of the text, below before it
    part = slice(end - positions, end or None)
    padding = probe.prompt.padding_mask[:, first : first + positions]
    for name in ("logits", "features"):
        own, answer = getattr(whole, name)[:, part], getattr(ours, name)
        far, allowed = distance(answer, own), tolerance(probe.target.model)
        if whole is probe.steps:
            allowed *= 4  # one token and several add up in another order, all along a recurrence
        if bool((far > allowed).any()):
            steps = getattr(probe.token_by_token(), name)[:, part]
            noise = float(distance(steps, own).masked_fill(padding.to(far.device), 0.0).max())
            far, allowed = (
                far.minimum(distance(answer, steps)),
                max(allowed, min(4 * noise, 16 * allowed, 0.5)),
            )
        refuse_beyond(probe, name, far.masked_fill(padding.to(far.device), 0.0), allowed, first)


def refuse_beyond(probe: Probe, name: str, far: torch.Tensor, allowed: float, first: int) -> None:
    """Raise where `far [B, N]`, from slot `first` on, is beyond what is allowed, naming the first position."""
    beyond = (far > allowed).nonzero()
    if len(beyond):
        row, position = beyond[beyond[:, 1].argmin()].tolist()
        worst, target = float(far[row, position]), probe.target
        raise difference(
            f"A block over dflash-hub's cache is not what {target.name} ({target.text.model_type}) computes itself: at "
            f"slot {first + position} of row {row} the {name} differ by {worst:.2g} of their size, where "
            f"{allowed:.2g} is allowed in {str(target.model.dtype).removeprefix('torch.')}"
        )
