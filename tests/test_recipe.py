"""The recipe of the built-in pair, for a few steps, with its own functions and the target that is shipped."""

import argparse
import functools
import importlib.util
import json

import pytest
import torch
from transformers import AutoTokenizer

from paths import TINY

pytestmark = pytest.mark.usefixtures("undrawn")


@functools.cache
def recipe():
    """`examples/tiny_pair/train.py` as a module, whose sources are read once."""
    spec = importlib.util.spec_from_file_location("tiny_pair_recipe", TINY / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.sources = functools.cache(module.sources)
    return module


def test_a_few_steps_of_the_recipe_lower_the_loss_and_raise_acceptance_on_held_out_prompts(
    tmp_path, tiny_target, monkeypatch
):
    """On a fortieth of its sources, with shorter rows, smaller batches and fewer anchors."""
    made, tokenizer = recipe(), AutoTokenizer.from_pretrained(TINY / "target")
    some, arguments = made.sources()[::40], made.DFlashTrainingArguments
    monkeypatch.setattr(made, "sources", lambda tests: some)
    monkeypatch.setattr(made, "WIDTH", 72)
    monkeypatch.setattr(made, "PROMPT", 32)
    less = {"per_device_train_batch_size": 2, "num_anchors": 12, "logging_steps": 10}
    monkeypatch.setattr(made, "DFlashTrainingArguments", lambda folder, **given: arguments(folder, **given | less))
    rows = made.write_text(argparse.Namespace(output_dir=tmp_path, texts=30, seed=0), tiny_target, tokenizer)
    assert all(sum(row["supervised"]) == 40 for row in rows)
    torch.manual_seed(0)
    untrained = made.fresh_draft(tiny_target, "dflash2").eval()
    trained = made.make_draft(tmp_path, tiny_target, rows, made.Training("draft", "dflash2", 24, seed=0))
    losses = [line["loss"] for line in json.loads((tmp_path / "draft" / "log.json").read_text()) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    goes_on = made.Training("draft2", "dflash2", 1, seed=1, options={"learning_rate": 1e-9}, start="draft")
    again = made.make_draft(tmp_path, tiny_target, rows, goes_on)
    for name, weight in trained.state_dict().items():
        assert torch.allclose(again.state_dict()[name], weight, atol=1e-6), name
    before = made.measure(untrained, tiny_target, tokenizer, 1)
    after = made.measure(trained, tiny_target, tokenizer, 1)
    assert before["identical"]
    assert after["identical"]
    assert before["acceptance_length"] < 1.05
    assert after["acceptance_length"] > before["acceptance_length"] + 0.05


@pytest.mark.quick
def test_the_held_out_files_are_not_among_the_sources():
    """Two of them are tables whose text stands in some thirty other encodings too."""
    made = recipe()
    modules, tests = made.sources(), made.sources(tests=True)
    assert not {*modules} & {*tests} - {""}
    sources = modules + tests
    held_out = [prompt["prompt"] for prompt in made.PROMPTS if prompt["source"] not in ("iso8859_15.py", "cp1251.py")]
    assert len(held_out) == len(made.PROMPTS) - 2
    assert len(sources) > 300
    assert not any(prompt in source for prompt in held_out for source in sources)
