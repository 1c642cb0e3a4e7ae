# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub eval`: compare decoding plainly, with drafts and by other methods, on the same prompts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .eval_models import Choice, Loader, against_of
from .eval_table import show_differences, show_results, watching
from .preflight import Problems, check_folder_to_write
from .shared import Capture, Device, Dtype, NewTokens, Proposal, console, tidy_when_terminated

if TYPE_CHECKING:
    from ..evaluation.scores import Score


def evaluate(
    target: Annotated[str | None, typer.Option(help="Hub id or folder of the target.")] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id (or id@revision) or folder of a draft; may be repeated (default: the known draft)."
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
    seed: Annotated[int, typer.Option(help="Of the noise, with a temperature.")] = 0,
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
    if compare is not None:
        compare_reports(*compare)
        return
    from ..evaluation.prompts import load_prompts

    if target is None or output_dir is None:
        missing = "--target" if target is None else "--output-dir"
        raise ValueError(f"{missing} is missing; it may be left out with --compare only.")
    problems = Problems()
    choice = Choice(
        target,
        draft or [],
        block_size or [],
        problems.check(against_of, against) or [],
        dtype,
        device,
        capture,
        proposal,
    )
    conditions = (temperature or [0.0], batch_size or [1], context or [])
    encoding = (chat_template, problems.check(thinking_of, thinking))
    counts = {"max_new_tokens": max_new_tokens, "repeats": repeats, "seed": seed, "limit": limit}
    counts["float32_check"] = float32_check
    problems.check(check_folder_to_write, output_dir, "--output-dir")
    if update_card:
        problems.check(_check_cards, choice)
    score = problems.check(score_of, eval_results, prompts, update_card)
    choice.check(_conditions(conditions), problems)
    problems.check(load_prompts, prompts, limit)
    problems.raise_all()
    report = run(choice, conditions, prompts, encoding, output_dir, counts)
    if pngs:
        from ..evaluation.pngs import write_pngs

        for path in write_pngs(report, output_dir / "charts"):
            console.print(f"Chart: {path}", soft_wrap=True, highlight=False)
    if update_card:
        from ..evaluation.card import update_cards

        for path in update_cards(report):
            console.print(f"Card: {path}", soft_wrap=True, highlight=False)
        write_score(report, score)
    if has_failed(report):
        raise typer.Exit(1)


def _check_cards(choice: Choice) -> None:
    """Refuse drafts whose cards cannot be updated, and figures that do not stand on cards."""
    from ..evaluation.card import check_folders

    if choice.proposal != "chain":
        raise ValueError(
            f"--update-card goes with --proposal chain, and --proposal is {choice.proposal!r}: the figures of a card "
            "are those of the draft alone."
        )
    check_folders(choice.drafts)


def _conditions(values: tuple[list[float], list[int], list[int]]) -> list[Any]:
    """Return the conditions of these temperatures, batch sizes and contexts."""
    from ..evaluation.ways import conditions

    return list(conditions(*values))


def run(
    choice: Choice,
    grid_values: tuple[list[float], list[int], list[int]],
    prompts: str,
    template: tuple[bool | None, bool | None],
    output_dir: Path,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Load everything, evaluate, and show the results; return the report.

    Args:
        grid_values: temperatures, batch sizes and contexts.
        template: whether to apply the chat template, and whether to think; None to leave it to the target.
        counts: further fields of `Settings`.
    """
    from ..compat_dflash import attention_name
    from ..evaluation.encoding import Encoding
    from ..evaluation.prompts import load_prompts
    from ..evaluation.run import Evaluation, Settings
    from ..evaluation.ways import conditions, grid
    from ..training.locks import sole_writer

    found = conditions(*grid_values)
    prompt_set = load_prompts(prompts, counts["limit"])
    loader = Loader(choice)
    tokenizer = loader.tokenizer()
    applies = template[0]
    if applies is None:
        applies = bool(getattr(tokenizer, "chat_template", None))
    encoding = Encoding(tokenizer, applies, template[1])
    with sole_writer(output_dir, output_dir / ".lock", "--output-dir"), tidy_when_terminated():
        models = loader.models()
        settings = Settings(
            choice.target,
            prompts,
            target_revision=loader.revision(models.target),
            chat_template=applies,
            thinking=template[1],
            dtype=str(models.target.dtype).removeprefix("torch."),
            device=str(models.target.device),
            attention=attention_name(models.target.config),
            capture=choice.capture,
            proposal=choice.proposal,
            warm_up=3 if choice.capture == "compile" else 1,
            command=" ".join(["dflash-hub", *sys.argv[1:]]),
            **counts,
        )
        ways = grid(loader.draftings(models), found)
        evaluation = Evaluation(
            models, ways, prompt_set, encoding, settings, output_dir, loader.in_float32
        )
        try:
            with watching() as watch:
                report = evaluation.run(watch)
        except KeyboardInterrupt:
            done, total = len(evaluation.report.records), evaluation.total
            console.print(
                f"Stopped after {done} of {total} decodes. {evaluation.report.path} is a report of them; the same "
                "command goes on.",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    show_results(report, evaluation.report.path)
    return report


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
    show_differences(differences(*reports), unlike(*reports))
