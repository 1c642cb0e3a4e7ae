# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read `drafts.json` without torch: the rows of the catalogue, and the drafts of a checkpoint by its name.

The registry makes a `DFlashDraftSpec` of each row, which also loads the draft. What both tell is in `Published`.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .families import siblings_of
from .kinds import KINDS, kind_named
from .published import refusal, target_refusal


class Published:
    """Tell what this version does with a published draft; the base of rows and of specs."""

    repo_id: str | None
    targets: tuple[str, ...]
    architectures: tuple[str, ...]
    unsupported: str | None
    details: dict[str, Any]

    @property
    def kind_name(self) -> str:
        """Name of its kind, a key of `KINDS`."""
        raise NotImplementedError

    @property
    def target_state(self) -> str | None:
        """Reason why this version does not decode its target, though the draft loads; None if it does."""
        return target_refusal(self.architectures)

    @property
    def loads(self) -> bool:
        """Whether this version can run it."""
        return self.unsupported is None

    @property
    def decodes(self) -> bool:
        """Whether it loads, and targets of its own target's family decode here."""
        return self.loads and self.target_state is None

    @property
    def reason(self) -> str | None:
        """Reason why it does not load, or else not decode; None if it decodes."""
        return self.unsupported or self.target_state

    @property
    def target(self) -> str | None:
        """The first of `targets`."""
        return self.targets[0] if self.targets else None

    def serves(self, architecture: str) -> bool:
        """Return whether its target has the same text part as targets of this architecture."""
        return any(architecture in siblings_of(known) for known in self.architectures)

    @property
    def name(self) -> str:
        """The repository."""
        return str(self.repo_id)

    def check_supported(self) -> None:
        """Raise a ValueError if this version cannot run the draft."""
        if self.unsupported:
            raise ValueError(
                f"{self.name} cannot be run by this version of dflash-hub: {self.unsupported}."
            )


@dataclass(frozen=True)
class DraftRow(Published):
    """Hold a draft of the catalogue. The fields are those of a `DFlashDraftSpec`."""

    repo_id: str
    variant: str
    revision: str | None = None
    subfolder: str = ""
    targets: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    license: str | None = None
    gated: bool | None = None
    unsupported: str | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All entries of `drafts.json` that are no field of a `DFlashDraftSpec`."""

    @property
    def kind_name(self) -> str:
        return self.variant

    @property
    def class_name(self) -> str:
        """Name of the class that runs it."""
        return KINDS[self.variant].reader


_Row = TypeVar("_Row", bound=Published)
SPEC_FIELDS = (
    "repo_id",
    "revision",
    "subfolder",
    "targets",
    "architectures",
    "hidden_size",
    "num_target_layers",
    "vocab_size",
    "license",
    "gated",
    "unsupported",
    "note",
)
"""Entries of `drafts.json` that are fields of a `DFlashDraftSpec`; the others are its details."""


def read_entries() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return for each row of `drafts.json` the fields of a spec, and its other entries."""
    text = (Path(__file__).parent / "drafts.json").read_text(encoding="utf-8")
    found = []
    for entry in json.loads(text):
        values: dict[str, Any] = {}
        for name in SPEC_FIELDS:
            value = entry[name]
            values[name] = tuple(value) if isinstance(value, list) else value
        values["unsupported"] = refusal(entry)
        found.append((values, {key: entry[key] for key in entry if key not in SPEC_FIELDS}))
    return found


@cache
def rows() -> tuple[DraftRow, ...]:
    """Return the rows of the catalogue."""
    known = {one.name for one in fields(DraftRow)}
    found = []
    for values, details in read_entries():
        of_row = {name: values[name] for name in values if name in known}
        found.append(DraftRow(variant=details["variant"], details=details, **of_row))
    return tuple(found)


def made_for(target: str, published: Iterable[_Row]) -> list[_Row]:
    """Return the drafts made for a checkpoint, by its Hub id: the preferred one first.

    Supported ones come first. Among them the order is: plain floats, a config.json that has been seen, not of the
    community, the later kind.
    """
    name = target.casefold()
    found = [row for row in published if name in map(str.casefold, row.targets)]
    return sorted(found, key=_rank)


def _rank(row: Published) -> tuple[bool, bool, bool, bool, int]:
    quantised = row.details.get("quantization") is not None
    unseen = not row.details.get("config_seen", True)
    community = row.details.get("published_by") == "community"
    kind = list(KINDS).index(kind_named(row.kind_name).name)
    return not row.loads, quantised, unseen, community, -kind


def reason_of_exact(target: str) -> str:
    """Return in a sentence why a draft was chosen for the checkpoint that it was made for."""
    return f"It was made for {target}."


def matching(part: str, published: Sequence[_Row]) -> list[_Row]:
    """Return the drafts of a checkpoint with this Hub id; without one, of those whose id has this part."""
    exact = made_for(part, published)
    if exact:
        return exact
    wanted = part.casefold()
    return [row for row in published if wanted in "\n".join(row.targets).casefold()]


def nearest(name: str, published: Iterable[Published]) -> list[str]:
    """Return up to three Hub ids of targets that are spelt most like this name."""
    targets = {one.casefold(): one for row in published for one in row.targets}
    by_end = {one.rpartition("/")[2]: one for one in targets}
    wanted = name.casefold()
    known = targets if "/" in wanted else by_end
    found = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.5)
    return [targets[by_end.get(one, one)] for one in found]


def out_of_cache(name: str) -> str:
    """Return the Hub id of a folder in the Hub's cache; any other name unchanged."""
    parts = Path(name).resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return "/".join(parts[-3].split("--")[1:])
    return name


def check_folder(name: Any) -> None:
    """Refuse the path of a folder that does not exist, which would be taken for a Hub id.

    Raises:
        OSError: naming it.
    """
    if is_hub_id(str(name)) or Path(name).exists():
        return
    raise OSError(
        f"There is no folder {name}. Pass a folder that exists, or a Hub id such as org/name."
    )


def is_path(name: str) -> bool:
    """Return whether a name stands for a path: of a folder that there is, or with a beginning that only paths have."""
    return Path(name).is_dir() or name.startswith((".", "/", "~"))


def is_hub_id(name: Any) -> bool:
    """Return whether a name can be that of a repository, by the Hub's own rule; any other text can only be a path.

    The rule is written out, since it takes long to import huggingface_hub.
    """
    if not isinstance(name, str):
        return False
    is_named = re.fullmatch(r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", name, re.ASCII)
    return bool(is_named) and not re.search(r"--|\.\.|\.git$", name)
