# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What verifying costs: measured once for a target, a device and a dtype, and kept in the cache folder.

This file travels with every pushed draft. On a large GPU a block of 64 costs little more than one token. On a CPU it
may cost ten times as much. After the width probe of CAST (arXiv 2610.00321).

Shapes: B rows, Q block positions.
"""

import hashlib
import json
import os
import tempfile
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from transformers.utils import logging

from .cache_dflash import roll_back

logger = logging.get_logger(__name__)

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Positions of the blocks that are measured."""

REPEATS = 4
"""How often each size is measured again, in turns. The fastest counts: the first ones may record a block."""

TIME_LIMIT = 3.0
"""Seconds after which no larger block is measured, once there are three sizes. Repeats end after twice as long."""


@dataclass
class CostTable:
    """Seconds of the verify forward by the size of the block.

    Args:
        sizes: ascending, two at least.
        measured: seconds of each.
    """

    sizes: list[int]
    measured: list[float]

    def __post_init__(self) -> None:
        # A smaller block costs no more, whatever else the machine did meanwhile.
        for place in reversed(range(len(self.measured) - 1)):
            self.measured[place] = min(self.measured[place : place + 2])

    def seconds(self, size: int) -> float:
        """Return what a block of `size` positions costs, between what was measured or in line with its end."""
        place = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        low, high = self.sizes[place - 1], self.sizes[place]
        slope = (self.measured[place] - self.measured[place - 1]) / (high - low)
        return self.measured[place - 1] + slope * (size - low)


def cost_table(state: Any, mode: str) -> CostTable:
    """Return the costs for a `DecodeState` after its prefill, from the cache folder or measured now.

    Args:
        mode: how blocks run, "eager", "graphs" or "compile".
    """
    table = known_costs(state, mode)
    if table is None:
        table = measure_costs(state)
        _write(_file(state, mode), table)
    return table


def known_costs(state: Any, mode: str) -> CostTable | None:
    """Return the costs from the cache folder; None if they were never measured."""
    return _read(_file(state, mode))


@torch.no_grad()
def measure_costs(state: Any) -> CostTable:
    """Measure blocks of growing size after the prompt of a `DecodeState`. What they write is overwritten later."""
    best: dict[int, float] = {}
    started = time.perf_counter()
    for size in BLOCK_SIZES:
        best[size] = _seconds(state, size)
        if len(best) >= 3 and time.perf_counter() - started > TIME_LIMIT:
            break
    for _ in range(REPEATS):
        if time.perf_counter() - started > 2 * TIME_LIMIT:
            break
        for size in best:
            best[size] = min(best[size], _seconds(state, size))
    return CostTable(list(best), list(best.values()))


def _seconds(state: Any, size: int) -> float:
    """Return how long it takes to verify a block of `size` and to know the result on the host."""
    target, target_state = state.target, state.target_state
    tokens = state.anchor.expand(-1, size).contiguous()  # [B, Q]
    target_state.cache.reserve(max(state.last_slots) + size)
    started = time.perf_counter()
    verified = target.verify(target_state, tokens, state.slots)
    verified.logits.argmax(dim=-1).tolist()
    elapsed = time.perf_counter() - started
    nothing = [0] * len(tokens)
    roll_back(target_state.recurrent, verified.snapshot, nothing, size)
    return elapsed


def _key(state: Any, mode: str) -> str:
    """Return a name for everything on which the costs depend, but the length of the text."""
    model, device = state.target.model, state.slots.device
    on_cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if on_cuda else torch.get_num_threads()
    facts = [
        type(model).__name__,
        model.config.to_json_string(use_diff=False),
        *(str(model.dtype), device.type, str(chip), mode, len(state.slots)),
        *(torch.__version__, transformers.__version__),
    ]
    text = json.dumps(facts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file(state: Any, mode: str) -> Path:
    return Path(constants.HF_HOME) / "dflash_hub" / "costs" / f"{_key(state, mode)}.json"


def _read(file: Path) -> CostTable | None:
    """Return what a file holds; None without one, or if it is damaged: then it is measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        sizes = [int(size) for size in found["sizes"]]
        measured = [float(seconds) for seconds in found["seconds"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = len(sizes) == len(measured) >= 2 and sizes == sorted(set(sizes))
    return CostTable(sizes, measured) if fits and min(measured) > 0 else None


def _write(file: Path, table: CostTable) -> None:
    """Keep a table. Where the folder takes no files, the next process measures again."""
    text = json.dumps({"sizes": table.sizes, "seconds": table.measured})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
        os.replace(name, file)
    except OSError as error:
        logger.debug("costs were not kept: %s", error)
