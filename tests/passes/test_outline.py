"""outline: which stacks of layers become loops, and that the loops compute the same."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from steps import F32, I32, TOKENS, bert, llama, parameters_of, step_of, tensor, weight

from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.interpret import interpret_step
from llmc.ir.ops import constant, make
from llmc.ir.verify import verify
from llmc.passes.merge_matmuls import merge_matmuls
from llmc.passes.names import result_name, template_name
from llmc.passes.outline import outline
from llmc.passes.simplify import simplify

HIDDEN = 9


def block(x: Node, name: str, activation: str = "silu", shared: Node | None = None) -> Node:
    """x + activation(norm(x) @ w) (+ shared)"""
    normed = make("rms_norm", x, weight(f"{name}.norm", HIDDEN), epsilon=1e-5)
    y = make(activation, make("matmul", normed, weight(f"{name}.w", HIDDEN, HIDDEN)))
    x = make("add", x, y)
    return x if shared is None else make("add", x, shared)


def model(stack: Callable[[Node], Node | list[tuple[str, Node]]]) -> Graph:
    ids = tensor("ids", I32, TOKENS)
    result = stack(make("gather", weight("embed", 33, HIDDEN), ids, axis=0))
    outputs = result if isinstance(result, list) else [("y", result)]
    return Graph("model", (ids,), tuple(outputs))


def repeats(graph: Graph) -> list[tuple[int, int]]:
    """(count, carried) of every repeat."""
    return [(node["count"], node["carried"]) for node in graph.nodes() if node.op == "repeat"]


def check(graph: Graph, expected: list[int]) -> Graph:
    """The outlined graph has loops of these counts, is valid and computes the same."""
    outlined = outline(graph)
    verify(outlined)
    assert [count for count, _ in repeats(outlined)] == expected
    inputs, states = step_of(graph)
    parameters = parameters_of(graph)
    wanted = interpret_step(graph, inputs, parameters, states, exact=True)
    found = interpret_step(outlined, inputs, parameters, states, exact=True)
    for before, after in zip(wanted, found, strict=True):
        for name, array in before.items():
            np.testing.assert_allclose(after[name], array, rtol=1e-12, atol=1e-12)
    return outlined


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_llama_and_bert(layers: int) -> None:
    check(llama(layers), [layers])
    check(bert(layers), [layers])


def test_one_layer_is_no_loop() -> None:
    graph = llama(1)
    assert outline(graph) is graph


def test_layers_of_two_kinds_alternate() -> None:
    def stack(x: Node) -> Node:
        for i in range(7):
            x = block(x, f"h.{i}", "silu" if i % 2 else "gelu")
        return x

    outlined = check(model(stack), [3])
    [loop] = [node for node in outlined.nodes() if node.op == "repeat"]
    assert [leaf["names"] for leaf in loop.bodies[0].parameters()] == [
        ("h.0.norm", "h.2.norm", "h.4.norm"), ("h.0.w", "h.2.w", "h.4.w"),
        ("h.1.norm", "h.3.norm", "h.5.norm"), ("h.1.w", "h.3.w", "h.5.w"),
    ]
    names = [leaf["name"] for leaf in loop.bodies[0].parameters()]
    assert len(set(names)) == len(names)


def test_an_odd_layer_in_the_middle_splits_the_stack() -> None:
    def stack(x: Node) -> Node:
        for i in range(7):
            x = block(x, f"h.{i}", "tanh" if i == 3 else "silu")
        return x

    check(model(stack), [3, 3])


def test_what_every_layer_reads_is_an_invariant() -> None:
    """The first layer stays: to it the embedding is both, the stream and what layers read again."""
    def stack(x: Node) -> Node:
        stream = x
        for i in range(4):
            stream = block(stream, f"h.{i}", shared=x)
        return stream

    outlined = check(model(stack), [3])
    [loop] = [node for node in outlined.nodes() if node.op == "repeat"]
    assert [node.op for node in loop.inputs] == ["add", "gather"]


def test_shared_weights_stay_ordinary_parameters() -> None:
    outlined = check(model(lambda x: block(block(block(x, "a"), "a"), "a")), [3])
    assert [leaf["names"] for leaf in outlined.parameters()] == [(), (), ()]


def test_constants_that_differ_become_a_table() -> None:
    def stack(x: Node) -> Node:
        for i in range(3):
            x = make("mul", block(x, f"h.{i}"), constant(1.0 + i, F32))
        return x

    outlined = check(model(stack), [3])
    [table] = [node for node in outlined.all_nodes() if node.op == "table"]
    assert table["values"] == (1.0, 2.0, 3.0)


def test_tensors_that_differ_are_no_loop() -> None:
    def stack(x: Node) -> Node:
        for i in range(2):
            x = make("mul", block(x, f"h.{i}"), constant(np.arange(HIDDEN) + i, F32))
        return x

    check(model(stack), [])


def test_layers_whose_values_are_wanted_stay() -> None:
    def stack(x: Node) -> list[tuple[str, Node]]:
        outputs = []
        for i in range(6):
            x = block(x, f"h.{i}")
            if i == 2:
                outputs.append(("middle", x))
        return [*outputs, ("y", x)]

    check(model(stack), [3, 3])


def test_time_is_linear_in_depth() -> None:
    def seconds(layers: int) -> float:
        graph = simplify(llama(layers))
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            outline(graph)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(64) < 10 * seconds(16)


def test_names() -> None:
    assert template_name(["a.0.b2", "a.1.b2", "a.11.b2"]) == "a.{}.b2"
    assert template_name(["x", "y"]) == "x"
    assert result_name(["m.q_proj.weight", "m.k_proj.weight", "m.v_proj.weight"]) == "m.qkv_proj"
    assert result_name(["m.gate.weight", "m.up.weight"]) == "m.gate_up"
    assert result_name(["m.w.weight"]) == "m.w"
    assert result_name(["MatMul_1", "MatMul_2"]) == "MatMul_1_2"


def test_updates_of_states_belong_to_their_layers():
    """A recurrent layer's new state is read by nobody else, and comes last in the graph."""
    where = [tensor(name, I32, size) for name, size in
             (("slots", 2), ("offsets", 3), ("positions", TOKENS), ("sequence", TOKENS))]
    x = tensor("x", F32, TOKENS, HIDDEN)
    carried, updates = make("tanh", x), []
    for layer in range(4):
        state = make("state", name=f"layers.{layer}.conv", kind="slot",
                     type=TensorType(F32, (5, 2, HIDDEN)))
        both = make("slot_conv", state, carried, weight(f"layers.{layer}.w", HIDDEN, 3), *where)
        y = make("silu", make("get", both, index=0))
        carried = make("add", carried, make("mul", y, weight(f"layers.{layer}.scale", HIDDEN)))
        updates.append((state, make("get", both, index=1)))
    graph = Graph("model", (x, *where), (("y", carried),), tuple(updates))
    outlined = outline(graph)
    verify(outlined)
    assert repeats(outlined) == [(4, 1)] and not outlined.updates


def test_what_turns_share_is_not_merged_with_what_they_own():
    """Layers that take two matrices in turn, each with one more of its own."""
    def stack(x: Node) -> Node:
        for layer in range(6):
            normed = make("rms_norm", x, weight(f"layers.{layer}.norm", HIDDEN), epsilon=1e-5)
            shared = make("matmul", normed, weight(f"layers.{layer % 2}.shared", HIDDEN, HIDDEN))
            own = make("matmul", normed, weight(f"layers.{layer}.own", HIDDEN, HIDDEN))
            x = make("add", x, make("mul", make("silu", shared), own))
        return x

    merged = merge_matmuls(outline(model(stack)))
    [loop] = [node for node in merged.nodes() if node.op == "repeat"]
    matrices = [node.inputs[1]["names"] for node in loop.bodies[0].nodes() if node.op == "matmul"]
    assert sorted(len(set(names)) for names in matrices) == [2, 6]
