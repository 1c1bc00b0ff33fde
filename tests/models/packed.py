"""Packed steps for tests: golden cases without their padding, run through the interpreter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from safetensors.numpy import load_file

from llmc.frontend.model import ImportedModel
from llmc.ir.interpret import interpret, interpret_step
from llmc.ir.ops import PAGE

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"


@dataclass(frozen=True)
class Golden:
    """A golden directory: expectations by case and field, and their tolerance."""

    path: Path
    tensors: dict[str, numpy.ndarray]
    facts: dict

    @classmethod
    def load(cls, name: str) -> Golden:
        path = GOLDENS / name
        facts = json.loads((path / "expected.json").read_text())
        return cls(path, load_file(path / "expected.safetensors"), facts)

    @property
    def forward_cases(self) -> list[str]:
        return [case["name"] for case in self.facts["cases"] if case["type"] == "forward"]

    def masks(self, case: str) -> numpy.ndarray:
        """bool[batch, tokens]: where the case's tokens are no padding."""
        ids = self.tensors[f"{case}.input_ids"]
        return self.tensors.get(f"{case}.attention_mask", numpy.ones_like(ids)).astype(bool)

    def unpadded(self, case: str, field: str) -> list[numpy.ndarray]:
        """The field of each sequence; by token, without padding, unless it is pooled."""
        values, masks = self.tensors[f"{case}.{field}"], self.masks(case)
        if values.shape[:2] != masks.shape:
            return list(values)
        return [row[mask] for row, mask in zip(values, masks, strict=True)]

    def starts(self, case: str) -> list[int]:
        """The position of each sequence's first token: without `position_ids`, its column."""
        if f"{case}.position_ids" in self.tensors:
            return [0] * len(self.masks(case))
        return self.masks(case).argmax(1).tolist()

    def assert_close(self, got: numpy.ndarray, expected: numpy.ndarray, what: str = "") -> None:
        error = relative_error(got, expected)
        assert error <= self.facts["rtol_of_max_abs"], f"{self.path.name} {what}: {error:.2e}"


def relative_error(got: numpy.ndarray, expected: numpy.ndarray) -> float:
    """max |got - expected| / max |expected|"""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(numpy.abs(got - expected).max() / numpy.abs(expected).max())


def parameters(model: ImportedModel) -> dict[str, numpy.ndarray]:
    return {name: stored.read() for name, stored in model.parameters.items()}


def packed_inputs(
    sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> dict[str, numpy.ndarray]:
    """ids, positions, sequence and offsets of sequences that go on from positions `starts`."""
    counts = [len(ids) for ids in sequences]
    positions = [numpy.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
    inputs = {
        "ids": numpy.concatenate(sequences),
        "positions": numpy.concatenate(positions),
        "sequence": numpy.repeat(numpy.arange(len(counts)), counts),
        "offsets": numpy.cumsum([0, *counts]),
    }
    return {name: array.astype(numpy.int32) for name, array in inputs.items()}


class PackedDecoder:
    """A causal model with caches for `sequences` sequences of up to `max_tokens` tokens.

    Pages and slots are dealt out in random order, and full of NaN until something is written.
    """

    def __init__(self, model: ImportedModel, sequences: int, max_tokens: int):
        self.model = model
        self.parameters = parameters(model)
        self.lengths = [0] * sequences
        width = -(-max_tokens // PAGE)
        generator = numpy.random.default_rng(0)
        pages = generator.permutation(sequences * width + 1)[1:]
        self.page_table = pages.reshape(sequences, width).astype(numpy.int32)
        self.slots = generator.permutation(sequences + 1)[1:].astype(numpy.int32)
        self.names = {node["name"] for node in model.graph.inputs}
        self.states = {}
        for node in model.graph.states():
            count = sequences if node["kind"] == "slot" else sequences * width
            shape = (count + 1, *node.shape[1:])
            self.states[node["name"]] = numpy.full(shape, numpy.nan, node.dtype.numpy)

    def step(self, sequences: Sequence[Sequence[int]]) -> list[numpy.ndarray]:
        """Logits of each sequence's new tokens, f32[tokens, vocab]."""
        offsets = numpy.cumsum([0, *map(len, sequences)])
        return numpy.split(self.run(sequences, numpy.arange(offsets[-1])), offsets[1:-1])

    def run(self, sequences: Sequence[Sequence[int]], rows: Sequence[int]) -> numpy.ndarray:
        """Logits of the wanted rows, f32[rows, vocab]."""
        inputs = packed_inputs(sequences, self.lengths)
        inputs |= {"page_table": self.page_table, "rows": numpy.asarray(rows, numpy.int32),
                   "slots": self.slots}
        outputs, self.states = interpret_step(
            self.model.graph, {name: inputs[name] for name in self.names}, self.parameters,
            self.states,
        )
        self.lengths = [n + len(ids) for n, ids in zip(self.lengths, sequences, strict=True)]
        assert outputs["logits"].dtype == numpy.float32
        return outputs["logits"]

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> tuple[list, numpy.ndarray]:
        """`count` new ids of each prompt, and the logits that chose the last ones."""
        new: list[list[int]] = [[] for _ in prompts]
        feed = prompts
        for _ in range(count):
            logits = self.run(feed, numpy.cumsum([len(ids) for ids in feed]) - 1)
            for ids, row in zip(new, logits, strict=True):
                ids.append(int(row.argmax()))
            feed = [ids[-1:] for ids in new]
        return new, logits


def encode_packed(
    model: ImportedModel,
    sequences: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int]] | None = None,
    starts: Sequence[int] | None = None,
) -> list[dict[str, numpy.ndarray]]:
    """Every output of each sequence: [tokens, width], or [width] if it is pooled."""
    inputs = packed_inputs(sequences, starts or [0] * len(sequences))
    types = token_types or [numpy.zeros(len(ids)) for ids in sequences]
    inputs["token_types"] = numpy.concatenate(types).astype(numpy.int32)
    inputs["lengths"] = numpy.diff(inputs["offsets"])
    inputs["pooled"] = inputs["offsets"][:-1]
    outputs = interpret(model.graph, inputs, parameters(model), {})
    bounds = list(zip(inputs["offsets"], inputs["offsets"][1:], strict=False))
    return [
        {name: value[row] if name == "pooler_output" else value[first:last]
         for name, value in outputs.items()}
        for row, (first, last) in enumerate(bounds)
    ]
