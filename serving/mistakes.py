# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Say in plain sentences what is wrong with a request: with its route, its body or its fields."""

import difflib
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from .errors import ApiError, shown
from .requests import ChatRequest, CompletionRequest, GenerationRequest

_REQUESTS: dict[str, type[GenerationRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_MOST_TOLD = 20
"""Mistakes of one request that are told."""
_ALLOWED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a JSON object",
    "model_type": "a JSON object",
    "model_attributes_type": "a JSON object",
}
"""What a field must be, by pydantic's names of errors, which are the same in all its versions."""
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
"""How to say a bound, and where an error holds it."""


# Routes --------------------------------------------------------------------------------------------------------------


def methods_at(request: Request) -> list[str]:
    """Return by which methods the path of a request may be called; none where there is no route."""
    found: set[str] = set()
    for route in _routes(request):
        if route.matches(request.scope)[0] is not Match.NONE:
            found.update(route.methods or ())
    return sorted(found)


def unrouted(request: Request, error: HTTPException) -> ApiError:
    """Return the refusal of a request that no route takes, or whose body cannot be read."""
    status, message = error.status_code, str(error.detail)
    path = request.url.path
    if status == 404:
        known = [f"{' '.join(one.methods or ())} {one.path_format}" for one in _routes(request)]
        message = f"There is no route {path} here; the routes are {', '.join(known)}."
    elif status == 405:
        message = f"{path} takes {' or '.join(methods_at(request))}, not {request.method}."
    elif status == 400:
        message = f"The body cannot be read as JSON: {_unreadable(error)}."
    return ApiError(status, message)


def _routes(request: Request) -> list[APIRoute]:
    """Return the routes that clients may call."""
    return [route for route in request.app.routes if isinstance(route, APIRoute)]


def _unreadable(error: HTTPException) -> str:
    """Return why a body cannot be read."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return "it is not text in UTF-8"
    if isinstance(cause, RecursionError):
        return "its lists and objects are nested too deeply"
    return str(cause or error.detail)


# Fields --------------------------------------------------------------------------------------------------------------


def invalid(errors: Sequence[Any]) -> ApiError:
    """Return a refusal that tells what is wrong with fields; the one that is named apart is the first."""
    found = list(dict.fromkeys(_mistake(one) for one in errors[:_MOST_TOLD]))
    untold = len(errors[_MOST_TOLD:])
    message, param = found[0]
    if len(found) > 1:
        message = f"{len(found) + untold} things are wrong: {' '.join(one for one, _ in found)}"
    if untold:
        message += f" And {untold} more."
    return ApiError(400, message, param)


def _mistake(found: Any) -> tuple[str, str | None]:
    """Return what is wrong with a field, and its name."""
    places = found["loc"][1:]
    if found["type"] == "json_invalid":
        at = f", at character {places[0] + 1}" if places else ""
        return f"The body is not JSON: {found['ctx']['error']}{at}.", None
    param = _name(places) or None
    if found["type"] == "extra_forbidden":
        return _unknown(_name(places)), param
    if found["type"] == "missing" and param is None:
        return "The body is missing; it must be a JSON object.", None
    return _wrong_value(found, param or "The body"), param


def _name(places: Sequence[str | int]) -> str:
    """Return the name of what lies in these places, one inside the other."""
    found = ""
    for place in places:
        found += f"[{place}]" if isinstance(place, int) else f".{place}"
    return found.removeprefix(".")


def _unknown(name: str) -> str:
    """Return what to do about a field that the route does not know."""
    known: list[str] = []
    for route, kind in _REQUESTS.items():
        if name in kind.model_fields:
            return f"{name} is a field of {route} alone; leave it out."
        known += kind.model_fields
    alike = [] if "." in name else difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    do = f"did you mean {alike[0]}?" if alike else "leave it out."
    return f"{name} is no field that this server knows; {do}"


def _wrong_value(found: Any, name: str) -> str:
    """Return what a field must be, and what it is; in pydantic's words where its error has no other here."""
    kind, value = found["type"], found.get("input")
    if kind == "refused":
        return found["msg"]
    if kind == "missing":
        return f"{name} is missing; this route needs it."
    if kind == "string_unicode":
        return f"{name} has half of a surrogate pair, which no text may have."
    if kind in ("too_short", "string_too_short") and not value:
        return f"{name} must not be empty."
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{name} must be {words} {_number(found['ctx'][key])}, not {shown(value)}."
    if kind in _ALLOWED:
        return f"{name} must be {_ALLOWED[kind]}, not {shown(value)}."
    return f"{name}: {found['msg']}."


def _number(value: Any) -> str:
    """Return a bound as people write it: 2, where a field of fractions has 2.0."""
    return str(value).removesuffix(".0")
