# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check how a draft fits a target, by their configs and tokenizers. No weights are read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..checkpoints import out_of_cache, split_precision
from ..compat_dflash import checkpoint_name
from ..findings_dflash import LOADING, explained
from ..layouts_dflash import shown
from ..layouts_speculators import target_named
from ..registry import CATALOGUE, check_folder
from .remarks import Remark, Section
from .repositories import card_of
from .sources import DraftFiles

_SECTION = Section("pair")
_RESERVED = re.compile(r"[<\[(].*[>\])]|.*(?:reserved|unused|extra_id).*", re.IGNORECASE)
"""How tokens look that tokenizers keep free, or that stand for no text."""
_SGLANG_MASK = "<|MASK|>"  # what it looks up where dflash_config names no mask_token


@dataclass(frozen=True)
class Target:
    """Hold a target to check against.

    Args:
        name: Hub id or folder; "" if unknown.
        config: of the whole model.
        tokenizer: None if there is none, which `tokenizer_error` explains.
        model: loaded, for a run; None to read config and tokenizer alone.
    """

    name: str
    config: Any
    tokenizer: Any = None
    tokenizer_error: str = ""
    model: Any = None

    @property
    def text(self) -> Any:
        """The config of its text part."""
        return self.config.get_text_config(decoder=True)

    @property
    def rows(self) -> int:
        """Rows of its embedding; without a model, the size of the vocabulary."""
        if self.model is None:
            return self.text.vocab_size
        return self.model.get_input_embeddings().weight.shape[0]


def open_target(target: Any) -> Target:
    """Open a target: a Hub id, a folder, or a loaded model.

    Raises:
        ValueError: it is none of these.
        OSError: its config cannot be read.
    """
    model = target if hasattr(target, "config") and hasattr(target, "generate") else None
    if model is None and (not hasattr(target, "__fspath__") and not isinstance(target, str)):
        raise ValueError(f"target is {shown(target)}; pass a Hub id, a folder or a loaded model.")
    name = checkpoint_name(model.config) or "" if model is not None else str(target)
    if model is None:
        check_folder(name)
        with explained(f"The config of the target {name} could not be read", LOADING):
            config = AutoConfig.from_pretrained(name)
    else:
        config = model.config
    tokenizer, reason = _tokenizer(name)
    return Target(name, config, tokenizer, reason, model)


def _tokenizer(name: str) -> tuple[Any, str]:
    """Return the tokenizer of this name, or None and why there is none."""
    if not name:
        return None, "the target's name is not known"
    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, LookupError, TypeError) as error:
        return None, " ".join(str(error).split())
    if is_empty(found):
        return None, f"{name} has no vocabulary"
    return found, ""


def is_empty(tokenizer: Any) -> bool:
    """Tell whether a tokenizer has no vocabulary of its own: transformers makes such a one of a config alone."""
    return not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()


def pair_remarks(files: DraftFiles, config: Any, target: Target) -> Iterator[Remark]:
    """Yield how the draft does not fit the target.

    Args:
        config: of the draft, as it is read from config.json.
    """
    text = target.text
    fit = config.fit_findings(
        text.hidden_size, text.num_hidden_layers, text.vocab_size, target.rows
    )
    yield from _SECTION.errors("misfit", fit)
    yield from _tap_remarks(config, text)
    yield from _made_for_remarks(files, target)
    if target.tokenizer is None:
        what = f"The target's tokenizer could not be loaded: {target.tokenizer_error}"
        advice = "Check the mask token yourself"
        yield _SECTION.note("tokenizer-missing", what, None, "a tokenizer", advice)
    else:
        yield from mask_remarks(config.mask_token_id, target.tokenizer, files.config)
        yield from _tokenizer_remarks(files, target.tokenizer)
    yield from _rope_remarks(config, text)
    ours, theirs = config.max_position_embeddings, getattr(text, "max_position_embeddings", None)
    if theirs and ours < theirs:
        what = f"max_position_embeddings is {ours:,}, and the target's is {theirs:,}"
        advice = "Copy the target's: some engines cap the length of texts at the draft's"
        yield _SECTION.note("positions", what, ours, theirs, advice)


def _tap_remarks(config: Any, text: Any) -> Iterator[Remark]:
    """Warn of a tap on the last layer, whose output readers take before or after the final norm."""
    last = text.num_hidden_layers - 1
    if config.target_layer_ids[-1] == last:
        what = (
            f"target_layer_ids taps layer {last}, the target's last: its output here is the one before the final "
            "norm, and transformers' hidden_states[-1] is the one after it"
        )
        advice = "Make sure that training read the same; SGLang fails on this tap"
        yield _SECTION.warning("tap-last", what, last, f"below {last}", advice)


# What it was made for ------------------------------------------------------------------------------------------------


def _made_for_remarks(files: DraftFiles, target: Target) -> Iterator[Remark]:
    """Warn if the card or the catalogue says that the draft was made for another checkpoint."""
    name = out_of_cache(target.name) if target.name else ""
    made_for = targets_of(files)
    if not name or not made_for or Path(name).is_dir():  # a folder may have any name
        return
    ours = {_bare(known) for known in made_for}
    if _bare(name) not in ours:
        what = f"This draft was made for {' or '.join(made_for)}, and the target is {name}"
        advice = (
            "Use that target, or find this one's draft: dflash-hub resolve TARGET. A sibling of the same shape loads, "
            "and accepts few tokens"
        )
        yield _SECTION.warning("other-target", what, name, made_for, advice)


def targets_of(files: DraftFiles) -> list[str]:
    """Return the targets that the draft was made for, by the catalogue, its card and its config; [] if none knows."""
    found: list[Any] = []
    for spec in CATALOGUE:
        found += spec.targets if spec.repo_id == files.name else ()
    try:
        card = card_of(files)
    except ValueError:
        card = None
    base = None if card is None else card.data.get("base_model")
    found += base if isinstance(base, list) else [base]
    found.append(target_named(files.config))
    names = [name for name in found if isinstance(name, str)]
    return list(dict.fromkeys(names))


def _bare(name: str) -> str:
    """Return the last part of a name without its precision, casefolded: copies are named alike."""
    return split_precision(name.rstrip("/").rpartition("/")[2])[0].casefold()


# Tokens --------------------------------------------------------------------------------------------------------------


def mask_remarks(mask: int, tokenizer: Any, raw: dict[str, Any]) -> Iterator[Remark]:
    """Yield what is wrong with the mask token, by what the target's tokenizer has at that id.

    Args:
        raw: the content of the draft's config.json.
    """
    nested = raw.get("dflash_config")
    named = nested.get("mask_token") if isinstance(nested, dict) else None
    for text in dict.fromkeys(text for text in (named, _SGLANG_MASK) if text):
        own = tokenizer.get_vocab().get(text)
        if own is not None and own != mask:
            what = f"mask_token_id is {mask}, but the target's tokenizer has {text!r} at {own}"
            advice = "Take the id that the draft was trained with; SGLang refuses two that differ"
            yield _SECTION.warning("mask-text", what, mask, own, advice)
    if mask >= len(tokenizer):
        return  # a spare row of the embedding
    token = tokenizer.convert_ids_to_tokens(mask)
    names = [
        name for name in ("eos", "bos") if getattr(tokenizer, f"{name}_token_id", None) == mask
    ]
    special = mask in tokenizer.all_special_ids or mask in tokenizer.added_tokens_decoder
    if names:
        what = f"mask_token_id is {mask}, the target's {names[0]} token ({token!r}), which occurs in its texts"
    elif not special and not _RESERVED.fullmatch(str(token)):
        what = f"mask_token_id is {mask}, which is {token!r} in the target's tokenizer, an ordinary token of texts"
    else:
        return
    advice = "Is it the id that the draft was trained with, or one of another tokenizer?"
    yield _SECTION.warning("mask-ordinary", what, mask, "a special or reserved token", advice)


def _tokenizer_remarks(files: DraftFiles, tokenizer: Any) -> Iterator[Remark]:
    """Warn if the draft ships a tokenizer with other tokens than its target's."""
    if not {"tokenizer.json", "tokenizer_config.json"}.intersection(files.names):
        return
    own, reason = None, ""
    try:
        own = AutoTokenizer.from_pretrained(files.name, **files.where)
    except (OSError, ValueError, ImportError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
    if own is None:
        what = f"The draft ships a tokenizer that cannot be loaded: {reason}"
        yield _SECTION.note(
            "tokenizer-broken", what, None, "none", "Remove it: the target's is used"
        )
        return
    ours, theirs = own.get_vocab(), tokenizer.get_vocab()
    differing = [token for token, number in ours.items() if theirs.get(token) != number]
    if differing:
        what = (
            f"The draft ships a tokenizer that differs from the target's in {len(differing):,} tokens, such as "
            f"{sorted(differing)[0]!r}"
        )
        advice = "Was it trained for another target? A draft is used with its target's tokenizer"
        yield _SECTION.warning("tokenizer-differs", what, len(ours), len(theirs), advice)


# Rotary embeddings ---------------------------------------------------------------------------------------------------


def rope_of(text: Any) -> dict[str, Any]:
    """Return the rotary parameters of a target's full-attention layers; {} if it has none."""
    rope = getattr(text, "rope_parameters", None) or {}
    inner = rope.get("full_attention")
    return dict(inner if isinstance(inner, dict) else rope)


def rope_differences(config: Any, text: Any) -> dict[str, tuple[Any, Any]]:
    """Return where rotary parameters differ: name -> the draft's value and the target's."""
    ours, theirs = config.rope_parameters, rope_of(text)
    if not theirs:
        return {}
    found = {}
    for name in ("rope_theta", "rope_type", "factor"):
        pair = ours.get(name), theirs.get(name)
        if pair[0] != pair[1] and not (name == "rope_type" and pair[1] is None):
            found[name] = pair
    return found


def _rope_remarks(config: Any, text: Any) -> Iterator[Remark]:
    """Note rotary parameters that differ from the target's, which most drafts copy."""
    differences = rope_differences(config, text)
    if not differences:
        return
    parts = []
    for name, (ours, theirs) in differences.items():
        parts.append(f"{name} is {shown(ours)} in the draft and {shown(theirs)} in the target")
    what = f"Rotary embeddings differ: {', '.join(parts)}. Most drafts copy their target's, not all"
    advice = "Was it trained so, or did an export drop the value? A run compares both"
    found = {name: pair[0] for name, pair in differences.items()}
    expected = {name: pair[1] for name, pair in differences.items()}
    yield _SECTION.note("rope-differs", what, found, expected, advice)
