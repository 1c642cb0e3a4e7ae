# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Find everything that is wrong with a call before any weights are loaded, and tell it at once."""

from collections.abc import Callable
from typing import Any

from ..catalogue import check_folder
from ..kinds import KINDS

_SIGNS = ("dflash_config", "speculators_model_type")
"""Keys of config.json that drafts have, and targets have not."""


class Problems:
    """Collects the errors of checks."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, check: Callable[..., Any], *args: Any) -> Any:
        """Return what a check returns; collect its error, and return None then."""
        try:
            return check(*args)
        except (ValueError, OSError, ImportError) as error:
            self.add(str(error))
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
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        if self.found:
            listed = "\n".join(f"- {problem}" for problem in self.found)
            raise ValueError(f"{len(self.found)} things are wrong:\n{listed}")


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
    content = _config_of(flag, name, None)
    if content and is_draft(content):
        raise ValueError(
            f"{flag} is {name}, which is a draft; pass the model that it was trained for, and this as --draft."
        )


def check_draft(name: str | None, revision: str | None = None) -> None:
    """Refuse the name of a draft that does not exist, or that is a target's; None is no name.

    Raises:
        ValueError, OSError: naming it.
    """
    content = {} if name is None else _config_of("--draft", name, revision)
    architectures = content.get("architectures")
    if content and architectures and not is_draft(content):
        shown = ", ".join(map(str, architectures))
        raise ValueError(
            f"--draft is {name}, which is no DFlash draft but a model of its own ({shown}); pass a draft of the target."
        )


def is_draft(content: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a draft, of any kind and layout."""
    known = {name for kind in KINDS.values() for name in (kind.name, *kind.architectures)}
    named = content.get("architectures")
    names = named if isinstance(named, list) else [named]
    names = [*names, content.get("model_type")]
    return bool(known.intersection(map(str, names)) or content.keys() & set(_SIGNS))


def _config_of(flag: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return the content of config.json; {} where there is none, as beside an adapter.

    Raises:
        ValueError, OSError: there is no such folder or repository.
    """
    from transformers import PretrainedConfig

    from ..findings_dflash import LOADING, check_path, explained

    check_path(flag, name)
    check_folder(name)
    with explained(f"{flag} {name} could not be read", LOADING):
        content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    return content
