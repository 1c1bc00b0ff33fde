"""merge_matmuls: matmuls of one left operand with several weights become one matmul and slices.

Q, K and V; gate and up. The weights are concatenated along their columns by an expression of
parameters, which the prelude evaluates once. Where each product (or some of them) is followed by a
bias, the biases are concatenated too, so that the merged product is still one matmul + bias.
Quantised matrices of one kind are concatenated as codes, scales and zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.dims import Dim
from llmc.ir.graph import Graph, Node, merge_origins, walk
from llmc.ir.ops import constant, make
from llmc.ir.quantized import quantized
from llmc.passes.match import slice_last
from llmc.passes.prelude import weight_expressions
from llmc.passes.rewrite import only_user, with_inputs, with_repeats, with_roots


def merge_matmuls(graph: Graph) -> Graph:
    """The graph with matmuls of the same left operand merged, in the bodies of repeats too."""
    graph = with_repeats(graph, merge_matmuls)
    users, weights = graph.users(), weight_expressions(graph)
    results = {node for _, node in graph.outputs}
    groups: dict[tuple, list[_Product]] = {}
    for node in graph.nodes():
        if node.op == "matmul" and node.inputs[1] in weights and node.inputs[1].rank == 2:
            left, weight = node.inputs
            product = _product(node, users, weights, results)
            kind = (left, weight.dtype, node.attributes, _quantization(weight), _turns(weight))
            groups.setdefault(kind, []).append(product)
    merged = {each.result: products for products in groups.values() if len(products) > 1
              for each in products}
    return _replace(graph, merged) if merged else graph


def _replace(graph: Graph, merged: dict[Node, list[_Product]]) -> Graph:
    """The graph with each result of a merged group as a slice of the group's one product."""
    done: dict[Node, Node] = {}
    slices: dict[Node, Node] = {}
    for node in dict.fromkeys((*graph.inputs, *graph.nodes())):
        if node in merged:
            if node not in slices:
                left = merged[node][0].matmul.inputs[0]
                slices.update(_merge(merged[node], done[left]))
            done[node] = slices[node]
            merge_origins(done[node], node)
        else:
            done[node] = with_inputs(node, [done[each] for each in node.inputs])
    return with_roots(graph, done.__getitem__)


@dataclass(frozen=True)
class _Product:
    """A matmul by a weight, and the sum that adds its bias if that is its only user."""

    matmul: Node
    bias: Node | None
    result: Node


def _product(matmul: Node, users: dict[Node, list[Node]], weights: set[Node],
             results: set[Node]) -> _Product:
    total = only_user(users, matmul)
    if total is not None and total.op == "add" and matmul not in results:
        others = [each for each in total.inputs if each is not matmul]
        if len(others) == 1 and others[0] in weights and total.type == matmul.type \
                and others[0].shape == matmul.shape[-1:]:
            return _Product(matmul, others[0], total)
    return _Product(matmul, None, matmul)


def _turns(weight: Node) -> tuple[tuple[int, ...], ...]:
    """Which turns of a loop share a weight: for each of its parameters, the first turn with the
    same tensor. What some turns share stays apart from what each has of its own."""
    found = [leaf["names"] for leaf in walk([weight]) if leaf.op == "parameter" and leaf["names"]]
    return tuple(sorted({tuple(map(names.index, names)) for names in found}))


def _quantization(weight: Node) -> tuple | None:
    """What quantised matrices must agree in to be one; None of a matrix that is not quantised."""
    found = quantized(weight)
    return None if found is None else (found.group, *(each.dtype for each in found.operands))


def _columns(weights: Sequence[Node]) -> Node:
    """The weights side by side."""
    parts = [quantized(each) for each in weights]
    known = [each for each in parts if each is not None]
    if not known:
        return make("concat", *weights, axis=1)
    operands = zip(*(each.operands for each in known), strict=True)
    return known[0].with_operands([make("concat", *each, axis=0) for each in operands]).matrix()


def _merge(products: Sequence[_Product], left: Node) -> dict[Node, Node]:
    """Result of each product -> its slice of the merged one."""
    first = products[0].matmul
    merged = with_inputs(first, (left, _columns([each.matmul.inputs[1] for each in products])))
    if any(each.bias is not None for each in products):
        zero = constant(0, first.dtype)
        biases = [each.bias or make("broadcast", zero, shape=each.matmul.shape[-1:])
                  for each in products]
        merged = make("add", merged, make("concat", *biases, axis=0))
    slices: dict[Node, Node] = {}
    start: Dim = 0
    for each in products:
        stop = start + each.matmul.shape[-1]
        slices[each.result] = slice_last(merged, start, stop)
        start = stop
    return slices
