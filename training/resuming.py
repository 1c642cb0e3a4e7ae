# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Compare a run with the one whose checkpoint it resumes from.

Every checkpoint holds a record of what determines the weights: options, draft, target, data, processes and versions. If
nothing of it has changed, the resumed run ends with the weights of the uninterrupted one. Else a warning says so before
the first step, or the run is refused where the checkpoint would silently win.
"""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from ..configuration_dflash import __version__

RECORD = "dflash_run.json"
"""The file of a checkpoint that holds the record."""
_ROWS_OF_A_STREAM = 8
"""Rows that stand for a stream, which cannot be read to its end."""
_VALUES = 16
"""Numbers of each of the target's weights that stand for it."""
_ROWS_AT_ONCE = 1000
_COLUMNS = ("input_ids", "supervised", "lengths")
_OF_THE_OPTIMIZER = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "optim_target_modules"),
)
"""Options whose values Trainer takes from the checkpoint, whatever is passed."""
_OF_THE_BEST = ("metric_for_best_model", "greater_is_better", "early_stopping")
"""Options of what the checkpoint has measured and counted so far."""
_WITHOUT_EFFECT = ("log", "logging", "save", "eval", "push", "hub", "do", "report", "trackio")
"""First words of options that leave the weights alone."""
_ALSO_WITHOUT_EFFECT = {
    *("output_dir", "resume_from_checkpoint", "load_best_model_at_end", "run_name", "project"),
    *("disable_tqdm", "debug", "skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout"),
    *("restore_callback_states_from_checkpoint", "per_device_eval_batch_size", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend"),
    *("include_for_metrics", "prediction_loss_only", "auto_find_batch_size", "use_cpu"),
    *("bf16_full_eval", "fp16_full_eval"),
}
_SKIPS = "ignore_data_skip"
_NO_PART_OF_THE_DRAFT = {
    *("transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path", "auto_map"),
    *("architectures", "dflash_hub_version", "_attn_implementation"),
}


def record_of(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return what determines the weights of a run, as JSON reads it back."""
    args = trainer.args
    options = {name: value for name, value in args.to_dict().items() if not _is_free(name)}
    options.pop("num_train_epochs" if args.max_steps > 0 else "max_steps")
    draft = trainer.accelerator.unwrap_model(trainer.model).config.to_dict()
    for name in _NO_PART_OF_THE_DRAFT:
        draft.pop(name, None)
    around = {
        "the data": digest_of_rows(getattr(trainer.train_dataset, "first", trainer.train_dataset)),
        "the target": digest_of_weights(trainer.target),
        "the number of processes": args.world_size,
        "the device": _device(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dflash-hub": __version__,
    }
    record = {"options": options, "draft": draft, "around": around}
    return json.loads(json.dumps(record, default=str))


def _is_free(name: str) -> bool:
    """Return whether an option leaves the weights alone."""
    return name.split("_")[0] in _WITHOUT_EFFECT or name in _ALSO_WITHOUT_EFFECT


def _device(device: torch.device) -> str:
    """Return what of the device changes the last bits of a sum."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"


def digest_of_rows(rows: Any) -> str:
    """Return a hash of packed rows and their number; of a stream, of its first rows.

    Rows with an attribute `digest` know theirs.
    """
    known = getattr(rows, "digest", None)
    if known is not None:
        return str(known)
    digest = hashlib.blake2b(digest_size=8)
    if hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        for part in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
            for name in _COLUMNS:
                column = part[name].combine_chunks()
                digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        return f"{len(rows):,} rows ({digest.hexdigest()})"
    count = len(rows) if hasattr(rows, "__len__") else _ROWS_OF_A_STREAM
    for row in islice(iter(rows), count):
        parts = [row[name] for name in _COLUMNS if name in row]
        digest.update(json.dumps([list(map(int, part)) for part in parts]).encode())
    name = f"{count:,} rows" if hasattr(rows, "__len__") else "a stream"
    return f"{name} ({digest.hexdigest()})"


def digest_of_weights(model: Any) -> str:
    """Return a hash of the names of weights, and of some numbers of each that lies on a device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        values = weight.data
        if values.is_meta or type(values) is not torch.Tensor or not values.numel():
            continue
        while values.ndim > 1:
            values = values[-1]
        digest.update(values.flatten()[:_VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write the record into the folder of a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def differences(checkpoint: Path, record: dict[str, Any]) -> list[str]:
    """Return what makes the resumed run another one than the run that wrote the checkpoint, in words.

    Raises:
        ValueError: something has changed that the checkpoint would silently override, or it cannot be resumed from.
    """
    path = checkpoint / RECORD
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        raise ValueError(
            f"{checkpoint} holds no optimizer (save_only_model), so no run can be resumed from it. {_anew(checkpoint)}"
        )
    if not path.exists():
        return [f"{checkpoint.name} holds no record of its run, so what has changed is not known"]
    saved = json.loads(path.read_text(encoding="utf-8"))
    _refuse(checkpoint, "draft", _changed(saved["draft"], record["draft"]))
    options = _changed(saved["options"], record["options"])
    _refuse(checkpoint, "optimizer", [one for one in options if one[0] in _OF_THE_OPTIMIZER])
    counted = [one for one in options if one[0] in _OF_THE_BEST]
    _refuse(checkpoint, "best metric", [one for one in counted if one[1] is not None])
    found = [one for one in options if one not in counted and one[0] != _SKIPS]
    found += _changed(saved["around"], record["around"])
    sentences = [f"{name} was {before} and is {now}" for name, before, now in found]
    if record["options"].get(_SKIPS):
        sentences.append("ignore_data_skip begins with the first rows again")
    return sentences


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the names whose values differ, with both values."""
    names = dict.fromkeys([*before, *now])
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [one for one in pairs if one[1] != one[2]]


def _refuse(checkpoint: Path, what: str, changed: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse values that those of the checkpoint would silently win over.

    Raises:
        ValueError: there are such.
    """
    listed = [f"{name} is {now}, but was {before}" for name, before, now in changed]
    if listed:
        raise ValueError(
            f"The {what} of {checkpoint} goes on as it was: {'; '.join(listed)}. Leave that as it was. "
            f"{_anew(checkpoint)}"
        )


def _anew(checkpoint: Path) -> str:
    return f"Or begin a new run from its draft: --draft {checkpoint} with another --output-dir (in Python, load_draft)."


def is_over(checkpoint: Path, max_steps: int) -> bool:
    """Return whether the run of a checkpoint had ended with it.

    Args:
        max_steps: of the run that resumes; 0 for those of the checkpoint.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    waited = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", [])
    for one in waited if isinstance(waited, list) else [waited]:
        counter = one["attributes"]["early_stopping_patience_counter"]
        if counter >= one["args"]["early_stopping_patience"]:
            return True
    return state["global_step"] >= (max_steps or state["max_steps"])
