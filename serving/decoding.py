# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode batches of choices by the target's `generate`, and hand every token over in the cycle that commits it.

Rows end one by one: at their own limit, at a stop string, or when their client leaves.

Shapes: B rows, P prompt slots, N new positions, F taps * target hidden size.
"""

import copy
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..evaluation.compare import stop_token_ids
from ..evaluation.decoding import Cycle, CycleStatistics, padded
from ..execution_dflash import resolve_mode
from ..proposals_dflash import Proposal, Proposer
from ..sequences_dflash import Sequences
from ..target_dflash import is_recurrent
from .choices import Choice, Options, Piece
from .processors import LogprobRecord, Penalties
from .text import Writer
from .waiting import Waiting

logger = logging.getLogger(__name__)

WARM_UP = 8
"""Tokens of the texts that are decoded before the first request."""
LONG = 256
"""Tokens of texts for which blocks are prepared then."""


class AllEnded(Exception):
    """End a decode whose rows have all ended."""


@dataclass(frozen=True)
class Proposing:
    """Say how blocks are proposed and run, as in `draft.speculate`."""

    capture: str = "auto"
    proposal: str = "auto"
    width: int | None = None


class Decoder:
    """Decode batches with a target, its draft and their tokenizer."""

    def __init__(self, target: Any, draft: Any, tokenizer: Any, proposing: Proposing | None = None):
        self.target, self.draft = target, draft
        self.tokenizer = tokenizer
        self.proposing = proposing or Proposing()
        self.ends = frozenset(stop_token_ids(target))

    @property
    def defaults(self) -> Any:
        """How the target chooses its tokens where nobody says otherwise."""
        return self.target.generation_config

    @property
    def context(self) -> int | None:
        """Positions of the target; None if it names none."""
        text = self.target.config.get_text_config(decoder=True)
        return getattr(text, "max_position_embeddings", None)

    def decode(self, choices: list[Choice]) -> None:
        """Decode choices of equal options to their ends. What fails is told to those who wait."""
        mode = self.mode(max(choice.limit for choice in choices))
        rows = Rows(self, choices, mode, self.proposing.proposal)
        try:
            rows.hand_over(self._generate(rows, choices))
        except AllEnded:
            pass
        except Exception as error:
            logger.debug("A batch of %d failed", len(choices), exc_info=True)
            rows.fail(f"{type(error).__name__}: {error}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def mode(self, new_tokens: int) -> str:
        """Return how blocks of texts of so many tokens run."""
        capture = self.proposing.capture
        return resolve_mode(capture, self.target, is_recurrent(self.target), new_tokens)

    def warm_up(self, rows: int) -> None:
        """Decode short texts: the self-check runs, costs are measured, and blocks compiled, before anyone waits.

        Raises:
            Exception: whatever decoding raises.
        """
        prompt = self.tokenizer("Once upon a time").input_ids or [0]
        pieces: list[Piece] = []
        choice = Choice(prompt, Options((("do_sample", False),)), WARM_UP, (), pieces.append)
        choices = [replace(choice) for _ in range(rows)]
        with suppress(AllEnded):
            self._generate(Rows(self, choices, self.mode(LONG), self._measuring()), choices)

    def _measuring(self) -> str:
        """Return the kind of proposals that has costs measured in a text of any length, where they are needed."""
        return "tree" if self.proposing.proposal == "auto" else self.proposing.proposal

    def _generate(self, rows: "Rows", choices: list[Choice]) -> list[list[int]]:
        """Return the new tokens of each of these choices, padded after its end."""
        options = choices[0].options
        inputs = padded([choice.prompt for choice in choices], self.target)
        width = inputs["input_ids"].shape[1]
        rows.record = None if options.alternatives is None else LogprobRecord(options.alternatives)
        keywords = _keywords(options, width)
        if rows.record is not None:
            keywords.setdefault("logits_processor", []).insert(0, rows.record)
        if options.seed is None:
            torch.seed()
        else:
            torch.manual_seed(options.seed)
        output = self.target.generate(
            **inputs,
            **keywords,
            max_new_tokens=max(choice.limit for choice in choices),
            custom_generate=self.draft.speculate,
            proposer=rows.proposer,
            statistics=rows.statistics,
            capture=rows.mode,
        )
        return output[:, width:].tolist()


def _keywords(options: Options, width: int) -> dict[str, Any]:
    """Return the keywords of `generate` that choose tokens after prompts of `width` slots."""
    found = copy.deepcopy(dict(options.keywords))
    if "sequence_bias" in found:
        found["sequence_bias"] = [[list(tokens), bias] for tokens, bias in found["sequence_bias"]]
    if options.penalties:
        found["logits_processor"] = [Penalties(width, *options.penalties)]
    return found


class Rows:
    """Hold the rows of a batch while it is decoded. Propose what another proposer does, and look at them in each cycle.

    Args:
        mode: how blocks run.
        proposal: what a cycle verifies.
    """

    def __init__(self, decoder: Decoder, choices: list[Choice], mode: str, proposal: str):
        self.decoder, self.choices = decoder, choices
        self.mode, self.proposal = mode, proposal
        self.statistics = CycleStatistics()
        self.record: LogprobRecord | None = None
        self.writers = [Writer(decoder.tokenizer, choice, decoder.ends) for choice in choices]
        self.num_seen = [0] * len(choices)
        self.has_ended = [False] * len(choices)
        self.sequences: Sequences | None = None
        """What the decode has committed; None before its first cycle."""
        self.own: Any = None
        """The proposer that proposes."""

    def proposer(self, own: Proposer) -> "Rows":
        """Take the draft's own proposer, and return what `generate` asks in each cycle."""
        decoder = self.decoder
        make = decoder.draft.speculate.proposer_factory(
            decoder.target, self.mode, self.proposal, decoder.proposing.width
        )
        self.own = make(own)
        return self

    def append_context(self, features: torch.Tensor, first_slot: int) -> None:
        """Hand `features [B, N, F]` of a part of the prompts on, unless nobody waits any more."""
        self._check_clients()
        self.own.append_context(features, first_slot)

    def propose(self, state: Any) -> Proposal:
        """Look at what the last cycle committed, and propose for the next one."""
        self.sequences = state.sequences
        self._check_clients()
        self.hand_over(state.sequences.generated)
        return self.own.propose(state)

    def commit(self, features: torch.Tensor, slots: torch.Tensor) -> None:
        """Hand `features [B, Q, F]` of a verified block on, whose anchors have `slots [B]`."""
        self.own.commit(features, slots)

    def hand_over(self, generated: list[list[int]]) -> None:
        """Deliver what is new of each row.

        Args:
            generated: all tokens of each row so far.

        Raises:
            AllEnded: all rows have ended.
        """
        for row, tokens in enumerate(generated):
            if not self.has_ended[row]:
                self._deliver(row, tokens[self.num_seen[row] :])
                self.num_seen[row] = len(tokens)
        self._check_ends()

    def fail(self, error: str) -> None:
        """Tell those who wait that decoding failed."""
        for row, choice in enumerate(self.choices):
            if not self.has_ended[row]:
                choice.deliver(Piece(error=error))

    def _deliver(self, row: int, tokens: list[int]) -> None:
        choice, writer = self.choices[row], self.writers[row]
        if not tokens:
            return
        logprobs = [] if self.record is None else self.record.take(tokens[-1])
        piece = writer.write(tokens, logprobs)
        if piece.finish:
            cycles = self.statistics.rows[row] if self.statistics.rows else []
            piece.cycles = cut(cycles, writer.num_tokens)
            self._end(row)
        choice.deliver(piece)

    def _end(self, row: int) -> None:
        self.has_ended[row] = True
        if self.sequences is not None:
            self.sequences.end_row(row)

    def _check_clients(self) -> None:
        """End the rows whose clients have left.

        Raises:
            AllEnded: all rows have ended.
        """
        for row, choice in enumerate(self.choices):
            if choice.cancelled and not self.has_ended[row]:
                self._end(row)
        self._check_ends()

    def _check_ends(self) -> None:
        if all(self.has_ended):
            raise AllEnded


def cut(cycles: list[Cycle], num_tokens: int) -> list[Cycle]:
    """Return the cycles that committed the first `num_tokens`, of which the first is the prefill's."""
    found, left = [], num_tokens - 1
    for cycle in cycles:
        committed = min(cycle.committed, left)
        if committed > 0:
            found.append(Cycle(cycle.drafted, min(cycle.accepted, committed), committed))
        left -= committed
    return found


class Worker(threading.Thread):
    """Decode what waits, until the queue is closed and empty.

    Args:
        decode: a batch.
    """

    def __init__(self, waiting: Waiting, decode: Callable[[list[Choice]], None]):
        super().__init__(name="dflash-hub-decoding", daemon=True)
        self.waiting, self.decode = waiting, decode

    def run(self) -> None:
        while self._run_batch():
            pass

    def _run_batch(self) -> bool:
        """Decode the next batch, which nothing holds afterwards; return False once there is none."""
        batch = self.waiting.take()
        if batch:
            self.decode(batch)
        return bool(batch)
