# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub generate`: answer a prompt, or hold a conversation, with a target and its draft."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .built_in import TARGET, TEMPLATE
from .loading import checked_tokenizer, load_pair, load_target
from .preflight import (
    Problems,
    check_capture,
    check_device,
    check_draft,
    check_dtype,
    check_proposal,
    device_of,
    read_text,
)
from .screen import note, notes, prose
from .shared import (
    Capture,
    Device,
    Draft,
    DraftRevision,
    Dtype,
    NewTokens,
    Proposal,
    Target,
    Width,
    fail_differing,
)

if TYPE_CHECKING:
    from .answers import Answer, Answerer


_SAMPLES = ("--temperature is", "--top-p is", "--top-k is")
"""How what is wrong with values of options that sample begins."""
_CHAT_HELP = "Ctrl-C ends an answer, Ctrl-D or /exit the conversation; /clear forgets it."


def generate(
    target: Target,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)
    ] = None,
    draft: Draft = None,
    draft_revision: DraftRevision = None,
    file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Hold a conversation; a prompt is its first message.")
    ] = False,
    chat_template: Annotated[
        bool | None,
        typer.Option(help="Apply the target's chat template (default: if it has one)."),
    ] = None,
    chat_template_file: Annotated[
        Path | None, typer.Option(help="A file with a chat template, in place of the target's.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy, the default; above, text is sampled.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the likeliest of this mass.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampled text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Then run the target alone: measure its speed, compare the texts."
        ),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    capture: Capture = "auto",
    proposal: Proposal = "auto",
    width: Width = None,
) -> None:
    """Answer a prompt and stream the text; the line below it says how fast, and how often the draft was right."""
    from .answers import Answerer, Sampling

    sampling = Sampling(temperature, top_p, top_k, seed, tuple(stop or ()))
    problems = Problems()
    text = problems.check(_prompt, prompt, file, chat)
    # A value that is refused stands as if it were not given, so what it would contradict is not known.
    is_read = not any(one.startswith(_SAMPLES) for one in problems.found)
    if is_read and (contradiction := sampling.problem()) is not None:
        problems.add(contradiction)
    if compare and chat:
        problems.add("--compare is for one prompt; leave out --chat or --compare.")
    problems.check(check_dtype, dtype)
    problems.check(check_device, device)
    problems.check(check_capture, capture)
    problems.check(check_proposal, proposal, width)
    problems.check(check_draft, draft, draft_revision)
    asked = Template(chat_template, chat_template_file, chat, system)
    tokenizer, template = asked.check(target, problems)
    problems.raise_all()

    messages = [] if system is None else [{"role": "system", "content": system}]
    row = None if text is None else _encoded(tokenizer, messages, text, template)
    model = load_target(target, dtype).to(device_of(device)).eval()
    pair = load_pair(model, draft, draft_revision)
    pair.draft.to(model.device).eval()
    answerer = Answerer(pair, tokenizer, sampling, capture)
    answerer.proposing = {"proposal": proposal, "width": width}
    if chat or row is None:
        _converse(answerer, messages, text, max_new_tokens)
    else:
        _once(answerer, row.to(model.device), str(text), max_new_tokens, compare)


def _encoded(tokenizer: Any, messages: list[dict[str, str]], text: str, template: bool) -> Any:
    """Return the token ids of a prompt after these messages, `[1, P]`."""
    from .answers import encode

    return encode(tokenizer, [*messages, {"role": "user", "content": text}], template)


def _prompt(prompt: str | None, file: Path | None, chat: bool) -> str | None:
    """Return the prompt: as given, of a file or of stdin; None for a conversation that begins without one.

    Raises:
        ValueError: it is given twice, not at all, empty, or cannot be read.
    """
    if prompt is not None and file is not None:
        raise ValueError("The prompt is given twice, as an argument and by --file; leave out one.")
    if prompt is None and file is None:
        if chat:
            return None
        if sys.stdin.isatty():
            raise ValueError("The prompt is missing; pass it, - for stdin, --file or --chat.")
        prompt = "-"
    if prompt == "-" and chat:
        raise ValueError("- reads the prompt from stdin, which --chat reads too; leave out one.")
    try:
        text = prompt
        if file is not None:
            text = file.read_text(encoding="utf-8")
        elif prompt == "-":
            text = sys.stdin.read()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"The prompt cannot be read from {file or 'stdin'}: {reason}.") from error
    if not text or not text.strip():
        raise ValueError("The prompt is empty; write something in it.")
    return text


@dataclass(frozen=True)
class Template:
    """Hold what is asked for of the chat template.

    Args:
        asked: whether to apply it; None for if there is one.
        file: with a template in place of the target's; None for that.
        chat: whether a conversation is held.
        system: its system message; None for none.
    """

    asked: bool | None
    file: Path | None
    chat: bool
    system: str | None

    def check(self, target: str, problems: Problems) -> tuple[Any, bool]:
        """Collect what is wrong with it; return the target's tokenizer, or None, and whether the template is applied.

        The tokenizer has the template of the file. The built-in target continues texts, so a conversation with it is
        one text.
        """
        template = None
        if self.file is not None:
            template = problems.check(read_text, self.file, "--chat-template-file")
            if template is None:
                return None, False
        elif target == TARGET and (self.chat or self.system is not None):
            template = TEMPLATE
        tokenizer = checked_tokenizer(problems, target)
        if tokenizer is None:
            return None, False
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer, bool(problems.check(self._applies, tokenizer))

    def _applies(self, tokenizer: Any) -> bool:
        """Return whether the chat template is applied.

        Raises:
            ValueError: it is needed, and there is none or it is turned off.
        """
        has_one = bool(getattr(tokenizer, "chat_template", None))
        given = {
            "--chat": self.chat,
            "--system": self.system is not None,
            "--chat-template-file": self.file is not None,
        }
        needs = [flag for flag, is_given in given.items() if is_given]
        if self.asked and not has_one:
            needs.append("--chat-template")
        if needs and not has_one:
            raise ValueError(
                f"The target's tokenizer has no chat template, which {' and '.join(needs)} would use; pass "
                "--chat-template-file FILE with one, or a target that was trained for chats."
            )
        if needs and self.asked is False:
            raise ValueError(
                f"{' and '.join(needs)} needs the chat template; leave out --no-chat-template."
            )
        return has_one if self.asked is None else self.asked


# One prompt ----------------------------------------------------------------------------------------------------------


def _once(answerer: "Answerer", row: Any, text: str, max_new_tokens: int, compare: bool) -> None:
    """Answer one prompt, given as `row [1, P]` too; with `compare`, then run the target alone."""
    from ..evaluation import warm_up
    from .answers import fitting

    _echo(text)
    max_new_tokens = fitting(answerer.pair.target, row, max_new_tokens)
    if compare:
        warm_up(answerer.pair.draft, answerer.pair.target, row, answerer.capture)
    answerer.warm_up(row, max_new_tokens)
    answer = answerer.answer(row, max_new_tokens)
    if answer.stopped:
        note(f"Stopped after {len(answer.tokens)} tokens.")
        raise typer.Exit(130)
    if compare:
        _compare(answerer, row, answer, max_new_tokens)
    else:
        _tell(answerer, row, answer)


def _echo(prompt: str) -> None:
    """Show the prompt apart from the answer, on stderr."""
    for line in prompt.splitlines():
        notes.print(f"> {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _tell(answerer: "Answerer", row: Any, answer: "Answer") -> None:
    """Print the line after an answer to `row [1, P]`, with an estimate of the target's own speed."""
    from .answers import figures, why_no_help

    if notes.quiet or not answer.tokens:
        return
    times = answerer.times_plain(row, answer)
    remark = None if answerer.has_explained else why_no_help(answerer, answer, times)
    answerer.has_explained = answerer.has_explained or remark is not None
    _show(figures(answer, times, "estimated"), remark)


def _show(line: str, remark: str | None) -> None:
    prose(notes, f"[{line}]", "dim", markup=False)
    if remark:
        note(remark)


def _compare(answerer: "Answerer", row: Any, answer: "Answer", max_new_tokens: int) -> None:
    """Run the target alone on `row [1, P]`; print how much faster the answer came, and whether it is the same."""
    import torch

    from .answers import figures, why_no_help

    tokens, seconds = answerer.alone(row, max_new_tokens)
    times = len(answer.tokens) / answer.seconds * seconds / len(tokens)
    _show(figures(answer, times, "measured"), why_no_help(answerer, answer, times))
    if answerer.sampling.draws:
        notes.print("Both texts are drawn, so they are not compared.", style="dim")
        return
    same = tokens == answer.tokens
    notes.print(f"The two texts are {'identical' if same else 'NOT identical'}.")
    dtype = answerer.pair.target.dtype
    if not same and dtype == torch.float32:
        fail_differing()
    if not same:
        note(
            f"In {str(dtype).removeprefix('torch.')} a near-tie between two tokens can go either way, because rounding "
            "depends on how many tokens a forward has. Use --dtype float32 to compare without such rounding."
        )


# A conversation ------------------------------------------------------------------------------------------------------


def _converse(
    answerer: "Answerer", system: list[dict[str, str]], first: str | None, max_new_tokens: int
) -> None:
    """Answer messages until there is none, each with those before it."""
    notes.print(_CHAT_HELP, style="dim", highlight=False)
    history = list(system)
    message = first if first is not None else _next_message()
    while message is not None:
        if message == "/clear":
            history = list(system)
            notes.print("The conversation is forgotten.", style="dim")
        elif message:
            history = _turn(answerer, history, message, max_new_tokens)
        message = _next_message()


def _turn(
    answerer: "Answerer", history: list[dict[str, str]], message: str, max_new_tokens: int
) -> list[dict[str, str]]:
    """Answer a message; return the history with both, or as it was where no answer began."""
    from .answers import encode, fitting

    turn = [*history, {"role": "user", "content": message}]
    try:
        row = encode(answerer.tokenizer, turn, True).to(answerer.pair.target.device)
        room = fitting(answerer.pair.target, row, max_new_tokens)
        answerer.warm_up(row, room)
        answer = answerer.answer(row, room)
        history = [*turn, {"role": "assistant", "content": answer.text}]
        if answer.stopped:
            note(f"Stopped after {len(answer.tokens)} tokens.")
        else:
            _tell(answerer, row, answer)
    except KeyboardInterrupt:  # before the answer, or while the target alone is timed
        note("Stopped.")
    except ValueError as error:
        note(f"{error} /clear begins anew.")
    return history


def _next_message() -> str | None:
    """Return the next line that is typed, or of stdin; None at its end, or for /exit."""
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            notes.print(f"\n{_CHAT_HELP}", style="dim", highlight=False)
            continue
        if line is None or line.strip() in ("/exit", "/quit", "/bye"):
            return None
        return line.strip()


def _read_line() -> str | None:
    """Return a line; None at the end of the input."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        return sys.stdin.readline() or None
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing and history of `input`)
    try:
        return input(">>> ")
    except EOFError:
        notes.print()
        return None
