# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Train a draft with the Hugging Face Trainer; the target stays frozen.

Trainer calls these methods of `DFlashTrainer`, in this order:

1. `train`: checks that the output folder holds no earlier run, finds the checkpoint to resume from, and says what has
   changed since.
2. In each step: `_get_num_items_in_batch` once, for the sum of weights over the batches of the step; then for each
   batch `compute_loss` and `floating_point_ops`. Both of the first two draw the same anchors.
3. Every `logging_steps`: `log`.
4. Every `eval_steps`: `evaluate`, which calls `evaluation_loop`: that calls `prediction_step` for each batch, then
   `_metrics_of` once, then decodes prompts. `log` follows, then the callbacks and the choice of the best checkpoint.
5. Every `save_steps`: `_save_checkpoint`, which calls `_save` (`super()._save` writes the repository, we add how the
   run went), then `_push_from_checkpoint` with a hub strategy, which calls `create_model_card`.
6. At the end `save_model` calls `_save`, and `push_to_hub` calls `create_model_card`.
"""

import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch.nn import Module
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from ..evaluation import greedy, stop_token_ids
from ..generate_dflash import check_compatible
from ..generation_dflash import DecodeStatistics
from ..kinds import FURTHER_LOSSES, kind_of
from .arguments import DFlashTrainingArguments
from .best import ACCEPTED_AT, DECODED, best_of, check_best, describe_best, describe_block
from .blocks import Blocks, draw_anchors
from .contradictions import DECODES_SPREAD, NO_FSDP, metric_names
from .data import Collator, DropReport, PreprocessConfig, columns_of, packed_batch, prepare
from .loading import is_parallel
from .locks import sole_writer
from .metrics import Counts, LossSums, Metrics
from .objective import Objective, StepOutput, check_trainable
from .progress import write_progress
from .reading import rows_of_list
from .resuming import (
    RECORD,
    differences,
    digest_of_weights,
    is_over,
    record_of,
    write_record,
)

EVALUATION = -1
"""Every evaluation draws the anchors of this step, so that evaluations can be compared."""
_FOR_RESUMING = re.compile(
    f"optimizer|scheduler|scaler|rng_state|trainer_state|training_args|{RECORD}"
)


class DFlashTrainer(Trainer):
    """Train a draft for a target, which is frozen and never saved.

    Args:
        model: the draft; `DFlashDraftSpec.build` makes a fresh one.
        target: the target; its parameters are frozen. It is moved to the trainer's device, unless it is quantised or
            spread over several devices.
        args: how to train.
        train_dataset, eval_dataset: rows with `messages`, `text` or `input_ids` (see `data`), or packed rows.
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
        check_trainable(model.config)
        if args.eval_acceptance_prompts and args.fsdp:
            raise ValueError(NO_FSDP)
        decoding = args.eval_acceptance_prompts or args.regenerate_every
        if decoding and is_parallel(target):
            raise ValueError(DECODES_SPREAD)
        self.kind = kind_of(model.config)
        self.preprocess_config = preprocess_config(processing_class, target, model.config, args)
        self.reports: dict[str, DropReport] = {}
        rows = train_dataset
        with args.main_process_first(desc="reading the data"):
            train_dataset = self._prepared(train_dataset, "train")
            eval_dataset = self._prepared(eval_dataset, "eval")
        check_best(args, metric_names(args, model.config), eval_dataset)
        callbacks = list(callbacks or [])
        if args.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(args.early_stopping))
        super().__init__(
            model,
            args,
            data_collator=Collator(args.max_length if args.world_size > 1 else None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            # Setting it turns off Trainer's own loss scaling; compute_loss divides by the total weight of the step.
            compute_loss_func=self.compute_loss,
            compute_metrics=self._metrics_of,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        model.config.use_cache = True  # Trainer turns it off, and it would be saved so
        self.target = target = placed(target, args.device)
        self.objective = Objective(model.config, target, args.recipe)
        model.set_attn_implementation(self.objective.attention(args.device))
        if args.regenerate_every is not None:
            self.train_dataset = self._rounds(rows, processing_class)
        self._logged: tuple[Counts, LossSums] | None = None  # since the last line of the log
        self.latest_metrics: Metrics | None = None
        """Those of the last line of the log."""

    def _prepared(self, rows: Any, name: str) -> Any:
        """Return packed rows; how many documents were left out goes into `self.reports[name]`."""
        if isinstance(rows, dict):
            return {key: self._prepared(part, f"{name} {key}") for key, part in rows.items()}
        if rows is None or isinstance(rows, str) or "lengths" in columns_of(rows):
            return rows
        rows, self.reports[name] = prepare(rows, self.preprocess_config)
        return rows

    def _rounds(self, rows: Any, tokenizer: Any) -> Any:
        """Return the rows of all steps, whose answers the target writes anew in every round."""
        from .rounds import Plan, Rounds, answers_of, check_rounds

        args: Any = self.args
        check_rounds(args, rows, self.target)
        if not hasattr(rows, "column_names"):
            rows = rows_of_list(rows)
        answers = answers_of(args, rows, tokenizer, self.target, digest_of_weights(self.target))
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        plan = Plan(args.regenerate_every, args.max_steps, batch, args.seed)
        return Rounds(self.train_dataset, answers, plan, self._packed_round, self._main_first)

    def _packed_round(self, rows: list[dict[str, Any]], number: int) -> Any:
        """Pack the rows of a round, and log how many there are."""
        packed = self._prepared(rows, f"round {number}")
        self.log({"round": number, "round_rows": len(packed)})
        return packed

    def _main_first(self) -> Any:
        return self.args.main_process_first(desc="writing answers")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return Trainer's sampler; rows of rounds are in the order of their steps already."""
        if self.args.regenerate_every is not None:
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    # One step --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> torch.Tensor | None:
        """Return what the sum of losses is divided by, over all batches of a step, on all processes."""
        if not batch_samples:
            return None
        divisor = torch.zeros((), device=device)
        for batch in batch_samples:
            blocks = self._blocks(batch, self.state.global_step)
            divisor += self.objective.divisor(blocks).to(device)
        return self.accelerator.reduce(divisor)

    def _blocks(self, tensors: dict[str, torch.Tensor], step: int) -> Blocks:
        """Draw the anchors of a step, the same in every call, and return their blocks."""
        batch, seed = packed_batch(tensors), self.args.seed
        anchors = draw_anchors(batch, self.args.num_anchors, seed, step)
        return self.objective.blocks(batch, anchors, (seed, step))

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return this process's share of the weighted mean over all positions of the step.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        progress = self.state.global_step / max(1, self.state.max_steps)
        output = self.objective(model, self._blocks(inputs, self.state.global_step), progress)
        divisor = num_items_in_batch
        if divisor is None:
            divisor = self._get_num_items_in_batch([inputs], output.loss.device)
        # Gradients are averaged over processes, but their sum is needed.
        loss = (
            self._loss_among_processes(output)
            / torch.as_tensor(divisor).clamp_min(1e-9)
            * self.accelerator.num_processes
        )
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; the last checkpoint is from before. "
                "Try a lower learning_rate or a longer warm-up, or bf16 in place of fp16."
            )
        counts, sums = output.counts.over_rows(), output.sums.detached()
        if self._logged is None:
            self._logged = counts, sums
        else:
            self._logged = self._logged[0] + counts, self._logged[1] + sums
        return (loss, counts) if return_outputs else loss

    def _loss_among_processes(self, output: StepOutput) -> torch.Tensor:
        """Return this process's sum of losses; a further head's needs the candidates of all processes."""
        if self.kind.head is None or self.accelerator.num_processes == 1:
            return output.loss
        weights = torch.stack([output.sums.weight, output.sums.head_weight])
        return output.loss_among(self.accelerator.reduce(weights))

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: they are not counted, since most of them are the target's."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; add accuracy and expected acceptance length since the last line to a loss."""
        if "loss" in logs and self._logged is not None:
            counts, sums = (self.accelerator.reduce(part.tensors()) for part in self._logged)
            metrics = Metrics.of(Counts(**counts), LossSums(**sums))
            logs |= metrics.as_log(self.kind.metrics)
            self._logged, self.latest_metrics = None, metrics
        super().log(logs, start_time)

    # Saving ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as Trainer does; True resumes from the last complete checkpoint.

        A resumed run is the uninterrupted one, or a warning says before its first step why it is not.

        Raises:
            ValueError: another run writes the folder; there is no checkpoint to resume from; those of an earlier run
                would be overwritten; or the checkpoint would silently override a change.
        """
        with sole_trainer(self.args):
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            if checkpoint is not None and self._is_over(Path(checkpoint)):
                return self._load_finished(Path(checkpoint))
            return super().train(checkpoint, **kwargs)

    def _is_over(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is the end of its run; say what makes the rest of it another run's.

        Raises:
            ValueError: it cannot be resumed from.
        """
        if not _is_complete(checkpoint):
            raise ValueError(
                f"{checkpoint} is no complete checkpoint; resume_from_checkpoint takes one, or True."
            )
        found = differences(checkpoint, self._record)
        if found and self.is_world_process_zero():
            warnings.warn(
                f"The run that resumes from {checkpoint} is not the uninterrupted one: {'; '.join(found)}.",
                UserWarning,
                stacklevel=3,
            )
        steps = max(0, self.args.max_steps)
        return (steps > 0 or not found) and is_over(checkpoint, steps)

    def _load_finished(self, checkpoint: Path) -> TrainOutput:
        """Load what a run ended with: Trainer would take one more step."""
        if self.is_fsdp_enabled:
            raise ValueError(
                f"The run of {checkpoint} is over. Train on with more steps, or load its draft."
            )
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    @cached_property
    def _record(self) -> dict[str, Any]:
        """Return what determines the weights of this run."""
        return record_of(self)

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the folder of the checkpoint to resume from, or None."""
        return checkpoint_to_resume(self.args, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save a complete repository, with a plot and a card that show how the run went."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_progress(
                Path(output_dir or self.args.output_dir),
                self.state.log_history,
                self._run_summary(),
                Path(str(self.args.output_dir)).resolve().name,
            )

    def _run_summary(self) -> dict[str, Any]:
        """Return the rows of the card's table that describe the run."""
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "steps": f"{self.state.global_step:,} of {rows} rows, up to {args.max_length:,} tokens each",
            "anchors": f"up to {args.num_anchors} in a row, {self._weights_summary()}",
            "loss": self._loss_summary(),
            "optimizer": f"{enum_value(args.optim)}, learning rate {args.learning_rate:g}, "
            f"{enum_value(args.lr_scheduler_type)} schedule",
            "best evaluation": self._best_summary(),
        }

    def _best_summary(self) -> str | None:
        """Return the best evaluation in words; None without a metric to choose it by."""
        metric, greater = self.args.metric_for_best_model, bool(self.args.greater_is_better)
        return None if metric is None else describe_best(self.state.log_history, metric, greater)

    def _weights_summary(self) -> str:
        if self.args.loss_weights == "dpace":
            return f"weights by D-PACE, alpha {self.args.dpace_alpha:g}"
        return f"gamma {self.objective.gamma:g}"

    def _loss_summary(self) -> str:
        parts = [str(self.objective.mix)]
        for name in FURTHER_LOSSES:
            if name in self.kind.metrics:
                share = f"{self.objective.head_share:g}"
                parts.append(f"and {share} times the {name.removesuffix('_loss')}'s")
        return ", ".join(parts)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does; remove an incomplete checkpoint that could not be written.

        Raises:
            OSError: it could not be written; says which checkpoint is complete and how to resume from it.
        """
        incomplete = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with explain_failed_write(
            f"The checkpoint of step {self.state.global_step} could not be written", self.args
        ):
            try:
                if self.args.should_save:
                    write_record(incomplete, self._record)
                super()._save_checkpoint(model, trial)
            except (OSError, RuntimeError, SafetensorError):
                if last_checkpoint(self.args.output_dir) != incomplete:
                    shutil.rmtree(incomplete, ignore_errors=True)
                raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Use the card that was saved with the draft as the repository's."""
        path = Path(self.args.output_dir)
        if self.is_world_process_zero():
            self.accelerator.unwrap_model(self.model).write_card(
                path, ModelCard.load(path / "README.md"), self.hub_model_id
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as Trainer does.

        Raises:
            RuntimeError: the push failed; says where the draft is, and how to push it later.
        """
        with explain_failed_push(self.args.output_dir, self.args.hub_model_id):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as Trainer does, with the code and the card, which its list of files lacks."""
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
    ) -> tuple[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return no loss, the `Counts` of each row as tensors `[B, T]`, and the `LossSums` of each row, `[B]`.

        All of these add up over rows. Rows are computed one by one, so the result does not depend on the batch.
        """
        tensors = dict(self._prepare_inputs(inputs))
        counts: dict[str, list[torch.Tensor]] = defaultdict(list)
        sums: dict[str, list[torch.Tensor]] = defaultdict(list)
        for index in range(len(tensors["input_ids"])):
            row = {name: values[index : index + 1] for name, values in tensors.items()}
            blocks = self._blocks(row, EVALUATION)
            with self.compute_loss_context_manager():
                output = self.objective(model, blocks)
            for name, values in output.counts.tensors().items():
                counts[name].append(values)
            for name, value in output.sums.tensors().items():
                sums[name].append(value)
        joined = {name: torch.cat(rows) for name, rows in counts.items()}
        return None, joined, {name: torch.stack(rows) for name, rows in sums.items()}

    def _metrics_of(self, prediction: Any) -> dict[str, float]:
        """Compute the metrics from what `prediction_step` returned for all rows; Trainer's `compute_metrics`."""
        counts = Counts(
            **{name: torch.as_tensor(values) for name, values in prediction.predictions.items()}
        )
        rows = prediction.label_ids.items()
        sums = {name: torch.as_tensor(values).double().sum() for name, values in rows}
        metrics = Metrics.of(counts.over_rows(), LossSums(**sums))
        by_position = {
            f"accuracy_{k}": value for k, value in enumerate(metrics.by_position, start=1)
        }
        loss = metrics.base_loss + self.objective.head_share * metrics.head_loss
        return {"loss": loss} | metrics.as_log(self.kind.metrics) | by_position

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as Trainer does: loss, accuracy by position, expected acceptance length.

        With `eval_acceptance_prompts`, prompts are decoded too, for the acceptance length in decoding.
        """
        eval_dataset = self._prepared(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run as Trainer does, and decode prompts of the same rows.

        So the log, callbacks and the choice of the best checkpoint see what was decoded.
        """
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self.args.eval_acceptance_prompts:
            decoded = self.decode_prompts(getattr(dataloader, "dataset", None))
            for name, value in decoded.items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    @torch.no_grad()
    def decode_prompts(self, rows: Any) -> dict[str, float]:
        """Decode the first prompts of packed `rows` greedily; return tokens per cycle, and acceptance by position.

        Processes share the prompts, and all return the same.
        """
        draft = self.accelerator.unwrap_model(self.model)
        training, statistics = draft.training, DecodeStatistics()
        draft.eval()
        first, every = self.accelerator.process_index, self.accelerator.num_processes
        for row in islice(rows, first, self.args.eval_acceptance_prompts, every):
            ids = prompt_of(row).to(self.target.device)
            generate_kwargs = {
                "custom_generate": draft.speculate,
                "statistics": statistics,
                "proposal": "chain",
            }
            greedy(self.target, ids, self.args.eval_acceptance_tokens, **generate_kwargs)
        draft.train(training)
        accepted = statistics.accepted_at + [0] * draft.config.num_drafted
        counts = [len(statistics.committed), sum(statistics.committed)]
        counts += accepted[: draft.config.num_drafted]
        total = torch.tensor(counts, device=self.args.device)
        counts = self.accelerator.reduce(total).tolist()
        cycles = max(1, counts[0])
        shares = {f"{ACCEPTED_AT}{k}": count / cycles for k, count in enumerate(counts[2:], 1)}
        return {DECODED: counts[1] / cycles} | shares

    def best_evaluation(self) -> list[str]:
        """Return sentences on the best evaluation: its step, acceptance and losses; and on the size of blocks."""
        metric = self.args.metric_for_best_model or "loss"
        greater = bool(self.args.greater_is_better) if self.args.metric_for_best_model else False
        history = self.state.log_history
        best = best_of(history, metric, greater)
        if best is None:
            return []
        lines = [f"The best evaluation: {describe_best(history, metric, greater)}."]
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            lines.append(f"What is saved is {Path(self.state.best_model_checkpoint).name}.")
        block = describe_block(best, self.accelerator.unwrap_model(self.model).config)
        return [*lines, block] if block else lines


def placed(target: Any, device: torch.device) -> Any:
    """Return the target on a device, unless it is quantised or spread over several."""
    spread = getattr(target, "hf_device_map", None) is not None
    return target if spread or getattr(target, "is_quantized", False) else target.to(device)


def enum_value(name: Any) -> str:
    """Return a name that may be a member of one of transformers' enumerations."""
    return str(getattr(name, "value", name))


def sole_trainer(args: DFlashTrainingArguments) -> AbstractContextManager[None]:
    """Return a context in which no other run writes the output folder; only the first process holds the lock.

    Raises:
        ValueError: another run writes it.
    """
    if not args.should_save:
        return nullcontext()
    folder = Path(str(args.output_dir))
    return sole_writer(folder, folder / "_run.lock", "output_dir")  # Trainer pushes no name with _


def checkpoint_to_resume(args: Any, asked: str | bool | None) -> str | None:
    """Return the folder of the checkpoint to resume from, or None.

    Args:
        asked: what `resume_from_checkpoint` is.

    Raises:
        ValueError: there is none, or those of an earlier run would be overwritten.
    """
    found = last_checkpoint(args.output_dir)
    if asked in (True, "true", "True") and found is None:
        raise ValueError(
            f"{args.output_dir} holds no complete checkpoint to resume from; leave the option out."
        )
    if not asked and found is not None and args.save_strategy != "no":
        raise ValueError(
            f"{found} is of an earlier run. Resume from it with resume_from_checkpoint=True, or choose another "
            "output_dir."
        )
    if asked in (True, "true", "True"):
        return str(found)
    return str(asked) if asked else None


def last_checkpoint(folder: Any) -> Path | None:
    """Return the last complete checkpoint in `folder`, or None."""
    found = sorted(
        Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2] or 0)
    )
    return next((path for path in reversed(found) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    """Return whether the checkpoint has a readable state, the file that is written last."""
    try:
        return "global_step" in json.loads(
            (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return False


@contextmanager
def explain_failed_write(what: str, args: DFlashTrainingArguments) -> Iterator[None]:
    """Write in this context: if it fails, the error says which checkpoint is complete.

    Raises:
        OSError: something could not be written; has the option that resumes.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        complete = last_checkpoint(args.output_dir)
        advice = "There is no complete checkpoint."
        if complete is not None:
            advice = f"The last complete one is {complete}: make room, and resume from it "
            advice += "(--resume-from-checkpoint true)."
        raise OSError(f"{what}: {error}\n{advice}") from error


@contextmanager
def explain_failed_push(folder: Any, repo_id: str | None) -> Iterator[None]:
    """Push in this context: if it fails, the error says where the draft of a long run is.

    Raises:
        RuntimeError: the push failed; has the command that pushes it later.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"The run is over and the draft is safe in {folder}, but it is not on the Hub: {error}\n"
            f"Push it later: dflash-hub push {folder} {repo_id or 'me/my-draft'}"
        ) from error


def preprocess_config(
    tokenizer: Any, target: Any, config: Any, args: DFlashTrainingArguments
) -> PreprocessConfig:
    """Return how rows are turned into tokens for this draft and target."""
    stop_ids = set(stop_token_ids(target))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    return PreprocessConfig(
        tokenizer,
        config.block_size,
        config.mask_token_id,
        args.max_length,
        args.packing,
        frozenset(stop_ids),
        config.vocab_size,
        args.last_answer_only,
    )


def prompt_of(row: dict[str, Any]) -> torch.Tensor:
    """Return `[1, P]`: the first document of a packed row up to its first supervised token.

    It is the first half of the document if that is supervised from its first token on.
    """
    length = (row.get("lengths") or [len(row["input_ids"])])[0]
    supervised = row["supervised"][:length]
    end = supervised.index(1) or max(1, length // 2)
    return torch.tensor([row["input_ids"][:end]])
