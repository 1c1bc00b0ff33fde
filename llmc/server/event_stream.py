"""Answers as server-sent events, at the pace that the client reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from llmc.server.http_middleware import Answer

Json = dict[str, Any]


class EventStream:
    """An ASGI answer. chunks: JSON objects, the new ones at a time; held: closed at the end;
    seconds: how long a client may take to read what was sent before it is given up."""

    def __init__(self, chunks: AsyncIterator[list[Json]], held: AbstractContextManager,
                 answer: Answer, seconds: float):
        self._chunks, self._held, self._answer, self._seconds = chunks, held, answer, seconds

    async def __call__(self, scope, receive, send) -> None:
        with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]})
            try:
                async for chunks in self._chunks:
                    await self._write(send, b"".join(map(_event, chunks)))
            except ConnectionError:
                raise
            except Exception as error:
                await self._write(send, self._fault(error))
            await self._write(send, b"data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b""})

    def _fault(self, error: Exception) -> bytes:
        """The event of an error that comes when the status has been sent already."""
        return _event(self._answer.explain(error).body())

    async def _write(self, send, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ConnectionAbortedError("the client does not read its answer") from None


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
