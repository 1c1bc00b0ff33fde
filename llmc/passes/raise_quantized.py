"""Rules of raise_patterns for quantised products: exporters write QuantizeLinear, DequantizeLinear
and MatMul where a product of integers is meant."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir import dtypes
from llmc.ir.dims import bounds, product
from llmc.ir.graph import Node
from llmc.ir.ops import constant, constant_value, make
from llmc.passes.match import without_cast
from llmc.passes.rewrite import Rule, rule, with_inputs

MOST_TERMS = 32768  # so many products of 9-bit numbers add up within i32


@dataclass(frozen=True)
class _Codes:
    """(codes - zero) * scale; `codes` are the centred integers, of 8 or 16 bits."""

    codes: Node
    scale: Node


@rule("matmul")
def raise_integer_matmul(node: Node) -> Node | None:
    """((a - p) * s) @ ((b - q) * t) -> cast((a - p) @ (b - q)) * s * t, for integers a, b of 8 bits
    and fewer, s alike along k and t along k"""
    if not node.dtype.is_float or min(each.rank for each in node.inputs) < 2:
        return None
    terms = bounds(node.inputs[0].shape[-1])[1]
    if terms is None or terms > MOST_TERMS:
        return None
    left, right = (_dequantized(each) for each in node.inputs)
    if left is None or right is None:
        return None
    if not _alike_along(left.scale, 1) or not _alike_along(right.scale, 2):
        return None
    total = make("matmul", left.codes, right.codes, dtype=dtypes.i32)
    scale = make("mul", _cast(left.scale, node), _cast(right.scale, node))
    return make("mul", make("cast", total, dtype=node.dtype), scale)


def _cast(node: Node, like: Node) -> Node:
    return node if node.dtype is like.dtype else make("cast", node, dtype=like.dtype)


def _alike_along(scale: Node, from_end: int) -> bool:
    """Whether a scale is the same along an axis counted from the end."""
    return scale.rank < from_end or scale.shape[-from_end] == 1


def _dequantized(node: Node) -> _Codes | None:
    """The codes and scale of (codes - zero) * scale, seen through casts and movement."""
    node = without_cast(node)
    if node.op in ("transpose", "reshape"):
        return _moved(node)
    if node.op != "mul":
        return None
    for value, scale in (node.inputs, node.inputs[::-1]):
        codes = _centred(without_cast(value))
        if codes is not None and codes.shape == node.shape:
            return _Codes(codes, scale)
    return None


def _moved(node: Node) -> _Codes | None:
    """The same of codes that are moved after they were dequantised: with one scale for all, or, if
    the axes of a matrix are swapped, with one for each row."""
    source = _dequantized(node.inputs[0])
    if source is None or source.codes.shape != node.inputs[0].shape:
        return None
    codes, scale = with_inputs(node, [source.codes]), source.scale
    if product(scale.shape) == 1:
        return _Codes(codes, make("reshape", scale, shape=()))
    if node.op != "transpose" or node.rank != 2 or scale.rank != 2:
        return None
    return _Codes(codes, make("transpose", scale, permutation=(1, 0)))


def _centred(node: Node) -> Node | None:
    """The integers of cast(codes) - cast(zero), or of cast(codes)."""
    if node.op == "cast" and _is_code(node.inputs[0]):
        return node.inputs[0]
    if node.op != "sub":
        return None
    codes, zero = node.inputs
    if codes.op != "cast" or not _is_code(codes.inputs[0]):
        return None
    integers = _integer(zero)
    if integers is None:
        return None
    wide = make("cast", codes.inputs[0], dtype=dtypes.i16)
    return make("sub", wide, integers)


def _is_code(node: Node) -> bool:
    return node.dtype.is_integer and node.dtype.bits <= 8


def _integer(zero: Node) -> Node | None:
    """A zero point that was cast to float, as i16."""
    if zero.op == "cast" and _is_code(zero.inputs[0]):
        return make("cast", zero.inputs[0], dtype=dtypes.i16)
    if zero.op in ("reshape", "broadcast"):
        inner = _integer(zero.inputs[0])
        return None if inner is None else make(zero.op, inner, shape=zero["shape"])
    if zero.op != "constant":
        return None
    values = constant_value(zero)
    whole = (values == values.round()).all() and (abs(values) <= 255).all()
    return constant(values.astype("int16"), dtypes.i16) if whole else None


QUANTIZED_RULES: list[Rule] = [raise_integer_matmul]
