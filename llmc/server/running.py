"""The streams of one HTTP request, read together: what its prompts' choices say, as they say it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from llmc.server.detokenizer import Delta, TextStream
from llmc.server.engine import Engine
from llmc.server.http_errors import ApiError
from llmc.server.metrics import Metrics
from llmc.server.model_host import ModelHost
from llmc.server.request import EngineStopped, Request, Stream


class Waker:
    """Wakes the coroutines of one event loop: one call into it for each step of the engine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Stream, asyncio.Event] = {}

    def __call__(self, streams: Sequence[Stream]) -> None:
        self._loop.call_soon_threadsafe(self._wake, tuple(streams))

    def _wake(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if (news := self._waiting.get(stream)) is not None:
                news.set()

    def add(self, stream: Stream, news: asyncio.Event) -> None:
        self._waiting[stream] = news

    def remove(self, stream: Stream) -> None:
        self._waiting.pop(stream, None)


class Running:
    """Requests that were submitted for one client; `with` cancels what is left of them.

    A client that reads slowly gets more text at a time: what waits for it are its own tokens, at
    most max_tokens for each choice.
    """

    def __init__(self, host: ModelHost, engine: Engine, waker: Waker, metrics: Metrics,
                 requests: Sequence[Request]):
        _check_number(requests, engine.queue_limit)
        self._waker, self._metrics = waker, metrics
        self._news = asyncio.Event()
        self._gone = False
        self.choices = requests[0].n  # of each prompt
        self._left = [request.n for request in requests]
        self._spoke: dict[tuple[int, int], float] = {}
        self.texts: list[TextStream] = []
        self.finishes: list[str] = []
        try:
            for request in requests:
                stream = engine.submit(request, waker)
                waker.add(stream, self._news)
                self.texts.append(TextStream(stream, host.runtime.tokenizer))
        except Exception:
            self.abandon()
            self.__exit__()
            raise

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for text, left in zip(self.texts, self._left, strict=False):
            self._waker.remove(text.stream)
            if left:
                text.stream.cancel()
            self._metrics.finished(text, self.finishes)

    def abandon(self) -> None:
        """The client is gone: free what it holds before the next step. Whoever reads `batches`
        gets a ConnectionAbortedError."""
        self._gone = True
        for text in self.texts:
            text.stream.cancel()
        self._news.set()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """What is new, one Delta for each choice that has news. `Delta.choice` counts through the
        choices of all prompts. Raises the error that a request ended with."""
        while any(self._left):
            await self._news.wait()
            self._news.clear()
            if self._gone:
                raise ConnectionAbortedError("the client has gone")
            said: dict[int, list[Delta]] = {}
            for place, text in enumerate(self.texts):
                if self._left[place]:
                    self._read(place, text, said)
            if said:
                yield [joined(deltas) for deltas in said.values()]

    def _read(self, place: int, text: TextStream, said: dict[int, list[Delta]]) -> None:
        now = time.perf_counter()
        for event in text.stream.drain():
            delta = text.push(event)
            if delta is None:
                continue
            if delta.error is not None:
                raise delta.error
            if delta.finish == "cancelled":
                raise EngineStopped("the server is shutting down")
            if delta.tokens:
                self._metrics.token(now - self._spoke.get((place, delta.choice), now))
                self._spoke[place, delta.choice] = now
            if delta.finish is not None:
                self._left[place] -= 1
                self.finishes.append(delta.finish)
            delta.choice += place * self.choices
            said.setdefault(delta.choice, []).append(delta)

    @property
    def usage(self) -> dict[str, object]:
        """Token counts, as OpenAI tells them."""
        prompt = sum(text.stream.prompt_tokens for text in self.texts)
        made = sum(text.completion_tokens for text in self.texts)
        cached = sum(text.stream.cached_tokens for text in self.texts)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
                "prompt_tokens_details": {"cached_tokens": cached}}


def joined(deltas: Sequence[Delta]) -> Delta:
    """What a choice said, one after the other."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(last.choice, "".join(each.text for each in deltas),
                 [token for each in deltas for token in each.tokens],
                 [logprob for each in deltas for logprob in each.logprobs],
                 last.finish, last.error, last.stop)


def _check_number(requests: Sequence[Request], limit: int) -> None:
    """ApiError 400 for more answers than the queue ever holds: waiting would not help them."""
    choices = requests[0].n
    if len(requests) * choices > limit:
        what = f"{len(requests)} prompts with n = {choices}" if len(requests) > 1 else (
            f"n = {choices}")
        raise ApiError(400, f"{what} ask for {len(requests) * choices} answers, this server's "
                       f"queue holds {limit}: send fewer at once.",
                       "prompt" if len(requests) > 1 else "n", "too_many_answers")
