"""Text of a request's tokens as they come, cut at stop strings; outside the engine's thread.

    text = TextStream(engine.submit(request, waker), tokenizer)
    async for delta in text: ...          (or: for delta in text)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from llmc.errors import LlmcError
from llmc.frontend.tokenizer import Tokenizer
from llmc.runtime.sampling import TokenLogprob
from llmc.server.request import Event, Stream


@dataclass(slots=True)
class Delta:
    """What one choice has to say now.

    text: whole characters, possibly none; tokens and logprobs: the new tokens that they come from
    (text may lag behind its tokens); finish, error: as in Event; stop: the stop string that was
    found, which the text does not have.
    """

    choice: int
    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    error: LlmcError | None = None
    stop: str | None = None


class ChoiceText:
    """Turns the tokens of one choice into text, and looks for stop strings.

    Text that a stop string may begin with is held back until the next tokens tell.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stop: tuple[str, ...]):
        self._decoder = tokenizer.stream(prompt_ids)
        self._stop = stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that this token completes, up to a stop string."""
        return self._filter(self._decoder.push(token))

    def finish(self) -> str:
        """All text still held back."""
        text = self._filter(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _filter(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped = min(found, key=lambda each: each[0])
            self._held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """A Stream's events as text: iterate over Deltas, in a thread or a coroutine.

    Ends a choice at a stop string with finish "stop"; tokens that the engine made meanwhile are
    dropped. `completion_tokens` counts those of all Deltas so far.
    """

    def __init__(self, stream: Stream, tokenizer: Tokenizer):
        request = stream.request
        prompt = [int(token) for token in request.prompt_ids[-16:]]
        self.stream = stream
        self.completion_tokens = 0
        self._choices = [ChoiceText(tokenizer, prompt, request.stop) for _ in range(request.n)]
        self._over = [False] * request.n

    def __iter__(self) -> Iterator[Delta]:
        for event in self.stream:
            if (delta := self.push(event)) is not None:
                yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for event in self.stream:
            if (delta := self.push(event)) is not None:
                yield delta

    def push(self, event: Event) -> Delta | None:
        """What an event adds; None if its choice is over."""
        if self._over[event.choice]:
            return None
        choice = self._choices[event.choice]
        delta = Delta(event.choice, "", finish=event.finish, error=event.error)
        if event.token is not None:
            delta.text = choice.push(event.token)
            delta.tokens.append(event.token)
            self.completion_tokens += 1
        if event.logprob is not None:
            delta.logprobs.append(event.logprob)
        if event.finish is not None and choice.stopped is None:
            delta.text += choice.finish()
        if choice.stopped is not None:
            delta.stop, delta.finish = choice.stopped, "stop"
            if event.finish is None:
                self.stream.finish(event.choice)
        self._over[event.choice] = delta.finish is not None
        return delta
