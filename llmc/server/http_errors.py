"""Errors as OpenAI's API words them: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmc.errors import LlmcError, ShapeError
from llmc.server.request import EngineStopped, QueueFull

_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "invalid_request_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
          415: "invalid_request_error", 429: "rate_limit_error", 499: "client_closed_request",
          503: "service_unavailable_error"}
_PATH = re.compile(r" - at .*`\$\.?([^`]*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`(?: - at `[^`]*`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`$")
_MALFORMED = ("JSON is malformed", "Input data was truncated")
SHOWN = 100  # characters of what a client sent that an answer repeats


class ApiError(LlmcError):
    """An answer that is an error. param: the field that is wrong; code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}


def api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told of an exception. The text of a fault of ours stays in the log: its
    answer has the request's id to find it by."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full",
                        headers={"retry-after": str(error.retry_after)})
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="shutting_down",
                        headers={"retry-after": "5", "connection": "close"})
    if isinstance(error, ShapeError):
        return ApiError(400, str(error))
    return ApiError(500, f"The server failed on this request; its log tells more of request "
                    f"{request_id}.", code="internal_error")


def invalid_body(error: Exception) -> ApiError:
    """A body that is no JSON, or not of the right form."""
    text = str(error)
    if isinstance(error, RecursionError):
        return ApiError(400, "Invalid request: it is nested too deeply.", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return ApiError(400, "Invalid request: its text is not UTF-8.", code="invalid_json")
    if unknown := _UNKNOWN.search(text):
        name = shown(unknown.group(1))
        return ApiError(400, f"Unrecognized request argument supplied: {name}", name,
                        "unknown_parameter")
    if missing := _MISSING.search(text):
        return ApiError(400, f"{missing.group(1)} is required.", missing.group(1),
                        "missing_required_parameter")
    path = _PATH.search(text)
    code = "invalid_json" if text.startswith(_MALFORMED) else "invalid_type"
    return ApiError(400, f"Invalid request: {text}", path.group(1) if path else None, code)


def shown(text: str) -> str:
    """The beginning of what a client sent, to be repeated to it."""
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


@contextmanager
def field_errors(name: str = "") -> Iterator[None]:
    """Turns a ShapeError into the ApiError of a field: of the one that its message begins with, if
    none is named."""
    try:
        yield
    except ShapeError as error:
        raise ApiError(400, str(error), name or str(error).partition(" ")[0]) from error
