"""The whole pipeline on Llama and BERT steps: same values, valid graphs, the fusions we promise."""

from __future__ import annotations

import time

import numpy as np
import pytest
from steps import (
    CAPABILITIES,
    F32,
    I32,
    TOKENS,
    bert,
    linear,
    llama,
    parameters_of,
    step_of,
    tensor,
    weight,
)

from llmc.ir.graph import Graph, Node
from llmc.ir.interpret import interpret_step
from llmc.ir.ops import constant, make
from llmc.ir.program import Loop
from llmc.ir.text import format_graph, parse_graph
from llmc.ir.verify import verify
from llmc.passes.lower import lower
from llmc.passes.pipeline import PIPELINE, optimize

GRAPHS = {
    "llama": lambda: llama(3),
    "llama with biases": lambda: llama(2, bias=True),
    "llama of one layer": lambda: llama(1),
    "bert": lambda: bert(3),
}


def check_equal(before: Graph, after: Graph) -> None:
    """Both graphs give the same outputs and states, in f64 (so only real mistakes show)."""
    inputs, states = step_of(before)
    parameters = parameters_of(before)
    expected, old_states = interpret_step(before, inputs, parameters, states, exact=True)
    found, new_states = interpret_step(after, inputs, parameters, states, exact=True)
    for name, array in {**expected, **old_states}.items():
        np.testing.assert_allclose({**found, **new_states}[name], array, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_pass_leaves_a_valid_graph_that_computes_the_same(name: str) -> None:
    graph = GRAPHS[name]()
    verify(graph)

    def check(name: str, before: Graph, after: Graph) -> None:
        verify(after)
        text = format_graph(after)
        assert format_graph(parse_graph(text)) == text, name
        check_equal(graph, after)

    optimize(graph, CAPABILITIES, check)


def fusions(graph: Graph) -> list[tuple[str, tuple[str, ...]]]:
    """(anchor, ops of the body that compute) of each fusion, without views."""
    views = {"reshape", "slice", "transpose"}
    return [
        (node["anchor"], tuple(sorted(each.op for each in node.bodies[0].nodes()
                                      if each.inputs and each.op not in views)))
        for node in graph.nodes() if node.op == "fusion"
    ]


def the_repeat(graph: Graph) -> Node:
    [node] = [node for node in graph.nodes() if node.op == "repeat"]
    return node


LLAMA_LAYER = [
    ("matmul", ("matmul", "rms_norm")),
    ("map", ("cache_append", "cache_append", "rope", "rope")),
    ("attention", ("paged_attention",)),
    ("matmul", ("add", "matmul")),
    ("matmul", ("matmul", "mul", "rms_norm", "silu")),
    ("matmul", ("add", "matmul")),
]


def test_a_llama_layer_is_six_fusions() -> None:
    graph = optimize(llama(4), CAPABILITIES)
    loop = the_repeat(graph)
    assert loop["count"] == 4
    assert fusions(loop.bodies[0]) == LLAMA_LAYER
    assert fusions(graph) == [
        ("map", ("gather",)),
        ("map", ("cast", "cos", "mul", "sin")),
        ("matmul", ("gather", "matmul", "rms_norm")),
    ]


def test_biases_ride_along() -> None:
    body = the_repeat(optimize(llama(2, bias=True), CAPABILITIES)).bodies[0]
    assert [anchor for anchor, _ in fusions(body)] == [anchor for anchor, _ in LLAMA_LAYER]
    assert fusions(body)[0] == ("matmul", ("add", "matmul", "rms_norm"))
    assert fusions(body)[4] == ("matmul", ("add", "add", "matmul", "mul", "rms_norm", "silu"))
    gate_up = [node for node in body.nodes() if node.op == "fusion"][4].bodies[0]
    [matmul] = [node for node in gate_up.nodes() if node.op == "matmul"]
    assert {user.op for user in gate_up.users()[matmul]} == {"slice"}


def test_a_bert_layer_is_seven_fusions() -> None:
    graph = optimize(bert(3), CAPABILITIES)
    loop = the_repeat(graph)
    assert loop["count"] == 3
    assert fusions(loop.bodies[0]) == [
        ("matmul", ("add", "matmul")),
        ("attention", ("packed_attention",)),
        ("matmul", ("add", "add", "matmul")),
        ("reduce", ("layer_norm",)),
        ("matmul", ("add", "gelu", "matmul")),
        ("matmul", ("add", "add", "matmul")),
        ("reduce", ("layer_norm",)),
    ]
    assert fusions(graph) == [
        ("reduce", ("add", "add", "gather", "gather", "gather", "layer_norm"))]


def test_what_is_left_is_fusions_repeats_gets_views_and_leaves() -> None:
    allowed = {"fusion", "repeat", "get", "reshape", "transpose", "slice", "broadcast"}
    for make_graph in GRAPHS.values():
        graph = optimize(make_graph(), CAPABILITIES)
        for scope in (graph, *(node.bodies[0] for node in graph.nodes() if node.op == "repeat")):
            assert {node.op for node in scope.nodes() if node.inputs} <= allowed


def test_time_grows_with_depth_only_as_far_as_outlining_reads_the_layers() -> None:
    def seconds(layers: int) -> dict[str, float]:
        spent: dict[str, float] = {}
        graph = llama(layers)
        last = time.perf_counter()

        def clock(name: str, before: Graph, after: Graph) -> None:
            nonlocal last
            now = time.perf_counter()
            spent[name], last = now - last, now

        optimize(graph, CAPABILITIES, clock)
        return spent

    seconds(2)
    best = {name: min(seconds(32)[name] for _ in range(3)) for name, _ in PIPELINE}
    assert best["simplify"] + best["outline"] < 0.5
    assert sum(best[name] for name, _ in PIPELINE[2:]) < 0.25


def test_preludes_survive_the_text_form() -> None:
    graph = optimize(llama(2), CAPABILITIES)
    assert parse_graph(format_graph(graph)).prelude == graph.prelude


def test_a_loop_that_feeds_another_is_optimized_too() -> None:
    ids = tensor("ids", I32, TOKENS)
    x = make("gather", weight("embed", 33, 9), ids, axis=0)
    for number in range(6):
        scale = make("add", weight(f"h.{number}.norm", 9), constant(1, F32))
        normed = make("rms_norm", x, scale, epsilon=1e-5)
        y = make("matmul", normed, weight(f"h.{number}.w", 9, 9))
        x = make("add", x, make("silu" if number < 3 else "tanh", y))
    graph = Graph("two_stacks", (ids,), (("y", x),))
    optimized = optimize(graph, CAPABILITIES)
    loops = [node for node in optimized.nodes() if node.op == "repeat"]
    assert [loop["count"] for loop in loops] == [3, 3]
    for loop in loops:
        assert {node.op for node in loop.bodies[0].nodes()} == {"input", "parameter", "fusion"}
    check_equal(graph, optimized)


def test_what_every_turn_reads_may_be_a_view_or_a_constant() -> None:
    """A norm without a weight, and a reshaped input: invariants of a loop without a buffer."""
    source, flat = tensor("x", F32, TOKENS, 24), tensor("shift", F32, 1, 24)
    x = source
    ones = make("broadcast", constant(1.0, F32), shape=(24,))
    for layer in range(4):
        inner = make("rms_norm", x, ones, epsilon=1e-5)
        inner = make("silu", linear(inner, f"layers.{layer}.up", 40))
        inner = make("layer_norm", linear(inner, f"layers.{layer}.down", 24), ones,
                     make("reshape", flat, shape=(24,)), epsilon=1e-5)
        x = make("add", x, inner)
    graph = optimize(Graph("norms", (source, flat), (("y", x),)), CAPABILITIES)
    assert any(node.op == "repeat" for node in graph.nodes())
    program = lower(graph, CAPABILITIES)
    assert any(isinstance(step, Loop) for step in program.steps)
    written = {name for stage in program.stages() for name in stage.results}
    for stage in program.stages():
        for name in stage.operands:
            assert name in written or program.buffers[name].role in ("input", "weight"), name
