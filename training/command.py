# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train`: the pair and the data from names, the trainer's options as the Trainer names them."""

import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from ..evaluation import compare
from ..hub_probe import digests
from ..publishing import PublishOptions, check_staged, publish, stage
from ..registry import DFlashDraftSpec, load_draft
from .arguments import DFlashTrainingArguments
from .data import load_rows
from .trainer import DFlashTrainer, kept_safe, prompt_of

console = Console()


@dataclass
class TrainOptions:
    """What to train, and on what."""

    target: str = field(metadata={"help": "Hub id or folder of the target."})
    data: str = field(metadata={"help": "A file (JSONL, JSON, Parquet, CSV, text) or a Hub dataset: messages or text."})
    data_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    data_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as it comes; needs --max-steps."})
    eval_rows: int = field(default=0, metadata={"help": "Rows of the data to hold out for evaluation."})
    draft: str | None = field(default=None, metadata={"help": "Hub id or folder of a draft to start from."})
    draft_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of that draft."})
    mask_token_id: int | None = field(
        default=None, metadata={"help": "A token that never occurs; the first unused row of the embedding unless said."}
    )
    variant: str = field(
        default="dflash", metadata={"help": "Kind of a fresh draft.", "choices": ["dflash", "dflash2"]}
    )
    selector_rank: int | None = field(default=None, metadata={"help": "Of a fresh DFlash 2 draft; 256 unless said."})
    selector_top_k: int | None = field(default=None, metadata={"help": "Of a fresh DFlash 2 draft; 16 unless said."})
    block_size: int = field(default=16, metadata={"help": "Positions of a block, the anchor included."})
    num_layers: int = field(default=5, metadata={"help": "Layers of a fresh draft."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Tapped layers, from 0; five spread evenly unless said."}
    )
    sliding_window: int | None = field(
        default=None, metadata={"help": "Make a fresh draft's layers slide, but the last."}
    )
    causal: bool = field(default=False, metadata={"help": "Causal attention inside a fresh draft's blocks."})
    target_dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 ..., or auto for the target's own."})
    trust_remote_code: bool = field(default=False, metadata={"help": "For the target and its tokenizer."})
    dry_run: bool = field(
        default=False, metadata={"help": "Build everything, run two steps, save, reload, check; tell what a run costs."}
    )


class _Parser(HfArgumentParser):
    """Whose errors are one line; the Trainer has more than a hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `dflash-hub train --help` lists the options.")


def train(words: list[str]) -> None:
    """Run the command.

    Args:
        words: the command line after `dflash-hub train`.

    Raises:
        ValueError: options, pair or data are not sound.
        OSError: something cannot be found or written.
        RuntimeError: the Hub did not take the finished draft; it is safe on disk.
    """
    parser = _Parser((TrainOptions, DFlashTrainingArguments), prog="dflash-hub train")
    options, args = parser.parse_args_into_dataclasses(_repository(words))
    with tempfile.TemporaryDirectory() as scratch:
        if options.dry_run:
            args = replace(args, output_dir=scratch, push_to_hub=False, report_to="none", eval_strategy="no")
        trainer = build(options, args)
        if options.dry_run:
            dry_run(trainer, Path(scratch))
            return
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finish(trainer, options)


def _repository(words: list[str]) -> list[str]:
    """`--push-to-hub REPO` in the words of the Trainer: `--push_to_hub --hub_model_id REPO`."""
    spelled = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        spelled.append(word)
        if (
            word in ("--push-to-hub", "--push_to_hub")
            and following
            and following[0] != "-"
            and following not in ("True", "False")
        ):
            spelled += ["True", "--hub_model_id"]
    return spelled


def build(options: TrainOptions, args: DFlashTrainingArguments) -> DFlashTrainer:
    """The trainer, with everything in it checked."""
    trust = {"trust_remote_code": options.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(options.target, **trust)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.target_dtype, **trust)
    set_seed(args.seed)  # a fresh draft's weights too
    draft = make_draft(options, target, tokenizer)
    if not Path(options.target).exists():
        draft.card_metadata = {"base_model": options.target}
    rows, held_out = _split(options, args)
    trainer = DFlashTrainer(draft, target, args, rows, held_out, tokenizer)
    if not options.streaming:
        tell_data(trainer)
    return trainer


def tell_data(trainer: DFlashTrainer) -> None:
    """How many documents there are, and how many were left out; of a stream, as far as it was read."""
    for name, report in trainer.reports.items():
        console.print(f"{name} data: {report}", style="dim")


def _split(options: TrainOptions, args: DFlashTrainingArguments) -> tuple[Any, Any]:
    """Rows to train on, and those held out."""
    rows = load_rows(options.data, options.data_name, options.data_split, options.streaming)
    if not options.eval_rows:
        return rows, None
    if options.streaming:
        return rows.skip(options.eval_rows), rows.take(options.eval_rows)
    if options.eval_rows >= len(rows):
        raise ValueError(f"eval_rows is {options.eval_rows}, but the data has only {len(rows)} rows; hold out fewer.")
    parts = rows.train_test_split(test_size=options.eval_rows, seed=args.seed)
    return parts["train"], parts["test"]


def make_draft(options: TrainOptions, target: Any, tokenizer: Any) -> Any:
    """The draft to start from, in float32, which optimizers need."""
    if options.draft is not None:
        return load_draft(options.draft, revision=options.draft_revision, dtype=torch.float32)
    shape: dict[str, Any] = {"block_size": options.block_size, "num_hidden_layers": options.num_layers}
    shape |= {"is_causal": True} if options.causal else {}
    for name in ("selector_rank", "selector_top_k"):
        if getattr(options, name) is not None:
            shape[name] = getattr(options, name)
    if options.target_layer_ids:
        shape["target_layer_ids"] = options.target_layer_ids
    if options.sliding_window:
        kinds = ["sliding_attention"] * (options.num_layers - 1) + ["full_attention"]
        shape |= {"layer_types": kinds, "sliding_window": options.sliding_window, "is_causal": options.causal}
    if options.mask_token_id is None:
        options.mask_token_id = unused_token(target, tokenizer)
    spec = DFlashDraftSpec(options.target, targets=(options.target,))
    return spec.build(target.config, options.variant, mask_token_id=options.mask_token_id, dtype=torch.float32, **shape)


def unused_token(target: Any, tokenizer: Any) -> int:
    """The first row of the target's embedding that no text reaches, as published drafts use it.

    Raises:
        ValueError: there is none.
    """
    first = max(tokenizer.get_vocab().values()) + 1
    rows = target.get_input_embeddings().num_embeddings
    if first >= rows:
        spare = [
            token
            for token in tokenizer.get_added_vocab()
            if "reserved" in token or "unused" in token or "mask" in token
        ]
        some = ", ".join(f"{tokenizer.convert_tokens_to_ids(token)} ({token})" for token in spare[:3])
        raise ValueError(
            f"Every one of the {rows} rows of the target's embedding belongs to a token, so --mask-token-id must be "
            f"given: a token that does not occur in text{', such as ' + some if some else ''}."
        )
    return first


def finish(trainer: DFlashTrainer, options: TrainOptions) -> None:
    """Save the draft, and publish it where that was asked for."""
    folder, repo = trainer.args.output_dir, trainer.args.hub_model_id
    trainer.save_model(folder, _internal_call=True)
    if not trainer.is_world_process_zero():
        return
    if options.streaming:
        tell_data(trainer)
    console.print(f"The draft is in [bold]{folder}[/bold].")
    if trainer.args.push_to_hub:
        trainer.create_model_card()
        push = PublishOptions(trainer.args.hub_private_repo, trainer.args.hub_token)
        done = kept_safe(lambda: publish(folder, repo or Path(folder).name, push), folder, repo)
        where = f"main at {done.commit[:8]}, engines at {done.engines_commit[:8]}"
        console.print(f"[bold]{done.repo_id}[/bold] is published: {where}.")


# A dry run ------------------------------------------------------------------------------------------------------


def dry_run(trainer: DFlashTrainer, folder: Path) -> None:
    """Two steps, saved, reloaded and checked; then what the whole run would cost."""
    args, moments = trainer.args, []
    whole = _steps(trainer)
    args.max_steps, args.save_strategy, args.logging_steps = 2, "no", 1
    step = trainer.training_step

    def timed(*inputs: Any) -> torch.Tensor:
        moments.append(time.perf_counter())
        return step(*inputs)

    trainer.training_step = timed  # type: ignore[method-assign]
    trainer.train()
    moments.append(time.perf_counter())
    seconds = (moments[-1] - moments[len(moments) // 2]) / (len(moments) - 1 - len(moments) // 2)
    checks = _checked(trainer, folder)
    table = Table(show_header=False, box=None, padding=(0, 2))
    draft = trainer.accelerator.unwrap_model(trainer.model)
    table.add_row("draft", f"{draft.num_parameters():,} parameters")
    table.add_row("target", f"{trainer.target.num_parameters():,} parameters, {trainer.target.dtype}")
    table.add_row(
        "memory, at most", f"{_peak_gib():.2f} GiB {'of the GPU' if torch.cuda.is_available() else 'resident'}"
    )
    steps = args.gradient_accumulation_steps
    table.add_row("time", f"{seconds * steps:.2f} s a step; {_duration(seconds * steps * whole)} for {whole:,} steps")
    for check in checks:
        table.add_row("checked", check)
    console.print(table)


def _steps(trainer: DFlashTrainer) -> int:
    """Steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("A stream has no length: give --max-steps.")
    batch = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return int(-(-len(trainer.train_dataset) // batch) * trainer.args.num_train_epochs)


def _checked(trainer: DFlashTrainer, folder: Path) -> list[str]:
    """Save, reload and compare; what was found to be right.

    Raises:
        ValueError: what was not.
    """
    draft = trainer.accelerator.unwrap_model(trainer.model).eval()
    trainer.save_model(str(folder / "saved"), _internal_call=True)
    again = load_draft(folder / "saved").to(draft.device).eval()
    if digests(again) != digests(draft):
        raise ValueError("The saved draft reloads otherwise than it was.")
    for layout in ("hub", "engines"):
        stage(again, folder / layout, layout, {})
        check_staged(again, folder / layout)
    ids = prompt_of(next(iter(trainer.train_dataset))).to(trainer.target.device)
    one, other = (compare(model, trainer.target, ids, max_new_tokens=32) for model in (draft, again))
    if one.committed != other.committed:
        raise ValueError("The reloaded draft drafts otherwise than before it was saved.")
    text = "is the target's own" if other.identical else f"differs by near-ties in {trainer.target.dtype}"
    return [
        "it reloads bit-equal, here and in a process without this package, in both layouts",
        f"it decodes as before it was saved, and the text {text}",
    ]


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
