"""What an engine is asked (Request) and what it answers (Event, Stream); plain data and one queue.

A Stream is written by the engine's thread and read by one consumer, in any thread or coroutine.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmc.errors import LlmcError, ShapeError
from llmc.runtime.sampling import Sampling, TokenLogprob

MOST_CHOICES = 128  # of one request
MOST_LOGPROBS = 20  # alternatives given for one token, OpenAI's limit

_NUMBERS = itertools.count()


class QueueFull(LlmcError):
    """As many requests wait as may wait; try again after `retry_after` seconds."""

    def __init__(self, text: str, retry_after: int = 1):
        super().__init__(text)
        self.retry_after = retry_after


class EngineStopped(LlmcError):
    """The engine takes no more requests: it drains, or has stopped."""


class Matcher(Protocol):
    """Says which tokens may come next, for one choice of one request.

    `accept` and `mask` are called in turn, never at the same time, and not in the engine's thread:
    a mask is made while the step runs whose logits it is for.
    """

    def mask(self) -> np.ndarray:
        """Bit t % 32 of word t // 32 tells whether token t may come next: uint32 [words]. A mask
        of no token at all ends the choice."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """Continue a prompt.

    prompt_ids    token ids, at least one
    max_tokens    most new tokens (None: what the context holds; more than that is cut)
    sampling      how tokens are chosen; every choice has random numbers of its own
    stop_ids      tokens that end a choice; they are not delivered. The engine adds the model's
                  end-of-text ids unless ignore_eos
    min_tokens    new tokens before stop ids may come; less than max_tokens to have an effect
    n             choices
    logprobs      None, or how many alternatives come with each token's own log probability
    stop          strings that end a choice, found by the consumer (`detokenizer.TextStream`)
    grammar       makes a Matcher for each choice, or None
    id            for logs; unique among the requests that are alive
    """

    prompt_ids: Sequence[int] | np.ndarray
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    grammar: Callable[[], Matcher] | None = None
    id: str = field(default_factory=lambda: f"request-{next(_NUMBERS)}")

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ShapeError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.min_tokens < 0:
            raise ShapeError(f"min_tokens must be 0 or more, got {self.min_tokens}")
        if not 1 <= self.n <= MOST_CHOICES:
            raise ShapeError(f"n must be in 1..{MOST_CHOICES}, got {self.n}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ShapeError(f"logprobs must be in 0..{MOST_LOGPROBS}, got {self.logprobs}")
        if not all(self.stop):
            raise ShapeError("a stop string must not be empty")


@dataclass(slots=True)
class Event:
    """News of one choice. token: a new token, or None; logprob: if they were asked for.

    finish: None while the choice goes on; then "stop", "length", "cancelled" or "error" (`error`
    tells what happened), and no more events of this choice. A token may come with it.
    """

    choice: int
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish: str | None = None
    error: LlmcError | None = None


@dataclass(slots=True)
class Times:
    """When things happened, by time.perf_counter(); None while they have not."""

    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


Wake = Callable[[Sequence["Stream"]], None]  # told, once a step, which of its streams have news


class Stream:
    """The events of one request, in order; ends when every choice has finished.

    Read it from one place: `get`, iteration, `async for`, or `drain` after being woken. A consumer
    that goes away calls `cancel`, one that has seen enough of a choice `finish`.
    """

    def __init__(self, request: Request, wake: Wake | None,
                 finish: Callable[[Stream, int | None], None]):
        self.request = request
        self.times = Times()
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0  # of the prompt, found in the cache when it was first admitted
        self.generated = 0  # tokens delivered, of all choices
        self.wake = wake
        self._finish = finish
        self._events: deque[Event] = deque()
        self._open = request.n  # choices whose finish the engine has not put yet
        self._left = request.n  # choices whose finish the consumer has not read yet
        self._news = threading.Condition()
        self._async_news: asyncio.Event | None = None

    # ---- the consumer's side ------------------------------------------------------------------

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None after the last. Waits; TimeoutError after `timeout` seconds."""
        if not self._left:
            return None
        with self._news:
            if not self._news.wait_for(lambda: self._events, timeout):
                raise TimeoutError(f"request {self.request.id}: no event in {timeout} s")
        return self._take()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Needs a stream that was submitted with the LoopWaker of the running loop."""
        self._async_news = asyncio.Event()
        while self._left:
            self._async_news.clear()
            for event in self.drain():
                yield event
            if self._left:
                await self._async_news.wait()

    def drain(self) -> list[Event]:
        """The events that are there now."""
        return [self._take() for _ in range(len(self._events))]

    @property
    def finished(self) -> bool:
        """Whether the consumer has read the last event."""
        return not self._left

    def finish(self, choice: int) -> None:
        """Let a choice end with "stop", soon; some more of its tokens may still come."""
        self._finish(self, choice)

    def cancel(self) -> None:
        """End every choice with "cancelled" and free what they hold, before the next step."""
        self._finish(self, None)

    def _take(self) -> Event:
        event = self._events.popleft()
        self._left -= event.finish is not None
        return event

    # ---- the engine's side --------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Add an event; the engine then calls `notify`, once for all events of a step."""
        self._events.append(event)
        if event.token is not None:
            if not self.generated:
                self.times.first_token = time.perf_counter()
            self.generated += 1
        if event.finish is not None:
            self._open -= 1
            if not self._open:
                self.times.finished = time.perf_counter()

    def notify(self) -> None:
        """Wake a thread that waits in `get`."""
        with self._news:
            self._news.notify_all()

    def notify_loop(self) -> None:
        """Wake a coroutine that waits; to be called in its event loop."""
        if self._async_news is not None:
            self._async_news.set()


class LoopWaker:
    """Wakes the coroutines of one event loop: one call into it a step, however many streams have
    news. Make one for a loop and give it to every `Engine.submit`."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop

    def __call__(self, streams: Sequence[Stream]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake_all, tuple(streams))


def _wake_all(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.notify_loop()
