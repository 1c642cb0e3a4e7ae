# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The Hugging Face Trainer, with a draft to train and a target that stays as it is."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch.nn import Module
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from ..evaluation import greedy
from ..generate_dflash import check_compatible
from ..generation_dflash import DecodeStatistics
from .arguments import DFlashTrainingArguments
from .blocks import Blocks, draw_anchors
from .data import Collator, Reading, Report, columns_of, prepare, rows_of
from .objective import Figures, Objective
from .progress import write_progress

EVALUATION = -1
"""The step whose anchors every evaluation draws, so that evaluations can be compared."""
_FOR_RESUMING = re.compile("optimizer|scheduler|scaler|rng_state|trainer_state|training_args")


class DFlashTrainer(Trainer):
    """Trains a draft for a target, which is frozen and never saved.

    Args:
        model: the draft; `DFlashDraftSpec.build` makes a fresh one.
        target: the target; its parameters are frozen, and it is moved to the trainer's device unless it is spread over
            several or quantised.
        args: how to train.
        train_dataset, eval_dataset: rows with `messages`, `text` or `input_ids` (see `data`), or packed ones.
        processing_class: the target's tokenizer; not needed for rows of ids.
        callbacks, optimizers: as for `Trainer`.

    Raises:
        ValueError: the draft does not fit the target, the target cannot be tapped, or the data cannot be read.
    """

    def __init__(
        self,
        model: Any,
        target: Any,
        args: DFlashTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = args or DFlashTrainingArguments()
        check_compatible(model.config, target)
        if args.eval_acceptance_prompts and args.fsdp:
            raise ValueError("eval_acceptance_prompts needs a whole draft on each process; leave it out with FSDP.")
        self.reading = reading_for(processing_class, target, model.config, args)
        self.reports: dict[str, Report] = {}
        with args.main_process_first(desc="reading the data"):
            train_dataset = self._prepared(train_dataset, "train")
            eval_dataset = self._prepared(eval_dataset, "eval")
        super().__init__(
            model,
            args,
            data_collator=Collator(args.max_length if args.world_size > 1 else None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            # Not a loss for Trainer's own use: told that there is one, it leaves the scale to us.
            compute_loss_func=self.compute_loss,
            compute_metrics=_figures,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        model.config.use_cache = True  # Trainer turns it off, and it would be saved so
        if getattr(target, "hf_device_map", None) is None and not getattr(target, "is_quantized", False):
            target = target.to(args.device)
        self.target = target
        self.objective = Objective(model.config, target, args.recipe)
        model.set_attn_implementation("flex_attention" if self.objective.flex(args.device) else "sdpa")
        self._counts: torch.Tensor | None = None  # [5, Q - 1], since the last line of the log

    def _prepared(self, rows: Any, name: str) -> Any:
        """Packed rows, of which `self.reports` tells."""
        if isinstance(rows, dict):
            return {key: self._prepared(part, f"{name} {key}") for key, part in rows.items()}
        if rows is None or isinstance(rows, str) or "lengths" in columns_of(rows):
            return rows
        rows, self.reports[name] = prepare(rows, self.reading)
        return rows

    # One step --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Draw the anchors of a step; the sum of their weights over all of its batches, on all processes."""
        if not batch_samples:
            return None
        weights = torch.zeros((), device=device)
        for batch in batch_samples:
            batch["anchors"] = draw_anchors(
                rows_of(batch), self.args.num_anchors, self.args.seed, self.state.global_step
            )
            weights += self._blocks(batch).weights(self.objective.gamma).sum().to(device)
        return self.accelerator.reduce(weights)

    def _blocks(self, batch: dict[str, torch.Tensor]) -> Blocks:
        return self.objective.blocks(rows_of(batch), batch["anchors"])

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The mean over all counted positions of the step, weighted; this process's share of it, for its gradient.

        Raises:
            ValueError: the loss is no number.
        """
        loss, counts = self.objective(model, self._blocks(inputs))
        weights = (
            num_items_in_batch
            if num_items_in_batch is not None
            else self._get_num_items_in_batch([inputs], loss.device)
        )
        # Gradients are averaged over processes, and the sum is wanted.
        loss = loss / torch.as_tensor(weights).clamp_min(1e-9) * self.accelerator.num_processes
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; the last checkpoint is from before. "
                "Try a lower learning_rate or a longer warm-up, or bf16 in place of fp16."
            )
        counts = counts.sum(0)
        self._counts = counts if self._counts is None else self._counts + counts
        return (loss, counts) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: most of them are the target's."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; beside the loss stand accuracy and expected acceptance length since the last line."""
        if "loss" in logs and self._counts is not None:
            logs |= Figures.of(self.accelerator.reduce(self._counts)).named()
            self._counts = None
        super().log(logs, start_time)

    # Saving ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in Trainer; True goes on from the last checkpoint that was written whole.

        Raises:
            ValueError: there is none to go on from, or an earlier run's would be overwritten.
        """
        found = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint in (True, "true", "True") and found is None:
            raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to go on from; leave the option out.")
        if not resume_from_checkpoint and found is not None and self.args.save_strategy != "no":
            raise ValueError(
                f"{found} is of an earlier run. Go on from it with resume_from_checkpoint=True, or choose another "
                "output_dir."
            )
        if resume_from_checkpoint in (True, "true", "True"):
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A whole repository, and how the run went."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_progress(Path(output_dir or self.args.output_dir), self.state.log_history, self._facts())

    def _facts(self) -> dict[str, Any]:
        """What the card says of the run."""
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "steps": f"{self.state.global_step:,} of {rows} rows, up to {args.max_length:,} tokens each",
            "anchors": f"up to {args.num_anchors} in a row, gamma {self.objective.gamma:g}",
            "loss": self._loss_in_words(),
            "optimizer": f"{plain(args.optim)}, learning rate {args.learning_rate:g}, "
            f"{plain(args.lr_scheduler_type)} schedule",
        }

    def _loss_in_words(self) -> str:
        distilled, weight = self.args.distillation, self.args.selector_loss_weight
        words = "cross-entropy" + (f", {distilled:g} of it replaced by distillation" if distilled else "")
        selector = self.objective.config.model_type == "dflash2"
        return words + (f", and {weight:g} times the selector's" if selector else "")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in Trainer; what was written of a checkpoint that could not be is removed.

        Raises:
            OSError: with what to do.
        """
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            partial = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if last_checkpoint(self.args.output_dir) != partial:
                shutil.rmtree(partial, ignore_errors=True)
            whole = last_checkpoint(self.args.output_dir)
            advice = f"The last whole one is {whole}: make room, and go on from it (--resume-from-checkpoint true)."
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written: {error}\n"
                f"{advice if whole else 'There is no earlier one.'}"
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The draft's own card, written with it; it becomes the repository's."""
        path = Path(self.args.output_dir)
        if self.is_world_process_zero():
            self.accelerator.unwrap_model(self.model).write_card(
                path, ModelCard.load(path / "README.md"), self.hub_model_id
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer.

        Raises:
            RuntimeError: the Hub did not take it; where the draft is, and how to push it later.
        """
        return kept_safe(
            lambda: super(DFlashTrainer, self).push_to_hub(*args, **kwargs),
            self.args.output_dir,
            self.args.hub_model_id,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Trainer, whose list of files to push lacks the code and the card that travel with a draft."""
        if self.is_world_process_zero():
            for path in Path(checkpoint_folder).iterdir():
                copy = Path(self.args.output_dir) / path.name
                if path.is_dir():
                    shutil.copytree(path, copy, dirs_exist_ok=True)
                elif not _FOR_RESUMING.match(path.name):
                    shutil.copyfile(path, copy)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    # Evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self,
        model: Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Counts of each row, `[B, 5, Q - 1]`, and its loss and weight, `[B, 2]`; all of them add up."""
        batch = dict(self._prepare_inputs(inputs))
        counts, sums = [], []
        for index in range(len(batch["input_ids"])):
            row = {name: values[index : index + 1] for name, values in batch.items()}
            row["anchors"] = draw_anchors(rows_of(row), self.args.num_anchors, self.args.seed, EVALUATION)
            blocks = self._blocks(row)
            with self.compute_loss_context_manager():
                loss, counted = self.objective(model, blocks)
            counts.append(counted)
            sums.append(torch.stack([loss, blocks.weights(self.objective.gamma).sum()]))
        return None, torch.cat(counts), torch.stack(sums)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in Trainer: loss, accuracy by position, expected acceptance length; decoded, where it is asked for."""
        eval_dataset = self._prepared(eval_dataset, metric_key_prefix)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if self.args.eval_acceptance_prompts and not isinstance(rows, dict):
            decoded = {f"{metric_key_prefix}_decoded_acceptance_length": self.decoded_acceptance(rows)}
            self.log(decoded)
            metrics |= decoded
        return metrics

    @torch.no_grad()
    def decoded_acceptance(self, rows: Any) -> float:
        """Tokens per cycle after the first prompts of packed `rows`, decoded greedily by the engine."""
        draft = self.accelerator.unwrap_model(self.model)
        training, statistics = draft.training, DecodeStatistics()
        draft.eval()
        for row in islice(rows, self.args.eval_acceptance_prompts):
            ids = prompt_of(row).to(self.target.device)
            ways = {"custom_generate": draft.speculate, "statistics": statistics}
            greedy(self.target, ids, self.args.eval_acceptance_tokens, **ways)
        draft.train(training)
        return statistics.acceptance_length


def plain(name: Any) -> str:
    """A name that may be one of transformers' enumerations."""
    return str(getattr(name, "value", name))


def last_checkpoint(folder: Any) -> Path | None:
    """The last checkpoint in `folder` that was written whole: its state is what is written last."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2] or 0))
    return next((path for path in reversed(found) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def kept_safe(push: Callable[[], Any], folder: Any, repo_id: str | None) -> Any:
    """Push what a long run made; if the Hub fails, say where it is.

    Raises:
        RuntimeError: with the command that pushes it later.
    """
    try:
        return push()
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"The run is over and the draft is safe in {folder}, but it is not on the Hub: {error}\n"
            f"Push it later: dflash-hub push {folder} {repo_id or 'me/my-draft'}"
        ) from error


def reading_for(tokenizer: Any, target: Any, config: Any, args: DFlashTrainingArguments) -> Reading:
    """How rows are read for this pair."""
    stops = target.generation_config.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    own = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Reading(
        tokenizer,
        config.block_size,
        config.mask_token_id,
        args.max_length,
        args.packing,
        frozenset([*stops, *own]),
    )


def prompt_of(row: dict[str, Any]) -> torch.Tensor:
    """`[1, P]`: the first document of a packed row up to its first supervised token, or its half if all is."""
    length = (row.get("lengths") or [len(row["input_ids"])])[0]
    supervised = row["supervised"][:length]
    end = supervised.index(1) or max(1, length // 2)
    return torch.tensor([row["input_ids"][:end]])


def _figures(prediction: Any) -> dict[str, float]:
    """Trainer's `compute_metrics`, of what `prediction_step` gave for every row."""
    figures = Figures.of(torch.as_tensor(prediction.predictions).sum(0))
    loss, weight = torch.as_tensor(prediction.label_ids).double().sum(0).tolist()
    by_position = {f"accuracy_{k}": value for k, value in enumerate(figures.by_position, start=1)}
    return {"loss": loss / max(weight, 1e-9)} | figures.named() | by_position
