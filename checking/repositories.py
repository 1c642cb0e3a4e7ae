# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check what lies around a draft's config and weights: pickles, code, the card, and who may read the repository.

Code is only read as text.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import ModelCard

from ..configuration_dflash import __version__
from ..kinds import KINDS, kind_of
from ..publishing.refresh import CODE_VERSION, LICENCE_LINE, travelling_code
from ..repository_dflash import read_card
from .remarks import Remark, Section, listed
from .sources import DraftFiles

_SECTION = Section("repository")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
MASK_EMBEDDING = "mask_embedding.pt"
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt")
"""Pickles that `Trainer` writes beside weights; nothing that loads a draft reads them."""
_CONVERT = "Make a copy in safetensors: dflash-hub convert {name} NEW_FOLDER --layout hub"


def repository_remarks(files: DraftFiles, config: Any) -> Iterator[Remark]:
    """Yield what is wrong around the config and the weights of a draft.

    Args:
        config: as it is read from config.json; None if it cannot be read.
    """
    yield from _pickle_remarks(files)
    yield from _auto_map_remarks(files)
    yield from _code_remarks(files, config)
    yield from _card_remarks(files)
    yield from _access_remarks(files)
    if "engines" in files.branches and files.config.get("model_type") in KINDS:
        what = "This branch is for transformers; serving engines read the branch engines"
        advice = "Check that one too: --revision engines"
        yield _SECTION.note("branch-engines", what, list(files.branches), "engines", advice)


# Files ---------------------------------------------------------------------------------------------------------------


def _pickle_remarks(files: DraftFiles) -> Iterator[Remark]:
    """Yield files that run code of their own when they are read, each with the command that converts it."""
    has_safetensors = any(name.endswith(".safetensors") for name in files.names)
    for name in filter(_is_pickle, files.names):
        base = name.rpartition("/")[2]
        if any(fnmatch(base, one) for one in _OF_TRAINING):
            what = f"{name} is a pickle of the training run, which no reader of drafts needs"
            yield _SECTION.warning("pickle-of-training", what, name, "no pickle", "Remove it")
        elif base == MASK_EMBEDDING:
            what = f"{name} is a pickle with a trained embedding of the mask token, which can run code when it is read"
            advice = _CONVERT.format(name=files.name)
            yield _SECTION.error("mask-embedding", what, name, "a tensor mask_embedding", advice)
        else:
            what = f"{name} is a pickle, which can run code when it is read; dflash-hub reads safetensors alone"
            advice = "Remove it: there are safetensors beside it"
            if not has_safetensors:
                advice = _CONVERT.format(name=files.name)
            make = _SECTION.warning if has_safetensors else _SECTION.error
            yield make("pickle", what, name, "model.safetensors", advice)


def _is_pickle(name: str) -> bool:
    return any(fnmatch(name, ending) for ending in _PICKLES)


def auto_map_files(config: dict[str, Any]) -> dict[str, str]:
    """Return the files that `auto_map` names: Auto class -> file, "repository--" before it for another one's."""
    auto_map = config.get("auto_map")
    found = {}
    for name, references in (auto_map if isinstance(auto_map, dict) else {}).items():
        if isinstance(references, str) and "." in references:
            found[name] = f"{references.rpartition('.')[0]}.py"
    return found


def _auto_map_remarks(files: DraftFiles) -> Iterator[Remark]:
    """Yield entries of `auto_map` whose file is missing, or lies in another repository."""
    for auto_class, name in auto_map_files(files.config).items():
        if not auto_class:  # speculators writes its own class under ""
            continue
        if "--" in name:
            what = (
                f"auto_map takes {auto_class} from another repository, {name}, at its newest commit"
            )
            advice = "Copy the file here, and name it without the repository"
            yield _SECTION.warning("auto-map-elsewhere", what, name, "a file beside it", advice)
        elif name not in files.names:
            what = f"auto_map names {name} for {auto_class}, and there is no such file"
            advice = (
                "Load the draft with load_draft and save it, which writes the code too; or remove the entry. "
                "AutoModel with trust_remote_code fails as it is"
            )
            yield _SECTION.warning("auto-map-dangling", what, name, list(files.names), advice)


# Code ----------------------------------------------------------------------------------------------------------------


def own_code(files: DraftFiles) -> dict[str, bytes]:
    """Return the files at the top that bear dflash-hub's copyright line: name -> content."""
    found = {}
    for name in files.names:
        if not name.endswith(".py") or "/" in name:
            continue
        path = files.path(name)
        content = b"" if path is None else path.read_bytes()
        if LICENCE_LINE.search(content):
            found[name] = content
    return found


def _code_remarks(files: DraftFiles, config: Any) -> Iterator[Remark]:
    """Yield code of other authors, of other versions of dflash-hub, and code of ours that was edited."""
    ours = own_code(files)
    top = {name for name in files.names if name.endswith(".py") and "/" not in name}
    others = sorted(top - set(ours))
    if others:
        what = (
            f"The repository holds code that is not dflash-hub's: {listed(others)}. It was not read"
        )
        advice = "load_draft runs no code of a repository; read it before you pass trust_remote_code=True"
        yield _SECTION.note("code-foreign", what, others, "code of dflash-hub", advice)
    if not ours:
        return
    kind = KINDS["dflash"] if config is None else kind_of(config)
    current = travelling_code(kind.model_class)
    written = re.search(CODE_VERSION, ours.get("configuration_dflash.py", b""))
    version = written[1].decode() if written else "unknown"
    differing = sorted(name for name, code in ours.items() if code != current.get(name))
    if differing and version == __version__:
        what = f"The code says that it is dflash-hub {version}, and differs from this release: {listed(differing)}"
        advice = "Compare it: dflash-hub refresh REPO --dry-run --diff; refresh puts the release's code there"
        yield _SECTION.warning("code-edited", what, differing, f"dflash-hub {__version__}", advice)
    elif differing:
        what = f"The code is of dflash-hub {version}; this is {__version__}"
        advice = "Update it: dflash-hub refresh REPO"
        yield _SECTION.note("code-version", what, version, __version__, advice)


# Card and access -----------------------------------------------------------------------------------------------------


def card_of(files: DraftFiles) -> ModelCard | None:
    """Return the model card; None without one.

    Raises:
        ValueError: it cannot be read.
    """
    path = files.path("README.md")
    return None if path is None else read_card(path, "README.md")


def _card_remarks(files: DraftFiles) -> Iterator[Remark]:
    """Yield a card that is missing or does not name the target. In a folder, that is no fault."""
    make = _SECTION.note if files.info is None else _SECTION.warning
    try:
        card = card_of(files)
    except ValueError as error:
        yield _SECTION.warning("card-broken", str(error), None, "a card", "Correct its metadata")
        return
    advice = "Write one: dflash-hub push FOLDER REPO --base-model org/target"
    if card is None:
        yield make("card-missing", "There is no model card (README.md)", None, "a card", advice)
    elif not card.data.get("base_model"):
        what = (
            "The model card names no base_model, so nobody can tell which target this draft is for"
        )
        yield make("base-model-missing", what, None, "base_model: org/target", advice)


def _access_remarks(files: DraftFiles) -> Iterator[Remark]:
    """Yield that not everybody can read the repository."""
    if files.info is None:
        return
    for name in ("gated", "private"):
        value = getattr(files.info, name, None)
        if value:
            what = f"The repository is {name}: users and engines need a token that may read it"
            yield _SECTION.note(name, what, value, False, "Say so where you recommend it")
