"""Models with the layer shapes of real ones, two layers deep, and what the interpreter makes of
them: the oracle (f64 throughout), and the rounding that a dtype cannot avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks import make_model
from llmc.frontend.model import ImportedModel
from llmc.ir.interpret import allowed, interpret_step
from llmc.ir.ops import PAGE

VOCABULARY = 512
STEP_TOKENS = 768  # tokens that are interpreted at once: bounds the score matrix in f64


def write_checkpoint(shape: str, directory: Path) -> Path:
    """A two-layer bf16 checkpoint of a real shape with a small vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        table = make_model.LLAMA if shape in make_model.LLAMA else {shape: make_model.BERT}
        patch.setitem(table[shape], "vocab_size", VOCABULARY)
        return make_model.make_model(shape, directory, "bf16", layers=2)


def some_ids(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


@dataclass(frozen=True)
class Part:
    """Tokens start..stop of a sequence."""

    sequence: int
    start: int
    stop: int


def split(lengths: Sequence[int], limit: int) -> list[list[Part]]:
    """Steps of at most `limit` tokens that together run all sequences."""
    steps: list[list[Part]] = [[]]
    room = limit
    for sequence, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                steps.append([])
                room = limit
            stop = min(length, start + room)
            steps[-1].append(Part(sequence, start, stop))
            room -= stop - start
            start = stop
    return steps


def pages_of(lengths: Sequence[int]) -> np.ndarray:
    """Page table i32[sequences, width] over a pool of exactly the pages needed, shuffled."""
    counts = [-(-length // PAGE) for length in lengths]
    pool = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(lengths), max(counts)), np.int32)
    for row, part in zip(table, np.split(pool, np.cumsum(counts)[:-1]), strict=True):
        row[:len(part)] = part
    return table


def interpret_sequences(model: ImportedModel, sequences: Sequence[np.ndarray], exact: bool
                        ) -> list[np.ndarray]:
    """Logits [tokens, vocab] of every token of whole sequences; f64 if exact."""
    lengths = [len(ids) for ids in sequences]
    table = pages_of(lengths)
    pool = sum(-(-length // PAGE) for length in lengths)
    states: Mapping[str, np.ndarray] = {
        node["name"]: np.full((pool, *node.shape[1:]), np.nan,
                              np.float64 if exact else node.dtype.numpy)
        for node in model.graph.states()}
    results: list[list[np.ndarray]] = [[] for _ in sequences]
    for parts in split(lengths, STEP_TOKENS):
        counts = [part.stop - part.start for part in parts]
        inputs = {
            "ids": np.concatenate([sequences[p.sequence][p.start:p.stop] for p in parts]),
            "positions": np.concatenate([np.arange(p.start, p.stop) for p in parts]),
            "sequence": np.repeat(np.arange(len(parts)), counts),
            "offsets": np.cumsum([0, *counts]),
            "page_table": table[[part.sequence for part in parts]],
            "rows": np.arange(sum(counts)),
        }
        arrays = {name: array.astype(np.int32) for name, array in inputs.items()}
        with allowed():
            outputs, states = interpret_step(model.graph, arrays, model.parameters, states,
                                             exact=exact)
        for part, rows in zip(parts, np.split(outputs["logits"], np.cumsum(counts)[:-1]),
                              strict=True):
            results[part.sequence].append(rows)
    return [np.concatenate(rows) for rows in results]


@dataclass(frozen=True)
class Error:
    """Distance to the oracle, as shares of its largest value."""

    largest: float
    typical: float  # root of the mean square

    @classmethod
    def of(cls, got: np.ndarray, oracle: np.ndarray, scale: float) -> Error:
        distance = np.abs(np.asarray(got, np.float64) - oracle) / scale
        return cls(float(distance.max()), float(np.sqrt((distance ** 2).mean())))

    def times(self, factor: float) -> Error:
        return Error(factor * self.largest, factor * self.typical)

    def plus(self, other: Error) -> Error:
        return Error(self.largest + other.largest, self.typical + other.typical)

    def within(self, bound: Error) -> bool:
        """NaN is within nothing."""
        return self.largest <= bound.largest and self.typical <= bound.typical

    def __str__(self) -> str:
        return f"{self.largest:.2e} (rms {self.typical:.2e})"


def one_chain(terms: int, oracle: np.ndarray, scale: float) -> Error:
    """What f32 rounding costs results that are each a sum of random terms, added one by one."""
    typical = 2.0 ** -24 * terms ** 0.5 * float(oracle.std()) / scale
    return Error(5.5 * typical, typical)  # 5.5 deviations: the largest of 10^6 or 10^7 values
