# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Go on from a published draft after a fine-tune of its target: acceptance falls, and 250 steps bring most of it back.

    python examples/warm_start.py --output-dir warm_start

Needs `pip install "dflash-hub[train]"` and ten minutes of one core; nothing is downloaded, and seeds are fixed. The
built-in target is fine-tuned on the tests of the standard library, which it has never seen. Then it writes its own
texts, and the built-in draft learns from them, by the command that is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import load_draft
from dflash_hub.evaluation import compare

PAIR = Path(__file__).parent / "tiny_pair"
PROMPT, WIDTH, HELD_OUT = 150, 256, 20
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--output-dir", type=Path, default=Path("warm_start"))
parser.add_argument("--tune-steps", type=int, default=300, help="of the target, 16 rows each")
parser.add_argument("--texts", type=int, default=3000, help="that the fine-tuned target writes")
parser.add_argument("--steps", type=int, default=250, help="of the draft, 12 rows each")
parser.add_argument("--learning-rate", default="6e-3", help="of the draft")


def main() -> None:
    """Fine-tune, measure, regenerate, train, and measure again."""
    options = parser.parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / "test").glob("test_*.py"))
    texts = [path.read_text("utf-8", "ignore") for path in files if path.stat().st_size > 8000]
    held_out = [tokenizer(text).input_ids[300 : 300 + PROMPT] for text in texts[:HELD_OUT]]
    tokens = torch.tensor(tokenizer("".join(texts[HELD_OUT:100])).input_ids)
    measure("the built-in target", PAIR / "target", PAIR / "draft", held_out)
    if not (folder / "target" / "config.json").exists():
        fine_tune(folder / "target", tokens, options.tune_steps)
        tokenizer.save_pretrained(folder / "target")
    measure("fine-tuned, the old draft", folder / "target", PAIR / "draft", held_out)
    if not (folder / "own.jsonl").exists():
        write_texts(folder, tokens, options.texts)
    name = f"draft-{options.learning_rate}-{options.steps}"
    train = ["--target", str(folder / "target"), "--draft", str(PAIR / "draft")]
    train += ["--data", str(folder / "own.jsonl"), "--output-dir", str(folder / name)]
    train += ["--max-steps", str(options.steps)]
    train += ["--learning-rate", options.learning_rate, "--per-device-train-batch-size", "12"]
    train += ["--num-anchors", "32", "--max-length", str(WIDTH), "--report-to", "none"]
    train += ["--save-strategy", "no", "--disable-tqdm", "true", "--use-cpu", "true"]
    if not (folder / name / "model.safetensors").exists():
        print("dflash-hub train", *train, flush=True)
        command = [sys.executable, "-m", "dflash_hub", "train", *train]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"{options.steps} steps: {os.times().children_user:.0f} s of one core", flush=True)
    measure(f"fine-tuned, {name}", folder / "target", folder / name, held_out)


def measure(what: str, target: Path, draft: Path, prompts: list[list[int]]) -> None:
    """Print the acceptance length over 96 new tokens after each held-out prompt, decoded greedily."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    model.generation_config.eos_token_id = None  # so that every text has 96 new tokens
    loaded = load_draft(draft).eval()
    found = []
    for row in prompts:
        found.append(compare(loaded, model, torch.tensor([row]), 96, proposal="chain"))
    total = sum(found[1:], found[0])
    print(f"{what}: {total.acceptance_length:.2f} tokens a cycle", flush=True)


def fine_tune(folder: Path, tokens: torch.Tensor, steps: int) -> None:
    """Train the built-in target on the text `tokens [N]`, 16 rows a step, and save it in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(PAIR / "target").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for rows in windows(tokens, 16 * steps, WIDTH, seed=0).split(16):
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().save_pretrained(folder)


def windows(tokens: torch.Tensor, count: int, width: int, seed: int) -> torch.Tensor:
    """Return `[count, width]`: random windows of `tokens [N]`, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - width, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(width)]


@torch.no_grad()
def write_texts(folder: Path, tokens: torch.Tensor, count: int) -> None:
    """Write rows of 256 tokens: 150 of the text `tokens [N]`, then what the target writes, which is learnt from."""
    model = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    new = {"min_new_tokens": WIDTH - PROMPT, "max_new_tokens": WIDTH - PROMPT, "do_sample": False}
    supervised = [0] * PROMPT + [1] * (WIDTH - PROMPT)
    lines = []
    for part in windows(tokens, count, PROMPT, seed=1).split(100):
        texts = model.generate(input_ids=part, attention_mask=torch.ones_like(part), **new)
        for ids in texts.tolist():
            lines.append(json.dumps({"input_ids": ids, "supervised": supervised}) + "\n")
    (folder / "own.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
