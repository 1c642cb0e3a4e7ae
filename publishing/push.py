# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Publishing a draft: stage both layouts, check them in a fresh process, push each as one commit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from ..modeling_dflash import DFlashDraftModel
from ..registry import load_draft
from ..repository_dflash import PLACEHOLDER, card_on_hub, make_repo, upload
from .probe import digests

ENGINES_BRANCH = "engines"
_LAYOUTS = ("hub", "engines")


@dataclass
class PublishOptions:
    """What a push may be told.

    Args:
        private: make a new repository private.
        token: a token that may write; the one that was logged in with by default.
        message: of the commits.
        card: metadata for the card, such as `{"base_model": "org/target", "license": "apache-2.0"}`.
    """

    private: bool | None = None
    token: str | None = None
    message: str = "Upload DFlash draft"
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Where a draft lies now: the commit on `main`, and the one on the branch `engines`."""

    repo_id: str
    commit: str
    engines_commit: str

    @property
    def snippet(self) -> str:
        """Code that loads this very commit."""
        return (
            "from transformers import AutoModel\n\n"
            f'draft = AutoModel.from_pretrained(\n    "{self.repo_id}",\n    revision="{self.commit}",\n'
            "    trust_remote_code=True,  # not needed where dflash_hub is imported\n)"
        )


def publish(
    directory: Any,
    repo_id: str,
    options: PublishOptions | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> Published:
    """Publish the draft in `directory`, whatever layout it is in: the hub layout to `main`, the engines' to `engines`.

    Nothing is pushed before both were staged and, loaded by a fresh process without this package, proved bit-equal.

    Args:
        report: called with the name of each step as it begins.

    Raises:
        ValueError: the draft is not sound, cannot be written for engines, or what was staged loads otherwise.
        RuntimeError: the Hub did not take a commit; the message says what is there now.
    """
    options = options or PublishOptions()
    report("Loading the draft")
    draft = load_draft(directory)
    with tempfile.TemporaryDirectory() as folder:
        staged = {layout: Path(folder) / layout for layout in _LAYOUTS}
        for layout, path in staged.items():
            report(f"Staging and checking the {layout} layout")
            stage(draft, path, layout, options.card)
            for picture in Path(directory).glob("*.png"):  # which the card may show
                shutil.copyfile(picture, path / picture.name)
            check_staged(draft, path)
        api = HfApi(token=options.token)
        repo_id = make_repo(api, repo_id, options.private)
        card = _card_to_keep(directory, repo_id, options.token)
        commits = []
        for layout, revision in (("hub", None), ("engines", ENGINES_BRANCH)):
            report(f"Pushing the {layout} layout to {revision or 'main'}")
            (staged[layout] / "README.md").unlink()
            draft.write_card(staged[layout], card, repo_id)
            commits.append(
                upload(api, staged[layout], repo_id, revision, commit_message=options.message).oid
            )
    return Published(repo_id, *commits)


def stage(draft: DFlashDraftModel, folder: Path, layout: str, card: dict[str, Any]) -> None:
    """Write a whole repository into `folder`."""
    draft.card_metadata = draft.card_metadata | card
    draft.save_pretrained(folder, layout=layout)
    for path, content in hub_files().items():
        (folder / path).write_bytes(content)


def hub_files() -> dict[str, bytes]:
    """What a repository holds for the Hub's own sake: path -> content."""
    return {
        ".gitattributes": (Path(__file__).parents[1] / "hub_repo" / ".gitattributes").read_bytes()
    }


def check_staged(draft: DFlashDraftModel, folder: Path) -> None:
    """Load `folder` in a fresh process that cannot import this package, and compare every tensor bit by bit.

    Raises:
        ValueError: it does not load there, or loads otherwise.
    """
    refuse_differing(folder, load_apart(folder)["digests"], digests(draft))


def load_apart(folder: Path) -> dict[str, Any]:
    """Load `folder` in a fresh process that cannot import this package, offline.

    Returns:
        `class`: the module its class came from; `digests`: tensor name -> digest; `config`: every value of the config.

    Raises:
        ValueError: it does not load there.
    """
    probe = Path(__file__).with_name("probe.py")
    with tempfile.TemporaryDirectory() as modules:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        command = [sys.executable, "-I", str(probe), str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"What was staged in {folder} does not load in a fresh process:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def refuse_differing(folder: Path, seen: dict[str, str], expected: dict[str, str]) -> None:
    """Refuse `folder` unless the tensors that were `seen` are those `expected`: tensor name -> digest, for both."""
    differing = sorted(name for name in {*seen, *expected} if seen.get(name) != expected.get(name))
    if differing:
        raise ValueError(
            f"What was staged in {folder} loads otherwise in a fresh process: {', '.join(differing[:3])}."
        )


def _card_to_keep(directory: Any, repo_id: str, token: str | None) -> ModelCard | None:
    """The folder's own card if somebody wrote it; else the one on the Hub, if any; else the folder's, if any."""
    path = Path(directory) / "README.md"
    local = ModelCard(path.read_text(encoding="utf-8")) if path.exists() else None
    if local is not None and PLACEHOLDER not in local.text:
        return local
    return card_on_hub(repo_id, token) or local
