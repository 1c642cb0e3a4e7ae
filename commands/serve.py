# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub serve`: answer OpenAI's API on this machine with a target and its draft."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..kinds import DEMO_KIND, kind_named
from ..serving.addresses import bound, is_local, names_of, url_of
from .loading import checked_tokenizer, load_pair, load_target
from .preflight import (
    Problems,
    check_capture,
    check_device,
    check_draft,
    check_dtype,
    check_proposal,
)
from .screen import console, doing, notes
from .shared import Capture, Device, Draft, DraftRevision, Dtype, Proposal, Width, complete_target

if TYPE_CHECKING:
    from ..serving.service import Service

DEMO = "demo"
"""Names the built-in pair."""
DEMO_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
"""The built-in target continues texts; so the messages of a conversation are one."""
_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Names:
    """What is served.

    Args:
        name: of the target, for clients.
        target: Hub id or folder.
        draft: Hub id or folder; None for the known draft of the target.
        is_demo: whether that is the built-in pair.
    """

    name: str
    target: str
    draft: str | None
    is_demo: bool = False


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help=f"Hub id or folder of the target; {DEMO} for the built-in pair.",
            autocompletion=complete_target,
        ),
    ],
    draft: Draft = None,
    draft_revision: DraftRevision = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients (default: TARGET).")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address; one that others reach needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DFLASH_HUB_API_KEY", help="A key that clients must send."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer (default: the target's positions)."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers decoded together, at most.")] = 8,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Answers that may wait; further requests get status 429.")
    ] = 64,
    chat_template: Annotated[
        Path | None, typer.Option(help="A file with a chat template, in place of the target's.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    capture: Capture = "auto",
    proposal: Proposal = "auto",
    width: Width = None,
) -> None:
    """Answer OpenAI's API on this machine, for its user. Greedy text is the target's own, token for token.

    One target, batches that begin together, no paged cache: for many users an engine serves better.
    `dflash-hub serve-with vllm DRAFT` prints the lines that start one with the same draft.
    """
    problems = Problems()
    problems.check(_check_installed)
    named = _named(target, draft, name)
    problems.check(check_dtype, dtype)
    problems.check(check_device, device)
    problems.check(check_capture, capture)
    problems.check(check_proposal, proposal, width)
    template = problems.check(_template, chat_template, named.is_demo)
    problems.check(_check_key, api_key)
    problems.check(check_draft, named.draft, draft_revision)
    tokenizer = checked_tokenizer(problems, named.target, "TARGET")
    problems.check(_check_host, host, api_key)
    listener = problems.check(bound, host, port)
    try:
        problems.raise_all()
        from ..serving.decoding import Decoder, Proposing
        from ..serving.service import Service, Settings

        pair = _load(named, draft_revision, dtype, device)
        settings = Settings(
            named.name,
            str(getattr(pair.draft.config, "_name_or_path", "") or named.draft or ""),
            max_batch,
            max_waiting,
            max_length,
            template,
            api_key,
            () if api_key else names_of(host),
        )
        decoder = Decoder(pair.target, pair.draft, tokenizer, Proposing(capture, proposal, width))
        service = Service(decoder, settings)
        _warm_up(service)
        _run(service, listener)
    finally:
        if listener is not None:
            listener.close()


# Before the weights --------------------------------------------------------------------------------------------------


def _check_installed() -> None:
    """Refuse to serve without what it takes.

    Raises:
        ImportError: naming it.
    """
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"serve needs {', '.join(missing)}, not installed here: pip install 'dflash-hub[serve]'"
        )


def _named(target: str, draft: str | None, name: str | None) -> Names:
    """Return what is served, the built-in pair by its folders."""
    if target != DEMO:
        return Names(name or target, target, draft)
    folder = Path(__file__).parents[1] / "examples" / "tiny_pair"
    own = str(kind_named(DEMO_KIND).demo_draft(folder))
    return Names(name or DEMO, str(folder / "target"), draft or own, is_demo=True)


def _template(file: Path | None, is_demo: bool) -> str | None:
    """Return the chat template to use in place of the target's own; None for that.

    Raises:
        ValueError: the file cannot be read.
    """
    if file is None:
        return DEMO_TEMPLATE if is_demo else None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"--chat-template {file} cannot be read: {reason}.") from error


def _check_key(key: str | None) -> None:
    """Refuse a key that no client can send.

    Raises:
        ValueError: it is empty, or has characters that no header takes.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError(
            "--api-key must be a word of printable ASCII characters, without spaces around it."
        )


def _check_host(host: str, key: str | None) -> None:
    """Refuse to listen where others can call, without a key.

    Raises:
        ValueError: naming the flag.
    """
    if key is None and not is_local(host):
        raise ValueError(
            f"--host is {host}, where others than you can call; pass --api-key too, or leave --host out."
        )


# Starting ------------------------------------------------------------------------------------------------------------


def _load(named: Names, revision: str | None, dtype: str, device: str | None) -> Any:
    """Return the pair, on its device."""
    import torch

    if named.is_demo:
        torch.set_num_threads(1)  # more threads only slow models of this size down
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_target(named.target, dtype).to(chosen).eval()
    pair = load_pair(model, named.draft, revision)
    pair.draft.to(model.device).eval()
    return pair


def _warm_up(service: "Service") -> None:
    """Decode once with each number of rows, so that no client waits for what is prepared once."""
    with doing("Warming up: the self-check, and what blocks cost here"):
        for rows in service.waiting.sizes:
            service.decoder.warm_up(rows)


def _run(service: "Service", listener: Any) -> None:
    """Serve until a signal comes."""
    from ..serving.server import Server

    server = Server(service)
    _announce(service, listener.getsockname()[:2])
    server.run([listener])
    notes.print("Stopped.", style="dim")


def _announce(service: "Service", address: tuple[str, int]) -> None:
    """Print what is served and where, and a line to try it."""
    url, settings = url_of(*address), service.settings
    console.print(f"Serving {escape(settings.name)} at {url}/v1", soft_wrap=True, highlight=False)
    limit = "any number of" if service.context is None else f"{service.context:,}"
    notes.print(
        f"Draft: {settings.draft}. Texts of up to {limit} tokens, up to {settings.batch} at once. Figures: "
        f"{url}/metrics. Ctrl-C ends it, once all is answered.",
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    notes.print(f"Try: {_example(service, url)}", markup=False, highlight=False, soft_wrap=True)


def _example(service: "Service", url: str) -> str:
    """Return a line for a shell that asks the server something."""
    body: dict[str, Any] = {"model": service.settings.name, "max_tokens": 64}
    if service.prompts.has_template:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": "Write quicksort in Python."}]
    else:
        path = "completions"
        body["prompt"] = "def quicksort(items):"
    key = "" if service.settings.key is None else ' -H "Authorization: Bearer KEY"'
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
