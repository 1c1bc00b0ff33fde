"""Rules for ops that move values without changing them: part of simplify."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llmc.ir.graph import Node
from llmc.ir.ops import ELEMENTWISE, LEAVES, constant_value, make
from llmc.passes.match import last_axis_slice, slice_last
from llmc.passes.rewrite import rule, with_inputs


@rule("reshape", "broadcast")
def needless_view(node: Node) -> Node | None:
    """reshape(x, own shape) -> x, broadcast(x, own shape) -> x"""
    inner = node.inputs[0]
    return inner if inner.type == node.type else None


@rule("reshape", "broadcast")
def view_of_view(node: Node) -> Node | None:
    """reshape(reshape(x)) -> reshape(x), broadcast(broadcast(x)) -> broadcast(x)"""
    inner = node.inputs[0]
    if inner.op != node.op:
        return None
    return make(node.op, inner.inputs[0], shape=node.shape)


@rule("transpose")
def needless_transpose(node: Node) -> Node | None:
    """transpose(x, identity) -> x; a transpose that moves axes of size 1 only -> reshape"""
    order = tuple(node["permutation"])
    if order == tuple(range(len(order))):
        return node.inputs[0]
    shape = node.inputs[0].shape
    kept = [axis for axis in order if shape[axis] != 1]
    return make("reshape", node.inputs[0], shape=node.shape) if kept == sorted(kept) else None


@rule("transpose")
def transpose_of_transpose(node: Node) -> Node | None:
    """transpose(transpose(x, p), q) -> transpose(x, p[q])"""
    inner = node.inputs[0]
    if inner.op != "transpose":
        return None
    first = inner["permutation"]
    return make("transpose", inner.inputs[0],
                permutation=tuple(first[axis] for axis in node["permutation"]))


@rule("slice")
def whole_slice(node: Node) -> Node | None:
    """x[0:n] -> x"""
    source = node.inputs[0]
    if any(step != 1 for step in node["steps"]) or any(start != 0 for start in node["starts"]):
        return None
    return source if source.type == node.type else None


@rule("slice")
def slice_of_slice(node: Node) -> Node | None:
    """x[a:b][c:d] -> x[a+c:a+d], for steps of 1"""
    inner = node.inputs[0]
    if inner.op != "slice" or any(step != 1 for step in (*node["steps"], *inner["steps"])):
        return None
    starts = [a + c for a, c in zip(inner["starts"], node["starts"], strict=True)]
    stops = [start + size for start, size in zip(starts, node.shape, strict=True)]
    return make("slice", inner.inputs[0], starts=tuple(starts), stops=tuple(stops),
                steps=tuple(node["steps"]))


@rule("slice")
def slice_of_concat(node: Node) -> Node | None:
    """concat(x, y)[within y] -> y[...]"""
    inner = node.inputs[0]
    if inner.op != "concat" or any(step != 1 for step in node["steps"]):
        return None
    axis = inner["axis"] % inner.rank
    start, size = node["starts"][axis], node.shape[axis]
    offset = 0
    for piece in inner.inputs:
        extent = piece.shape[axis]
        if not all(isinstance(dim, int) for dim in (start, size, offset, extent)):
            return None
        if offset <= start and start + size <= offset + extent:
            starts, stops = list(node["starts"]), list(node["stops"])
            starts[axis], stops[axis] = start - offset, start - offset + size
            return make("slice", piece, starts=tuple(starts), stops=tuple(stops),
                        steps=tuple(node["steps"]))
        offset += extent
    return None


@rule("concat")
def concat_of_one(node: Node) -> Node | None:
    """concat(x) -> x; operands that are empty along the axis fall out"""
    axis = node["axis"] % node.rank
    kept = [each for each in node.inputs if each.shape[axis] != 0] or list(node.inputs[:1])
    if len(kept) == 1:
        return kept[0]
    return make("concat", *kept, axis=axis) if len(kept) < len(node.inputs) else None


@rule("concat")
def concat_of_slices(node: Node) -> Node | None:
    """concat(x[a:b], x[b:c]) -> x[a:c]"""
    axis = node["axis"] % node.rank
    merged = [node.inputs[0]]
    for each in node.inputs[1:]:
        joined = _join(merged[-1], each, axis)
        merged[-1:] = [joined] if joined is not None else [merged[-1], each]
    if len(merged) == len(node.inputs):
        return None
    return merged[0] if len(merged) == 1 else make("concat", *merged, axis=axis)


def _join(first: Node, second: Node, axis: int) -> Node | None:
    """x[.. a:b ..] and x[.. b:c ..], side by side along the axis, as one slice; else None."""
    if first.op != "slice" or second.op != "slice" or first.inputs != second.inputs:
        return None
    if any(step != 1 for step in (*first["steps"], *second["steps"])):
        return None
    ends = [start + size for start, size in zip(first["starts"], first.shape, strict=True)]
    fits = all(
        ends[i] == second["starts"][i] if i == axis
        else first["starts"][i] == second["starts"][i] and first.shape[i] == second.shape[i]
        for i in range(first.rank)
    )
    if not fits:
        return None
    ends[axis] = second["starts"][axis] + second.shape[axis]
    return make("slice", first.inputs[0], starts=tuple(first["starts"]), stops=tuple(ends),
                steps=(1,) * first.rank)


@rule("gather")
def gather_of_constant(node: Node) -> Node | None:
    """take(x, 3) -> x[3:4] reshaped; take(x, [a, a+1, ...]) -> x[a:...]"""
    source, index = node.inputs
    axis = node["axis"] % source.rank
    extent = source.shape[axis]
    run = _run_of(index)
    if run is None or not isinstance(extent, int):
        return None
    start = run[0]
    if not 0 <= start <= start + len(run) <= extent:
        return None
    starts, stops = [0] * source.rank, list(source.shape)
    starts[axis], stops[axis] = start, start + len(run)
    piece = make("slice", source, starts=tuple(starts), stops=tuple(stops),
                 steps=(1,) * source.rank)
    return make("reshape", piece, shape=node.shape)


def _run_of(index: Node) -> Sequence[int] | None:
    """The indices of a gather, if they are one constant or count up by one."""
    if index.op == "iota" and index.rank == 1 and isinstance(index.shape[0], int):
        return range(index.shape[0])
    if index.op != "constant" or index.rank > 1:
        return None
    values = [int(each) for each in constant_value(index).reshape(-1)]
    return values if values and all(b == a + 1 for a, b in pairwise(values)) else None


@rule("matmul")
def matmul_of_reshape(node: Node) -> Node | None:
    """reshape(x, [rows, k]) @ w -> reshape(x @ w): leading axes folded and unfolded for a matmul"""
    view, right = node.inputs
    if not _keeps_last_axis(view) or right.rank != 2:
        return None
    product = with_inputs(node, (view.inputs[0], right))
    return make("reshape", product, shape=node.shape)


@rule(*sorted(ELEMENTWISE))
def elementwise_of_reshape(node: Node) -> Node | None:
    """f(reshape(x), v) -> reshape(f(x, v)), where the last axis stays and v is a row or a scalar"""
    view = node.inputs[0]
    rows = ((), (1,), node.shape[-1:])
    if not _keeps_last_axis(view) or node.shape != view.shape:
        return None
    if any(each.shape not in rows for each in node.inputs[1:]):
        return None
    return make("reshape", with_inputs(node, (view.inputs[0], *node.inputs[1:])), shape=node.shape)


@rule("reshape")
def reshape_of_product(node: Node) -> Node | None:
    """reshape(f(reshape(x) @ w, row)) -> f(reshape(x) @ w, row): leading axes unfolded at once"""
    chain: list[Node] = []
    inner = node.inputs[0]
    while inner.op in ELEMENTWISE and len(chain) < 4 and all(
            each.shape in ((), (1,), inner.shape[-1:]) for each in inner.inputs[1:]):
        chain.append(inner)
        inner = inner.inputs[0]
    if inner.op != "matmul" or inner.inputs[0].op != "reshape" or inner.inputs[1].rank != 2:
        return None
    if not _keeps_last_axis(node) or node.shape[-1] != inner.shape[-1]:
        return None
    view, right = inner.inputs
    view = make("reshape", view.inputs[0], shape=(*node.shape[:-1], view.shape[-1]))
    value = with_inputs(inner, (view, right))
    for each in reversed(chain):
        value = with_inputs(each, (value, *each.inputs[1:]))
    return value if value.type == node.type else None


def _keeps_last_axis(node: Node) -> bool:
    """Whether a node is a reshape of leading axes only, of something computed."""
    if node.op != "reshape" or not node.rank or not node.inputs[0].rank:
        return False
    source = node.inputs[0]
    return source.op not in LEAVES and source.shape[-1] == node.shape[-1] and source.rank >= 2


@rule("slice")
def slice_of_elementwise(node: Node) -> Node | None:
    """op(x, y)[..., a:b] -> op(x[..., a:b], y[..., a:b]); operands broadcast along the axis stay

    No simplification (it makes more nodes): a matmul's epilogue wants slices of the product itself.
    """
    bounds, inner = last_axis_slice(node), node.inputs[0]
    if bounds is None or inner.op not in ELEMENTWISE:
        return None
    width = inner.shape[-1]
    inputs = [slice_last(each, *bounds) if each.rank and each.shape[-1] == width else each
              for each in inner.inputs]
    return with_inputs(inner, inputs)


MOVEMENT_RULES = [
    needless_view, view_of_view, needless_transpose, transpose_of_transpose, whole_slice,
    slice_of_slice, slice_of_concat, concat_of_one, concat_of_slices, gather_of_constant,
    matmul_of_reshape, elementwise_of_reshape, reshape_of_product,
]
