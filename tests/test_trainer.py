"""Runs of the trainer: what learns, what is saved, and what happens when a run is interrupted, split or spoiled."""

import json
import pickle
import re
import shutil
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import tiny
import training_run
from dflash_hub import DFlashDraftModel
from dflash_hub.evaluation import compare
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.best import describe_block
from dflash_hub.training.loading import parallel_options
from dflash_hub.training.trainer import last_checkpoint
from paths import ROOT, TINY

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_run_killed_and_resumed_is_the_run_that_was_not(tmp_path, train_apart):
    """Killed by SIGKILL, two steps after its checkpoint: losses and weights are the same, bit by bit."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 7, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2}
    whole = train_apart(tmp_path / "whole", **options)
    train_apart(tmp_path / "killed", "--kill-at", "6", signal=9, **options)
    resumed = train_apart(tmp_path / "killed", "--resume", **options)
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"]


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path, train_apart):
    train_apart(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    state = tmp_path / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_pickle_in_a_checkpoint_is_not_executed_on_resuming(tmp_path):
    training_run.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    checkpoint, trace = tmp_path / "checkpoint-1", tmp_path / "unpickled"

    class Bomb:
        def __reduce__(self):
            return open, (str(trace), "w")

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = checkpoint / name
        good = file.read_bytes()
        torch.save({"state": Bomb()}, file)
        again = training_run.trainer(tmp_path, max_steps=2)
        with pytest.raises(pickle.UnpicklingError):
            again.train(resume_from_checkpoint=str(checkpoint))
        assert not trace.exists()
        file.write_bytes(good)
    again.train(resume_from_checkpoint=str(checkpoint))


def test_two_processes_are_one_with_twice_the_batch(tmp_path, train_apart):
    """A DFlash 2 draft with D-PACE: two sums of weights are known only after the forward.

    Rows divide evenly among steps here; else processes repeat some at the end of an epoch, as always.
    """
    options = {"packing": False, "max_steps": 3, "loss_weights": "dpace"}
    one = training_run.trainer(tmp_path / "one", tiny.SECOND, per_device_train_batch_size=4, **options)
    one.train()
    options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    fields = ("--fields", json.dumps(tiny.SECOND))
    two = train_apart(tmp_path / "two", *fields, processes=2, **options)
    assert_one_run(one, two, tmp_path / "two")
    lines = [line["acceptance_length"] for line in one.state.log_history if "loss" in line]
    assert two["figures"] == pytest.approx(lines, rel=0.05)


def assert_one_run(one: DFlashTrainer, two: dict, folder: Path):
    """Two processes had the losses, and saved the weights, of one."""
    losses = [line["loss"] for line in one.state.log_history if "loss" in line]
    assert list(two["losses"].values()) == pytest.approx(losses, rel=1e-4)
    found = load_file(folder / "draft" / "model.safetensors")
    for name, values in one.model.state_dict().items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)


def test_a_target_that_is_spread_over_two_processes_trains_as_a_whole_one(tmp_path, train_apart):
    """Each process has rows of its own, and the loss needs the target's distribution."""
    tiny.target("qwen3").save_pretrained(tmp_path / "target")
    options = {"packing": False, "max_steps": 3, "loss": "ce=0.5,kl=0.5"}
    one = training_run.trainer(tmp_path / "one", per_device_train_batch_size=4, **options)
    one.train()
    options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    two = train_apart(tmp_path / "two", "--spread", str(tmp_path / "target"), processes=2, **options)
    assert_one_run(one, two, tmp_path / "two")


def test_a_target_is_spread_over_several_processes_only():
    with pytest.raises(ValueError, match="tensor_parallel is True, but there is one process"):
        parallel_options()


@pytest.mark.parametrize("weights", ["decay", "dpace"])
def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path, weights):
    losses = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        trainer = training_run.trainer(tmp_path, loss_weights=weights, max_steps=3, **options)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    new = "activation_checkpointing" in DFlashTrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if new else "gradient_checkpointing"
    plain, saving = (training_run.trainer(tmp_path, max_steps=3, **{option: on}) for on in (False, True))
    for trainer in (plain, saving):
        trainer.train()
    for name, values in plain.model.state_dict().items():
        torch.testing.assert_close(saving.model.state_dict()[name], values)


@pytest.mark.quick
def test_only_the_draft_learns_and_only_the_draft_is_saved(tmp_path):
    trainer = training_run.trainer(tmp_path)
    target, before = digests(trainer.target), digests(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = digests(trainer.model)
    assert all(after[name] != before[name] for name in after)
    assert digests(trainer.target) == target
    assert not any(weight.requires_grad for weight in trainer.target.parameters())
    assert not trainer.target.training
    assert tiny.as_found(trainer.target)
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(trainer.model.state_dict())


def test_the_trained_draft_reloads_bit_equal_and_accepts_as_before(tmp_path):
    trainer = training_run.trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = DFlashDraftModel.from_pretrained(tmp_path / "saved").eval()
    assert digests(again) == digests(trainer.model)
    ids = tiny.prompt(20)
    results = [compare(draft, trainer.target, ids, 24) for draft in (trainer.model.eval(), again)]
    assert results[0].committed == results[1].committed
    assert results[1].identical


def test_mixed_precision_trains_and_leaves_float32_weights(tmp_path):
    trainer = training_run.trainer(tmp_path, bf16=True)
    trainer.train()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.log_history[-2]["loss"] < 4


def test_learning_shows_in_loss_and_acceptance_on_held_out_text(tmp_path, tiny_target):
    """The built-in target, for a few seconds: loss falls, and expected and decoded acceptance rise."""
    from dflash_hub import DFlashDraftSpec

    torch.manual_seed(0)
    shape = {"block_size": 8, "num_hidden_layers": 1, "target_layer_ids": [1, 2, 4], "mask_token_id": 1}
    selector = {"selector_rank": 16, "selector_top_k": 8}
    draft = DFlashDraftSpec("tiny").build(tiny_target.config, "dflash2", **shape, **selector)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    ids = tokenizer((TINY / "train.py").read_text(), return_tensors="pt").input_ids[0]
    prompt = ids[: 44 * 24].view(44, 24)[:, :8]
    text = tiny_target.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=56, min_new_tokens=56, do_sample=False
    )
    rows = [{"input_ids": ids, "supervised": [0] * 8 + [1] * 56} for ids in text.tolist()]
    args = DFlashTrainingArguments(
        str(tmp_path),
        **training_run.SMALL | {"max_steps": 20, "learning_rate": 1.5e-2, "max_length": 64, "num_anchors": 16},
        eval_acceptance_prompts=2,
        eval_acceptance_tokens=32,
    )
    trainer = DFlashTrainer(draft, tiny_target, args, rows[:36], rows[36:])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert before["eval_acceptance_length"] < 1.02
    assert after["eval_acceptance_length"] > 1.05
    assert after["eval_decoded_acceptance_length"] > before["eval_decoded_acceptance_length"] + 0.02


def test_evaluation_does_not_depend_on_the_batch_and_is_the_same_each_time(tmp_path):
    results = []
    for size in (1, 3):
        trainer = training_run.trainer(tmp_path, per_device_eval_batch_size=size)
        trainer.eval_dataset = trainer.train_dataset
        results += [trainer.evaluate(), trainer.evaluate()]
    for key in ("eval_loss", "eval_accuracy", "eval_acceptance_length"):
        assert [line[key] for line in results] == pytest.approx([results[0][key]] * 4)


# Bad input -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_try(tmp_path):
    trainer = training_run.trainer(tmp_path)
    with torch.no_grad():
        trainer.model.fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"The loss is nan at step 1; .* Try a lower learning_rate"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": 99, "vocab_size": None}, "mask_token_id is 99 in the draft, but the target has 12"),
        ({"target_layer_ids": [0, 7], "num_target_layers": None}, "last tapped layer is 7 .* the target has 4"),
        ({"block_size": 64}, "No row can be trained on: .* 24 too short.* at least 64 tokens"),
        ({"mask_token_id": 5}, "The data contains the mask token 5"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        training_run.trainer(tmp_path, fields)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_anchors", 0), ("loss_gamma", -1.0), ("dpace_alpha", 2.0), ("remove_unused_columns", True)],
)
def test_options_that_make_no_sense_are_refused_by_name(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        DFlashTrainingArguments(str(tmp_path), **{option: value})


def test_a_target_whose_layers_cannot_be_tapped_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    mamba = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", **(tiny.SMALL | mamba)))
    draft = tiny.draft(tiny.target("qwen3"))
    with pytest.raises(ValueError, match="mamba2 keeps state that cannot be put back"):
        DFlashTrainer(draft, target, DFlashTrainingArguments(str(tmp_path), use_cpu=True), training_run.rows())


def test_an_earlier_run_is_not_overwritten_by_a_new_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    training_run.trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match="checkpoint-4 is of an earlier run"):
        training_run.trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        training_run.trainer(tmp_path / "empty", **options).train(resume_from_checkpoint=True)


def test_a_full_disk_ends_the_run_with_the_last_whole_checkpoint_named(tmp_path, servers):
    """A limit on the size of files stands for the disk: from the second checkpoint on nothing can be written."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import training_run
        from transformers import TrainerCallback

        class Full(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

        trainer = training_run.trainer({str(tmp_path)!r}, save_strategy="steps", save_steps=4)
        trainer.add_callback(Full())
        try:
            trainer.train()
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(error)
    """
    said = servers.training.run(code=textwrap.dedent(code)).stdout
    assert "The checkpoint of step 8 could not be written" in said
    assert "checkpoint-4: make room, and resume from it" in said
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-8").exists()


# The best evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "fields", "expected"),
    [
        (
            (0.6, 0.4, 0.01, 0.0),
            {},
            r"^Positions 3 to 4 of a block add 0.01 tokens a cycle: block_size 3 would keep 99.5%",
        ),
        ((0.6, 0.4, 0.01, 0.0), {"block_size": 4}, "block_size 2 would keep 99.5%"),
        ((0.0, 0.0, 0.0, 0.0), {}, None),
        ((0.2, 0.05, 0.0, 0.0), {}, None),
        ((0.6, 0.4, 0.3, 0.1), {}, "the last is accepted in 10.0% of all cycles.$"),
        ((0.9, 0.8, 0.7, 0.6), {}, "60.0% of all cycles. A block_size above 5 may add"),
        ((), {}, None),
    ],
)
def test_acceptance_by_position_tells_whether_a_smaller_block_would_do(shares, fields, expected):
    config = SimpleNamespace(**{"block_size": 5, "num_drafted": 4} | fields)
    said = describe_block({f"eval_decoded_accepted_{k}": share for k, share in enumerate(shares, 1)}, config)
    assert said == expected if expected is None else re.search(expected, said)


@pytest.mark.parametrize(
    ("args", "eval_rows", "message"),
    [
        (
            {"metric_for_best_model": "speed"},
            4,
            "metric_for_best_model is 'speed', which is none of what an evaluation",
        ),
        ({"metric_for_best_model": "decoded_acceptance_length"}, 4, "needs eval_acceptance_prompts"),
        ({"early_stopping": 2}, 4, "early_stopping counts evaluations, but there are none"),
        ({"early_stopping": 0, "eval_strategy": "epoch"}, 4, "early_stopping is 0; it must be at least 1"),
        (
            {"eval_strategy": "steps", "eval_acceptance_prompts": 2},
            0,
            "chosen by decoded_acceptance_length, but there are no",
        ),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4}
            | {"eval_strategy": "steps", "eval_steps": 2},
            4,
            "needs a checkpoint of every evaluation, but eval_steps is 2 and save_steps is 4",
        ),
    ],
)
def test_a_best_checkpoint_that_cannot_be_chosen_is_refused_by_name(tmp_path, args, eval_rows, message):
    with pytest.raises(ValueError, match=message):
        training_run.trainer(tmp_path, eval_rows=eval_rows, **args)


def spoilt(folder, tiny_target, tiny_draft, **args):
    """A trained draft that a learning rate far too high makes worse from step to step."""
    text = torch.tensor([0, *range(40, 100)])[None]
    text = tiny_target.generate(text, attention_mask=text * 0 + 1, max_new_tokens=60, eos_token_id=None)
    rows = [{"input_ids": text[0, n : n + 60].tolist()} for n in range(0, 60, 5)]
    options = training_run.SMALL | {"max_length": 64, "learning_rate": 0.03, "warmup_steps": 0, "max_steps": 9}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_acceptance_prompts": 1, "eval_acceptance_tokens": 16}
    given = DFlashTrainingArguments(str(folder), **options | args)
    return DFlashTrainer(tiny_draft, tiny_target, given, rows[:8], rows[8:])


def test_the_best_checkpoint_is_the_one_that_decodes_best_and_ends_the_run(tmp_path, tiny_target, tiny_draft):
    options = {"save_total_limit": 2, "load_best_model_at_end": True, "early_stopping": 2}
    trainer = spoilt(tmp_path, tiny_target, tiny_draft, **options)
    trainer.train()
    trainer.save_model()
    decoded = [line["eval_decoded_acceptance_length"] for line in trainer.state.log_history if "eval_loss" in line]
    best = decoded.index(max(decoded)) + 1
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (best, max(decoded))
    assert len(decoded) == trainer.state.global_step == best + 2
    kept = DFlashDraftModel.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert digests(DFlashDraftModel.from_pretrained(tmp_path)) == digests(kept)
    lines = trainer.best_evaluation()
    assert lines[0].startswith(f"The best evaluation: step {best} with {max(decoded):.3f} tokens a cycle when decoded")
    assert "training loss" in lines[0]
    assert lines[1] == f"What is saved is checkpoint-{best}."
    assert not lines[2:], "a draft that accepts nothing shows nothing of smaller blocks"
    for _ in range(2):  # with its last checkpoint, and without
        again = spoilt(tmp_path, tiny_target, tiny_draft, **options)
        again.train(resume_from_checkpoint=True)
        assert (again.state.global_step, again.best_evaluation()) == (best + 2, lines)
        assert digests(again.model) == digests(kept)
        shutil.rmtree(tmp_path / f"checkpoint-{best + 2}")
