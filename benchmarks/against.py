# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compare a training step with that of other programs: one process each, which take turns, on one CPU.

All have the target's features given, the same shapes and as many anchors, and AdamW. Each draws its own tokens and
weights. The environments of the other programs are those of `contracts/environments.py`, which makes them from PyPI.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = ("speculators", "nemo")
FIGURES = ("process_seconds", "seconds", "peak_mib")


def compare(options: argparse.Namespace, body: dict[str, Any]) -> None:
    """Run the steps, and print medians, ratios and one line of JSON.

    Args:
        body: the fields of the target's config.
    """
    given = {**vars(options), "body": body, "taps": [1, 2, 3, 4, 5]}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *options.against)}
    with ExitStack() as stack:
        running = {name: stack.enter_context(stepping(name, given)) for name in costs}
        for number in range(options.steps + 1):
            for name, process in running.items():
                found = step(name, process)
                if number:  # the first step includes warm-up
                    costs[name].append(found)
    show(costs, given)


def interpreter(name: str) -> Path:
    """Return the Python that runs a program's steps.

    Raises:
        ValueError: its environment has not been made.
    """
    if name == "ours":
        return Path(sys.executable)
    sys.path.append(str(HERE.parent / "contracts"))
    import environments

    found = environments.python(name)
    if found is None:
        raise ValueError(
            f"The environment of {environments.READERS[name].release} is not in {environments.FOLDER}: "
            f"`python contracts/environments.py {name}` makes it, from PyPI."
        )
    return found


@contextmanager
def stepping(name: str, given: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """Start the process that runs a program's steps, and end it after the context."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    if name != "ours":
        env.pop("PYTHONPATH", None)
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["OMP_NUM_THREADS"] = str(given["threads"])
    script = HERE / "steps" / f"step_{name}.py"
    process = subprocess.Popen(
        [interpreter(name), script, json.dumps(given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    answer(name, process)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def step(name: str, process: subprocess.Popen) -> dict[str, float]:
    """Let a process run one step, and return its costs."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(name, process)


def answer(name: str, process: subprocess.Popen) -> dict[str, float]:
    """Return the next line of JSON of a process.

    Raises:
        RuntimeError: it has ended.
    """
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"The steps of {name} ended; run benchmarks/steps/step_{name}.py by hand.")


def show(costs: dict[str, list[dict[str, float]]], given: dict[str, Any]) -> None:
    """Print the table, and one line of JSON."""
    medians = {
        name: {figure: statistics.median(one[figure] for one in steps) for figure in FIGURES}
        for name, steps in costs.items()
    }
    print(f"{'':14}" + "".join(figure.rjust(17) for figure in FIGURES) + "   load")
    for name, found in medians.items():
        cells = "".join(f"{found[figure]:17.2f}" for figure in FIGURES)
        print(f"{name:14}{cells}   {os.getloadavg()[0]:.1f}")
    ratios: dict[str, dict[str, float]] = {}
    for name in given["against"]:
        ratios[name] = {key: medians["ours"][key] / medians[name][key] for key in FIGURES}
        cells = ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios[name].items())
        print(f"ours over {name}: {cells}")
    print(json.dumps({"options": given, "medians": medians, "ratios": ratios}))
