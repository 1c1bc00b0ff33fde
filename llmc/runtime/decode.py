"""Decoding that runs ahead of whoever reads its tokens: pages, lengths and ends of sequences.

A decoder (host_decode.py, cuda_decode.py) chooses tokens by itself and feeds them to its next step;
a GPU's begins steps before the tokens of those ahead of them were read.
A step that was begun before its input turned out to be the end of a text is of no use: its token is
dropped, and the cache cut back.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.errors import ShapeError
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.sampling import Sampling
from llmc.runtime.step import Chunk, LanguageModel

RING = 8  # steps whose tokens a decoder keeps
AHEAD = 3  # of a GPU: steps begun and not read, the one that is waited for and two behind it
PAGES_AHEAD = 3  # that a sequence reserves, so that its page table changes every fourth page


@dataclass(frozen=True)
class Start:
    """What a sequence begins to decode with. token: its last one, which is not in the cache yet and
    will stand at `position`; choice: its number among the sequences with its seed; slot: of the
    states of recurrent layers."""

    token: int
    position: int
    sampling: Sampling
    choice: int = 0
    slot: int = 0


class Decoder(Protocol):
    """Steps that feed each other (see CudaDecoder). ahead: as many are begun and not read, at
    most."""

    ahead: int

    def start(self, starts: Sequences[Start]) -> None: ...

    def step(self, page_rows: Sequences[np.ndarray] | None) -> None: ...

    def read(self) -> np.ndarray: ...

    def drain(self) -> None: ...


def decode_loop(model: LanguageModel, sequences: Sequences[Sequence], starts: Sequences[Start],
                steps: int) -> DecodeLoop | None:
    """A loop over sequences that are in the cache, but for their last tokens; None where a GPU
    cannot choose tokens."""
    decoder = model.executor.borrow_decoder(len(sequences), -(-model.max_context // PAGE))
    return None if decoder is None else DecodeLoop(model, decoder, sequences, starts, steps)


class DecodeLoop:
    """Decodes sequences together, `steps` tokens each at most. The caller serialises this with the
    model's other steps, and calls `finish` at the end."""

    def __init__(self, model: LanguageModel, decoder: Decoder, sequences: Sequences[Sequence],
                 starts: Sequences[Start], steps: int):
        self.model, self.decoder = model, decoder
        self.sequences = sequences
        self._lengths = [sequence.length for sequence in sequences]
        self._steps = steps
        self._begun = self._read = 0
        self._room = 0  # steps for which every sequence has its pages
        self._finished = False
        decoder.start(starts)

    def next(self) -> np.ndarray | None:
        """The next token of each sequence, i32 [sequences]; None after the last step. ShapeError
        when the cache is full."""
        while self._begun < self._steps and self._begun - self._read < self.decoder.ahead:
            try:
                self.begin()
            except ShapeError:  # what was begun can still be read
                if self._begun == self._read:
                    raise
                break
        return self.read() if self._begun > self._read else None

    def begin(self) -> None:
        """Begin one more step (at most RING - 1 may be unread)."""
        if self._begun < self._room:
            self.decoder.step(None)
        else:
            self._grow()
            self.decoder.step([sequence.page_row() for sequence in self.sequences])
        self._begun += 1

    def read(self) -> np.ndarray:
        """The tokens of the oldest step that was begun and not read; waits for it."""
        tokens = self.decoder.read()
        self._read += 1
        return tokens

    def _grow(self) -> None:
        """Pages for one more step at least, and the number of steps that they are enough for."""
        self._count_begun()
        for sequence in self.sequences:
            self._reserve(sequence)
        self._room = self._begun + min(map(self._room_of, self.sequences))

    def _count_begun(self) -> None:
        """Let sequences have the tokens of all steps that were begun."""
        for sequence, length in zip(self.sequences, self._lengths, strict=True):
            sequence.length = length + self._begun

    def _reserve(self, sequence: Sequence) -> None:
        """Pages for one more token, and for some behind it while there are enough."""
        full = sequence.length == PAGE * len(sequence.pages)
        self.model.reserve(Chunk(sequence, (0,), 1))
        end = sequence.length + self._steps - self._begun
        if full and self.model.pool.free > PAGES_AHEAD * len(self.sequences):
            ahead = PAGE * (len(sequence.pages) + PAGES_AHEAD)
            self.model.pool.reserve(sequence, min(end, ahead))

    def _room_of(self, sequence: Sequence) -> int:
        """Steps until a sequence needs pages again, or must not grow any more."""
        end, limit = PAGE * len(sequence.pages), self.model.growth_limit
        return (min(end, limit) if sequence.length < limit else end) - sequence.length

    def finish(self) -> None:
        """Wait for what was begun. Sequences are left with the tokens whose successors were read;
        where layers keep their past in a slot, one that got further can only be released."""
        if self._finished:
            return
        self._finished = True
        self.decoder.drain()
        self._count_begun()
        if self.model.reuses_prefixes:
            for sequence, length in zip(self.sequences, self._lengths, strict=True):
                self.model.pool.truncate(sequence, length + self._read)
        self.model.executor.return_decoder(self.decoder)
