# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode in a loop: draft, verify, accept, commit. The text is exactly the target's; only the time falls.

This file travels with every pushed draft. After DFlash (arXiv 2602.06036) and z-lab/dflash. `DecoderSession.decode`
(`generate_dflash`) calls `prefill` and then `decode`, with everything prepared.

Shapes: B rows, P prompt slots, N new positions, Q block positions, V vocabulary, F taps * target hidden size.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from .acceptance_dflash import Acceptance
from .cache_dflash import roll_back
from .outputs_dflash import StepOutputs
from .proposals_dflash import Proposal, Proposer, check_proposal
from .selfcheck_dflash import can_check_prompt, check_prompt
from .sequences_dflash import Prompt, Sequences
from .target_dflash import Target, TargetOutput, TargetState

SHOWN_POSITIONS = 15
"""Positions in the table of `DecodeStatistics`; a copy of earlier text may have 127."""


@dataclass
class DecodeStatistics:
    """Hold counts and times of a decode, filled by `generate(..., statistics=...)`; several decodes add up."""

    cycles: int = 0
    """Draft and verify forwards, each over the whole batch."""
    committed: list[int] = field(default_factory=list)
    """Tokens committed in each cycle, the target's own included; one entry for every row that was not finished."""
    accepted_at: list[int] = field(default_factory=list)
    """How often the drafted token at position 1, 2, ... of the block was accepted."""
    prefill_seconds: float = 0.0
    """Until the first token, which the prefill gives and no cycle counts."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    rest_seconds: float = 0.0
    """Everything else between the first token and the last: sampling, accepting, committing, streaming."""
    rollback_seconds: float = 0.0
    """Of the rest, taking rejected tokens back from recurrent layers."""
    stepwise: list[str] = field(default_factory=list)
    """Why tokens were accepted one by one: class names of foreign processors and criteria, and outputs that a batch
    returns for every step. All rows of a batch then commit equally many tokens in a cycle, so it takes longer. Empty if
    there was no such reason.
    """

    proposed: dict[str, int] = field(default_factory=dict)
    """How many cycles verified what, such as {"tree of 15": 40, "plain": 3}; numbers are positions after the anchor."""
    reasons: dict[str, str] = field(default_factory=dict)
    """For each of these why it was chosen, the last time; where there was a choice."""
    plain_seconds: float = 0.0
    """What a plain step of ours is estimated to take, which runs as blocks do; 0 where that is not known."""

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds + self.rest_seconds

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per cycle and row, pooled: tokens / cycles; 0 without cycles."""
        return sum(self.committed) / len(self.committed) if self.committed else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each drafted position of the block, the share of cycles in which its token was accepted.

        With blocks of several sizes, the divisor is all cycles.
        """
        return [count / len(self.committed) for count in self.accepted_at]

    def add_cycle(self, counts: list[tuple[int, int]], size: int) -> None:
        """Count one cycle of blocks of `size`.

        Example: two rows with the counts (3, 4) and (0, 1). The first committed 3 drafted tokens and the target's own.
        The second committed only the target's own.

        Args:
            counts: for each row, drafted tokens accepted and tokens committed; 0 committed once it is finished.
        """
        self.cycles += 1
        self.accepted_at += [0] * (
            size - 1 - len(self.accepted_at)
        )  # none if it is as long already
        for accepted, committed in counts:
            if committed:
                self.committed.append(committed)
            for position in range(min(accepted, committed)):
                self.accepted_at[position] += 1

    def __str__(self) -> str:
        """Return a short table."""
        rows = self._rows()
        width = max(map(len, rows))
        lines = []
        for name, value in rows.items():
            lines.append(f"{name:{width}}  {value}")
        return "\n".join(lines)

    __repr__ = __str__

    def _rows(self) -> dict[str, str]:
        """Return what is known, by its name."""
        name = "acceptance length"
        if not self.committed:
            return {name: "nothing was decoded yet"}
        tokens = sum(self.committed)
        per_row = ""
        if len(self.committed) > self.cycles:
            per_row = " of a row"
        length = f"{self.acceptance_length:.2f} tokens a cycle{per_row}"
        rows = {name: f"{length} ({tokens:,} tokens, {self.cycles:,} cycles)"}
        shares = []
        for share in self.acceptance_by_position[:SHOWN_POSITIONS]:
            shares.append(f"{share:.0%}")
        if len(self.accepted_at) > SHOWN_POSITIONS:
            shares.append("...")
        rows["accepted by position"] = " ".join(shares) or "nothing was drafted"
        if self.proposed:
            verified = []
            for label, count in self.proposed.items():
                verified.append(f"{label}: {count}")
            rows["cycles by what they verify"] = ", ".join(verified)
        if self.decode_seconds:
            rate = tokens / self.decode_seconds
            rows["tokens per second"] = f"{rate:.1f}"
            if self.plain_seconds:
                steps = self.acceptance_length * self.cycles
                ratio = steps * self.plain_seconds / self.decode_seconds
                rows["times plain steps of ours"] = f"{ratio:.2f}, estimated"
            times = []
            for phase in (
                "prefill",
                "draft",
                "verify",
                "rest",
            ):
                seconds = getattr(self, f"{phase}_seconds")
                times.append(f"{phase} {seconds:.3f}")
            rows["seconds"] = ", ".join(times)
        if self.stepwise:
            rows["accepted one by one for"] = ", ".join(self.stepwise)
        return rows


class Recorder:
    """Count the cycles of a decode in `DecodeStatistics`, and time its phases where that is asked for."""

    def __init__(self, statistics: DecodeStatistics, device: torch.device, is_timing: bool):
        self.statistics, self.device = statistics, device
        self.is_timing = is_timing

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time inside the context to `<name>_seconds`."""
        return self._timed(name) if self.is_timing else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = now(self.device)
        yield
        field_name = f"{name}_seconds"
        setattr(
            self.statistics,
            field_name,
            getattr(self.statistics, field_name) + now(self.device) - started,
        )

    def record_stepwise(self, names: list[str]) -> None:
        """Add the reasons to accept tokens one by one."""
        known = getattr(self.statistics, "stepwise", [])  # an object of the caller's may lack it
        self.statistics.stepwise = list(dict.fromkeys([*known, *names]))

    def record_cycle(self, counts: list[tuple[int, int]], proposal: Proposal) -> None:
        """Count a cycle, see `DecodeStatistics.add_cycle`."""
        self.statistics.add_cycle(counts, proposal.size)
        proposed = getattr(
            self.statistics, "proposed", None
        )  # an object of the caller's may lack it
        if proposed is not None:
            label = proposal.label
            proposed[label] = proposed.get(label, 0) + 1
            if proposal.reason:
                self.statistics.reasons[label] = proposal.reason


def now(device: torch.device) -> float:
    """Return seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class DecodeState:
    """Hold a batch while it is decoded. `prefill` makes it ready for the first cycle.

    Args:
        target_state: what the target holds of this decode.
    """

    def __init__(
        self,
        target: Target,
        target_state: TargetState,
        prompt: Prompt,
        sequences: Sequences,
        acceptance: Acceptance,
        step_outputs: StepOutputs,
    ):
        self.target, self.target_state = target, target_state
        self.prompt, self.sequences = prompt, sequences
        self.acceptance, self.step_outputs = acceptance, step_outputs
        rows = len(prompt.input_ids)
        self.slots = torch.full((rows,), prompt.width - 1, device=prompt.device)
        """`[B]`, the slot of each row's anchor."""
        self.anchor = torch.zeros_like(self.slots)[:, None]
        """`[B, 1]`, each row's last committed token. Nothing reads it before the prefill has committed one."""

    @property
    def last_slots(self) -> list[int]:
        """The slot of each row's last committed token, on the host."""
        return [self.prompt.width + len(tokens) - 1 for tokens in self.sequences.generated]

    @property
    def next_slots(self) -> list[int]:
        """The slot of each row's next token, on the host."""
        return [slot + 1 for slot in self.last_slots]

    def user_code(self) -> AbstractContextManager[None]:
        """Let processors, stopping criteria and streamers that are not transformers' own call the target inside."""
        runs = self.acceptance.reasons or self.sequences.streamer is not None
        return self.target.attention.uninstalled() if runs else nullcontext()

    def append_tokens(self, tokens: list[list[int]]) -> list[int]:
        """Append each row's new tokens to its text, up to where it ends; return how many of them became text.

        Raises:
            ValueError: the target's logits are not numbers.
        """
        self._check_numbers(tokens)
        return self.sequences.append_tokens(tokens)

    def commit(self) -> None:
        """Move each row to its new anchor, its last token. What was accepted is known on the host by now."""
        device = self.slots.device
        self.slots = torch.tensor(self.last_slots, device=device)
        # A text may have no room for any token.
        last = [tokens[-1:] or [0] for tokens in self.sequences.generated]
        self.anchor = torch.tensor(last, device=device)

    def _check_numbers(self, tokens: list[list[int]]) -> None:
        """Refuse the token -1, which stands for NaN logits, in a row that is not finished."""
        for row, active in zip(tokens, self.sequences.active, strict=True):
            if active and min(row) < 0:
                raise ValueError(
                    f"The logits of {self.target.name} are NaN, so no token can be chosen: it may overflow in "
                    f"{self.target.model.dtype}, or its weights are broken."
                )


@torch.no_grad()
def prefill(state: DecodeState, proposer: Proposer, first_slot: int, check_size: int) -> bool:
    """Run the prompt through the target, its context features to the proposer, and commit each row's first token.

    Args:
        first_slot: of the prompt that no cache holds yet.
        check_size: of the block with which the end of the prompt is checked, see `selfcheck_dflash`; 0 for no check.

    Returns:
        Whether the prompt was checked.
    """
    prompt = state.prompt
    target, target_state = state.target, state.target_state
    checked = False
    for first, last in prompt.chunks(first_slot, recurrent=bool(target_state.recurrent.states)):
        checks = first == 0 and check_size > 0 and can_check_prompt(prompt, last, check_size)
        output = run_chunk(state, first, last, check_size if checks else 1)
        if checks:
            check_prompt(target, target_state, prompt, output)
            checked = True
        proposer.append_context(output.features, first)
    state.step_outputs.collect_prompt(output, first, last)
    logits = output.logits[:, -1:].to(state.slots.device)
    with state.user_code():
        state.acceptance.accept(state, Proposal(state.anchor), logits)
    state.commit()
    return checked


def run_chunk(state: DecodeState, first: int, last: int, num_logits: int) -> TargetOutput:
    """Run the prompt's slots `first` to before `last`, given those before.

    Args:
        num_logits: how many last positions get logits, if the part is the first. A later part gets them for its last
            position only.
    """
    prompt = state.prompt
    if first == 0:
        inputs = prompt.model_inputs(state.target.model, last)
        return state.target.prefill(state.target_state, inputs, num_logits)
    slots = torch.arange(first, last, device=prompt.device)
    slots = slots.expand(len(state.slots), -1)
    positions = prompt.positions[..., first:last]
    return state.target.prefill_chunk(state.target_state, prompt.ids(first, last), slots, positions)


@torch.no_grad()
def decode(state: DecodeState, proposer: Proposer, recorder: Recorder) -> None:
    """Decode every row to its end.

    Raises:
        ValueError: the target's logits are not numbers.
    """
    target, target_state = state.target, state.target_state
    while not state.sequences.finished:
        with recorder.phase("draft"):
            proposal = check_proposal(proposer.propose(state), state.anchor)  # a tree for each row
            proposal = state.acceptance.complete(proposal).with_root(state.anchor)
        with recorder.phase("verify"):
            target_state.cache.reserve(max(state.last_slots) + proposal.size)
            verified = target.verify(target_state, proposal.tokens, state.slots, proposal.ancestors)
        with recorder.phase("rest"), state.user_code():
            accepted = state.acceptance.accept(state, proposal, verified.logits)  # and append
            if proposal.parents is not None and not accepted.in_place:
                verified = target.move_path(target_state, verified, state.slots, accepted.path)
            # Before `state.commit` moves the slots: the block's outputs belong to the old anchor.
            state.step_outputs.collect_layers(verified, accepted, state.slots)
            proposer.commit(verified.features, state.slots)
            state.commit()
            target_state.advance(max(accepted.committed))
            with recorder.phase("rollback"):
                roll_back(
                    target_state.recurrent, verified.snapshot, accepted.committed, proposal.size
                )
        recorder.record_cycle(accepted.written, proposal)
