"""Decode several prompts of different lengths at once: every row has its own pace, and its own text."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, load_draft

PAIR = Path(__file__).parent / "tiny_pair"  # or "Qwen/Qwen3-4B" and "z-lab/Qwen3-4B-DFlash-b16"
PROMPTS = ["def quicksort(items):", "class Stack:\n    def push(", "import os\n\n"]

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target", padding_side="left")
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")

inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
statistics = DecodeStatistics()
rows = target.generate(
    **inputs, custom_generate=draft.speculate, statistics=statistics, max_new_tokens=40
)
for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
    print(text, end="\n\n")

same = target.generate(**inputs, max_new_tokens=40).equal(rows)
print(f"{statistics.acceptance_length:.2f} tokens a cycle and row; the target's own texts: {same}")
