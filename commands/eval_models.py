# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load the models that `dflash-hub eval` compares."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .built_in import draft_of, name_of
from .loading import load_target, load_tokenizer
from .preflight import (
    Problems,
    check_capture,
    check_device,
    check_draft,
    check_dtype,
    check_proposal,
    check_target,
    device_of,
)

if TYPE_CHECKING:
    from ..evaluation.decoding import Models
    from ..evaluation.ways import Condition, Drafting

METHODS = ("plain-static", "transformers", "transformers-static", "prompt-lookup")
"""What `--against` takes besides assistants."""
SPARE = 1.25
"""Memory for float32 decoding, as a multiple of its weights."""


@dataclass(frozen=True)
class Choice:
    """Hold what was asked for on the command line.

    Args:
        drafts: names, or none for the known draft of the target.
        block_sizes: none for the drafts' own.
        against: further methods.
        device: None for the GPU, if there is one.
        labels: what the command line calls drafts, by their names.
    """

    target: str
    drafts: list[str]
    block_sizes: list[int]
    against: list[str]
    dtype: str
    device: str | None
    capture: str
    proposal: str = "chain"
    labels: dict[str, str] = field(default_factory=dict)

    def check(self, conditions: Sequence["Condition"], problems: Problems) -> None:
        """Collect what cannot be evaluated, before anything is loaded."""
        found = len(problems.found)
        if self.target:
            problems.check(check_target, self.target)
        for draft in self.drafts:
            problems.check(check_draft, *at_revision(draft))
        problems.check(check_dtype, self.dtype)
        problems.check(check_device, self.device)
        problems.check(check_capture, self.capture)
        problems.check(check_proposal, self.proposal)
        for name, values in (("--draft", self.drafts), ("--block-size", self.block_sizes)):
            if len(set(values)) < len(values):
                problems.add(f"{name} is given twice with the same value.")
        single = [word for word in self.against if word != "plain-static"]
        if single and any(condition.batch_size > 1 for condition in conditions):
            problems.add(
                f"--against {','.join(single)} decodes one row at a time in transformers; leave out "
                "--batch-size or --against."
            )
        if self.target and len(problems.found) == found:
            problems.check(load_tokenizer, self.target)


def at_revision(name: str) -> tuple[str, str | None]:
    """Return the repository and the revision of ORG/NAME@REVISION; None for the newest, and for folders."""
    if "@" in name and not Path(name).is_dir():
        repository, revision = name.rsplit("@", maxsplit=1)
        return repository, revision
    return name, None


def against_of(words: str) -> list[str]:
    """Return the methods that `--against` names.

    Raises:
        ValueError: a word is neither a method nor looks like the name of a repository or a folder.
    """
    found = [word.strip() for word in words.split(",") if word.strip()]
    for word in found:
        if word not in METHODS and "/" not in word and not Path(word).is_dir():
            raise ValueError(
                f"--against has {word!r}; it takes {', '.join(METHODS)}, or an assistant's ORG/NAME or folder."
            )
    return list(dict.fromkeys(found))


class Loader:
    """Load the models of a choice, in the asked dtype and in float32."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.device = device_of(choice.device)
        self.files: dict[str, tuple[str, dict[str, str]]] = {}
        """Repository or folder of each draft, with revision and subfolder, by the name in the report."""

    def tokenizer(self) -> Any:
        """Load the target's tokenizer."""
        self.tokens = load_tokenizer(self.choice.target)
        return self.tokens

    def models(self) -> "Models":
        """Load target, drafts and assistants."""
        return self._load(self.choice.dtype)

    def in_float32(self) -> "Models":
        """Load the same in float32, if it fits beside what is loaded.

        Raises:
            ValueError: it does not fit; with both numbers.
        """
        needed, free = SPARE * 4 * self.parameters, free_memory(self.device)
        if free is not None and needed > free:
            raise ValueError(
                f"float32 needs about {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
            )
        return self._load("float32")

    def _load(self, dtype: str) -> "Models":
        from ..evaluation.decoding import Models

        target = load_target(self.choice.target, dtype).to(self.device).eval()
        models = Models(
            target, self.tokens, capture=self.choice.capture, proposal=self.choice.proposal
        )
        for name in self._draft_names(target):
            sizes: list[int | None] = [*self.choice.block_sizes] or [None]
            for size in sizes:
                draft = self._draft(name, size, target.dtype)
                models.drafts[name, draft.config.block_size] = draft
        for word in self.choice.against:
            if word not in METHODS:
                assistant = load_target(word, dtype).to(self.device).eval()
                models.assistants[word] = assistant
        loaded = [target, *models.drafts.values(), *models.assistants.values()]
        self.parameters = sum(model.num_parameters() for model in loaded)
        return models

    def _draft_names(self, target: Any) -> list[str]:
        """Return the names of the drafts; without any asked for, that of the target's known draft."""
        own = draft_of(self.choice.target)
        names = self.choice.drafts or ([own] if own else [])
        for name in () if self.files else names:
            repository, revision = at_revision(name)
            self._set_files(name, repository, {"revision": revision or ""})
        if not self.files:
            from ..registry import explain_resolution

            spec, _ = explain_resolution(target.config.architectures, target)
            where = {"revision": spec.revision or "", "subfolder": spec.subfolder}
            self._set_files(spec.name, spec.name, where)
        return list(self.files)

    def _set_files(self, name: str, repository: str, where: dict[str, str]) -> None:
        """Note which files a draft has.

        Args:
            where: revision and subfolder, or "" without one.
        """
        given = {key: value for key, value in where.items() if value}
        self.files[name] = (repository, given)

    def _draft(self, name: str, size: int | None, dtype: Any) -> Any:
        """Load a draft; from then on, all of its loads are of the same commit."""
        from ..registry import load_draft

        repository, where = self.files[name]
        fields = {} if size is None else {"block_size": size}
        draft = load_draft(repository, dtype=dtype, **where, **fields)
        commit = self.revision(draft)
        if commit is not None:
            self.files[name] = (repository, where | {"revision": commit})
        return draft.to(self.device).eval()

    def draftings(self, models: "Models") -> list["Drafting"]:
        """Return what proposes tokens: each draft with each block size, and then the other methods."""
        from ..evaluation.ways import DFLASH, Drafting

        ours = []
        for (name, size), draft in models.drafts.items():
            is_varied = len(self.choice.block_sizes) > 1
            kind = draft.config.model_type
            about = (self.revision(draft), kind, size, is_varied)
            taps = tuple(draft.config.target_layer_ids)
            label = self.choice.labels.get(name) or name_of(name)
            ours.append(Drafting(DFLASH, name, *about, taps, label))
        found = list(ours)
        for word in self.choice.against:
            found += self._others(word, ours, models)
        return list(dict.fromkeys(found))

    def _others(self, word: str, ours: Sequence["Drafting"], models: "Models") -> list["Drafting"]:
        """Return what a word of `--against` stands for.

        Transformers compiles its loop where the cache is static, on a GPU. So there `transformers` is both loops.
        """
        from ..evaluation.ways import (
            ASSISTANT,
            LOOKUP,
            PLAIN_STATIC,
            TRANSFORMERS,
            TRANSFORMERS_STATIC,
            Drafting,
        )

        if word == "plain-static":
            return [Drafting(PLAIN_STATIC)]
        if word == "prompt-lookup":
            return [Drafting(LOOKUP)]
        if word == "transformers-static":
            return [replace(one, method=TRANSFORMERS_STATIC) for one in ours]
        if word == "transformers":
            methods = [TRANSFORMERS]
            if models.target.device.type == "cuda":
                methods.append(TRANSFORMERS_STATIC)
            return [replace(one, method=method) for method in methods for one in ours]
        return [Drafting(ASSISTANT, word, self.revision(models.assistants[word]))]

    def revision(self, model: Any) -> str | None:
        """Return the commit of a model of the Hub; None for one of a folder."""
        source = getattr(model, "card_source", None)
        if source is not None:  # a draft of ours
            return source[1].get("revision")
        return getattr(model.config, "_commit_hash", None)


def free_memory(device: str) -> int | None:
    """Return the free bytes of a device; None where that is not known."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
