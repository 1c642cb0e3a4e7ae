# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Define the training options: those of Trainer, with the published recipe (arXiv 2602.06036) as defaults, and ours."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .best import DECODED
from .mix import Mix
from .objective import Recipe
from .options import refuse, without_effect, wrong_values


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class DFlashTrainingArguments(TrainingArguments):
    """Extend `TrainingArguments`. Defaults: AdamW at 6e-4, cosine schedule, warm-up 0.04, clip 1.0, 6 epochs."""

    num_anchors: int = field(
        default=512, metadata={"help": "Number of blocks drawn in each row at each step."}
    )
    loss: str | None = field(
        default=None,
        metadata={
            "help": "Losses of a position and their weights: ce (cross-entropy), kl (forward KL divergence from the "
            "target's distribution), tv (total variation). Default: those published with the kind."
        },
    )
    loss_weights: str = field(
        default="decay",
        metadata={
            "help": "Weights of the positions of a block: decay, or dpace (what each adds to the accepted length).",
            "choices": ["decay", "dpace"],
        },
    )
    loss_gamma: float | None = field(
        default=None,
        metadata={
            "help": "With decay, the weight at position k of a block is exp(-(k - 1) / gamma). Default: 7 for blocks "
            "of 16, 5 for 10, 1.6 for 8 or less."
        },
    )
    dpace_alpha: float = field(
        default=0.5,
        metadata={
            "help": "With dpace, smoothing of the draft's probabilities, above 0 and up to 1."
        },
    )
    selector_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the selector loss, for a draft with a selector."}
    )
    confidence_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the confidence loss, for a draft with a confidence head."},
    )
    given_prefix: float | None = field(
        default=None,
        metadata={
            "help": "Give each block tokens of the text after its anchor, n of them with weight given_prefix ** n. So "
            "a second draft learns to go on from accepted tokens (0.9 in D2SD). Default: none."
        },
    )
    base_loss_until: float = field(
        default=1.0,
        metadata={
            "help": "For a draft that corrects its logits by all tokens before. The share of uncorrected logits in "
            "the loss falls from 1 to 0 over this part of the run. 0 for none."
        },
    )
    max_length: int = field(
        default=3072, metadata={"help": "Maximum number of tokens of a packed row."}
    )
    packing: bool = field(default=True, metadata={"help": "Pack several documents into a row."})
    last_answer_only: bool = field(
        default=False, metadata={"help": "Learn from the last answer of each conversation alone."}
    )
    draft_attention: str = field(
        default="auto",
        metadata={
            "help": "flex (FlexAttention), dense (a mask), or auto: flex on a GPU.",
            "choices": ["auto", "flex", "dense"],
        },
    )
    eval_acceptance_prompts: int = field(
        default=0,
        metadata={"help": "Number of held-out prompts to decode at each evaluation."},
    )
    eval_acceptance_tokens: int = field(
        default=128, metadata={"help": "Number of new tokens for each of those prompts."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric of evaluations that chooses the best checkpoint. Default: decoded_acceptance_length where "
            "they decode, else loss."
        },
    )
    early_stopping: int | None = field(
        default=None,
        metadata={
            "help": "End the run after this many evaluations in succession without a better one. The metric is that "
            "for the best model: the decoded acceptance length where evaluations decode."
        },
    )

    regenerate_every: int | None = field(
        default=None,
        metadata={
            "help": "After every so many steps, let the target answer the prompts of the data anew, and train on that. "
            "Needs --max-steps."
        },
    )
    regenerate_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of these answers. Default: the target's own settings."},
    )
    regenerate_max_new_tokens: int = field(
        default=2048, metadata={"help": "Maximum tokens of such an answer."}
    )
    regenerate_prompt_tokens: int = field(
        default=64, metadata={"help": "Number of leading tokens that are the prompt of plain text."}
    )
    regenerate_server: str | None = field(
        default=None,
        metadata={
            "help": "Server with OpenAI's protocol that answers, such as http://host:8000/v1. Default: this process."
        },
    )
    regenerate_model: str | None = field(
        default=None, metadata={"help": "Its name of the target. Default: the first it lists."}
    )
    regenerate_workers: int = field(
        default=32, metadata={"help": "Number of concurrent requests to it."}
    )

    output_dir: str | None = field(
        default="dflash-draft", metadata={"help": "Folder for the draft and its checkpoints."}
    )
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning rate schedule."}
    )
    warmup_steps: float = field(
        default=0.04, metadata={"help": "Number of warm-up steps; below 1, a share of all steps."}
    )
    num_train_epochs: float = field(
        default=6.0, metadata={"help": "Number of passes over the data."}
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Packed rows in a batch, on each device."}
    )
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Packed rows in an evaluation batch, on each device."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Number of steps between two lines of the log."}
    )
    bf16: bool = field(
        default_factory=_gpu_has_bf16,
        metadata={"help": "bfloat16 mixed precision. Default: on if the GPU supports it."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory. Default: on with a GPU."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off, because a draft uses all of its parameters."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Off, because a loss that is NaN or infinite ends the run."},
    )

    def __post_init__(self) -> None:
        self._choose_metric()
        found = list(self._wrong())
        try:
            super().__post_init__()
            found += [*self._wrong_for_best(), *without_effect(self)]
        except ValueError as error:
            found.append(self._in_one_line(str(error)))
        refuse(found)
        if self.fp16:
            self.bf16 = False

    def _in_one_line(self, message: str) -> str:
        """Return an error of transformers, whose list of two strategies shows enumerations."""
        if "requires the save and eval strategy to match" not in message:
            return message
        save, evaluate = (
            getattr(one, "value", one) for one in (self.save_strategy, self.eval_strategy)
        )
        return (
            f"load_best_model_at_end needs an evaluation before each checkpoint, but eval_strategy is {evaluate!r} and "
            f"save_strategy is {save!r}. Make them equal, such as 'steps'."
        )

    def _wrong(self) -> Iterator[str]:
        """Yield what is wrong with our own options."""
        checks = {
            "learning_rate": (float(self.learning_rate) >= 0, "at least 0"),
            "num_anchors": (self.num_anchors >= 1, "at least 1"),
            "loss_gamma": (self.loss_gamma is None or self.loss_gamma > 0, "above 0"),
            "loss_weights": (self.loss_weights in ("decay", "dpace"), "decay or dpace"),
            "dpace_alpha": (0 < self.dpace_alpha <= 1, "above 0 and up to 1"),
            "selector_loss_weight": (self.selector_loss_weight >= 0, "at least 0"),
            "confidence_loss_weight": (self.confidence_loss_weight >= 0, "at least 0"),
            "given_prefix": (
                self.given_prefix is None or 0 < self.given_prefix <= 1,
                "above 0 and up to 1",
            ),
            "base_loss_until": (0 <= self.base_loss_until <= 1, "from 0 to 1"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "regenerate_every": (
                self.regenerate_every is None or self.regenerate_every >= 1,
                "at least 1",
            ),
            "regenerate_temperature": (
                self.regenerate_temperature is None or self.regenerate_temperature > 0,
                "above 0, since greedy answers are the same in each round",
            ),
            "regenerate_max_new_tokens": (self.regenerate_max_new_tokens >= 1, "at least 1"),
            "regenerate_prompt_tokens": (self.regenerate_prompt_tokens >= 1, "at least 1"),
            "regenerate_workers": (self.regenerate_workers >= 1, "at least 1"),
            "eval_acceptance_prompts": (self.eval_acceptance_prompts >= 0, "at least 0"),
            "eval_acceptance_tokens": (self.eval_acceptance_tokens >= 1, "at least 1"),
            "early_stopping": (
                self.early_stopping is None or self.early_stopping >= 1,
                "at least 1",
            ),
            "draft_attention": (
                self.draft_attention in ("auto", "flex", "dense"),
                "auto, flex or dense",
            ),
            "remove_unused_columns": (
                not self.remove_unused_columns,
                "False, because the columns are not arguments of the draft",
            ),
        }
        yield from wrong_values(self, checks)
        if self.loss is not None:
            try:
                Mix.parse(self.loss)
            except ValueError as error:
                yield str(error)

    def _choose_metric(self) -> None:
        """Let decoded acceptance choose the best checkpoint where evaluations decode, and no other metric is named."""
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy) != "no"
        if self.metric_for_best_model is None and evaluates and self.eval_acceptance_prompts:
            self.metric_for_best_model = DECODED
        if self.early_stopping is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            # A resumed run goes on with the number of evaluations that were no better.
            self.restore_callback_states_from_checkpoint = True

    def _wrong_for_best(self) -> Iterator[str]:
        """Yield why the best evaluation cannot be chosen: there is none, or it has no checkpoint."""
        if self.early_stopping is not None and self.eval_strategy.value == "no":
            yield (
                "early_stopping counts evaluations, but there are none; pass eval_strategy, such as "
                "--eval-strategy steps --eval-steps 500."
            )
        by_steps = self.save_strategy.value == "steps" and self.eval_strategy.value == "steps"
        if self.load_best_model_at_end and by_steps and self.save_steps != self.eval_steps:
            yield (
                f"load_best_model_at_end needs a checkpoint of every evaluation, but eval_steps is {self.eval_steps} "
                f"and save_steps is {self.save_steps}. Make them equal, or pass save_strategy='best'."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out: the arguments are saved with every checkpoint, and pushed."""
        return self.__dict__ | {"hub_token": None}

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            mix=None if self.loss is None else Mix.parse(self.loss),
            weights=self.loss_weights,
            gamma=self.loss_gamma,
            dpace_alpha=self.dpace_alpha,
            attention=self.draft_attention,
            selector_weight=self.selector_loss_weight,
            confidence_weight=self.confidence_loss_weight,
            base_until=self.base_loss_until,
            given_prefix=self.given_prefix,
        )
