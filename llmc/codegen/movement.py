"""Ops that move elements: each turns an index of its result into indices of its inputs.

A vector runs along the last axis of the result. Where its elements do not lie side by side along
the last axis of the input too, they are fetched lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.integers import Index, depth_of, multiple_of
from llmc.codegen.llvm import I64, i64, splat_constant
from llmc.ir.dims import Dim, known_equal, known_multiple, product
from llmc.ir.graph import Node

if TYPE_CHECKING:
    from llmc.codegen.expr import Expression

Position = tuple[Index, ...]
Mask: TypeAlias = ir.Value | None


def _broadcast(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    value = x.value(*x.operand(node.inputs[0], node, index, lanes, mask))
    return elements.broadcast(x.e, value, lanes)


def _transpose(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    source, permutation = node.inputs[0], tuple(node["permutation"])
    while source.op == "transpose" and not x.is_source(source):
        inner = source["permutation"]
        permutation = tuple(inner[axis] for axis in permutation)
        source = source.inputs[0]
    if lanes > 1 and permutation[-1] != node.rank - 1:
        return x.per_lane(node, index, lanes, mask)
    places = dict(zip(permutation, index, strict=True))
    return x.value(source, [places[axis] for axis in range(node.rank)], lanes, mask)


def _slice(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    steps = node["steps"]
    if lanes > 1 and steps[-1] != 1:
        return x.per_lane(node, index, lanes, mask)
    moved = []
    for axis, (start, step, i) in enumerate(zip(node["starts"], steps, index, strict=True)):
        forward = i if step > 0 else x.dim(node.shape[axis]) - 1 - i
        moved.append(x.dim(start) + forward * abs(step))
    return x.value(node.inputs[0], moved, lanes, mask)


# ---- reshape ---------------------------------------------------------------------------------


def _reshape(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    source = node.inputs[0]
    moved: list[Index] = []
    flat: Index = 0
    group: Sequence[Dim] = ()
    done = 0
    for own, group in _matching_groups(node.shape, source.shape):
        flat = _flatten(x, node.shape[done:own], index[done:own])
        moved += _unflatten(x, group, flat)
        done = own
    if lanes > 1 and not _stays_in_row(node, source, flat, group, lanes):
        return x.per_lane(node, index, lanes, mask)
    return x.value(source, moved, lanes, mask)


def _matching_groups(result: Sequence[Dim], source: Sequence[Dim]) -> list[tuple[int,
                                                                                  Sequence[Dim]]]:
    """Cuts both shapes into groups of equal products: (end of the result's group, source dims)."""
    groups, start, own = [], 0, 0
    for end in range(1, len(source)):
        for cut in range(own, len(result)):
            if known_equal(product(result[:cut]), product(source[:end])):
                groups.append((cut, source[start:end]))
                start, own = end, cut
                break
    return [*groups, (len(result), source[start:])]


def _flatten(x: Expression, shape: Sequence[Dim], index: Sequence[Index]) -> Index:
    flat: Index = 0
    for size, i in zip(shape, index, strict=True):
        flat = flat * x.dim(size) + i
    return flat


def _unflatten(x: Expression, shape: Sequence[Dim], flat: Index) -> list[Index]:
    index: list[Index] = []
    for size in reversed(shape[1:]):
        if size == 0:  # of nothing, nothing is read
            return [0] * len(shape)
        index.insert(0, flat % x.dim(size))
        flat = flat // x.dim(size)
    return [flat, *index] if shape else []


def _stays_in_row(node: Node, source: Node, flat: Index, group: Sequence[Dim],
                  lanes: int) -> bool:
    """Whether `lanes` elements of a result's row lie within one row of the source."""
    if not group:
        return False
    inner, outer = source.shape[-1], node.shape[-1]
    if len(group) == 1 or known_equal(inner, outer) or known_multiple(inner, outer):
        return True
    return known_multiple(inner, lanes) and multiple_of(flat) % lanes == 0


# ---- joining ---------------------------------------------------------------------------------


def _concat(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    axis = node["axis"] % node.rank
    sizes = [source.shape[axis] for source in node.inputs]
    if lanes > 1 and axis == node.rank - 1 and not (
            multiple_of(index[-1]) % lanes == 0
            and all(known_multiple(size, lanes) for size in sizes[:-1])):
        return x.per_lane(node, index, lanes, mask)

    def piece(number: int) -> ir.Value:
        start = x.dim(sum(sizes[:number]))
        moved = (*index[:axis], index[axis] - start, *index[axis + 1:])
        return x.value(node.inputs[number], moved, lanes, mask)

    return _choose(x, index[axis], sizes, piece)


def _choose(x: Expression, i: Index, sizes: Sequence[Dim],
            piece: Callable[[int], ir.Value], number: int = 0) -> ir.Value:
    """The piece that i falls into; only that one is evaluated."""
    if number == len(sizes) - 1:
        return piece(number)
    end = x.dim(sum(sizes[:number + 1]))
    known = x.scopes.integers.is_less(i, end)
    if known is not None:
        return piece(number) if known else _choose(x, i, sizes, piece, number + 1)
    inside = x.e.b.icmp_signed("<", x.emit_index(i), x.emit_index(end))
    return branch(x, inside, depth_of(i), lambda: piece(number),
                  lambda: _choose(x, i, sizes, piece, number + 1))


def branch(x: Expression, condition: ir.Value, guard: int, then: Callable[[], ir.Value],
           otherwise: Callable[[], ir.Value]) -> ir.Value:
    """A value from one of two blocks. guard: scope depth of what the condition depends on."""
    b = x.e.b
    with b.if_else(condition) as (first, second):
        with first, x.scopes.branch(guard):
            values = [then()]
            blocks = [b.block]
        with second, x.scopes.branch(guard):
            values.append(otherwise())
            blocks.append(b.block)
    phi = b.phi(values[0].type)
    for value, block in zip(values, blocks, strict=True):
        phi.add_incoming(value, block)
    return phi


def _pad(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    source, filler = node.inputs
    low, high = node["low"], node["high"]
    if lanes > 1 and not (low[-1] == 0 and high[-1] == 0):
        return x.per_lane(node, index, lanes, mask)
    inside, guard = ir.Constant(ir.IntType(1), 1), 0
    moved = []
    for axis, i in enumerate(index):
        start = x.dim(low[axis])
        moved.append(i - start)
        if low[axis] == 0 and high[axis] == 0:
            continue
        end = start + x.dim(source.shape[axis])
        value = x.emit_index(i)
        guard = max(guard, depth_of(i))
        inside = x.e.b.and_(inside, x.e.b.icmp_signed(">=", value, x.emit_index(start)))
        inside = x.e.b.and_(inside, x.e.b.icmp_signed("<", value, x.emit_index(end)))
    return branch(x, inside, guard, lambda: x.value(source, moved, lanes, mask),
                  lambda: elements.broadcast(x.e, x.value(filler, [0] * filler.rank), lanes))


# ---- gathers ---------------------------------------------------------------------------------


def position(x: Expression, node: Node, index: Sequence[Index], size: Dim) -> Index:
    """An element of an integer tensor as a position on an axis. What lies outside is moved to the
    nearest end: other memory is never read."""
    value = x.value(node, index)
    depth = x.value_depth(node, index)
    with x.scopes.at(depth):
        b, limit = x.e.b, x.emit_index(x.dim(size))
        if value.type != I64:
            value = (b.sext if node.dtype.kind == "int" else b.zext)(value, I64)
        inside = x.e.maximum(x.e.minimum(value, b.sub(limit, i64(1))), i64(0))
    high = size - 1 if isinstance(size, int) else None
    return x.scopes.integers.leaf(inside, depth, 1, high)


def _gather(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    source, positions = node.inputs
    axis = node["axis"] % source.rank
    if lanes > 1 and axis == source.rank - 1:
        return x.per_lane(node, index, lanes, mask)
    end = axis + positions.rank
    place = position(x, positions, index[axis:end], source.shape[axis])
    return x.value(source, (*index[:axis], place, *index[end:]), lanes, mask)


def _gather_elements(x: Expression, node: Node, index: Position, lanes: int,
                     mask: Mask) -> ir.Value:
    source, positions = node.inputs
    axis = node["axis"] % source.rank
    if lanes > 1:
        return x.per_lane(node, index, lanes, mask)
    place = position(x, positions, index, source.shape[axis])
    return x.value(source, (*index[:axis], place, *index[axis + 1:]))


def _gather_nd(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    source, positions = node.inputs
    batch, depth = node["batch_dims"], positions.shape[-1]
    if not isinstance(depth, int):
        raise x.unsupported(node, "the last axis of its index is not a fixed number")
    if lanes > 1 and source.rank == batch + depth:
        return x.per_lane(node, index, lanes, mask)
    outer = index[:positions.rank - 1]
    places = [position(x, positions, (*outer, number), source.shape[batch + number])
              for number in range(depth)]
    return x.value(source, (*index[:batch], *places, *index[positions.rank - 1:]), lanes, mask)


# ---- rope ------------------------------------------------------------------------------------


def _rope(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    """x * cos + partner * (-sin or sin) on the first 2r components of a head, x beyond."""
    half, d = _rotated_half(x, node), index[-1]
    if node["interleaved"]:
        if lanes > 1:
            return x.per_lane(node, index, lanes, mask)
        partner, angle = d + 1 - (d % 2) * 2, d // 2
        first = _is_zero(x, d % 2)
    else:
        if lanes > 1 and not (half % lanes == 0 and multiple_of(d) % lanes == 0):
            return x.per_lane(node, index, lanes, mask)
        table = x.scopes.integers
        partner = table.select_less(d, half, d + half, d - half)
        angle = table.select_less(d, half, d, d - half)
        first = x.less(d, half)
    return _rotate(x, node, index, lanes, mask, (partner, angle, first))


def _rotated_half(x: Expression, node: Node) -> int:
    half = node.inputs[1].shape[-1]
    if not isinstance(half, int) or not isinstance(node.shape[-1], int):
        raise x.unsupported(node, "its head size is not a fixed number")
    return half


def _rotate(x: Expression, node: Node, index: Position, lanes: int, mask: Mask,
            places: tuple[Index, Index, ir.Value]) -> ir.Value:
    source, cosine, sine = node.inputs
    partner, angle, first = places
    outer, d, b = index[:-1], index[-1], x.e.b
    rotated = 2 * _rotated_half(x, node)
    covers_all = rotated == node.shape[-1]
    if not covers_all:  # components beyond 2r read any valid place, and ignore it
        partner = x.scopes.integers.select_less(d, rotated, partner, 0)
        angle = x.scopes.integers.select_less(d, rotated, angle, 0)
    own = x.value(source, index, lanes, mask)
    other = x.value(source, (*outer, partner), lanes, mask)
    c, s = (_angle(x, node, source, (*outer[:-1], angle), lanes, mask)
            for source in (cosine, sine))
    sign = b.select(first, splat_constant(other.type, -1.0), splat_constant(other.type, 1.0))
    result = x.e.fma(b.fmul(other, sign), s, b.fmul(own, c))
    if covers_all:
        return result
    return b.select(x.less(d, rotated), result, own)


def _angle(x: Expression, node: Node, source: Node, index: Position, lanes: int,
           mask: Mask) -> ir.Value:
    """cos or sin, whose leading axes broadcast to those of tokens."""
    own = index[len(index) - source.rank:]
    place = [0 if size == 1 and axis < source.rank - 1 else i
             for axis, (size, i) in enumerate(zip(source.shape, own, strict=True))]
    value = x.value(source, place, lanes, mask)
    return elements.convert(x.e, value, source.dtype, node.dtype)


def _is_zero(x: Expression, i: Index) -> ir.Value:
    return x.e.b.icmp_signed("==", x.emit_index(i), i64(0))


# ---- dequantised weights ---------------------------------------------------------------------


def _dequantize(x: Expression, node: Node, index: Position, lanes: int, mask: Mask) -> ir.Value:
    """(code - zero) * scale, one zero and scale for `group` elements along the last axis."""
    group = node["group"]
    if lanes > 1 and not (group % lanes == 0 and multiple_of(index[-1]) % lanes == 0):
        return x.per_lane(node, index, lanes, mask)

    def operand(number: int, place: Position, lanes: int, mask: Mask) -> ir.Value:
        source = node.inputs[number]
        value = x.value(source, place, lanes, mask)
        return elements.convert(x.e, value, source.dtype, node.dtype)

    value = operand(0, index, lanes, mask)
    place = (*index[:-1], index[-1] // group)
    if len(node.inputs) == 3:
        value = x.e.b.fsub(value, x.e.splat(operand(2, place, 1, None), lanes))
    return x.e.b.fmul(value, x.e.splat(operand(1, place, 1, None), lanes))


MOVEMENT = {
    "broadcast": _broadcast,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "concat": _concat,
    "pad": _pad,
    "gather": _gather,
    "gather_elements": _gather_elements,
    "gather_nd": _gather_nd,
    "rope": _rope,
    "dequantize": _dequantize,
}
