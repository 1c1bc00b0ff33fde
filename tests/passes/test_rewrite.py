"""The rewrite engine: fixed points, bodies, origins, and rules that never end."""

from __future__ import annotations

import pytest
from steps import F32, TOKENS, llama, tensor

from llmc.errors import CompileError
from llmc.ir.graph import Graph, Node, Origin, origin_of, set_origin
from llmc.ir.ops import constant, make
from llmc.ir.verify import verify
from llmc.passes.outline import outline
from llmc.passes.rewrite import only_user, rewrite, rule
from llmc.passes.simplify import simplify


def graph_of(node: Node, *inputs: Node) -> Graph:
    return Graph("test", inputs, (("y", node),))


@rule("neg")
def drop_pairs(node: Node) -> Node | None:
    """-(-x) -> x"""
    inner = node.inputs[0]
    return inner.inputs[0] if inner.op == "neg" else None


def test_rules_apply_bottom_up_to_a_fixed_point() -> None:
    x = tensor("x", F32, TOKENS)
    node = x
    for _ in range(7):
        node = make("neg", node)
    result = rewrite(graph_of(node, x), [drop_pairs])
    assert result.outputs == (("y", make("neg", x)),)


def test_a_graph_that_no_rule_changes_is_returned_itself() -> None:
    graph = llama(2)
    assert rewrite(graph, [drop_pairs]) is graph
    simple = simplify(graph)
    assert simplify(simple) is simple


def test_long_chains_need_no_recursion() -> None:
    x = node = tensor("x", F32, TOKENS)
    for _ in range(20_001):
        node = make("neg", node)
    result = rewrite(graph_of(node, x), [drop_pairs])
    assert len(result.nodes()) == 2


def test_bodies_are_entered() -> None:
    @rule("silu")
    def spelled_out(node: Node) -> Node | None:
        """silu(x) -> x * sigmoid(x)"""
        return make("mul", node.inputs[0], make("sigmoid", node.inputs[0]))

    graph = rewrite(outline(llama(3)), [spelled_out])
    verify(graph)
    ops = {node.op for node in graph.all_nodes()}
    assert "repeat" in ops and "sigmoid" in ops and "silu" not in ops


def test_replacements_inherit_origins() -> None:
    x = tensor("x", F32, TOKENS, 5)
    one = constant(1.0, F32)
    scaled = set_origin(make("mul", make("exp", x), make("add", one, one)), Origin(module="h.0"))
    result = simplify(graph_of(scaled, x)).outputs[0][1]
    assert result is not scaled
    assert origin_of(result) == Origin(module="h.0")


def test_rules_that_undo_each_other_are_named() -> None:
    @rule("add")
    def flip(node: Node) -> Node | None:
        """x + y -> y + x, for ever"""
        return make("add", *reversed(node.inputs))

    x, y = tensor("x", F32, TOKENS), tensor("y", F32, TOKENS)
    with pytest.raises(CompileError, match="flip"):
        rewrite(graph_of(make("add", x, y), x, y), [flip])


def test_rules_that_grow_without_end_are_named() -> None:
    @rule("exp")
    def grow(node: Node) -> Node | None:
        """exp(x) -> exp(x + x), for ever"""
        return make("exp", make("add", node.inputs[0], node.inputs[0]))

    x = tensor("x", F32, TOKENS)
    with pytest.raises(CompileError, match="grow has fired"):
        rewrite(graph_of(make("exp", x), x), [grow])


def test_only_user() -> None:
    x = tensor("x", F32, TOKENS)
    once = make("exp", x)
    graph = graph_of(make("add", once, make("sin", x)), x)
    assert only_user(graph.users(), once) is graph.outputs[0][1]
    assert only_user(graph.users(), x) is None
