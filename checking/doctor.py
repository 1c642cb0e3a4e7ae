# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Check a draft in every way there is: config, tensors, repository, pair, engines, and a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..findings_dflash import LOADING
from ..kinds import kind_of
from ..registry import load_draft
from .configs import config_remarks, layout_of, readable_config
from .engines import EngineVerdict, verdicts
from .pairs import Target, open_target, pair_remarks
from .remarks import ERROR, Remark, Section, status_of
from .repositories import own_code, repository_remarks
from .runs import RunReport, after_warnings, anchor_remark, fit_remarks, run_draft
from .sources import DraftFiles, open_draft
from .stored import stored_draft
from .tensors import tensor_remarks

_CONFIG, _RUN = Section("config"), Section("run")


@dataclass(frozen=True)
class CheckOptions:
    """Hold the options of a check.

    Args:
        revision: commit, tag or branch of the draft.
        subfolder: the folder in the repository that holds it.
        token: of the Hub. Default: the token of `hf auth login`.
        values: whether to read the values of tensors too, for which the weights of a Hub draft are downloaded.
        prompts: to decode with a loaded target; None for the package's own.
        max_new_tokens: of each prompt.
        report: called with the name of each step as it begins.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | None = None
    values: bool = True
    prompts: Sequence[str] | None = None
    max_new_tokens: int = 32
    report: Callable[[str], None] = lambda step: None


@dataclass(frozen=True)
class DraftReport:
    """Hold what a check found.

    Args:
        draft: Hub id or folder.
        commit: that was checked; None for a folder.
        layout: whose layout its config.json has, in words.
        kind: the kind of draft; None if its config cannot be read.
        engines: what each engine would do with the files; () if there is no config.
        run: None without a loaded target, or if something before it failed.
    """

    draft: str
    commit: str | None
    layout: str
    kind: str | None
    remarks: tuple[Remark, ...]
    engines: tuple[EngineVerdict, ...] = ()
    run: RunReport | None = field(default=None)

    @property
    def status(self) -> int:
        """0 good, 1 works with warnings, 2 broken. What engines would do with it does not count."""
        return status_of(self.remarks)

    @property
    def title(self) -> str:
        """The status in words."""
        return ("good", "works with warnings", "broken")[self.status]

    def as_dict(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        found: dict[str, Any] = {"draft": self.draft, "commit": self.commit, "layout": self.layout}
        found |= {"kind": self.kind, "status": self.status, "verdict": self.title}
        found["remarks"] = [remark.as_dict() for remark in self.remarks]
        found["engines"] = [one.as_dict() for one in self.engines]
        found["run"] = None if self.run is None else self.run.as_dict()
        return found


def check_draft(draft: Any, target: Any = None, options: CheckOptions | None = None) -> DraftReport:
    """Check a draft, in a folder or on the Hub; no code of its repository runs.

    Args:
        draft: Hub id or folder.
        target: Hub id or folder, to check how the two fit; or a loaded model, to decode with it too.

    Raises:
        ValueError: an argument is none of these.
        OSError: there is no such draft or target, no access or no connection.
    """
    options = CheckOptions() if options is None else options
    if not isinstance(options, CheckOptions):
        raise ValueError(f"options is {options!r}; pass a CheckOptions.")
    if options.prompts is not None and not any(options.prompts):
        raise ValueError(f"prompts is {options.prompts!r}; pass at least one text.")
    options.report("Reading the config")
    where = {"revision": options.revision, "subfolder": options.subfolder, "token": options.token}
    files = open_draft(draft, where)
    opened = None if target is None else open_target(target)
    try:
        raw = files.config
    except (ValueError, OSError) as error:
        # No connection and no name is at fault in a folder.
        text = str(error).removesuffix(LOADING) if files.info is None else str(error)
        what = " ".join(text.split()).rstrip(".")
        remark = _CONFIG.error("config-unreadable", what, None, "a config.json", "Correct the file")
        return DraftReport(files.name, files.commit, "unknown", None, (remark,))
    config, supplied = readable_config(raw)
    remarks = [*_file_remarks(files, config, options)]
    if config is not None and opened is not None:
        options.report("Comparing with the target")
        remarks += pair_remarks(files, config, opened)
    broken = [one for one in remarks if one.level == ERROR and not _is_supplied(one, supplied)]
    run, further = _run(files, config, opened, bool(broken), options, supplied)
    if status_of(one for one in remarks if one.section in ("config", "pair")):
        further = [after_warnings(one) for one in further]
    kind = None if config is None else kind_of(config).name
    engines = verdicts(stored_draft(files, own_code(files), opened))
    found = (*remarks, *further)
    return DraftReport(files.name, files.commit, layout_of(raw), kind, found, engines, run)


def _file_remarks(files: DraftFiles, config: Any, options: CheckOptions) -> Iterator[Remark]:
    """Yield what is wrong with the files of a draft alone."""
    yield from config_remarks(files.config)
    options.report("Reading the weights")
    yield from tensor_remarks(files, config, options.values)
    options.report("Looking at the repository")
    yield from repository_remarks(files, config)


def _run(
    files: DraftFiles,
    config: Any,
    target: Target | None,
    is_broken: bool,
    options: CheckOptions,
    supplied: dict[str, Any],
) -> tuple[RunReport | None, list[Remark]]:
    """Decode with the target if it is loaded and nothing is broken so far; return the report and its remarks.

    Args:
        supplied: fields that the config.json lacks.
    """
    if target is None or target.model is None:
        return None, []
    if is_broken:
        what = "Nothing was decoded, because the draft cannot be used as it is"
        return None, [_RUN.note("not-run", what, None, "a run", "Correct the errors first")]
    if target.tokenizer is None:
        what = "Nothing was decoded, because the target has no tokenizer that can be used"
        advice = "Save the target's tokenizer with it, or name a target that has one"
        return None, [_RUN.note("not-run", what, None, "a tokenizer", advice)]
    found = [*fit_remarks(config, target)]
    if found:
        return None, found
    try:
        run = _decoded(files, target, options, supplied)
    except (ValueError, LookupError, RuntimeError) as error:
        what = f"Decoding failed: {str(error).rstrip('.')}"
        return None, [_RUN.error("not-decoded", what, None, "a run", "Correct what it names")]
    if supplied:
        return run, [anchor_remark(run.acceptances)]
    return run, [*run.remarks]


def _decoded(
    files: DraftFiles, target: Target, options: CheckOptions, supplied: dict[str, Any]
) -> RunReport:
    """Load the draft with the `supplied` fields, and run it.

    Raises:
        ValueError, LookupError, RuntimeError: it cannot be loaded, or decoding fails.
    """
    options.report("Loading the draft")
    loaded = load_draft(files.name, dtype=target.model.dtype, **files.where, **supplied)
    loaded = loaded.to(target.model.device).eval()
    return run_draft(loaded, target, options.prompts, options.max_new_tokens, options.report)


def _is_supplied(remark: Remark, supplied: dict[str, Any]) -> bool:
    """Tell whether a remark says no more than that the supplied field is missing."""
    return remark.name == "config-invalid" and any(name in remark.finding.what for name in supplied)
