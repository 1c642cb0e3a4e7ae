"""Rounds of answers that the target writes anew while a draft trains, interrupted, gone on with, and refused."""

import json
import shutil
import time

import pytest
from transformers import AutoTokenizer, TrainerCallback

import training_run
from dflash_hub import DFlashDraftModel
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.rounds import Answers
from paths import TINY

pytestmark = pytest.mark.usefixtures("undrawn")

TEXTS = ["def add(a, b):\n    return", "import os\nimport", "class A(B):\n    def", "import os\nimport"]
OPTIONS = training_run.SMALL | {"max_length": 48, "num_anchors": 4, "max_steps": 6, "per_device_train_batch_size": 2}
OPTIONS |= {"regenerate_every": 2, "regenerate_temperature": 1.0, "regenerate_max_new_tokens": 8}
OPTIONS |= {"regenerate_prompt_tokens": 8, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def trainer(tmp_path, tiny_target):
    def make(name: str, texts: list[str] = TEXTS, **args) -> DFlashTrainer:
        tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
        draft = DFlashDraftModel.from_pretrained(TINY / "draft")
        given = DFlashTrainingArguments(str(tmp_path / name), **OPTIONS | args)
        return DFlashTrainer(draft, tiny_target, given, [{"text": text * 3} for text in texts], None, tokenizer)

    return make


def written(folder) -> dict[str, list[str]]:
    """The lines of each round's file."""
    files = sorted(folder.glob("_rounds/*/round-*.jsonl"))
    return {file.name: file.read_text().splitlines() for file in files}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_each_round_has_other_texts_of_the_same_prompts_and_a_resumed_run_has_the_same(tmp_path, trainer):
    """The interrupted run lost the last round's file but for its first row."""
    whole = trainer("whole")
    whole.train()
    rounds = written(tmp_path / "whole")
    assert list(rounds) == ["round-1.jsonl", "round-2.jsonl"]
    texts = [[json.loads(line)["text"] for line in lines] for lines in rounds.values()]
    assert len(set(texts[0] + texts[1])) == 8
    for one, other, source in zip(*texts, TEXTS, strict=True):
        assert one[:8] == other[:8] == source[:8]
    assert [line["round"] for line in whole.state.log_history if "round" in line] == [1, 2]
    cut = trainer("cut")
    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    second = next((tmp_path / "cut").glob("_rounds/*/round-2.jsonl"))
    first_row = second.read_text().splitlines()[0]
    second.write_text(first_row + "\n" + '{"row": "cut off')
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert written(tmp_path / "cut") == rounds
    assert digests(resumed.model) == digests(whole.model)


def test_a_prompt_that_was_answered_is_not_answered_again_wherever_it_stands(tmp_path, trainer):
    first = trainer("one", max_steps=4)
    first.train()
    shutil.rmtree(tmp_path / "one" / "checkpoint-3")
    shutil.rmtree(tmp_path / "one" / "checkpoint-4")
    before = written(tmp_path / "one")["round-1.jsonl"]
    trainer("one", ["while True:\n    x =", *reversed(TEXTS)], max_steps=4).train()
    after = written(tmp_path / "one")["round-1.jsonl"]
    assert after[:4] == before
    assert len(after) == 5
    trainer("one", seed=7, max_steps=4, save_strategy="no").train()
    assert len(list((tmp_path / "one" / "_rounds").iterdir())) == 2


def test_a_row_that_is_not_answered_in_two_tries_is_left_out_of_its_round_alone(tmp_path):
    asked = []

    def answer(row):
        asked.append(row["text"])
        if row["text"] == "bad":
            raise OSError("overloaded")
        return {"text": f"{row['text']} {row['_seed']}"}

    rows = [{"text": text} for text in ("a", "bad", "b")]
    answers = Answers(rows, tmp_path, answer, lambda row: row["text"], 1)
    for _ in range(2):
        answers.write(1, seed=0)
        assert asked == ["a", "bad", "b", "bad"]
    assert [row["text"].split()[0] for row in answers.read(1)] == ["a", "b"]
    answers.write(2, seed=0)
    assert asked.count("bad") == 4
    assert answers.read(1) != answers.read(2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"regenerate_temperature": None}, "The target's own settings are greedy"),
        ({"max_steps": -1}, "regenerate_every needs max_steps"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers is 1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'"),
        ({"regenerate_temperature": 0.0}, r"regenerate_temperature is 0.0; it must be above 0"),
        ({"regenerate_server": "http://127.0.0.1:9/v1"}, "No server that lists its models"),
    ],
)
def test_what_rounds_cannot_work_with_is_refused_by_name(trainer, args, message, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries to connect
    with pytest.raises(ValueError, match=message):
        trainer("refused", **args)
