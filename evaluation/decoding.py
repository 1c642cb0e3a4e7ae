# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode a batch of prompts in one way, and record its text, its times and its cycles."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig

from ..generation_dflash import DecodeStatistics, now
from .compare import stop_token_ids, without_penalties
from .ways import (
    ASSISTANT,
    DFLASH,
    LOOKUP,
    LOOKUP_TOKENS,
    STATIC,
    TRANSFORMERS,
    TRANSFORMERS_STATIC,
    UNDRAFTED,
    Drafting,
    Way,
)

Record = dict[str, Any]
UNKNOWN_CYCLES = {"committed": None, "drafted": None, "speculative_decoding": None}
"""The fields of a record whose cycles are not known."""
LONGEST_ERROR = 2000
"""Characters of an error in a record."""


@dataclass
class Models:
    """Hold the loaded models of an evaluation.

    Args:
        drafts: by name and block size.
        assistants: by name.
        proposal: what a cycle with a draft verifies.
    """

    target: Any
    tokenizer: Any
    drafts: dict[tuple[str, int], Any] = field(default_factory=dict)
    assistants: dict[str, Any] = field(default_factory=dict)
    capture: str = "auto"
    proposal: str = "chain"

    def draft_of(self, drafting: Drafting) -> Any:
        """Return the draft or the assistant; None without one."""
        if drafting.method == ASSISTANT:
            return self.assistants[str(drafting.draft)]
        if drafting.draft is None:
            return None
        return self.drafts[drafting.draft, int(drafting.block_size or 0)]


@dataclass(frozen=True)
class Job:
    """Hold a batch of prompts to decode.

    Args:
        rows: the token ids of each prompt.
        max_new_tokens: for each of them.
        seed: of the noise, where text is sampled.
        longest: tokens of the longest text of the evaluation, prompt included, for caches of fixed size.
    """

    rows: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    seed: int = 0
    longest: int = 0

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.rows))


@dataclass
class Cycle:
    """Hold what a cycle did to one row: tokens drafted, of them accepted, and tokens committed."""

    drafted: int
    accepted: int
    committed: int


@dataclass
class CycleStatistics(DecodeStatistics):
    """Count as `DecodeStatistics` does, and hold every cycle of every row."""

    rows: list[list[Cycle]] = field(default_factory=list)

    def add_cycle(self, counts: list[tuple[int, int]], size: int) -> None:
        super().add_cycle(counts, size)
        self.rows = self.rows or [[] for _ in counts]
        for cycles, (accepted, committed) in zip(self.rows, counts, strict=True):
            if committed:
                cycles.append(Cycle(size - 1, min(accepted, committed), committed))


class ForwardWatch:
    """Note when the target's first forward ends; and the ids of each forward, if `with_ids`, without reading them.

    Where transformers compiles the forward, hooks would break its graph, so the compiled call is watched from outside.
    """

    def __init__(self, target: Any, with_ids: bool):
        self.target, self.with_ids = target, with_ids
        self.first_end: float | None = None
        self.ids: list[torch.Tensor] = []
        self.hooks: list[Any] = []

    def __enter__(self) -> "ForwardWatch":
        self.hooks = [self.target.register_forward_hook(self._note_end)]
        if self.with_ids:
            before = self.target.register_forward_pre_hook(self._note_ids, with_kwargs=True)
            self.hooks.append(before)
            self.target.get_compiled_call = self._compiled_call
        return self

    def __exit__(self, *error: Any) -> None:
        self._remove_hooks()
        if self.with_ids:
            del self.target.get_compiled_call

    def _remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """Return the compiled forward, watched; in place of the target's own method of this name."""
        compiled = type(self.target).get_compiled_call(self.target, compile_config)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._remove_hooks()  # which the prefill, that is not compiled, has had
            self._note_ids(self.target, args, kwargs)
            output = compiled(*args, **kwargs)
            if self.first_end is None:
                self.first_end = now(self.target.device)
            return output

        return call

    def _note_end(self, module: Any, inputs: Any, output: Any) -> None:
        self.first_end = now(self.target.device)
        self.hooks[0].remove()

    def _note_ids(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.ids.append(kwargs["input_ids"])


def decode(models: Models, way: Way, job: Job) -> list[Record]:
    """Decode a batch; return one record for each row. Its seconds are the batch's, divided by its rows."""
    target = models.target
    inputs = padded(job.rows, target)
    statistics = CycleStatistics()
    options = keywords(models, way, statistics) | sampling(way.condition.temperature)
    if way.method in STATIC:
        options |= static_cache(models, way, job)
    is_watched = way.method not in (*UNDRAFTED, DFLASH)
    reset_peak(target.device)
    torch.manual_seed(job.seed)
    watch = ForwardWatch(target, with_ids=is_watched)
    started = now(target.device)
    if way.method == DFLASH:
        output = generate(target, inputs, job, options)
    else:
        with watch:
            output = generate(target, inputs, job, options)
    seconds = now(target.device) - started
    width = inputs["input_ids"].shape[1]
    texts = [cut(row, target) for row in output[:, width:].tolist()]
    cycles: list[list[Cycle] | None] = [*statistics.rows] or [[] for _ in texts]
    if is_watched:
        cycles = [followed([ids.tolist() for ids in watch.ids], width, texts[0])]
    times = time_split(way, seconds, statistics, watch.first_end, started)
    shares = {name: shared(value, len(job.rows)) for name, value in times.items()}
    peak = peak_memory(target.device)
    records = []
    bound = most_drafted(models, way.drafting)
    for row, tokens in enumerate(texts):
        record: Record = {**shares, "new_tokens": len(tokens), "token_ids": tokens}
        if way.method in UNDRAFTED:
            record |= UNKNOWN_CYCLES | {"drafted": [False] * len(tokens)}
        else:
            record |= cycle_fields(cycles[row], len(tokens), bound)
        record["peak_memory_bytes"] = peak
        records.append(record)
    return records


def time_split(
    way: Way, seconds: float, statistics: DecodeStatistics, first_end: float | None, started: float
) -> dict[str, float | None]:
    """Return the seconds of a decode and of its parts, which add up to it.

    Other methods than ours have two parts: up to the end of the target's first forward, and the rest.
    """
    if way.method != DFLASH:
        prefill = (first_end or started) - started
        parts: dict[str, float | None] = {"prefill_seconds": prefill}
        parts |= {"draft_seconds": None, "verify_seconds": None}
        return {"seconds": seconds, **parts, "rest_seconds": seconds - prefill}
    prefill = statistics.prefill_seconds
    draft, verify = statistics.draft_seconds, statistics.verify_seconds
    parts = {"prefill_seconds": prefill, "draft_seconds": draft, "verify_seconds": verify}
    return {"seconds": seconds, **parts, "rest_seconds": seconds - prefill - draft - verify}


def generate(target: Any, inputs: dict[str, Any], job: Job, options: dict[str, Any]) -> Any:
    """Call the target's `generate`, without penalties of its generation config."""
    plain = without_penalties(target)
    return target.generate(**inputs, max_new_tokens=job.max_new_tokens, **plain, **options)


def keywords(models: Models, way: Way, statistics: CycleStatistics) -> dict[str, Any]:
    """Return the arguments of `generate` that make it decode in this way."""
    draft = models.draft_of(way.drafting)
    if way.method == DFLASH:
        return {
            "custom_generate": draft.speculate,
            "statistics": statistics,
            "capture": models.capture,
            "proposal": models.proposal,
        }
    if way.method in (TRANSFORMERS, TRANSFORMERS_STATIC):
        return {"assistant_model": draft, "speculation_type": "dflash"}
    if way.method == ASSISTANT:
        return {"assistant_model": draft}
    if way.method == LOOKUP:
        return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    return {}


def static_cache(models: Models, way: Way, job: Job) -> dict[str, Any]:
    """Return the arguments of `generate` for a cache of fixed size, the same for all prompts, so that it compiles once.

    transformers compiles it on a GPU by itself; on a CPU only with `capture="compile"`. A block may reach beyond the
    text's end.
    """
    longest = max(job.longest, job.width + job.max_new_tokens)
    options: dict[str, Any] = {"cache_implementation": "static"}
    options["max_cache_len"] = longest + (way.drafting.block_size or 0)
    if models.capture == "compile":
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True
    return options


def most_drafted(models: Models, drafting: Drafting) -> int:
    """Return how many tokens a method drafts in a cycle at most; 0 if nothing bounds it or it drafts none."""
    if drafting.method == LOOKUP:
        return LOOKUP_TOKENS
    if drafting.method in (DFLASH, TRANSFORMERS, TRANSFORMERS_STATIC):
        return models.draft_of(drafting).config.num_drafted
    return 0


def sampling(temperature: float) -> dict[str, Any]:
    """Return the arguments of `generate` for greedy text at 0, and for the whole distribution above."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def padded(rows: Sequence[Sequence[int]], target: Any) -> dict[str, torch.Tensor]:
    """Return the rows, padded on the left, as `input_ids` and `attention_mask`, both `[B, P]`."""
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return {"input_ids": ids.to(target.device), "attention_mask": mask.to(target.device)}


def cut(tokens: list[int], target: Any) -> list[int]:
    """Return a row's new tokens up to its first end token, which padding may follow."""
    stops = set(stop_token_ids(target))
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def followed(
    forwards: Sequence[list[list[int]]], width: int, text: list[int]
) -> list[Cycle] | None:
    """Return the cycles of a method of transformers, from the ids of each forward of the target.

    A forward has the last committed token and the proposed ones. Those that the text repeats were accepted; after them
    comes the target's own. The first forward has the prompt in front. It is a cycle if tokens were proposed with it.

    Returns:
        The cycles; None if they do not add up to the text.
    """
    cycles, length = [], 0
    for number, ids in enumerate(forwards):
        proposed = ids[0][1:] if number else ids[0][width:]
        accepted = 0
        for token, own in zip(proposed, text[length:], strict=False):
            if token != own:
                break
            accepted += 1
        committed = min(accepted + 1, len(text) - length)
        length += committed
        if committed and (number or proposed):
            cycles.append(Cycle(len(proposed), accepted, committed))
    return cycles if length == len(text) else None


def cycle_fields(cycles: list[Cycle] | None, new_tokens: int, most: int) -> Record:
    """Return what a record says of its cycles; None where they are not known.

    Args:
        most: tokens that a cycle drafts at most; 0 if that is not known.
    """
    if cycles is None:
        return UNKNOWN_CYCLES
    committed = [cycle.committed for cycle in cycles]
    drafted = [False] * (new_tokens - sum(committed))  # the prefill's token
    for cycle in cycles:
        drafted += [True] * cycle.accepted + [False] * (cycle.committed - cycle.accepted)
    return {
        "committed": committed,
        "drafted": drafted,
        "speculative_decoding": engine_words(cycles, most),
    }


def engine_words(cycles: Sequence[Cycle], most: int) -> dict[str, Any]:
    """Return the counts as vLLM gives them for each request, with `--per-request-spec-decode-metrics detailed`.

    Args:
        most: tokens that a cycle drafts at most.
    """
    accepted = [cycle.accepted for cycle in cycles]
    drafted = [cycle.drafted for cycle in cycles]
    most = max([most, *drafted])
    by_length = {}
    for length in sorted(set(drafted)):
        of_length = [cycle.accepted for cycle in cycles if cycle.drafted == length]
        by_length[str(length)] = dense(of_length, length)
    return {
        "mean_acceptance_length": 1 + sum(accepted) / max(len(cycles), 1),
        "draft_acceptance_rate": sum(accepted) / max(sum(drafted), 1),
        "acceptance_histogram": dense(accepted, most),
        "acceptance_histogram_by_draft_length": by_length,
        "num_spec_steps": len(cycles),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "num_spec_tokens": most,
        "per_step_accepted": accepted,
        "per_step_drafted": drafted,
    }


def dense(values: Sequence[int], most: int) -> list[int]:
    """Return how often each of 0, 1, ... `most` is among the values."""
    counted = Counter(values)
    return [counted[value] for value in range(most + 1)]


def shared(value: float | None, rows: int) -> float | None:
    """Return one row's share of a time."""
    return None if value is None else value / rows


def reset_peak(device: torch.device) -> None:
    """Let the peak of memory begin here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took since `reset_peak`; None where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def attempted(run: Callable[[], list[Record]], rows: int) -> list[Record]:
    """Return the records of a decode; where it fails, records that say so."""
    try:
        return run()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = str(error).strip()[:LONGEST_ERROR] or "no message"
        return [{"error": f"{type(error).__name__}: {text}"} for _ in range(rows)]
