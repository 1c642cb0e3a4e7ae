# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Which checkpoint of the catalogue a target is a copy of: by its card, by its name and shape, by its folder.

A copy has the same weights, perhaps in another precision. A checkpoint that was trained further is none, nor is a
sibling such as Qwen3-4B-Base beside Qwen3-4B.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file
from yaml import YAMLError

if TYPE_CHECKING:
    from .registry import DFlashDraftSpec

_QUANTISED = (
    r"awq|gptq(?:v2)?|gguf|hqq|eetq|aqlm|vptq|spqr|exl[23]|mlx|dwq|bnb|bitsandbytes|torchao|auto-?round|marlin|nf4"
    r"|u?int[2-8]|w\d+a\d+|[2-8][-_]?bits?|i?q\d(?:_[0-9a-z]{1,3}){0,2}|[\d.]+bpw"
    r"|fp[48](?:a\d+)?|nvfp[48](?:a\d+)?|mxfp[468](?:a\d+)?(?:[-_]moe)?"
)
_PRECISE = r"bf16|fp16|f16|fp32|f32"
# Said of a quantisation, and of nothing else only if one is named beside it.
_DETAILS = r"unsloth|quanti[sz]ed|quant|dynamic|static|block|kv|sym|asym|mixed|ud|i1|g\d+|\d+g"
_TAIL = re.compile(rf"(?:[-_.](?:{_QUANTISED}|{_PRECISE}|{_DETAILS}))+$", re.IGNORECASE)
_NAMED = re.compile(rf"[-_.](?:{_QUANTISED}|{_PRECISE})(?![^-_.])", re.IGNORECASE)

# Tags of cards that say nothing of how their checkpoint came from its base, though it was trained or changed.
_CHANGED = {
    "generated_from_trainer",
    "trl",
    "sft",
    "dpo",
    "merge",
    "mergekit",
    "lora",
    "abliterated",
    "uncensored",
}


@dataclass
class Target:
    """A target as it was given: what it was loaded from, and its config, read from there where it is not at hand."""

    name: str | None
    given: PretrainedConfig | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config.

        Raises:
            OSError: it is known by name alone, and its config cannot be had.
        """
        return self.given if self.given is not None else AutoConfig.from_pretrained(self.name)


@dataclass(frozen=True)
class Origin:
    """The checkpoint of the catalogue that a target comes from.

    Args:
        name: its Hub id.
        same: whether the target is a copy of it; else it was trained further.
        reason: in words.
    """

    name: str
    same: bool
    reason: str = ""


@dataclass(frozen=True)
class Card:
    """What the model card of a target says of where it comes from."""

    bases: tuple[str, ...]
    relation: str | None

    @property
    def same(self) -> bool:
        return self.relation in (None, "quantized")


def split_precision(name: str) -> tuple[str, str]:
    """A repository's name without what it says of quantisation at its end, and that: ("Qwen3-8B", "-bnb-4bit")."""
    tail = _TAIL.search(name)
    if tail is None or not _NAMED.search(tail.group()):
        return name, ""
    return name[: tail.start()], tail.group()


def out_of_cache(name: str) -> str:
    """The Hub id of a folder in the Hub's cache; any other name as it is."""
    parts = Path(name).resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return "/".join(parts[-3].split("--")[1:])
    return name


def hub_id(name: str) -> str:
    """The Hub id that a name stands for: itself, or for a folder its last two parts."""
    published = out_of_cache(name)
    return "/".join(Path(name).absolute().parts[-2:]) if Path(published).is_dir() else published


def base_of_adapter(name: str) -> str | None:
    """The target that an adapter by this name is made for, as transformers loads it; None if it is no adapter."""
    if (Path(name) / "config.json").is_file():
        return None
    file = _file_of(name, "adapter_config.json")
    return None if file is None else _text_in(file, "base_model_name_or_path")


def origin_of(target: Target, catalogue: Sequence["DFlashDraftSpec"]) -> Origin | None:
    """The checkpoint of the catalogue that a target comes from; None if nothing tells of one.

    The Hub is asked for the card of a target that is known by name alone, or whose name and shape tell nothing; it
    need not answer.

    Raises:
        OSError: the target is known by name alone, the name may be a copy's, and its config cannot be had.
    """
    if target.name is None:
        return None
    named = _by_name(hub_id(target.name), target, catalogue)
    card = read_card(target.name, ask=target.given is None or named is None)
    bases = (_by_name(base, target, catalogue) for base in card.bases) if card else ()
    base = next((base for base in bases if base), None)
    if card and base and _card_counts(card, base, named, target.name):
        why = (
            _reason(target.name, base, "its card", card.relation == "quantized")
            if card.same
            else ""
        )
        return Origin(base, card.same, why)
    if named:
        local = Path(target.name).is_dir()
        return Origin(
            named,
            True,
            _reason(target.name, named, f"its {'folder' if local else 'name'} and shape"),
        )
    written = _text_in(Path(target.name) / "config.json", "_name_or_path")
    if written and (base := _by_name(written, target, catalogue)):
        return Origin(base, True, _reason(target.name, base, "its config.json"))
    return None


def _card_counts(card: Card, base: str, named: str | None, name: str) -> bool:
    """Whether to believe the card rather than the name, where they name different checkpoints.

    A checkpoint of the catalogue that was itself trained from another one says so on its card.
    """
    if named in (None, base) or card.relation == "quantized":
        return True
    original = Path(name).is_dir() and not split_precision(Path(name).name)[1]
    return card.same and not original


def _by_name(name: str, target: Target, catalogue: Sequence["DFlashDraftSpec"]) -> str | None:
    """The checkpoint of the catalogue that has this name but for the precision; under another owner, and this shape."""
    exact = next(
        (known for _, known in _all_targets(catalogue) if known.casefold() == name.casefold()), None
    )
    if exact:
        return exact
    owner, _, rest = split_precision(name)[0].casefold().rpartition("/")
    for spec, known in _all_targets(catalogue):
        known_owner, _, known_rest = split_precision(known)[0].casefold().rpartition("/")
        if rest != known_rest:
            continue
        same_owner = owner == known_owner
        config = target.given if same_owner else target.config
        agrees = None if config is None else _agrees(spec, config)
        if agrees or (agrees is None and same_owner):
            return known
    return None


def _all_targets(catalogue: Sequence["DFlashDraftSpec"]) -> Iterator[tuple["DFlashDraftSpec", str]]:
    return ((spec, known) for spec in catalogue for known in spec.targets)


def _agrees(spec: "DFlashDraftSpec", config: PretrainedConfig) -> bool | None:
    """Whether the target has the shape of the draft's own, as far as it is known; None where nothing is."""
    text = config.get_text_config(decoder=True)
    pairs = (
        (spec.hidden_size, getattr(text, "hidden_size", None)),
        (spec.num_target_layers, getattr(text, "num_hidden_layers", None)),
        (spec.vocab_size, getattr(text, "vocab_size", None)),
    )
    known = [ours == theirs for ours, theirs in pairs if ours is not None]
    return all(known) if known else None


def _reason(name: str, base: str, how: str, quantised: bool = False) -> str:
    """A sentence such as "It was made for org/model, of which me/model-AWQ is a quantised copy (by its card)."."""
    ours, theirs = split_precision(hub_id(name))[1], split_precision(base)[1]
    if quantised or (not theirs and re.search(rf"[-_.](?:{_QUANTISED})", ours, re.IGNORECASE)):
        what = "a quantised copy"
    else:
        what = "a copy" if ours.casefold() == theirs.casefold() else "a copy in another precision"
    return f"It was made for {base}, of which {name} is {what} (by {how})."


def read_card(name: str, ask: bool) -> Card | None:
    """The card of a repository or folder; None if it has none, it is unreadable, or the Hub does not answer.

    Args:
        ask: the Hub, where no card lies in its cache.
    """
    file = _file_of(name, "README.md", ask)
    try:
        data = (metadata_load(file) if file else None) or {}
    except (OSError, ValueError, YAMLError):
        return None
    said = data.get("base_model")
    bases = tuple(
        base for base in (said if isinstance(said, list) else [said]) if isinstance(base, str)
    )
    return Card(bases, _relation(data, bases)) if bases else None


def _relation(data: dict[str, Any], bases: tuple[str, ...]) -> str | None:
    """How a checkpoint came from its base: what its card says, or what else on it shows that it was changed."""
    if data.get("base_model_relation"):
        return str(data["base_model_relation"]).lower()
    if data.get("library_name") == "peft":
        return "adapter"
    if len(bases) > 1:
        return "merge"
    return "finetune" if _CHANGED.intersection(map(str, data.get("tags") or ())) else None


def _file_of(name: str, file: str, ask: bool = True) -> Path | None:
    """A file of a repository or folder; None if there is none, or it cannot be had."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    silent = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    silent = {f"_raise_exceptions_for_{what}": value for what, value in silent.items()}
    try:
        found = cached_file(
            name, file, local_files_only=not (ask and _on_hub(name, file)), **silent
        )
    except (OSError, ValueError):  # no such repository, or no name that one could have
        return None
    return Path(found) if found else None


def _on_hub(name: str, file: str) -> bool:
    """Whether the Hub answers that it has a file; asked once, where a download would try for half a minute."""
    try:
        return HfApi().file_exists(name, file)
    except (
        Exception
    ):  # of the HTTP library, which is another one in each major version of huggingface_hub
        return False


def _text_in(file: Path, key: str) -> str | None:
    """A text in a JSON file, if both are there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, str) and value else None
