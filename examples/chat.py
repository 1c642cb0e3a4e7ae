"""Hold a conversation: every turn is the target's own answer to all messages before it."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import load_draft

PAIR = Path(__file__).parent / "tiny_pair"
# The built-in target writes Python and knows no roles. A target that was trained for chats has a template.
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target", chat_template=TEMPLATE)
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")

messages = []
for question in ("def quicksort(items):", "class Stack:", "def read(path):"):
    messages.append({"role": "user", "content": question})
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = target.generate(**inputs, custom_generate=draft.speculate, max_new_tokens=32)
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
    print(f"> {question}\n{answer}\n")
