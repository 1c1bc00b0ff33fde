"""Mixtures of experts: only the chosen experts are multiplied by, and the result is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.codegen.target import Target
from llmc.ir import dtypes
from llmc.ir.dims import symbol
from llmc.ir.graph import Graph, TensorType
from llmc.ir.interpret import interpret
from llmc.ir.ops import OPS, make
from llmc.passes.pipeline import optimize

TOKENS = symbol("tokens", 1)
RANDOM = np.random.default_rng(3)


def mixture(experts: int, chosen: int, hidden: int, inner: int, kind: str = "f32",
            activation: str = "silu") -> Graph:
    """One mixture of `tokens` rows, whose experts and scores are inputs."""
    def leaf(op: str, name: str, dtype: str, *shape):
        return make(op, name=name, type=TensorType(dtypes.dtype(dtype), shape))

    x = leaf("input", "x", kind, TOKENS, hidden)
    numbers = leaf("input", "numbers", "i64", TOKENS, chosen)
    scores = leaf("input", "scores", "f32", TOKENS, chosen)
    matrices = [leaf("parameter", name, kind, rows, columns) for name, rows, columns in (
        ("w1", experts * inner, hidden), ("w3", experts * inner, hidden),
        ("w2", experts * hidden, inner))]
    y = make("routed_experts", x, numbers, scores, *matrices, experts=experts,
             activation=activation)
    return Graph("mixture", (x, numbers, scores), (("y", y),))


def random_case(graph: Graph, experts: int, tokens: int, crowd: bool = False):
    """(inputs, parameters); with `crowd` all tokens choose the same experts."""
    hidden, chosen = graph.inputs[0].shape[1], graph.inputs[1].shape[1]
    numbers = np.array([RANDOM.permutation(experts)[:chosen] for _ in range(tokens)], np.int64)
    inputs = {"x": RANDOM.normal(0, 1, (tokens, hidden)), "numbers": numbers,
              "scores": RANDOM.uniform(0.1, 1, (tokens, chosen)).astype(np.float32)}
    if crowd:
        inputs["numbers"] = np.repeat(numbers[:1], tokens, axis=0)
    inputs["x"] = inputs["x"].astype(graph.inputs[0].dtype.numpy)
    parameters = {leaf["name"]: RANDOM.normal(0, 0.2, leaf.shape).astype(leaf.dtype.numpy)
                  for leaf in graph.parameters()}
    return inputs, parameters


def stage_kinds(graph: Graph) -> set[str]:
    capabilities = Target.host().capabilities()
    return {node["anchor"] for node in optimize(graph, capabilities).nodes()
            if node.op == "fusion"}


@pytest.mark.parametrize(("experts", "chosen", "hidden", "inner", "kind", "activation"), [
    (4, 2, 64, 48, "f32", "silu"), (8, 3, 32, 16, "f32", "gelu"), (5, 1, 96, 80, "f32", "relu"),
    (8, 8, 32, 32, "f32", "gelu_tanh"), (4, 2, 64, 48, "bf16", "silu"),
    (3, 2, 33, 17, "f32", "silu"),  # no whole panels: every expert for every token
])
def test_compiled_equals_interpreted(experts, chosen, hidden, inner, kind, activation):
    graph = mixture(experts, chosen, hidden, inner, kind, activation)
    assert ("grouped_matmul" in stage_kinds(graph)) == (hidden % 32 == 0)
    _, parameters = random_case(graph, experts, 1)
    with llmc.Runtime(graph, parameters=parameters, threads=3) as runtime:
        for tokens, crowd in ((1, False), (2, True), (7, False), (33, False), (65, True)):
            inputs, _ = random_case(graph, experts, tokens, crowd)
            want = interpret(graph, inputs, parameters, exact=True)["y"]
            got = runtime.run(inputs)["y"].astype(np.float64)
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < (2e-2 if kind == "bf16" else 1e-5), (tokens, error)


def test_the_decomposition_computes_the_same():
    graph = mixture(4, 2, 24, 10)
    inputs, parameters = random_case(graph, 4, 9)
    (_, node), = graph.outputs
    simpler = Graph("simpler", graph.inputs, (("y", OPS["routed_experts"].decompose(node)),))
    want, got = (interpret(each, inputs, parameters, exact=True)["y"]
                 for each in (graph, simpler))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_sorted_rows():
    """Rows by group, stable; where each went; where groups start, empty ones too."""
    numbers = make("input", name="numbers", type=TensorType(dtypes.i64, (TOKENS,)))
    node = make("group_rows", numbers, groups=5)
    graph = Graph("sorted", (numbers,), tuple(
        (name, make("get", node, index=number))
        for number, name in enumerate(("order", "place", "starts"))))
    with llmc.Runtime(graph, parameters={}, threads=2) as runtime:
        for rows in (1, 2, 17, 300):
            given = RANDOM.integers(0, 5, rows) // 2 * 2  # groups 1 and 3 stay empty
            want = interpret(graph, {"numbers": given})
            got = runtime.run({"numbers": given})
            assert all(np.array_equal(got[name], want[name]) for name in want)
            assert (given[want["order"]] == np.sort(given)).all()
            assert (want["order"][want["place"]] == np.arange(rows)).all()


def test_experts_that_nobody_chose_are_not_read():
    """Their weights may be NaN: nothing of them reaches the result."""
    graph = mixture(4, 2, 64, 48)
    inputs, parameters = random_case(graph, 4, 6, crowd=True)
    unused = sorted(set(range(4)) - set(inputs["numbers"][0]))
    want = interpret(graph, inputs, parameters, exact=True)["y"]
    for matrix in parameters.values():
        matrix.reshape(4, -1)[unused] = np.nan
    with llmc.Runtime(graph, parameters=parameters, threads=2) as runtime:
        np.testing.assert_allclose(runtime.run(inputs)["y"], want, atol=1e-5 * np.abs(want).max())


def test_the_trained_mixture_has_grouped_products():
    directory = Path(__file__).parents[1] / "goldens" / "hf" / "mixtral"
    from llmc.frontend.model import load_model

    graph = optimize(load_model(directory).graph, Target.host().capabilities())
    (repeat,) = (node for node in graph.nodes() if node.op == "repeat")
    anchors = [node["anchor"] for node in repeat.bodies[0].nodes() if node.op == "fusion"]
    assert anchors.count("grouped_matmul") == 2
