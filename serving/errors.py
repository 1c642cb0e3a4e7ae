# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Refuse requests in the words of OpenAI's API."""

import json
from typing import Any

_TYPES = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error"}
"""Types of errors, from these statuses on."""
_MOST_SHOWN = 40
"""Characters of what was given, in an error."""


class ApiError(ValueError):
    """Say why a request is not answered.

    Args:
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs, such as "model_not_found".
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code = param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        found = {"message": self.message, "type": error_type(self.status)}
        return {"error": {**found, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response, beside the usual ones."""
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def error_type(status: int) -> str:
    """Return what OpenAI's API calls errors of this status."""
    return next(
        (name for least, name in reversed(_TYPES.items()) if status >= least), "server_error"
    )


def shown(value: Any) -> str:
    """Return what was given, in JSON's words, short enough for an error."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, str):
        return f"the text {_cut(value)!r}"
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
