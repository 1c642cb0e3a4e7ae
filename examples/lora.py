"""Decode a target with a LoRA adapter: the text is the adapted target's, with the base's draft.

Needs `pip install "dflash-hub[peft]"`.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, load_draft

PAIR = Path(__file__).parent / "tiny_pair"

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
base = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")
# A random adapter stands for yours: PeftModel.from_pretrained(base, "me/my-adapter").
adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
target = get_peft_model(base, adapter).eval()
inputs = tokenizer("def quicksort(items):", return_tensors="pt")


def decoded() -> list[int]:
    """Return the text, and print what the draft was worth."""
    statistics = DecodeStatistics()
    ids = target.generate(
        **inputs, custom_generate=draft.speculate, statistics=statistics, max_new_tokens=40
    )
    print(tokenizer.decode(ids[0]), f"\n[{statistics.acceptance_length:.2f} tokens a cycle]\n")
    return ids.tolist()


adapted = decoded()
with target.disable_adapter():
    plain = decoded()
print(f"The adapter changes the text: {adapted != plain}")
