"""Every option of TrainingArguments: it works with a draft, is refused by name, or needs what a test has not."""

import gc
import multiprocessing
from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

import training_run
from dflash_hub.training import DFlashTrainingArguments
from dflash_hub.training.options import WITHOUT_EFFECT

pytestmark = pytest.mark.usefixtures("undrawn")

REFUSED = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all",
    "average_tokens_across_devices": False,
    "remove_unused_columns": True,
}
TOGETHER = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "num_train_epochs": 2.0,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0},
    "warmup_steps": 1,
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "torch_empty_cache_steps": 1,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "disable_tqdm": True,
    "report_to": "none",
    "run_name": "all",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_delay": 1,
    "eval_on_start": True,
    "eval_accumulation_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,
    "restore_callback_states_from_checkpoint": True,
    "seed": 3,
    "data_seed": 4,
    "use_cpu": True,
    "accelerator_config": {"split_batches": False},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_in_order": True,
    "train_sampling_strategy": "group_by_length",
    "skip_memory_metrics": False,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
}
ELSEWHERE = {
    "output_dir, save_only_model, resume_from_checkpoint, ignore_data_skip": "what a run leaves and goes on from",
    "bf16, fp16, bf16_full_eval, fp16_full_eval, tf32": "mixed precision of a GPU",
    "activation_checkpointing, activation_checkpointing_kwargs": "memory that is worth saving",
    "gradient_checkpointing, gradient_checkpointing_kwargs": "the former names of these",
    "torch_compile, torch_compile_backend, torch_compile_mode": "minutes of a compiler",
    "optim_args, optim_target_modules": "optimizers of other packages",
    "auto_find_batch_size": "memory that runs out",
    "eval_use_gather_object, local_rank, save_on_each_node": "several processes",
    "ddp_find_unused_parameters, ddp_bucket_cap_mb, ddp_broadcast_buffers, ddp_static_graph": "several processes",
    "ddp_backend, ddp_timeout, fsdp, fsdp_config, deepspeed, parallelism_config": "several processes",
    "push_to_hub, hub_token, hub_private_repo, hub_model_id, hub_strategy, hub_always_push, hub_revision": "a Hub",
    "project, trackio_space_id, trackio_bucket_id, trackio_static_space_id": "a service for logs",
    "enable_jit_checkpoint, full_determinism, debug": "changes of the whole process",
    "dataloader_multiprocessing_context, length_column_name": "data of another form",
}
"""Options that neither stand above nor are tried here, by what they need."""


def test_every_option_of_the_trainer_is_tried_refused_or_known():
    known = {*REFUSED, *TOGETHER}
    for names in ELSEWHERE:
        known |= set(names.split(", "))
    assert {field.name for field in fields(TrainingArguments)} <= known
    assert set(WITHOUT_EFFECT) <= known


@pytest.mark.parametrize(
    ("name", "library", "state"),
    [
        ("adamw_bnb_8bit", "bitsandbytes", torch.uint8),
        ("lion_8bit", "bitsandbytes", torch.uint8),
        ("adamw_torch_8bit", "torchao", torch.uint8),
        ("adamw_torch_4bit", "torchao", torch.uint8),
        ("adafactor", "transformers", torch.float32),
    ],
)
def test_optimizers_of_other_packages_train_a_draft(tmp_path, name, library, state):
    """Tensors of less than 4,096 numbers keep a state in float32; those of this draft's MLP have more."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    trainer = training_run.trainer(tmp_path, {"intermediate_size": 256}, optim=name, max_steps=2)
    before = trainer.model.layers[0].mlp.up_proj.weight.clone()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a step, for seconds
        trainer.train()
    weight = trainer.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, before)
    assert type(trainer.optimizer.optimizer).__module__.startswith(library)
    values = [value for value in trainer.optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    large = max(values, key=torch.Tensor.numel)
    assert getattr(large, "codes", large).dtype == state


def test_an_optimizer_whose_package_is_not_installed_is_refused_by_name(tmp_path):
    with pytest.raises(ImportError, match="galore_torch"):
        training_run.trainer(tmp_path, optim="galore_adamw_8bit", optim_target_modules=["mlp"]).train()


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_do_nothing_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name} is "):
        DFlashTrainingArguments(str(tmp_path), use_cpu=True, **{name: REFUSED[name]})


def test_the_options_that_a_small_run_can_take_work_together(tmp_path):
    names = {field.name for field in fields(TrainingArguments)}
    options = {name: value for name, value in TOGETHER.items() if name in names}
    trainer = training_run.trainer(tmp_path, eval_rows=6, **options)
    trainer.train()
    log = trainer.state.log_history
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert len(losses) == 4
    assert trainer.state.best_metric == min(losses[1:])
    assert rates == pytest.approx([0.0, 1e-3, 2.5e-4], rel=1e-3)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    # Its loaders' processes would live on, and hold what this process has open; unasked, each needs five seconds.
    for process in multiprocessing.active_children():
        process.terminate()
    del trainer
    gc.collect()
