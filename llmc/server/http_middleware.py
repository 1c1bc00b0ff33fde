"""What surrounds every HTTP request: its id, the key, the log line, and the answer to a fault."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from llmc.server.http_errors import ApiError, api_error
from llmc.server.logs import log, log_failure

OPEN_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/dashboard"})  # no secrets there
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}\Z")
QUIET = frozenset({"/livez", "/readyz", "/startupz", "/metrics", "/dashboard/data"})



class Gate:
    """ASGI middleware. api_key: what `Authorization: Bearer` must say, or None; observe: told of
    every answer."""

    def __init__(self, app, *, api_key: str | None = None, observe: Callable[[Answer], None]):
        self._app, self._observe = app, observe
        self._key = _digest(api_key.encode()) if api_key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(scope, send)
        try:
            self._check_key(scope)
            await self._app(scope, receive, answer.send)
        except ApiError as error:
            await answer.fail(error)
        except ConnectionError:  # the client went away while it was written to
            answer.status = 499
        except Exception as error:
            await answer.fail(answer.explain(error))
        finally:
            answer.tell()
            self._observe(answer)

    def _check_key(self, scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # Digests are compared: how long that takes tells nothing of the key, not even its length.
        if kind.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
            raise ApiError(401, "Incorrect API key provided: send the header `Authorization: "
                           "Bearer KEY`.", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})


class Answer:
    """The answer to one request on its way out. Its id is the client's own x-request-id, if that
    is harmless. Handlers find it as `request.state.answer`, and add to `fields` what belongs into
    the log line."""

    def __init__(self, scope, send):
        self._send = send
        self.method, self._path, self.headers = scope["method"], scope["path"], scope["headers"]
        given = dict(self.headers).get(b"x-request-id", b"")
        self.request_id = (given.decode() if _REQUEST_ID.match(given)
                           else f"req-{secrets.token_hex(12)}")
        self.status: int | None = None
        self.route = "other"
        self.began = time.perf_counter()
        self.fields: dict[str, Any] = {}
        scope.setdefault("state", {})["answer"] = self

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()),
                                  (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    def explain(self, error: Exception) -> ApiError:
        """What the client is told of an exception; a fault of ours is logged."""
        told = api_error(error, self.request_id)
        if told.status >= 500 and told is not error:
            log_failure("fault", error, id=self.request_id)
        self.fields["error"] = told.message
        return told

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; nothing if the answer has begun already."""
        self.fields["error"] = error.message
        if self.status is not None:
            return
        body = msgspec.json.encode(error.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)),
                   **error.headers}
        await self.send({"type": "http.response.start", "status": error.status, "headers": [
            (name.encode(), value.encode()) for name, value in headers.items()]})
        await self._send({"type": "http.response.body", "body": body})

    def tell(self) -> None:
        """Log the request, which is over."""
        if self.route not in QUIET:
            log("request", id=self.request_id, method=self.method, path=self._path,
                status=self.status or 499, seconds=round(time.perf_counter() - self.began, 6),
                **self.fields)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
