# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say which rows of `drafts.json` load: by the kind of the draft, its layout and the format of its weights."""

from typing import Any

from .families import families_of
from .families_dflash import TESTED
from .kinds import KINDS, DraftKind

SPECULATORS = "speculators"
LAYOUTS = ("z-lab", "muse", SPECULATORS, "deepspec", "specforge", "laguna")
"""Layouts of published config.json files. `KINDS` names the kind of draft for which each is read."""

UNREADABLE_WEIGHTS: dict[str, str] = {
    "modelopt NVFP4": "transformers has no loader for that format",
    "NVFP4 of veloGB10": "only that engine reads that format",
    "FP8 W8A8": "its format has not been seen",
    "MXFP8": "its format has not been seen",
}
"""Format of quantised weights -> why a draft in it does not load. All other formats of the catalogue load."""


def refusal(entry: dict[str, Any]) -> str | None:
    """Return why this version cannot run the draft of a row; None if it can. An unknown layout is taken as readable.

    Raises:
        ValueError: the row names a kind or a layout that nobody knows.
    """
    kind, layout = entry["variant"], entry["layout"]
    _check(entry, "variant", tuple(KINDS))
    if layout is not None:
        _check(entry, "layout", LAYOUTS)
    if entry["unsupported"]:
        return entry["unsupported"]
    if layout is not None and not _is_read(KINDS[kind], layout):
        return f"it is a {KINDS[kind].title} draft in the {layout} layout, which is not read"
    weights = entry["quantization"]
    if weights in UNREADABLE_WEIGHTS:
        return f"its weights are quantised to {weights}; {UNREADABLE_WEIGHTS[weights]}"
    return None


def _is_read(kind: DraftKind, layout: str) -> bool:
    """Return whether a draft of a kind is read from a config.json in a layout."""
    if layout == SPECULATORS:
        return kind.speculators is not None
    return layout in kind.layouts


def target_refusal(architectures: tuple[str, ...]) -> str | None:
    """Return why targets of these architectures are not decoded here; None if tests or the benchmark decode them."""
    if not architectures:
        return "the architecture of its target is not known"
    families = frozenset[str]().union(*map(families_of, architectures))
    if families & TESTED:
        return None
    return f"targets of its family are not decoded here ({', '.join(architectures)})"


def _check(entry: dict[str, Any], field: str, known: tuple[str, ...]) -> None:
    """Refuse a value of a row that no table has."""
    if entry[field] not in known:
        words = ", ".join(dict.fromkeys(known))
        raise ValueError(
            f"{entry['repo_id']}: {field} is {entry[field]!r} in drafts.json, not one of {words}."
        )
