# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What stands on the screen: results on stdout, notes and progress on stderr, and of other libraries nothing.

`--verbose` shows what they write, too, and `--quiet` leaves the results alone.
"""

import functools
import inspect
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress


def _screen(stderr: bool) -> Console:
    """Return a console; logs of a CI show neither bars, spinners nor colours, elsewhere the terminal decides."""
    if os.environ.get("CI"):
        return Console(stderr=stderr, force_interactive=False, color_system=None)
    return Console(stderr=stderr)


console = _screen(stderr=False)
"""Results, on stdout."""
notes = _screen(stderr=True)
"""Progress, and what a result alone does not tell, on stderr; silent with `--quiet`."""
errors = _screen(stderr=True)
"""Errors, on stderr."""

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also show what torch and transformers write.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show results only, and errors.")]

_PACKAGE = __name__.partition(".")[0]
_SILENT = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_LOGS": "-all", "TQDM_DELAY": "2"}
"""Variables that these libraries read when they are imported; bars are shown of what takes longer than two seconds."""
SECONDS_OF_A_LINE = 10.0
"""Between two lines that say how far rows are."""
_given: dict[str, Any] = {"verbose": False, "quiet": False, "loud": False, "words": str}
"""Whether each option stands before the name of the command, whether libraries may write, and the words of warnings."""
_set_here: set[str] = set()
"""Variables of the environment that are not the user's."""


def duration(seconds: float) -> str:
    """Return a duration in one or two units, as text."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def rows_progress() -> "Progress":
    """Return a progress bar for rows: how many of how many, and the time."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=notes, disable=not notes.is_interactive)


def counted(number: int, what: str) -> str:
    """Return a number of things as text, such as 1 row or 2,000 rows."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def hanging(out: Console, text: str, lead: str, style: str = "") -> None:
    """Print sentences after `lead`: on a terminal wrapped between words, each line below the first; else one line."""
    lines = [text]
    if out.is_terminal:
        lines = textwrap.wrap(
            text,
            max(out.width - len(lead), 20),
            break_long_words=False,
            break_on_hyphens=False,
        )
    for number, line in enumerate(lines):
        start = lead if number == 0 else " " * len(lead)
        out.print(start + line, style=style, markup=False, highlight=False, soft_wrap=True)


class RowLines:
    """Print how many rows are done, a line now and then, where no bar can be shown.

    Args:
        total: rows; None where that is not known.
        what: is done with them.
    """

    def __init__(self, total: int | None, what: str):
        self.total, self.what = total, what
        self.started = self.last = time.perf_counter()
        self.first: int | None = None

    def tell(self, done: int, more: str = "") -> None:
        """Print a line, if the last one is some seconds old.

        Args:
            done: rows that are done.
            more: what else is to be said.
        """
        now = time.perf_counter()
        self.first = done if self.first is None else self.first
        if notes.is_interactive or now - self.last < SECONDS_OF_A_LINE:
            return
        self.last = now
        line = f"{self.what}: {done:,} rows"
        if self.total is not None:
            line = f"{self.what}: {done:,} of {self.total:,} rows"
            rate = (done - self.first) / (now - self.started)
            line += f", {duration((self.total - done) / rate)} left" if rate else ""
        prose(notes, line + more, "dim", markup=False)


def variables() -> dict[str, str]:
    """Return the user's environment."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}


def is_verbose() -> bool:
    """Return whether everything is to be seen."""
    return _given["loud"]


def set_level(verbose: bool, quiet: bool) -> None:
    """Hold what stands before the name of the command."""
    _given.update(verbose=verbose, quiet=quiet)


def with_levels(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes `--verbose` and `--quiet`, and runs on a screen of that level."""

    @functools.wraps(command)
    def run(*args: Any, verbose: bool = False, quiet: bool = False, **options: Any) -> None:
        with screen(verbose or _given["verbose"], quiet or _given["quiet"]):
            command(*args, **options)

    added = {"verbose": Verbose, "quiet": Quiet}
    signature = inspect.signature(command)
    parameters = list(signature.parameters.values())
    for name, kind in added.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        )
    run.__annotations__ = {**command.__annotations__, **added}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


@contextmanager
def screen(verbose: bool, quiet: bool) -> Iterator[None]:
    """Show in this context what the level allows.

    Raises:
        ValueError: both are given.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet are given together; leave out one of them.")
    with ExitStack() as stack:
        stack.enter_context(_attribute(notes, "quiet", quiet))
        _given["loud"] = verbose
        if not verbose:
            stack.enter_context(_silent_libraries())
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop warnings of other libraries in this context, and show ours in one line."""
    silent = dict(_SILENT)
    if not notes.is_interactive or notes.quiet:
        silent["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        silent["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    added = {name: value for name, value in silent.items() if name not in os.environ}
    os.environ.update(added)
    _set_here.update(added)
    handler = logging.lastResort  # of loggers without one, as torchao's and ours
    if handler is not None:
        handler.addFilter(_is_shown)
    try:
        with _attribute(warnings, "showwarning", _show_warning):
            yield
    finally:
        if handler is not None:
            handler.removeFilter(_is_shown)
        for name in added:
            os.environ.pop(name, None)
            _set_here.discard(name)


def _is_shown(record: logging.LogRecord) -> bool:
    """Return whether a record is an error, or ours."""
    ours = record.name.partition(".")[0] == _PACKAGE
    return record.levelno >= logging.ERROR or (ours and not notes.quiet)


def _show_warning(message: Any, *args: Any, **kwargs: Any) -> None:
    """Show a warning that a file of this package gives, in the words of the command line."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    if module.partition(".")[0] == _PACKAGE:
        note(_given["words"](str(message)))


def in_words(change: Callable[[str], str]) -> None:
    """Set how warnings of this package are put in the words of the command line."""
    _given["words"] = change


def note(text: str) -> None:
    """Print a remark on stderr, whatever its characters."""
    prose(notes, f"[yellow]Note:[/yellow] {escape(text)}")


def prose(out: Console, text: str, style: str = "", markup: bool = True) -> None:
    """Print sentences: wrapped between words on a terminal, which would break them anywhere; else one line each."""
    out.print(text, style=style, markup=markup, highlight=False, soft_wrap=not out.is_terminal)


class _NoStatus:
    """Stand for a spinner where none is shown."""

    def __enter__(self) -> "_NoStatus":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def update(self, what: str) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


def doing(what: str) -> Any:
    """Return a spinner beside `what`, as a context; without a terminal, one that is not shown."""
    return notes.status(escape(what)) if notes.is_interactive else _NoStatus()


def hide_bars(downloads: bool = True) -> None:
    """Turn the bars of transformers off, which show the loading of weights; it imports transformers.

    Args:
        downloads: whether bars of downloads stay, on a terminal. They would break what redraws its own line.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if _given["loud"]:
        return
    transformers_logging.disable_progress_bar()
    hidden = notes.quiet or not notes.is_interactive or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    if downloads and not hidden:
        enable_progress_bars()
