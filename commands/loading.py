# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load targets, tokenizers and drafts for a command."""

import warnings
from dataclasses import dataclass
from typing import Any

from ..catalogue import check_folder, rows
from .built_in import TARGET, draft_of, name_of
from .preflight import Problems, check_target
from .screen import hide_bars, note, notes, prose


@dataclass(frozen=True)
class Loaded:
    """Hold a target and its draft.

    Args:
        made_for: Hub ids of the targets that the draft was made for; () if unknown.
        remark: what the catalogue remarks on it.
    """

    target: Any
    draft: Any
    made_for: tuple[str, ...] = ()
    remark: str = ""


def load_target(name: str, dtype: str) -> Any:
    """Load the target's text model, or its image-and-text model where transformers has no text model for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from ..findings_dflash import LOADING, explained

    hide_bars()
    if name == TARGET:
        torch.set_num_threads(1)  # more threads only slow models of this size down
    notes.print(
        f"Loading {name_of(name)}", style="dim", markup=False, highlight=False, soft_wrap=True
    )
    with explained(f"The target {name} could not be loaded", LOADING):
        try:
            return _with_all_weights(AutoModelForCausalLM, name, dtype)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
        return _with_all_weights(AutoModelForImageTextToText, name, dtype)


def _with_all_weights(auto_class: Any, name: str, dtype: str) -> Any:
    """Load a model, and note weights that its files lack, which transformers then makes up.

    Raises:
        ValueError: tensors have other shapes than its config says.
    """
    try:
        model, found = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights of {name} have other shapes than its config.json says; --verbose lists them."
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        note(
            f"The files of {name} lack {len(missing)} of its tensors, such as {missing[0]}: they are random numbers "
            "here, so the text is worth nothing."
        )
    return model


def checked_tokenizer(problems: Problems, target: str, flag: str = "--target") -> Any:
    """Check a target, and load its tokenizer if nothing is wrong with it; None where a problem was added."""
    found = len(problems.found)
    problems.check(check_target, target, flag)
    return problems.check(load_tokenizer, target) if len(problems.found) == found else None


def load_tokenizer(target: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a target.

    Raises:
        ValueError, OSError: there is none; naming the target.
    """
    from transformers import AutoTokenizer

    from ..checking.pairs import is_empty
    from ..findings_dflash import LOADING, check_path, explained

    check_path("--target", target)
    check_folder(target)
    lacks = f"The target {target} has no tokenizer; save that of its model with it, or pass a target that has one."
    try:
        with explained(f"The tokenizer of the target {target} could not be loaded", LOADING):
            trust = {"trust_remote_code": True} if trust_remote_code else {}
            tokenizer = AutoTokenizer.from_pretrained(target, **trust)
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        check_target(target)  # a draft has none, and is the likelier mistake
        raise ValueError(lacks) from error
    if is_empty(tokenizer):
        raise ValueError(lacks)
    return tokenizer


def find_draft(model: Any, draft: str | None, revision: str | None) -> Any:
    """Load the draft with this name, or the registry's draft for the target, in the target's dtype."""
    return load_pair(model, draft, revision).draft


def load_pair(model: Any, draft: str | None, revision: str | None) -> Loaded:
    """Load the draft with this name, or the registry's draft for the target, in the target's dtype."""
    from ..registry import explain_resolution, load_draft

    draft = draft or draft_of(str(getattr(model.config, "_name_or_path", "")))
    if draft is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the reason is printed below
            spec, why = explain_resolution(model.config.architectures, model)
        prose(notes, f"Draft: {spec.name}. {why}", "dim", markup=False)
        return Loaded(model, spec.load(dtype=model.dtype), spec.targets, spec.note)
    loaded = load_draft(draft, revision=revision, dtype=model.dtype)
    known = next((row for row in rows() if row.repo_id == draft), None)
    if known is not None:
        return Loaded(model, loaded, known.targets, known.note)
    named = getattr(loaded, "card_known", {}).get("base_model")
    bases = tuple(named) if isinstance(named, list | tuple) else (named,)
    return Loaded(model, loaded, tuple(str(one) for one in bases if one))
