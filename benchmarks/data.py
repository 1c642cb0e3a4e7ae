# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Measure how fast rows are read and tokenised for training, on one core and on all, and with how much memory.

    python benchmarks/data.py                             # 2,000, 10,000 and 50,000 conversations
    python benchmarks/data.py --rows 2000 --cores 1

Each row is a conversation of two turns, of Python that the built-in tokenizer splits into about 370 tokens. A process
of its own prepares each file, with nothing in the cache. Seconds are of the preparation alone, without imports. CPU
seconds are of that process and of those that it starts. The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decode import TINY

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)


def main() -> None:
    """Run the whole script, or one measurement in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 10000, 50000])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        print(json.dumps(prepared(options.file)))
        return
    found = []
    print(
        f"{'rows':>8} {'cores':>6} {'tokens a row':>13} {'rows/s':>8} {'rows/CPU s':>11} {'peak MiB':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            file = written(Path(folder) / f"{rows}.jsonl", rows)
            for cores in options.cores:
                result = {"rows": rows, "cores": cores} | measured(file, cores, Path(folder))
                found.append(result)
                show(result)
    print(json.dumps(found))


def written(file: Path, rows: int) -> Path:
    """Write so many conversations of Python."""
    prompts = [
        json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").read_text().splitlines()
    ]
    text = "".join(prompts)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(rows):
            first = number * 97 % (len(text) - 800)
            turns = [
                {"role": "user", "content": f"{number}: {text[first : first + 250]}"},
                {"role": "assistant", "content": text[first + 250 : first + 740]},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return file


def measured(file: Path, cores: int, folder: Path) -> dict[str, float]:
    """Prepare a file in a process that may use so many cores."""
    usable = sorted(os.sched_getaffinity(0))[:cores]
    command = [
        "taskset",
        "-c",
        ",".join(map(str, usable)),
        sys.executable,
        __file__,
        "--file",
        str(file),
    ]
    cache = tempfile.mkdtemp(dir=folder)
    variables = os.environ | {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepared(file: Path) -> dict[str, float]:
    """Prepare a file in this process."""
    import datasets  # noqa: F401  # reading would import it, in half a second
    from transformers import AutoTokenizer

    from dflash_hub.training.data import PreprocessConfig, prepare
    from dflash_hub.training.reading import load_rows

    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.chat_template = TEMPLATE
    config = PreprocessConfig(tokenizer, block_size=8, mask_token_id=1)
    started, before = time.perf_counter(), cpu_seconds()
    rows, report = prepare(load_rows(str(file)), config)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    tokens = sum(map(sum, rows["lengths"]))
    peak = max(resource.getrusage(who).ru_maxrss for who in WHO) / 1024
    return {
        "tokens": tokens / report.used,
        "rows_per_second": report.used / seconds,
        "rows_per_cpu_second": report.used / cpu,
        "peak_mib": peak,
    }


WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in WHO]
    return sum(one.ru_utime + one.ru_stime for one in used)


def show(result: dict[str, float]) -> None:
    """Print a line of the table."""
    print(
        f"{result['rows']:>8,} {result['cores']:>6} {result['tokens']:>13.0f} {result['rows_per_second']:>8,.0f} "
        f"{result['rows_per_cpu_second']:>11,.0f} {result['peak_mib']:>9,.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
