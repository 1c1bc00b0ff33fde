"""Mixtures of experts: rows sorted by expert, and products of each group of rows by its own matrix.

`routed_experts` is the whole MLP. It decomposes into every expert for every token; targets with a
kernel for `grouped_matmul` compute the chosen ones only (passes/experts.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.ir import dtypes
from llmc.ir.dims import evaluate
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    OPS,
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    choice,
    integer,
    make,
    reject,
    require_float,
    require_integer,
    require_same_dim,
    round_to,
    widen,
)
from llmc.ir.ops_elementwise import cast

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")

# ---- rows by group -----------------------------------------------------------------------------


def _infer_group_rows(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """numbers[r], each from 0 to groups - 1 -> (order[r], place[r], starts[groups + 1]), i32: rows
    sorted by group, where each row went, and where each group starts (at last: the end)."""
    [numbers] = inputs
    require_integer("group_rows", inputs, 0)
    if numbers.rank != 1 or attributes["groups"] < 1:
        reject("group_rows", "it takes one axis of numbers and at least one group", inputs)
    rows = TensorType(dtypes.i32, numbers.shape)
    return rows, rows, TensorType(dtypes.i32, (attributes["groups"] + 1,))


def _group_rows(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, ...]:
    numbers, groups = arrays[0].astype(np.int64), node["groups"]
    order = np.argsort(numbers, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    starts = np.searchsorted(numbers[order], np.arange(groups + 1))
    return tuple(each.astype(np.int32) for each in (order, place, starts))


def _infer_grouped_matmul(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """x[r, k], w[k, parts * groups * n], starts[groups + 1] -> [r, parts * n]: row r of group g
    times columns n of each part's g-th block. Sums in f32 (f64 for f64)."""
    x, w, starts = inputs
    groups, parts = attributes["groups"], attributes["parts"]
    require_float("grouped_matmul", inputs, 0)
    require_float("grouped_matmul", inputs, 1)
    require_integer("grouped_matmul", inputs, 2)
    if x.rank != 2 or w.rank != 2 or starts.shape != (groups + 1,):
        reject("grouped_matmul", f"wants two matrices and {groups + 1} starts", inputs)
    require_same_dim("grouped_matmul", inputs, "contracted dims", x.shape[1], w.shape[0])
    width = w.shape[1]
    if not isinstance(width, int) or parts < 1 or width % (groups * parts):
        reject("grouped_matmul", f"{parts} parts of {groups} groups do not share out its columns",
               inputs)
    return TensorType(x.dtype, (x.shape[0], width // groups))


def _grouped_matmul(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, w = (widen(array, operand.dtype, context.exact)
            for array, operand in zip(arrays[:2], node.inputs, strict=False))
    groups, parts, starts = node["groups"], node["parts"], arrays[2]
    blocks = w.reshape(w.shape[0], parts, groups, -1)
    result = np.zeros((len(x), parts * blocks.shape[-1]), x.dtype)
    for group in range(groups):
        rows = slice(int(starts[group]), int(starts[group + 1]))
        own = np.ascontiguousarray(blocks[:, :, group]).reshape(len(w), -1)
        result[rows] = x[rows] @ own
    return round_to(result, node.dtype, context.exact)


# ---- the whole mixture -------------------------------------------------------------------------


def _infer_routed_experts(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """x[t, h], numbers[t, c] and scores[t, c] of the chosen experts, gates and ups[e * i, h] and
    downs[e * h, i], one expert's matrix after another -> [t, h]: the sum over the chosen of
    score * down(activation(gate(x)) * up(x))."""
    x, numbers, scores, gates, ups, downs = inputs
    experts = attributes["experts"]
    require_float("routed_experts", inputs, 0)
    require_integer("routed_experts", inputs, 1)
    if x.rank != 2 or numbers.shape != scores.shape or numbers.shape[:1] != x.shape[:1]:
        reject("routed_experts", "numbers and scores are those of x's rows", inputs)
    hidden, rows = x.shape[1], gates.shape[0]
    if not isinstance(rows, int) or rows % experts or gates.shape != (rows, hidden) \
            or ups.shape != gates.shape or downs.shape != (experts * hidden, rows // experts):
        reject("routed_experts", f"matrices do not fit {experts} experts", inputs)
    return x.type


def _routed_experts(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    x, _, scores, gates, ups, downs = (
        widen(array, operand.dtype, context.exact)
        for array, operand in zip(arrays, node.inputs, strict=True))
    numbers, experts = arrays[1].astype(np.int64), node["experts"]
    result = np.zeros_like(x)
    for expert in range(experts):
        rows, rank = np.nonzero(numbers == expert)
        gate, up, down = (np.split(each, experts)[expert].T for each in (gates, ups, downs))
        inner = _activated(node["activation"], x[rows] @ gate, context) * (x[rows] @ up)
        np.add.at(result, rows, scores[rows, rank, None] * (inner @ down))
    return round_to(result, node.dtype, context.exact)


def _activated(name: str, x: Array, context: Context) -> Array:
    """The activation of the table, evaluated on an array."""
    leaf = make("input", name="x", type=TensorType(dtypes.from_numpy(x.dtype), x.shape))
    node = activation(name, leaf)
    return OPS[node.op].reference(node, [x], context)


def activation(name: str, x: Node) -> Node:
    """One of ACTIVATIONS as a node."""
    if name.startswith("gelu"):
        return make("gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    return make(name, x)


def _decompose_routed_experts(node: Node) -> Node:
    """Every expert for every token: those that were not chosen weigh nothing."""
    x, numbers, scores, gates, ups, downs = node.inputs
    experts, (tokens, hidden) = node["experts"], x.shape
    inner = gates.shape[0] // experts

    def times(rows: Node) -> Node:
        return make("matmul", x, make("transpose", rows, permutation=(1, 0)))

    wide = make("mul", activation(node["activation"], times(gates)), times(ups))
    wide = make("reshape", wide, shape=(tokens, experts, inner))
    weighed = make("reshape", _weights(numbers, scores, experts), shape=(tokens, experts, 1))
    # Chosen by `where`: what an expert that was not chosen makes of x may be infinite.
    zero = cast(make("constant", dtype=f32, shape=(), data=np.float32(0).tobytes()), x.dtype)
    used = make("where", make("greater", weighed, cast(zero, weighed.dtype)),
                make("mul", wide, cast(weighed, x.dtype)), zero)
    flat = make("reshape", used, shape=(tokens, experts * inner))
    stacked = make("reshape", downs, shape=(experts, hidden, inner))
    stacked = make("transpose", stacked, permutation=(0, 2, 1))
    return make("matmul", flat, make("reshape", stacked, shape=(experts * inner, hidden)))


def _weights(numbers: Node, scores: Node, experts: int) -> Node:
    """[t, experts]: what each expert's result counts; 0 for those not chosen."""
    expert = make("iota", dtype=numbers.dtype, shape=(1, experts), axis=1)
    zero = cast(make("constant", dtype=f32, shape=(), data=np.float32(0).tobytes()), scores.dtype)
    total: Node | None = None
    for rank in range(evaluate(numbers.shape[1], {})):
        number, score = (_column(each, rank) for each in (numbers, scores))
        part = make("where", make("equal", number, expert), score, zero)
        total = part if total is None else make("add", total, part)
    assert total is not None
    return total


def _column(x: Node, number: int) -> Node:
    return make("slice", x, starts=(0, number), stops=(x.shape[0], number + 1), steps=(1, 1))


TABLE = [
    Op("group_rows", _infer_group_rows, _group_rows, arity=(1, 1),
       attributes={"groups": Attribute(integer)}),
    Op("grouped_matmul", _infer_grouped_matmul, _grouped_matmul, arity=(3, 3),
       attributes={"groups": Attribute(integer), "parts": Attribute(integer, 1)}),
    Op("routed_experts", _infer_routed_experts, _routed_experts, _decompose_routed_experts,
       arity=(6, 6),
       attributes={"experts": Attribute(integer), "activation": Attribute(choice(*ACTIVATIONS))}),
]
