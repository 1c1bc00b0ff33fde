"""Bodies of requests and answers: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmc.server.http_errors import ApiError, invalid_body

T = TypeVar("T")


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
    parts, size = [], int(request.headers.get("content-length") or 0)
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            parts.append(part)
            if size > limit:
                break
    if size > limit:
        raise ApiError(413, f"The request is larger than {limit} bytes (--max-body).",
                       code="request_too_large", headers={"connection": "close"})
    return b"".join(parts)


def json_answer(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def until_gone(request: HttpRequest) -> None:
    """Return when the client closes its connection; to be called when the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
