"""See how a text was decoded: tokens a cycle, acceptance by position, and where the time went."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_hub import DecodeStatistics, load_draft

PAIR = Path(__file__).parent / "tiny_pair"

tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
target = AutoModelForCausalLM.from_pretrained(PAIR / "target")
inputs = tokenizer("def quicksort(items):", return_tensors="pt")

for name in ("draft", "draft2"):
    draft = load_draft(PAIR / name)
    statistics = DecodeStatistics()
    target.generate(
        **inputs, custom_generate=draft.speculate, statistics=statistics, max_new_tokens=60
    )
    accepted = ", ".join(f"{share:.0%}" for share in statistics.acceptance_by_position)
    print(f"{type(draft).__name__}: {statistics.acceptance_length:.2f} tokens a cycle")
    print(f"  accepted by position: {accepted}")
    print(f"  verified in {statistics.cycles} cycles: {statistics.proposed}")
    for part in ("prefill", "draft", "verify", "rest"):
        print(f"  {part}: {1000 * getattr(statistics, part + '_seconds'):.1f} ms")
