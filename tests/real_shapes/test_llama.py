"""Every host kernel of a Llama at real layer shapes against float64.

One f64 evaluation of a few whole sequences is the oracle of every step: a step of the first tokens
of a sequence, and one that goes on after any of them, must give the rows of the whole. In bf16 the
compiled code may be off by what the interpreter's own rounding costs, and half as much again. In
f32 the bound is what rounding does to the longest sum when it is taken as one chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks import make_model
from llmc.frontend.model import load_model
from tests.real_shapes.compiled import PoisonedModel, build
from tests.real_shapes.reference import Error, interpret_sequences, some_ids, write_checkpoint

BF16_FACTOR = 1.5
DEVIATIONS = 5.5  # of the largest error, when there are some 10^6 values


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

    def bound(self, dtype: str) -> Error:
        """How far a step's logits may be off in a dtype."""
        oracle = np.concatenate(self.oracle)
        if dtype == "f32":
            rounding = 2.0 ** -24 * self.longest_sum ** 0.5 * oracle.std() / self.scale
            return Error(DEVIATIONS * rounding, rounding)
        got = interpret_sequences(load_model(self.checkpoint, dtype), self.sequences, False)
        return Error.of(np.concatenate(got), oracle, self.scale).times(BF16_FACTOR)

    def error(self, model: PoisonedModel, step: Step) -> Error:
        got = model.logits([self.sequences[n] for n in step.sequences], step.past, step.new)
        expected = [self.oracle[n][p:p + c]
                    for n, p, c in zip(step.sequences, step.past, step.new, strict=True)]
        return Error.of(np.concatenate(got), np.concatenate(expected), self.scale)

    def check(self, dtype: str, steps: Sequence[Step], threads: int = 2) -> None:
        """Run all steps of one dtype; the failure lists every step that is off."""
        bound = self.bound(dtype)
        print(f"\n{self.checkpoint.name} {dtype}: may be off by {bound}")
        artifact = build(self.checkpoint, dtype, self.directory / f"{dtype}.llmc")
        model = PoisonedModel(artifact, threads)
        wrong = []
        for step in steps:
            error = self.error(model, step)
            print(f"    {step.name:40} {error}")
            if not error.within(bound):
                wrong.append(f"{dtype} {step.name}: {error}, allowed {bound}")
        model.close()
        assert not wrong, "\n".join(wrong)


def test_a_sample_at_1b_shapes(tmp_path):
    lengths = [129, 33, 17]
    case = Case("1b", lengths, tmp_path)
    steps = [*prompts((1, 7, 129)), Step("decode of 3", [0, 1, 2], [127, 31, 16], [1, 1, 1]),
             Step("mixed", [2, 0, 1], [0, 31, 32], [17, 98, 1])]
    case.check("f32", steps)
    case.check("bf16", steps)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_every_step(shape, tmp_path):
    lengths = [2047, *(int(n) for n in np.random.default_rng(4).integers(1, 48, 32) * 2 + 1)]
    case = Case(shape, lengths, tmp_path)
    steps = [*prompts((1, 2, 3, 4, 5, 7, 8, 17, 64, 129, 512, 2047)), *mixed(lengths)]
    case.check("f32", steps)
    case.check("bf16", steps)
