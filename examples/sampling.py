"""Sample instead of taking the likeliest tokens: the target's own distribution, and a seed repeats the text."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from dflash_hub import DecodeStatistics, load_draft

PAIR = Path(__file__).parent / "tiny_pair"
ASK = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 24}

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")
inputs = tokenizer("def quicksort(items):", return_tensors="pt")

for seed in (0, 1, 0):
    statistics = DecodeStatistics()
    set_seed(seed)
    ids = target.generate(**inputs, custom_generate=draft.speculate, statistics=statistics, **ASK)
    print(f"--- seed {seed}, {statistics.acceptance_length:.2f} tokens a cycle")
    print(tokenizer.decode(ids[0]))
