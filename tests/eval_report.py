"""A report as an evaluation writes it: of made-up runs, with hostile texts among the prompts and tokens."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

SCRIPT = "</script><script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "<img src=x onerror=alert(2)>",
    "\"' onmouseover='alert(3)",
    "{{ 7 * 7 }}{% raw %}",
    "]]><!-- \x00\x1b\u202e\ud83d &lt;",
    "url(https://example.org/pixel)",
    "$x^{$ \u2028",
]
CATEGORIES = {"code": 0.86, "maths": 0.82, "chat": 0.66, "<b>summary</b>": 0.58}
"""The share of drafted tokens that are accepted, by category."""
WORDS = ["def", "sort", "items", "return", "the", "list", ",", "(", "):", "if", "in", "\n", "+1", "answer", "is", "we"]
STEP = {"plain": 0.0261, "draft": 0.0049, "verify": 0.0278, "rest": 0.0024, "prefill": 0.041}
FLOOR = {"plain": 0.0048, "dflash": 0.0059}


def way(
    method: str, draft: str | None, block_size: int | None, condition: dict[str, Any], baseline: int
) -> dict[str, Any]:
    parts = [draft or method]
    if block_size:
        parts.append(f"block {block_size}")
    if condition.get("temperature"):
        parts.append(f"temperature {condition['temperature']:g}")
    if condition.get("batch_size", 1) > 1:
        parts.append(f"batches of {condition['batch_size']}")
    if condition.get("context"):
        parts.append(f"context {condition['context']:,}")
    revision = None if draft is None else "b74e3a329c4d963783143b1e970d95b002be72bd"
    about = {"name": ", ".join(parts), "method": method, "draft": draft, "revision": revision}
    about |= {"kind": None if draft is None else "dflash", "block_size": block_size}
    about |= {"temperature": 0.0, "batch_size": 1, "context": None} | condition
    return about | {"baseline": baseline, "bytes_per_step": {"fixed": 8e9, "per_slot": 147456}}


def ways_of(conditions: list[dict[str, Any]], drafts: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Plain decoding, every draft, and look-up in the prompt, under every condition."""
    found: list[dict[str, Any]] = []
    for condition in conditions:
        baseline = len(found)
        found.append(way("plain", None, None, condition, baseline))
        found += [way("dflash", draft, size, condition, baseline) for draft, size in drafts]
        found.append(way("prompt-lookup", None, None, condition, baseline))
    return found


DRAFTS = [("z-lab/Qwen3-4B-DFlash-b16", 16), ("an-organisation/Qwen3-4B-DFlash-trained-longer", 16)]
FEW = ways_of([{}], DRAFTS[:1])
MANY = ways_of(
    [{}, {"batch_size": 4}, {"batch_size": 8}, {"temperature": 0.7}, {"context": 1024}, {"context": 8192}],
    [*DRAFTS, ("z-lab/Qwen3-4B-DFlash-b16", 4), ("z-lab/Qwen3-4B-DFlash-b16", 8)],
)


def report(ways: list[dict[str, Any]] | None = None, prompts: int = 12, slowdown: float = 1.0) -> dict[str, Any]:
    """A complete report; a slowdown makes each cycle of a draft take longer."""
    chance, ways = random.Random(0), FEW if ways is None else ways
    names = list(CATEGORIES)
    asked = [
        {"id": f"prompt-{i}", "category": names[i % 4], "tokens": 40 + 7 * i, "text": f"Write text {i}. "}
        for i in range(prompts)
    ]
    for prompt, text in zip(asked, HOSTILE, strict=False):
        prompt["text"] += text
    asked[0]["id"] += HOSTILE[1]
    records = []
    for number, about in enumerate(ways):
        for index, prompt in enumerate(asked):
            records.append(record(chance, about, (number, index), prompt, slowdown))
    results = [result(number, about, records, asked) for number, about in enumerate(ways)]
    best = max(range(len(ways)), key=lambda number: (results[number]["speedup"] or {"pooled": 1.0})["pooled"])
    ratio = (results[best]["speedup"] or {"pooled": 1.0})["pooled"]
    advice = f"Use {ways[best]['name']}: {ratio:.2f} times as fast as plain decoding."
    if ways[best]["method"] == "plain":
        advice = "Decode without a draft: none of these is faster here."
    return {
        "format": "dflash-hub eval",
        "format_version": 1,
        "complete": True,
        "settings": {
            "target": "Qwen/Qwen3-4B",
            "target_revision": None,
            "prompts": "prompts<i>.jsonl",
            "max_new_tokens": 96,
            "seed": 0,
            "chat_template": True,
            "thinking": False,
            "dtype": "bfloat16",
            "device": "cuda:0",
            "capture": "auto",
            "repeats": 1,
            "warm_up": 1,
            "command": "dflash-hub eval --target Qwen/Qwen3-4B --prompts 'prompts<i>.jsonl'",
        },
        "environment": {
            "date": "2026-11-26T04:42:11+00:00",
            "dflash_hub": "0.1.0",
            "transformers": "5.23.0",
            "torch": "2.11.0",
            "python": "3.11.2",
            "hardware": "NVIDIA H100 80GB HBM3",
            "threads": 16,
            "bandwidth_gb_s": 2480.5,
        },
        "float32_check": "done",
        "definitions": {"acceptance_length": "tokens / cycles, pooled over all prompts"},
        "prompt_set": {"name": "made up", "license": "MIT", "source": None, "count": prompts},
        "prompts": asked,
        "ways": ways,
        "records": records,
        "results": results,
        "recommendation": {"way": best, "words": advice},
    }


def record(
    chance: random.Random, about: dict[str, Any], place: tuple[int, int], prompt: dict[str, Any], slowdown: float
) -> dict[str, Any]:
    committed, size = [], about["block_size"] or 4
    is_plain = about["method"] == "plain"
    skill = (
        CATEGORIES[prompt["category"]]
        - 0.25 * about["temperature"]
        - (0.3 if about["method"] == "prompt-lookup" else 0)
    )
    drafted: list[bool] = [False]  # the prefill's token
    while len(drafted) < 97:
        accepted = 0
        while not is_plain and accepted < size - 1 and chance.random() < skill - 0.006 * accepted:
            accepted += 1
        committed.append(accepted + 1)
        drafted += [True] * accepted + [False]
    tokens = [f" {word}" if word != "\n" else word for word in chance.choices(WORDS, k=len(drafted))]
    tokens[5 : 5 + len(HOSTILE)] = HOSTILE
    cycles = len(committed)
    times: dict[str, Any] = {"prefill": STEP["prefill"], "draft": None, "verify": None}
    times["rest"] = STEP["plain"] * cycles
    if not is_plain:
        times |= {
            part: STEP[part] * cycles * slowdown * about["batch_size"] ** 0.3 for part in ("draft", "verify", "rest")
        }
    differs = not is_plain and place[1] in (3, 7)
    divergence = {"position": 20 + place[1], "plain_token": 11, "other_token": 12, "margin": 0.0313, "float32": "same"}
    divergence["verdict"] = "rounding" if place[1] == 3 else "unknown"
    return {
        "prompt": prompt["id"],
        "way": place[0],
        "repeat": 0,
        "batch": place[1],
        "seconds": sum(filter(None, times.values())),
        **{f"{part}_seconds": value for part, value in times.items()},
        "new_tokens": len(drafted),
        "text": "".join(tokens),
        "token_ids": list(range(len(drafted))),
        "tokens": tokens,
        "drafted": drafted,
        "committed": None if is_plain else committed,
        "speculative_decoding": None if is_plain else {"mean_acceptance_length": sum(committed) / cycles},
        "identical": None if is_plain or about["temperature"] else not differs,
        "divergence": divergence if differs and not about["temperature"] else None,
        "peak_memory_bytes": 9_663_676_416,
        "error": None,
    }


def result(
    number: int, about: dict[str, Any], records: list[dict[str, Any]], asked: list[dict[str, Any]]
) -> dict[str, Any]:
    own = [record for record in records if record["way"] == number]
    plain = [record for record in records if record["way"] == about["baseline"]]
    cycles = [count for record in own for count in record["committed"] or ()]
    reached = [sum(count > position for count in cycles) for position in range(1, max(cycles, default=1))]
    categories = {}
    for category in dict.fromkeys(prompt["category"] for prompt in asked):
        ids = {prompt["id"] for prompt in asked if prompt["category"] == category}
        mine, theirs = ([item for item in group if item["prompt"] in ids] for group in (own, plain))
        counts = [count for item in mine for count in item["committed"] or ()]
        categories[category] = {
            "acceptance_length": sum(counts) / len(counts) if counts else None,
            "speedup": pace(theirs) / pace(mine) if counts else None,
            "tokens_per_second": 1 / pace(mine),
            "count": len(mine),
        }
    ratio = pace(plain) / pace(own)
    speedup = {"pooled": ratio, "low": 0.94 * ratio, "high": 1.07 * ratio, "confidence": 0.95}
    has_parts = about["method"] == "dflash"
    parts = ("prefill", "draft", "verify", "rest") if has_parts else ("prefill", "rest")
    return {
        "way": number,
        "tokens_per_second": 1 / pace(own),
        "seconds_per_token": pace(own),
        "acceptance_length": sum(cycles) / len(cycles) if cycles else None,
        "by_category": categories,
        "acceptance_by_position": {
            "conditional": [now / before for before, now in pairwise([len(cycles), *reached]) if before],
            "marginal": [now / len(cycles) for now in reached],
        },
        "histogram": {str(size): count for size, count in sorted(Counter(cycles).items())},
        "speedup": speedup | {"method": "bootstrap over prompts, paired"} if cycles else None,
        "identical": sum(item["identical"] is True for item in own),
        "differing": sum(item["identical"] is False for item in own),
        "verdicts": {"rounding": sum(item["identical"] is False for item in own)},
        "errors": 0,
        "time_split": dict.fromkeys(("draft", "verify")) | {part: total(own, f"{part}_seconds") for part in parts},
        "floor_seconds_per_step": FLOOR.get(about["method"]),
        "floor_share": 0.18 if about["method"] in FLOOR else None,
        "peak_memory_bytes": 9_663_676_416,
        "slower_than_plain": [asked[-1]["id"]] if cycles else [],
    }


def total(records: list[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records)


def pace(records: list[dict[str, Any]]) -> float:
    """Seconds per token."""
    return total(records, "seconds") / total(records, "new_tokens")
