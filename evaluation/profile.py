# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write how often a draft is right in the words of Model Optimizer: `speculation_profile.json`.

The fields are those of its `specdec_bench`, schema version 1.0.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..files import write_whole
from .results import accepted_counts, by_position
from .ways import DFLASH

FILE = "speculation_profile.json"
SCHEMA_VERSION = "1.0"
TOLERANCE = 0.02
"""How far the mean may be from that of the rates, as Model Optimizer has it."""


def write_profiles(folder: Path, report: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Write the profile of every way with a draft; where there are several, each into a folder of its own.

    It is one of chains: of an evaluation with other proposals nothing is written.
    """
    if report["settings"].get("proposal", "chain") != "chain":
        return
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
    words = [record["speculative_decoding"] for record in records]
    means = [one["mean_acceptance_length"] for one in words if one["num_spec_steps"]]
    if not means:
        return None
    way, rates = report["ways"][index], by_position(records)
    mean, drafted = mean_length(records), len(rates["marginal"])
    counts = accepted_counts(records)
    histogram = {str(accepted + 1): count for accepted, count in enumerate(counts) if count}
    target = checkpoint(report["settings"]["target"], report["settings"]["target_revision"])
    return {
        "schema_version": SCHEMA_VERSION,
        "measured": True,
        "method": way["kind"] or DFLASH,
        "draft_checkpoint": checkpoint(way["draft"], way["revision"]),
        "target_model": target,
        "num_speculative_tokens": drafted,
        "block_size": way["block_size"],
        "max_supported_k": drafted,
        "verification_method": "longest_prefix",
        "conditional_accept_rates": rates["conditional"],
        "marginal_accept_rates": rates["marginal"],
        "mean_accept_length": mean,
        "mean_accept_length_per_request": sum(means) / len(means),
        "accept_length_model": "measured_per_k",
        "accept_length_by_k": {str(drafted): mean},
        "acceptance_length_histogram": histogram,
        "per_category": per_category(report, records),
        "measurement_conditions": conditions_of(report, index, len(means)),
        "validation": checks(mean, rates["marginal"]),
    }


def checkpoint(name: str, revision: str | None) -> dict[str, Any]:
    """Return what names a model: of a folder its last two parts, since a profile is for publishing."""
    parts = Path(name).parts[-2:]
    return {"id": "/".join(part for part in parts if part != "/"), "revision": revision}


def mean_length(records: Sequence[dict[str, Any]]) -> float:
    """Return the accepted drafted tokens of a cycle and one more, over all cycles."""
    counts = accepted_counts(records)
    tokens = sum((accepted + 1) * count for accepted, count in enumerate(counts))
    return tokens / sum(counts)


def per_category(
    report: dict[str, Any], records: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return the mean length of every category that has a cycle."""
    category_of = {prompt["id"]: prompt["category"] for prompt in report["prompts"]}
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["speculative_decoding"]["num_spec_steps"]:
            members[category_of[record["prompt"]]].append(record)
    return {name: {"mean_accept_length": mean_length(own)} for name, own in members.items()}


def checks(mean: float, marginal: Sequence[float]) -> dict[str, Any]:
    """Return the two checks that readers of a profile expect with it."""
    implied = 1 + sum(marginal)
    violations = []
    for position, (before, value) in enumerate(pairwise(marginal), start=1):
        if value > before:
            violations.append({"position": position, "value": value, "previous": before})
    consistency: dict[str, Any] = {"implied_mean_accept_length": implied}
    consistency["reported_mean_accept_length"] = mean
    consistency["abs_delta"] = abs(implied - mean)
    consistency["tolerance"] = TOLERANCE
    consistency["passed"] = consistency["abs_delta"] <= TOLERANCE
    monotonicity = {"passed": not violations, "violations": violations}
    return {"mean_consistency": consistency, "marginal_monotonicity": monotonicity}


def conditions_of(report: dict[str, Any], index: int, samples: int) -> dict[str, Any]:
    """Return how the profile was measured."""
    way, settings = report["ways"][index], report["settings"]
    environment = report["environment"]
    return {
        "dataset": report["prompt_set"]["name"],
        "osl": settings["max_new_tokens"],
        "num_samples": samples,
        "temperature": way["temperature"],
        "batch_size": way["batch_size"],
        "dtype": settings["dtype"],
        "hardware": environment["hardware"],
        "engine": f"dflash-hub {environment['dflash_hub']}, transformers {environment['transformers']}",
        "date": environment["date"],
        "thinking": settings["thinking"],
        "chat_template": settings["chat_template"],
    }
