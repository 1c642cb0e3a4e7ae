# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write a draft's model card from the template in `hub_repo/`, or complete an existing card."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ..layouts_dflash import engines_remarks
from ..repository_dflash import LIBRARY, PLACEHOLDER, check_repo_id, correct_metadata

logger = logging.get_logger(__name__)

TAGS = ("dflash", "speculative-decoding", "draft-model", "custom_generate")
THINKING = "thinking"
"""The entry of `card_metadata` that is no metadata of the Hub: the mode that a draft was made for."""
MODES = {"on": "thinking", "off": "non-thinking", "both": "thinking and non-thinking"}
NOT_STATED = "not stated"
UNKNOWN_TARGET = "THE-TARGET-OF-THIS-DRAFT"
_MODE_ROW = re.compile(r"^\| mode, language \| ([^;|\n]*); ([^|\n]*) \|$", re.MULTILINE)
_GAPS = re.compile(
    r"(<!-- dflash-hub gaps: begin -->).*?(<!-- dflash-hub gaps: end -->)", re.DOTALL
)
_STATED = {
    "base_model": "its target (`base_model`)",
    "license": "its licence (`license`)",
    "datasets": "the data that it was trained on (`datasets`)",
    "language": "the language of that (`language`)",
}
"""Keys of metadata that only the author knows, and what stands there, in words."""


def write_card(
    draft: Any, folder: Any, existing: ModelCard | None, repo_id: str | None, tags: list[str] | None
) -> None:
    """Write README.md into `folder`: the existing card with missing metadata filled in, or a new card.

    Without a `repo_id` the card names a placeholder, and the Hub is not contacted.

    Raises:
        ValueError: `card_metadata` names a target that is no Hub id, or a mode that there is not.
    """
    metadata: dict[str, Any] = {"library_name": LIBRARY}
    metadata |= draft.card_known
    metadata |= _inherited_metadata(draft.source_card(online=repo_id is not None))
    for name in _names(draft.card_metadata):
        _check_base_model(name)
    chosen = dict(draft.card_metadata)
    mode = _mode(chosen.pop(THINKING, None))
    metadata |= chosen
    if existing and mode != NOT_STATED and not _MODE_ROW.search(existing.text):
        logger.warning(
            f"The card stays as it is, so it does not get the mode: {mode}. Write it there."
        )
    card = existing or _new_card(draft, repo_id or PLACEHOLDER, metadata, mode)
    if repo_id is not None:
        old_title, title = (f"# {name.split('/')[-1]}\n" for name in (PLACEHOLDER, repo_id))
        card.text = card.text.replace(PLACEHOLDER, repo_id).replace(old_title, title)
    correct_metadata(card, chosen)
    for key, value in metadata.items():
        if card.data.get(key) is None or key in chosen:
            card.data[key] = value
    card.text = completed(card, mode)
    own = (*TAGS, draft.config.model_type, *(tags or ()))
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *own]))
    card.save(Path(folder) / "README.md")


def completed(card: ModelCard, mode: str = NOT_STATED) -> str:
    """Return the text of a card with its gaps filled by its metadata, and a list of those that are left.

    Only what the template wrote is touched: the name that stands for a target, the row of mode and language, and the
    list itself.
    """
    text = card.text
    target = next(iter(_listed(card.data.get("base_model"))), None)
    if target is not None:
        text = text.replace(UNKNOWN_TARGET, str(target))
    languages = ", ".join(map(str, _listed(card.data.get("language"))))
    row = _MODE_ROW.search(text)
    if row is not None:
        words = [mode if row[1] == NOT_STATED else row[1], row[2]]
        if row[2] == NOT_STATED and languages:
            words[1] = languages
        text = text.replace(row[0], f"| mode, language | {'; '.join(words)} |")
    card.text = text
    if not _GAPS.search(text):
        return text
    found = gaps(card)
    listed = f"Not stated yet, for the author to fill in: {', '.join(found)}." if found else ""
    return _GAPS.sub(lambda match: f"{match[1]}\n{listed}\n{match[2]}", text)


def gaps(card: ModelCard) -> list[str]:
    """Return what a card does not say, each with the key of its metadata."""
    found = [words for key, words in _STATED.items() if not card.data.get(key)]
    row = _MODE_ROW.search(card.text)
    if row is not None and row[1] == NOT_STATED:
        found.append("whether the target thinks in it (`--thinking`)")
    return found


def _mode(thinking: Any) -> str:
    """Return in words which mode a draft was made for.

    Raises:
        ValueError: `thinking` is no such mode.
    """
    if thinking is None:
        return NOT_STATED
    if thinking not in MODES:
        raise ValueError(f"thinking is {thinking!r}; it must be one of {', '.join(MODES)}.")
    return MODES[thinking]


def _inherited_metadata(card: ModelCard | None) -> dict[str, Any]:
    """Return the metadata of a card that stays true when its draft is pushed to another repository."""
    inherited = ("base_model", "license", "license_name", "license_link", "datasets", "language")
    data = card.data.to_dict() if card is not None else {}
    found = {key: data[key] for key in inherited if data.get(key) is not None}
    try:
        for name in _names(found):
            _check_base_model(name)
    except ValueError as error:
        logger.warning(f"{error} The card that came with the draft says so; it is left out.")
        del found["base_model"]
    return found


def _names(metadata: dict[str, Any]) -> list[Any]:
    """Return the targets that metadata names."""
    return _listed(metadata.get("base_model"))


def _listed(value: Any) -> list[Any]:
    """Return a value of metadata as a list, as several of them may stand there."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_base_model(name: Any) -> None:
    """Refuse what is no Hub id: it would stand in the code lines of the card.

    Raises:
        ValueError: with the value and what is expected.
    """
    try:
        check_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"base_model is {name!r}, which is not the Hub id of a model, such as org/name."
        ) from error


def _new_card(draft: Any, repo_id: str, metadata: dict[str, Any], mode: str) -> ModelCard:
    """Return a card made from the template.

    Args:
        mode: that the draft was made for, in words.
    """
    target = metadata.get("base_model") or UNKNOWN_TARGET
    values = {
        "repo_id": repo_id,
        "target": target[0] if isinstance(target, list) else target,
        "config": draft.config,
        "mode": mode,
        "languages": ", ".join(map(str, _listed(metadata.get("language")))) or NOT_STATED,
        "parameters": f"{draft.num_parameters():,}",
        "drafted": draft.config.num_drafted,
        "engines_remarks": engines_remarks(draft.config),
    }
    data = ModelCardData(**metadata)
    return ModelCard(_template().render(**data.to_dict() | values, card_data=data.to_yaml()))


@cache
def _template() -> Any:
    """Return the template of a card; `ModelCard.from_template` would compile it for every card."""
    import jinja2

    path = Path(__file__).parents[1] / "hub_repo" / "README.md"
    return jinja2.Template(path.read_text(encoding="utf-8"))
