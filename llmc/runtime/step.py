"""One step of a language model: tokens of many sequences, packed, in one native call."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.executor import Executor
from llmc.runtime.pages import PAGE, PagePool, Sequence
from llmc.runtime.pools import Pools
from llmc.runtime.slots import SlotPool

GREEDY = "greedy"  # the output with the likeliest token of every row of logits


class Chunk(NamedTuple):
    """Consecutive new tokens of one sequence; `wanted` of its last rows' logits are computed."""

    sequence: Sequence
    tokens: Sequences[int] | np.ndarray
    wanted: int


def pack_batch(chunks: Sequences[Chunk]) -> dict[str, np.ndarray]:
    """The step's inputs, all i32. Every chunk's pages (and slot) must be reserved."""
    number = len(chunks)
    counts = np.fromiter([len(chunk.tokens) for chunk in chunks], np.int32, number)
    starts = np.fromiter([chunk.sequence.length for chunk in chunks], np.int32, number)
    wanted = np.fromiter([chunk.wanted for chunk in chunks], np.int32, number)
    offsets = np.zeros(number + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    sequence = np.repeat(_count(number), counts)
    return {
        "ids": np.concatenate([chunk.tokens for chunk in chunks], dtype=np.int32),
        "positions": (starts - offsets[:-1])[sequence] + _count(offsets[-1]),
        "sequence": sequence,
        "offsets": offsets,
        "page_table": _page_table([chunk.sequence.page_row() for chunk in chunks]),
        # the wanted rows of a chunk are its last: they end where the chunk does
        "rows": np.repeat(offsets[1:] - np.cumsum(wanted, dtype=np.int32), wanted)
        + _count(int(wanted.sum())),
    }


def _page_table(rows: Sequences[np.ndarray]) -> np.ndarray:
    table = np.zeros((len(rows), max(1, max(map(len, rows)))), np.int32)
    for row, pages in zip(table, rows, strict=True):
        row[:len(pages)] = pages
    return table


_NUMBERS = np.arange(1 << 14, dtype=np.int32)


def _count(end: int) -> np.ndarray:
    """0, 1, ... end - 1."""
    return _NUMBERS[:end] if end <= len(_NUMBERS) else np.arange(end, dtype=np.int32)


def _check(chunks: Sequences[Chunk]) -> None:
    """ShapeError unless a step of these chunks makes sense; kernels trust its inputs."""
    if not chunks:
        raise ShapeError("a step needs at least one chunk of tokens")
    if len({id(chunk.sequence) for chunk in chunks}) < len(chunks):
        raise ShapeError("a sequence stands in one step more than once: join its chunks")
    for chunk in chunks:
        if not 0 <= chunk.wanted <= len(chunk.tokens):
            raise ShapeError(f"{chunk.wanted} rows of logits are wanted of a chunk of "
                             f"{len(chunk.tokens)} tokens")


class LanguageModel:
    """Steps an executor whose model has paged states, slot states or both.

    chunk_tokens: most tokens of one step of `feed`; logit_rows: most rows of logits of one;
    growth_limit: a sequence of up to that many tokens cannot grow past it in a later step (0: it
    can).
    """

    def __init__(self, executor: Executor, max_context: int, pools: Pools, chunk_tokens: int,
                 logit_rows: int, growth_limit: int = 0):
        self.executor = executor
        self.max_context = max_context
        self.chunk_tokens = chunk_tokens
        self.logit_rows = logit_rows
        self.growth_limit = growth_limit
        self.pool = PagePool(pools.pages)
        self.slots = SlotPool(pools.slots)
        self._inputs = {tensor.name for tensor in executor.inputs}
        executor.allocate_states(pools.symbols())

    @property
    def most_tokens(self) -> int:
        """Tokens that one step can take."""
        return self.executor.largest("tokens")

    @property
    def most_sequences(self) -> int:
        """Sequences that one step can take."""
        most = self.executor.largest("sequences")
        return min(most, self.slots.size) if self.slots.size else most

    @property
    def chooses(self) -> bool:
        """Whether a step can give the likeliest tokens themselves, as its output `greedy`."""
        return any(tensor.name == GREEDY for tensor in self.executor.outputs)

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a sequence may begin with another's pages, or go back to fewer tokens: not where
        layers keep their past in a slot."""
        return self.slots.size == 0

    def step(self, chunks: Sequences[Chunk], output: str = "logits") -> np.ndarray:
        """Run the chunks' tokens; logits [sum of wanted, vocab] f32, in the order of the chunks
        (with output GREEDY the likeliest tokens [sum of wanted]).

        A step that fails leaves every sequence as it was; of a model with slot states, a sequence
        that had tokens before can only be released.
        """
        _check(chunks)
        before = [(chunk.sequence, len(chunk.sequence.pages)) for chunk in chunks]
        try:
            for chunk in chunks:
                self.reserve(chunk)
            result = self._run(chunks, output)
        except BaseException:
            for sequence, pages in before:
                self.pool.keep(sequence, pages)
                if not sequence.length:
                    self.slots.release(sequence)
            raise
        for chunk in chunks:
            chunk.sequence.length += len(chunk.tokens)
        return result

    def _run(self, chunks: Sequences[Chunk], output: str) -> np.ndarray:
        inputs = pack_batch(chunks)
        if self.slots.size:
            inputs["slots"] = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        read = {name: inputs[name] for name in self._inputs}
        try:
            return self.executor.run(read, want=(output,))[output]
        except ShapeError:  # nothing has run
            raise
        except BaseException:
            for chunk in chunks:
                self.slots.lose(chunk.sequence)
            raise

    def reserve(self, chunk: Chunk) -> None:
        """Pages for a chunk's tokens; ShapeError if its sequence cannot get so long."""
        length = chunk.sequence.length + len(chunk.tokens)
        self.slots.reserve(chunk.sequence)
        if length <= min(len(chunk.sequence.pages) * PAGE, self.max_context) \
                and not self.growth_limit:
            return
        if length > self.max_context:
            raise ShapeError(f"{length} tokens exceed the context of {self.max_context} "
                             "(max_context)")
        if 0 < chunk.sequence.length <= self.growth_limit < length:
            raise ShapeError(f"the sequence cannot grow from {chunk.sequence.length} to {length} "
                             f"tokens: this model computes those of more than {self.growth_limit} "
                             "differently from the first token on. Start with the longer prompt")
        self.pool.reserve(chunk.sequence, length)

    def feed(self, sequence: Sequence, tokens: Sequences[int] | np.ndarray, every: bool = False,
             output: str = "logits") -> Iterator[np.ndarray]:
        """Run a long input chunk by chunk; yields logits of all rows, or of the very last one."""
        size = min(self.chunk_tokens, self.logit_rows) if every else self.chunk_tokens
        if sequence.length == 0 and self.growth_limit and len(tokens) > self.growth_limit:
            size = len(tokens)  # in one step, whatever memory that takes: it cannot grow there
        for start in range(0, len(tokens), size):
            part = tokens[start:start + size]
            last = start + len(part) == len(tokens)
            result = self.step([Chunk(sequence, part, len(part) if every else int(last))], output)
            if every or last:
                yield result

    def check_prompt(self, length: int) -> None:
        """ShapeError if a prompt of that many tokens can never fit."""
        room = min(self.max_context, self.pool.size * PAGE)
        if length > room:
            raise ShapeError(f"the prompt has {length} tokens, the context holds {room} "
                             "(max_context, kv_memory)")

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence)
        self.slots.release(sequence)
