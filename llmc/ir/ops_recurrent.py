"""Layers with a state of fixed size for each sequence: linear attention and causal convolution.

`linear_attention` is the recurrence behind Mamba-2, gated linear attention and the delta rule. For
every head, with the state S [d, e], keys and queries [d], values [e]:

    S = exp(decay) * S;  S = S + beta * k (v - S^T k)^T  or  S = S + k v^T;  y = scale * S^T q

In Mamba-2's words: k is B, q is C, v is dt * x, and decay is dt * A.

The `slot_` forms read and write states of which each sequence has one, its slot, and take tokens of
several sequences packed one after the other. A sequence whose first token has position 0 starts
from zeros, whatever its slot holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.ir.dims import Dim
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    choice,
    number,
    reject,
    require_float,
    require_integer,
    require_rank,
    require_same_dim,
    round_to,
    same_shape,
    widen,
)

RULES = ("linear", "gated", "delta", "gated_delta")
SLOT_OPS = frozenset({"slot_linear_attention", "slot_conv"})
RECURRENT = SLOT_OPS | {"linear_attention"}


def updated_state(node: Node) -> Node | None:
    """The state value that a node is the update of: of a cache_append, or of a `get` of a slot op's
    second result. None of other nodes."""
    if node.op == "cache_append":
        return node.inputs[0]
    if node.op == "get" and node["index"] == 1 and node.inputs[0].op in SLOT_OPS:
        return node.inputs[0].inputs[0]
    return None


# ---- linear attention --------------------------------------------------------------------------


def is_gated(rule: str) -> bool:
    """Whether the rule has an operand `decay`."""
    return rule in ("gated", "gated_delta")


def is_delta(rule: str) -> bool:
    """Whether the rule has an operand `beta`."""
    return rule in ("delta", "gated_delta")


def gates(node: Node) -> tuple[Node | None, Node | None]:
    """(decay, beta) of a linear attention, each None where its rule has none."""
    rest = list(node.inputs[7 if node.op == "slot_linear_attention" else 4:])
    decay = rest.pop(0) if is_gated(node["rule"]) else None
    return decay, rest.pop(0) if is_delta(node["rule"]) else None


def _check_gates(op: str, inputs: Inputs, first: int, rule: str) -> None:
    """decay and beta, as many as the rule has, from input `first` on."""
    wanted = first + is_gated(rule) + is_delta(rule)
    if len(inputs) != wanted:
        reject(op, f"the rule {rule} takes {wanted} inputs", inputs)
    (_, heads, size, _), v = inputs[0].shape, inputs[3]
    each_head = (*v.shape[:-2], heads)
    for index in range(first, len(inputs)):
        shape = inputs[index].shape
        per_key = is_gated(rule) and index == first and same_shape(shape, (*each_head, size))
        if not (per_key or same_shape(shape, each_head)):
            reject(op, f"input {index} must be one number for each head of the state", inputs)


def _infer_heads(op: str, inputs: Inputs, attributes: Attributes, gates_from: int) -> Type:
    """The rules that both forms share; q, k and v are inputs 1 to 3, [.., heads, size]."""
    state, q, k, v = inputs[:4]
    require_rank(op, inputs, 0, 4)
    require_float(op, inputs, 0, 1, 2, 3, *range(gates_from, len(inputs)))
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        reject(op, "q, k and v differ in dtype; cast them", inputs)
    if not (same_shape(q.shape[:-2], v.shape[:-2]) and same_shape(k.shape[:-2], v.shape[:-2])):
        reject(op, "q, k and v differ in tokens", inputs)
    heads = state.shape[1]
    counts = (heads, q.shape[-2], k.shape[-2])
    if not all(isinstance(each, int) and each > 0 for each in (*counts, *state.shape[2:])):
        reject(op, "the numbers of heads and their sizes must be positive integers", inputs)
    require_same_dim(op, inputs, "heads of state and values", heads, v.shape[-2])
    if heads % k.shape[-2] or (q.shape[-2] % heads and heads % q.shape[-2]):
        reject(op, f"{q.shape[-2]} query and {k.shape[-2]} key heads do not fit {heads} heads of "
                   "the state", inputs)
    for name, x, size in (("queries", q, 2), ("keys", k, 2), ("values", v, 3)):
        require_same_dim(op, inputs, f"sizes of state and {name}", x.shape[-1], state.shape[size])
    _check_gates(op, inputs, gates_from, attributes["rule"])
    shape = (*v.shape[:-2], max(heads, q.shape[-2]), v.shape[-1])
    return TensorType(v.dtype, shape), state.tensor_type


def _infer_linear(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """state [b, h, d, e], q [b, s, hq, d], k [b, s, hk, d], v [b, s, h, e], decay [b, s, h] or
    [b, s, h, d], beta [b, s, h] -> (y [b, s, max(h, hq), e], the state after the last token).

    hk divides h; hq divides it or is a multiple of it.
    """
    for index in (1, 2, 3):
        require_rank("linear_attention", inputs, index, 4)
    require_same_dim("linear_attention", inputs, "batch", inputs[0].shape[0], inputs[3].shape[0])
    return _infer_heads("linear_attention", inputs, attributes, 4)


def _infer_slot_linear(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """As linear_attention, with state [slots, h, d, e], q, k and v [tokens, heads, size], then
    slots [sequences], offsets [sequences + 1] and positions [tokens], then decay and beta."""
    for index in (1, 2, 3):
        require_rank("slot_linear_attention", inputs, index, 3)
    _check_sequences("slot_linear_attention", inputs, 4, inputs[3].shape[0])
    return _infer_heads("slot_linear_attention", inputs, attributes, 7)


def _check_sequences(op: str, inputs: Inputs, first: int, tokens: Dim) -> None:
    """slots, offsets and positions from input `first` on."""
    for index in range(first, first + 3):
        require_rank(op, inputs, index, 1)
        require_integer(op, inputs, index)
    slots, offsets, positions = inputs[first:first + 3]
    require_same_dim(op, inputs, "length of offsets, sequences + 1", offsets.shape[0],
                     slots.shape[0] + 1)
    require_same_dim(op, inputs, "tokens", positions.shape[0], tokens)


def _recur(state: Array, q: Array, k: Array, v: Array, decay: Array | None, beta: Array | None,
           scale: float) -> tuple[Array, Array]:
    """One sequence: state [h, d, e], q [s, hq, d], k [s, hk, d], v [s, h, e], decay [s, h, 1 or d],
    beta [s, h]; (y [s, max(h, hq), e], the new state)."""
    heads, outputs = len(state), max(len(state), q.shape[1])
    k = np.repeat(k, heads // k.shape[1], axis=1)
    q = np.repeat(q, outputs // q.shape[1], axis=1) * q.dtype.type(scale)
    y = np.zeros((len(q), outputs, v.shape[-1]), v.dtype)
    for token in range(len(q)):
        if decay is not None:
            state = state * np.exp(decay[token])[..., None]
        value = v[token]
        if beta is not None:
            seen = np.einsum("hde,hd->he", state, k[token])
            value = beta[token][:, None] * (value - seen)
        state = state + k[token][..., None] * value[:, None, :]
        read = np.repeat(state, outputs // heads, axis=0)
        y[token] = np.einsum("hde,hd->he", read, q[token])
    return y, state


def _operands(node: Node, arrays: Sequence[Array], context: Context) -> tuple:
    """(state, q, k, v, decay or None, beta or None), in one wide float type."""
    wide = np.float64 if context.exact else np.float32
    given = {each: widen(array, each.dtype).astype(wide)
             for each, array in zip(node.inputs, arrays, strict=True) if each.dtype.is_float}
    state, q, k, v = (given[each] for each in node.inputs[:4])
    decay, beta = (None if each is None else given[each] for each in gates(node))
    if decay is not None and decay.ndim < v.ndim:
        decay = decay[..., None]
    return state, q, k, v, decay, beta


def _linear(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, Array]:
    state, q, k, v, decay, beta = _operands(node, arrays, context)
    shape = (*v.shape[:2], max(v.shape[2], q.shape[2]), v.shape[3])
    y, new = np.zeros(shape, v.dtype), np.zeros_like(state)
    for row in range(len(state)):
        y[row], new[row] = _recur(
            state[row], q[row], k[row], v[row], None if decay is None else decay[row],
            None if beta is None else beta[row], node["scale"])
    return (round_to(y, node.inputs[3].dtype, context.exact),
            round_to(new, node.inputs[0].dtype, context.exact))


def _sequences(op: str, pool: Array, slots: Array, offsets: Array, positions: Array
               ) -> Iterator[tuple[int, slice, bool]]:
    """(slot, tokens, whether it starts from zeros) of every sequence; ShapeError if they do not fit
    the pool or each other."""
    if len(set(slots.tolist())) < len(slots):
        raise ShapeError(f"{op}: two sequences share a slot")
    for slot, start, stop in zip(slots.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(),
                                 strict=True):
        if not (0 <= slot < len(pool) and 0 <= start <= stop <= len(positions)):
            raise ShapeError(f"{op}: slot {slot} of {len(pool)}, tokens {start}..{stop} of "
                             f"{len(positions)}")
        if start < stop:
            yield slot, slice(start, stop), positions[start] == 0


def _slot_linear(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, Array]:
    pool, q, k, v, decay, beta = _operands(node, arrays, context)
    y = np.zeros((len(v), max(v.shape[1], q.shape[1]), v.shape[2]), v.dtype)
    new = np.array(pool)
    for slot, part, fresh in _sequences(node.op, pool, *arrays[4:7]):
        old = np.zeros_like(pool[slot]) if fresh else pool[slot]
        y[part], new[slot] = _recur(
            old, q[part], k[part], v[part], None if decay is None else decay[part],
            None if beta is None else beta[part], node["scale"])
    return (round_to(y, node.inputs[3].dtype, context.exact),
            round_to(new, node.inputs[0].dtype, context.exact))


# ---- causal convolution ------------------------------------------------------------------------


def _infer_slot_conv(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """state [slots, n - 1, c], x [tokens, c], weight [c, n], slots [sequences], offsets
    [sequences + 1], positions [tokens], sequence [tokens], bias [c]: every channel by itself over
    the last n tokens of its sequence -> (y [tokens, c], the state: each sequence's last n - 1 x).
    """
    op = "slot_conv"
    state, x, weight = inputs[:3]
    for index, rank in ((0, 3), (1, 2), (2, 2)):
        require_rank(op, inputs, index, rank)
    require_float(op, inputs, 0, 1, 2, *range(7, len(inputs)))
    _check_sequences(op, inputs, 3, x.shape[0])
    require_rank(op, inputs, 6, 1)
    require_integer(op, inputs, 6)
    require_same_dim(op, inputs, "tokens", inputs[6].shape[0], x.shape[0])
    if state.dtype is not x.dtype:
        reject(op, "state and x differ in dtype", inputs)
    length = weight.shape[1]
    if not isinstance(length, int) or length < 2:
        reject(op, "the filter must be of 2 or more tokens, known now", inputs)
    require_same_dim(op, inputs, "tokens of filter and state", length, state.shape[1] + 1)
    for index in (0, 2, *range(7, len(inputs))):
        channels = inputs[index].shape[0 if index else 2]
        require_same_dim(op, inputs, "channels", channels, x.shape[1])
    return x.tensor_type, state.tensor_type


def _slot_conv(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, Array]:
    wide = np.float64 if context.exact else np.float32
    pool, x, weight, *bias = (widen(arrays[index], node.inputs[index].dtype).astype(wide)
                              for index in (0, 1, 2, *range(7, len(arrays))))
    y, new, length = np.zeros_like(x), np.array(pool), weight.shape[1]
    for slot, part, fresh in _sequences(node.op, pool, *arrays[3:6]):
        old = np.zeros_like(pool[slot]) if fresh else pool[slot]
        padded = np.concatenate([old, x[part]])
        count = part.stop - part.start
        y[part] = sum(padded[tap:tap + count] * weight[:, tap] for tap in range(length))
        new[slot] = padded[count:]
    if bias:
        y = y + bias[0]
    if node["activation"] == "silu":
        y = y / (1 + np.exp(-y))
    return (round_to(y, node.inputs[1].dtype, context.exact),
            round_to(new, node.inputs[0].dtype, context.exact))


_LINEAR = {
    "rule": Attribute(choice(*RULES), "gated"),
    "scale": Attribute(number, lambda inputs: 1 / math.sqrt(inputs[1].shape[-1])),
}

TABLE = [
    Op("linear_attention", _infer_linear, _linear, arity=(4, 6), attributes=_LINEAR),
    Op("slot_linear_attention", _infer_slot_linear, _slot_linear, arity=(7, 9),
       attributes=_LINEAR),
    Op("slot_conv", _infer_slot_conv, _slot_conv, arity=(7, 8),
       attributes={"activation": Attribute(choice("none", "silu"), "none")}),
]
