"""Recurrent ops: references against plain loops, states by slot, chunks, and what is refused."""

import math

import numpy as np
import pytest

from llmc.errors import GraphError, ShapeError
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.interpret import interpret_step
from llmc.ir.ops import make
from llmc.ir.text import format_graph, parse_graph
from llmc.ir.verify import verify

RNG = np.random.default_rng(0)


def leaf(name, *shape, kind="f32"):
    return make("input", name=name, type=TensorType(dtype(kind), shape))


def both(op, *inputs, **attributes):
    node = make(op, *inputs, **attributes)
    return make("get", node, index=0), make("get", node, index=1)


def plain(state, q, k, v, decay, beta, scale):
    """One head of the definition, with Python's own loops: state [d][e], the others by token."""
    outputs = []
    for t in range(len(q)):
        size, width = range(len(state)), range(len(state[0]))
        factor = [math.exp(decay[t][i]) if decay is not None else 1.0 for i in size]
        state = [[state[i][j] * factor[i] for j in width] for i in size]
        value = list(v[t])
        if beta is not None:
            value = [beta[t] * (v[t][j] - sum(state[i][j] * k[t][i] for i in size)) for j in width]
        state = [[state[i][j] + k[t][i] * value[j] for j in width] for i in size]
        outputs.append([scale * sum(q[t][i] * state[i][j] for i in size) for j in width])
    return outputs, state


def operands(rule, heads, query_heads, key_heads, size, columns, tokens, per_key=False):
    """Arrays of linear_attention with one row of a batch."""
    arrays = {
        "state": RNG.normal(size=(1, heads, size, columns)),
        "q": RNG.normal(size=(1, tokens, query_heads, size)),
        "k": RNG.normal(size=(1, tokens, key_heads, size)),
        "v": RNG.normal(size=(1, tokens, heads, columns)),
    }
    if "gated" in rule:
        arrays["decay"] = -RNG.random((1, tokens, heads, size) if per_key else (1, tokens, heads))
    if "delta" in rule:
        arrays["beta"] = RNG.random((1, tokens, heads))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("query_heads, key_heads, per_key", [(2, 2, False), (4, 1, True),
                                                            (1, 1, False)])
def test_linear_attention_is_its_definition(rule, query_heads, key_heads, per_key):
    arrays = operands(rule, 2, query_heads, key_heads, 3, 5, 4, per_key)
    inputs = [leaf(name, *array.shape) for name, array in arrays.items()]
    y, new = both("linear_attention", *inputs, rule=rule)
    graph = Graph("g", tuple(inputs), (("y", y), ("new", new)))
    got, _ = interpret_step(graph, arrays, exact=True)
    for head in range(max(2, query_heads)):
        own = head * 2 // max(2, query_heads)
        decay = arrays.get("decay")
        if decay is not None:
            decay = decay[0, :, own] if per_key else np.repeat(decay[0, :, own, None], 3, axis=1)
        wanted, state = plain(
            arrays["state"][0, own].tolist(), arrays["q"][0, :, head % query_heads
                                                         if query_heads >= 2 else 0].tolist(),
            arrays["k"][0, :, own * key_heads // 2].tolist(), arrays["v"][0, :, own].tolist(),
            decay, arrays["beta"][0, :, own].tolist() if "beta" in arrays else None,
            3 ** -0.5)
        np.testing.assert_allclose(got["y"][0, :, head], wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got["new"][0, own], state, rtol=1e-9, atol=1e-12)


def slot_graph(tokens, sequences):
    """A graph of both slot ops over 3 slots."""
    state = make("state", name="s", type=TensorType(dtype("f32"), (3, 2, 4, 5)), kind="slot")
    window = make("state", name="w", type=TensorType(dtype("f32"), (3, 2, 10)), kind="slot")
    q, k, x = leaf("q", tokens, 1, 4), leaf("k", tokens, 1, 4), leaf("x", tokens, 10)
    decay, weight = leaf("decay", tokens, 2), leaf("weight", 10, 3)
    where = [leaf("slots", sequences, kind="i32"), leaf("offsets", sequences + 1, kind="i32"),
             leaf("positions", tokens, kind="i32")]
    sequence = leaf("sequence", tokens, kind="i32")
    mixed, new_window = both("slot_conv", window, x, weight, *where, sequence, activation="silu")
    v = make("reshape", mixed, shape=(tokens, 2, 5))
    y, new = both("slot_linear_attention", state, q, k, v, *where, decay)
    return Graph("g", (q, k, x, decay, weight, *where, sequence), (("y", y),),
                 ((state, new), (window, new_window)))


def fed(arrays, chunks, states):
    """y of every sequence; chunks: of each step, {sequence: (start, stop)}."""
    results = {0: [], 1: []}
    for chunk in chunks:
        parts = [(s, np.arange(*span)) for s, span in chunk.items()]
        counts = [len(where) for _, where in parts]
        given = {name: np.concatenate([arrays[name][s][where] for s, where in parts])
                 for name in ("q", "k", "x", "decay")}
        given |= {"weight": arrays["weight"], "slots": np.array([2 - s for s, _ in parts]),
                  "offsets": np.cumsum([0, *counts]),
                  "positions": np.concatenate([where for _, where in parts]),
                  "sequence": np.repeat(np.arange(len(parts)), counts)}
        given = {name: a.astype(np.int32) if a.dtype == np.int64 else a
                 for name, a in given.items()}
        graph = slot_graph(sum(counts), len(parts))
        verify(graph)
        outputs, states = interpret_step(graph, given, states=states)
        for (s, _), part in zip(parts, np.split(outputs["y"], np.cumsum(counts)[:-1]),
                                strict=True):
            results[s].append(part)
    return [np.concatenate(parts) for parts in results.values()], states


def test_any_chunks_of_packed_sequences_give_the_same():
    def random(*shape):
        return RNG.normal(size=shape).astype(np.float32)

    arrays = {name: [random(7, *shape), random(5, *shape)] for name, shape in
              (("q", (1, 4)), ("k", (1, 4)), ("x", (10,)), ("decay", (2,)))}
    arrays["weight"] = random(10, 3)
    empty = {"s": np.full((3, 2, 4, 5), np.nan, np.float32),
             "w": np.full((3, 2, 10), np.nan, np.float32)}
    whole, after = fed(arrays, [{0: (0, 7), 1: (0, 5)}], empty)
    pieces = [{0: (0, 1)}, {1: (0, 3), 0: (1, 2)}, {0: (2, 6)}, {0: (6, 7), 1: (3, 5)}]
    parts, states = fed(arrays, pieces, empty)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for name in after:
        np.testing.assert_allclose(after[name][1:], states[name][1:], rtol=1e-6, atol=1e-6)
        assert np.isnan(after[name][0]).all()  # nobody's slot


def test_the_text_parses_back():
    graph = slot_graph(4, 2)
    assert parse_graph(format_graph(graph)).updates == graph.updates


def test_slots_are_checked():
    graph, states = slot_graph(2, 2), {"s": np.zeros((3, 2, 4, 5), np.float32),
                                       "w": np.zeros((3, 2, 10), np.float32)}
    given = {node["name"]: np.zeros([int(d) for d in node.shape], node.dtype.numpy)
             for node in graph.inputs}
    given["offsets"] = np.array([0, 1, 2], np.int32)
    for slots, message in (([0, 3], "slot 3 of 3"), ([1, 1], "share a slot")):
        given["slots"] = np.array(slots, np.int32)
        with pytest.raises(ShapeError, match=message):
            interpret_step(graph, given, states=states)


def test_a_state_that_is_updated_cannot_be_read():
    state = make("state", name="w", type=TensorType(dtype("f32"), (3, 2, 10)), kind="slot")
    ints = [leaf(name, size, kind="i32") for name, size in
            (("slots", 1), ("offsets", 2), ("positions", 4), ("sequence", 4))]
    x, weight = leaf("x", 4, 10), leaf("weight", 10, 3)
    y, new = both("slot_conv", state, x, weight, *ints)
    graph = Graph("g", (x, weight, *ints), (("y", y), ("old", make("neg", state))),
                  ((state, new),))
    with pytest.raises(GraphError, match="overwrites"):
        verify(graph)


@pytest.mark.parametrize("change, message", [
    ({"q": (1, 4, 3, 8)}, "do not fit"), ({"k": (1, 4, 4, 8)}, "do not fit"),
    ({"v": (1, 4, 3, 6)}, "heads of state and values"), ({"k": (1, 5, 2, 8)}, "tokens"),
    ({"q": (1, 4, 2, 7)}, "sizes of state and queries"), ({"decay": (1, 4, 3)}, "each head"),
    ({"state": (2, 2, 8, 6)}, "batch"), ({"decay": None}, "takes 5 inputs"),
])
def test_linear_attention_refuses(change, message):
    shapes = {"state": (1, 2, 8, 6), "q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 6),
              "decay": (1, 4, 2)} | change
    inputs = [leaf(name, *shape) for name, shape in shapes.items() if shape]
    with pytest.raises(GraphError, match=message):
        make("linear_attention", *inputs, rule="gated")
