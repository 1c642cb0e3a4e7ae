# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a server with clients of which half leave: are the others' texts exact, how fast are they, does memory grow?

    python benchmarks/serve.py                       # 200 requests of 16 clients, three times
    python benchmarks/serve.py --requests 1000 --batch 1 --proposal chain
    python benchmarks/serve.py --target Qwen/Qwen3-0.6B --draft org/draft

It starts `dflash-hub serve` in a process of its own. Clients are OpenAI's, one thread each. Every second request is
left: in the middle of its stream, or while it waits for its answer. The texts of the others are compared with the
target's own greedy ones. Each round ends with a line of JSON; the exit status is 1 if any text differs. Memory is what
the server's process holds, as Linux tells it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "examples" / "tiny_pair" / "prompts.jsonl"
ENDLESS = 1500
"""Tokens that those ask for who leave."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="demo")
    parser.add_argument("--draft")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--proposal", default="auto")
    parser.add_argument("--none-leave", action="store_true", help="all wait for their answers")
    return parser.parse_args()


class Server:
    """A server in a process of its own.

    Args:
        words: of its command line, after `dflash-hub serve`.
    """

    def __init__(self, words: list[str]):
        command = [sys.executable, "-m", "dflash_hub", "-q", "serve", *words, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        if found is None:
            raise RuntimeError("The server did not start; its error is above.")
        self.url = found[0]

    @property
    def memory(self) -> float:
        """MiB that its process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def stop(self) -> int:
        """End it, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Load:
    """Requests of several clients to one server."""

    def __init__(self, args: argparse.Namespace, url: str, texts: list[str], expected: list[str]):
        from openai import OpenAI

        self.args, self.texts = args, texts
        self.expected = expected
        self.client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.different = 0
        self.left = 0

    def ask(self, number: int) -> None:
        """Ask for one text; every second time, leave before it has come."""
        place = number // 4 % len(self.texts)
        if number % 2 and not self.args.none_leave:
            self._leave(number, self.texts[place])
            return
        started = time.perf_counter()
        stream = self._complete(self.texts[place], self.args.new)
        text, first = "", None
        for piece in stream:
            first = first or time.perf_counter() - started
            text += piece.choices[0].text
        with self.lock:
            self.seconds.append(time.perf_counter() - started)
            self.first.append(first or 0.0)
            self.different += text != self.expected[place]

    def _leave(self, number: int, text: str) -> None:
        from openai import APITimeoutError

        if number % 4 == 1:
            stream = self._complete(text, ENDLESS)
            next(iter(stream))
            stream.close()
        else:
            with suppress(APITimeoutError):
                self._complete(text, ENDLESS, stream=False, timeout=0.3)
        with self.lock:
            self.left += 1

    def _complete(self, text: str, new: int, stream: bool = True, timeout: float = 600) -> Any:
        return self.client.completions.create(
            model=self.args.target,
            prompt=text,
            max_tokens=new,
            temperature=0,
            stream=stream,
            timeout=timeout,
        )

    def round(self) -> dict[str, Any]:
        """Send all requests, and return the figures."""
        self.seconds, self.first = [], []
        self.different = self.left = 0
        started = time.perf_counter()
        with ThreadPoolExecutor(self.args.clients) as pool:
            list(pool.map(self.ask, range(self.args.requests)))
        taken = time.perf_counter() - started
        answered = len(self.seconds)
        return {
            "answered": answered,
            "left": self.left,
            "different": self.different,
            "seconds": round(taken, 2),
            "tokens_per_second": round(answered * self.args.new / taken, 1),
            "median_first_token": round(median(self.first), 3),
            "median_seconds": round(median(self.seconds), 3),
        }


def own_texts(args: argparse.Namespace, texts: list[str]) -> list[str]:
    """Return the target's own greedy texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "examples" / "tiny_pair" / "target" if args.target == "demo" else args.target
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = []
    started = time.perf_counter()
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        output = target.generate(**inputs, max_new_tokens=args.new, do_sample=False)
        found.append(tokenizer.decode(output[0, width:], skip_special_tokens=True))
    seconds = (time.perf_counter() - started) / len(texts)
    print(json.dumps({"plain_seconds_per_text": round(seconds, 3)}), flush=True)
    return found


def main() -> None:
    args = parse()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: args.prompts]
    texts = [json.loads(line)["prompt"][:400] for line in lines]
    expected = own_texts(args, texts)
    words = [args.target, "--max-batch", str(args.batch), "--proposal", args.proposal]
    if args.draft:
        words += ["--draft", args.draft]
    server = Server(words)
    differing = 0
    try:
        load = Load(args, server.url, texts, expected)
        for number in range(args.rounds):
            figures = load.round()
            differing += figures["different"]
            memory = round(server.memory, 1)
            print(json.dumps({"round": number, **figures, "memory_mib": memory}), flush=True)
    finally:
        status = server.stop()
    print(json.dumps({"differing": differing, "exit_status": status}))
    sys.exit(1 if differing or status else 0)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
