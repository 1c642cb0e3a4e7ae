# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode a few prompts with a draft, and ask it, the same weights under other configs, and an untrained draft.

A draft with a wrong config loads and decodes exactly, only slowly. If the same weights accept more tokens under another
config, that config is the one they were trained with.

Shapes: B prompts, P tokens of the longest, T tokens of a text.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..evaluation import stop_token_ids, without_penalties
from ..generation_dflash import DecodeStatistics
from ..proposals_dflash import Proposal
from ..support_dflash import draft_findings
from .pairs import Target, rope_differences, rope_of
from .remarks import Remark, Section

_SECTION = Section("run")
AS_CONFIGURED, UNTRAINED = "as configured", "untrained"
_SIGNIFICANT = 3  # standard errors
_PERHAPS = 1.5
_CLEARLY = 1.03  # times as many tokens that agree
_SHOWS = ", which shows how they were trained"
PROMPTS = (
    'def is_palindrome(text: str) -> bool:\n    """Return whether a text reads the same backwards."""\n',
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many clips did she sell in "
    "April and May together? Think step by step.",
    "import json\nfrom pathlib import Path\n\n\nclass Settings:\n    def __init__(self, path):\n",
    "Explain in five sentences how a rainbow forms.",
    "What is the derivative of x^3 * sin(x)? Show every step.",
    "Write a SQL query that returns the three customers with the highest total order value in 2024.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday afternoon.",
    "List five capitals of Europe with their countries, as a table.",
)
"""What is decoded where no prompts are given."""


@dataclass(frozen=True)
class Acceptance:
    """Measure how well a draft predicts the target's texts, with every token of them as the anchor once.

    All drafts of a run are asked at the same anchors, so two of them can be compared anchor by anchor.

    Args:
        name: of the draft, such as "taps one layer later".
        agreed: for each anchor, how many drafted tokens agree before the first that does not.
        most: drafted tokens of a block.
    """

    name: str
    agreed: tuple[int, ...]
    most: int

    @property
    def length(self) -> float:
        """Tokens that a cycle commits on average, the target's own included."""
        return 1 + sum(self.agreed) / max(1, len(self.agreed))

    @property
    def by_position(self) -> tuple[float, ...]:
        """The share of anchors at which the drafted tokens up to position 1, 2, ... agree."""
        shares = []
        for position in range(1, self.most + 1):
            reached = [one >= position for one in self.agreed]
            shares.append(sum(reached) / max(1, len(reached)))
        return tuple(shares)

    def exceeds(self, other: "Acceptance", errors: float = _SIGNIFICANT) -> bool:
        """Tell whether more tokens agree than with another draft: clearly, and by so many standard errors."""
        pairs = zip(self.agreed, other.agreed, strict=True)
        differences = torch.tensor([ours - theirs for ours, theirs in pairs]).double()
        if len(differences) < 2:
            return False
        mean, error = differences.mean(), differences.std() / len(differences) ** 0.5
        return bool(self.length - 1 > _CLEARLY * (other.length - 1) and mean > errors * error)

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        found = {"name": self.name, "length": self.length, "anchors": len(self.agreed)}
        return found | {"by_position": list(self.by_position)}


@dataclass(frozen=True)
class RunReport:
    """Hold what a run showed.

    Args:
        exact: whether every text was the target's own.
        dtype: of the target.
        tokens_per_cycle: that the decode committed, as configured.
        acceptances: as configured first, then the variants, and an untrained draft last.
    """

    exact: bool
    dtype: str
    prompts: int
    tokens_per_cycle: float
    acceptances: tuple[Acceptance, ...]
    remarks: tuple[Remark, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        found = {"exact": self.exact, "dtype": self.dtype, "prompts": self.prompts}
        found |= {"tokens_per_cycle": self.tokens_per_cycle}
        return found | {"acceptance": [one.as_dict() for one in self.acceptances]}


def run_draft(
    draft: Any,
    target: Target,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 32,
    report: Callable[[str], None] = lambda step: None,
) -> RunReport:
    """Decode prompts with a loaded draft and its variants, and compare.

    Args:
        target: with its model and tokenizer.
        prompts: texts, which go through the target's chat template if it has one; None for the package's own.
        new_tokens: of each prompt.
        report: called with the name of each step as it begins.

    Raises:
        ValueError: the target cannot be decoded with this draft.
    """
    model = target.model
    inputs = encode(target, PROMPTS if prompts is None else prompts, new_tokens)
    report("Decoding with the target alone")
    texts = write(model, inputs, new_tokens)
    report("Decoding with the draft")
    statistics = DecodeStatistics()
    own = write(model, inputs, new_tokens, draft, statistics=statistics)
    exact = torch.equal(own, texts)
    found = []
    for name, one in variants(draft, target):
        report(f"Asking the draft at every token, {name}")
        agreed = agreement(one, model, inputs, texts)
        found.append(Acceptance(name, tuple(agreed), one.config.num_drafted))
    dtype = str(model.dtype).removeprefix("torch.")
    remarks = [*_exactness_remarks(exact, dtype), *acceptance_remarks(found)]
    length = statistics.acceptance_length
    return RunReport(exact, dtype, len(texts), length, tuple(found), tuple(remarks))


def encode(target: Target, prompts: Sequence[str], new_tokens: int) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, each `[B, P]`: the prompts, padded at their start.

    A prompt is cut at its start where the target has no room for the new tokens.

    Raises:
        ValueError: there is no prompt, or none that has tokens.
    """
    rows = [_ids_of(target.tokenizer, prompt) for prompt in prompts]
    positions = getattr(target.text, "max_position_embeddings", None)
    if positions is not None:
        rows = [row[-max(1, positions - new_tokens) :] for row in rows]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("There are no prompts to decode; pass texts that have at least one token.")
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = [[row[0]] * pad + row for row, pad in zip(rows, pads, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    device = target.model.device
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return {name: value.to(device) for name, value in inputs.items()}


def _ids_of(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt, through the chat template if there is one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    messages = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def write(
    model: Any,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    draft: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Return the greedy texts of prompts, `[B, T]`; padded after their end.

    Args:
        draft: to decode with; None for the target alone.
        options: further keywords of the draft's decoding function.
    """
    if draft is not None:
        options |= {"custom_generate": draft.speculate, "capture": "eager"}
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        **without_penalties(model),
        **options,
    )


class _EveryAnchor:
    """Note how many tokens of each proposal agree with a text, and let none of them be accepted.

    So every cycle commits one token, and every token becomes the anchor once.

    Args:
        chain: the draft's own proposer.
        texts: for each row, what the target writes, `[T]`, with the prompt before it and nothing after it.
        agreed: for each row, gets a number for each proposal.
    """

    def __init__(self, chain: Any, texts: list[torch.Tensor], agreed: list[list[int]]):
        self.chain = chain
        self.texts, self.agreed = texts, agreed

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        self.chain.append_context(features, first_slot)

    def propose(self, state: Any) -> Proposal:
        """Return the draft's proposal with first tokens that the target does not write."""
        tokens = self.chain.propose(state).tokens.clone()
        for row, slot in enumerate(state.last_slots):
            truth = self.texts[row][slot + 1 : slot + tokens.shape[1]].to(tokens.device)
            if len(truth):
                same = tokens[row, 1 : 1 + len(truth)] == truth
                self.agreed[row].append(int(same.int().cumprod(0).sum()))
                tokens[row, 1] = 0 if int(truth[0]) else 1
        return Proposal(tokens)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        self.chain.commit(features, slots)


def agreement(
    draft: Any, model: Any, inputs: dict[str, torch.Tensor], texts: torch.Tensor
) -> list[int]:
    """Return, for every token of the target's `texts [B, T]`, how many drafted tokens after it agree."""
    width = inputs["input_ids"].shape[1]
    whole = [text[: _end(text, width, stop_token_ids(model))] for text in texts]
    agreed: list[list[int]] = [[] for _ in whole]
    factory = partial(_EveryAnchor, texts=whole, agreed=agreed)
    write(model, inputs, texts.shape[1] - width, draft, proposer=factory)
    return [count for row in agreed for count in row]


def _end(text: torch.Tensor, width: int, stops: tuple[int, ...]) -> int:
    """Return the length of a text `[T]` up to its first stop token after the prompt of this width, included."""
    found = torch.isin(text[width:], torch.tensor(stops, device=text.device, dtype=text.dtype))
    ends = found.nonzero()
    return len(text) if not len(ends) else width + int(ends[0]) + 1


# Variants ------------------------------------------------------------------------------------------------------------


def variants(draft: Any, target: Target) -> Iterator[tuple[str, Any]]:
    """Yield the draft as it is, its weights under every other config that is a known mistake, and an untrained draft.

    One is made at a time; its weights are those of `draft`, which are not copied.
    """
    yield AS_CONFIGURED, draft
    for name, fields in changes(draft.config, target).items():
        yield name, with_fields(draft, fields)
    yield UNTRAINED, _fresh(draft)


def changes(config: Any, target: Target) -> dict[str, dict[str, Any]]:
    """Return the configs to try: name -> fields that differ from this one."""
    found: dict[str, dict[str, Any]] = {}
    for name, step in (("taps one layer later", 1), ("taps one layer earlier", -1)):
        taps = [tap + step for tap in config.target_layer_ids]
        if taps[0] >= 0 and taps[-1] < target.text.num_hidden_layers:
            found[name] = {"target_layer_ids": taps}
    for causal, word in ((True, "causal"), (False, "bidirectional")):
        if config.is_causal is not causal:
            found[f"every layer {word}"] = {"is_causal": causal}
    if rope_differences(config, target.text):
        known = ("rope_theta", "rope_type", "factor", "original_max_position_embeddings")
        theirs = rope_of(target.text)
        rope = {name: theirs[name] for name in known if theirs.get(name) is not None}
        found["the target's rotary embeddings"] = {"rope_parameters": rope}
    anchor = not config.sample_from_anchor
    found[f"sample_from_anchor {str(anchor).lower()}"] = {"sample_from_anchor": anchor}
    return found


def with_fields(draft: Any, fields: dict[str, Any]) -> Any:
    """Return a draft with the weights of another, and a config with other values in these fields."""
    config = copy.deepcopy(draft.config)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        twin = type(draft)(config)
    twin.load_state_dict(draft.state_dict(), assign=True)
    for name, module in [*twin.named_modules()]:
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            twin.set_submodule(name, type(module)(config))  # rotary frequencies are not stored
    return twin.to(draft.device).eval()


def _fresh(draft: Any) -> Any:
    """Return an untrained draft of the same config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = type(draft)(copy.deepcopy(draft.config))
    return fresh.to(draft.device, draft.dtype).eval()


# Remarks -------------------------------------------------------------------------------------------------------------


def fit_remarks(config: Any, target: Target) -> Iterator[Remark]:
    """Yield why a draft with this config cannot decode with the loaded target."""
    yield from _SECTION.errors("not-decoded", draft_findings(config, target.model))


def _exactness_remarks(exact: bool, dtype: str) -> Iterator[Remark]:
    """Yield that texts differ from the target's own."""
    if exact:
        return
    what = f"Greedy texts differ from the target's own, in {dtype}"
    if dtype == "float32":
        advice = "Please report it: in float32 they must be equal"
        yield _SECTION.error("not-exact", what, False, True, advice)
    else:
        advice = "Near-ties may fall either way in this dtype; run it in float32 (--dtype float32)"
        yield _SECTION.note("near-ties", what, False, True, advice)


def anchor_remark(found: Sequence[Acceptance]) -> Remark:
    """Say which convention of the anchor the weights were trained for, where config.json does not.

    Args:
        found: with `sample_from_anchor` False first, and a variant with it True.
    """
    without = found[0]
    within = next(one for one in found if one.name == "sample_from_anchor true")
    figures = (
        f"{within.length:.2f} with sample_from_anchor true and {without.length:.2f} with false"
    )
    for better, other, value in ((within, without, True), (without, within, False)):
        if better.exceeds(other):
            word = str(value).lower()
            what = f"Acceptance is {figures}: the weights were trained with {word}"
            advice = (
                f'Write "sample_from_anchor": {word} into config.json, or load_draft(..., '
                f"sample_from_anchor={value})"
            )
            return _SECTION.warning("anchor-trained", what, None, value, advice)
    what = f"Acceptance is {figures}, which does not tell how the weights were trained"
    advice = "Decode more to tell: more --prompts, or a larger --max-new-tokens"
    return _SECTION.note("anchor-unknown", what, None, "one that accepts more", advice)


def after_warnings(remark: Remark) -> Remark:
    """Return a remark of a run whose config or pair was warned of: what is accepted may follow from that alone."""
    if remark.name != "better-otherwise":
        return remark
    what = remark.finding.what.removesuffix(_SHOWS)
    found, expected = remark.finding.found, remark.finding.expected
    advice = "It may follow from the warnings of the config or the pair: correct those first"
    return _SECTION.note(remark.name, what, found, expected, advice)


def acceptance_remarks(found: Sequence[Acceptance]) -> Iterator[Remark]:
    """Yield that another config accepts more, or that the draft accepts no more than an untrained one.

    Args:
        found: as configured first, an untrained draft last.
    """
    own, fresh = found[0], found[-1]
    surely = [one for one in found[1:-1] if one.exceeds(own)]
    perhaps = [one for one in found[1:-1] if one.exceeds(own, _PERHAPS)]
    best = max(surely or perhaps or [own], key=lambda one: one.length)
    figures = f"{best.length:.2f} with {best.name} and {own.length:.2f} as configured"
    if surely:
        what = f"Acceptance is {figures}, with the same weights{_SHOWS}"
        advice = f"Correct the config for {best.name}, or how training reads it"
        yield _SECTION.warning("better-otherwise", what, own.length, best.length, advice)
        return
    if perhaps:
        what = f"Acceptance is {figures}, with the same weights, which may be chance"
        advice = "Decode more to tell: more --prompts, or a larger --max-new-tokens"
        yield _SECTION.note("better-perhaps", what, own.length, best.length, advice)
    if not own.exceeds(fresh):
        what = (
            f"Acceptance is {own.length:.2f} tokens per cycle, not clearly more than the {fresh.length:.2f} of an "
            "untrained draft"
        )
        advice = "See whether it is the draft of this target, and whether its weights were trained"
        yield _SECTION.error("no-acceptance", what, own.length, fresh.length, advice)
