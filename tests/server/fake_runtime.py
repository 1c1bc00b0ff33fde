"""A Runtime whose model is a checksum. Its cache holds for each token a checksum of all tokens up
to it, and the next token follows from everything that is cached of a sequence: a page that is lost,
shared wrongly or overwritten changes what comes out."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from types import SimpleNamespace

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.pools import Pools
from llmc.runtime.step import GREEDY, LanguageModel

VOCABULARY = 61
END = 2  # the model's end of text
POISON = 5  # a step with this token fails; the model makes END, and tokens above POISON


def cached_value(before: int, token: int) -> int:
    """What the cache holds for a token that follows one with the value `before`."""
    return zlib.crc32(int(token).to_bytes(4, "little"), before)


def next_token(values: np.ndarray | list[int]) -> int:
    """The token behind those with these values."""
    token = POISON + zlib.crc32(np.asarray(values, np.int64).tobytes()) % (VOCABULARY - POISON)
    return END if token == POISON else token


def continuation(prompt: list[int], count: int, stop_ids: Collection[int] = (END,)) -> list[int]:
    """What the model makes of a prompt, computed without any engine."""
    values: list[int] = []
    made: list[int] = []
    for token in prompt:
        values.append(cached_value(values[-1] if values else 0, token))
    while len(made) < count and (token := next_token(values)) not in stop_ids:
        made.append(token)
        values.append(cached_value(values[-1], token))
    return made


class FakeExecutor:
    """Memory of pages, and the checksum of what they hold."""

    def __init__(self, chooses: bool):
        names = ["logits", GREEDY] if chooses else ["logits"]
        self.outputs = [SimpleNamespace(name=name) for name in names]
        self.inputs = [SimpleNamespace(name=name) for name in (
            "ids", "positions", "sequence", "offsets", "page_table", "rows")]
        self.steps: list[dict[str, np.ndarray]] = []
        self.failing = False

    def allocate_states(self, known: Mapping[str, int]) -> None:
        self.memory = np.full((known["pool_pages"], PAGE), -1, np.int64)

    def largest(self, name: str) -> int:
        return 4096

    def run(self, arrays: Mapping[str, np.ndarray], want: Collection[str]
            ) -> dict[str, np.ndarray]:
        self.steps.append(dict(arrays))
        ids, positions, sequence = arrays["ids"], arrays["positions"], arrays["sequence"]
        if self.failing or POISON in ids:
            raise RuntimeError("poisoned")
        table = arrays["page_table"]
        for token, position, number in zip(ids, positions, sequence, strict=True):
            before = self._values(table[number], position)
            self.memory[table[number, position // PAGE], position % PAGE] = cached_value(
                int(before[-1]) if position else 0, token)
        tokens = [next_token(self._values(table[sequence[row]], positions[row] + 1))
                  for row in arrays["rows"]]
        if GREEDY in want:
            return {GREEDY: np.array(tokens, np.int64)}
        logits = np.zeros((len(tokens), VOCABULARY), np.float32)
        logits[np.arange(len(tokens)), tokens] = 9.0
        return {"logits": logits}

    def _values(self, pages: np.ndarray, count: int) -> np.ndarray:
        """The first `count` values of a sequence."""
        return self.memory[pages].ravel()[:count]


class ForgetfulModel(LanguageModel):
    """A model like those with recurrent layers: a step that fails costs its sequences their past,
    and no two sequences can share one."""

    reuses_prefixes = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lost: list[Sequence] = []

    def step(self, chunks, output: str = "logits") -> np.ndarray:
        assert not any(chunk.sequence is lost for chunk in chunks for lost in self.lost)
        try:
            return super().step(chunks, output)
        except RuntimeError:
            self.lost += [chunk.sequence for chunk in chunks if chunk.sequence.length]
            raise

    def release(self, sequence: Sequence) -> None:
        self.lost = [lost for lost in self.lost if lost is not sequence]
        super().release(sequence)


class FakeRuntime:
    """What an Engine asks of a Runtime."""

    def __init__(self, pages: int = 64, context: int = 1024, chooses: bool = True,
                 growth_limit: int = 0, model: type[LanguageModel] = LanguageModel):
        self.config = {"vocab_size": VOCABULARY, "eos_token_ids": [END]}
        self.executor = FakeExecutor(chooses)
        self.language_model = model(self.executor, context, Pools(pages, 0), 64, 256, growth_limit)

    def check_ids(self, ids) -> np.ndarray:
        array = np.asarray(ids, np.int32)
        if not array.size or array.min() < 0 or array.max() >= VOCABULARY:
            raise ShapeError("token ids outside the vocabulary")
        return array

    def step(self, chunks, output: str = "logits") -> np.ndarray:
        return self.language_model.step(chunks, output)
