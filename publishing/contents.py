# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decide which files of a folder are published with a draft: its own pictures, card and scores, no links.

Config, weights and code are written anew from the loaded draft. Everything else in the folder stays at home.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from ..repository_dflash import is_own_file, read_card

PICTURES = {
    ".png": b"\x89PNG\r\n\x1a\n",
    ".jpg": b"\xff\xd8\xff",
    ".jpeg": b"\xff\xd8\xff",
    ".gif": b"GIF8",
    ".webp": b"RIFF",
}
"""Endings of pictures, and how such a file begins."""
SCORES = ".eval_results"
_REWRITTEN = {"config.json", "model.safetensors.index.json", ".gitattributes", "custom_generate"}
"""Names that are written anew, besides the weights and the code of dflash-hub."""
_NO_SCORE = "no YAML file of this folder"
_LINK = "a link, and what it points to is not part of this folder"


@dataclass(frozen=True)
class LeftOut:
    """Name a file of the folder that is not published, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True)
class Contents:
    """Hold what is published of a folder besides config, weights and code."""

    pictures: tuple[Path, ...]
    card: ModelCard | None
    left_out: tuple[LeftOut, ...]
    scores: tuple[Path, ...] = ()
    """Files in `.eval_results/`, which the Hub shows in the leaderboards of benchmarks."""


def contents(folder: Path) -> Contents:
    """Sort the files of `folder`.

    Raises:
        ValueError: its README.md cannot be read as a card.
    """
    pictures, left_out = [], []
    scores: list[Path] = []
    card = None
    for path in sorted(folder.iterdir()):
        if path.name == "README.md" and is_own_file(path, folder):
            card = read_card(path, str(path))
        elif path.is_file() and not path.is_symlink() and _is_picture(path):
            pictures.append(path)
        elif path.name == SCORES and path.is_dir() and not path.is_symlink():
            for one in sorted(path.iterdir()):
                if one.suffix == ".yaml" and is_own_file(one, folder):
                    scores.append(one)
                else:
                    left_out.append(LeftOut(f"{SCORES}/{one.name}", _NO_SCORE))
        else:
            left_out += _left_out(path, folder)
    return Contents(tuple(pictures), card, tuple(left_out), tuple(scores))


def _is_picture(path: Path) -> bool:
    """Tell whether a file begins as a picture of its ending does."""
    beginning = PICTURES.get(path.suffix.lower())
    if beginning is None:
        return False
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def _left_out(path: Path, folder: Path) -> list[LeftOut]:
    """Return why this file is not published; nothing for those that are written anew."""
    if path.name in _REWRITTEN or re.search(r"\.safetensors$|dflash\d*\.py$", path.name):
        return []
    if path.is_symlink() and not is_own_file(path, folder):
        return [LeftOut(path.name, _LINK)]
    if path.is_dir():
        return [LeftOut(f"{path.name}/", "a folder")]
    if path.suffix.lower() in PICTURES:
        return [LeftOut(path.name, "it does not begin as such a picture does")]
    return [LeftOut(path.name, "neither config, weights, code of dflash-hub, card nor picture")]
