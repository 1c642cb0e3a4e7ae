# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Publish a draft: stage both layouts, check them in a fresh process, push each as one commit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token

from ..findings_dflash import check_path
from ..modeling_dflash import DFlashDraftModel
from ..registry import load_draft
from ..repository_dflash import (
    LAYOUT_BRANCHES,
    PLACEHOLDER,
    card_on_hub,
    check_destination,
    check_repo_id,
    make_repo,
    staging,
    staging_folder,
    upload_all,
)
from .contents import SCORES, Contents, LeftOut, contents
from .probe import digests

ENGINES_BRANCH = LAYOUT_BRANCHES["engines"]


@dataclass
class PublishOptions:
    """Hold the options of a push.

    Args:
        private: create the repository as private.
        token: a token with write access. Default: the token of `hf auth login`.
        message: the commit message.
        card: metadata for the card, such as `{"base_model": "org/target", "license": "apache-2.0"}`.
    """

    private: bool | None = None
    token: str | None = None
    message: str = "Upload DFlash draft"
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Hold where a draft was published: its commits on `main` and on the branch `engines`."""

    repo_id: str
    commit: str
    engines_commit: str
    left_out: tuple[LeftOut, ...] = ()
    """Files of the folder that were not published, and why."""

    @property
    def snippet(self) -> str:
        """Code that loads exactly this commit."""
        return (
            "from transformers import AutoModel\n\n"
            f'draft = AutoModel.from_pretrained(\n    "{self.repo_id}",\n    revision="{self.commit}",\n'
            "    trust_remote_code=True,  # not needed where dflash_hub is imported\n)"
        )


@dataclass(frozen=True)
class Plan:
    """Hold what a push would write.

    Args:
        files: branch -> path -> size in bytes.
        left_out: files of the folder that are not published, and why.
        card: as it would stand on `main`.
        folders: branch -> the folder with its files; they exist until `publish` or `plan` returns.
        is_asked: whether the Hub was asked about the repository, and for its card; not without a token.
    """

    repo_id: str
    files: dict[str, dict[str, int]]
    left_out: tuple[LeftOut, ...]
    card: ModelCard = field(default_factory=lambda: ModelCard(""))
    folders: dict[str, Path] = field(default_factory=dict)
    is_asked: bool = True


def publish(
    directory: Any,
    repo_id: str,
    options: PublishOptions | None = None,
    report: Callable[[str], None] = lambda step: None,
    preview: Callable[[Plan], None] = lambda plan: None,
) -> Published:
    """Publish the draft in `directory`, of any layout: the hub layout to `main`, the engines layout to `engines`.

    The Hub is asked first whether this can be pushed there. Both layouts are staged, and loaded by a fresh process
    without this package. Nothing is pushed unless both are bit-equal to the draft.

    Args:
        report: called with the name of each step as it begins.
        preview: called with what will be pushed, before anything is; an error of it ends the push.

    Raises:
        ValueError: the draft, its card or the name is invalid; it cannot be written for engines; it loads with other
            weights after staging; or the repository is public, not private as asked for.
        RuntimeError: a push failed; the message says which commits are on the Hub now.
    """
    options = _options(options)
    api = HfApi(token=options.token)
    with _staged(api, directory, repo_id, options, report) as (draft, folders, found, repo_id):
        read = _write_cards(api, draft, folders, found, repo_id)
        preview(_plan(repo_id, folders, found))
        repo_id = make_repo(api, repo_id, options.private)
        report("Pushing the hub layout to main, the engines layout to engines")
        commits = upload_all(api, repo_id, folders, read, commit_message=options.message)
    main, engines = (commit.oid for commit in commits)
    return Published(repo_id, main, engines, found.left_out)


def plan(
    directory: Any,
    repo_id: str,
    options: PublishOptions | None = None,
    report: Callable[[str], None] = lambda step: None,
    preview: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Do everything that `publish` does before it writes to the Hub, and return what it would write.

    Without a token the Hub is not asked, and the plan says so. It raises what `publish` raises.
    """
    options = _options(options)
    has_token = bool(options.token or get_token())
    api = HfApi(token=options.token) if has_token else None
    with _staged(api, directory, repo_id, options, report) as (draft, folders, found, repo_id):
        _write_cards(api, draft, folders, found, repo_id)
        made = _plan(repo_id, folders, found, has_token)
        preview(made)
        return made


def _write_cards(
    api: HfApi | None,
    draft: DFlashDraftModel,
    folders: list[tuple[Path, str | None]],
    found: Contents,
    repo_id: str,
) -> str | None:
    """Write the card into each staged folder; return the commit on the Hub whose card was read.

    Args:
        api: None to ask the Hub for none.
    """
    card, read = _existing_card(found, api, repo_id)
    for path, _ in folders:
        (path / "README.md").unlink()
        draft.write_card(path, card, repo_id)
    return read


def _plan(
    repo_id: str,
    folders: list[tuple[Path, str | None]],
    found: Contents,
    is_asked: bool = True,
) -> Plan:
    """Return what the staged folders hold."""
    files = {}
    for path, branch in folders:
        sizes = {}
        for file in sorted(path.rglob("*")):
            if file.is_file():
                sizes[file.relative_to(path).as_posix()] = file.stat().st_size
        files[branch or "main"] = sizes
    card = ModelCard.load(folders[0][0] / "README.md")
    places = {branch or "main": path for path, branch in folders}
    return Plan(repo_id, files, found.left_out, card, places, is_asked)


def _options(options: PublishOptions | None) -> PublishOptions:
    """Return the options, or those that stand for None."""
    options = PublishOptions() if options is None else options
    if not isinstance(options, PublishOptions):
        raise ValueError(f"options is {options!r}; pass a PublishOptions.")
    return options


@contextmanager
def _staged(
    api: HfApi | None,
    directory: Any,
    repo_id: str,
    options: PublishOptions,
    report: Callable[[str], None],
) -> Iterator[tuple[DFlashDraftModel, list[tuple[Path, str | None]], Contents, str]]:
    """Ask about the destination, stage and check both layouts, and yield them with their branches while they exist.

    Args:
        api: None to ask the Hub nothing.
    """
    check_path("directory", directory)
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder; pass the folder that holds the draft's config.json."
        )
    if api is None:
        check_repo_id(repo_id)
    else:
        report("Asking the Hub about the destination")
        repo_id = check_destination(api, repo_id, options.private)
    found = contents(directory)
    report("Loading the draft")
    draft = load_draft(directory)
    with staging_folder() as folder:
        folders = []
        for layout, branch in LAYOUT_BRANCHES.items():
            path = folder / layout
            report(f"Staging and checking the {layout} layout")
            with staging(f"The {layout} layout"):
                stage(draft, path, layout, options.card)
                for picture in found.pictures:  # the card may show them
                    shutil.copyfile(picture, path / picture.name, follow_symlinks=False)
                for score in found.scores:
                    (path / SCORES).mkdir(exist_ok=True)
                    shutil.copyfile(score, path / SCORES / score.name, follow_symlinks=False)
            check_staged(draft, path)
            folders.append((path, branch))
        yield draft, folders, found, repo_id


def stage(draft: DFlashDraftModel, folder: Path, layout: str, card: dict[str, Any]) -> None:
    """Write all files of the repository into `folder`."""
    draft.card_metadata = draft.card_metadata | card
    draft.save_pretrained(folder, layout=layout)
    for path, content in hub_files().items():
        (folder / path).write_bytes(content)


def hub_files() -> dict[str, bytes]:
    """Return the files that the Hub itself needs: path -> content."""
    source = Path(__file__).parents[1] / "hub_repo" / ".gitattributes"
    return {".gitattributes": source.read_bytes()}


def check_staged(draft: DFlashDraftModel, folder: Path) -> None:
    """Load `folder` in a fresh process that cannot import this package, and compare every tensor bit by bit.

    Raises:
        ValueError: it does not load there, or loads with other tensors.
    """
    check_same_tensors(folder, load_apart(folder)["digests"], digests(draft))


def load_apart(folder: Path) -> dict[str, Any]:
    """Load `folder` in a fresh process that cannot import this package, offline.

    Returns:
        `class`: the module of its class; `digests`: tensor name -> digest; `config`: all values of the config.

    Raises:
        ValueError: it does not load there.
    """
    probe = Path(__file__).with_name("probe.py")
    with tempfile.TemporaryDirectory(dir=folder.parent) as modules:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        command = [sys.executable, "-I", str(probe), str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"The repository staged in {folder} does not load in a fresh process:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def check_same_tensors(folder: Path, loaded: dict[str, str], expected: dict[str, str]) -> None:
    """Raise ValueError unless the loaded tensors are the expected ones; both are tensor name -> digest."""
    names = {*loaded, *expected}
    differing = sorted(name for name in names if loaded.get(name) != expected.get(name))
    if differing:
        shown = ", ".join(differing[:3])
        raise ValueError(
            f"The repository staged in {folder} loads with other weights in a fresh process: {shown}."
        )


def _existing_card(
    found: Contents, api: HfApi | None, repo_id: str
) -> tuple[ModelCard | None, str | None]:
    """Return the card to complete, and the commit on the Hub whose card was read.

    It is the folder's card if a person wrote it, else the Hub's, else the folder's, else None.
    """
    if api is None or (found.card is not None and PLACEHOLDER not in found.card.text):
        return found.card, None
    card, commit = card_on_hub(api, repo_id)
    return card or found.card, commit
