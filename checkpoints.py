# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find the checkpoint of the catalogue that a target is a copy of, by its card, its name and shape, or its folder.

A copy has the same weights, perhaps in another precision. A checkpoint that was trained further is not a copy, nor is
a sibling such as Qwen3-4B-Base beside Qwen3-4B.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.repocard import metadata_load
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file
from yaml import YAMLError

from .catalogue import is_hub_id, out_of_cache
from .compat_dflash import is_unreachable
from .configuration_dflash import same_vocabulary
from .findings_dflash import reason

_QUANTISED = (
    r"awq|gptq(?:v2)?|gguf|hqq|eetq|aqlm|vptq|spqr|exl[23]|mlx|dwq|bnb|bitsandbytes|torchao|auto-?round|marlin|nf4"
    r"|u?int[2-8]|w\d+a\d+|[2-8][-_]?bits?|i?q\d(?:_[0-9a-z]{1,3}){0,2}|[\d.]+bpw"
    r"|fp[48](?:a\d+)?|nvfp[48](?:a\d+)?|mxfp[468](?:a\d+)?(?:[-_]moe)?"
)
_PRECISE = r"bf16|fp16|f16|fp32|f32"
# These words describe a quantisation only next to the name of one.
_DETAILS = r"unsloth|quanti[sz]ed|quant|dynamic|static|block|kv|sym|asym|mixed|ud|i1|g\d+|\d+g"
_TAIL = re.compile(rf"(?:[-_.](?:{_QUANTISED}|{_PRECISE}|{_DETAILS}))+$", re.IGNORECASE)
_NAMED = re.compile(rf"[-_.](?:{_QUANTISED}|{_PRECISE})(?![^-_.])", re.IGNORECASE)

# A card with one of these tags describes a changed checkpoint, even without `base_model_relation`.
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


class CatalogueRow(Protocol):
    """Hold what a row of the catalogue has of the targets of a draft; a `DFlashDraftSpec` is one."""

    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def hidden_size(self) -> int | None: ...
    @property
    def num_target_layers(self) -> int | None: ...
    @property
    def vocab_size(self) -> int | None: ...


@dataclass
class TargetInfo:
    """Describe a target: the Hub id or folder that it was loaded from, and its config if the caller has loaded it."""

    name: str | None
    loaded_config: PretrainedConfig | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config, read from `name` if it is not loaded.

        Raises:
            OSError: its config cannot be downloaded.
        """
        if self.loaded_config is not None:
            return self.loaded_config
        return AutoConfig.from_pretrained(self.name)


@dataclass(frozen=True)
class Origin:
    """Name the checkpoint of the catalogue that a target comes from.

    Args:
        name: its Hub id.
        is_copy: whether the target is a copy of it; else it was trained further.
        reason: a sentence for users.
    """

    name: str
    is_copy: bool
    reason: str = ""


@dataclass(frozen=True)
class Card:
    """Hold the bases that a model card names, and the relation of the target to them."""

    bases: tuple[str, ...]
    relation: str | None

    @property
    def is_copy(self) -> bool:
        return self.relation in (None, "quantized")


def split_precision(name: str) -> tuple[str, str]:
    """Split the precision off the end of a repository's name: "Qwen3-8B-bnb-4bit" -> ("Qwen3-8B", "-bnb-4bit")."""
    tail = _TAIL.search(name)
    if tail is None or not _NAMED.search(tail.group()):
        return name, ""
    return name[: tail.start()], tail.group()


def hub_id(name: str) -> str:
    """Return the Hub id that a name stands for: itself, or the last two parts of a folder."""
    published = out_of_cache(name)
    return "/".join(Path(name).absolute().parts[-2:]) if Path(published).is_dir() else published


def base_of_adapter(name: str) -> str | None:
    """Return the target that an adapter of this name is made for; None if it is no adapter, as transformers decides."""
    if (Path(name) / "config.json").is_file():
        return None
    file = _file_of(name, "adapter_config.json")
    return None if file is None else _text_in(file, "base_model_name_or_path")


def origin_of(target: TargetInfo, catalogue: Sequence[CatalogueRow]) -> Origin | None:
    """Return the checkpoint of the catalogue that a target comes from; None if it is unknown.

    The card is downloaded if the config is not loaded, or if name and shape match no checkpoint. A failure is ignored.

    Raises:
        OSError: the config is not loaded, it is needed because the name may be a copy's, and it cannot be downloaded.
    """
    name = target.name
    if name is None:
        return None
    named = _by_name(hub_id(name), target, catalogue)
    card = read_card(name, online=target.loaded_config is None or named is None)
    base = _base_on_card(card, target, catalogue)
    if card and base and _card_counts(card, base, named, name):
        reason = ""
        if card.is_copy:
            reason = _reason(name, base, "its card", card.relation == "quantized")
        return Origin(base, card.is_copy, reason)
    if named:
        source = "its folder and shape" if Path(name).is_dir() else "its name and shape"
        return Origin(named, True, _reason(name, named, source))
    recorded = _text_in(Path(name) / "config.json", "_name_or_path")
    if recorded and (base := _by_name(recorded, target, catalogue)):
        return Origin(base, True, _reason(name, base, "its config.json"))
    return None


def _base_on_card(
    card: Card | None, target: TargetInfo, catalogue: Sequence[CatalogueRow]
) -> str | None:
    """Return the first checkpoint of the catalogue among the bases that a card names; None without one."""
    for base in card.bases if card else ():
        found = _by_name(base, target, catalogue)
        if found:
            return found
    return None


def _card_counts(card: Card, base: str, named: str | None, name: str) -> bool:
    """Return whether the card decides rather than the name, where they name different checkpoints.

    The card of a checkpoint of the catalogue may name the base that it was trained from; then the name decides.
    """
    if named in (None, base) or card.relation == "quantized":
        return True
    original = Path(name).is_dir() and not split_precision(Path(name).name)[1]
    return card.is_copy and not original


def _by_name(name: str, target: TargetInfo, catalogue: Sequence[CatalogueRow]) -> str | None:
    """Return the checkpoint of the catalogue with this name, up to the precision; None without one.

    The shape must match where it is known. Under another owner it must be known.
    """
    for _, known in _all_targets(catalogue):
        if known.casefold() == name.casefold():
            return known
    owner, repository = _owner_and_repository(name)
    for spec, known in _all_targets(catalogue):
        known_owner, known_repository = _owner_and_repository(known)
        if repository != known_repository:
            continue
        same_owner = owner == known_owner
        config = target.loaded_config if same_owner else target.config
        matches = None if config is None else _shape_matches(spec, config)
        if matches or (matches is None and same_owner):
            return known
    return None


def _owner_and_repository(name: str) -> tuple[str, str]:
    """Return the owner of a Hub id, "" without one, and its repository's name; both casefolded, without precision."""
    parts = split_precision(name)[0].casefold().rpartition("/")
    return parts[0], parts[2]


def _all_targets(catalogue: Sequence[CatalogueRow]) -> Iterator[tuple[CatalogueRow, str]]:
    return ((spec, known) for spec in catalogue for known in spec.targets)


def _shape_matches(spec: CatalogueRow, config: PretrainedConfig) -> bool | None:
    """Return whether the target has the known dimensions of the draft's own target; None if none is known."""
    text = config.get_text_config(decoder=True)
    pairs = (
        (spec.hidden_size, getattr(text, "hidden_size", None)),
        (spec.num_target_layers, getattr(text, "num_hidden_layers", None)),
    )
    known = [ours == theirs for ours, theirs in pairs if ours is not None]
    if spec.vocab_size is not None:
        known.append(same_vocabulary(spec.vocab_size, getattr(text, "vocab_size", None) or 0))
    return all(known) if known else None


def _reason(name: str, base: str, source: str, quantised: bool = False) -> str:
    """Return a sentence: "It was made for org/model, of which me/model-AWQ is a quantised copy (by its card)."."""
    ours, theirs = split_precision(hub_id(name))[1], split_precision(base)[1]
    if quantised or (not theirs and re.search(rf"[-_.](?:{_QUANTISED})", ours, re.IGNORECASE)):
        copy = "a quantised copy"
    elif ours.casefold() == theirs.casefold():
        copy = "a copy"
    else:
        copy = "a copy in another precision"
    return f"It was made for {base}, of which {name} is {copy} (by {source})."


def read_card(name: str, online: bool) -> Card | None:
    """Return the card of a repository or folder; None if it is missing, unreadable, or the Hub does not answer.

    Args:
        online: whether to download a card that is not in the cache.
    """
    file = _file_of(name, "README.md", online)
    try:
        data = (metadata_load(file) if file else None) or {}
    except (OSError, ValueError, YAMLError):
        return None
    named = data.get("base_model")
    named = named if isinstance(named, list) else [named]
    # anything else would stand in our messages
    bases = tuple(base for base in named if is_hub_id(base))
    return Card(bases, _relation(data, bases)) if bases else None


def _relation(data: dict[str, Any], bases: tuple[str, ...]) -> str | None:
    """Return how a checkpoint was made from its base, as named on its card or implied by other entries there."""
    if data.get("base_model_relation"):
        return str(data["base_model_relation"]).lower()
    if data.get("library_name") == "peft":
        return "adapter"
    if len(bases) > 1:
        return "merge"
    return "finetune" if _CHANGED.intersection(map(str, data.get("tags") or ())) else None


def _file_of(name: str, file: str, online: bool = True) -> Path | None:
    """Return a file of a repository or folder; None if it is missing or cannot be downloaded."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    reasons = ("gated_repo", "missing_entries", "connection_errors")
    silent = {f"_raise_exceptions_for_{reason}": False for reason in reasons}
    offline = not (online and _on_hub(name, file))
    try:
        found = cached_file(name, file, local_files_only=offline, **silent)
    except HTTPError as error:
        _warn(name, file, error)
        return None
    except (OSError, ValueError):  # no such repository, or not a valid name of one
        return None
    return Path(found) if found else None


def _on_hub(name: str, file: str) -> bool:
    """Return whether the Hub answers that it has a file. One request; a download would retry for half a minute."""
    try:
        return HfApi().file_exists(name, file)
    except (
        Exception
    ) as error:  # the HTTP library, and so the error, differs between versions of huggingface_hub
        if not isinstance(error, HFValidationError) and not is_unreachable(error):
            _warn(name, file, error)
        return False


def _warn(name: str, file: str, error: Exception) -> None:
    """Warn that the Hub failed: a copy that its card names, or an adapter, may get the draft of another target."""
    warnings.warn(
        f"The Hub did not send {file} of {name}, so the draft is chosen without it: {reason(error)}\nRun the same "
        "again to choose with it.",
        UserWarning,
        stacklevel=2,
    )


def _text_in(file: Path, key: str) -> str | None:
    """Return the text under a key of a JSON file; None without the file or the text."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, str) and value else None
