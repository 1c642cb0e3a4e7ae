# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Bringing the code of a published draft up to date; its weights, config and card stay as they are.

The code that decodes lies in every pushed repository, frozen there. Here it is compared with this version's, and
replaced. Downloaded code is only ever read as text: what runs, in a fresh process, is this version's.
"""

import difflib
import inspect
import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from packaging.version import InvalidVersion, Version
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_dflash import __version__
from ..kinds import KINDS
from ..layouts_dflash import engines_layout
from ..modeling_dflash import DFlashDraftModel
from ..repository_dflash import custom_generate, verify_downloads
from .probe import digest
from .push import ENGINES_BRANCH, hub_files, load_apart, refuse_differing

_BRANCHES = ("main", ENGINES_BRANCH)
_GENERATE = "custom_generate/generate.py"
_KEY = "dflash_hub_version"
_OURS = re.compile(rb"^# Copyright \d{4} the dflash-hub authors\.\s*$", re.MULTILINE)
_CODE_VERSION = re.compile(rb"^__version__ = \"([^\"]*)\"", re.MULTILINE)
_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)\s*$)", re.MULTILINE)
# What loading adds or changes, and what it is the business of a refresh to change.
_BOOKKEEPING = {_KEY, "auto_map", "transformers_version", "_name_or_path"}
# An answer that was not had: huggingface_hub lets its client's errors through where there is no connection.
_NO_ANSWER = (OSError, RuntimeError, HTTPError)


@dataclass
class RefreshOptions:
    """What a refresh may be told.

    Args:
        token: a token that may write; the one that was logged in with by default.
        message: of the commits.
        dry_run: find the difference, and stop there.
    """

    token: str | None = None
    message: str = f"Bring the code to dflash-hub {__version__}"
    dry_run: bool = False


@dataclass(frozen=True)
class FileChange:
    """What happens to one file of a repository."""

    path: str
    old: bytes | None
    """None for a new file."""
    new: bytes | None
    """None for one that is removed."""

    @property
    def kind(self) -> str:
        """`new`, `changed` or `removed`."""
        return "new" if self.old is None else "removed" if self.new is None else "changed"

    @property
    def diff(self) -> str:
        """The unified diff."""
        old, new = (
            list(io.StringIO((data or b"").decode("utf-8", "replace")))
            for data in (self.old, self.new)
        )
        ends = (
            "/dev/null" if self.old is None else f"a/{self.path}",
            "/dev/null" if self.new is None else f"b/{self.path}",
        )
        lines = difflib.unified_diff(old, new, *ends)
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            for line in lines
        )

    @property
    def lines(self) -> tuple[int, int]:
        """How many lines are added, and how many are removed."""
        body = self.diff.split("\n")[2:]
        return sum(line.startswith("+") for line in body), sum(
            line.startswith("-") for line in body
        )


@dataclass(frozen=True)
class BranchDifference:
    """What a branch has of other code than this version; nothing, where `changes` is empty."""

    branch: str
    commit: str
    """The commit that was read."""
    version: str
    """The version of dflash-hub that its code is of; "unknown" where it does not say."""
    changes: tuple[FileChange, ...]


@dataclass(frozen=True)
class Refreshed:
    """What was found on each branch, and the commits that were made: branch -> its new commit."""

    repo_id: str
    branches: tuple[BranchDifference, ...]
    commits: dict[str, str] = field(default_factory=dict)


def refresh(
    repo_id: str,
    options: RefreshOptions | None = None,
    agree: Callable[[tuple[BranchDifference, ...]], bool] = lambda branches: True,
    report: Callable[[str], None] = lambda step: None,
) -> Refreshed:
    """Bring the code of `repo_id` to this version, on `main` and, where it is there, on `engines`: one commit each.

    Nothing is pushed before every branch, with its own weights and the new code, was loaded by a fresh process without
    this package and proved bit-equal to its files. A branch that is up to date gets no commit.

    Args:
        agree: called once with all branches, before weights are downloaded, where there is something to change; where
            it gives False, nothing is done.
        report: called with the name of each step as it begins.

    Raises:
        ValueError: not a draft that dflash-hub pushed, one of a newer dflash-hub, or one that the new code loads
            otherwise.
        RuntimeError: the Hub did not answer, or did not take a commit; the message says what is there now.
    """
    options = options or RefreshOptions()
    api = HfApi(token=options.token)
    report("Reading the code on the Hub")
    branches = _read(api, repo_id)
    found = tuple(branch.difference for branch in branches)
    outdated = [branch for branch in branches if branch.difference.changes]
    if not outdated or options.dry_run or not agree(found):
        return Refreshed(repo_id, found)
    for branch in outdated:
        report(f"Checking the new {branch.name} with its weights in a fresh process")
        branch.check()
    commits: dict[str, str] = {}
    for branch in outdated:
        report(f"Pushing the new code to {branch.name}")
        commits[branch.name] = _commit(api, repo_id, branch.difference, options.message, commits)
    return Refreshed(repo_id, found, commits)


def travelling_code(draft_class: type[DFlashDraftModel]) -> dict[str, bytes]:
    """The code that a pushed draft of this class carries, in either layout: path in the repository -> content."""
    home = Path(inspect.getfile(draft_class)).parent
    files = {inspect.getfile(draft_class), inspect.getfile(draft_class.config_class)}
    files |= {str(home / name) for name in draft_class.engines_files}
    files |= {needed for file in files for needed in get_relative_import_files(file)}
    code = {Path(file).name: Path(file).read_bytes() for file in sorted(files)}
    return code | {_GENERATE: Path(inspect.getfile(custom_generate)).read_bytes()}


class _Branch:
    """One branch as it was read, at one commit, and what it shall become."""

    def __init__(self, api: HfApi, repo_id: str, name: str, commit: str):
        self.api, self.repo_id, self.name, self.commit = api, repo_id, name, commit
        self.place = f"{repo_id} (branch {name})"
        self.names = set(api.list_repo_files(repo_id, revision=commit))
        code = [path for path in self.names if path.endswith(".py") and "/" not in path]
        small = [path for path in ("config.json", _GENERATE) if path in self.names]
        self.old = {path: file.read_bytes() for path, file in self.fetch([*code, *small]).items()}
        self.config = self._parse_config()
        self.draft_class, self.layout = self._recognise()
        self.code = travelling_code(self.draft_class)
        self._refuse_unknown_modules()
        self._refuse_newer()

    def fetch(self, paths: Iterable[str]) -> dict[str, Path]:
        """Where the files lie in the cache; what is there already is not downloaded again."""

        def one(path: str) -> tuple[str, Path]:
            return path, Path(self.api.hf_hub_download(self.repo_id, path, revision=self.commit))

        with ThreadPoolExecutor(8) as pool:
            return dict(pool.map(one, sorted(paths)))

    # What it is ------------------------------------------------------------------------------------------------

    def _parse_config(self) -> dict[str, Any]:
        try:
            config = json.loads(self.old.get("config.json", b"{}"))
        except ValueError as error:
            raise ValueError(f"config.json on {self.place} is malformed: {error}") from error
        return config if isinstance(config, dict) else {}

    def _recognise(self) -> tuple[type[DFlashDraftModel], str]:
        """Class and layout of a draft that dflash-hub pushed; anything else is refused."""
        auto_map = self.config.get("auto_map")
        signed = _KEY in self.config or any(_OURS.search(data) for data in self.old.values())
        for kind in KINDS.values():
            for layout, own in _auto_maps(kind.model_class).items():
                if signed and isinstance(auto_map, dict) and own.items() <= auto_map.items():
                    return kind.model_class, layout
        raise ValueError(
            f"{self.place} holds no draft that dflash-hub pushed (auto_map in its config.json is {auto_map}), so "
            "its code is not touched. Download it, and publish a copy of your own: dflash-hub push FOLDER me/my-draft."
        )

    def _refuse_unknown_modules(self) -> None:
        for name, reference in self.config["auto_map"].items():
            if f"{str(reference).rpartition('.')[0]}.py" not in self.code:
                raise ValueError(
                    f"auto_map in config.json on {self.place} names {reference} for {name}, "
                    f"which dflash-hub {__version__} does not ship. Take that entry out, and run the same again."
                )

    @cached_property
    def versions(self) -> list[str]:
        """What config.json says, and what the code says of itself; the engines layout has only the second."""
        in_code = _CODE_VERSION.search(self.old.get("configuration_dflash.py", b""))
        said = [self.config.get(_KEY), in_code and in_code[1].decode()]
        return [str(version) for version in said if version is not None]

    def _refuse_newer(self) -> None:
        for version in self.versions:
            try:
                newer = Version(version) > Version(__version__)
            except InvalidVersion as error:
                raise ValueError(
                    f"{self.place} says that dflash-hub {version!r} wrote it, which is no "
                    f"version; correct {_KEY} in its config.json."
                ) from error
            if newer:
                raise ValueError(
                    f"The code on {self.place} is of dflash-hub {version}, newer than the "
                    f"{__version__} installed here, so it is not touched. Upgrade: pip install --upgrade dflash-hub"
                )

    # What it becomes -------------------------------------------------------------------------------------------

    @cached_property
    def wanted(self) -> dict[str, bytes]:
        """The files that shall be there: path -> content."""
        wanted = self.code | {"config.json": self._new_config()}
        return wanted if ".gitattributes" in self.names else wanted | hub_files()

    @cached_property
    def difference(self) -> BranchDifference:
        changes = [
            FileChange(path, self.old.get(path), new)
            for path, new in sorted(self.wanted.items())
            if self.old.get(path) != new
        ]
        changes += [FileChange(path, self.old[path], None) for path in self._stale()]
        return BranchDifference(
            self.name, self.commit, next(iter(self.versions), "unknown"), tuple(changes)
        )

    def _new_config(self) -> bytes:
        """config.json with this version in it; not another byte differs."""
        text = self.old["config.json"].decode()
        if _KEY not in self.config:
            return self.old["config.json"]
        wanted = self.config | {_KEY: __version__}
        for found in re.finditer(rf'"{_KEY}"\s*:\s*("[^"]*"|[^\s,}}]+)', text):
            changed = text[: found.start(1)] + json.dumps(__version__) + text[found.end(1) :]
            if json.loads(changed) == wanted:
                return changed.encode()
        raise ValueError(f"{_KEY} in config.json on {self.place} cannot be set; correct it.")

    def _stale(self) -> list[str]:
        """Files of ours that the old code imports, and that this version does not have."""
        waiting = [
            f"{str(reference).rpartition('.')[0]}.py"
            for reference in self.config["auto_map"].values()
        ]
        seen: set[str] = set()
        while waiting:
            path = waiting.pop()
            if path not in seen and path in self.old:
                seen.add(path)
                waiting += [f"{(a or b).decode()}.py" for a, b in _IMPORT.findall(self.old[path])]
        return sorted(path for path in seen - set(self.wanted) if _OURS.search(self.old[path]))

    # Checking it -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Lay the new code over the branch's own weights, load both in a fresh process, and compare with the files.

        Raises:
            ValueError: it does not load, or a tensor or a value of config.json is another.
            RuntimeError: the weights could not be had.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = self._stage(folder)
            seen = load_apart(folder)
            dtype = self.config.get("dtype", self.config.get("torch_dtype"))
            refuse_differing(folder, seen["digests"], _digests_of_files(weights, dtype))
        self._refuse_other_values(seen["config"])

    def _stage(self, folder: Path) -> list[Path]:
        """Write the new repository into `folder`, without any code that is not this version's; its weight files."""
        started = time.time()
        try:
            weights = self.fetch(self._weights())
            settings = self.fetch(
                path for path in self.names if path.endswith(".json") and "/" not in path
            )
            verify_downloads(
                self.repo_id, {"revision": self.commit, "token": self.api.token}, started
            )
        except _NO_ANSWER as error:
            raise _unread(self.repo_id, error) from error
        for path, file in settings.items():
            shutil.copyfile(file, folder / path)
        for path, file in weights.items():
            _link(file.resolve(), folder / path)
        for path, content in self.wanted.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        return [folder / path for path in weights]

    def _weights(self) -> list[str]:
        """The files that transformers would read: one, or the shards that the index names."""
        index = "model.safetensors.index.json"
        if "model.safetensors" in self.names:
            return ["model.safetensors"]
        if index not in self.names:
            raise ValueError(f"{self.place} has no model.safetensors, so it is no whole draft.")
        shards = set(json.loads(self.fetch([index])[index].read_bytes())["weight_map"].values())
        if missing := sorted(shards - self.names):
            raise ValueError(f"{self.place} lacks {missing[0]}, which its {index} names.")
        return sorted(shards)

    def _refuse_other_values(self, loaded: dict[str, Any]) -> None:
        """Refuse code that reads a value of config.json otherwise than it stands there."""
        if (
            self.layout == "engines"
        ):  # has the same values in other places, so it is compared as it would be written
            loaded = json.loads(
                json.dumps(engines_layout(self.draft_class.config_class.from_dict(loaded)))
            )
        said = {key: value for key, value in self.config.items() if key not in _BOOKKEEPING}
        if differing := _differing(said, loaded):
            key, here, there = differing[0]
            raise ValueError(
                f"{key} in config.json on {self.place} is {here}, but dflash-hub {__version__} reads it as {there}. "
                "Nothing was pushed."
            )


def _read(api: HfApi, repo_id: str) -> list[_Branch]:
    """The branches that there are, `main` first."""
    try:
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches}
        return [_Branch(api, repo_id, name, heads[name]) for name in _BRANCHES if name in heads]
    except _NO_ANSWER as error:
        raise _unread(repo_id, error) from error


def _commit(
    api: HfApi, repo_id: str, found: BranchDifference, message: str, done: dict[str, str]
) -> str:
    """Push one branch in one commit on top of the one that was read; the new commit."""
    operations = [
        CommitOperationDelete(change.path)
        if change.new is None
        else CommitOperationAdd(change.path, change.new)
        for change in found.changes
    ]
    try:
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=found.branch,
            parent_commit=found.commit,
        )
    except _NO_ANSWER as error:
        there = "".join(
            f"{branch} is new (commit {commit[:8]}), " for branch, commit in done.items()
        )
        there = (
            f"On the Hub now: {there}{found.branch} is not."
            if done
            else "Nothing was pushed: all is as it was."
        )
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 412:
            raise RuntimeError(
                f"{repo_id} (branch {found.branch}) moved after it was read: somebody else pushed to it. {there} "
                "Run the same again; it reads the branch as it is then."
            ) from error
        raise RuntimeError(
            f"The Hub did not take the new code for {repo_id} (branch {found.branch}): {error}\n{there} Run the same "
            "again, with a token that may write there (hf auth login, or HF_TOKEN); it completes what is missing."
        ) from error
    return info.oid


def _unread(repo_id: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"{repo_id} could not be read from the Hub: {error}\nNothing was pushed: all is as it was. Run the same again "
        "with a connection, the right name, and a token that may read and write there (hf auth login, or HF_TOKEN)."
    )


def _auto_maps(draft_class: type[DFlashDraftModel]) -> dict[str, dict[str, str]]:
    """Layout -> what auto_map says in it."""

    def name(one: type) -> str:
        return f"{one.__module__.rpartition('.')[2]}.{one.__name__}"

    return {
        "hub": {"AutoConfig": name(draft_class.config_class), "AutoModel": name(draft_class)},
        "engines": {
            "AutoModel": f"{draft_class.config_class.model_type}.{draft_class.config_class.architecture}"
        },
    }


def _differing(said: dict[str, Any], loaded: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted name and both values of what differs, of all that both have: a newer layout may say more, or less."""
    found = []
    for key in sorted(said.keys() & loaded.keys()):
        here, there = said[key], loaded[key]
        if isinstance(here, dict) and isinstance(there, dict):
            found += [(f"{key}.{inner}", *values) for inner, *values in _differing(here, there)]
        elif here != there:
            found.append((key, here, there))
    return found


def _digests_of_files(files: list[Path], dtype: str | None) -> dict[str, str]:
    """Tensor name -> digest, read without any model; in the dtype that config.json loads them in, if it says one."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                tensor = tensors.get_tensor(name)
                found[name] = digest(
                    tensor.to(getattr(torch, dtype.removeprefix("torch."))) if dtype else tensor
                )
    return found


def _link(file: Path, place: Path) -> None:
    """Weights may be many GB; only where links cannot be made (Windows, without the right to) are they copied."""
    try:
        place.symlink_to(file)
    except OSError:
        shutil.copyfile(file, place)
