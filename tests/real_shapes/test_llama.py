"""Every kernel of a Llama at real layer shapes against float64.

One f64 evaluation of a few whole sequences is the oracle of every step: a step of the first tokens
of a sequence, and one that goes on after any of them, must give the rows of the whole. The compiled
code may be off by what the interpreter's own rounding costs, and half as much again. In f32, where
the interpreter sums pairwise, what rounding does to the longest sum taken as one chain comes on top
(angles of rotary positions are f32 in both: they alone cost 1e-5 at position 2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks import make_model
from llmc.errors import DeviceError
from llmc.frontend.model import load_model
from llmc.runtime.cuda_device import Device
from tests.real_shapes.compiled import PoisonedModel, build
from tests.real_shapes.reference import (
    Error,
    interpret_sequences,
    one_chain,
    some_ids,
    write_checkpoint,
)

FACTOR = 1.5


@dataclass(frozen=True)
class Step:
    """One step: sequences by number, the tokens of each in the cache, and the new ones."""

    name: str
    sequences: Sequence[int]
    past: Sequence[int]
    new: Sequence[int]

    def __post_init__(self) -> None:
        assert len(self.sequences) == len(self.past) == len(self.new)


def prompts(counts: Sequence[int]) -> list[Step]:
    """First steps of the first sequence."""
    return [Step(f"{count} tokens", [0], [0], [count]) for count in counts]


def mixed(lengths: Sequence[int]) -> Iterator[Step]:
    """Steps of several sequences after pasts of odd lengths."""
    random = np.random.default_rng(3)
    for count in (1, 2, 3, 4, 5, 12, 33):
        chosen = range(count)
        past = [min(lengths[n] - 1, int(random.integers(0, lengths[n])) | 1) for n in chosen]
        yield Step(f"decode of {count}", chosen, past, [1] * count)
    yield Step("33 sequences, one long", range(33), [1047, *[1] * 32], [1000, *[2] * 32])
    for count in (4, 7, 33):
        chosen = range(count)
        past = [int(random.integers(0, lengths[n])) for n in chosen]
        new = [int(random.integers(1, lengths[n] - p + 1)) if n % 3 else 1
               for n, p in zip(chosen, past, strict=True)]
        yield Step(f"mixed, {count} sequences, {sum(new)} tokens", chosen, past, new)


class Case:
    """A model of a shape: its checkpoint, sequences, and the oracle's logits."""

    def __init__(self, shape: str, lengths: Sequence[int], directory: Path):
        self.directory = directory
        self.longest_sum = make_model.LLAMA[shape]["intermediate_size"]
        self.checkpoint = write_checkpoint(shape, directory / shape)
        self.sequences = some_ids(lengths)
        self.oracle = interpret_sequences(load_model(self.checkpoint, "f32"), self.sequences, True)
        self.scale = max(float(np.abs(rows).max()) for rows in self.oracle)

    def rows(self, logits: Sequence[np.ndarray], step: Step) -> np.ndarray:
        """The rows of whole sequences' logits that a step computes."""
        return np.concatenate([logits[n][p:p + c] for n, p, c in zip(
            step.sequences, step.past, step.new, strict=True)])

    def error(self, got: np.ndarray, step: Step) -> Error:
        return Error.of(got, self.rows(self.oracle, step), self.scale)

    def check(self, dtype: str, steps: Sequence[Step], target: str = "host", threads: int = 2
              ) -> None:
        """Run all steps in one dtype; the failure lists every step that is off."""
        rounded = interpret_sequences(load_model(self.checkpoint, dtype), self.sequences, False)
        everything = Error.of(np.concatenate(rounded), np.concatenate(self.oracle), self.scale)
        chain = one_chain(self.longest_sum, np.concatenate(self.oracle), self.scale)
        artifact = build(self.checkpoint, dtype, self.directory / f"{dtype}.llmc", target)
        model = PoisonedModel(artifact, threads, target)
        wrong = []
        print(f"\n{self.checkpoint.name} {dtype}")
        for step in steps:
            sequences = [self.sequences[n] for n in step.sequences]
            got = np.concatenate(model.logits(sequences, step.past, step.new))
            error = self.error(got, step)
            bound = everything.times(FACTOR) if dtype == "bf16" else (
                self.error(self.rows(rounded, step), step).times(FACTOR).plus(chain))
            print(f"    {step.name:40} {error}, allowed {bound}")
            if not error.within(bound):
                wrong.append(f"{dtype} {step.name}: {error}, allowed {bound}")
        model.close()
        assert not wrong, "\n".join(wrong)


@pytest.fixture(params=["host", pytest.param("nvptx", marks=pytest.mark.gpu)])
def target(request) -> str:
    if request.param == "nvptx":
        try:
            Device()
        except DeviceError as error:
            pytest.skip(str(error))
    return request.param


def test_a_sample_at_1b_shapes(tmp_path, target):
    lengths = [129, 33, 17]
    case = Case("1b", lengths, tmp_path)
    steps = [*prompts((1, 7, 129)), Step("decode of 3", [0, 1, 2], [127, 31, 16], [1, 1, 1]),
             Step("mixed", [2, 0, 1], [0, 31, 32], [17, 98, 1])]
    case.check("f32", steps, target)
    case.check("bf16", steps, target)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_every_step(shape, tmp_path, target):
    lengths = [2047, *(int(n) for n in np.random.default_rng(4).integers(1, 64, 32) * 2 + 1)]
    case = Case(shape, lengths, tmp_path)
    steps = [*prompts((1, 2, 3, 4, 5, 7, 8, 17, 64, 129, 512, 2047)), *mixed(lengths)]
    case.check("f32", steps, target)
    case.check("bf16", steps, target)
