# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run training steps of a draft in a process of its own: one at each line of stdin, its costs as a line of JSON.

`benchmarks/train.py --against` starts such a process for each program, in that program's environment, and lets them
take turns. What each is given is drawn here: tokens, and the target's features and last states.
"""

import argparse
import ctypes
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], torch.Tensor]


def options() -> argparse.Namespace:
    """Return the options of `benchmarks/train.py`, which are the one argument of the process."""
    given = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    return given


def inputs(given: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return tokens `[1, S]`, the features `[1, S, F]` of five taps and the last states `[1, S, H]` of a target."""
    width, length = given.body["hidden_size"], given.length
    return {
        "ids": torch.randint(given.vocab, (1, length)),
        "features": torch.randn(1, length, len(given.taps) * width),
        "last": torch.randn(1, length, width),
    }


def serve(draft: Any, loss: Step, device: str = "cpu") -> None:
    """Run a step at each line of stdin: forward, backward, optimizer.

    Args:
        loss: computes the loss of a step.
    """
    weights = [weight for weight in draft.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    print(json.dumps({"parameters": sum(weight.numel() for weight in weights)}), flush=True)
    for _ in sys.stdin:
        before = resident_after_trim()
        started, used = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        costs = {
            "seconds": time.perf_counter() - started,
            "process_seconds": time.process_time() - used,
            "peak_mib": resident("VmHWM") - before,
            "loss": float(value.detach()),
        }
        del value
        print(json.dumps(costs), flush=True)


def resident_after_trim() -> float:
    """Return the resident memory in MiB, once what the allocator holds unused is given to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> float:
    """Return a field of /proc/self/status, in MiB."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**10
