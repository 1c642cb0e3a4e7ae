# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Interrupt runs at random moments, resume them, and compare their results with those of uninterrupted runs.

    python benchmarks/kills.py                               # ten moments for each job and each signal
    python benchmarks/kills.py --jobs train --moments 30     # one job, more moments
    python benchmarks/kills.py --jobs decodes --decodes 300  # memory, hooks, threads and files of many decodes

Jobs run on tiny models, each run in a fork of this process. A run gets SIGINT, SIGTERM or SIGKILL at a moment between
its start and the end of the uninterrupted run. It is resumed by the same call. `push` pushes both layouts with
`draft.push_to_hub`, to a Hub of the tests. The exit status is 1 if anything differs. Each job ends with a line of JSON.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
ROWS = 60
TARGET = Path(__file__).parents[1] / "examples" / "tiny_pair" / "target"


class Regenerate:
    """Rows that an answering function rewrites; the result is the output, by row."""

    @staticmethod
    def run(folder: Path) -> None:
        from dflash_hub.training.regenerate import regenerate

        def answer(row: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.01)
            return {"text": row["text"] * 500}

        rows = [{"text": f"row {number} "} for number in range(ROWS)]
        regenerate(rows, folder / "out.jsonl", answer, 4, lambda done, failed: None)

    @staticmethod
    def result(folder: Path) -> Any:
        lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        return sorted((line["row"], line["text"]) for line in lines)

    @staticmethod
    def check(folder: Path, whole: Any) -> None:
        """Whatever the killed run left is resumed from."""


class Train:
    """A run with a checkpoint at every second step; the result is the weights that it saves at the end."""

    steps = 8

    @classmethod
    def run(cls, folder: Path) -> None:
        import training_run
        from dflash_hub.training.trainer import last_checkpoint

        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": cls.steps}
        trainer = training_run.trainer(folder / "draft", **options)
        resume = last_checkpoint(folder / "draft") is not None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()

    @staticmethod
    def result(folder: Path) -> Any:
        from dflash_hub import load_draft
        from dflash_hub.publishing.probe import digests

        return digests(load_draft(folder / "draft"))

    @classmethod
    def check(cls, folder: Path, whole: Any) -> None:
        """A draft in the output folder is that of the end of the run."""
        if (folder / "draft" / "config.json").exists():
            expect("the draft that the killed run left", cls.result(folder) == whole)


class Features:
    """Features of the built-in target in shards of a row or two; the result is the files."""

    @staticmethod
    def run(folder: Path) -> None:
        from dflash_hub.training.feature_setup import FeatureArguments, FeatureJob
        from dflash_hub.training.feature_writer import write
        from dflash_hub.training.setup import TrainOptions

        data, out = folder.parent / "rows.jsonl", folder / "features"
        rows = [{"input_ids": list(range(2, 40 + number))} for number in range(ROWS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shape = {"block_size": 8, "target_layer_ids": [1, 2, 4], "mask_token_id": 1}
        options = TrainOptions(str(TARGET), str(data), **shape)
        given = FeatureArguments(str(out), max_length=100, shard_size=2e-4, use_cpu=True)
        job = FeatureJob(options, given)
        write(out, job.plan, job.load, lambda shards, rows: None)

    @staticmethod
    def result(folder: Path) -> Any:
        paths = (path for path in (folder / "features").rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    @staticmethod
    def check(folder: Path, whole: Any) -> None:
        """Shards that are there are whole."""
        for path, found in Features.result(folder).items():
            if "-of-" in path:
                expect(path, found == whole[path])


class Push:
    """A push of both layouts; the result is the files of both branches, by their digests."""

    @staticmethod
    def run(folder: Path) -> None:
        import tiny

        tiny.draft(tiny.target("qwen3")).push_to_hub(f"tester/{folder.name}")

    @staticmethod
    def result(folder: Path) -> Any:
        return {name: branch_files(folder.name, name) for name in ("main", "engines")}

    @classmethod
    def check(cls, folder: Path, whole: Any) -> None:
        """A branch is new as a whole, or as it was; a fresh one begins as a copy of `main`."""
        for name, files in cls.result(folder).items():
            states = ({}, whole["main"], whole[name])
            expect(f"branch {name}", files in states)


JOBS: dict[str, Any] = {
    "regenerate": Regenerate,
    "features": Features,
    "train": Train,
    "push": Push,
}


def branch_files(repo: str, branch: str) -> dict[str, str]:
    """Return path -> digest, without the card, which names its repository; empty if there is no draft."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        tree = list(HfApi().list_repo_tree(f"tester/{repo}", revision=branch, recursive=True))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return {}
    files = {entry.path: entry.blob_id for entry in tree if hasattr(entry, "blob_id")}
    unwritten = {"README.md", ".gitattributes"}
    return {path: digest for path, digest in files.items() if path not in unwritten}


def expect(what: str, is_right: bool) -> None:
    """Raise AssertionError where something differs from the uninterrupted run."""
    if not is_right:
        raise AssertionError(f"{what} differs from the uninterrupted run")


def start(job: Any, folder: Path) -> int:
    """Fork a process that runs the job, and return its id; its output goes to a file in `folder`."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (1, 2):  # stdout and stderr
            os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        tempfile.tempdir = str(folder)
        job.run(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    """Wait for a process, and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupted(job: Any, folder: Path, number: signal.Signals, after: float) -> int:
    """Run the job and send it a signal after so many seconds; return its exit status."""
    pid = start(job, folder)
    time.sleep(after)
    os.kill(pid, number)  # one that has ended is not reaped yet
    return finish(pid)


def run_job(
    name: str,
    moments: int,
    signals: list[signal.Signals],
    generator: random.Random,
    folder: Path,
) -> dict[str, Any]:
    """Interrupt and resume a job `moments` times with each of the signals; return the counts."""
    job = JOBS[name]
    began = time.monotonic()
    expect(f"the exit status of {name}", finish(start(job, folder / f"{name}-whole")) == 0)
    seconds = time.monotonic() - began
    whole = job.result(folder / f"{name}-whole")
    ended = dict.fromkeys((number.name for number in signals), 0)
    for moment in range(moments):
        for number in signals:
            place = folder / f"{name}-{number.name}-{moment}"
            status = interrupted(job, place, number, generator.uniform(0, seconds))
            ended[number.name] += status != 0
            job.check(place, whole)
            if finish(start(job, place)) != 0:
                raise AssertionError((place / "output").read_text())
            expect(f"{name} after {number.name}", job.result(place) == whole)
            left = [path for path in place.rglob("*") if path.name.endswith((".lock", "-holder"))]
            expect(f"what lies beside the output, {left},", not left)
    return {
        "job": name,
        "seconds": round(seconds, 2),
        "moments": moments,
        "interrupted": ended,
        "differing": 0,
    }


# Many decodes in one process -----------------------------------------------------------------------------------------


def decodes(count: int, longest: int, generator: random.Random) -> dict[str, Any]:
    """Decode prompts of differing lengths in differing batches; return what the process held before and after.

    The largest batch comes first: what it needs stays reserved.
    """
    import tiny

    target = tiny.target("qwen3")
    draft = tiny.draft(target)

    def decode(length: int, rows: int, new: int) -> None:
        pads = tuple(generator.randrange(length) for _ in range(rows))
        inputs = tiny.batch(length, pads)
        own = target.generate(**inputs, max_new_tokens=new, do_sample=False)
        ours = target.generate(
            **inputs, max_new_tokens=new, do_sample=False, custom_generate=draft.speculate
        )
        expect(f"the text of {rows} rows of {length} tokens", own.tolist() == ours.tolist())

    for _ in range(2):
        decode(longest, rows=4, new=longest // 3)
    before = held(target, draft)
    for _ in range(count):
        length, rows = generator.randint(1, longest), generator.randint(1, 4)
        decode(length, rows, generator.randint(1, longest // 3))
    after = held(target, draft)
    for name in ("tensors", "hooks", "threads", "files"):
        expect(
            f"{name}: {after[name]} in place of {before[name]}; the number",
            after[name] <= before[name],
        )
    expect(
        f"memory: {before['mib']} MiB, then {after['mib']}; it", after["mib"] < before["mib"] + 16
    )
    return {"job": "decodes", "count": count, "before": before, "after": after}


def held(*models: Any) -> dict[str, int]:
    """Return how much of everything this process and these models hold."""
    import torch

    gc.collect()
    hooks = 0
    for model in models:
        for module in model.modules():
            hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        "hooks": hooks,
        "threads": threading.active_count(),
        "files": len(os.listdir(tempfile.gettempdir())) + len(os.listdir("/proc/self/fd")),
        "mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


# The command line --------------------------------------------------------------------------------------------------


@contextmanager
def own_hub() -> Iterator[None]:
    """Run a Hub in this process, unless one is named already; it comes before huggingface_hub is imported."""
    if "HF_ENDPOINT" in os.environ:
        yield
        return
    from hubserver import HubServer

    hub = HubServer().start()
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    os.environ |= variables
    yield
    hub.stop()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=[*JOBS, "decodes"], choices=[*JOBS, "decodes"])
    parser.add_argument("--moments", type=int, default=10, help="for each job and each signal")
    names = [number.name for number in SIGNALS]
    parser.add_argument("--signals", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=8, help="of a training run")
    parser.add_argument("--decodes", type=int, default=300)
    parser.add_argument("--longest", type=int, default=200, help="prompt of a decode, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    Train.steps = options.steps
    signals = [signal.Signals[name] for name in options.signals]
    with own_hub(), tempfile.TemporaryDirectory() as folder:
        import torch

        import dflash_hub.training.trainer  # noqa: F401  # once, for all forks

        torch.set_num_threads(1)  # a fork has no others
        tempfile.tempdir = folder  # where files left behind are seen
        generator = random.Random(options.seed)
        for name in options.jobs:
            if name == "decodes":
                figures = decodes(options.decodes, options.longest, generator)
            else:
                figures = run_job(name, options.moments, signals, generator, Path(folder))
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
