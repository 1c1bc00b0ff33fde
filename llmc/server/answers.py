"""The bodies of answers to chat and plain completions, whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llmc.runtime.sampling import TokenLogprob
from llmc.server.detokenizer import Delta
from llmc.server.vocabulary import Vocabulary

Json = dict[str, Any]


class Style(ABC):
    """How one endpoint words its answers. wants_logprobs: whether they have log probabilities."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str, request_id: str, vocabulary: Vocabulary, wants_logprobs: bool):
        self._vocabulary, self._wants_logprobs = vocabulary, wants_logprobs
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()),
                      "model": model}

    def answer(self, choices: Sequence[Delta], usage: Json) -> Json:
        """The whole answer. choices: everything that each said, as one Delta."""
        return {**self._head, "object": self.whole, "usage": usage,
                "choices": [self._choice(each, self._content(each)) for each in choices]}

    def chunks(self, deltas: Sequence[Delta], usage: bool) -> list[Json]:
        """A chunk for each choice that has something to say; usage: whether a chunk with the usage
        will follow, which the others announce."""
        return [self._chunk([self._choice(each, self._new(each))], usage) for each in deltas
                if each.text or each.finish or each.logprobs]

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk, if it was asked for."""
        return {**self._chunk([], True), "usage": usage}

    def opening(self, choices: int, usage: bool) -> list[Json]:
        """What comes before the first token."""
        return []

    def _chunk(self, choices: list[Json], usage: bool) -> Json:
        chunk = {**self._head, "object": self.chunk, "choices": choices}
        return {**chunk, "usage": None} if usage else chunk

    def _choice(self, delta: Delta, content: Json) -> Json:
        logprobs = self._logprobs(delta) if self._wants_logprobs else None
        return {"index": delta.choice, **content, "logprobs": logprobs,
                "finish_reason": delta.finish}

    @abstractmethod
    def _content(self, delta: Delta) -> Json: ...

    @abstractmethod
    def _new(self, delta: Delta) -> Json: ...

    @abstractmethod
    def _logprobs(self, delta: Delta) -> Json: ...


class ChatStyle(Style):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int, usage: bool) -> list[Json]:
        return [self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""},
                              "logprobs": None, "finish_reason": None}], usage)
                for index in range(choices)]

    def _content(self, delta: Delta) -> Json:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _new(self, delta: Delta) -> Json:
        return {"delta": {"content": delta.text} if delta.text else {}}

    def _logprobs(self, delta: Delta) -> Json:
        return {"content": [
            {**self._token(each.token, each.logprob),
             "top_logprobs": [self._token(*pair) for pair in each.top]}
            for each in delta.logprobs], "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._vocabulary.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob),
                "bytes": list(data)}


class CompletionStyle(Style):
    """/v1/completions. echo: prompts that stand before the text of their choices, or none."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, request_id: str, vocabulary: Vocabulary, wants_logprobs: bool,
                 echo: Sequence[str] = (), choices: int = 1):
        super().__init__(model, request_id, vocabulary, wants_logprobs)
        self._echo, self._choices = echo, choices
        self._offsets: dict[int, int] = {}

    def opening(self, choices: int, usage: bool) -> list[Json]:
        deltas = [Delta(index, self._prompt(index)) for index in range(choices)]
        return [self._chunk([{"index": each.choice, "text": each.text, "logprobs": None,
                              "finish_reason": None}], usage) for each in deltas if each.text]

    def _prompt(self, choice: int) -> str:
        return self._echo[choice // self._choices] if self._echo else ""

    def _content(self, delta: Delta) -> Json:
        return {"text": self._prompt(delta.choice) + delta.text}

    def _new(self, delta: Delta) -> Json:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> Json:
        texts = [self._vocabulary.text_of(each.token) for each in delta.logprobs]
        offsets, offset = [], self._offsets.get(delta.choice, 0)
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[delta.choice] = offset
        return {"tokens": texts, "text_offset": offsets,
                "token_logprobs": [_finite(each.logprob) for each in delta.logprobs],
                "top_logprobs": [self._top(each) for each in delta.logprobs]}

    def _top(self, logprob: TokenLogprob) -> Json:
        """By text; where two tokens read the same, the likelier one counts."""
        return {self._vocabulary.text_of(token): _finite(value)
                for token, value in reversed(logprob.top)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes -9999 for what cannot happen."""
    return max(logprob, -9999.0)
