# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Open a draft to be checked: a folder, or a repository on the Hub at one commit. No code runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError

from ..compat_dflash import find_file, pinned
from ..configuration_dflash import DFlashConfig
from ..findings_dflash import LOADING, check_path, explained
from ..registry import check_folder
from ..weights_dflash import Header, headers, stored_files

_BRANCHES = ("main", "engines")


@dataclass
class DraftFiles:
    """Hold the files of a draft, of one commit.

    Args:
        name: Hub id or folder.
        where: keywords that choose the files of a repository (`revision`, `subfolder`, `token`).
        names: paths of all files, relative to the draft's folder.
        info: what the Hub says of the repository; None for a folder.
        branches: of the repository that may hold a draft of ours; () for a folder.
    """

    name: str
    where: dict[str, Any]
    names: tuple[str, ...]
    info: Any = None
    branches: tuple[str, ...] = ()
    broken_weights: str = field(default="", init=False)
    """Why the headers of the weights cannot be read; "" if they can."""

    @property
    def commit(self) -> str | None:
        """The commit that is checked; None for a folder."""
        return None if self.info is None else self.where.get("revision")

    def path(self, name: str) -> Path | None:
        """Return a file, downloaded if necessary; None if there is none."""
        return find_file(self.name, name, **self.where) if name in self.names else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            ValueError, OSError: it is missing, is no dict of fields, or contradicts itself.
        """
        content, _ = DFlashConfig.get_config_dict(self.name, **self.where)
        content = dict(content)
        model_type = content.pop("source_model_type", None)
        content.pop("model_type", None)
        content.pop("_commit_hash", None)
        return content if model_type is None else content | {"model_type": model_type}

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors, downloaded if necessary."""
        return stored_files(self.name, self.where)

    @cached_property
    def tensors(self) -> dict[str, Header]:
        """Type and shape of every tensor; {} where no header can be read, which `broken_weights` explains.

        Of a repository, the headers alone are downloaded.
        """
        try:
            if self.info is None or "subfolder" in self.where:
                return headers(self.weights)
            return self._headers_on_hub()
        except (SafetensorError, SafetensorsParsingError, ValueError, OSError) as error:
            self.broken_weights = str(error)
            return {}

    def _headers_on_hub(self) -> dict[str, Header]:
        """Return type and shape of every tensor of a repository; {} if it has no safetensors."""
        api = HfApi(token=self.where.get("token"))
        try:
            found = api.get_safetensors_metadata(self.name, revision=self.where["revision"])
        except NotASafetensorsRepoError:
            return {}
        tensors = {}
        for file in found.files_metadata.values():
            for name, tensor in file.tensors.items():
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape))
        return tensors


def open_draft(name: Any, where: dict[str, Any]) -> DraftFiles:
    """Open a draft by its Hub id or folder.

    Args:
        where: keywords that choose the files of a repository; values that are None do not count.

    Raises:
        ValueError: `name` is neither a name nor a path.
        OSError: there is no such draft, no access or no connection.
    """
    check_path("draft", name)
    check_folder(name)
    name = str(name)
    where = {key: value for key, value in where.items() if value}
    if Path(name).is_dir():
        folder = Path(name, where.get("subfolder", ""))
        return DraftFiles(name, where, _in_folder(folder))
    with explained(f"{name} could not be read", LOADING):
        return _on_hub(name, where)


def _in_folder(folder: Path) -> tuple[str, ...]:
    """Return the paths of all files in a folder."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(sorted(found))


def _on_hub(name: str, where: dict[str, Any]) -> DraftFiles:
    """Open a repository at the commit that its revision names now."""
    api = HfApi(token=where.get("token"))
    info = api.model_info(name, revision=where.get("revision"))
    where = pinned(name, where | {"revision": info.sha})
    paths = [file.rfilename for file in info.siblings or ()]
    names = tuple(sorted(_below(paths, where.get("subfolder", ""))))
    return DraftFiles(name, where, names, info, _branches(api, name))


def _below(paths: Iterable[str], subfolder: str) -> list[str]:
    """Return the paths below a folder, relative to it."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]


def _branches(api: HfApi, name: str) -> tuple[str, ...]:
    """Return those of our branches that a repository has; () where the Hub does not say."""
    try:
        found = [ref.name for ref in api.list_repo_refs(name).branches]
    except (OSError, HTTPError):
        return ()
    return tuple(branch for branch in _BRANCHES if branch in found)
