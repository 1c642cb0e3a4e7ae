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

from ..serving.addresses import bound, is_local, names_of, url_of
from .built_in import OF_TARGET, TARGET, TEMPLATE, name_of, target_named
from .loading import Loaded, checked_tokenizer, load_pair, load_target
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
from .screen import console, doing, notes, prose
from .shared import Capture, Device, Draft, DraftRevision, Dtype, Proposal, Width, complete_target

if TYPE_CHECKING:
    from ..serving.service import Service

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help=f"Hub id or folder of the target; {OF_TARGET}.",
            autocompletion=complete_target,
            callback=target_named,
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
    asked = Asked(target, draft, draft_revision, dtype, device)
    listens = Listens(host, port, api_key)
    problems = Problems()
    problems.check(_check_installed)
    text = problems.check(_template, chat_template, target)
    tokenizer = asked.check(problems)
    problems.check(check_capture, capture)
    problems.check(check_proposal, proposal, width)
    listener = listens.check(problems)
    try:
        problems.raise_all()
        from ..serving.decoding import Decoder, Proposing
        from ..serving.service import Service, Settings

        pair = asked.load()
        settings = Settings(
            name or name_of(target),
            str(getattr(pair.draft.config, "_name_or_path", "") or draft or ""),
            max_batch,
            max_waiting,
            max_length,
            text,
            api_key,
            listens.names,
        )
        decoder = Decoder(pair.target, pair.draft, tokenizer, Proposing(capture, proposal, width))
        _serve(Service(decoder, settings), listener)
    finally:
        if listener is not None:
            listener.close()


@dataclass(frozen=True)
class Asked:
    """Hold the pair that is asked for.

    Args:
        target: Hub id or folder.
        draft: Hub id or folder; None for the known draft of the target.
        device: None for the GPU, if there is one.
    """

    target: str
    draft: str | None
    revision: str | None
    dtype: str
    device: str | None

    def check(self, problems: Problems) -> Any:
        """Collect what is wrong with it; return the tokenizer, or None."""
        problems.check(check_dtype, self.dtype)
        problems.check(check_device, self.device)
        problems.check(check_draft, self.draft, self.revision)
        return checked_tokenizer(problems, self.target, "TARGET")

    def load(self) -> Loaded:
        """Return the pair, on its device."""
        model = load_target(self.target, self.dtype).to(device_of(self.device)).eval()
        pair = load_pair(model, self.draft, self.revision)
        pair.draft.to(model.device).eval()
        return pair


@dataclass(frozen=True)
class Listens:
    """Say where a server listens, and who may call it."""

    host: str
    port: int
    key: str | None

    def check(self, problems: Problems) -> Any:
        """Collect what is wrong with it; return a socket there, or None."""
        problems.check(_check_key, self.key)
        problems.check(_check_host, self.host, self.key)
        return problems.check(bound, self.host, self.port)

    @property
    def names(self) -> tuple[str, ...]:
        """By which names clients may call the server; () for any."""
        return () if self.key else names_of(self.host)


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


def _template(file: Path | None, target: str) -> str | None:
    """Return the chat template to use in place of the target's own; None for that.

    Raises:
        ValueError: the file cannot be read.
    """
    if file is None:
        return TEMPLATE if target == TARGET else None
    return read_text(file, "--chat-template")


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


def _warm_up(service: "Service") -> None:
    """Decode once with each number of rows, so that no client waits for what is prepared once."""
    with doing("Warming up: the self-check, and what blocks cost here"):
        for rows in service.waiting.sizes:
            service.decoder.warm_up(rows)


def _serve(service: "Service", listener: Any) -> None:
    """Prepare what is prepared once, and serve until a signal comes."""
    from ..serving.server import Server

    _warm_up(service)
    address = listener.getsockname()[:2]
    Server(service, lambda: _announce(service, address)).run([listener])
    notes.print("Stopped.", style="dim")


def _announce(service: "Service", address: tuple[str, int]) -> None:
    """Print what is served and where, and a line to try it."""
    url, settings = url_of(*address), service.settings
    console.print(f"Serving {escape(settings.name)} at {url}/v1", soft_wrap=True, highlight=False)
    limit = "any number of" if service.context is None else f"{service.context:,}"
    prose(
        notes,
        f"Draft: {name_of(settings.draft)}. Texts of up to {limit} tokens, up to {settings.batch} at once. Figures: "
        f"{url}/metrics. Ctrl-C ends it, once all is answered.",
        "dim",
        markup=False,
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
