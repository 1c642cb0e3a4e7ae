# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write the lines that serve a target with its draft in an engine, and say whether that engine reads the draft."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..layouts_dflash import shown
from .configs import draft_config
from .engines import LOADS, EngineVerdict, engine_named, verdict
from .pairs import targets_of
from .repositories import own_code
from .sources import DraftFiles, open_draft
from .stored import StoredDraft, stored_draft


@dataclass(frozen=True)
class Launch:
    """Hold what a launch line is made of.

    Args:
        draft, target: Hub ids or folders.
        revision: of the draft; None for the newest of main.
        drafted: tokens that a block drafts.
    """

    draft: str
    target: str
    revision: str | None
    drafted: int
    stored: StoredDraft


@dataclass(frozen=True)
class Serving:
    """Say how to serve a draft, and what the engine would do with it.

    Args:
        lines: to copy into a shell.
        other_branch: a branch of the repository that the engine reads, where it does not read this one.
    """

    lines: tuple[str, ...]
    verdict: EngineVerdict
    other_branch: str | None = field(default=None)

    @property
    def works(self) -> bool:
        return self.verdict.outcome == LOADS


def _drafted(stored: StoredDraft) -> int:
    """Return how many tokens a block of this draft drafts.

    Raises:
        ValueError: the file names no block size.
    """
    config = draft_config(stored.config)
    if config is not None:
        return config.num_drafted
    size = stored.either("block_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise ValueError(
            f"The draft's config.json says block_size is {shown(size)}; correct it, an int from 2 up."
        )
    return size - 1


def _vllm(launch: Launch) -> list[str]:
    method = "dspark" if launch.stored.head == "dspark" else "dflash"
    config: dict[str, Any] = {"method": method, "model": launch.draft}
    if launch.revision:
        config["revision"] = launch.revision
    config["num_speculative_tokens"] = launch.drafted
    return [
        f"vllm serve {shlex.quote(launch.target)} --speculative-config "
        f"{shlex.quote(json.dumps(config))}"
    ]


def _sglang(launch: Launch) -> list[str]:
    algorithm = "DSPARK" if launch.stored.head == "dspark" else "DFLASH"
    revision = ""
    if launch.revision:
        revision = f" --speculative-draft-model-revision {shlex.quote(launch.revision)}"
    return [
        f"python -m sglang.launch_server --model-path {shlex.quote(launch.target)} "
        f"--speculative-algorithm {algorithm} "
        f"--speculative-draft-model-path {shlex.quote(launch.draft)}{revision}"
    ]


def _local(name: str, folder: str, revision: str | None = None) -> list[str]:
    """Return the line that downloads a repository; [] for a folder."""
    if Path(name).is_dir():
        return []
    pin = f" --revision {shlex.quote(revision)}" if revision else ""
    return [f"hf download {shlex.quote(name)}{pin} --local-dir {folder}"]


def _draft_folder(launch: Launch) -> tuple[list[str], str]:
    """Return the line that downloads the draft, or none; and its folder as a shell reads it."""
    lines = _local(launch.draft, "draft", launch.revision)
    return lines, "draft" if lines else shlex.quote(launch.draft)


def _tensorrt(launch: Launch) -> list[str]:
    lines = _local(launch.draft, "draft", launch.revision)
    folder = "draft" if lines else launch.draft
    settings: dict[str, Any] = {"decoding_type": "DFlash", "max_draft_len": launch.drafted}
    settings["speculative_model"] = folder
    config = {"speculative_config": settings}
    return [
        *lines,
        f"echo {shlex.quote(json.dumps(config))} > dflash.yaml",
        f"trtllm-serve {shlex.quote(launch.target)} --backend pytorch --config dflash.yaml",
    ]


def _llamacpp(launch: Launch) -> list[str]:
    draft_lines, draft = _draft_folder(launch)
    target_lines = _local(launch.target, "target")
    target = "target" if target_lines else shlex.quote(launch.target)
    kind = "draft-dspark" if launch.stored.head == "dspark" else "draft-dflash"
    return [
        *draft_lines,
        *target_lines,
        f"python convert_hf_to_gguf.py {target} --outfile target.gguf",
        f"python convert_hf_to_gguf.py {draft} --target-model-dir {target} --outfile draft.gguf",
        f"llama-server -m target.gguf -md draft.gguf --spec-type {kind} "
        f"--spec-draft-n-max {launch.drafted}",
    ]


def _dflash_mlx(launch: Launch) -> list[str]:
    lines, draft = _draft_folder(launch)
    return [*lines, f"dflash serve --model {shlex.quote(launch.target)} --draft {draft}"]


def _mlx_vlm(launch: Launch) -> list[str]:
    lines, draft = _draft_folder(launch)
    return [
        *lines,
        f"mlx_vlm.server --model {shlex.quote(launch.target)} --draft-model {draft} --draft-kind dflash",
    ]


LAUNCHES: dict[str, Callable[[Launch], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt,
    "llama.cpp": _llamacpp,
    "dflash-mlx": _dflash_mlx,
    "mlx-vlm": _mlx_vlm,
}
"""Engine -> the lines that serve a draft with it."""


def check_engine(engine: str) -> None:
    """Refuse what is no engine with launch lines.

    Raises:
        ValueError: naming those that there are.
    """
    if engine not in list(LAUNCHES):
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(LAUNCHES)}.")


def serve_with(engine: str, draft: Any, target: str | None = None, **where: Any) -> Serving:
    """Return how to serve a draft with an engine, and whether the engine reads the draft as it is stored.

    Args:
        engine: a name in `LAUNCHES`.
        draft: Hub id or folder.
        target: by default, the one that the draft's card or the catalogue names.
        where: `revision`, `subfolder` and `token` of the draft.

    Raises:
        ValueError: there is no such engine, or no target is known.
        OSError: there is no such draft, no access or no connection.
    """
    check_engine(engine)
    files = open_draft(draft, where)
    stored = stored_draft(files, own_code(files))
    found = verdict(engine_named(engine), stored)
    target = target or next(iter(targets_of(files)), None)
    if target is None:
        raise ValueError(
            f"Neither the card of {files.name} nor the catalogue says which target it was made for; pass target=..."
        )
    launch = Launch(files.name, target, where.get("revision"), _drafted(stored), stored)
    other = None if found.outcome == LOADS else _other_branch(files, engine, where)
    return Serving(tuple(LAUNCHES[engine](launch)), found, other)


def servings(folder: Path, name: str, target: str, revision: str) -> dict[str, Serving]:
    """Return how each engine serves a draft that is pushed, by the title of the engine.

    Args:
        folder: with the files of the branch.
        name, revision: of the repository and its branch, which the lines name.
    """
    files = open_draft(folder, {})
    stored = stored_draft(files, own_code(files))
    launch = Launch(name, target, revision, _drafted(stored), stored)
    found = {}
    for engine, lines in LAUNCHES.items():
        judged = verdict(engine_named(engine), stored)
        found[judged.engine.title] = Serving(tuple(lines(launch)), judged)
    return found


def _other_branch(files: DraftFiles, engine: str, where: dict[str, Any]) -> str | None:
    """Return the branch of ours whose draft this engine reads; None without one."""
    asked = where.get("revision") or "main"
    for branch in files.branches:
        if branch == asked:
            continue
        other = open_draft(files.name, where | {"revision": branch})
        if verdict(engine_named(engine), stored_draft(other, ())).outcome == LOADS:
            return branch
    return None
