# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write how often a draft is right in the words of Model Optimizer: `speculation_profile.json`."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import write_whole
from .results import by_position
from .ways import DFLASH

FILE = "speculation_profile.json"


def write_profiles(folder: Path, report: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Write the profile of every way with a draft; where there are several, each into a folder of its own."""
    drafted = [index for index, way in enumerate(report["ways"]) if way["method"] == DFLASH]
    for index in drafted:
        own = [record for record in records if record["way"] == index and not record["error"]]
        profile = profile_of(report, index, own)
        if profile is None:
            continue
        home = folder if len(drafted) == 1 else folder / f"way-{index}"
        home.mkdir(exist_ok=True)
        write_whole(home / FILE, json.dumps(profile, indent=2).encode() + b"\n")


def profile_of(
    report: dict[str, Any], index: int, records: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the profile of one way; None if its records have no cycle.

    A length is the number of accepted drafted tokens and one more. So the mean is one more than the sum of the
    marginal rates.
    """
    lengths: Counter[int] = Counter()
    means = []
    for record in records:
        words = record["speculative_decoding"]
        for accepted, cycles in words["acceptance_histogram"].items():
            lengths[int(accepted) + 1] += cycles
        if words["num_spec_steps"]:
            means.append(words["mean_acceptance_length"])
    if not means:
        return None
    rates = by_position(records)
    steps = lengths.total()
    tokens = sum(length * count for length, count in lengths.items())
    return {
        "method": DFLASH,
        "measured": True,
        "num_speculative_tokens": len(rates["marginal"]),
        "conditional_accept_rates": rates["conditional"],
        "marginal_accept_rates": rates["marginal"],
        "mean_accept_length": tokens / steps,
        "mean_accept_length_per_request": sum(means) / len(means),
        "acceptance_length_histogram": {str(key): lengths[key] for key in sorted(lengths)},
        "measurement_conditions": conditions_of(report, index, len(means)),
    }


def conditions_of(report: dict[str, Any], index: int, samples: int) -> dict[str, Any]:
    """Return how the profile was measured."""
    way, settings = report["ways"][index], report["settings"]
    environment = report["environment"]
    return {
        "dataset": report["prompt_set"]["name"],
        "osl": settings["max_new_tokens"],
        "num_samples": samples,
        "target": settings["target"],
        "draft": way["draft"],
        "temperature": way["temperature"],
        "batch_size": way["batch_size"],
        "dtype": settings["dtype"],
        "hardware": environment["hardware"],
        "engine": f"dflash-hub {environment['dflash_hub']}, transformers {environment['transformers']}",
        "date": environment["date"],
        "validation": "greedy or sampled decoding by the target itself",
    }
