"""Rope, attention in three forms, and the paged KV cache.

A query that sees no key gives zeros. `window` = 0 and `softcap` = 0.0 mean none. With a causal
mask a query at position p sees keys at p - window < j <= p; without, |j - p| < window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmc.errors import ShapeError
from llmc.ir import dtypes
from llmc.ir.dims import Dim, known_at_least
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    compute_dtype,
    flag,
    integer,
    make,
    number,
    reject,
    require_broadcast,
    require_float,
    require_integer,
    require_rank,
    require_same_dim,
    round_to,
    same_shape,
    widen,
)
from llmc.ir.ops_elementwise import cast, scalar
from llmc.ir.ops_leaves import constant

PAGE = 32
"""Positions in one page of a paged state."""


# ---- rope --------------------------------------------------------------------------------------


def _infer_rope(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """x [.., heads, size], cos and sin [.., r] (leading axes broadcast to x's), 2r <= size."""
    x, cos, sin = inputs
    require_float("rope", inputs)
    if x.rank < 2 or cos.rank < 1 or cos.rank > x.rank - 1:
        reject("rope", "takes x [.., heads, size] and cos, sin [.., r]", inputs)
    if cos.type != sin.type:
        reject("rope", "cos and sin differ in type", inputs)
    require_broadcast("rope", inputs, cos.shape[:-1], x.shape[:-2])
    if known_at_least(2 * cos.shape[-1] - 1, x.shape[-1]):
        reject("rope", "cos has more than half as many columns as a head", inputs)
    return x.type


def _rope(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    """Rotates pairs (i, i + r) of the first 2r elements, or (2i, 2i + 1) if interleaved."""
    wide = np.float64 if context.exact else compute_dtype(node.dtype).numpy
    x, cos, sin = (widen(array, operand.dtype).astype(wide)
                   for array, operand in zip(arrays, node.inputs, strict=True))
    r = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = (
        (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if node["interleaved"]
        else (slice(0, r), slice(r, 2 * r))
    )
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return round_to(result, node.dtype, context.exact)


def _last_axis(x: Node, start: Dim, stop: Dim, step: int = 1) -> Node:
    return make("slice", x, starts=(0,) * (x.rank - 1) + (start,),
                stops=(*x.shape[:-1], stop), steps=(1,) * (x.rank - 1) + (step,))


def _decompose_rope(node: Node) -> Node:
    x, cos, sin = (cast(each, compute_dtype(node.dtype)) for each in node.inputs)
    r, size = cos.shape[-1], x.shape[-1]
    lifted = (*cos.shape[:-1], 1, r)
    cos, sin = (make("reshape", each, shape=lifted) for each in (cos, sin))
    if node["interleaved"]:
        first, second = _last_axis(x, 0, 2 * r, 2), _last_axis(x, 1, 2 * r, 2)
    else:
        first, second = _last_axis(x, 0, r), _last_axis(x, r, 2 * r)
    parts = [
        make("sub", make("mul", first, cos), make("mul", second, sin)),
        make("add", make("mul", second, cos), make("mul", first, sin)),
    ]
    if node["interleaved"]:
        pairs = [make("reshape", each, shape=(*each.shape, 1)) for each in parts]
        flat = make("concat", *pairs, axis=-1)
        parts = [make("reshape", flat, shape=(*x.shape[:-1], 2 * r))]
    if size != 2 * r:
        parts.append(_last_axis(x, 2 * r, size))
    return cast(make("concat", *parts, axis=-1), node.dtype)


# ---- attention ---------------------------------------------------------------------------------


def _check_heads(op: str, inputs: Inputs, heads_axis: int, attributes: Attributes) -> None:
    q, k, v = inputs[:3]
    require_float(op, inputs, 0, 1, 2)
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        reject(op, "q, k and v differ in dtype; cast them", inputs)
    heads, groups = q.shape[heads_axis], k.shape[heads_axis]
    if not (isinstance(heads, int) and isinstance(groups, int) and groups > 0):
        reject(op, "the numbers of heads must be positive integers", inputs)
    if heads % groups:
        reject(op, f"{heads} query heads are no multiple of {groups} key heads", inputs)
    require_same_dim(op, inputs, "head sizes of q and k", q.shape[-1], k.shape[-1])
    if attributes["window"] < 0 or attributes["softcap"] < 0:
        reject(op, "window and softcap must not be negative (0: none)", inputs)


def _infer_attention(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """q [b, h, s, d], k [b, g, t, d], v [b, g, t, e], mask broadcastable to [b, h, s, t] (bool:
    true where visible; float: added to the scaled scores) -> [b, h, s, e]."""
    q, k, v = inputs[:3]
    for index in range(3):
        require_rank("attention", inputs, index, 4)
    _check_heads("attention", inputs, 1, attributes)
    if not same_shape(k.shape[:3], v.shape[:3]):
        reject("attention", "k and v differ in shape", inputs)
    require_same_dim("attention", inputs, "batch", q.shape[0], k.shape[0])
    if len(inputs) == 4:
        mask = inputs[3]
        if not (mask.dtype.is_float or mask.dtype is dtypes.bool_):
            reject("attention", f"the mask must be bool or float, not {mask.dtype}", inputs)
        scores = (*q.shape[:3], k.shape[2])
        require_broadcast("attention", inputs, mask.shape, scores)
    return TensorType(q.dtype, (*q.shape[:3], v.shape[-1]))


def visible(queries: Array, keys: Array, causal: bool, window: int) -> Array:
    """bool [.., queries, keys]: which key positions each query position sees."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = distance >= 0 if causal else np.ones(distance.shape, bool)
    if window:
        seen = seen & (distance < window) & (distance > -window)
    return seen


def attend(q: Array, k: Array, v: Array, node: Node, seen: Array | None,
           added: Array | None = None) -> Array:
    """softmax(q k^T scale, capped, masked) v; q [.., h, s, d], k and v [.., g, t, d] in one
    wide float type. Rows that see nothing give zeros."""
    repeats = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, repeats, axis=-3), np.repeat(v, repeats, axis=-3)
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * q.dtype.type(node["scale"])
    if node["softcap"]:
        scores = np.tanh(scores / node["softcap"]) * q.dtype.type(node["softcap"])
    if added is not None:
        scores = scores + added
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    high = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(high == -np.inf, 0, high)).astype(q.dtype)
    total = np.sum(weights, axis=-1, keepdims=True)
    return np.matmul(weights, v) / np.where(total == 0, 1, total)


def _attention(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    q, k, v = (widen(array, node.dtype, context.exact) for array in arrays[:3])
    s, t = q.shape[2], k.shape[2]
    seen = added = None
    if node["causal"] or node["window"]:
        seen = visible(np.arange(t - s, t), np.arange(t), node["causal"], node["window"])
    if len(arrays) == 4 and arrays[3].dtype == np.bool_:
        seen = arrays[3] if seen is None else seen & arrays[3]
    elif len(arrays) == 4:
        added = widen(arrays[3], node.inputs[3].dtype, context.exact)
    return round_to(attend(q, k, v, node, seen, added), node.dtype, context.exact)


def _visible_mask(node: Node, rows: Dim, columns: Dim) -> Node | None:
    """bool [s, t] of the causal and window conditions, or None where there are none."""
    if not (node["causal"] or node["window"]):
        return None
    row = make("iota", dtype=dtypes.i64, shape=(rows, columns), axis=0)
    column = make("iota", dtype=dtypes.i64, shape=(rows, columns), axis=1)
    shift = make("dim", value=columns - rows, dtype=dtypes.i64)
    distance = make("sub", make("add", row, shift), column)
    conditions = []
    if node["causal"]:
        conditions.append(make("greater_equal", distance, constant(0, dtypes.i64)))
    if node["window"]:
        conditions.append(make("less", distance, constant(node["window"], dtypes.i64)))
    if node["window"] and not node["causal"]:
        conditions.append(make("greater", distance, constant(-node["window"], dtypes.i64)))
    return conditions[0] if len(conditions) == 1 else make("and", *conditions)


def _all_heads(x: Node, heads: Dim) -> Node:
    """[b, g, t, d] -> [b, heads, t, d], each key head repeated for its query heads."""
    batch, groups, length, size = x.shape
    if groups == heads:
        return x
    lifted = make("reshape", x, shape=(batch, groups, 1, length, size))
    wide = make("broadcast", lifted, shape=(batch, groups, heads // groups, length, size))
    return make("reshape", wide, shape=(batch, heads, length, size))


def _scores(node: Node, q: Node, k: Node) -> Node:
    transposed = make("transpose", k, permutation=(0, 1, 3, 2))
    scores = make("matmul", q, transposed)
    scores = make("mul", scores, scalar(node["scale"], scores))
    if node["softcap"]:
        cap = scalar(node["softcap"], scores)
        scores = make("mul", make("tanh", make("div", scores, cap)), cap)
    return scores


def _decompose_attention(node: Node) -> Node:
    wide = compute_dtype(node.dtype)
    q, k, v = (cast(each, wide) for each in node.inputs[:3])
    scores = _scores(node, q, _all_heads(k, q.shape[1]))
    seen = _visible_mask(node, q.shape[2], k.shape[2])
    if len(node.inputs) == 4:
        mask = node.inputs[3]
        if mask.dtype.is_float:
            scores = make("add", scores, cast(mask, wide))
        else:
            seen = mask if seen is None else make("and", seen, mask)
    if seen is not None:
        scores = make("where", seen, scores, scalar(-math.inf, scores))
    high = make("reduce_max", scores, axes=-1, keep=True)
    nothing = make("equal", high, scalar(-math.inf, high))
    weights = make("exp", make("sub", scores, make("where", nothing, scalar(0, high), high)))
    total = make("reduce_sum", weights, axes=-1, keep=True)
    sum_or_one = make("where", nothing, scalar(1, total), total)
    mixed = make("matmul", weights, _all_heads(v, q.shape[1]))
    return cast(make("div", mixed, sum_or_one), node.dtype)


def _infer_packed(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """q [tokens, h, d], k [tokens, g, d], v [tokens, g, e], offsets [sequences + 1] and, if given,
    lengths [sequences]: each token attends within its own sequence -> [tokens, h, e]. Only the
    first `lengths` tokens of a sequence are keys; the others ask but are not seen."""
    q, k, v = inputs[:3]
    for index in range(3):
        require_rank("packed_attention", inputs, index, 3)
        require_same_dim("packed_attention", inputs, "tokens", q.shape[0], inputs[index].shape[0])
    for index in range(3, len(inputs)):
        require_rank("packed_attention", inputs, index, 1)
        require_integer("packed_attention", inputs, index)
    if len(inputs) == 5:
        require_same_dim("packed_attention", inputs, "lengths and sequences",
                         inputs[4].shape[0] + 1, inputs[3].shape[0])
    _check_heads("packed_attention", inputs, 1, attributes)
    require_same_dim("packed_attention", inputs, "key and value heads", k.shape[1], v.shape[1])
    return TensorType(q.dtype, (*q.shape[:2], v.shape[-1]))


def _packed_attention(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    q, k, v = (np.swapaxes(widen(array, node.dtype, context.exact), 0, 1) for array in arrays[:3])
    result = np.zeros((q.shape[1], q.shape[0], v.shape[-1]), q.dtype)
    lengths = arrays[4] if len(arrays) == 5 else np.diff(arrays[3])
    for start, stop, length in zip(arrays[3][:-1].tolist(), arrays[3][1:].tolist(),
                                   lengths.tolist(), strict=True):
        end = start + length
        if not 0 <= start <= end <= stop <= q.shape[1]:
            raise ShapeError(f"packed_attention: offsets {start}..{stop} and length {length} of "
                             f"{q.shape[1]} tokens")
        seen = visible(np.arange(start, stop), np.arange(start, end), node["causal"],
                       node["window"])
        part = attend(q[:, start:stop], k[:, start:end], v[:, start:end], node, seen)
        result[start:stop] = np.swapaxes(part, 0, 1)
    return round_to(result, node.dtype, context.exact)


# ---- the paged cache ---------------------------------------------------------------------------


def _check_state(op: str, inputs: Inputs, index: int) -> None:
    require_rank(op, inputs, index, 4)
    require_same_dim(op, inputs, "positions in a page", inputs[index].shape[1], PAGE)


def _check_addresses(op: str, inputs: Inputs, first: int, tokens: Dim) -> None:
    """page_table [sequences, width], sequence [tokens], positions [tokens] from input `first`."""
    require_integer(op, inputs, first, first + 1, first + 2)
    require_rank(op, inputs, first, 2)
    for index in (first + 1, first + 2):
        require_rank(op, inputs, index, 1)
        require_same_dim(op, inputs, "tokens", inputs[index].shape[0], tokens)


def _infer_cache_append(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """state [pool, PAGE, g, d] with values [tokens, g, d] written at each token's position."""
    state, values = inputs[:2]
    _check_state("cache_append", inputs, 0)
    require_rank("cache_append", inputs, 1, 3)
    _check_addresses("cache_append", inputs, 2, values.shape[0])
    if values.dtype is not state.dtype or not same_shape(values.shape[1:], state.shape[2:]):
        reject("cache_append", "values must have the state's dtype, heads and head size", inputs)
    return state.type


def _pages(op: str, state: Array, page_table: Array, sequence: Array, slots: Array) -> Array:
    if slots.size and not (slots.min() >= 0 and slots.max() < page_table.shape[1]):
        raise ShapeError(f"{op}: a position needs page {slots.max()} of {page_table.shape[1]}")
    if sequence.size and not (sequence.min() >= 0 and sequence.max() < page_table.shape[0]):
        raise ShapeError(f"{op}: sequence {sequence.max()} of {page_table.shape[0]}")
    pages = page_table[sequence, slots]
    if pages.size and not (pages.min() >= 0 and pages.max() < state.shape[0]):
        raise ShapeError(f"{op}: page {pages.max()} of a pool of {state.shape[0]}")
    return pages


def _cache_append(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    state, values, page_table, sequence, positions = arrays
    pages = _pages("cache_append", state, page_table, sequence, positions // PAGE)
    result = np.array(state)
    result[pages, positions % PAGE] = values
    return result


def _infer_paged(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """q [tokens, h, d], states k [pool, PAGE, g, d] and v [pool, PAGE, g, e], page_table,
    sequence, positions, offsets [sequences + 1] -> [tokens, h, e]. Of integers, the states of their
    scales [pool, PAGE, g, 1] follow: a key or value is the codes of a token and head times one."""
    q, k, v, page_table = inputs[:4]
    require_rank("paged_attention", inputs, 0, 3)
    for index in (1, 2):
        _check_state("paged_attention", inputs, index)
    require_float("paged_attention", inputs, 0)
    _check_cache_scales(inputs)
    _check_addresses("paged_attention", inputs, 3, q.shape[0])
    require_rank("paged_attention", inputs, 6, 1)
    require_integer("paged_attention", inputs, 6)
    require_same_dim("paged_attention", inputs, "length of offsets, sequences + 1",
                     inputs[6].shape[0], page_table.shape[0] + 1)
    heads, groups = q.shape[1], k.shape[2]
    if not (isinstance(heads, int) and isinstance(groups, int)) or groups < 1 or heads % groups:
        reject("paged_attention", f"{heads} query heads are no multiple of {groups}", inputs)
    require_same_dim("paged_attention", inputs, "key and value heads", groups, v.shape[2])
    require_same_dim("paged_attention", inputs, "head sizes", q.shape[-1], k.shape[-1])
    if attributes["window"] < 0 or attributes["softcap"] < 0:
        reject("paged_attention", "window and softcap must not be negative (0: none)", inputs)
    return TensorType(q.dtype, (*q.shape[:2], v.shape[-1]))


def _check_cache_scales(inputs: Inputs) -> None:
    if len(inputs) == 7:
        require_float("paged_attention", inputs, 1, 2)
        return
    if len(inputs) != 9:
        reject("paged_attention", "scales are those of keys and of values", inputs)
    require_integer("paged_attention", inputs, 1, 2)
    require_float("paged_attention", inputs, 7, 8)
    for codes, scales in ((inputs[1], inputs[7]), (inputs[2], inputs[8])):
        if not same_shape(scales.shape, (*codes.shape[:3], 1)):
            reject("paged_attention", "there is one scale to a token and head", inputs)


def _paged_attention(node: Node, arrays: Sequence[Array], context: Context) -> Array:
    q, k, v, page_table, sequence, positions, _, *scales = arrays
    q = widen(q, node.dtype, context.exact)
    if scales:
        k, v = (codes.astype(q.dtype) * scale.astype(q.dtype)
                for codes, scale in zip((k, v), scales, strict=True))
    result = np.zeros((*q.shape[:2], v.shape[-1]), q.dtype)
    for each in np.unique(sequence):
        rows = np.flatnonzero(sequence == each)
        keys = np.arange(int(positions[rows].max()) + 1)
        pages = _pages("paged_attention", k, page_table, np.full_like(keys, each), keys // PAGE)
        keys_here, values_here = (
            np.swapaxes(state[pages, keys % PAGE].astype(q.dtype), 0, 1) for state in (k, v)
        )
        seen = visible(positions[rows], keys, True, node["window"])
        queries = np.swapaxes(q[rows], 0, 1)
        part = attend(queries, keys_here, values_here, node, seen)
        result[rows] = np.swapaxes(part, 0, 1)
    return round_to(result, node.dtype, context.exact)


_SCORE = {
    "scale": Attribute(number, lambda inputs: 1 / math.sqrt(inputs[0].shape[-1])),
    "window": Attribute(integer, 0),
    "softcap": Attribute(number, 0.0),
}
_MASKED = {**_SCORE, "causal": Attribute(flag, False)}

TABLE = [
    Op("rope", _infer_rope, _rope, _decompose_rope, arity=(3, 3),
       attributes={"interleaved": Attribute(flag, False)}),
    Op("attention", _infer_attention, _attention, _decompose_attention, arity=(3, 4),
       attributes=_MASKED),
    Op("packed_attention", _infer_packed, _packed_attention, arity=(4, 5), attributes=_MASKED),
    Op("cache_append", _infer_cache_append, _cache_append, arity=(5, 5)),
    Op("paged_attention", _infer_paged, _paged_attention, arity=(7, 9), attributes=_SCORE),
]
