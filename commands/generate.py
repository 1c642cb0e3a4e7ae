# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub generate`: run a target and its draft on one prompt."""

from typing import Annotated, Any

import typer

from .shared import (
    Capture,
    Device,
    Dtype,
    NewTokens,
    Target,
    console,
    fail_differing,
    load_tokenizer,
    show_speed,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    target: Target,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the draft (default: the known draft for the target)."
        ),
    ] = None,
    draft_revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the draft.")
    ] = None,
    max_new_tokens: NewTokens = 256,
    dtype: Dtype = "auto",
    device: Device = None,
    chat: Annotated[
        bool, typer.Option(help="Apply the target's chat template, if it has one.")
    ] = True,
    capture: Capture = "auto",
) -> None:
    """Generate greedily and stream the output, then run the target alone and compare speed."""
    import torch
    from transformers import TextStreamer

    from ..evaluation import compare, warm_up

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype(dtype)
    check_device(device)
    tokenizer = load_tokenizer(target)
    model = load_target(target, dtype).to(device).eval()
    draft_model = find_draft(model, draft, draft_revision).to(device).eval()
    row = encode(tokenizer, prompt, chat).to(device)
    max_new_tokens = fitting(model, row, max_new_tokens)
    warm_up(draft_model, model, row, capture)
    result = compare(
        draft_model, model, row, max_new_tokens, TextStreamer(tokenizer, skip_prompt=True), capture
    )
    console.print()
    show_speed(result)
    if not result.identical and model.dtype == torch.float32:
        fail_differing()
    if not result.identical:
        console.print(
            f"In {str(model.dtype).removeprefix('torch.')} a near-tie between two tokens can go either way, because "
            "rounding depends on how many tokens a forward has. Use --dtype float32 to compare without such rounding."
        )


def load_target(name: str, dtype: str) -> Any:
    """Load the target's text model, or its image-and-text model where transformers has no text model for it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from ..findings_dflash import LOADING, explained

    with explained(f"The target {name} could not be loaded", LOADING):
        try:
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)


def check_dtype(dtype: str) -> None:
    """Refuse what is no name of a dtype of torch.

    Raises:
        ValueError: naming the flag.
    """
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"--dtype is {dtype!r}; it must be auto, or a dtype of torch such as float32 or bfloat16."
        )


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: naming the flag.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {device!r}, which cannot be used here: {reason}") from error


def find_draft(model: Any, draft: str | None, revision: str | None) -> Any:
    """Load the draft with this name, or the registry's draft for the target, in the target's dtype."""
    from ..registry import explain_resolution, load_draft

    if draft is not None:
        return load_draft(draft, revision=revision, dtype=model.dtype)
    spec, why = explain_resolution(model.config.architectures, model)
    console.print(f"Draft: [bold]{spec.name}[/bold]. {why}", style="dim")
    return spec.load(dtype=model.dtype)


def fitting(model: Any, row: Any, max_new_tokens: int) -> int:
    """Return how many tokens to generate after `row [1, P]`: as many as asked for, or up to the target's last position.

    Raises:
        ValueError: the prompt alone fills the positions.
    """
    from ..evaluation import positions_left

    room, prompt = positions_left(model, row), row.shape[1]
    if room is None or max_new_tokens <= room:
        return max_new_tokens
    if room < 1:
        raise ValueError(
            f"The prompt has {prompt:,} tokens, but the target was made for texts of {prompt + room:,}. Shorten it."
        )
    console.print(
        f"--max-new-tokens is {max_new_tokens:,}, but the target was made for texts of {prompt + room:,} tokens, and "
        f"the prompt has {prompt:,}: generation stops after {room:,} new tokens.",
        style="yellow",
        soft_wrap=True,
    )
    return room


def encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Return the token ids of the prompt, `[1, P]`."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids
