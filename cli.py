# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The command `dflash-hub`: one thin command for each thing the package does."""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

if TYPE_CHECKING:
    from .evaluation import Comparison
    from .refresh import BranchDifference

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Target = Annotated[str, typer.Option(help="Hub id or folder of the target.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Budget of new tokens.")]
Capture = Annotated[
    str, typer.Option(help="How blocks run: auto, off, graphs (CUDA), or compile (half a minute first).")
]


def main() -> None:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    try:
        app()
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        Console(stderr=True).print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
        sys.exit(1)


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    import huggingface_hub
    import torch
    import transformers

    from .configuration_dflash import __version__

    modules = (torch, transformers, huggingface_hub)
    console.print(f"dflash-hub {__version__}", *(f"{m.__name__} {m.__version__}" for m in modules), sep=", ")


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 8,
    capture: Capture = "compile",
    variant: Annotated[str, typer.Option(help="Which of its two drafts: dflash2 or dflash.")] = "dflash2",
) -> None:
    """The built-in pair: the target's own text and DFlash's beside it. Offline; half a minute the first time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from .evaluation import compare, warm_up
    from .registry import load_draft

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # models this small gain nothing from more, and lose much where the cores are busy
    home = Path(__file__).parent / "examples" / "tiny_pair"
    tokenizer = AutoTokenizer.from_pretrained(home / "target")
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    kinds = {"dflash": ("draft", "DFlash"), "dflash2": ("draft2", "DFlash 2")}
    if variant not in kinds:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(kinds)}.")
    folder, kind = kinds[variant]
    draft = load_draft(home / folder)
    lines = (home / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:prompts]
    rows = [tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids[:, -150:] for line in lines]
    with console.status("Warming up; compiling takes half a minute, the first time"):
        warm_up(draft, target, rows[0], capture)
    results = [compare(draft, target, row, max_new_tokens=96, capture=capture) for row in rows]
    total = sum(results[1:], results[0])

    # A target this small often repeats itself; the most varied text shows most.
    shown = max(range(len(results)), key=lambda index: len({*results[index].plain[0]}))
    console.print(
        f"[bold]DFlash demo[/bold]: a target of {target.num_parameters():,} parameters that writes Python, ", end=""
    )
    console.print(f"and a {kind} draft of {draft.num_parameters():,} for it; greedy, {len(rows)} held-out prompts.\n")
    console.print(
        Panel(escape(tokenizer.decode(rows[shown][0, -60:])), title="... end of a prompt", border_style="dim")
    )
    side = Table(expand=True, show_lines=True)
    side.add_column("the target alone", ratio=1)
    side.add_column(f"the target with its {kind} draft", ratio=1)
    texts = [tokenizer.decode(list(row[0])) for row in (results[shown].plain, results[shown].dflash)]
    side.add_row(*map(escape, texts))
    console.print(side)
    show_figures(total)
    if not total.identical:
        fail_differing()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    target: Target,
    draft: Annotated[str | None, typer.Option(help="Hub id or folder of the draft; resolved if not given.")] = None,
    draft_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the draft.")] = None,
    max_new_tokens: NewTokens = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 ..., or auto for the target's own.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is if not given.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the target's chat template, if it has one.")] = True,
    capture: Capture = "auto",
) -> None:
    """Generate greedily with any target, streaming; then the target alone, and the figures of both."""
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from .evaluation import compare, warm_up

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load_target(target, dtype).to(device).eval()
    speculator = find_draft(model, draft, draft_revision).to(device).eval()
    row = encode(tokenizer, prompt, chat).to(device)
    warm_up(speculator, model, row, capture)
    result = compare(speculator, model, row, max_new_tokens, TextStreamer(tokenizer, skip_prompt=True), capture)
    console.print()
    show_figures(result)
    if not result.identical and model.dtype == torch.float32:
        fail_differing()
    if not result.identical:
        console.print(
            f"In {str(model.dtype).removeprefix('torch.')} a near-tie between two tokens falls by the number of tokens "
            "in a forward; --dtype float32 shows the texts without that."
        )


def load_target(name: str, dtype: str) -> Any:
    """The target's text model; where transformers has none for its config, the model that sees images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)


def find_draft(model: Any, draft: str | None, revision: str | None) -> Any:
    """The draft that was named, or the one that the registry knows for this target, in the target's dtype."""
    from .registry import explain_resolution, load_draft

    if draft is not None:
        return load_draft(draft, revision=revision, dtype=model.dtype)
    spec, why = explain_resolution(model.config.architectures, model)
    console.print(f"Draft: [bold]{spec.repo_id}[/bold]. {why}", style="dim")
    return spec.load(dtype=model.dtype)


def encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """`[1, P]` token ids."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


def show_figures(result: "Comparison") -> None:
    """Tokens per second of both, acceptance length, tokens per cycle, and whether the texts are identical."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("the target alone", f"{result.plain_rate:.1f} tokens/s")
    ratio = result.dflash_rate / result.plain_rate
    table.add_row("with DFlash", f"{result.dflash_rate:.1f} tokens/s ({ratio:.2f} times)")
    cycles = len(result.committed)
    table.add_row("acceptance length", f"{result.acceptance_length:.2f} tokens per cycle, over {cycles} cycles")
    console.print(table)
    console.print("\ntokens per cycle")
    most = max(result.histogram.values(), default=1)
    for tokens, count in result.histogram.items():
        console.print(f"  {tokens:>3} {'█' * max(1, round(40 * count / most))} {count}", highlight=False)
    verdict = "[green]identical[/green]" if result.identical else "[red]NOT identical[/red]"
    console.print(f"\nThe two texts are {verdict}.")


def fail_differing() -> None:
    """End with exit status 1, and say on stderr what a report of two differing texts needs."""
    import torch
    import transformers

    from .configuration_dflash import __version__

    Console(stderr=True).print(
        "[red]Error:[/red] The two texts differ, which in float32 they must not. Please report it, with the command "
        f"and these versions: dflash-hub {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        soft_wrap=True,
        highlight=False,
    )
    raise typer.Exit(1)


@app.command()
def drafts(
    target: Annotated[str | None, typer.Option(help="Only drafts made for this checkpoint.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Only drafts for targets of this architecture.")] = None,
) -> None:
    """List the published drafts that are known, and why some cannot be run."""
    from .registry import CATALOGUE, drafts_for

    found = drafts_for(target) if target else CATALOGUE
    found = [spec for spec in found if architecture is None or spec.serves(architecture)]
    if not found:
        raise ValueError(f"No draft is known for {target or architecture}; `dflash-hub drafts` lists all that are.")
    table = Table(title=f"{len(found)} DFlash drafts")
    for column in ("draft", "made for", "architecture", "block", "revision", "runs here"):
        table.add_column(column, overflow="fold")
    for spec in found:
        obstacle = spec.unsupported or (spec.target_state and f"loads, but {spec.target_state}")
        runs = f"no: {obstacle}" if obstacle else "yes" + (f" ({spec.note})" if spec.note else "")
        made_for = "\n".join(spec.targets) or "not known"
        block = str(spec.details.get("block_size") or "?")
        revision = (spec.revision or "newest")[:8]
        table.add_row(spec.repo_id, made_for, "\n".join(spec.architectures), block, revision, runs)
    console.print(table)


@app.command()
def resolve(target: Annotated[str, typer.Argument(help="Hub id or folder of the target.")]) -> None:
    """Show which draft would be loaded for a target, and why."""
    from .registry import explain_resolution

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reason is printed anyway
        spec, why = explain_resolution(target=target)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("target", target)
    table.add_row("draft", f"[bold]{spec.repo_id}[/bold]" + (f", folder {spec.subfolder}" if spec.subfolder else ""))
    table.add_row("revision", spec.revision or "the newest; no commit is known to pin")
    table.add_row("class", spec.draft_cls.__name__)
    table.add_row("made for", ", ".join(spec.targets) or "not known")
    table.add_row("architectures", ", ".join(spec.architectures) or "not known")
    table.add_row("why", why)
    decodes = f"no: {spec.target_state}" if spec.target_state else ""
    for name, value in (
        ("decodes", decodes),
        ("note", spec.note),
        ("access", "gated: ask for it on the Hub" if spec.gated else ""),
    ):
        if value:
            table.add_row(name, value)
    console.print(table)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a draft: --target ID --data FILE_OR_DATASET --output-dir DIR, and the Trainer's own options (--help)."""
    from .training.command import train

    train(context.args)


@app.command()
def regenerate(
    target: Target,
    data: Annotated[str, typer.Option(help="A file or a Hub dataset with messages or text.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; one that is there is gone on with.")],
    server: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, such as http://host:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The target's name there; the first it lists if not given.")] = None,
    max_new_tokens: NewTokens = 2048,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; the target's own if not given.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of plain text, how much is kept as the prompt.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Rows asked for at once, of a server.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    data_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    data_split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    streaming: Annotated[bool, typer.Option(help="Read the data as it comes.")] = False,
) -> None:
    """Rewrite a dataset's answers with the target's own, through a server or in this process; resumable."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .training.data import load_rows
    from .training.regenerate import Answer, Asking, InProcess, Server, check_columns
    from .training.regenerate import regenerate as run

    tokenizer = AutoTokenizer.from_pretrained(target)
    asking = Asking(max_new_tokens, temperature, prompt_tokens)
    rows = load_rows(data, data_name, data_split, streaming)
    rows = rows if limit is None else rows.take(limit)
    check_columns(rows)
    if server is not None:
        answer: Answer = Server(server, tokenizer, asking, model)
    else:
        answer = InProcess(AutoModelForCausalLM.from_pretrained(target, dtype="auto"), tokenizer, asking)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=len(rows) if hasattr(rows, "__len__") else None)

        def report(done: int, failed: int) -> None:
            progress.update(task, completed=done, description=f"rows, {failed} failed" if failed else "rows")

        done, failed = run(rows, output, answer, workers if server else 1, report)
    console.print(f"[bold]{output}[/bold] holds {done:,} rows.")
    if failed:
        console.print(f"{len(failed)} rows failed, and are tried again by the same command: {escape(failed[0])}")
        raise typer.Exit(1)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Folder of the draft, in any layout.")],
    repo: Annotated[str, typer.Argument(help="Repository to push to, such as me/my-draft.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the target, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0, for the card.")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload DFlash draft",
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="A token that may write.")] = None,
) -> None:
    """Stage a draft, check it in a fresh process, push the hub layout to main and the engines layout to `engines`."""
    from transformers.utils import logging

    from .publishing import PublishOptions, publish

    logging.disable_progress_bar()
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder; pass the folder that holds the draft's config.json.")
    card = {key: value for key, value in {"base_model": base_model, "license": license}.items() if value}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Starting", total=None)
        options = PublishOptions(private=private or None, token=token, message=message, card=card)
        done = publish(directory, repo, options, report=lambda step: progress.update(task, description=step))
        progress.update(task, description="Published", total=1, completed=1)
    console.print(
        f"\n[bold]{done.repo_id}[/bold] is published: main at {done.commit[:8]}, engines at {done.engines_commit[:8]}."
    )
    console.print("Load this very commit:\n")
    console.print(Syntax(done.snippet, "python", background_color="default"))


@app.command()
def refresh(
    repo: Annotated[str, typer.Argument(help="Repository that was pushed before, such as me/my-draft.")],
    diff: Annotated[bool, typer.Option("--diff", help="Show the unified diff too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference, and stop there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Push without asking.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="A token that may write.")] = None,
) -> None:
    """Bring the code of a pushed draft to this version; weights, config and card stay as they are."""
    from transformers.utils import logging

    from .refresh import RefreshOptions
    from .refresh import refresh as run

    logging.disable_progress_bar()
    options = RefreshOptions(token=token, dry_run=dry_run)
    options.message = message or options.message
    with console.status("Starting") as status:

        def agree(branches: "tuple[BranchDifference, ...]") -> bool:
            status.stop()
            show_difference(branches, diff)
            if not yes and not sys.stdin.isatty():
                raise ValueError(
                    "Nothing was pushed: there is no terminal to ask on. Pass --yes to push without being asked."
                )
            agreed = yes or typer.confirm(f"Push this to {repo}?", abort=True)
            status.start()
            return agreed

        done = run(repo, options, agree, report=status.update)
    if dry_run:
        show_difference(done.branches, diff)
        console.print("Nothing was pushed (--dry-run).")
    elif not done.commits:
        show_difference(done.branches, diff)
        console.print("Nothing to push.")
    for branch, commit in done.commits.items():
        console.print(f"[bold]{escape(repo)}[/bold]: {branch} is at {commit[:8]}.", highlight=False, soft_wrap=True)


def show_difference(branches: "tuple[BranchDifference, ...]", diff: bool) -> None:
    """File by file, what would change on each branch; with `diff` the lines too."""
    from .configuration_dflash import __version__

    for found in branches:
        if found.changes:
            what = f"dflash-hub {found.version} becomes {__version__}"
        else:
            what = f"the code is that of dflash-hub {__version__} already"
        console.print(f"[bold]{found.branch}[/bold] at {found.commit[:8]}: {escape(what)}", highlight=False)
        for change in found.changes:
            added, removed = change.lines
            counts = f"+{added}/-{removed} lines"
            console.print(f"  {change.kind:<8} {escape(change.path)} {counts}", highlight=False, soft_wrap=True)
        if diff:
            console.print(
                "".join(change.diff for change in found.changes), markup=False, highlight=False, soft_wrap=True
            )
    if "engines" not in [found.branch for found in branches]:
        console.print("There is no branch engines; it is main alone that is refreshed.")
