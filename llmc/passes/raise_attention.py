"""Rules of raise_patterns for rotary positions and attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmc.ir.graph import Node
from llmc.ir.ops import constant, constant_value, make
from llmc.passes.match import last_axis_slice, uniform_value, without_cast
from llmc.passes.rewrite import Rule, rule, with_inputs

# ---- rope --------------------------------------------------------------------------------------


@rule("add")
def raise_rope(node: Node) -> Node | None:
    """x * c + concat(-x[half:], x[:half]) * s, both halves of c and s equal -> rope(x, c, s)"""
    for straight, turned in (node.inputs, node.inputs[::-1]):
        if straight.op != "mul" or turned.op != "mul" or node.rank != 4:
            continue
        for x, cos in (straight.inputs, straight.inputs[::-1]):
            for rotated, sin in (turned.inputs, turned.inputs[::-1]):
                if is_rotated_half(rotated, x):
                    half_cos, half_sin = half_table(cos, x), half_table(sin, x)
                    if half_cos is not None and half_sin is not None:
                        return _rope(x, half_cos, half_sin)
    return None


def is_rotated_half(node: Node, x: Node) -> bool:
    """Whether the node is concat(-x[..., half:], x[..., :half])."""
    if node.op != "concat" or len(node.inputs) != 2 or node["axis"] != node.rank - 1:
        return False
    negated, first = node.inputs
    if negated.op != "neg" or negated.inputs[0].inputs != (x,) or first.inputs != (x,):
        return False
    size = x.shape[-1]
    if not isinstance(size, int) or size % 2:
        return False
    return last_axis_slice(first) == (0, size // 2) and last_axis_slice(
        negated.inputs[0]) == (size // 2, size)


def half_table(node: Node, x: Node) -> Node | None:
    """The first half of cos or sin as [batch, sequence, half], if its halves are equal.

    node [batch or 1, 1, sequence, size] multiplies x [batch, heads, sequence, size].
    """
    if node.rank != 4 or node.shape[1] != 1 or node.shape[-1] != x.shape[-1]:
        return None
    half = first_half(node)
    if half is None:
        return None
    batch, _, length, size = half.shape
    return make("reshape", half, shape=(batch, length, size))


def first_half(node: Node) -> Node | None:
    """The first half of the last axis, computed from halves alone, if both halves are equal."""
    size = node.shape[-1] if node.rank else None
    if not isinstance(size, int) or size % 2:
        return None
    shape = (*node.shape[:-1], size // 2)
    if node.op == "concat" and node["axis"] == node.rank - 1:
        halves = node.inputs
        return halves[0] if len(halves) == 2 and halves[0] is halves[1] else None
    if node.op == "constant":
        array = constant_value(node)
        equal = (array[..., : size // 2] == array[..., size // 2:]).all()
        return constant(array[..., : size // 2], node.dtype) if equal else None
    if node.op in ("reshape", "broadcast"):
        source = node.inputs[0]
        inner = first_half(source) if source.rank and source.shape[-1] == size else None
        return make(node.op, inner, shape=shape) if inner is not None else None
    if node.op in ("cos", "sin", "cast", "neg", "mul", "add", "sub"):
        return _half_of_elementwise(node)
    return None


def _half_of_elementwise(node: Node) -> Node | None:
    inputs = []
    for each in node.inputs:
        if uniform_value(each) is not None and (not each.rank or each.shape[-1] == 1):
            inputs.append(each)
        else:
            half = first_half(each)
            if half is None:
                return None
            inputs.append(half)
    return with_inputs(node, inputs)


def _rope(x: Node, cos: Node, sin: Node) -> Node:
    """rope wants [batch, sequence, heads, size]; x has heads before sequence."""
    swap = (0, 2, 1, 3)
    turned = make("rope", make("transpose", x, permutation=swap), cos, sin, interleaved=False)
    return make("transpose", turned, permutation=swap)


# ---- attention ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """scores = softcap(q @ transpose(k) * scale) + mask"""

    q: Node
    k: Node
    scale: float = 1.0
    softcap: float = 0.0
    mask: Node | None = None


@rule("matmul")
def raise_attention(node: Node) -> Node | None:
    """softmax(q @ transpose(k) * scale + mask) @ v -> attention(q, k, v, mask)"""
    weights, v = node.inputs
    weights = without_cast(weights)
    if node.rank != 4 or weights.op != "softmax" or weights["axis"] != 3:
        return None
    scores = _masked(weights.inputs[0])
    if scores is None:
        return None
    q, k, v = (without_cast(each) for each in (scores.q, scores.k, v))
    k, v = _grouped(k, v)
    if any(each.rank != 4 or each.dtype is not node.dtype for each in (q, k, v)):
        return None
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return None
    operands = (q, k, v) if scores.mask is None else (q, k, v, scores.mask)
    attention = make("attention", *operands, scale=scores.scale, softcap=scores.softcap,
                     causal=False, window=0)
    return attention if attention.type == node.type else None


def _masked(node: Node) -> _Scores | None:
    """scores + mask, where(mask, scores, very negative), or scores alone."""
    node = without_cast(node)
    if node.op == "add":
        for scores, mask in (node.inputs, node.inputs[::-1]):
            found = _capped(scores) if scores.shape == node.shape else None
            if found is not None:
                return replace(found, mask=mask)
        return None
    if node.op == "where":
        mask, scores, low = node.inputs
        value = uniform_value(low)
        if scores.shape == node.shape and value is not None and value <= -1e4:
            found = _capped(scores)
            return replace(found, mask=mask) if found is not None else None
        return None
    return _capped(node)


def _capped(node: Node) -> _Scores | None:
    """cap * tanh(scores / cap), or scores alone."""
    node = without_cast(node)
    inner, cap = _scaled_by_constant(node)
    if inner.op == "tanh":
        scores, scale = _scaled_by_constant(inner.inputs[0])
        found = _product(scores)
        if found is None or cap <= 0:
            return None
        return replace(found, scale=found.scale * scale * cap, softcap=cap)
    found = _product(inner)
    return replace(found, scale=found.scale * cap) if found is not None else None


def _product(node: Node) -> _Scores | None:
    """scale * (q @ transpose(k)), the scale in front or on q and k."""
    node, scale = _scaled_by_constant(without_cast(node))
    if node.op != "matmul" or node.rank != 4:
        return None
    q, q_scale = _scaled_by_constant(node.inputs[0])
    k, k_scale = _scaled_by_constant(node.inputs[1])
    return _Scores(q, _transposed(k), scale * q_scale * k_scale)


def _scaled_by_constant(node: Node) -> tuple[Node, float]:
    """(x, c) for x * c or x / c with a constant c, else (node, 1)."""
    scale = 1.0
    while node.op in ("mul", "div"):
        value = uniform_value(node.inputs[1])
        if not value or node.inputs[0].type != node.type:
            break
        scale = scale * value if node.op == "mul" else scale / value
        node = node.inputs[0]
    return node, scale


def _transposed(node: Node) -> Node:
    """The node with its last two axes swapped; a transpose is seen through."""
    order: Sequence[int] = (0, 1, 3, 2)
    if node.op == "transpose":
        order = [node["permutation"][axis] for axis in order]
        node = node.inputs[0]
    if tuple(order) == (0, 1, 2, 3):
        return node
    return make("transpose", node, permutation=tuple(order))


def _grouped(k: Node, v: Node) -> tuple[Node, Node]:
    """Keys and values before they were repeated for the query heads of a group."""
    plain_k, plain_v = _unrepeated(k), _unrepeated(v)
    if plain_k is None or plain_v is None or plain_k.shape[:2] != plain_v.shape[:2]:
        return k, v
    return plain_k, plain_v


def _unrepeated(node: Node) -> Node | None:
    """[b, g, t, d] for reshape(broadcast([b, g, 1, t, d], [b, g, n, t, d]), [b, g * n, t, d])"""
    if node.op != "reshape" or node.inputs[0].op != "broadcast":
        return None
    wide = node.inputs[0]
    source = wide.inputs[0]
    if wide.rank != 5 or node.rank != 4 or source.rank != 5 or source.shape[2] != 1:
        return None
    batch, groups, _, length, size = source.shape
    if wide.shape[:2] != (batch, groups) or wide.shape[3:] != (length, size):
        return None
    if node.shape != (batch, groups * wide.shape[2], length, size):
        return None
    return make("reshape", source, shape=(batch, groups, length, size))


ATTENTION_RULES: list[Rule] = [raise_rope, raise_attention]
