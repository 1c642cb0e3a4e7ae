"""Show the text while it is written, in the caller's thread; the tokens of a cycle arrive together."""

from pathlib import Path
from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from dflash_hub import load_draft

PAIR = Path(__file__).parent / "tiny_pair"

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
draft = load_draft(PAIR / "draft2")

inputs = tokenizer("def quicksort(items):", return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
ask = {"custom_generate": draft.speculate, "streamer": streamer, "max_new_tokens": 48}
decoding = Thread(target=target.generate, kwargs={**inputs, **ask})
decoding.start()
for piece in streamer:
    print(piece, end="", flush=True)
decoding.join()
print()
