"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from llmc.server.answers import ChatStyle, CompletionStyle, Style
from llmc.server.detokenizer import Delta
from llmc.server.event_stream import EventStream
from llmc.server.http_body import json_answer, read_json, until_gone
from llmc.server.metrics import Metrics
from llmc.server.model_host import ModelHost
from llmc.server.prompts import chat_requests, completion_requests
from llmc.server.protocol import ChatRequest, CompletionRequest, Generation
from llmc.server.request import Request
from llmc.server.running import Running, Waker, joined

_CHAT = msgspec.json.Decoder(ChatRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)


class Generate:
    """Both endpoints."""

    def __init__(self, host: ModelHost, metrics: Metrics):
        self._host, self._metrics = host, metrics
        self._waker: Waker | None = None

    async def chat(self, http: HttpRequest) -> ASGIApp:
        host, options = self._host, self._host.options
        host.require_engine()
        body = await read_json(http, _CHAT, options.max_body, options.body_seconds)
        host.check_name(body.model)
        request_id = http.state.answer.request_id
        requests = await chat_requests(host, body, request_id)
        assert host.vocabulary is not None
        style = ChatStyle(options.name, request_id, host.vocabulary, bool(body.logprobs))
        return await self._run(http, body, requests, style)

    async def completions(self, http: HttpRequest) -> ASGIApp:
        host, options = self._host, self._host.options
        host.require_engine()
        body = await read_json(http, _COMPLETION, options.max_body, options.body_seconds)
        host.check_name(body.model)
        request_id = http.state.answer.request_id
        requests, echo = await completion_requests(host, body, request_id)
        assert host.vocabulary is not None
        style = CompletionStyle(options.name, request_id, host.vocabulary,
                                body.logprobs is not None, echo, body.n or 1)
        return await self._run(http, body, requests, style)

    async def _run(self, http: HttpRequest, body: Generation, requests: Sequence[Request],
                   style: Style) -> ASGIApp:
        """Submit the requests, and answer as they were asked to be answered."""
        self._waker = self._waker or Waker()
        engine = self._host.require_engine()
        answer = http.state.answer
        with ExitStack() as stack:
            running = stack.enter_context(
                Running(self._host, engine, self._waker, self._metrics, requests))
            watcher = asyncio.create_task(until_gone(http))
            watcher.add_done_callback(
                lambda task: None if task.cancelled() else running.abandon())
            stack.callback(watcher.cancel)
            stack.callback(lambda: answer.fields.update(_summary(running)))
            batches = running.batches()
            if not body.stream:
                return json_answer(style.answer(await _collect(batches), running.usage))
            first = await anext(batches)  # what fails before it has a status of its own
            chunks = _chunks(first, batches, running, style, body.wants_usage)
            return EventStream(chunks, stack.pop_all(), answer, self._host.options.write_seconds)


async def _collect(batches: AsyncIterator[list[Delta]]) -> list[Delta]:
    """All that every choice said, by number."""
    said: dict[int, list[Delta]] = {}
    async for batch in batches:
        for delta in batch:
            said.setdefault(delta.choice, []).append(delta)
    return [joined(said[choice]) for choice in sorted(said)]


async def _chunks(first: list[Delta], batches: AsyncIterator[list[Delta]], running: Running,
                  style: Style, usage: bool) -> AsyncIterator[list[dict[str, Any]]]:
    """What is streamed, from the opening to the usage."""
    choices = running.choices * len(running.texts)
    yield style.opening(choices, usage) + style.chunks(first, usage)
    async for batch in batches:
        if chunks := style.chunks(batch, usage):
            yield chunks
    if usage:
        yield [style.usage_chunk(running.usage)]


def _summary(running: Running) -> dict[str, Any]:
    """What the log line of a request tells."""
    times = [text.stream.times for text in running.texts]
    first = min((each.first_token - each.arrived for each in times
                 if each.first_token is not None), default=None)
    usage = running.usage
    return {"prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"], "finish": running.finishes,
            "first_token_seconds": None if first is None else round(first, 6)}
