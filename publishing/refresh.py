# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Update the code of a published draft; its weights, config values and card stay unchanged.

Every pushed repository contains the code that decodes, as of its push. This module compares that code with this
version's, and replaces it. Downloaded code is only read as text. Only this version's code runs, in a fresh process.
"""

import difflib
import inspect
import io
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from packaging.version import InvalidVersion, Version
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_dflash import __version__
from ..findings_dflash import advice_on, reason
from ..kinds import KINDS
from ..layouts_dflash import engines_layout
from ..modeling_dflash import DFlashDraftModel
from ..repository_dflash import check_repo_id, custom_generate, staging, staging_folder
from ..weights_dflash import stored_tensors, verify_downloads
from .probe import digest
from .push import ENGINES_BRANCH, check_same_tensors, hub_files, load_apart

_BRANCHES = ("main", ENGINES_BRANCH)
_GENERATE = "custom_generate/generate.py"
_VERSION_KEY = "dflash_hub_version"
LICENCE_LINE = re.compile(rb"^# Copyright \d{4} the dflash-hub authors\.\s*$", re.MULTILINE)
CODE_VERSION = re.compile(rb"^__version__ = \"([^\"]*)\"", re.MULTILINE)
_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)\s*$)", re.MULTILINE)
# Config keys that loading adds or changes, or that a refresh updates.
_BOOKKEEPING = {_VERSION_KEY, "auto_map", "transformers_version", "_name_or_path"}
# A failed request: the HTTP client's own errors, and an answer that is cut short, which is no JSON.
_HUB_ERRORS = (OSError, RuntimeError, HTTPError, json.JSONDecodeError)


@dataclass
class RefreshOptions:
    """Hold the options of a refresh.

    Args:
        token: a token with write access. Default: the token of `hf auth login`.
        message: the commit message.
        dry_run: find the differences and push nothing.
    """

    token: str | None = None
    message: str = f"Bring the code to dflash-hub {__version__}"
    dry_run: bool = False


@dataclass(frozen=True)
class FileChange:
    """Hold the old and the new content of one file of a repository."""

    path: str
    old: bytes | None
    """None for a new file."""
    new: bytes | None
    """None for a removed file."""

    @property
    def kind(self) -> str:
        """`new`, `changed` or `removed`."""
        if self.old is None:
            return "new"
        return "removed" if self.new is None else "changed"

    @property
    def diff(self) -> str:
        """The unified diff."""
        old_name = "/dev/null" if self.old is None else f"a/{self.path}"
        new_name = "/dev/null" if self.new is None else f"b/{self.path}"
        diff = difflib.unified_diff(_lines_of(self.old), _lines_of(self.new), old_name, new_name)
        return "".join(map(_ended, diff))

    @property
    def lines(self) -> tuple[int, int]:
        """The number of added lines, and of removed lines."""
        signs = Counter(line[:1] for line in self.diff.split("\n")[2:])
        return signs["+"], signs["-"]


@dataclass(frozen=True)
class BranchDifference:
    """Hold how the code on a branch differs from this version's; `changes` is empty where it does not."""

    branch: str
    commit: str
    """The commit that was compared."""
    version: str
    """The version of dflash-hub that wrote its code; "unknown" if the repository does not name it."""
    changes: tuple[FileChange, ...]


@dataclass(frozen=True)
class Refreshed:
    """Hold the differences of each branch, and the new commits: branch -> commit."""

    repo_id: str
    branches: tuple[BranchDifference, ...]
    commits: dict[str, str] = field(default_factory=dict)


def refresh(
    repo_id: str,
    options: RefreshOptions | None = None,
    agree: Callable[[tuple[BranchDifference, ...]], bool] = lambda branches: True,
    report: Callable[[str], None] = lambda step: None,
) -> Refreshed:
    """Update the code of `repo_id` to this version, on `main` and, if it exists, on `engines`: one commit each.

    Every branch is checked first: a fresh process without this package loads its weights with the new code. Nothing is
    pushed unless the tensors are bit-equal to the files. A branch that is up to date gets no commit.

    Args:
        agree: called once with all branches if there is something to change, before weights are downloaded. If it
            returns False, nothing is changed.
        report: called with the name of each step as it begins.

    Raises:
        ValueError: dflash-hub did not push this draft, a newer dflash-hub did, or the new code loads it otherwise.
        RuntimeError: reading or pushing failed; the message says which commits are on the Hub now.
    """
    check_repo_id(repo_id)
    options = RefreshOptions() if options is None else options
    if not isinstance(options, RefreshOptions):
        raise ValueError(f"options is {options!r}; pass a RefreshOptions.")
    api = HfApi(token=options.token)
    report("Reading the code on the Hub")
    branches = _read(api, repo_id)
    found = tuple(branch.difference for branch in branches)
    outdated = [branch for branch in branches if branch.difference.changes]
    if not outdated or options.dry_run or not agree(found):
        return Refreshed(repo_id, found)
    for branch in outdated:
        report(f"Checking the new {branch.name} with its weights in a fresh process")
        check_branch(branch)
    commits: dict[str, str] = {}
    for branch in outdated:
        report(f"Pushing the new code to {branch.name}")
        commits[branch.name] = _commit(api, repo_id, branch.difference, options.message, commits)
    return Refreshed(repo_id, found, commits)


def travelling_code(draft_class: type[DFlashDraftModel]) -> dict[str, bytes]:
    """Return the code that a pushed draft of this class contains, in either layout: path -> content."""
    root = Path(inspect.getfile(draft_class)).parent
    files = {inspect.getfile(draft_class), inspect.getfile(draft_class.config_class)}
    files |= {str(root / name) for name in draft_class.engines_files}
    code = {Path(file).name: Path(file).read_bytes() for file in _with_imports(frozenset(files))}
    return code | {_GENERATE: Path(inspect.getfile(custom_generate)).read_bytes()}


@cache
def _with_imports(files: frozenset[str]) -> tuple[str, ...]:
    """Return these files and all that they import from beside them, sorted."""
    needed = {needed for file in files for needed in get_relative_import_files(file)}
    return tuple(sorted(files | needed))


def check_branch(branch: "_Branch") -> None:
    """Load the branch's weights with the new code in a fresh process, and compare with the files.

    Raises:
        ValueError: it does not load, or a tensor or a value of config.json differs.
        RuntimeError: the weights could not be downloaded.
    """
    with staging_folder() as parent:
        folder = parent / branch.name
        folder.mkdir()
        weights = branch.stage(folder)
        loaded = load_apart(folder)
        dtype = branch.config.get("dtype", branch.config.get("torch_dtype"))
        check_same_tensors(folder, loaded["digests"], _digests_of_files(weights, dtype))
    branch.check_config_values(loaded["config"])


class _Branch:
    """Read one branch at one commit, and prepare and check its new files."""

    def __init__(self, api: HfApi, repo_id: str, name: str, commit: str):
        self.api, self.repo_id = api, repo_id
        self.name, self.commit = name, commit
        self.label = f"{repo_id} (branch {name})"
        self.names = set(api.list_repo_files(repo_id, revision=commit))
        code = [path for path in self.names if path.endswith(".py") and "/" not in path]
        small = [path for path in ("config.json", _GENERATE) if path in self.names]
        self.old = {path: file.read_bytes() for path, file in self.fetch([*code, *small]).items()}
        self.config = self._parse_config()
        self.draft_class, self.layout = self._find_class_and_layout()
        self.code = travelling_code(self.draft_class)
        self._check_auto_map()
        self._check_not_newer()

    def fetch(self, paths: Iterable[str]) -> dict[str, Path]:
        """Download the files that are not in the cache; return where they are: path -> file."""

        def download(path: str) -> tuple[str, Path]:
            return path, Path(self.api.hf_hub_download(self.repo_id, path, revision=self.commit))

        with ThreadPoolExecutor(8) as pool:
            return dict(pool.map(download, sorted(paths)))

    # Recognising the draft -------------------------------------------------------------------------------------

    def _parse_config(self) -> dict[str, Any]:
        """Return the values of config.json."""
        try:
            config = json.loads(self.old.get("config.json", b"{}"))
        except ValueError as error:
            raise ValueError(f"config.json on {self.label} is malformed: {error}") from error
        return config if isinstance(config, dict) else {}

    def _find_class_and_layout(self) -> tuple[type[DFlashDraftModel], str]:
        """Return the draft's class and layout; raise ValueError unless dflash-hub pushed it."""
        auto_map = self.config.get("auto_map")
        signed = _VERSION_KEY in self.config or any(
            LICENCE_LINE.search(data) for data in self.old.values()
        )
        for kind in KINDS.values():
            for layout, own in _auto_maps(kind.model_class).items():
                if signed and isinstance(auto_map, dict) and own.items() <= auto_map.items():
                    return kind.model_class, layout
        raise ValueError(
            f"{self.label} holds no draft that dflash-hub pushed (auto_map in its config.json is {auto_map}), so "
            "its code is not changed. Download it and publish your own copy: dflash-hub push FOLDER me/my-draft."
        )

    def _check_auto_map(self) -> None:
        """Raise ValueError if auto_map names a file that this version does not ship."""
        for name, reference in self.config["auto_map"].items():
            if f"{str(reference).rpartition('.')[0]}.py" not in self.code:
                raise ValueError(
                    f"auto_map in config.json on {self.label} names {reference} for {name}, "
                    f"which dflash-hub {__version__} does not ship. Remove that entry and run the command again."
                )

    @cached_property
    def versions(self) -> list[str]:
        """The versions named in config.json and in the code; the engines layout has only the second."""
        in_code = CODE_VERSION.search(self.old.get("configuration_dflash.py", b""))
        found = [self.config.get(_VERSION_KEY), in_code and in_code[1].decode()]
        return [str(version) for version in found if version is not None]

    def _check_not_newer(self) -> None:
        """Raise ValueError if a newer dflash-hub wrote the branch."""
        for version in self.versions:
            try:
                newer = Version(version) > Version(__version__)
            except InvalidVersion as error:
                raise ValueError(
                    f"{self.label} says that dflash-hub {version!r} wrote it, which is no "
                    f"version. Correct {_VERSION_KEY} in its config.json."
                ) from error
            if newer:
                raise ValueError(
                    f"The code on {self.label} is of dflash-hub {version}, newer than the "
                    f"{__version__} installed here, so it is not changed. Upgrade: pip install --upgrade dflash-hub"
                )

    # Making the new files --------------------------------------------------------------------------------------

    @cached_property
    def wanted(self) -> dict[str, bytes]:
        """The files of the branch after the refresh, without weights and card: path -> content."""
        wanted = self.code | {"config.json": self._new_config()}
        return wanted if ".gitattributes" in self.names else wanted | hub_files()

    @cached_property
    def difference(self) -> BranchDifference:
        """The changes from the old files to the new ones."""
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
        """Return config.json with this version in it, and every other byte unchanged."""
        text = self.old["config.json"].decode()
        if _VERSION_KEY not in self.config:
            return self.old["config.json"]
        wanted = self.config | {_VERSION_KEY: __version__}
        for found in re.finditer(rf'"{_VERSION_KEY}"\s*:\s*("[^"]*"|[^\s,}}]+)', text):
            changed = text[: found.start(1)] + json.dumps(__version__) + text[found.end(1) :]
            if json.loads(changed) == wanted:
                return changed.encode()
        raise ValueError(
            f"{_VERSION_KEY} in config.json on {self.label} cannot be set. Correct it by hand."
        )

    def _stale(self) -> list[str]:
        """Return our files that the old code imports and this version does not have."""
        references = self.config["auto_map"].values()
        waiting = [f"{str(reference).rpartition('.')[0]}.py" for reference in references]
        seen: set[str] = set()
        while waiting:
            path = waiting.pop()
            if path not in seen and path in self.old:
                seen.add(path)
                waiting += [f"{(a or b).decode()}.py" for a, b in _IMPORT.findall(self.old[path])]
        return sorted(
            path for path in seen - set(self.wanted) if LICENCE_LINE.search(self.old[path])
        )

    # Checking the new files ------------------------------------------------------------------------------------

    def stage(self, folder: Path) -> list[Path]:
        """Write the new repository into `folder`, with this version's code only; return its weight files."""
        started = time.time()
        try:
            weights = self.fetch(self._weights())
            json_names = [name for name in self.names if name.endswith(".json") and "/" not in name]
            json_files = self.fetch(json_names)
            verify_downloads(
                self.repo_id, {"revision": self.commit, "token": self.api.token}, started
            )
        except _HUB_ERRORS as error:
            raise _read_error(self.repo_id, error) from error
        with staging(f"The new {self.label}"):
            for path, file in json_files.items():
                shutil.copyfile(file, folder / path)
            for path, file in weights.items():
                _link(file.resolve(), folder / path)
            for path, content in self.wanted.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(content)
        return [folder / path for path in weights]

    def _weights(self) -> list[str]:
        """Return the weight files that transformers reads: one file, or the shards that the index names."""
        index = "model.safetensors.index.json"
        if "model.safetensors" in self.names:
            return ["model.safetensors"]
        if index not in self.names:
            raise ValueError(
                f"{self.label} has no model.safetensors, so it is not a complete draft."
            )
        shards = set(json.loads(self.fetch([index])[index].read_bytes())["weight_map"].values())
        if missing := sorted(shards - self.names):
            raise ValueError(f"{self.label} lacks {missing[0]}, which its {index} names.")
        return sorted(shards)

    def check_config_values(self, loaded: dict[str, Any]) -> None:
        """Raise ValueError if the new code reads another value than config.json has."""
        if self.layout == "engines":  # has other keys, so compare the config as written in it
            config = self.draft_class.config_class.from_dict(loaded)
            loaded = json.loads(json.dumps(engines_layout(config)))
        stored = {key: value for key, value in self.config.items() if key not in _BOOKKEEPING}
        if differing := _differing(stored, loaded):
            key = next(iter(differing))
            here, there = differing[key]
            raise ValueError(
                f"{key} in config.json on {self.label} is {here}, but dflash-hub {__version__} reads it as {there}. "
                "Nothing was pushed."
            )


def _read(api: HfApi, repo_id: str) -> list[_Branch]:
    """Read the branches that exist, `main` first."""
    try:
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches}
        return [_Branch(api, repo_id, name, heads[name]) for name in _BRANCHES if name in heads]
    except _HUB_ERRORS as error:
        raise _read_error(repo_id, error) from error


def _commit(
    api: HfApi, repo_id: str, found: BranchDifference, message: str, done: dict[str, str]
) -> str:
    """Push the changes of a branch in one commit on top of the one that was read; return the new commit."""
    operations = [_operation(change) for change in found.changes]
    try:
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=found.branch,
            parent_commit=found.commit,
        )
    except _HUB_ERRORS as error:
        answered = isinstance(error, HfHubHTTPError)
        on_hub = _on_hub_now(done, found.branch, answered)
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 412:
            raise RuntimeError(
                f"{repo_id} (branch {found.branch}) moved after it was read: somebody else pushed to it, or "
                f"the answer to this push was lost. {on_hub} "
                "Run the same again; it reads the new state of the branch."
            ) from error
        raise RuntimeError(
            f"The new code could not be pushed to {repo_id} (branch {found.branch}): {reason(error)}\n{on_hub} Run the "
            "same again with a token that has write access (hf auth login, or HF_TOKEN); it completes what is missing."
        ) from error
    return info.oid


def _operation(change: FileChange) -> CommitOperationAdd | CommitOperationDelete:
    """Return the operation of a commit that makes this change."""
    if change.new is None:
        return CommitOperationDelete(change.path)
    return CommitOperationAdd(change.path, change.new)


def _on_hub_now(done: dict[str, str], failed: str, answered: bool) -> str:
    """Return a sentence that lists the branches with the new code, after a failure."""
    if not answered:
        known = ", ".join(
            f"{branch} is new (commit {commit[:8]})" for branch, commit in done.items()
        )
        return f"On the Hub now: {known or 'no other branch is new'}; {failed} is the old one or the new one, whole."
    if not done:
        return "Nothing was pushed: all is as it was."
    updated = "".join(f"{branch} is new (commit {commit[:8]}), " for branch, commit in done.items())
    return f"On the Hub now: {updated}{failed} is not."


def _read_error(repo_id: str, error: Exception) -> RuntimeError:
    """Return the error for a repository that cannot be read."""
    advice = (
        "Run the same again with a connection, the right name, and a token with read and write access (hf auth login, "
        "or HF_TOKEN)."
    )
    return RuntimeError(
        f"{repo_id} could not be read from the Hub: {reason(error)}\nNothing was pushed: all is as it was. "
        f"{advice_on(error, advice)}"
    )


def _auto_maps(draft_class: type[DFlashDraftModel]) -> dict[str, dict[str, str]]:
    """Return the auto_map of a pushed draft in each layout: layout -> auto_map."""
    config_class = draft_class.config_class

    def reference(cls: type) -> str:
        return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"

    return {
        "hub": {"AutoConfig": reference(config_class), "AutoModel": reference(draft_class)},
        "engines": {"AutoModel": f"{config_class.model_type}.{config_class.architecture}"},
    }


def _lines_of(data: bytes | None) -> list[str]:
    """Return the lines of a file, each with its end."""
    return list(io.StringIO((data or b"").decode("utf-8", "replace")))


def _ended(line: str) -> str:
    """Return a line of a diff with a newline, and the usual remark where the file has none."""
    return line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _differing(stored: dict[str, Any], loaded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ: dotted key -> stored and loaded value.

    Keys that only one of them has are ignored, because a newer layout may have more keys or fewer.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(stored.keys() & loaded.keys()):
        here, there = stored[key], loaded[key]
        if isinstance(here, dict) and isinstance(there, dict):
            inside = _differing(here, there)
            found |= {f"{key}.{inner}": values for inner, values in inside.items()}
        elif here != there:
            found[key] = (here, there)
    return found


def _digests_of_files(files: list[Path], dtype: str | None) -> dict[str, str]:
    """Return the digests of tensors read without a model, in the dtype of config.json if it has one."""
    target_dtype = getattr(torch, dtype.removeprefix("torch.")) if dtype else None
    found = {}
    for name, file in stored_tensors(files):
        tensor = file.get_tensor(name)
        found[name] = digest(tensor if target_dtype is None else tensor.to(target_dtype))
    return found


def _link(file: Path, destination: Path) -> None:
    """Link weights, which may be many GB; copy them where links are not allowed (some Windows users)."""
    try:
        destination.symlink_to(file)
    except OSError:
        shutil.copyfile(file, destination)
