# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Run every command as its users see it: how long until its first line, how wide are its lines, and is there noise?

    python benchmarks/terminal.py --output captures
    python benchmarks/terminal.py --output captures --only generate train

Each command runs with `--help`, and once on the built-in pair, offline: on terminals of 80 and of 120 columns, and in
pipes. What they show is written to the folder. The exit status is 1 if a line is wider than its terminal, if another
library is heard, or if stdout has what is no result. A line may be too wide that holds a path, an address or a command
to copy, which must not be broken.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import cell_len

ROOT = Path(__file__).parents[1]
WIDTHS = (80, 120)
SMALL = "--max-length 64 --num-anchors 4 --max-steps 6 --logging-steps 2 --num-layers 1 --block-size 8 --use-cpu true"
CALLS = {
    "demo": "--prompts 1 --capture off",
    "generate": "--target demo --max-new-tokens 16 PROMPT",
    "serve": "demo --port 0 --max-batch 1",
    "eval": "--target demo --limit 1 --max-new-tokens 8 --output-dir report",
    "drafts": "--target qwen3-8b",
    "resolve": "demo",
    "check": "demo --target demo --max-new-tokens 4",
    "serve-with": "vllm demo --target demo",
    "train": f"--target demo --data rows.jsonl --output-dir draft --save-strategy no --report-to none {SMALL}",
    "features": "--target demo --data rows.jsonl --max-length 64 --output-dir features --use-cpu",
    "regenerate": "--target demo --data rows.jsonl --output new.jsonl --max-new-tokens 4 --limit 2",
    "convert": "demo converted --layout engines",
    "push": "FOLDER me/draft --dry-run",
    "refresh": "me/draft --dry-run",
    "env": "",
    "version": "",
}
"""One cheap call of each command."""
MAY_FAIL = ("push", "refresh", "serve-with")
"""Without a connection, or since engines do not read the draft as it is built in."""
NOISE = re.compile(
    r"warning|traceback|deprecat|\d+%\||it/s\]|s/it\]|\[transformers\]|WARN", re.IGNORECASE
)
NO_RESULT = re.compile(r"(Loading|Note:|Error:|Draft:|Next:|step \d|> )")
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-_])")
TO_COPY = re.compile(r"^\W*(Try: )?(curl|dflash-hub|vllm|python|hf|pip|source)\b")


@dataclass
class Shown:
    """Hold what one run has shown.

    Args:
        lines: without escape sequences.
        stdout: lines of stdout alone; [] on a terminal.
        first: seconds until the first line.
        seconds: in all.
    """

    lines: list[str]
    status: int
    first: float
    seconds: float
    stdout: list[str] = field(default_factory=list)


# Running -------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the environment of a user without a connection to the Hub."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "COLUMNS", "NO_COLOR")
    }
    return found | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none", "TERM": "xterm-256color"}


class Reader(threading.Thread):
    """Read what a process writes, to its end.

    Args:
        seen: called with all of it so far.
    """

    def __init__(self, descriptor: int, seen: Callable[[bytes], None]):
        super().__init__(daemon=True)
        self.descriptor, self.seen = descriptor, seen
        self.content = b""
        self.first: float | None = None
        self.start()

    def run(self) -> None:
        while True:
            try:
                part = os.read(self.descriptor, 65536)
            except OSError:  # the terminal of a process that has ended
                return
            if not part:
                return
            if self.first is None and part.strip():
                self.first = time.perf_counter()
            self.content += part
            self.seen(self.content)


def run(words: list[str], folder: Path, width: int | None) -> Shown:
    """Run a command in a folder, on a terminal of a width, or with None in pipes."""
    command = [sys.executable, "-m", "dflash_hub", *words]
    outs = pty.openpty() if width else os.pipe()
    errors = outs if width else os.pipe()
    if width:
        fcntl.ioctl(outs[1], termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdin=outs[1] if width else subprocess.DEVNULL,
        stdout=outs[1],
        stderr=errors[1],
        start_new_session=True,
    )

    ended = threading.Event()

    def end_server(content: bytes) -> None:
        if words[0] == "serve" and b"Try: " in content and not ended.is_set():
            ended.set()
            process.send_signal(signal.SIGINT)

    readers = [Reader(outs[0], end_server)]
    if not width:
        readers.append(Reader(errors[0], end_server))
    for _, side in {outs, errors}:
        os.close(side)
    status = process.wait(600)
    seconds = time.perf_counter() - started
    for reader in readers:
        reader.join(5)
        os.close(reader.descriptor)
    firsts = [reader.first for reader in readers if reader.first is not None]
    parts = [lines_of(reader.content) for reader in readers]
    shown = [line for part in parts for line in part]
    first = min(firsts, default=started + seconds) - started
    return Shown(shown, status, first, seconds, [] if width else parts[0])


def lines_of(content: bytes) -> list[str]:
    """Return the lines that were shown, those that were written over too."""
    text = ESCAPES.sub("", content.decode(errors="replace"))
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


# What is wrong -------------------------------------------------------------------------------------------------------


def too_wide(shown: Shown, width: int) -> list[str]:
    """Return the lines that are wider than the terminal, and could have been broken."""
    wide = [line for line in shown.lines if cell_len(line) > width]
    return [line for line in wide if not must_stay(line, width)]


def must_stay(line: str, width: int) -> bool:
    """Tell whether a line must not be broken: a command to copy, or with a long path or address in it."""
    longest = max(line.split(), key=len, default="")
    return bool(TO_COPY.match(line)) or (len(longest) > width // 3 and "/" in longest)


def faults_of(
    name: str, views: dict[int | None, Shown], is_help: bool = False
) -> dict[str, list[str]]:
    """Return what is wrong with the runs of a command, by kind. Help may speak of warnings."""
    found: dict[str, list[str]] = {"too wide": [], "no result": [], "noise": [], "status": []}
    for width, shown in views.items():
        heard = [] if is_help else [line for line in shown.lines if NOISE.search(line)]
        found["noise"] += heard
        found["no result"] += [line for line in shown.stdout if NO_RESULT.match(line)]
        if width:
            found["too wide"] += too_wide(shown, width)
        allowed = (0, 1) if name in MAY_FAIL else (0, 130)
        if shown.status not in allowed:
            found["status"].append(f"exit status {shown.status}")
    return found


# The table -----------------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> Path:
    """Return an empty folder with rows to train on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = (
        (ROOT / "examples" / "tiny_pair" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    )
    rows = [json.dumps({"text": json.loads(line)["prompt"]}) + "\n" for line in prompts[:8]]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def words_of(name: str, call: str) -> list[str]:
    """Return the command line of a call."""
    places = {"PROMPT": "def main(", "FOLDER": str(ROOT / "examples" / "tiny_pair" / "draft")}
    return [name, *(places.get(word, word) for word in call.split())]


def seen(name: str, call: str, output: Path) -> dict[int | None, Shown]:
    """Run a call in all ways, and write what it showed."""
    views: dict[int | None, Shown] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for width in (*WIDTHS, None):
            views[width] = run(words_of(name, call), prepared(Path(scratch) / "work"), width)
            kind = "help" if call == "--help" else "call"
            file = output / f"{name}-{kind}-{width or 'pipe'}.txt"
            file.write_text("\n".join(views[width].lines) + "\n", encoding="utf-8")
    return views


def row_of(title: str, views: dict[int | None, Shown], faults: dict[str, list[str]]) -> str:
    """Return a row of the table."""
    firsts = " / ".join(f"{shown.first:.1f}" for shown in views.values())
    widest = []
    for width in WIDTHS:
        widest.append(str(max(map(cell_len, views[width].lines), default=0)))
    counts = [str(len(faults[kind]) or "-") for kind in ("too wide", "no result", "noise")]
    seconds = f"{views[None].seconds:.1f}"
    return "| " + " | ".join([title, firsts, seconds, " / ".join(widest), *counts]) + " |"


def main() -> None:
    """Run the commands, print the table, and below it what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for what the commands show"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CALLS), default=list(CALLS), help="these commands alone"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        "| command | first line, s: 80 / 120 / pipe | all, s | widest: 80 / 120 | too wide | no result | noise |"
    )
    print("|---|---|---|---|---|---|---|")
    wrong = []
    for name in options.only:
        for call in ("--help", CALLS[name]):
            views = seen(name, call, options.output)
            faults = faults_of(name, views, call == "--help")
            title = f"`{name} --help`" if call == "--help" else f"`{name}`"
            print(row_of(title, views, faults), flush=True)
            for kind, lines in faults.items():
                wrong += [f"{title}: {kind}: {line}" for line in dict.fromkeys(lines)]
    print("\n" + "\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
