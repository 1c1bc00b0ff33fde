"""Small helpers that rules and passes share: op groups, constants as numbers, leaves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmc.ir.dims import Dim
from llmc.ir.graph import Node, TensorType
from llmc.ir.ops import constant_value, make

MOVEMENT = frozenset(["broadcast", "reshape", "transpose", "slice", "concat", "pad", "gather"])
VIEWS = frozenset(["reshape", "transpose", "slice", "cast", "broadcast"])
REDUCTIONS = frozenset(["reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"])
PRODUCTS = ("matmul", "grouped_matmul")  # by weights in panels, with an epilogue
NORMS = frozenset(["rms_norm", "layer_norm", "softmax"])
ATTENTION = frozenset(["attention", "packed_attention", "paged_attention"])


def uniform_value(node: Node) -> float | int | None:
    """The number that every element of the node equals, seen through views; None if unknown."""
    while node.op in ("broadcast", "reshape", "transpose", "slice"):
        node = node.inputs[0]
    if node.op == "cast":
        value = uniform_value(node.inputs[0])
        if value is None:
            return None
        return np.asarray(value).astype(node.dtype.numpy).astype(np.float64).item() \
            if node.dtype.is_float else int(value)
    if node.op != "constant":
        return None
    array = constant_value(node).reshape(-1)
    if not array.size or (array != array[0]).any():
        return None
    return float(array[0]) if node.dtype.is_float else int(array[0])


def scalar_of(node: Node) -> Dim | None:
    """The integer that a rank-0 (or one-element) integer constant or `dim` holds."""
    if node.op == "dim":
        return node["value"]
    if node.op == "constant" and node.dtype.is_integer and constant_value(node).size == 1:
        return int(constant_value(node).reshape(-1)[0])
    return None


def is_last_axis(axes: Iterable[int], rank: int) -> bool:
    """Whether an attribute `axes` names the last axis only."""
    return [axis % rank for axis in axes] == [rank - 1] if rank else False


def is_static(node: Node) -> bool:
    """Whether the node is one tensor whose dims are all ints."""
    return isinstance(node.type, TensorType) and all(isinstance(dim, int) for dim in node.shape)


def last_axis_slice(node: Node) -> tuple[Dim, Dim] | None:
    """(start, stop) of a slice that narrows the last axis only, with step 1; else None."""
    if node.op != "slice" or any(step != 1 for step in node["steps"]):
        return None
    source = node.inputs[0].shape
    whole = all(start == 0 and stop == dim for start, stop, dim in
                zip(node["starts"][:-1], node["stops"][:-1], source[:-1], strict=True))
    return (node["starts"][-1], node["stops"][-1]) if whole and source else None


def slice_last(node: Node, start: Dim, stop: Dim) -> Node:
    """node[..., start:stop]"""
    rank = node.rank
    return make("slice", node, starts=(0,) * (rank - 1) + (start,),
                stops=(*node.shape[:-1], stop), steps=(1,) * rank)


def without_cast(node: Node) -> Node:
    """What a cast between float types was applied to, or the node itself."""
    while node.op == "cast" and node.dtype.is_float and node.inputs[0].dtype.is_float:
        node = node.inputs[0]
    return node
