"""Det: elimination with pivots, as a chain of elementwise ops on all matrices at once."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dtypes import f32, i64
from llmc.ir.graph import Node

LARGEST = 32  # rows; each is a step of the chain


@converter("Det", inputs=1)
def determinant(call: Call) -> Result:
    """[.., n, n] -> [..]."""
    x = call.input(0)
    size = x.shape[-1] if x.rank > 1 else None
    if not isinstance(size, int) or x.shape[-2] != size or size > LARGEST:
        raise call.error(f"its matrices must be square, of at most {LARGEST} rows")
    matrix = call.cast(x, f32) if x.dtype.bits < 32 else x
    total = call.full(1, x.shape[:-2], matrix.dtype)
    for _ in range(size):
        pivot, matrix = eliminated(call, matrix)
        total = call.binary("mul", total, pivot)
    return call.cast(total, x.dtype)


def eliminated(call: Call, x: Node) -> tuple[Node, Node]:
    """(pivot with the sign of its exchange [..], what is left [.., n - 1, n - 1]) of [.., n, n]."""
    size, axis = x.shape[-1], x.rank - 2
    assert isinstance(size, int)
    first = call.slice_axis(x, axis + 1, 0, 1)
    best = call.make("argmax", call.unary("abs", first), axis=axis, keep=True)
    best = call.cast(best, i64)  # [.., 1, 1]
    place = call.unsqueeze(call.iota(size), [1])
    swapped = call.where(call.binary("equal", place, best), call.scalar(0, i64), place)
    order = call.where(call.binary("equal", place, call.scalar(0, i64)), best, swapped)
    rows = call.make("gather_elements", x, call.broadcast(order, x.shape), axis=axis)
    head, rest = call.split(rows, axis, [1, size - 1])
    pivot, across = call.split(head, axis + 1, [1, size - 1])
    down, block = call.split(rest, axis + 1, [1, size - 1])
    moved = call.binary("equal", best, call.scalar(0, i64))
    signed = call.where(moved, pivot, call.unary("neg", pivot))
    zero = call.binary("equal", pivot, call.scalar(0, x.dtype))  # then all below it are too
    safe = call.where(zero, call.scalar(1, x.dtype), pivot)
    factor = call.binary("div", down, safe)
    left = call.binary("sub", block, call.binary("mul", factor, across))
    return call.reshape(signed, x.shape[:-2]), left
