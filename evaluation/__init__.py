# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure how much a draft speeds up a target."""

from .compare import (
    Comparison,
    compare,
    greedy,
    positions_left,
    stop_token_ids,
    warm_up,
    without_penalties,
)

__all__ = [
    "Comparison",
    "compare",
    "greedy",
    "positions_left",
    "stop_token_ids",
    "warm_up",
    "without_penalties",
]
