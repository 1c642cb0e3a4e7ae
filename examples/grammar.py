"""Hold the text to a JSON schema with xgrammar, which is called once for each token, as without a draft.

Needs `pip install xgrammar`. Any other processor or grammar goes into `logits_processor` in the same way.
"""

import json
from pathlib import Path

import xgrammar
from transformers import AutoModelForCausalLM, AutoTokenizer
from xgrammar.contrib.hf import LogitsProcessor

from dflash_hub import load_draft

PAIR = Path(__file__).parent / "tiny_pair"
SCHEMA = {
    "type": "object",
    "properties": {"sort": {"enum": ["quick", "merge"]}, "stable": {"type": "boolean"}},
    "required": ["sort", "stable"],
}

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")
info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=target.config.vocab_size)
schema = xgrammar.GrammarCompiler(info).compile_json_schema(
    json.dumps(SCHEMA), any_whitespace=False
)

inputs = tokenizer("options = ", return_tensors="pt")
ids = target.generate(
    **inputs,
    custom_generate=draft.speculate,
    logits_processor=[LogitsProcessor(schema)],  # a new one for each text
    max_new_tokens=60,
)
text = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
print(json.loads(text))
