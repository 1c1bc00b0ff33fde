"""Random small graphs for property tests: what hypothesis draws, and how they are run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from llmc.codegen.target import Target
from llmc.driver import compile_imported
from llmc.errors import GraphError
from llmc.frontend.traced_model import traced_model
from llmc.ir.dims import Dim, bounds, evaluate, product, symbol
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.interpret import allowed, interpret
from llmc.ir.ops import constant, make
from llmc.runtime.artifact import Artifact
from llmc.runtime.executor import Executor
from tests.fuzz.hostile import spoil_memory

N, M = symbol("n", 1, 40), symbol("m", 1, 9)
SIZES: tuple[Dim, ...] = (1, 2, 3, 4, 8, 17, N, M, 2 * N, N + 1)
SHAPES = ({"n": 1, "m": 1}, {"n": 3, "m": 2}, {"n": 33, "m": 9})

SMOOTH = ("neg", "abs", "tanh", "sigmoid", "sin", "cos", "erf", "relu", "silu", "gelu", "softplus")
FLOAT_BINARY = ("add", "sub", "mul", "max", "min")
INTEGER_BINARY = ("add", "sub", "mul", "max", "min", "floor_div", "mod", "and", "or", "xor", "div")
COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
REDUCTIONS = ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min")

Draw = Callable[[st.SearchStrategy], Any]


@dataclass
class Builder:
    """A graph being drawn: `values` are all nodes so far, any of which a step may use."""

    draw: Draw
    values: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    parameters: int = 0

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def pick(self, *dtypes: str) -> Node:
        """A value of one of the dtypes (any, if none are named)."""
        found = [v for v in self.values if not dtypes or v.dtype.name in dtypes]
        if not found:
            raise GraphError("no value of that type")
        return self.choose(*found)

    def add_input(self, kind: str) -> None:
        shape = tuple(self.choose(*SIZES) for _ in range(self.draw(st.integers(0, 3))))
        type = TensorType(dtype(kind), shape)
        node = make("input", name=f"input{len(self.inputs)}", type=type)
        self.inputs.append(node)
        self.values.append(node)

    def parameter(self, *shape: int) -> Node:
        self.parameters += 1
        type = TensorType(dtype("f32"), shape)
        return make("parameter", name=f"weight{self.parameters}", type=type)

    def add_step(self) -> None:
        """One more value; nothing, where what was drawn does not fit."""
        step = self.choose(*STEPS)
        with suppress(GraphError):
            self.values.append(step(self))


def smooth(b: Builder) -> Node:
    return make(b.choose(*SMOOTH), b.pick("f32"))


def float_binary(b: Builder) -> Node:
    return make(b.choose(*FLOAT_BINARY), b.pick("f32"), b.pick("f32"))


def with_constant(b: Builder) -> Node:
    x = b.pick("f32", "i32")
    return make(b.choose("add", "mul", "max"), x, constant(b.choose(0, 1, -1, 2, 3), x.dtype))


def integer_binary(b: Builder) -> Node:
    return make(b.choose(*INTEGER_BINARY), b.pick("i32"), b.pick("i32"))


def compare(b: Builder) -> Node:
    return make(b.choose(*COMPARISONS), b.pick("i32"), b.pick("i32"))


def where(b: Builder) -> Node:
    x = b.pick("f32", "i32")
    return make("where", b.pick("bool"), x, b.pick(x.dtype.name))


def to_float(b: Builder) -> Node:
    return make("cast", b.pick("i32", "bool"), dtype="f32")


def reduce(b: Builder) -> Node:
    x = b.pick("f32", "i32")
    axes = b.draw(st.lists(st.integers(0, max(0, x.rank - 1)), min_size=1, unique=True))
    op = b.choose(*REDUCTIONS) if x.dtype.is_float else b.choose("reduce_sum", "reduce_max")
    return make(op, x, axes=tuple(axes), keep=b.draw(st.booleans()))


def along_axis(b: Builder) -> Node:
    x = b.pick("f32")
    axis = b.draw(st.integers(0, max(0, x.rank - 1)))
    if b.draw(st.booleans()):
        return make("softmax", x, axis=axis)
    return make("cumsum", x, axis=axis, exclusive=b.draw(st.booleans()),
                reverse=b.draw(st.booleans()))


def argmax(b: Builder) -> Node:
    x = b.pick("i32")
    found = make(b.choose("argmax", "argmin"), x, axis=b.draw(st.integers(0, max(0, x.rank - 1))),
                 last=b.draw(st.booleans()))
    return make("cast", found, dtype="i32")


def norm(b: Builder) -> Node:
    x = b.pick("f32")
    if x.rank == 0 or not isinstance(x.shape[-1], int):
        raise GraphError("a norm's weight needs a fixed size")
    weight = b.parameter(x.shape[-1])
    if b.draw(st.booleans()):
        return make("rms_norm", x, weight, epsilon=1e-2)
    return make("layer_norm", x, weight, b.parameter(x.shape[-1]), epsilon=1e-2)


def matmul(b: Builder) -> Node:
    x = b.pick("f32")
    if b.draw(st.booleans()):
        return make("matmul", x, b.pick("f32"))
    if x.rank == 0 or not isinstance(x.shape[-1], int):
        raise GraphError("a weight needs fixed sizes")
    columns = b.choose(1, 3, 16, 33)
    if b.draw(st.booleans()):
        return make("matmul", x, b.parameter(x.shape[-1], columns))
    transposed = make("transpose", b.parameter(columns, x.shape[-1]), permutation=(1, 0))
    return make("matmul", x, transposed)


def transpose(b: Builder) -> Node:
    x = b.pick()
    return make("transpose", x, permutation=tuple(b.draw(st.permutations(range(x.rank)))))


def reshape(b: Builder) -> Node:
    """Axes merged, split, or ones put in."""
    x = b.pick()
    shape = list(x.shape)
    how = b.choose("merge", "split", "one", "flat")
    at = b.draw(st.integers(0, max(0, x.rank - 1)))
    if how == "merge" and at + 1 < x.rank:
        shape[at:at + 2] = [shape[at] * shape[at + 1]]
    elif how == "split" and shape:
        shape[at:at + 1] = b.choose([2, shape[at] // 2], [shape[at] // 2, 2])
    elif how == "one":
        shape.insert(at, 1)
    else:
        shape = [product(shape)]
    return make("reshape", x, shape=tuple(shape))


def broadcast(b: Builder) -> Node:
    x, like = b.pick(), b.pick()
    return make("broadcast", x, shape=like.shape)


def slice_(b: Builder) -> Node:
    x = b.pick()
    starts, stops, steps = [], [], []
    for size in x.shape:
        start, cut = b.choose(0, 0, 1), b.choose(0, 0, 1)
        if bounds(size)[0] < start + cut:
            start, cut = 0, 0
        starts.append(start)
        stops.append(size - cut)
        steps.append(b.choose(1, 1, 2, 3, -1))
    return make("slice", x, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))


def concat(b: Builder) -> Node:
    x = b.pick()
    same = [v for v in b.values if v.dtype is x.dtype and v.rank == x.rank]
    others = b.draw(st.lists(st.sampled_from(same), min_size=1, max_size=2))
    return make("concat", x, *others, axis=b.draw(st.integers(0, max(0, x.rank - 1))))


def pad(b: Builder) -> Node:
    x = b.pick("f32", "i32")
    amounts = [tuple(b.choose(0, 0, 1, 2) for _ in x.shape) for _ in range(2)]
    return make("pad", x, constant(b.choose(0, -1), x.dtype), low=amounts[0], high=amounts[1])


def gather(b: Builder) -> Node:
    """Indices are made to fit: of any integers, min(max(i, 0), 0)..., by the least size."""
    x, index = b.pick(), b.pick("i32")
    axis = b.draw(st.integers(0, max(0, x.rank - 1)))
    if x.rank == 0:
        raise GraphError("a scalar has no axis")
    high = constant(bounds(x.shape[axis])[0] - 1, index.dtype)
    fitting = make("clamp", index, constant(0, index.dtype), high)
    return make("gather", x, fitting, axis=axis)


def iota(b: Builder) -> Node:
    like = b.pick()
    return make("iota", dtype="i32", shape=like.shape,
                axis=b.draw(st.integers(0, max(0, like.rank - 1))))


STEPS = (smooth, float_binary, float_binary, with_constant, integer_binary, compare, where,
         to_float, reduce, along_axis, argmax, norm, matmul, matmul, transpose, reshape, broadcast,
         slice_, concat, pad, gather, iota)


@st.composite
def graphs(draw: Draw) -> Graph:
    """A graph of a few inputs and steps; its last values are the outputs."""
    b = Builder(draw)
    for _ in range(draw(st.integers(1, 3))):
        b.add_input(draw(st.sampled_from(["f32", "f32", "i32"])))
    made = len(b.values)
    for _ in range(draw(st.integers(1, 9))):
        b.add_step()
    results = b.values[made:][-draw(st.integers(1, 3)):] or [make("neg", b.values[0])]
    outputs = tuple((f"output{n}", node) for n, node in enumerate(results))
    return Graph("drawn", tuple(b.inputs), outputs)


# ---- running ------------------------------------------------------------------------------------


def random_array(random: np.random.Generator, node: Node, dims: Mapping[str, int]) -> np.ndarray:
    shape = tuple(evaluate(size, dims) for size in node.shape)
    if node.dtype.is_float:
        return random.uniform(-1, 1, shape).astype(node.dtype.numpy)
    return random.integers(-5, 6, shape).astype(node.dtype.numpy)


class Case:
    """A drawn graph with parameters and inputs for every one of SHAPES."""

    def __init__(self, graph: Graph):
        random = np.random.default_rng(0)
        self.graph = graph
        self.parameters = {node["name"]: random_array(random, node, {})
                           for node in graph.parameters()}
        self.inputs = [{node["name"]: random_array(random, node, dims) for node in graph.inputs}
                       for dims in SHAPES]

    def interpreted(self, graph: Graph, number: int, exact: bool) -> dict[str, np.ndarray]:
        known = {s.name for s in graph.symbols()}
        dims = {name: value for name, value in SHAPES[number].items() if name in known}
        with allowed():
            return interpret(graph, self.inputs[number], self.parameters, exact=exact, dims=dims)

    def compiled(self, threads: int) -> list[dict[str, np.ndarray]]:
        model = traced_model(self.graph, self.parameters)
        with tempfile.TemporaryDirectory() as directory:
            path = compile_imported(model, Target.host()).write(Path(directory) / "drawn.llmc")
            executor = Executor(Artifact(path), threads)
            spoil_memory(executor)
            results = [executor.run(arrays) for arrays in self.inputs]
            executor.close()
        return results

    def check_close(self, got: Mapping[str, np.ndarray], number: int) -> None:
        """Integers and bools equal; floats off by what f32 rounding explains."""
        exact = self.interpreted(self.graph, number, True)
        rounded = self.interpreted(self.graph, number, False)
        for name, expected in exact.items():
            found = np.asarray(got[name])
            assert found.shape == expected.shape, (name, found.shape, expected.shape)
            if not np.issubdtype(found.dtype, np.floating):
                np.testing.assert_array_equal(found, expected, name)
                continue
            size = np.abs(expected).max(initial=1)
            noise = np.abs(rounded[name] - expected).max(initial=0)
            np.testing.assert_allclose(found, expected, 0, 1e-4 * size + 10 * noise, err_msg=name)
