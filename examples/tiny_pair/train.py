# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Train the tiny pair: a target that writes Python, trained on Python's own library, and a draft of each kind for it.

    python examples/tiny_pair/train.py --output-dir tiny_pair
    python examples/tiny_pair/train.py --output-dir tiny_pair --compare 600   # afterwards: kinds and losses, two seeds

Needs `pip install "dflash-hub[train]"`, two cores and less than an hour; nothing is downloaded. Finished stages are
skipped, so an interrupted run resumes. The stages:

1. tokenizer: byte-level BPE of 512 tokens, on the sources of the standard library, without the held-out files;
2. target: Qwen3 with 6 layers of 128, on the same sources;
3. text: the target's own greedy continuations of passages from those sources, and of passages from the library's
   tests, which it has not seen;
4. drafts, trained with `DFlashTrainer`: DFlash (draft) on the first text with the published decay, then DFlash 2
   (draft2), which starts from the weights of the first, on both texts;
5. acceptance length of each draft over the held-out prompts, one line of JSON for each.
"""

import argparse
import json
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dflash_hub import DFlashDraftSpec, load_draft
from dflash_hub.evaluation import compare
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.trainer import last_checkpoint

HERE = Path(__file__).parent
PROMPTS = [
    json.loads(line) for line in (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
]
WIDTH, PROMPT = 256, 150
TESTS = {"test", "tests", "idlelib"}
SHAPE = {"block_size": 8, "num_hidden_layers": 2, "target_layer_ids": [1, 2, 4], "mask_token_id": 1}
HEAD_SHAPE = {
    "dflash2": {"selector_rank": 32, "selector_top_k": 8},
    "dspark": {"markov_rank": 32, "enable_confidence_head": True, "block_size": 7},
    "domino": {"emb_dim": 32, "gru_hidden_dim": 64, "block_size": 7},
}
"""What else a draft of a kind has. Every one drafts 7 tokens: from the anchor on, 7 positions are enough."""
RECIPE: dict[str, Any] = {
    "per_device_train_batch_size": 12,
    "num_anchors": 32,
    "max_length": WIDTH,
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "logging_steps": 50,
    "save_steps": 1000,
    "save_total_limit": 1,
    "report_to": "none",
}
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "DFlash": ("dflash", {}),
    "DFlash, published decay": ("dflash", {"loss_gamma": 4.0}),
    "DFlash, D-PACE": ("dflash", {"loss_weights": "dpace"}),
    "DFlash, .1 ce + .9 tv": ("dflash", {"loss": "ce=0.1,tv=0.9"}),
    "DFlash, kl": ("dflash", {"loss": "kl"}),
    "DFlash 2": ("dflash2", {}),
    "DFlash 2, published decay": ("dflash2", {"loss_gamma": 4.0}),
    "DFlash 2, D-PACE": ("dflash2", {"loss_weights": "dpace"}),
    "DSpark": ("dspark", {}),
    "DSpark, published decay": ("dspark", {"loss_gamma": 4.0}),
    "DSpark, D-PACE": ("dspark", {"loss_weights": "dpace"}),
    "Domino": ("domino", {}),
    "Domino, published decay": ("domino", {"loss_gamma": 4.0}),
    "Domino, D-PACE": ("domino", {"loss_weights": "dpace"}),
}
"""What `--compare` trains: kind and options of the training, by the name in the table."""


def main() -> None:
    """Run the whole script."""
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(options.output_dir)
    target = make_target(options, tokenizer)
    rows = write_text(options, target, tokenizer)
    new_rows = write_text(options, target, tokenizer, tests=True)
    if options.compare:
        compare_kinds(options, target, tokenizer, rows + new_rows)
        return
    first = Training("draft", "dflash", options.draft_steps, options.seed, {"loss_gamma": 4.0})
    second = Training("draft2", "dflash2", options.second_draft_steps, options.seed, start="draft")
    for training, learnt in ((first, rows), (second, rows + new_rows)):
        draft = make_draft(options.output_dir, target, learnt, training)
        result = {"draft": training.name} | measure(draft, target, tokenizer)
        print(json.dumps(result), flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("tiny_pair"))
    parser.add_argument(
        "--target-steps", type=int, default=2500, help="steps of 16 rows of 256 tokens"
    )
    parser.add_argument(
        "--texts", type=int, default=12288, help="passages that the target continues"
    )
    parser.add_argument(
        "--new-texts", type=int, default=6144, help="likewise, passages that it has not seen"
    )
    parser.add_argument(
        "--draft-steps",
        type=int,
        default=4500,
        help="steps of 12 rows of 256 tokens, 32 anchors each",
    )
    parser.add_argument(
        "--second-draft-steps",
        type=int,
        default=2700,
        help="likewise, for a draft with a further head (DFlash 2)",
    )
    parser.add_argument(
        "--compare",
        type=int,
        default=0,
        help="train kinds and losses for this many steps, and compare",
    )
    parser.add_argument("--compare-seeds", type=int, default=2)
    parser.add_argument(
        "--compare-rows", type=int, default=12, help="rows of a step in these trainings"
    )
    parser.add_argument(
        "--compare-only", nargs="+", default=list(COMPARED), choices=COMPARED, metavar="NAME"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def sources(tests: bool = False) -> list[str]:
    """Return the standard library's modules, or its tests, without the files of the held-out prompts."""
    held_out = {prompt["source"] for prompt in PROMPTS}
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        folders = {*path.relative_to(root).parts[:-1]}
        left_out = "site-packages" in folders or path.name in held_out
        if not left_out and bool(folders & TESTS) == tests:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return texts


def make_tokenizer(folder: Path) -> Any:
    """Train the tokenizer, or load the trained one."""
    if not (folder / "target" / "tokenizer.json").exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            sources(), vocab_size=512, special_tokens=["<|endoftext|>", "<|mask|>"]
        )
        special = {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": ["<|mask|>"],
        }
        made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
        made.save_pretrained(folder / "target")
    return AutoTokenizer.from_pretrained(folder / "target")


class Windows(Dataset):
    """Random windows of one long text `[N]`, always the same for a seed."""

    def __init__(self, tokens: torch.Tensor, width: int, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.tokens, self.width = tokens, width
        self.starts = torch.randint(len(tokens) - width, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[self.starts[index] : self.starts[index] + self.width]
        return {"input_ids": window, "labels": window}


def tokens_of(tokenizer: Any, tests: bool = False) -> torch.Tensor:
    """Return the tokens of all modules, or of their tests, `[N]`, with an end token after each."""
    encoded = tokenizer(sources(tests)).input_ids
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def make_target(options: argparse.Namespace, tokenizer: Any) -> Any:
    """Train the target, or load the trained one."""
    folder = options.output_dir / "target"
    if not (folder / "model.safetensors").exists():
        shape = {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
        end = tokenizer.eos_token_id
        set_seed(options.seed)
        target = Qwen3ForCausalLM(
            Qwen3Config(**shape, bos_token_id=end, eos_token_id=end, pad_token_id=end)
        )
        args = TrainingArguments(
            options.output_dir / "runs" / "target",
            max_steps=options.target_steps,
            per_device_train_batch_size=16,
            learning_rate=4e-3,
            adam_beta2=0.98,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        )
        windows = Windows(tokens_of(tokenizer), WIDTH, 16 * options.target_steps, options.seed)
        trainer = Trainer(target, args, train_dataset=windows)
        trainer.train()
        target.config.use_cache = True  # Trainer turns it off
        target.save_pretrained(folder)
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def write_text(
    options: argparse.Namespace, target: Any, tokenizer: Any, tests: bool = False
) -> list[dict[str, list[int]]]:
    """Return rows of 256 tokens: 150 of a module or test, then the target's continuation, which alone is supervised."""
    name, count, seed = "text.pt", options.texts, options.seed + 1
    if tests:
        name, count, seed = "new_text.pt", options.new_texts, options.seed + 7
    file = options.output_dir / "runs" / name
    if not file.exists():
        windows = Windows(tokens_of(tokenizer, tests), PROMPT, count, seed)
        passages = [window["input_ids"] for window in windows]
        texts = []
        for part in torch.stack(passages).split(128):
            text = target.generate(
                input_ids=part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=WIDTH - PROMPT,
                min_new_tokens=WIDTH - PROMPT,
                do_sample=False,
            )
            texts.append(text)
        file.parent.mkdir(exist_ok=True)
        torch.save(torch.cat(texts), file)
    supervised = [0] * PROMPT + [1] * (WIDTH - PROMPT)
    return [{"input_ids": ids, "supervised": supervised} for ids in torch.load(file).tolist()]


@dataclass(frozen=True)
class Training:
    """Hold the settings of a draft's training: folder, kind, steps, seed of its weights and anchors, and options.

    Args:
        start: folder of a trained draft, of this kind or a simpler one, whose weights the draft starts from.
    """

    name: str
    variant: str
    steps: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None


def fresh_draft(target: Any, variant: str) -> Any:
    """Return an untrained draft of this kind."""
    fields = SHAPE | HEAD_SHAPE.get(variant, {})
    return DFlashDraftSpec("tiny").build(target.config, variant, **fields)


def make_draft(
    output_dir: Path, target: Any, rows: list[dict[str, list[int]]], training: Training
) -> Any:
    """Train a draft, or load the trained one."""
    folder = output_dir / training.name
    if not (folder / "model.safetensors").exists():
        set_seed(training.seed)
        given = RECIPE | training.options
        args = DFlashTrainingArguments(
            output_dir / "runs" / training.name,
            max_steps=training.steps,
            seed=training.seed,
            **given,
        )
        draft = fresh_draft(target, training.variant)
        if training.start is not None:
            start = load_file(output_dir / training.start / "model.safetensors")
            draft.load_state_dict(start, strict=False)  # a further head has parts of its own
        trainer = DFlashTrainer(draft, target, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) is not None)
        trainer.save_model(folder)
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    return load_draft(folder).eval()


def measure(draft: Any, target: Any, tokenizer: Any, prompts: int = len(PROMPTS)) -> dict[str, Any]:
    """Decode 96 tokens greedily from the last 150 of each held-out prompt; return the acceptance length."""
    target.generation_config.eos_token_id = None  # so that every text has 96 new tokens
    texts = [prompt["prompt"] for prompt in PROMPTS[:prompts]]
    rows = [tokenizer(text, return_tensors="pt").input_ids[:, -PROMPT:] for text in texts]
    results = []
    for row in rows:
        results.append(compare(draft, target, row, max_new_tokens=96, proposal="chain"))
    total = sum(results[1:], results[0])
    lengths = sorted(round(result.acceptance_length, 2) for result in results)
    return {
        "acceptance_length": total.acceptance_length,
        "by_prompt": lengths,
        "identical": total.identical,
    }


def compare_kinds(
    options: argparse.Namespace, target: Any, tokenizer: Any, rows: list[dict[str, list[int]]]
) -> None:
    """Train what is compared alike, with several seeds; print a line of JSON for each."""
    for seed in range(options.compare_seeds):
        for name in options.compare_only:
            variant, given = COMPARED[name]
            folder = f"compared/{name}, {options.compare} steps, {seed}"
            given = given | {"per_device_train_batch_size": options.compare_rows}
            training = Training(folder, variant, options.compare, seed, given)
            draft = make_draft(options.output_dir, target, rows, training)
            result = {"name": name, "seed": seed, "steps": options.compare}
            print(json.dumps(result | measure(draft, target, tokenizer)), flush=True)


if __name__ == "__main__":
    main()
