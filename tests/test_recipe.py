"""The recipe of the built-in pair, for about a minute, with its own functions and the target that is shipped."""

import argparse
import importlib.util
import json

import torch
from transformers import AutoTokenizer

from paths import TINY


def recipe():
    """`examples/tiny_pair/train.py` as a module."""
    spec = importlib.util.spec_from_file_location("tiny_pair_recipe", TINY / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_minute_of_the_recipe_lowers_the_loss_and_raises_acceptance_on_held_out_prompts(tmp_path, tiny_target):
    made, tokenizer = recipe(), AutoTokenizer.from_pretrained(TINY / "target")
    options = argparse.Namespace(output_dir=tmp_path, texts=384, seed=0)
    rows = made.write_text(options, tiny_target, tokenizer)
    assert all(sum(row["supervised"]) == made.WIDTH - made.PROMPT for row in rows)
    torch.manual_seed(0)
    untrained = made.fresh_draft(tiny_target, "dflash2").eval()
    trained = made.make_draft(tmp_path, tiny_target, rows, made.Training("draft", "dflash2", 150, seed=0))
    losses = [line["loss"] for line in json.loads((tmp_path / "draft" / "log.json").read_text()) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    before, after = (made.measure(draft, tiny_target, tokenizer, 6) for draft in (untrained, trained))
    assert before["identical"]
    assert after["identical"]
    assert before["acceptance_length"] < 1.1
    assert after["acceptance_length"] > before["acceptance_length"] + 0.2


def test_the_held_out_files_are_not_among_the_sources():
    """Two of them are tables whose text stands in some thirty other encodings too."""
    made = recipe()
    sources = made.sources()
    held_out = [prompt["prompt"] for prompt in made.PROMPTS if prompt["source"] not in ("iso8859_15.py", "cp1251.py")]
    assert len(held_out) == len(made.PROMPTS) - 2
    assert len(sources) > 300
    assert not any(prompt in source for prompt in held_out for source in sources)
