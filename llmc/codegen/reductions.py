"""Reductions inside an expression: loops over the reduced axes that carry accumulators.

Along the last axis several vector accumulators run side by side; they are joined in a fixed order,
so that results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.elementwise import maximum, minimum
from llmc.codegen.integers import Index, multiple_of
from llmc.codegen.llvm import i32, lanes_of, splat_constant
from llmc.ir.dims import product
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node

if TYPE_CHECKING:
    from llmc.codegen.expr import Expression, Group

Combine = Callable[[ir.Value, ir.Value], ir.Value]
ACCUMULATORS = 4


def _reduce(x: Expression, node: Node, index: tuple[Index, ...], lanes: int,
            mask: ir.Value | None) -> ir.Value:
    source = node.inputs[0]
    axes = sorted(axis % source.rank for axis in node["axes"])
    last = source.rank - 1
    if lanes > 1 and (last in axes or not axes):
        return x.per_lane(node, index, lanes, mask)
    place = _source_index(node, index, axes)
    combine = _combiner(x, node)
    start = _identity(x, node, lanes)

    def reduce_rest(axes: list[int], place: list[Index], carried: ir.Value) -> ir.Value:
        if not axes:
            return combine(carried, _element(x, node, place, lanes, mask))
        if axes == [last]:
            return combine(carried, _reduce_row(x, node, place, combine))
        with x.fold(0, x.dim(source.shape[axes[0]]), [carried]) as (i, (inner,), finish):
            place = [*place[:axes[0]], i, *place[axes[0] + 1:]]
            finish([reduce_rest(axes[1:], place, inner)])
        return finish.results[0]

    total = reduce_rest(axes, place, start)
    if node.op == "reduce_mean":
        count = x.emit_index(x.dim(product(source.shape[axis] for axis in axes)))
        divisor = x.e.b.sitofp(count, elements.register_type(node.dtype))
        total = x.e.b.fdiv(total, x.e.splat(divisor, lanes))
    return total


def _source_index(node: Node, index: tuple[Index, ...], axes: list[int]) -> list[Index]:
    """The source's index with zeros on the reduced axes."""
    if node["keep"]:
        return [0 if axis in axes else i for axis, i in enumerate(index)]
    rest = iter(index)
    return [0 if axis in axes else next(rest) for axis in range(node.inputs[0].rank)]


def _element(x: Expression, node: Node, place: list[Index], lanes: int,
             mask: ir.Value | None = None) -> ir.Value:
    value = x.value(node.inputs[0], place, lanes, mask)
    return elements.convert(x.e, value, node.inputs[0].dtype, node.dtype)


def _reduce_row(x: Expression, node: Node, place: list[Index], combine: Combine) -> ir.Value:
    """One row along the last axis: wide, then a vector at a time, then element by element."""
    stop = x.dim(node.inputs[0].shape[-1])
    if x.group is not None and x.scopes.depth == 0:
        return _reduce_row_together(x, x.group, node, place, combine)
    width = usable_lanes(x.lanes, stop)
    wide = width * ACCUMULATORS

    def element(i: Index, lanes: int) -> ir.Value:
        return _element(x, node, [*place[:-1], i], lanes)

    first = [_identity(x, node, width)] * ACCUMULATORS
    wide_stop = stop // wide * wide
    with x.fold(0, wide_stop, first, wide) as (i, carried, finish):
        finish([combine(accumulator, element(i + number * width, width))
                for number, accumulator in enumerate(carried)])
    total = _join(finish.results, combine)
    stop_of_vectors = stop // width * width
    if stop_of_vectors is not wide_stop and stop_of_vectors != wide_stop:
        with x.fold(wide_stop, stop_of_vectors, [total], width) as (i, (carried,), finish):
            finish([combine(carried, element(i, width))])
        total = finish.results[0]
    scalar = _across(x, node, total, combine)
    if stop_of_vectors is stop or stop_of_vectors == stop:
        return scalar
    with x.fold(stop_of_vectors, stop, [scalar]) as (i, (carried,), finish):
        finish([combine(carried, element(i, 1))])
    return finish.results[0]


def _reduce_row_together(x: Expression, group: Group, node: Node, place: list[Index],
                         combine: Combine) -> ir.Value:
    """One row by a group of threads: each takes every count-th vector."""
    stop = x.dim(node.inputs[0].shape[-1])
    width = whole_lanes(x.lanes, stop)
    first = x.scopes.integers.leaf(group.index, 0) * width
    start = [_identity(x, node, width)]
    with x.fold(first, stop, start, width * group.count) as (i, (carried,), finish):
        finish([combine(carried, _element(x, node, [*place[:-1], i], width))])
    return group.across(_across(x, node, finish.results[0], combine), combine)


def whole_lanes(lanes: int, size: Index) -> int:
    """The greatest power of two up to `lanes` that divides an axis; 1 where that is not known."""
    known = gcd(multiple_of(size), lanes)
    return known & -known if known else lanes


def usable_lanes(lanes: int, size: Index) -> int:
    """At most `lanes`, fewer when an axis of fixed size is shorter; a power of two."""
    while isinstance(size, int) and lanes > max(size, 1):
        lanes //= 2
    return max(lanes, 1)


def _join(values: list[ir.Value], combine: Combine) -> ir.Value:
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _across(x: Expression, node: Node, value: ir.Value, combine: Combine) -> ir.Value:
    """Joins the lanes of a vector, halving it each time."""
    if node.op == "reduce_sum":
        return x.e.reduce_add(value)
    while (lanes := lanes_of(value)) > 2:
        value = combine(*x.e.halves(value))
    if lanes == 1:
        return value
    return combine(*(x.e.b.extract_element(value, i32(lane)) for lane in (0, 1)))


def _combiner(x: Expression, node: Node) -> Combine:
    dtype, b = node.dtype, x.e.b
    if node.op in ("reduce_max", "reduce_min"):
        if dtype.kind == "bool":
            return b.or_ if node.op == "reduce_max" else b.and_
        extreme = maximum if node.op == "reduce_max" else minimum
        return lambda a, c: extreme(x.e, dtype, a, c)
    if node.op == "reduce_prod":
        return b.fmul if dtype.is_float else b.mul
    return b.fadd if dtype.is_float else b.add


def _identity(x: Expression, node: Node, lanes: int) -> ir.Value:
    dtype = node.dtype
    type_ = ir.VectorType(elements.register_type(dtype), lanes) if lanes > 1 \
        else elements.register_type(dtype)
    if node.op in ("reduce_sum", "reduce_mean"):
        return splat_constant(type_, 0.0 if dtype.is_float else 0)
    if node.op == "reduce_prod":
        return splat_constant(type_, 1.0 if dtype.is_float else 1)
    return splat_constant(type_, _least(dtype) if node.op == "reduce_max" else _greatest(dtype))


def _least(dtype: DType) -> float:
    if dtype.is_float:
        return float("-inf")
    return -(1 << (dtype.bits - 1)) if dtype.kind == "int" else 0


def _greatest(dtype: DType) -> float:
    if dtype.is_float:
        return float("inf")
    if dtype.kind == "bool":
        return 1
    return (1 << (dtype.bits - 1)) - 1 if dtype.kind == "int" else (1 << dtype.bits) - 1


REDUCTIONS = {f"reduce_{name}": _reduce for name in ("sum", "mean", "max", "min", "prod")}
