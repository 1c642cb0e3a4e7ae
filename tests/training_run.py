"""One small run, as a program: it can be killed, gone on with, and run in several processes."""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import tiny
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training.loading import parallel_options

SMALL = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "num_anchors": 6,
    "max_length": 40,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Random text of ten tokens, of several lengths; the tokens 0 and 3 do not occur: 3 is the mask."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (count,), generator=generator).tolist()
    known = torch.tensor([1, 2, *range(4, tiny.VOCAB)])
    return [{"input_ids": known[torch.randint(len(known), (n,), generator=generator)].tolist()} for n in lengths]


def trainer(
    folder: Path, fields: dict | None = None, eval_rows: int = 0, spread: str | None = None, **args
) -> DFlashTrainer:
    """A trainer of a tiny draft; its target is spread over all processes if it is loaded from a folder, `spread`."""
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **(fields or {}))
    given = DFlashTrainingArguments(str(folder), **(SMALL | args))
    if spread:
        target = AutoModelForCausalLM.from_pretrained(spread, dtype=torch.float32, **parallel_options())
    held_out = rows(eval_rows) if eval_rows else None
    return DFlashTrainer(draft, target, given, train_dataset=rows(), eval_dataset=held_out)


class Killed(TrainerCallback):
    """As by somebody else: at once, with nothing tidied up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--args", type=json.loads, default={})
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--spread", help="folder of a target that is spread over the processes")
    parser.add_argument("--fields", type=json.loads, help="of the draft's config")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = trainer(options.folder, options.fields, spread=options.spread, **options.args)
    if options.kill_at:
        run.add_callback(Killed(options.kill_at))
    run.train(resume_from_checkpoint=options.resume)
    run.save_model(str(options.folder / "draft"))
    if run.is_world_process_zero():
        losses = {line["step"]: line["loss"] for line in run.state.log_history if "loss" in line}
        figures = [line["acceptance_length"] for line in run.state.log_history if "loss" in line]
        result = {
            "losses": losses,
            "figures": figures,
            "weights": digests(run.model) if run.accelerator.num_processes == 1 else None,
        }
        (options.folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
