# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Show how far an evaluation is, its results, and how two differ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .built_in import name_of
from .screen import console, counted, notes, prose

if TYPE_CHECKING:
    from ..evaluation.run import Progress as EvaluationProgress

PLAIN = "plain"
COLUMNS = (
    "times plain: how many times as fast as plain decoding [95 % interval]; a cycle: tokens per pass of the target; "
    "identical: texts that plain decoding gives too; slower: prompts that took longer per token than plainly; floor: "
    "share of the time that reading weights and cache takes, and at 100 % nothing could be faster."
)
"""What the columns of the results mean."""
COMPARED = (
    "times as fast: tokens a second of the second by those of the first [95 % interval]; tokens/cycle more: what a "
    "pass of the target writes more in the second; same: prompts with the same text in both."
)
"""What the columns of a comparison mean."""


@contextmanager
def watching() -> Iterator[Callable[["EvaluationProgress"], None]]:
    """Show progress, time left and the results so far on stderr, while this context lasts."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
    )
    task = bar.add_task("loading", total=None)
    with Live(bar, console=notes, refresh_per_second=4, transient=True) as live:

        def watch(progress: "EvaluationProgress") -> None:
            words = progress.doing or "decoding"
            bar.update(task, completed=progress.done, total=progress.total, description=words)
            if progress.content:
                live.update(Group(results_table(progress.content), bar))

        yield watch


def show_results(report: dict[str, Any], path: Path) -> None:
    """Print the results and the recommendations."""
    settings, prompts = report["settings"], report["prompt_set"]
    prose(
        console,
        f"{escape(name_of(settings['target']))}, {settings['dtype']}, {report['environment']['hardware']}; "
        f"{counted(prompts['count'], 'prompt')} of {escape(prompts['name'])} (license: {prompts['license']}), "
        f"up to {settings['max_new_tokens']} new tokens; proposal: {settings['proposal']}",
    )
    console.print(results_table(report))
    prose(notes, COLUMNS, "dim", markup=False)
    for advice in report["recommendations"]:
        prose(console, escape(advice["words"]))
    for line in differing(report):
        prose(console, escape(line))
    console.print(f"Report: {path}", soft_wrap=True, highlight=False)


def results_table(report: dict[str, Any]) -> Table:
    """Return the table of all ways."""
    # Narrow enough for 80 columns, with room for names.
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("way", overflow="fold", min_width=13)
    for name in ("tokens/s", "times plain", "a cycle", "identical", "slower", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    conditions = [condition_of(report, way) for way in report["ways"]]
    for index, result in enumerate(report["results"]):
        condition = conditions[result["way"]]
        is_first = index == 0 or condition != conditions[report["results"][index - 1]["way"]]
        if is_first and len(set(conditions)) > 1:
            table.add_row(f"[bold]{escape(condition or 'greedy, one row')}[/bold]")
        table.add_row(escape(short_name(report["ways"][result["way"]], condition)), *cells(result))
    return table


def condition_of(report: dict[str, Any], way: dict[str, Any]) -> str:
    """Return the condition of a way in words, which its plain way's name has; empty for the usual one."""
    return report["ways"][way["baseline"]]["name"].removeprefix(PLAIN).removeprefix(", ")


def short_name(way: dict[str, Any], condition: str) -> str:
    """Return the name of a way without its condition, and with only the last two folders of a long path."""
    return shortened(way["name"].removesuffix(f", {condition}"))


def shortened(name: str) -> str:
    """Return the name of a way with only the last two folders of a long path."""
    parts = []
    for part in name.split(", "):
        folders = Path(part).parts
        parts.append("/".join(folders[-2:]) if len(folders) > 2 else part)
    return ", ".join(parts)


def cells(result: dict[str, Any]) -> list[str]:
    """Return the cells of a way's row, after its name."""
    speedup = result["speedup"]
    times = number(speedup and speedup["pooled"])
    if speedup and speedup["low"] is not None:
        times += f" [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    compared = result["identical"] + result["differing"]
    share = result["floor_share"]
    found = [number(result["tokens_per_second"], 1), times, number(result["acceptance_length"])]
    found.append(f"{result['identical']} of {compared}" if compared else "-")
    found.append(str(len(result["slower_than_plain"])) if speedup else "-")
    found.append("-" if share is None else f"{share:.0%}")
    if result["errors"]:
        found[-1] += f"  {result['errors']} failed"
    return found


def differing(report: dict[str, Any]) -> Iterator[str]:
    """Yield a line on the texts of each way that differ, and one on errors."""
    for result in report["results"]:
        name = report["ways"][result["way"]]["name"]
        if result["differing"]:
            words = [f"{count} {verdict}" for verdict, count in result["verdicts"].items()]
            yield (
                f"{name}: {result['differing']} texts differ ({', '.join(words)}; float32 check: "
                f"{report['float32_check']})."
            )
        if result["errors"]:
            own = [one for one in report["records"] if one["way"] == result["way"] and one["error"]]
            yield f"{name}: {result['errors']} decodes failed. The first: {own[0]['error']}"


def show_differences(found: Sequence[dict[str, Any]], unlike: Sequence[str]) -> None:
    """Print how two reports differ."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("first", "second"):
        table.add_column(name, overflow="fold", min_width=10)
    for name in ("prompts", "times as fast", "tokens/cycle more", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in found:
        length = entry["acceptance_length"]
        table.add_row(
            escape(shortened(entry["first"])),
            escape(shortened(entry["second"])),
            str(entry["prompts"]),
            with_interval(entry["speed"], "pooled"),
            with_interval(length, "difference") if length else "-",
            str(entry["same_texts"]),
        )
    console.print(table)
    prose(notes, COMPARED, "dim", markup=False)
    for words in unlike:
        prose(console, f"They also differ in this: {escape(words)}.")


def with_interval(figure: dict[str, Any], name: str) -> str:
    """Return a figure and its interval."""
    words = number(figure[name])
    return (
        words if figure["low"] is None else f"{words} [{figure['low']:.2f}, {figure['high']:.2f}]"
    )


def number(value: float | None, digits: int = 2) -> str:
    """Return a number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"
