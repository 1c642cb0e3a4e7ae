# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a draft and refuse checkpoints that do not fit; save and push complete repositories.

This file travels with every pushed draft, so that a draft loaded by remote code can be pushed again completely. A
repository holds config.json, safetensors, the travelling files and a model card.
"""

import functools
import inspect
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from .compat_dflash import copy_loading_options, find_file, pinned
from .configuration_dflash import EXTENSIONS, LAYOUTS, check_layout
from .custom_generate_dflash import generate as custom_generate
from .findings_dflash import LOADING, PUSHING, SAVING, check_path, explained_for, reason
from .layouts_dflash import engines_layout, engines_remarks
from .weights_dflash import (
    RENAMED,
    check_no_mask_embedding,
    check_quantization,
    check_stored,
    check_tensors,
    check_values,
    verify_downloads,
)

TRAVELS_TOO = """
import .dflash
"""
"""A file that travels although no other imports it. transformers looks for such lines in the text of a file, see its
`get_relative_imports`. An import would close a circle: `dflash.py` imports the draft, which imports this file."""

logger = logging.get_logger(__name__)

PLACEHOLDER = "your-name/your-draft"
LIBRARY = "dflash-hub"
"""A draft's library on the Hub, which has no code to show for it."""
_SHOWS_CODE = {"library_name": "transformers", "pipeline_tag": "text-generation"}
"""Metadata for which the Hub shows code that loads or serves a draft as a model of its own, which fails."""
_PLAIN_CARD = f"---\nlibrary_name: {LIBRARY}\n---\n# {PLACEHOLDER}\n\nA DFlash draft model.\n"
LAYOUT_BRANCHES: dict[str, str | None] = {"hub": None, "engines": "engines"}
"""The branch to which each layout is pushed; None is main."""
_STAGED, _LOCK = "dflash-hub-push-", "lock"
"""How the names of temporary folders for a push begin, and the file in them that a running push locks."""
_LOG_IN = "Log in with a token that may write there: hf auth login, or HF_TOKEN."
# A failed request: the HTTP client's own errors, and an answer that is cut short, which is no JSON.
_HUB_ERRORS = (OSError, RuntimeError, ValueError, HTTPError)
# Files to delete at a push: transformers prefers one file over shards, so stale weights would load.
STALE = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*"]


class RepositoryMixin:
    """Give a draft `from_pretrained`, `save_pretrained` and `push_to_hub`; comes before `PreTrainedModel`."""

    # The files that the engines layout needs besides those of the draft; the last is the one that `auto_map` names.
    engines_files: tuple[str, ...] = ("dflash.py",)
    # Metadata for the model card: base_model, license, datasets, language ... It replaces that of an existing card.
    card_metadata: dict[str, Any] = {}
    # Metadata from the registry, which fills gaps of an existing card.
    card_known: dict[str, Any] = {}
    # The name or folder that the draft was loaded from, and the keywords that choose its files.
    card_source: tuple[Any, dict[str, Any]] | None = None

    @classmethod
    @explained_for("pretrained_model_name_or_path", "loaded", LOADING)
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ):
        """Load as transformers does, from every layout that `DFlashConfig` reads; only safetensors are read.

        Raises:
            ValueError: the checkpoint lacks tensors, or has unknown ones, or ones of other shapes or values than a
                draft's. Such a draft would load, and draft nonsense.
            OSError: there is no such draft, no access or no connection; or a download is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        name = pretrained_model_name_or_path
        if config is not None and not isinstance(config, PretrainedConfig):
            check_path("config", config)
        # transformers before 5.16 names the commit of the config that an Auto class has read
        asked = _where(kwargs) | {"revision": kwargs.get("_commit_hash") or kwargs.get("revision")}
        started = time.time()
        local = {"local_files_only": kwargs.get("local_files_only", False)}
        where = pinned(name, asked, **local)
        kwargs["revision"] = where["revision"]
        check_no_mask_embedding(name, where | local)
        try:
            try:
                config = _own_config(cls.config_class, config, name, kwargs)  # type: ignore[attr-defined]
                config = check_stored(cls, config, name, where | local)
                if kwargs.get("quantization_config") is None:
                    config = check_quantization(config, name)
                defaults = {"use_safetensors": True, "key_mapping": RENAMED}
                defaults |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
                model, info = super().from_pretrained(  # type: ignore[misc]
                    name, *model_args, config=config, **(defaults | kwargs)
                )
            finally:  # a checksum error explains more than the loader's, so it is raised instead
                verify_downloads(name, where, started)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {name} are damaged ({error}); copy or download them again "
                "(from_pretrained(..., force_download=True))."
            ) from error
        check_tensors(info, name)
        check_values(model, name)
        model.card_source = (name, where)
        return (model, info) if wants_info else model

    @explained_for("save_directory", "written", SAVING)
    def save_pretrained(
        self, save_directory: Any, layout: str = "hub", push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write a complete repository: config, weights, travelling files and model card. An existing card stays.

        Args:
            layout: "hub", which transformers loads; or "engines", which vLLM, SGLang and others load. With dflash_hub
                imported, also "speculators" and "muse", which hold config and weights alone. A UserWarning names what
                one of the readers does not read.
            push_to_hub: push the draft too, to `repo_id` or the folder's name.
        """
        hub_keys = ("repo_id", "commit_message", "private", "create_pr", "revision", "token")
        hub_kwargs = {key: kwargs.pop(key) for key in hub_keys if key in kwargs}
        check_layout(layout, (*LAYOUTS, *EXTENSIONS.other_layouts))
        if layout in EXTENSIONS.other_layouts:
            self._save_elsewhere(save_directory, layout, push_to_hub, **kwargs)
            return
        # `save_original_format` would undo the renaming of `RENAMED`
        save = functools.partial(super().save_pretrained, save_original_format=False, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            save(save_directory)
            return
        existing = Path(save_directory) / "README.md"
        card = read_card(existing, str(existing)) if existing.exists() else None
        is_shared = kwargs.get("distributed_checkpoint")  # every process writes files of its own
        with (
            nullcontext(Path(save_directory))
            if is_shared
            else written_whole(save_directory) as folder
        ):
            save(folder)
            self._write_code(folder, layout)
            self.write_card(folder, card)
        if layout == "engines":
            for remark in engines_remarks(self.config):  # type: ignore[attr-defined]
                warnings.warn(remark, UserWarning, stacklevel=2)
        if push_to_hub:
            repo_id = hub_kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, layout=layout, **hub_kwargs)

    def _save_elsewhere(
        self, save_directory: Any, layout: str, push_to_hub: bool, **kwargs: Any
    ) -> None:
        """Write config and weights in the layout of another project."""
        if push_to_hub:
            raise ValueError(
                f"A draft is not pushed in the {layout} layout by save_pretrained; save it, and upload the folder: "
                "hf upload."
            )
        write: Any = EXTENSIONS.write_layout
        with written_whole(save_directory) as folder:
            remarks = write(self, folder, layout, **kwargs)
        for remark in remarks:
            warnings.warn(remark, UserWarning, stacklevel=3)

    def _write_code(self, folder: Path, layout: str) -> None:
        """Write the travelling files that transformers does not, and the config of the engines layout."""
        if layout == "engines":
            self.config.save_pretrained(folder, layout=layout)  # type: ignore[attr-defined]
            for name in self.engines_files:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
        decoding = folder / "custom_generate" / "generate.py"
        decoding.parent.mkdir(exist_ok=True)
        shutil.copyfile(inspect.getfile(custom_generate), decoding)

    @explained_for("repo_id", "pushed", PUSHING, check=None)
    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload DFlash draft",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        layouts: Iterable[str] | None = None,
        layout: str | None = None,
    ) -> Any:
        """Push a complete repository: the hub layout to main, and the engines layout to the branch `engines`.

        The card on the Hub stays; missing metadata is added. Each layout is one commit. The arguments are those of
        `PreTrainedModel.push_to_hub`, and these. Set `draft.card_metadata = {"base_model": ..., "license": ...}` before
        the first push.

        Args:
            layouts: of "hub" and "engines", those to push; by default both. With `revision` or `create_pr`, which name
                one branch, only the hub layout.
            layout: the older keyword for one layout, pushed to main or to `revision`.

        Returns:
            The Hub's `CommitInfo` of the first layout; its `oid` is the commit to pin with `revision=`.

        Raises:
            ValueError: the name, a layout, or `private=True` for a repository that is public.
            RuntimeError: the Hub refused; the message says which branch is new.
        """
        branches = choose_branches(layouts, layout, revision, create_pr)
        if "engines" in branches:
            check_for_engines(self.config)  # type: ignore[attr-defined]  # before a repository is created
        api = HfApi(token=token)
        repo_id = check_destination(api, repo_id, private)
        card, read = card_on_hub(api, repo_id)
        repo_id = make_repo(api, repo_id, private)
        with staging_folder() as folder:
            folders = []
            for name, branch in branches.items():
                path = folder / name
                with staging(f"The {name} layout"):
                    self.save_pretrained(path, layout=name, max_shard_size=max_shard_size)
                    (path / "README.md").unlink()
                    self.write_card(path, card, repo_id, tags=tags)
                folders.append((path, branch))
            details = {"commit_message": commit_message, "commit_description": commit_description}
            return upload_all(api, repo_id, folders, read, create_pr=create_pr, **details)[0]

    def write_card(
        self,
        folder: Any,
        existing: ModelCard | None,
        repo_id: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        """Write README.md into `folder`: the `existing` card with missing metadata added, or a new one.

        A copy of this code in a repository uses the card that the draft was loaded with.
        """
        if EXTENSIONS.write_card is not None:
            EXTENSIONS.write_card(self, folder, existing, repo_id, tags)
            return
        card = existing or self.source_card(online=repo_id is not None) or ModelCard(_PLAIN_CARD)
        if existing is None and repo_id is not None:
            old_name = self.card_source[0] if self.card_source else PLACEHOLDER
            card.text = card.text.replace(str(old_name), repo_id).replace(PLACEHOLDER, repo_id)
        correct_metadata(card, self.card_metadata)
        for key, value in self.card_metadata.items():
            card.data[key] = value
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(tags or ())]))
        card.save(Path(folder) / "README.md")

    def source_card(self, online: bool) -> ModelCard | None:
        """Return the card beside the loaded weights; None without one, or if it cannot be read."""
        if self.card_source is None:
            return None
        name, where = self.card_source
        try:
            if Path(name).exists():
                own = Path(name) / "README.md"
                found = own if is_own_file(own, Path(name)) else None
            else:
                found = find_file(name, "README.md", local_files_only=not online, **where)
            return None if found is None else read_card(found, str(found))
        except (OSError, ValueError):
            return None


def correct_metadata(card: ModelCard, chosen: dict[str, Any]) -> None:
    """Replace metadata of a card for which the Hub shows code that fails for a draft.

    Args:
        chosen: metadata of the owner's choice, whose names stay.
    """
    replaced = []
    for name, value in _SHOWS_CODE.items():
        if card.data.get(name) == value and name not in chosen:
            card.data[name] = LIBRARY if name == "library_name" else None
            replaced.append(f"{name}: {value}")
    tags = card.data.get("tags")
    if isinstance(tags, list) and "tags" not in chosen:
        shows = [tag for tag in tags if tag in _SHOWS_CODE.values()]
        card.data["tags"] = [tag for tag in tags if tag not in shows]
        replaced += [f"the tag {tag}" for tag in shows]
    if replaced:
        logger.warning(
            f"The card had {', '.join(replaced)}. The Hub would show code that loads a draft as a model of its own, "
            f"which fails. It has library_name: {LIBRARY} instead; set card_metadata to choose."
        )


@contextmanager
def staging(what: str) -> Iterator[None]:
    """Write what is pushed in this context, into a temporary folder.

    Raises:
        OSError: it could not be written; says what, and where such folders are made.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{what} could not be staged: {error}\nNothing was pushed. Staging needs room for two copies of the draft "
            f"in {tempfile.gettempdir()}; TMPDIR chooses another folder."
        ) from error


@contextmanager
def staging_folder() -> Iterator[Path]:
    """Make a temporary folder for a push; remove it at the end, and those of pushes that were killed.

    A push locks a file in its folder while it runs. Without such locks (Windows), nothing of others is removed.
    """
    if fcntl is None:
        with tempfile.TemporaryDirectory(prefix=_STAGED) as folder:
            yield Path(folder)
        return
    for left in Path(tempfile.gettempdir()).glob(f"{_STAGED}*"):
        with suppress(OSError):  # another push is removing it
            _remove_if_left(left)
    with (
        tempfile.TemporaryDirectory(prefix=_STAGED) as folder,
        (Path(folder) / _LOCK).open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a push of this user's that has ended, as its lock shows; not one just made."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    if time.time() - found.st_mtime < 60:  # it may not be locked yet
        return
    with (folder / _LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


@contextmanager
def written_whole(directory: Any) -> Iterator[Path]:
    """Yield a folder to write a draft into; its files replace those of `directory` once all of them are written.

    Raises:
        OSError: they could not be written; `directory` holds what it held.
    """
    partial = Path(directory) / "_partial"  # Trainer pushes no name with _
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{directory} could not be written: {error}\nWhat it held is as it was. Make room, or pass a folder "
                "that can be written."
            ) from error
        _move(partial, Path(directory))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(source: Path, folder: Path) -> None:
    """Move the files of a draft into `folder`, in place of an older draft.

    The older config goes first and the new one comes last: without one, nothing loads. So a process that is killed here
    leaves no draft of two halves.
    """
    new = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    names = {path.name for path in new}
    series = {_series(name) for name in names if ".safetensors" in name}
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.glob("*.safetensors*"):
        if _series(path.name) in series and path.name not in names:
            path.unlink()
    for path in sorted(new, key=lambda path: path.name == "config.json"):
        (folder / path).parent.mkdir(exist_ok=True)
        os.replace(source / path, folder / path)


def _series(name: str) -> str:
    """Return the name that a file of weights would have if it were the only one."""
    return re.sub(r"-\d{5}-of-\d{5}|\.index\.json$", "", name)


def is_own_file(path: Path, folder: Path) -> bool:
    """Tell whether a file is part of `folder`. In a folder of the Hub's cache, links into its own blobs are."""
    if not path.is_symlink():
        return path.is_file()
    snapshots = folder.resolve().parent
    blobs = snapshots.parent / "blobs"
    return path.is_file() and snapshots.name == "snapshots" and path.resolve().parent == blobs


def choose_branches(
    layouts: Iterable[str] | None, layout: str | None, revision: str | None, create_pr: bool
) -> dict[str, str | None]:
    """Return the branch to which each layout is pushed; None is main.

    Raises:
        ValueError: an unknown layout, or several for one branch.
    """
    one_branch = layout is not None or revision is not None or create_pr
    names = (layout,) if layout is not None else layouts
    names = tuple(names or (("hub",) if one_branch else LAYOUT_BRANCHES))
    for name in names:
        check_layout(name, LAYOUTS)
    if not one_branch:
        return {name: LAYOUT_BRANCHES[name] for name in names}
    if len(names) > 1:
        raise ValueError(
            f"layouts is {names}, but revision and create_pr name one branch: pass one layout with them, such as "
            'layouts=("hub",).'
        )
    return {names[0]: revision}


def check_for_engines(config: Any) -> None:
    """Refuse a config that the engines layout cannot express.

    Raises:
        ValueError: saying what is missing, and how to push without that layout.
    """
    try:
        engines_layout(config)
    except ValueError as error:
        raise ValueError(f'{error} Or push for transformers only: layouts=("hub",).') from error


def check_destination(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Ask the Hub about a repository before anything is written, and return its full name.

    Raises:
        ValueError: no repository can have this name, it was renamed, or it exists and is public although `private` is
            asked for.
        RuntimeError: the Hub cannot be reached, knows no such token, or lets it write nowhere or not there.
    """
    check_repo_id(repo_id)
    try:
        who = api.whoami()
        owner = repo_id.split("/")[0] if "/" in repo_id else who["name"]
        full_name = f"{owner}/{repo_id.split('/')[-1]}"
        found = api.model_info(full_name) if api.repo_exists(full_name) else None
    except _HUB_ERRORS as error:
        raise RuntimeError(
            f"The Hub was asked about {repo_id} and refused: {reason(error)}\nNothing was pushed. Run the same "
            f"again. {_LOG_IN}"
        ) from error
    owners = [who["name"], *(one["name"] for one in who.get("orgs") or ())]
    if owner not in owners:
        raise RuntimeError(
            f"The token is of {who['name']}, who cannot write to {full_name}: {owner} is none of {', '.join(owners)}. "
            "Push to one of those, or log in as another user: hf auth login, or HF_TOKEN."
        )
    if found is not None and found.id != full_name:
        raise ValueError(f"{full_name} was renamed to {found.id}; push to that name.")
    if private and found is not None and not found.private:
        raise ValueError(
            f"{full_name} exists and is public, so its files would be public although private was asked for. Make the "
            "repository private first (Settings on its page, or `hf repos settings NAME --private`), or push to "
            "another name, or push without private."
        )
    return full_name


def check_repo_id(repo_id: Any) -> None:
    """Refuse what cannot be the name of a repository, by the Hub's own rules.

    Raises:
        ValueError: with the rule.
    """
    if not isinstance(repo_id, str):
        raise ValueError(
            f"A repository cannot be named {repo_id!r}: a name is text, such as me/draft."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"A repository cannot be named {repo_id!r}: {error}") from error


def make_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create the repository if it does not exist; return its full id.

    Raises:
        RuntimeError: the Hub refused, most often because no token with write access is set.
    """
    try:
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except _HUB_ERRORS as error:
        raise RuntimeError(
            f"The Hub did not allow {repo_id} to be created or written: {reason(error)}\nNothing was pushed. Run "
            f"the same again. {_LOG_IN}"
        ) from error


def upload_all(
    api: HfApi,
    repo_id: str,
    folders: list[tuple[Path, str | None]],
    read: str | None = None,
    **commit: Any,
) -> list[Any]:
    """Upload each folder to its branch, in one commit each, and return the commits.

    Args:
        read: the commit of `main` whose card the new one was made from; None if it was made from none.

    Raises:
        RuntimeError: the Hub did not take one; the message says which branches are new, and which are not.
    """
    done: list[Any] = []
    for folder, branch in folders:
        try:
            card_of = read if (branch or "main") == "main" else None
            done.append(upload(api, folder, repo_id, branch, read=card_of, **commit))
        except RuntimeError as error:
            if not done:
                raise
            names = [name or "main" for _, name in folders]
            new = ", ".join(
                f"{name} (commit {one.oid})" for name, one in zip(names, done, strict=False)
            )
            raise RuntimeError(f"{error}\nAlready new on the Hub: {new}.") from error
    return done


def upload(
    api: HfApi,
    folder: Any,
    repo_id: str,
    revision: str | None = None,
    *,
    read: str | None = None,
    **commit: Any,
) -> Any:
    """Upload `folder` in one commit, to a branch that is created if missing; older weights there are deleted.

    Args:
        read: the commit on which the branch must still be; None for the one on which it is.

    Raises:
        RuntimeError: the Hub did not take it, or somebody else pushed meanwhile; the message says what the branch is.
    """
    branch = revision or "main"
    start, is_new = None, False
    try:
        if not commit.get("create_pr") and not branch.startswith("refs/"):
            heads = _heads(api, repo_id)
            start, is_new = read or heads.get(branch, heads.get("main")), branch not in heads
        if is_new:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=start or revision)
        return api.create_commit(
            repo_id,
            _operations(Path(folder), there),
            revision=revision,
            parent_commit=start,
            **commit,
        )
    except _HUB_ERRORS as error:
        state = _branch_after_failure(api, repo_id, branch, start, is_new)
        raise RuntimeError(
            f"The Hub did not take the upload to {repo_id}: {reason(error)}\n{state} Run the same again, with a "
            "token that may write there (hf auth login, or HF_TOKEN); files that arrived are not sent twice."
        ) from error


def _operations(folder: Path, there: list[str]) -> list[Any]:
    """Return what one commit does: it adds the files of `folder`, and deletes stale ones among those that are `there`.

    `HfApi.upload_folder` may make several commits of it, between which the branch would be neither old nor new.
    """
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    added = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    gone = [name for name in there if name not in files and _is_stale(name)]
    return [*added, *map(CommitOperationDelete, gone)]


def _is_stale(name: str) -> bool:
    """Return whether a file of this name would be loaded in place of the weights that are pushed."""
    return any(fnmatch(name, pattern) for pattern in STALE)


def _heads(api: HfApi, repo_id: str) -> dict[str, str]:
    """Return the newest commit of each branch."""
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches}


def _branch_after_failure(
    api: HfApi, repo_id: str, branch: str, start: str | None, is_new: bool
) -> str:
    """Say what a branch is after a failed upload; a branch without a commit of its own is removed again."""
    try:
        head = _heads(api, repo_id).get(branch)
        if start is not None and head not in (None, start):
            return (
                f"The branch {branch} moved meanwhile and is at commit {head}. Somebody else pushed to it or edited "
                "its card, or the answer to this push was lost."
            )
        if is_new and head is not None:
            api.delete_branch(repo_id, branch=branch)
    except _HUB_ERRORS as error:
        return (
            f"The branch {branch} could not be asked about ({reason(error)}). It is the old one or the new one, for a "
            "commit is whole or absent."
        )
    return f"The branch {branch} is as it was: a commit is whole or absent."


def card_on_hub(api: HfApi, repo_id: str) -> tuple[ModelCard | None, str | None]:
    """Return the current card of `repo_id`, None without one, and its commit, None without a repository.

    Raises:
        ValueError: it cannot be read.
        RuntimeError: the Hub did not send it.
    """
    commit = None
    try:
        # of this commit, since for a branch an older copy in the cache would stand in
        commit = api.model_info(repo_id).sha
        path = api.hf_hub_download(repo_id, "README.md", revision=commit)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return None, commit
    except _HUB_ERRORS as error:
        raise RuntimeError(
            f"The card of {repo_id} could not be read from the Hub: {reason(error)}\nNothing was pushed, so that it is "
            "not replaced. Run the same again."
        ) from error
    name = f"https://huggingface.co/{repo_id}/blob/main/README.md"
    return read_card(Path(path), name), commit


def read_card(path: Path, name: str) -> ModelCard:
    """Read a model card, which messages call `name`.

    Raises:
        ValueError: it is not UTF-8, or its metadata is no YAML that the Hub takes.
    """
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not written in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8, or move it away "
            "to get a new card; nothing was changed."
        ) from error
    except Exception as error:  # a YAML reader and the Hub's client raise many kinds
        first = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of {name}, between its first two lines of ---, cannot be read: {first}. Correct it, or "
            "move the file away to get a new card; nothing was changed."
        ) from error


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that choose the files of a repository."""
    names = ("cache_dir", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def own_config(config_class: Any, config: Any) -> Any:
    """Return the config of a draft that a model is built with: `config`, or what a Qwen3 config describes.

    Raises:
        ValueError: the config is of another model than a draft, or lacks a field. Or it is a Qwen3 config, and this is
            a copy of the code in a repository.
    """
    is_own = isinstance(config, config_class) or (
        getattr(config, "model_type", None) == config_class.model_type
    )
    if is_own or not isinstance(config, PretrainedConfig):
        return config
    read: Any = EXTENSIONS.read_qwen3
    if read is None:
        raise ValueError(
            f"config is a {type(config).__name__}; pass a {config_class.__name__}. The package translates configs of "
            "Qwen3: install it, and import it, pip install dflash-hub."
        )
    own = read(config_class, config)
    copy_loading_options(own, config)
    return own


def _own_config(config_class: Any, config: Any, name: Any, kwargs: dict[str, Any]) -> Any:
    """Return the config of the draft `name`, with the fields among `kwargs`, which are removed from there.

    Where an Auto class read the engines layout as a Qwen3 config, Qwen3's defaults fill the fields that it lacks. So
    the file is read again. Keywords that the Auto class consumed are values that differ from the file's, or from the
    default where the file has none.
    """
    own_type = config_class.model_type
    if isinstance(config, PretrainedConfig) and config.model_type == own_type:
        return config
    fields = [*config_class.own_fields(), "rope_theta"]
    options = _where(kwargs) | {"local_files_only": kwargs.get("local_files_only", False)}
    given = {field: kwargs.pop(field) for field in fields if field in kwargs}
    if not isinstance(config, PretrainedConfig):
        return config_class.from_pretrained(name if config is None else config, **options, **given)
    raw, _ = config_class.get_config_dict(name, **options)
    overrides = {}
    for field in set(fields) - {"layer_types", "rope_parameters"}:
        value = getattr(config, field, None)
        if value is not None and value != raw.get(field, getattr(type(config), field, None)):
            overrides[field] = value
    own = config_class.from_dict(raw, **(overrides | given))
    copy_loading_options(own, config)
    return own
