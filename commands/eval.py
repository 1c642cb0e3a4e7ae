# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub eval`: compare decoding plainly, with drafts and by other methods, on the same prompts."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .built_in import OF_DRAFT, OF_TARGET, draft_named, target_named
from .eval_models import Choice, Loader, against_of
from .eval_table import show_differences, show_results, watching
from .preflight import Problems, check_folder_to_write
from .screen import note, notes, prose
from .shared import (
    Capture,
    Device,
    Dtype,
    NewTokens,
    Proposal,
    complete_draft,
    complete_target,
    console,
    tidy_when_terminated,
)

if TYPE_CHECKING:
    from ..evaluation.decoding import Models
    from ..evaluation.run import Evaluation, Settings
    from ..evaluation.scores import Score


def evaluate(
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Hub id or folder of the target; {OF_TARGET}.",
            autocompletion=complete_target,
            callback=target_named,
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id (or id@revision) or folder of a draft; may be repeated (default: the known draft). "
            f"{OF_DRAFT}.",
            autocompletion=complete_draft,
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="A JSONL file, or built-in, gsm8k, math500, humaneval, mbpp, mt-bench, spec-bench, "
            "speculator-benchmarks, speed-bench."
        ),
    ] = "built-in",
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for report.json; an evaluation in it is gone on with."),
    ] = None,
    max_new_tokens: NewTokens = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use this many prompts, of all categories in turn.")
    ] = None,
    block_size: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Block size of the drafts; may be repeated (default: their own)."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, help="0 is greedy; may be repeated (default: 0).")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows at once; may be repeated (default: 1).")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Bring prompts to this many tokens; may be repeated."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Other methods, with commas: plain-static, transformers, transformers-static, prompt-lookup, "
            "or the Hub id of an assistant."
        ),
    ] = "",
    chat_template: Annotated[
        bool | None,
        typer.Option(help="Apply the target's chat template (default: if it has one)."),
    ] = None,
    thinking: Annotated[
        str | None, typer.Option(help="on or off, for chat templates that know it.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Decodes of each prompt in each way.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise, with a temperature (default: 0).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    capture: Capture = "auto",
    proposal: Proposal = "chain",
    float32_check: Annotated[
        bool, typer.Option(help="Decode in float32 again what differs, if it fits.")
    ] = True,
    update_card: Annotated[
        bool,
        typer.Option(
            "--update-card", help="Write the figures into the cards of drafts in folders."
        ),
    ] = False,
    eval_results: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="DATASET TASK FIGURE",
            help="With --update-card: write acceptance_length, speedup or tokens_per_second as the score of this "
            "benchmark of the Hub into .eval_results. It must rank that.",
        ),
    ] = None,
    pngs: Annotated[
        bool,
        typer.Option("--pngs", help="Draw the charts as PNG files too (needs dflash-hub[plots])."),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare two reports, files or folders; evaluates nothing."),
    ] = None,
) -> None:
    """Decode the same prompts plainly and with each draft, in turn; report what is faster and what is exact."""
    problems = Problems()
    if compare is not None:
        problems.raise_all()
        compare_reports(*compare)
        return
    for flag, value in (("--target", target), ("--output-dir", output_dir)):
        if value is None:
            problems.add(f"{flag} is missing; it may be left out with --compare only.")
    named = [(str(draft_named(one)), one) for one in draft or []]
    choice = Choice(
        target or "",
        [name for name, _ in named],
        block_size or [],
        problems.check(against_of, against) or [],
        dtype,
        device,
        capture,
        proposal,
        dict(named),
    )
    asked = Asked(
        choice,
        prompts,
        output_dir or Path(),
        (temperature or [0.0], batch_size or [1], context or []),
        chat_template,
        problems.check(thinking_of, thinking),
    )
    asked.counts.update(max_new_tokens=max_new_tokens, repeats=repeats, seed=seed or 0, limit=limit)
    asked.counts["float32_check"] = float32_check
    if seed is not None and not any(temperature or []):
        problems.add(
            "--seed would change nothing, since all text is greedy; pass a --temperature above 0, or leave it out."
        )
    score = problems.check(score_of, eval_results, prompts, update_card)
    _check(asked, update_card, problems)
    problems.raise_all()
    report = run(asked)
    if pngs:
        _draw(report, asked.output_dir)
    if update_card:
        _write_cards(report, score)
    if has_failed(report):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Asked:
    """Hold what is to be evaluated.

    Args:
        prompts: name or file.
        output_dir: of the report.
        grid: temperatures, batch sizes and contexts.
        chat_template: whether to apply it; None for if there is one.
        thinking: whether to think; None to leave it to the target.
        counts: further fields of `Settings`.
    """

    choice: Choice
    prompts: str
    output_dir: Path
    grid: tuple[list[float], list[int], list[int]]
    chat_template: bool | None
    thinking: bool | None
    counts: dict[str, Any] = field(default_factory=dict)


def _check(asked: Asked, update_card: bool, problems: Problems) -> None:
    """Collect what cannot be evaluated, before anything is loaded."""
    from ..evaluation.prompts import load_prompts
    from ..evaluation.ways import conditions

    problems.check(check_folder_to_write, asked.output_dir, "--output-dir")
    if update_card:
        problems.check(_check_cards, asked.choice)
    asked.choice.check(conditions(*asked.grid), problems)
    problems.check(load_prompts, asked.prompts, asked.counts["limit"])


def _draw(report: dict[str, Any], folder: Path) -> None:
    """Draw the charts as files."""
    from ..evaluation.pngs import write_pngs

    for path in write_pngs(report, folder / "charts"):
        console.print(f"Chart: {path}", soft_wrap=True, highlight=False)


def _write_cards(report: dict[str, Any], score: "Score | None") -> None:
    """Write the figures into the cards of drafts in folders."""
    from ..evaluation.card import update_cards

    for path in update_cards(report):
        console.print(f"Card: {path}", soft_wrap=True, highlight=False)
    write_score(report, score)


def _check_cards(choice: Choice) -> None:
    """Refuse drafts whose cards cannot be updated, and figures that do not stand on cards."""
    from ..evaluation.card import check_folders

    if choice.proposal != "chain":
        raise ValueError(
            f"--update-card goes with --proposal chain, and --proposal is {choice.proposal!r}: the figures of a card "
            "are those of the draft alone."
        )
    check_folders(choice.drafts)


def run(asked: Asked) -> dict[str, Any]:
    """Load everything, evaluate, and show the results; return the report."""
    from ..evaluation.encoding import Encoding
    from ..evaluation.prompts import load_prompts
    from ..evaluation.run import Evaluation
    from ..evaluation.ways import conditions, grid
    from ..training.locks import sole_writer

    folder = asked.output_dir
    prompt_set = load_prompts(asked.prompts, asked.counts["limit"])
    loader = Loader(asked.choice)
    tokenizer = loader.tokenizer()
    applies = asked.chat_template
    if applies is None:
        applies = bool(getattr(tokenizer, "chat_template", None))
    with sole_writer(folder, folder / ".lock", "--output-dir"), tidy_when_terminated():
        models = loader.models()
        evaluation = Evaluation(
            models,
            grid(loader.draftings(models), conditions(*asked.grid)),
            prompt_set,
            Encoding(tokenizer, applies, asked.thinking),
            _settings(asked, loader, models, applies),
            folder,
            loader.in_float32,
        )
        try:
            with watching() as watch:
                report = evaluation.run(watch)
        except KeyboardInterrupt:
            _tell_interrupted(evaluation)
            raise typer.Exit(130) from None
    show_results(report, evaluation.report.path)
    _tell_resumed(evaluation, report["environment"]["date"])
    return report


def _settings(asked: Asked, loader: Loader, models: "Models", applies: bool) -> "Settings":
    """Return what is evaluated and how, as the report says it.

    Args:
        applies: whether the chat template is applied.
    """
    from ..compat_dflash import attention_name
    from ..evaluation.run import Settings

    target, choice = models.target, asked.choice
    return Settings(
        choice.target,
        asked.prompts,
        target_revision=loader.revision(target),
        chat_template=applies,
        thinking=asked.thinking,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        attention=attention_name(target.config),
        capture=choice.capture,
        proposal=choice.proposal,
        warm_up=3 if choice.capture == "compile" else 1,
        command=" ".join(["dflash-hub", *sys.argv[1:]]),
        **asked.counts,
    )


def _tell_resumed(evaluation: "Evaluation", date: str) -> None:
    """Note how many figures are not new: those that the folder held."""
    resumed = evaluation.report.resumed
    if resumed:
        note(
            f"{resumed} of {evaluation.total} decodes were in {evaluation.report.folder} already, from {date[:16]}. "
            "Pass another --output-dir to measure all anew."
        )


def _tell_interrupted(evaluation: "Evaluation") -> None:
    """Print what an evaluation that was ended by Ctrl-C has left."""
    done, total = len(evaluation.report.records), evaluation.total
    console.print(
        f"Stopped after {done} of {total} decodes. {evaluation.report.path} is a report of them; the same command goes "
        "on.",
        soft_wrap=True,
    )


def score_of(words: tuple[str, str, str] | None, prompts: str, update_card: bool) -> "Score | None":
    """Return what `--eval-results` names.

    Raises:
        ValueError: it would be a false score, or `--update-card` is missing.
    """
    from ..evaluation.scores import Score

    if words is None:
        return None
    if not update_card:
        raise ValueError("--eval-results goes with --update-card; add that.")
    score = Score(*words)
    score.check(prompts)
    return score


def write_score(report: dict[str, Any], score: "Score | None") -> None:
    """Write the score beside the cards, or say why there is none."""
    from ..evaluation.scores import NOTHING_WRITTEN, write_scores

    if score is None:
        console.print(NOTHING_WRITTEN, soft_wrap=True, highlight=False)
        return
    for path in write_scores(report, score):
        console.print(f"Score: {path}", soft_wrap=True, highlight=False)


def has_failed(report: dict[str, Any]) -> bool:
    """Return whether a text differs by a bug, or plain decoding or a draft failed with every prompt.

    What another method cannot do on this machine is a row that says so.
    """
    from ..evaluation.divergence import BUG
    from ..evaluation.ways import DFLASH, PLAIN

    for result in report["results"]:
        is_ours = report["ways"][result["way"]]["method"] in (PLAIN, DFLASH)
        if result["verdicts"].get(BUG) or (is_ours and result["tokens_per_second"] is None):
            return True
    return False


def thinking_of(word: str | None) -> bool | None:
    """Return what `--thinking` means.

    Raises:
        ValueError: it is neither on nor off.
    """
    if word not in (None, "on", "off"):
        raise ValueError(f"--thinking is {word!r}; it must be on or off.")
    return None if word is None else word == "on"


def compare_reports(first: Path, second: Path) -> None:
    """Show how the second of two reports differs from the first."""
    from ..evaluation.differences import differences, unlike
    from ..evaluation.report import read_report

    reports = [read_report(path) for path in (first, second)]
    prose(notes, f"first: {first}; second: {second}", "dim", markup=False)
    show_differences(differences(*reports), unlike(*reports))
