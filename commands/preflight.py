# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find everything that is wrong with a call before any weights are loaded, and tell it at once."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..catalogue import check_folder, is_path
from ..kinds import KINDS
from .built_in import BUILT_IN_DRAFTS, DEMO
from .mistakes import listed, of_values
from .words import flag_of

_SIGNS = ("dflash_config", "speculators_model_type")
"""Keys of config.json that drafts have, and targets have not."""
_DATA = (".jsonl", ".json", ".parquet", ".csv", ".txt")
"""Endings of files of rows."""


class Problems:
    """Collect the errors of checks, after those of values on the command line."""

    def __init__(self) -> None:
        self.found = of_values()

    def check(self, check: Callable[..., Any], *args: Any) -> Any:
        """Return what a check returns; collect its error, and return None then."""
        try:
            return check(*args)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            for problem in getattr(error, "found", [str(error)]):
                self.add(problem)
            return None

    def add(self, problem: str) -> None:
        """Collect a problem, unless it is known."""
        if problem not in self.found:
            self.found.append(problem)

    def raise_all(self) -> None:
        """Raise one error that lists all problems.

        Raises:
            ValueError: there is one.
        """
        if self.found:
            raise ValueError(listed(self.found))


def check_dtype(dtype: str, flag: str = "--dtype") -> None:
    """Refuse what is no name of a dtype of torch that holds weights.

    Raises:
        ValueError: naming the flag.
    """
    import torch

    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"{flag} is {dtype!r}; it must be auto, or a dtype of torch such as float32 or bfloat16."
        )


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have; None leaves the choice to the command.

    Raises:
        ValueError: naming the flag.
    """
    import torch

    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device is {device!r}, which cannot be used here: {reason}. Leave it out for the best that is here."
        ) from error


def device_of(device: str | None) -> str:
    """Return the device to run on: the given one, or the GPU, if there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_text(file: Path, flag: str) -> str:
    """Return the text of a file.

    Raises:
        ValueError: it cannot be read; naming the flag.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{flag} is {file}, which cannot be read: {reason}.") from error


def check_capture(capture: str) -> None:
    """Refuse what is no mode of running blocks.

    Raises:
        ValueError: naming the flag.
    """
    from ..execution_dflash import CAPTURE

    if capture not in CAPTURE:
        raise ValueError(f"--capture is {capture!r}; it must be one of {', '.join(CAPTURE)}.")


def check_proposal(proposal: str, width: int | None = None) -> None:
    """Refuse what is no kind of proposals, and a width beside one that has none.

    Raises:
        ValueError: naming the flag.
    """
    from ..generate_dflash import PROPOSALS, WITHOUT_WIDTH

    if proposal not in PROPOSALS:
        raise ValueError(f"--proposal is {proposal!r}; it must be one of {', '.join(PROPOSALS)}.")
    if width is not None and proposal in WITHOUT_WIDTH:
        raise ValueError(
            f"--width is {width}, but --proposal {proposal} has no width to set; "
            "pass --proposal chain, tree or lookup."
        )


def check_target(name: str, flag: str = "--target") -> None:
    """Refuse the name of a target that does not exist, or that is a draft's.

    Raises:
        ValueError, OSError: naming it.
    """
    if name in BUILT_IN_DRAFTS:
        raise ValueError(f"{flag} is {name}, which is a built-in draft; its target is {DEMO}.")
    content = _config_of(flag, name, None)
    if content and is_draft(content):
        raise ValueError(
            f"{flag} is {name}, which is a draft; pass the model that it was trained for."
        )


def check_served(name: str) -> None:
    """Refuse the target of a line for a server, if it is a path without anything or a draft. The Hub is not asked.

    Raises:
        ValueError, OSError: naming it.
    """
    check_folder(name)
    if Path(name, "config.json").is_file():
        check_target(name)


def check_draft(name: str | None, revision: str | None = None) -> None:
    """Refuse the name of a draft that does not exist, or that is a target's; None is no name.

    Raises:
        ValueError, OSError: naming it.
    """
    if name is not None and revision is not None and Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder, which has no revision {revision}; leave the revision out."
        )
    if name is not None:
        _refuse_target(_config_of("--draft", name, revision), name, "--draft")


def _refuse_target(content: dict[str, Any], name: str, what: str) -> None:
    """Refuse the config.json of a model that is no draft."""
    architectures = content.get("architectures")
    if content and architectures and not is_draft(content):
        shown = ", ".join(map(str, architectures))
        raise ValueError(
            f"{what} is {name}, which is no DFlash draft but a model of its own ({shown}); pass a draft of the target."
        )


def fresh_beside_draft(
    draft: str | None, revision: str | None, given: dict[str, list[str]]
) -> Iterator[str]:
    """Yield which options are of a fresh draft, where the name of one to go on from is given; None is no name.

    Args:
        given: the values of each option that is given, such as num_layers.
    """
    from ..training.contradictions import SHAPE_OPTIONS

    if draft is None:
        return
    for name in given:
        if name in SHAPE_OPTIONS:
            yield (
                f"{flag_of(name)} gives the shape of a fresh draft, and --draft names one that has its own; leave one "
                "of them out."
            )
    if "variant" in given:
        kind = _kind_of_draft(draft, revision)
        others = [one for one in given["variant"] if kind not in (None, one)]
        if others:
            yield (
                f"--variant is {','.join(others)}, and --draft names a draft of the kind {kind}; leave one of them out."
            )


def _kind_of_draft(name: str, revision: str | None) -> str | None:
    """Return the kind of a draft; None for what is none, which `check_draft` refuses."""
    from ..layouts import variant_of

    try:
        content = _config_of("--draft", name, revision)
    except (ValueError, OSError):
        return None
    return variant_of(content) if is_draft(content) else None


def check_draft_name(name: str, where: dict[str, str | None], what: str = "The draft") -> None:
    """Refuse the path of a draft that does not exist, and the name of a target; all else the command reads itself.

    Args:
        where: `revision` and `token` of a repository.

    Raises:
        ValueError, OSError: naming it.
    """
    from transformers import PretrainedConfig

    check_folder(name)
    if where.get("revision") is not None and Path(name).is_dir():
        raise ValueError(
            f"--revision is {where['revision']}, but {name} is a folder, which has none; leave it out."
        )
    try:
        content, _ = PretrainedConfig.get_config_dict(name, **where)
    except Exception:  # what it is, the command says when it reads the draft
        return
    if isinstance(content, dict):
        _refuse_target(content, name, what)


def check_folder_to_write(folder: str | Path, flag: str) -> None:
    """Refuse a folder that cannot be written, or be made.

    Raises:
        ValueError: naming the flag.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} is {folder}, which is a file; pass a folder.")
    _check_writable(folder, folder, flag)


def check_file_to_write(file: str | Path, flag: str) -> None:
    """Refuse a file that cannot be written, or be made.

    Raises:
        ValueError: naming the flag.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{flag} is the folder {file}; pass a file in it, such as data.jsonl.")
    _check_writable(file, file.parent, flag)


def _check_writable(path: Path, folder: Path, flag: str) -> None:
    """Refuse a folder in which, or in whose nearest parent, no file can be made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise ValueError(
            f"{flag} is {path}, which cannot be written: {error.strerror}; choose another."
        ) from error


def check_data(data: str, flag: str = "--data") -> None:
    """Refuse the path of a file or folder that does not exist, which would be taken for a dataset of the Hub.

    Raises:
        ValueError: naming the flag.
    """
    is_no_dataset = Path(data).suffix in _DATA or is_path(data) or data.count("/") > 1
    if is_no_dataset and not Path(data).exists():
        raise ValueError(
            f"{flag} is {data}: there is no such file or folder; pass one, or a dataset of the Hub."
        )


def check_token(token: str | None, flag: str = "--token") -> None:
    """Refuse to write to the Hub without any token.

    Args:
        flag: the command's option for one.

    Raises:
        ValueError: there is none.
    """
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise ValueError(
            "There is no token of the Hub, which writing to it takes: log in with hf auth login, set HF_TOKEN, or pass "
            f"{flag}."
        )


def check_repository(name: str, argument: str) -> None:
    """Refuse what cannot be the name of a repository, such as a folder.

    Raises:
        ValueError: naming the argument.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if is_path(name):
        raise ValueError(
            f"{argument} is {name}, which is a path; pass the name of a repository, such as me/draft."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        rule = str(error).partition(":")[0]
        raise ValueError(
            f"{argument} is {name!r}, and no repository can be named so: {rule}. Pass a name such as me/draft."
        ) from error


def check_base_model(name: str) -> None:
    """Refuse what cannot be the Hub id of a target on a card, such as the name of the built-in one.

    Raises:
        ValueError: naming the flag.
    """
    if name == DEMO:
        raise ValueError(
            f"--base-model is {DEMO}, the built-in target, which no repository holds; pass the Hub id of a target."
        )
    check_repository(name, "--base-model")


def is_draft(content: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a draft, of any kind and layout."""
    known = {name for kind in KINDS.values() for name in (kind.name, *kind.architectures)}
    named = content.get("architectures")
    names = named if isinstance(named, list) else [named]
    names = [*names, content.get("model_type")]
    return bool(known.intersection(map(str, names)) or content.keys() & set(_SIGNS))


def looks_local(name: str) -> bool:
    """Tell whether a name is the path of nothing, in a folder that there is; it may be a Hub id all the same."""
    return "/" in name and Path(name).parent.is_dir() and not Path(name).exists()


def _config_of(flag: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return the content of config.json; {} where there is none, as beside an adapter.

    Raises:
        ValueError, OSError: there is no such folder or repository.
    """
    from transformers import PretrainedConfig

    from ..findings_dflash import LOADING, check_path, explained

    check_path(flag, name)
    check_folder(name)
    asked = f"{flag} {name} could not be read"
    asked += ", and there is no such folder" if looks_local(name) else ""
    with explained(asked, LOADING):
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    return content
