# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read features row by row: from a folder, also while it is being written, or from a dataset repository on the Hub.

Of a row only its own part of a shard is read, and nothing of it stays. So memory does not grow with the data.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..catalogue import is_path
from ..findings_dflash import LOADING, explained
from .feature_target import load_ends
from .features import (
    AGAIN,
    INDEX,
    LOCK,
    STATES,
    TABLES,
    TARGET,
    Index,
    Origin,
    Part,
    Place,
    check_shard,
    decoded,
    scale_of,
)
from .locks import is_held

logger = logging.getLogger(__name__)
POLL = 0.5
"""Seconds between two looks for a shard that is being written."""
_NOTED_AFTER = 5.0
"""Seconds of waiting after which it is noted."""
_OF_TARGET = ("config.json", "generation_config.json", "model.safetensors")


class Shards(Protocol):
    """Find the files of a folder of features."""

    name: str

    def file(self, name: str) -> Path:
        """Return the path of a file, once it is there.

        Raises:
            ValueError, OSError: it is not there, and nobody writes it.
        """
        ...

    def check(self, index: Index) -> None:
        """Refuse what can be seen to be incomplete before the first step.

        Raises:
            ValueError: naming the file.
        """
        ...


class LocalShards:
    """Find the files of a folder. Where `dflash-hub features` is still writing it, a shard is waited for."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)

    def file(self, name: str) -> Path:
        """Return the path of a file, once it is there.

        Raises:
            ValueError: it is not there, and nobody writes it.
        """
        path = self.folder / name
        since, noted = time.monotonic(), False
        while not path.exists():
            writing = is_held(self.folder / LOCK)
            if not writing and not path.exists():
                raise self._missing(name)
            if not noted and time.monotonic() - since > _NOTED_AFTER:
                noted = True
                logger.warning("Waiting for %s, which `dflash-hub features` is writing.", path)
            time.sleep(POLL)
        return path

    def check(self, index: Index) -> None:
        """Refuse a shard that is not whole, or that is missing while nobody writes the folder.

        Raises:
            ValueError: naming the file.
        """
        missing = []
        for shards in index.shards.values():
            for shard in shards:
                path = self.folder / shard.file
                if path.exists():
                    check_shard(path, index.origin, shard)
                else:
                    missing.append(shard.file)
        if missing and not is_held(self.folder / LOCK):
            for name in missing:
                if not (self.folder / name).exists():
                    raise self._missing(name)

    def _missing(self, name: str) -> ValueError:
        if name == INDEX:
            return ValueError(
                f"{self.folder} holds no features: it has no {INDEX}. Pass a folder that `dflash-hub features` "
                "writes, or a dataset repository with one."
            )
        return ValueError(
            f"{self.folder / name} is missing, and no `dflash-hub features` is writing it: it has ended early. {AGAIN}"
        )


class HubShards:
    """Find the files of a dataset repository on the Hub, or of a folder in it; each is downloaded when it is needed.

    Args:
        name: such as "org/features" or "org/features/folder".
    """

    def __init__(self, name: str):
        self.name = name
        parts = PurePosixPath(name).parts
        self.repo_id, self.folder = "/".join(parts[:2]), PurePosixPath(*parts[2:])
        with explained(f"The features {name} could not be read from the Hub", LOADING):
            info = HfApi().dataset_info(self.repo_id)
        # What is pushed meanwhile is not mixed in.
        self.revision = str(info.sha)
        self.files = {entry.rfilename for entry in info.siblings or ()}

    def file(self, name: str) -> Path:
        """Return the path of a file, downloaded unless it is in the cache.

        Raises:
            ValueError, OSError: the repository has no such file, or the Hub does not answer.
        """
        path = str(self.folder / name)
        if path not in self.files:
            raise ValueError(
                f"The dataset {self.repo_id} has no {path}. Pass a repository with a folder that `dflash-hub features` "
                "wrote, and upload all of it."
            )
        with explained(f"{path} of the dataset {self.repo_id} could not be downloaded", LOADING):
            return Path(
                hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.revision)
            )

    def check(self, index: Index) -> None:
        """Refuse a repository that lacks a shard.

        Raises:
            ValueError: naming the file.
        """
        for shards in index.shards.values():
            for shard in shards:
                path = str(self.folder / shard.file)
                if path not in self.files:
                    raise ValueError(
                        f"The dataset {self.repo_id} lacks {path}. Upload the whole folder, and run this again."
                    )


class FeatureRows(Dataset):
    """Hold prepared rows with their features, read when they are asked for.

    Each is a dict: `input_ids`, `supervised` and `lengths` as `prepare` makes them, then `features [S, F]` and perhaps
    `last_hidden_state [S, H]`, in the target's dtype.
    """

    def __init__(self, shards: Shards, origin: Origin, part: Part, holds: list[str]):
        self.shards, self.origin = shards, origin
        self.part, self.holds = part, holds
        self.column_names = ["input_ids", "supervised", "lengths", *holds]

    @property
    def digest(self) -> str:
        """A text by which these rows and their features differ from others."""
        return f"{len(self):,} rows ({self.origin.rows}, {self.origin.dtype})"

    def __len__(self) -> int:
        return len(self.part.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read one row.

        Raises:
            ValueError: its shard is missing or broken.
        """
        place = self.part.locate(number)
        stored = self._read(place)
        row: dict[str, Any] = {"lengths": place.lengths}
        for name in ("input_ids", "supervised"):
            row[name] = stored[name].int().tolist()
        for name in self.holds:
            row[name] = decoded(name, stored, self.origin)
        return row

    def _read(self, place: Place) -> dict[str, Any]:
        """Return the stored tensors of a row, by name."""
        path, wanted = self.shards.file(place.shard.file), ["input_ids", "supervised"]
        for name in self.holds:
            wanted += [key for key in (name, scale_of(name)) if key in self.origin.columns]
        try:
            # Opened for each row: pages of an open map would count as memory of this process.
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name)[place.tokens] for name in wanted}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Remove it. {AGAIN}") from error


@dataclass(frozen=True)
class Features:
    """Hold features that were opened: what they are of, and where their files are."""

    index: Index
    shards: Shards

    @property
    def origin(self) -> Origin:
        return self.index.origin

    def rows(self, part: str, config: Any, states: bool = True) -> FeatureRows | None:
        """Return the rows of a part; None if the data has none.

        Args:
            part: "train" or "eval".
            config: of the draft that is trained.
            states: whether the target's last hidden states are read, where the features hold them.

        Raises:
            ValueError: the features are not those that this draft reads; names what differs.
        """
        given = {name: getattr(config, name) for name in ("block_size", "mask_token_id")}
        given["target_layer_ids"] = list(config.target_layer_ids)
        advice = (
            f"Train such a draft, or write features for this one; these are {self.shards.name}."
        )
        self.origin.check(given, advice)
        if part not in self.index.shards:
            return None
        tables = self.index.part(part, self.shards.file(TABLES))
        holds = [name for name in self.origin.holds if states or name != STATES]
        return FeatureRows(self.shards, self.origin, tables, holds)

    def target(self) -> Any:
        """Return the target without its layers: its embedding and head alone."""
        folders = {self.shards.file(f"{TARGET}/{name}").parent for name in _OF_TARGET}
        return load_ends(folders.pop())


def open_features(name: str) -> Features:
    """Open a folder of features, or a dataset repository with one.

    Raises:
        ValueError, OSError: it holds none, they are incomplete, or another version wrote them.
    """
    is_local = is_path(name) or "/" not in name
    shards: Shards = LocalShards(Path(name)) if is_local else HubShards(name)
    path = shards.file(INDEX)
    index = Index.loads(path.read_text(encoding="utf-8"), name)
    shards.check(index)
    return Features(index, shards)
