# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write a figure as the score of a benchmark of the Hub: `.eval_results/*.yaml` in the folder of a draft.

The Hub shows what stands there in the leaderboard of the benchmark. So only a benchmark that ranks such figures can
take one, and only its owner's `eval.yaml` says what it ranks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import write_whole
from ..layouts_dflash import shown
from .card import drafts_of, measured_on, template_words
from .prompts import BENCHMARKS, BUILT_IN
from .ways import DFLASH

FOLDER = ".eval_results"
FIGURES = {
    "acceptance_length": "tokens per cycle",
    "speedup": "times as fast as plain decoding",
    "tokens_per_second": "tokens per second",
}
NOTHING_WRITTEN = (
    f"Nothing is written into {FOLDER}: the Hub shows it as a score in a benchmark's leaderboard. None that is known "
    "here ranks the speed of drafts; --eval-results names one that does."
)
_RANK_ANSWERS = ("gsm8k", "math500", "humaneval", "mbpp")
"""Benchmarks whose score is the share of right answers, which are the target's own."""


@dataclass(frozen=True)
class Score:
    """Name what is written as a score.

    Args:
        dataset: id of the benchmark on the Hub.
        task: id of the task in its `eval.yaml`.
        figure: one of `FIGURES`.
    """

    dataset: str
    task: str
    figure: str

    def check(self, prompts: str) -> None:
        """Refuse what would be a false score, before anything is decoded.

        Args:
            prompts: name of the prompts that are evaluated.

        Raises:
            ValueError: with what is wrong.
        """
        if self.figure not in FIGURES:
            raise ValueError(
                f"--eval-results has the figure {shown(self.figure)}; it must be one of {', '.join(FIGURES)}."
            )
        if self.dataset in [BENCHMARKS[name].repository for name in _RANK_ANSWERS]:
            raise ValueError(
                f"{self.dataset} ranks the share of right answers, so {self.figure} would be a false score there. Name "
                "a benchmark whose eval.yaml is of speed or acceptance, or leave out --eval-results."
            )
        source = source_of(prompts)
        if source != self.dataset and not Path(prompts).is_file():
            raise ValueError(
                f"--eval-results names {self.dataset}, but the prompts are {prompts}. Evaluate those of the benchmark: "
                f"--prompts {self.dataset}, or a file of them."
            )


def source_of(prompts: str) -> str | None:
    """Return the id of the dataset on the Hub that a name of prompts stands for; None for prompts of elsewhere."""
    name = prompts.partition(":")[0]
    if name == BUILT_IN or Path(prompts).is_file():
        return None
    return BENCHMARKS[name].repository if name in BENCHMARKS else name


def write_scores(report: dict[str, Any], score: Score) -> list[Path]:
    """Write the figure of every draft into the folder of its repository; scores of other tasks stay.

    Returns:
        The files.

    Raises:
        ValueError: a draft has no such figure; or the file is no list of scores.
    """
    found = []
    for draft in drafts_of(report):
        path = Path(draft) / FOLDER / f"{score.dataset.rpartition('/')[2]}.yaml"
        entries = [one for one in read_scores(path) if not is_of(one, score)]
        entries.append(entry_of(report, draft, score))
        path.parent.mkdir(exist_ok=True)
        write_whole(path, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode())
        found.append(path)
    return found


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return the scores of a file; none if there is no file.

    Raises:
        ValueError: it is no list of scores.
    """
    if not path.exists():
        return []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{path} is {shown(found)}; a list of scores is expected. Remove it.")
    return found


def is_of(entry: dict[str, Any], score: Score) -> bool:
    """Return whether an entry is the score of the same task."""
    dataset = entry.get("dataset")
    if not isinstance(dataset, dict):
        return False
    return (dataset.get("id"), dataset.get("task_id")) == (score.dataset, score.task)


def entry_of(report: dict[str, Any], draft: str, score: Score) -> dict[str, Any]:
    """Return the entry of a draft: its fastest way, with everything that the figure depends on in the notes."""
    result = best_of(report, draft)
    value = result[score.figure] if result else None
    if score.figure == "speedup" and value:
        value = value["pooled"]
    if value is None:
        raise ValueError(f"{draft} has no {score.figure}, so nothing is written into {FOLDER}.")
    way = report["ways"][result["way"]]
    conditions = f"block {way['block_size']}, temperature {way['temperature']:g}, batches of {way['batch_size']}"
    notes = (
        f"{FIGURES[score.figure]}; {measured_on(report)}; {conditions}, up to "
        f"{report['settings']['max_new_tokens']} new tokens{template_words(report['settings'])}"
    )
    return {
        "dataset": {"id": score.dataset, "task_id": score.task},
        "value": round(value, 4),
        "date": report["environment"]["date"],
        "notes": notes,
    }


def best_of(report: dict[str, Any], draft: str) -> dict[str, Any]:
    """Return the result of a draft's way that is most times as fast as plain decoding; empty if none was timed."""
    own = []
    for result in report["results"]:
        way = report["ways"][result["way"]]
        if way["method"] == DFLASH and way["draft"] == draft and result["speedup"]:
            own.append(result)
    return max(own, key=lambda result: result["speedup"]["pooled"], default={})
