"""Tracing Python functions: operators, indexing, promotion, states, origins and errors."""

import numpy as np
import pytest

from llmc.errors import TraceError
from llmc.frontend import trace as t
from llmc.frontend.trace import Spec, Tensor, scope, trace
from llmc.ir.dims import symbol
from llmc.ir.graph import format_type, origin_of
from llmc.ir.interpret import interpret, interpret_step
from llmc.ir.ops import OPS
from llmc.ir.verify import verify

TOKENS = symbol("tokens")
X = Spec("x", "f32", (TOKENS, 7))


def evaluate(function, *arrays, shapes=None):
    """The traced function's output where its inputs are the arrays."""
    kinds = {"float32": "f32", "int32": "i32", "bool": "bool"}
    specs = [Spec(f"x{i}", kinds[a.dtype.name], (shapes or {}).get(i, a.shape))
             for i, a in enumerate(arrays)]
    graph = trace(function, *specs)
    verify(graph)
    return interpret(graph, {f"x{i}": a for i, a in enumerate(arrays)})["output"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


OPERATORS = [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y,
    lambda x, y: x // y, lambda x, y: x % y, lambda x, y: abs(x) ** y, lambda x, y: -x,
    lambda x, y: x + 1, lambda x, y: 1 + x, lambda x, y: 2 - x, lambda x, y: 3.5 * x,
    lambda x, y: 1 / x, lambda x, y: 2 // x, lambda x, y: 2 % x, lambda x, y: 2**x,
    lambda x, y: x == y, lambda x, y: x != y, lambda x, y: x < y, lambda x, y: x <= 0.5,
    lambda x, y: x > -0.25, lambda x, y: x >= y, lambda x, y: (x > 0) & (y > 0),
    lambda x, y: (x > 0) | (y > 0), lambda x, y: ~(x > 0), lambda x, y: (x > 0) ^ (y > 0),
    lambda x, y: x + np.float32([1, 2, 3, 4, 5, 6, 7]),
    lambda x, y: np.float32([1, 2, 3, 4, 5, 6, 7]) * x,
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(OPERATORS)))
def test_operators(index):
    function, x, y = OPERATORS[index], random(3, 7), random(3, 7, seed=1)
    got, want = evaluate(function, x, y), function(x, y)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6)


KEYS = [
    0, -1, slice(1, 3), slice(None, -1), slice(-2, None), slice(0, 99), slice(None, None, 2),
    slice(None, None, -1), (slice(None), 4), (1, 2), (..., 0), (..., slice(2, 5), -3), None,
    (slice(None), None, slice(1, 2)), (slice(3, 1),), (Ellipsis,), (0, ..., None),
]  # fmt: skip


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing(key, symbolic):
    x = random(5, 7, 3)
    shapes = {0: (TOKENS, 7, 3)} if symbolic else {}
    got = evaluate(lambda a: a[key], x, shapes=shapes)
    np.testing.assert_array_equal(got, x[key])


def test_indexing_by_dims_and_tensors():
    x, ids = random(5, 7), np.array([[4, 0, 1]], np.int32)
    got = evaluate(lambda a: a[TOKENS - 2 : TOKENS], x, shapes={0: (TOKENS, 7)})
    np.testing.assert_array_equal(got, x[3:])
    np.testing.assert_array_equal(evaluate(lambda a, i: a[i], x, ids), x[ids])
    np.testing.assert_array_equal(evaluate(lambda a, i: a[1:, i], x, ids), x[1:][:, ids])


def test_methods():
    x = random(4, 6)
    np.testing.assert_array_equal(evaluate(lambda a: a.reshape(-1, 3), x), x.reshape(-1, 3))
    np.testing.assert_array_equal(evaluate(lambda a: a.reshape((2, -1)), x), x.reshape(2, -1))
    np.testing.assert_array_equal(evaluate(lambda a: a.transpose(), x), x.T)
    np.testing.assert_array_equal(evaluate(lambda a: a.cast("i32"), x), x.astype("i4"))
    wide = evaluate(lambda a: a.broadcast(2, 4, 6), x)
    np.testing.assert_array_equal(wide, np.stack([x, x]))


def test_symbolic_shapes_are_dims():
    seen = []

    def function(x):
        seen.append((x.shape, x.rank, x.dtype.name, x.reshape(-1).shape))
        return x * x.shape[0]

    graph = trace(function, X)
    assert seen == [((TOKENS, 7), 2, "f32", (TOKENS * 7,))]
    got = interpret(graph, {"x": np.ones((3, 7), np.float32)})
    np.testing.assert_array_equal(got["output"], np.full((3, 7), 3))


def test_every_op_has_a_function():
    names = {"and": "and_", "or": "or_", "not": "not_"}
    internal = {"input", "get", "fusion", "repeat", "layer", "table"}
    for op in OPS.keys() - internal:
        assert callable(getattr(t, names.get(op, op))), op


def test_results_by_name():
    graph = trace(lambda x: {"a": x, "b": -x}, X)
    assert graph.name == "graph" and [name for name, _ in graph.outputs] == ["a", "b"]
    graph = trace(lambda x: (x, t.top_k(x, 2)[1]), X)
    assert [format_type(node.type) for _, node in graph.outputs] == ["f32[tokens, 7]",
                                                                     "i64[tokens, 2]"]

    def named(x):
        return x

    assert trace(named, X).name == "named"


def test_casting_to_the_same_dtype_is_nothing():
    graph = trace(lambda x: t.cast(x, "f32"), X)
    assert graph.outputs[0][1] is graph.inputs[0]


def test_parameters_and_states():
    def function(x):
        total = t.state("total", "f32", (7,), kind="slot")
        new = total + t.reduce_sum(x * t.parameter("w", "f32", (7,)), axes=0)
        t.update(total, new)
        return new

    graph = trace(function, X)
    verify(graph)
    weight = np.arange(7, dtype=np.float32)
    outputs, states = interpret_step(graph, {"x": np.ones((3, 7), np.float32)}, {"w": weight},
                                     {"total": np.ones(7, np.float32)})
    np.testing.assert_array_equal(outputs["output"], 1 + 3 * weight)
    np.testing.assert_array_equal(states["total"], 1 + 3 * weight)
    assert graph.states()[0]["kind"] == "slot"


def test_origins():
    def function(x):
        with scope("model.layers.0"), scope("mlp"):
            return t.silu(x)

    origin = origin_of(trace(function, X).outputs[0][1])
    assert origin.module == "model.layers.0.mlp"
    file, line = origin.line.rsplit(":", 1)
    assert file == __file__ and int(line) == function.__code__.co_firstlineno + 2


def branch(x):
    return x if x > 0 else -x


def loop(x):
    for row in x:
        return row


@pytest.mark.parametrize("function, reason", [
    (branch, "use trace.where"),
    (loop, "cannot be iterated over"),
    (lambda x: range(int(x[0, 0])), "cannot become a Python number"),
    (lambda x: [1, 2][x[0, 0]], "cannot become a Python number"),
    (lambda x: float(x), "cannot become a Python number"),
    (lambda x: np.sin(x), "TypeError"),
    (lambda x: np.asarray(x), "NumPy cannot read them"),
    (lambda x: len(x), "shape"),
    (lambda x: 1 in x, "not known while tracing"),
    (lambda x: x @ x, r"matmul\(f32\[tokens, 7\], f32\[tokens, 7\]\): contracted dims"),
    (lambda x: x + x.cast("f16"), "operands are f32 and f16"),
    (lambda x: x.cast("i32") + 0.5, "the float 0.5 meets a tensor of i32"),
    (lambda x: x.cast("i32") / 2, "use `//` or cast"),
    (lambda x: x + "one", "str 'one' cannot become a tensor"),
    (lambda x: x[:, 7], "index 7 is outside an axis of size 7"),
    (lambda x: x[0, 0, 0], "3 indices for 2 axes"),
    (lambda x: x[..., ...], "only have one `...`"),
    (lambda x: x[::-2], "only positive steps"),
    (lambda x: x[1.5], "1.5 is no index"),
    (lambda x: t.update(x, x), "a tensor that is no state"),
    (lambda x: t.constant(np.zeros(20000)), "make it a parameter"),
    (lambda x: t.parameter("w", "f33", (1,)), "unknown dtype 'f33'"),
])  # fmt: skip
def test_what_cannot_be_traced_names_the_users_line(function, reason):
    if reason == "TypeError":
        with pytest.raises(TypeError, match="Tensor"):
            trace(function, X)
        return
    with pytest.raises(TraceError, match=reason) as caught:
        trace(function, X)
    line = function.__code__.co_firstlineno
    assert str(caught.value).startswith((f"{__file__}:{line}", f"{__file__}:{line + 1}"))


def test_bad_results_and_inputs():
    with pytest.raises(TraceError, match="result 'output' is a NoneType, not a Tensor"):
        trace(lambda x: None, X)
    with pytest.raises(TraceError, match="result 'a' is a int"):
        trace(lambda x: {"a": 1}, X)
    with pytest.raises(TraceError, match="returns nothing"):
        trace(lambda x: {}, X)
    with pytest.raises(TraceError, match="two inputs have one name"):
        trace(lambda x, y: x, X, X)
    kept: list[Tensor] = []
    trace(lambda x: kept.append(x) or x, Spec("outer", "f32", (3,)))
    with pytest.raises(TraceError, match="'outer' is an input of another traced function"):
        trace(lambda x: x + kept[0][0], X)


def test_states_are_updated_once_and_inside():
    def twice(x):
        total = t.state("total", "f32", (7,))
        t.update(total, total + 1)
        t.update(total, total + 2)

    with pytest.raises(TraceError, match="state 'total' is updated twice"):
        trace(twice, X)
    total = t.state("total", "f32", (7,))
    with pytest.raises(TraceError, match=r"update\(\) outside a traced function"):
        t.update(total, total)
