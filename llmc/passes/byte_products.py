"""byte_products: products of 8-bit codes less their zero points, as products of the codes alone.

    (a - p) @ (b - q) -> a @ b - p * sum of b's columns - sum of a's rows * q + k * p * q

for a matrix b that is made of parameters, on CPUs that add up products of four bytes in one
instruction. That takes a left byte with a sign or without (`Capabilities.byte_activation`) and a
right one with a sign: codes of the other kind, and their zero points, are moved by 128. Sums of
columns are part of the prelude; where q is 0, as in most files, nothing is summed in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.dims import product
from llmc.ir.dtypes import DType, i8, i16, i32, u8
from llmc.ir.graph import Graph, Node
from llmc.ir.ops import constant, constant_value, make
from llmc.ir.program import Capabilities
from llmc.passes.match import is_static
from llmc.passes.prelude import weight_expressions
from llmc.passes.rewrite import Rule, rewrite, with_inputs

_MIDDLE = 128


@dataclass(frozen=True)
class _Centred:
    """codes - zero; zero is an i32 that broadcasts with the codes, or None for 0."""

    codes: Node
    zero: Node | None


def byte_products(graph: Graph, capabilities: Capabilities) -> Graph:
    """The graph whose products by weights of 8-bit codes are such that the target's byte kernel
    takes them; the same graph where it has none."""
    if not capabilities.byte_activation:
        return graph
    left_dtype = u8 if capabilities.byte_activation == "u8" else i8
    weights = weight_expressions(graph)

    def expand(node: Node) -> Node | None:
        left, right = node.inputs
        if node.dtype is not i32 or right not in weights or right.rank != 2 or left.rank < 2 \
                or not is_static(right) or (left.dtype is left_dtype and right.dtype is i8):
            return None
        a, b = _centred(left), _centred(right)
        if a is None or b is None:
            return None
        return _expanded(_with_dtype(a, left_dtype), _with_dtype(b, i8))

    return rewrite(graph, [Rule("byte_products", ("matmul",), expand)])


def _expanded(a: _Centred, b: _Centred) -> Node | None:
    k = b.codes.shape[0]
    p, q = _alike_along(a.zero, -1), _alike_along(b.zero, 0)
    if (p is None) != (a.zero is None) or (q is None) != (b.zero is None):
        return None
    total = make("matmul", a.codes, b.codes, dtype=i32)
    if p is not None:
        columns = make("reduce_sum", make("cast", b.codes, dtype=i32), axes=(0,), keep=False)
        if q is not None:
            columns = make("sub", columns, make("mul", q, constant(k, i32)))
        total = make("sub", total, make("mul", p, columns))
    if q is not None:
        rows = make("reduce_sum", make("cast", a.codes, dtype=i32), axes=(a.codes.rank - 1,),
                    keep=True)
        total = make("sub", total, make("mul", rows, q))
    return total


def _centred(node: Node) -> _Centred | None:
    """The codes and zero point of codes, of cast(codes) - zero, or of these moved."""
    if node.dtype.is_integer and node.dtype.bits == 8:
        return _Centred(node, None)
    if node.op == "sub" and node.inputs[0].op == "cast":
        (codes,) = node.inputs[0].inputs
        if codes.dtype in (u8, i8) and codes.shape == node.shape:
            return _Centred(codes, make("cast", node.inputs[1], dtype=i32))
    if node.op not in ("reshape", "transpose"):
        return None
    source = _centred(node.inputs[0])
    if source is None:
        return None
    codes, zero = with_inputs(node, [source.codes]), source.zero
    if zero is not None and product(zero.shape) == 1:
        return _Centred(codes, make("reshape", zero, shape=()))
    if zero is not None and node.op == "transpose" and node.rank == zero.rank:
        return _Centred(codes, with_inputs(node, [zero]))
    return _Centred(codes, None) if zero is None else None


def _with_dtype(value: _Centred, wanted: DType) -> _Centred:
    """The same difference of codes with, or without, a sign."""
    codes, zero = value.codes, value.zero
    if codes.dtype is not wanted:
        distance = _MIDDLE if wanted is u8 else -_MIDDLE
        moved = make("add", make("cast", codes, dtype=i16), constant(distance, i16))
        codes = make("cast", moved, dtype=wanted)
        zero = constant(distance, i32) if zero is None else make("add", zero,
                                                                 constant(distance, i32))
    return _Centred(codes, None if zero is None or _is_zero(zero) else zero)


def _is_zero(node: Node) -> bool:
    """Whether a number made of constants is 0 throughout."""
    value = _known(node)
    return value is not None and not value.any()


def _known(node: Node):
    """The value of an i32 that is a constant, cast or added to another; None of others."""
    if node.op == "constant":
        return constant_value(node)
    if node.op not in ("cast", "add", "reshape", "transpose", "broadcast"):
        return None
    values = [_known(each) for each in node.inputs]
    if any(each is None for each in values):
        return None
    if node.op == "add":
        return values[0].astype("int64") + values[1]
    return values[0]


def _alike_along(zero: Node | None, axis: int) -> Node | None:
    """A zero point that does not change along an axis of its matrix, without a leading such axis;
    None if it changes."""
    if zero is None or zero.rank == 0:
        return zero
    if axis == -1:
        return zero if zero.shape[-1] == 1 else None
    if zero.rank == 1:
        return zero
    return make("reshape", zero, shape=(zero.shape[1],)) if zero.shape[0] == 1 else None
