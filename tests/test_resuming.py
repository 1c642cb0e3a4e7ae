"""A resumed run is the uninterrupted one, or says before its first step why it is not."""

import json
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import tiny
import training_run
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.resuming import RECORD, digest_of_rows

pytestmark = pytest.mark.usefixtures("undrawn")

OPTIONS = training_run.SMALL | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}


def trainer(folder, rows=None, fields=None, target=None, **args) -> DFlashTrainer:
    target = target or tiny.target("qwen3")
    given = DFlashTrainingArguments(str(folder), **OPTIONS | args)
    draft = tiny.draft(target, **(fields or {}))
    return DFlashTrainer(draft, target, given, training_run.rows() if rows is None else rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, of which the last checkpoint is taken away, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    shutil.rmtree(folder / "checkpoint-5")
    return folder, digests(run.model)


class Begun(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_steps": 9}, "max_steps was 5 and is 9"),
        ({"max_steps": -1, "num_train_epochs": 2}, "max_steps was 5 and is None; .*num_train_epochs was None and is 2"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was cosine and is linear"),
        ({"warmup_steps": 2}, r"warmup_steps was 0.04 and is 2"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4 and is 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"num_anchors": 5}, "num_anchors was 6 and is 5"),
        ({"loss": "ce=0.5,kl=0.5"}, "loss was None and is ce=0.5,kl=0.5"),
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"ignore_data_skip": True}, "ignore_data_skip begins with the first rows again"),
        ({"rows": training_run.rows(25)}, r"the data was 14 rows \(.*\) and is 15 rows"),
        ({"target": tiny.target("qwen3", seed=5)}, "the target was .* and is "),
    ],
)
def test_what_makes_the_rest_another_run_is_said_before_its_first_step(whole, args, message):
    run = trainer(whole[0], **args)
    run.add_callback(Begun())
    with pytest.warns(UserWarning, match=message), pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=True)


def test_other_processes_another_device_or_version_are_named_before_the_first_step(whole, tmp_path):
    """The record is edited in place of a run with two processes, on another machine."""
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-3" / RECORD
    record = json.loads(path.read_text())
    before = {
        "the number of processes": 2,
        "the device": "a GPU",
        "torch": "2.0",
        "transformers": "5.0",
        "dflash-hub": "0",
    }
    now = {name: record["around"][name] for name in before}
    assert now["the number of processes"] == 1
    record["around"] |= before
    path.write_text(json.dumps(record))
    run = trainer(tmp_path)
    run.add_callback(Begun())
    with pytest.warns(UserWarning, match="is not the uninterrupted one") as warned, pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=True)
    for name in before:
        assert f"{name} was {before[name]} and is {now[name]}" in str(warned[0].message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"learning_rate": 2e-3},
            r"The optimizer of .*checkpoint-3 goes on as it was: learning_rate is 0.002, but was",
        ),
        ({"weight_decay": 0.1}, "weight_decay is 0.1, but was 0.0"),
        ({"fields": {"is_causal": True}}, "The draft of .* is_causal is True, but was False"),
        ({"fields": {"num_hidden_layers": 1, "layer_types": None}}, "num_hidden_layers is 1, but was 2"),
    ],
)
def test_what_the_checkpoint_would_silently_override_is_refused(whole, args, message):
    with pytest.raises(ValueError, match=message):
        trainer(whole[0], **args).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "args",
    [{}, {"logging_steps": 2, "save_steps": 1, "save_total_limit": 2, "dataloader_pin_memory": True}],
)
def test_without_a_change_that_matters_the_weights_are_those_of_the_uninterrupted_run(whole, tmp_path, args):
    shutil.copytree(whole[0], tmp_path / "again")
    run = trainer(tmp_path / "again", **args)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.train(resume_from_checkpoint=True)
    assert digests(run.model) == whole[1]


def test_a_stream_goes_on_where_it_was(tmp_path):
    def run(**args):
        made = trainer(tmp_path, Dataset.from_list(training_run.rows()).to_iterable_dataset(), **args)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The run that resumes")
            made.train(**resume)
        return digests(made.model)

    resume = {}
    uninterrupted = run()
    shutil.rmtree(tmp_path / "checkpoint-5")
    resume = {"resume_from_checkpoint": True}
    assert run() == uninterrupted


def test_a_run_that_is_over_takes_no_further_step(tmp_path):
    """Trainer alone would take one, as it asks only after a step whether that was the last."""
    options = {"lr_scheduler_type": "constant", "max_steps": 3}
    run = trainer(tmp_path, **options)
    run.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert digests(again.model) == digests(run.model)


def test_checkpoints_that_lack_something_are_refused_or_said_to(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / RECORD).unlink()
    run = trainer(tmp_path)
    run.add_callback(Begun())
    with pytest.warns(UserWarning, match="holds no record of its run"), pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="holds no optimizer"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_the_digest_of_rows_is_that_of_their_content():
    rows = [{"input_ids": [1, 2, 3], "supervised": [1, 1, 1], "lengths": [3]} for _ in range(4)]
    found = {digest_of_rows(Dataset.from_list(rows))}
    found |= {digest_of_rows(Dataset.from_list([*rows, *rows]).select([0, 5, 2, 7]))}
    assert len(found) == 1
    for name, values in (("input_ids", [1, 2, 4]), ("supervised", [0, 1, 1]), ("lengths", [2, 1])):
        found |= {digest_of_rows(Dataset.from_list([*rows[:3], rows[3] | {name: values}]))}
    assert len(found) == 4


def test_the_record_of_a_checkpoint_holds_no_token(tmp_path):
    trainer(tmp_path, hub_token="hf_secret", max_steps=3).train()
    text = (tmp_path / "checkpoint-3" / RECORD).read_text()
    assert "hf_secret" not in text
    assert json.loads(text)["around"]["torch"] == torch.__version__
