# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Before the first token: does a block over our cache give what the target's own forward gives?

This file travels with every pushed draft. A release of transformers may change what decoding leans on, and code in a
pushed repository is frozen. So the block path is compared with the target itself, once for a session, in two ways:

- **A short text of its own** (`check_alone`). The target runs it plainly; then its end runs as a block. Logits and
  tapped features must agree at every position. Recurrent state is taken back by the code that undoes a rejection, gone
  on from, and compared with the target's own.
- **The prompt itself** (`check_prompt`), where keys and values are all that is kept. Its last tokens, a block of them,
  run again over the cache's columns. That costs one block forward.

A difference is an error, never a warning.

Shapes: B rows, P prompt columns, T tokens of the text, Q block positions, V vocabulary, F taps * target hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .cache_dflash import ColumnLayer, Masks, widen
from .compat_dflash import difference, visible_in_window
from .recurrence_dflash import restore_states, states_of
from .taps_dflash import TapWatch
from .target_dflash import Target
from .text_dflash import Prompt

LONGEST = 64
"""Tokens of the short text before its block; windows below this are crossed."""


@dataclass
class Answer:
    """What a forward gave for some positions.

    Args:
        logits `[B, N, V]`.
        features `[B, N, F]`.
    """

    logits: torch.Tensor
    features: torch.Tensor

    def part(self, first: int, last: int | None) -> "Answer":
        """The positions from `first` to before `last`."""
        return Answer(self.logits[:, first:last], self.features[:, first:last])


def circumstances(target: Target, prompt: Prompt) -> tuple[bool, bool, int, tuple[int, ...]]:
    """What a check of `prompt` holds for, besides target, draft, dtype, attention and device.

    Whether there are several rows, whether any is padded, the axes of the positions, and the windows it is longer than.
    """
    crossed = sorted({window for window, _ in target.attention.kinds if window and window < prompt.width})
    return len(prompt.input_ids) > 1, bool(prompt.hidden.any()), prompt.positions.ndim, tuple(crossed)


def tolerance(model: Any) -> float:
    """How far two forwards of the same text may lie apart, of their size: the square root of the dtype's epsilon.

    3.5e-4 in float32, 0.031 in float16, 0.088 in bfloat16; as in float16 where a GPU multiplies in TF32.
    """
    dtypes = [model.dtype if model.dtype.is_floating_point else torch.float32]
    if torch.is_autocast_enabled(model.device.type):
        dtypes.append(torch.get_autocast_dtype(model.device.type))
    if model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.append(torch.float16)  # whose epsilon is TF32's
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How far `ours [B, N, D]` lies from `theirs`, of the size of theirs around its mean: `[B, N]`.

    Equal infinities and equal NaN are no difference: they are the target's, and judged elsewhere.
    """
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    distance = torch.where(same, 0.0, ours - theirs).norm(dim=-1)
    finite = torch.where(theirs.isfinite(), theirs, 0.0)
    size = (finite - finite.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return (distance / size.clamp_min(1e-12)).nan_to_num(nan=torch.inf)


def check_windows(target: Target) -> list[int]:
    """Refuse windows that transformers' own masks draw otherwise; those that only a longer text can tell.

    Raises:
        ValueError: naming the first layer.
    """
    unknown = []
    for layer, (window, _) in enumerate(target.attention.kinds):
        if window is None:
            continue
        size, start = 4, window + 2
        columns = torch.arange(start + size)
        masks = Masks(torch.zeros(1, start + size, dtype=torch.bool), torch.tensor([start]), size)
        theirs = visible_in_window(window, columns[start:], columns)
        if theirs is None:
            unknown.append(window)
        elif not torch.equal(masks.visible(columns[None], window, causal=True)[0], theirs):
            raise difference(f"Layer {layer} of {target.name} slides otherwise than a window of {window} does here")
    return unknown


def probe_ids(model: Any, length: int) -> torch.Tensor:
    """`[1, T]`: tokens of the target's vocabulary, without those that its config names (images, ends ...)."""
    configs = {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}
    special: set[int] = set()
    for config in configs.values():
        for name, value in vars(config).items():
            if "token" in name:
                special.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    rows = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    ordinary = [token for token in torch.randperm(rows, generator=generator).tolist() if token not in special]
    chosen = torch.randint(len(ordinary), (1, length), generator=generator)
    return torch.tensor(ordinary)[chosen].to(model.device)


@dataclass
class Probe:
    """A text whose end is run as a block, and the target's own answers to it.

    Args:
        prompt: that begins with the text.
        last: columns of the text.
        size: positions of the block.
    """

    target: Target
    prompt: Prompt
    last: int
    size: int
    steps: Answer | None = None
    """The target's own answers to the position before the block and to those in it, `[B, 1 + Q, ...]`, once wanted."""

    @property
    def before(self) -> int:
        """Columns before the block."""
        return self.last - self.size

    def fresh_cache(self) -> DynamicCache:
        return DynamicCache(config=self.target.text)

    def plainly(self, cache: Any) -> Answer:
        """The whole text by the target itself; `cache` is filled."""
        inputs = self.prompt.model_inputs(self.target.model, self.last)
        return Answer(self.target.plainly(inputs, cache), self.target.taps.take())

    def as_block(self) -> Answer:
        """The end of the text as a block, over the columns of what comes before, as in a cycle of decoding."""
        target, prompt = self.target, self.prompt
        start = torch.full((len(prompt.input_ids),), self.before, device=prompt.device)
        target.cache.reserve(self.last)
        masks = Masks(widen(prompt.hidden, target.cache.capacity), start, self.size)
        logits = target.verify(prompt.ids(self.before, self.last), start, masks, masks.chain, prompt.end)
        return Answer(logits, target.features)

    def token_by_token(self) -> Answer:
        """The target's own answers as plain `generate` goes on, one token after the other: see `steps`."""
        if self.steps is None:
            cache, first = self.fresh_cache(), self.before - 1
            self.target.plainly(self.prompt.model_inputs(self.target.model, first), cache)
            answers = [self._step(column, cache) for column in range(first, self.last)]
            logits, features = ([getattr(one, name) for one in answers] for name in ("logits", "features"))
            self.steps = Answer(torch.cat(logits, dim=1), torch.cat(features, dim=1))
        return self.steps

    def _step(self, column: int, cache: Any) -> Answer:
        """The target's own answer to one more token, `[B, 1, ...]`."""
        inputs = {
            "input_ids": self.prompt.ids(column, column + 1),
            "attention_mask": (~self.prompt.hidden[:, : column + 1]).long(),
            "position_ids": self.prompt.positions[..., column : column + 1],
        }
        return Answer(self.target.plainly(inputs, cache), self.target.taps.take())


def short_prompt(target: Target, length: int, like: Prompt) -> Prompt:
    """The short text `[B, T]`: two rows where `like` has several, the second padded where `like` is."""
    ids = probe_ids(target.model, length)
    rows = torch.cat([ids, ids.roll(1, dims=1)]) if len(like.input_ids) > 1 else ids
    mask = torch.ones_like(rows)
    if bool(like.hidden.any()):
        mask[-1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    positions = positions.expand(*like.positions.shape[:-2], *positions.shape)  # [B, T], or as many axes as `like` has
    return Prompt(rows, {"attention_mask": mask, "position_ids": positions, "use_cache": True})


@torch.no_grad()
def check_alone(target: Target, size: int, like: Prompt) -> None:
    """Compare a block with the target's own forward, on a short text; the target must be ready to decode, and empty.

    Args:
        size: of a block.
        like: the prompt that comes next, whose batch and padding the short text takes after.

    Raises:
        ValueError: naming the position or layer, the difference, and the versions.
    """
    try:
        compare(target, size, like)
    except (torch.OutOfMemoryError, ValueError):
        raise
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        what = f"{target.name} ({target.text.model_type}) cannot be run as a block over dflash-hub's cache"
        raise difference(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def compare(target: Target, size: int, like: Prompt) -> None:
    """Begin a short text, run its end as a block, and take half of that back; compare each with the target's own."""
    unknown = check_windows(target)
    crossed = [window for window, _ in target.attention.kinds if window and window < LONGEST]
    before = max([size, *crossed, *unknown]) + 3
    probe = Probe(target, short_prompt(target, before + size, like), before + size, size)
    cache, watch = probe.fresh_cache(), TapWatch(target.taps)
    with watch.watching():
        own = probe.plainly(cache)
    watch.check(own.features, target.model.get_decoder(), tolerance(target.model))
    begun = Answer(target.begin(probe.prompt.model_inputs(target.model, before)), target.taps.take())
    agree(probe, begun.part(-1, None), own, before - 1)
    # In decoding this count stays behind the blocks; a model that takes its positions from it must be found out.
    target.cache.seen -= 1
    if target.recurrence.states:
        check_recurrence(probe, cache)
    else:
        agree(probe, probe.as_block(), own, before)


def check_recurrence(probe: Probe, cache: Any) -> None:
    """Run the block, take it back but for its first token, then but for its first half; compare what follows.

    The target's own forwards are those of one token each: models may go another way for one token than for several,
    and plain `generate` always goes that one.

    Args:
        cache: with the states that the whole text left.

    Raises:
        ValueError: naming the layer or position, and the difference.
    """
    target, steps = probe.target, probe.token_by_token()
    begun = {index: states_of(layer) for index, layer in target.recurrence.states.items()}
    for kept in sorted({1, max(1, probe.size // 2)}):
        for index, held in begun.items():
            restore_states(target.recurrence.states[index], held)
        agree(probe, probe.as_block(), steps, probe.before)
        check_rollback(probe, kept, steps)
    for index, layer in target.recurrence.states.items():
        check_state(probe, index, layer, cache.layers[index])


def check_rollback(probe: Probe, kept: int, steps: Answer) -> None:
    """Take a block back but for its first `kept` tokens, go on from there, and compare with the end of the text."""
    target, prompt = probe.target, probe.prompt
    if not any(any(states) for states in target.recurrence.before.values()):
        raise difference(f"The recurrent layers of {target.name} left no state in the cache")
    target.recurrence.settle([kept] * len(prompt.input_ids), probe.size)
    first = probe.before + kept
    columns = torch.arange(first, probe.last, device=prompt.device).expand(len(prompt.input_ids), -1)
    logits = target.go_on(prompt.ids(first, probe.last), columns, prompt.positions[..., first:], prompt.hidden)
    agree(probe, Answer(logits[:, None], target.taps.take()[:, -1:]), steps, probe.last - 1)


def check_state(probe: Probe, index: int, ours: Any, theirs: Any) -> None:
    """Refuse a recurrent state that is not the target's own.

    Raises:
        ValueError: naming the layer.
    """
    for name in ("conv_states", "recurrent_states"):
        for key, state in getattr(theirs, name).items():
            if state is None:
                continue
            far = float(apart(getattr(ours, name)[key].reshape(1, 1, -1), state.reshape(1, 1, -1)))
            if far > 16 * tolerance(probe.target.model):
                raise difference(
                    f"Layer {index} of {probe.target.name}: after half a block was taken back, its recurrent state "
                    f"differs by {far:.2g} of its size from the target's own"
                )


def can_check(prompt: Prompt, last: int, size: int) -> bool:
    """Whether the last `size` of the prompt's columns before `last` are text that a block can repeat."""
    return prompt.plain and last > size and not bool(prompt.hidden[:, last - size : last].any())


@torch.no_grad()
def check_prompt(target: Target, prompt: Prompt, own: Answer) -> None:
    """Run the end of what was just begun again as a block, and compare; the columns are left as they were.

    Args:
        own: the target's own answer to what was begun, at least to as many positions as a block has.

    Raises:
        ValueError: naming the position, the difference, and the versions.
    """
    size, last = own.logits.shape[1], target.cache.seen
    columns = slice(last - size, last)
    layers = [layer for layer in target.cache.layers if isinstance(layer, ColumnLayer)]
    kept = [(layer, layer.keys[:, columns].clone(), layer.values[:, columns].clone()) for layer in layers]
    probe = Probe(target, prompt, last, size)
    block = probe.as_block()
    for layer, keys, values in kept:
        layer.keys[:, columns], layer.values[:, columns] = keys, values
    agree(probe, block, own, last - size)


def agree(probe: Probe, ours: Answer, whole: Answer, first: int) -> None:
    """Refuse an answer that is neither the target's own to the whole text, nor the one it gives token by token.

    The second is asked for only where the first lies further away than the dtype explains; how far those two lie apart
    is the target's own noise. Four times that is allowed, up to sixteen times the tolerance and half the size.

    Args:
        ours `[B, N, ...]`: to the positions from column `first` on.
        whole: the target's own answer, to all columns or the last ones; or the one that it gives token by token.

    Raises:
        ValueError: naming the position, the difference, and the versions.
    """
    positions = ours.logits.shape[1]
    end = first + positions - probe.last  # 0 at the end of the text, below before it
    hidden = probe.prompt.hidden[:, first : first + positions]
    for name in ("logits", "features"):
        own, answer = getattr(whole, name)[:, end - positions : end or None], getattr(ours, name)
        far, allowed = apart(answer, own), tolerance(probe.target.model)
        if whole is probe.steps:
            allowed *= 4  # one token and several add up in another order, all along a recurrence
        if bool((far > allowed).any()):
            steps = getattr(probe.token_by_token(), name)[:, end - positions : end or None]
            noise = float(apart(steps, own).masked_fill(hidden.to(far.device), 0.0).max())
            far, allowed = far.minimum(apart(answer, steps)), max(allowed, min(4 * noise, 16 * allowed, 0.5))
        refuse_beyond(probe, name, far.masked_fill(hidden.to(far.device), 0.0), allowed, first)


def refuse_beyond(probe: Probe, name: str, far: torch.Tensor, allowed: float, first: int) -> None:
    """Raise where `far [B, N]` is beyond what is allowed, naming the first position, counted from column `first`."""
    beyond = (far > allowed).nonzero()
    if len(beyond):
        row, position = beyond[beyond[:, 1].argmin()].tolist()
        worst, target = float(far[row, position]), probe.target
        raise difference(
            f"A block over dflash-hub's cache is not what {target.name} ({target.text.model_type}) computes itself: at "
            f"column {first + position} of row {row} the {name} differ by {worst:.2g} of their size, where "
            f"{allowed:.2g} is allowed in {str(target.model.dtype).removeprefix('torch.')}"
        )
