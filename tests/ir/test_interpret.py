"""Interpreting graphs: symbols, leaves, bodies, states, the prelude, and the door at run time."""

import numpy as np
import pytest

from llmc.errors import LlmcError, ShapeError
from llmc.ir import interpret as module
from llmc.ir.dims import symbol
from llmc.ir.dtypes import bf16, f32, i32
from llmc.ir.graph import Graph, TensorType
from llmc.ir.interpret import allowed, evaluate_constant, interpret, interpret_step
from llmc.ir.ops import constant, make

TOKENS = symbol("tokens", 1, 16)
PAIRS = symbol("pairs", 2, 64, multiple=2)


def leaf(op, name, dtype, *shape, **attributes):
    return make(op, name=name, type=TensorType(dtype, shape), **attributes)


def graph_of(inputs, **outputs):
    return Graph("test", inputs, tuple(outputs.items()))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


# ---- symbols -----------------------------------------------------------------------------------


def test_symbols_are_bound_from_shapes():
    past = symbol("past", 0)
    x = leaf("input", "x", f32, TOKENS + past, 3)
    y = leaf("input", "y", f32, TOKENS)
    z = leaf("input", "z", f32, 2 * PAIRS + 1)
    sizes = {each.name: make("dim", value=each, dtype=i32) for each in (TOKENS, past, PAIRS)}
    graph = graph_of((y, x, z), **sizes)
    got = interpret(graph, {"x": zeros(9, 3), "y": zeros(5), "z": zeros(13)})
    assert got == {"tokens": 5, "past": 4, "pairs": 6}


X = leaf("input", "x", f32, TOKENS, 3)
SAME = leaf("input", "same", f32, TOKENS)
EVEN = leaf("input", "even", f32, PAIRS)
ODD = leaf("input", "odd", f32, 2 * TOKENS + 1)


@pytest.mark.parametrize("leaves, arrays, reason", [
    ((X,), {}, "input 'x' is missing"),
    ((X,), {"x": zeros(5)}, r"input 'x' has 1 axes, f32\[tokens, 3\] wants 2"),
    ((X,), {"x": zeros(5, 4)}, "input 'x' axis 1 has size 4, but 3 is 3"),
    ((X,), {"x": zeros(5, 3, dtype=np.int32)}, "input 'x' is int32, not f32"),
    ((X,), {"x": zeros(17, 3)}, r"input 'x' axis 0: tokens = 17 is outside 1\.\.16"),
    ((X,), {"x": zeros(0, 3)}, "tokens = 0 is outside"),
    ((X, SAME), {"x": zeros(5, 3), "same": zeros(6)}, "'same' axis 0 has size 6, but tokens is 5"),
    ((EVEN,), {"even": zeros(5)}, r"pairs = 5 is outside 2\.\.64, a multiple of 2"),
    ((ODD,), {"odd": zeros(4)}, "which no tokens makes tokens.2"),
])  # fmt: skip
def test_inputs_that_do_not_fit(leaves, arrays, reason):
    graph = graph_of(leaves, value=make("neg", leaves[0]))
    with pytest.raises(ShapeError, match=reason):
        interpret(graph, arrays)


def test_symbols_of_no_input():
    graph = graph_of((), count=make("dim", value=TOKENS, dtype=i32))
    assert interpret(graph, {}, dims={"tokens": 7}) == {"count": 7}
    with pytest.raises(ShapeError, match="no value for the symbol 'tokens'"):
        interpret(graph, {})


def test_products_are_checked_once_their_symbols_are_known():
    flat = leaf("input", "flat", f32, TOKENS * 3 + TOKENS * TOKENS)
    graph = graph_of((flat, SAME), value=make("neg", flat))
    assert interpret(graph, {"flat": zeros(10), "same": zeros(2)})["value"].shape == (10,)
    with pytest.raises(ShapeError, match="input 'flat' axis 0 has size 11"):
        interpret(graph, {"flat": zeros(11), "same": zeros(2)})


# ---- leaves ------------------------------------------------------------------------------------


class Stored:
    def __init__(self, array):
        self.array, self.reads = array, 0

    def read(self):
        self.reads += 1
        return self.array


def test_parameters_are_arrays_or_readable():
    graph = graph_of((X,), value=make("mul", X, leaf("parameter", "w", f32, 3)))
    stored = Stored(np.float32([1, 2, 3]))
    ones = np.ones((2, 3), np.float32)
    got = interpret(graph, {"x": ones}, {"w": stored})["value"]
    np.testing.assert_array_equal(got[1], [1, 2, 3])
    assert stored.reads == 1
    with pytest.raises(ShapeError, match="parameter 'w' is missing"):
        interpret(graph, {"x": ones})
    with pytest.raises(ShapeError, match=r"parameter 'w' has shape \(4,\), not \(3,\)"):
        interpret(graph, {"x": ones}, {"w": zeros(4)})


def test_exact_keeps_f64():
    x = leaf("input", "x", bf16, 3)
    third = make("div", make("cast", x, dtype=bf16), constant(3.0, bf16))
    given = {"x": np.ones(3, bf16.numpy)}
    graph = graph_of((x,), value=third)
    exact = interpret(graph, given, exact=True)["value"]
    assert exact.dtype == np.float64 and exact[0] == 1 / 3
    assert interpret(graph, given)["value"].dtype == bf16.numpy
    assert interpret(graph, {"x": np.full(3, 0.1)}, exact=True)["value"][0] == 0.1 / 3.0


# ---- states ------------------------------------------------------------------------------------


def counter():
    state = leaf("state", "seen", f32, 3)
    new = make("add", state, make("reduce_sum", X, axes=0))
    return Graph("counter", (X,), (("before", state),), ((state, new),))


def test_states_are_returned_and_the_callers_stay():
    given = {"seen": np.float32([1, 2, 3])}
    outputs, after = interpret_step(counter(), {"x": np.ones((5, 3), np.float32)}, {}, given)
    np.testing.assert_array_equal(outputs["before"], [1, 2, 3])
    np.testing.assert_array_equal(after["seen"], [6, 7, 8])
    np.testing.assert_array_equal(given["seen"], [1, 2, 3])


def test_states_in_place():
    seen = np.float32([1, 2, 3])
    given = {"x": np.ones((5, 3), np.float32)}
    interpret(counter(), given, {}, {"seen": seen}, in_place_states=True)
    np.testing.assert_array_equal(seen, [6, 7, 8])
    with pytest.raises(ShapeError, match="state 'seen' is missing"):
        interpret(counter(), given)


def test_a_states_own_symbol_is_its_arrays_size():
    pool = leaf("state", "pool", f32, symbol("pages"), 2)
    graph = graph_of((), pages=make("dim", value=pool.shape[0], dtype=i32), sum=make(
        "reduce_sum", pool, axes=(0, 1)))
    step = graph_of((), sum=graph.outputs[1][1], pages=graph.outputs[0][1])
    assert interpret(step, {}, {}, {"pool": np.ones((5, 2), np.float32)}) == {"sum": 10, "pages": 5}


# ---- bodies ------------------------------------------------------------------------------------


def test_fusions():
    inner = leaf("input", "inner", f32, TOKENS, 3)
    one = graph_of((inner,), a=make("neg", inner))
    two = graph_of((inner,), a=make("neg", inner), b=make("abs", inner))
    single = make("fusion", X, bodies=(one,), anchor="map")
    pair = make("fusion", X, bodies=(two,), anchor="map")
    graph = graph_of((X,), one=single, two=make("get", pair, index=1))
    x = np.float32([[1, -2, 3]])
    got = interpret(graph, {"x": x})
    np.testing.assert_array_equal(got["one"], -x)
    np.testing.assert_array_equal(got["two"], abs(x))


def test_repeat_with_layers_tables_names_and_states():
    inner, add = leaf("input", "inner", f32, 3), leaf("input", "add", f32, 3)
    weight = leaf("parameter", "w.{}", f32, 3, names=("w.0", "w.1"))
    state = leaf("state", "s.{}", f32, 3, names=("s.0", "s.1"))
    scaled = make("mul", inner, make("add", weight, make("table", dtype=f32, values=(10, 20))))
    moved = make("add", make("add", scaled, add), make("layer", dtype=f32))
    body = Graph("body", (inner, add), (("x", moved),), ((state, make("add", state, moved)),))
    start = leaf("input", "start", f32, 3)
    loop = make("repeat", start, constant([1, 1, 1], f32), bodies=(body,), count=2, carried=1)
    graph = graph_of((start,), value=loop)
    parameters = {"w.0": np.float32([1, 2, 3]), "w.1": np.float32([4, 5, 6])}
    states = {"s.0": zeros(3), "s.1": np.ones(3, np.float32)}
    outputs, after = interpret_step(graph, {"start": np.ones(3, np.float32)}, parameters, states)
    first = np.array([11, 12, 13]) + 1
    second = first * np.array([24, 25, 26]) + 2
    np.testing.assert_array_equal(outputs["value"], second)
    np.testing.assert_array_equal(after["s.0"], first)
    np.testing.assert_array_equal(after["s.1"], second + 1)


def test_the_prelude_is_evaluated_where_its_results_are_missing():
    source = leaf("parameter", "w", f32, 3)
    doubled = Graph("doubled", (), (("value", make("mul", source, constant(2.0))),))
    outputs = (("value", make("add", X, leaf("parameter", "doubled", f32, 3))),)
    graph = Graph("test", (X,), outputs, prelude=(("doubled", doubled),))
    x = zeros(1, 3)
    got = interpret(graph, {"x": x}, {"w": np.float32([1, 2, 3])})["value"]
    np.testing.assert_array_equal(got, [[2, 4, 6]])
    got = interpret(graph, {"x": x}, {"doubled": np.float32([5, 5, 5])})["value"]
    np.testing.assert_array_equal(got, [[5, 5, 5]])


def test_long_chains_are_no_recursion_and_free_what_is_done(monkeypatch):
    node = X
    for _ in range(5000):
        node = make("add", node, constant(1.0))
    alive = []
    monkeypatch.setattr(module, "_evaluate", counting(module._evaluate, alive))
    assert interpret(graph_of((X,), value=node), {"x": zeros(1, 3)})["value"][0, 0] == 5000
    assert alive == [1]


def counting(evaluate, alive):
    def wrapped(*arguments):
        values = evaluate(*arguments)
        alive.append(len(values))
        return values

    return wrapped


# ---- constants and the door --------------------------------------------------------------------


def test_evaluate_constant():
    node = make("add", constant([1.0, 2.0]), make("iota", dtype=f32, shape=(2,), axis=0))
    np.testing.assert_array_equal(evaluate_constant(node), [1, 3])
    assert evaluate_constant(make("neg", X)) is None
    assert evaluate_constant(make("dim", value=TOKENS, dtype=i32)) is None
    assert evaluate_constant(make("add", node, leaf("parameter", "w", f32, 2))) is None
    assert evaluate_constant(make("top_k", node, k=1)) is None


def test_no_interpreting_at_run_time(monkeypatch):
    graph = graph_of((X,), value=X)
    monkeypatch.setenv("LLMC_NO_INTERPRET", "1")
    with pytest.raises(LlmcError, match="LLMC_NO_INTERPRET"):
        interpret(graph, {"x": zeros(1, 3)})
    with allowed():
        interpret(graph, {"x": zeros(1, 3)})
    with pytest.raises(LlmcError, match="LLMC_NO_INTERPRET"):
        interpret(graph, {"x": zeros(1, 3)})
