"""Bodies of requests and answers: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmc.server.http_errors import ApiError, invalid_body

DISCARD_BYTES, DISCARD_SECONDS = 64 << 20, 5.0
T = TypeVar("T")


class TooLarge(ApiError):
    """A body of more than `limit` bytes. rest: what of it has not been read."""

    def __init__(self, limit: int, rest: AsyncIterator[bytes]):
        super().__init__(413, f"The request is larger than {limit} bytes (--max-body).",
                         code="request_too_large", headers={"connection": "close"})
        self.rest = rest


class EarlyAnswer(Response):
    """The answer to a body that is still coming. The connection is closed when the rest has come
    and was discarded, or is too much or too slow: a socket that is closed with unread bytes is
    reset, by which a client that sends first and reads then would lose the answer."""

    def __init__(self, error: TooLarge):
        super().__init__(msgspec.json.encode(error.body()), error.status,
                         media_type="application/json")
        self._rest = error.rest

    async def __call__(self, scope, receive, send) -> None:
        async def send_open(message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        await super().__call__(scope, receive, send_open)
        await _discard(self._rest)
        await send({"type": "http.response.body", "body": b""})


async def _discard(parts: AsyncIterator[bytes]) -> None:
    size = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for part in parts:
                size += len(part)
                if size > DISCARD_BYTES:
                    return


async def read_json(request: HttpRequest, decoder: msgspec.json.Decoder[T], limit: int,
                    seconds: float) -> T:
    """The body as the decoder's type. ApiError 415 for another content type (no page of another
    site can send JSON unasked), 413 beyond `limit` bytes, 408 if it takes too long, 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the header `Content-Type: application/json`.")
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"The request did not arrive within {seconds:.0f} s.",
                       headers={"connection": "close"}) from None
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise invalid_body(error) from error


async def _read(request: HttpRequest, limit: int) -> bytes:
    stream = request.stream()
    if int(request.headers.get("content-length") or 0) > limit:
        raise TooLarge(limit, stream)
    parts, size = [], 0
    async for part in stream:
        size += len(part)
        parts.append(part)
        if size > limit:
            raise TooLarge(limit, stream)
    return b"".join(parts)


def json_answer(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def until_gone(request: HttpRequest) -> None:
    """Return when the client closes its connection; to be called when the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
