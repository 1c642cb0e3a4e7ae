# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure training of the built-in pair with the target's forward in every step, and from features on disk.

    python benchmarks/features.py --steps 30

Both take turns, with the same rows and anchors. Times are medians over steps, the first of each turn left out. The
last line is JSON: times, sizes, the largest difference of a loss, and by how much memory grows while rows are read.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.feature_data import open_features
from dflash_hub.training.feature_setup import FeatureArguments, FeatureJob, build_from_features
from dflash_hub.training.feature_writer import write
from dflash_hub.training.features import DTYPES
from dflash_hub.training.setup import TrainOptions, build

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "examples" / "tiny_pair"


class Clock(TrainerCallback):
    """Measures the seconds between the ends of steps, in which the next rows are read, too."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def main() -> None:
    """Run the whole script."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chosen = {"target": str(PAIR / "target"), "data": str(sources(folder / "rows.jsonl"))}
        chosen["draft"] = str(PAIR / "draft")
        job = FeatureJob(TrainOptions(**chosen), written_as(options, folder))
        began = time.perf_counter()
        write(folder / "features", job.plan, job.load, lambda shards, rows: None)
        seconds = time.perf_counter() - began
        result: dict[str, Any] = {
            "rows": len(job.plan.rows["train"]),
            "tokens": job.plan.tokens,
            "bytes_per_token": job.plan.origin.bytes_per_token,
            "tokens_per_second_written": round(job.plan.tokens / seconds),
        }
        result.update(compared(options, chosen, folder))
        result["read_mib_grown"] = round(grown(folder / "features", job.config), 1)
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=1, help="in a batch; the rows of the pair are 12"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def sources(path: Path) -> Path:
    """Write the sources of this package as rows of text."""
    texts = [source.read_text(encoding="utf-8") for source in sorted(ROOT.glob("*.py"))]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def written_as(options: argparse.Namespace, folder: Path) -> FeatureArguments:
    """Return how features are written."""
    return FeatureArguments(
        str(folder / "features"),
        dtype=options.dtype,
        shard_size=0.05,
        max_length=options.length,
        use_cpu=True,
    )


def compared(options: argparse.Namespace, chosen: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train both ways in turns; return milliseconds of a step, and how far losses are apart."""
    steps: dict[str, list[float]] = {"online": [], "features": []}
    losses: dict[str, list[float]] = {"online": [], "features": []}
    for _ in range(options.turns):
        for name in steps:
            clock = Clock()
            trainer = trainer_of(name, options, chosen, folder)
            trainer.add_callback(clock)
            trainer.train()
            steps[name] += clock.steps[1:]
            losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    medians = {f"{name}_ms": 1000 * statistics.median(found) for name, found in steps.items()}
    pairs = zip(losses["online"], losses["features"], strict=True)
    found: dict[str, Any] = {name: round(value, 1) for name, value in medians.items()}
    found["times_as_long"] = round(medians["features_ms"] / medians["online_ms"], 2)
    found["largest_difference_of_losses"] = max(abs(one - other) for one, other in pairs)
    return found


def trainer_of(
    name: str, options: argparse.Namespace, chosen: dict[str, str], folder: Path
) -> DFlashTrainer:
    """Return a fresh trainer of one of the two ways."""
    args = DFlashTrainingArguments(
        str(folder / name),
        max_steps=options.steps,
        per_device_train_batch_size=options.rows,
        num_anchors=options.anchors,
        max_length=options.length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    if name == "online":
        return build(TrainOptions(**chosen), args)
    fields = {"target": "", "data": "", "features": str(folder / "features")}
    config = open_features(fields["features"]).origin
    shape = {"block_size": config.block_size, "draft": chosen["draft"]}
    return build_from_features(TrainOptions(**fields, **shape), args)


def grown(folder: Path, config: Any) -> float:
    """Return by how many MiB memory grows while all rows are read twice."""
    rows = open_features(str(folder)).rows("train", config)
    assert rows is not None
    for number in range(min(20, len(rows))):
        rows[number]
    before = resident()
    for _ in range(2):
        for row in rows:
            del row
    return resident() - before


def resident() -> float:
    """Return how many MiB of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    main()
