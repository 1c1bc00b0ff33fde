"""legalize: ops that the target has no kernel for become ops that it has.

Composite ops are decomposed as the op table says. Row-wise ops (softmax, reductions) work on the
last axis: others get transposes round them.
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.ir.dims import product
from llmc.ir.graph import Graph, Node
from llmc.ir.ops import OPS, make
from llmc.ir.program import Capabilities
from llmc.passes.experts import expand_experts
from llmc.passes.match import NORMS, REDUCTIONS, is_last_axis
from llmc.passes.rewrite import Rule, rewrite, rule


def legalize(graph: Graph, capabilities: Capabilities) -> Graph:
    """The graph without ops that the target lacks."""
    return rewrite(graph, [*LAYOUT_RULES, expand_experts(capabilities),
                           decompose_without_kernel(capabilities)])


def decompose_without_kernel(capabilities: Capabilities) -> Rule:
    """The rule that decomposes composites which are no kernel, nor part of the row-wise one."""
    kept = capabilities.kernels | NORMS
    lacking = tuple(name for name, op in OPS.items()
                    if op.decompose is not None and name not in kept)

    def decompose(node: Node) -> Node | None:
        expand: Callable[[Node], Node | None] | None = OPS[node.op].decompose
        return expand(node) if expand is not None else None

    return Rule("decompose_without_kernel", lacking, decompose)


@rule("softmax")
def softmax_on_last_axis(node: Node) -> Node | None:
    """softmax(x, axis) -> transpose(softmax(transpose(x), -1))"""
    axis, rank = node["axis"] % node.rank, node.rank
    if axis == rank - 1:
        return None
    swap = list(range(rank))
    swap[axis], swap[-1] = swap[-1], swap[axis]
    moved = make("transpose", node.inputs[0], permutation=tuple(swap))
    return make("transpose", make("softmax", moved, axis=rank - 1), permutation=tuple(swap))


@rule(*sorted(REDUCTIONS))
def reduce_on_last_axis(node: Node) -> Node | None:
    """reduce(x, axes) -> reshape(reduce(reshape(transpose(x)), -1)): reduced axes last, as one"""
    source = node.inputs[0]
    axes = sorted(axis % source.rank for axis in node["axes"])
    if is_last_axis(axes, source.rank) or not axes:
        return None
    kept = [axis for axis in range(source.rank) if axis not in axes]
    moved = make("transpose", source, permutation=(*kept, *axes))
    rows = tuple(source.shape[axis] for axis in kept)
    flat = make("reshape", moved, shape=(*rows, product(source.shape[axis] for axis in axes)))
    total = make(node.op, flat, axes=(len(kept),), keep=False)
    return make("reshape", total, shape=node.shape)


@rule("argmax", "argmin")
def select_on_last_axis(node: Node) -> Node | None:
    """argmax(x, axis) -> reshape(argmax(transpose(x), -1))"""
    source = node.inputs[0]
    axis = node["axis"] % source.rank
    if axis == source.rank - 1:
        return None
    kept = [each for each in range(source.rank) if each != axis]
    moved = make("transpose", source, permutation=(*kept, axis))
    found = make(node.op, moved, axis=source.rank - 1, keep=False, last=node["last"])
    return make("reshape", found, shape=node.shape)


@rule("attention")
def wide_attention(node: Node) -> Node | None:
    """attention in f64 -> its decomposition: kernels sum in f32"""
    decompose = OPS["attention"].decompose
    return decompose(node) if node.dtype.bits == 64 and decompose is not None else None


LAYOUT_RULES = [softmax_on_last_axis, reduce_on_last_axis, select_on_last_axis, wide_attention]
