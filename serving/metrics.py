# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Figures for Prometheus, with vLLM's names behind a prefix of our own."""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answers import Answered

PREFIX = "dflash_hub_"


class Metrics:
    """Count requests, tokens and what was drafted, since the server began.

    Args:
        running: returns how many choices are decoded.
        waiting: returns how many wait.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        self._gauge("num_requests_running", "Choices that are decoded.").set_function(running)
        self._gauge("num_requests_waiting", "Choices that wait.").set_function(waiting)
        self.finished = self._counter(
            "request_success", "Choices that ended, by reason.", ["finished_reason"]
        )
        self.responses = self._counter("responses", "Responses, by status.", ["status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.new_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.cycles = self._counter("spec_decode_num_drafts", "Cycles, over all choices.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Of these, accepted.")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens, by place.", ["position"]
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "Until the first token.")
        self.whole = self._histogram("e2e_request_latency_seconds", "Until the last token.")

    def count(self, answers: Sequence[Answered], prompt_tokens: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.prompt_tokens.inc(prompt_tokens)
        self.whole.observe(seconds)
        for answer in answers:
            self.finished.labels(answer.finish).inc()
            self.new_tokens.inc(answer.tokens)
            self.cycles.inc(len(answer.cycles))
            for cycle in answer.cycles:
                self.drafted.inc(cycle.drafted)
                self.accepted.inc(cycle.accepted)
                for place in range(cycle.accepted):
                    self.accepted_at.labels(str(place)).inc()

    def page(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, what: str) -> Any:
        return Gauge(PREFIX + name, what, registry=self.registry)

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Any:
        return Counter(PREFIX + name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Any:
        return Histogram(PREFIX + name, what, registry=self.registry)
