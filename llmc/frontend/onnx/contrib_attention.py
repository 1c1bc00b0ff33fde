"""The attention operators of com.microsoft, with the meaning ONNX Runtime documents for them."""

from __future__ import annotations

import math

from llmc.frontend.onnx.attention import attend, rotated
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.normalization import rms_norm
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i32
from llmc.ir.graph import Node

Heads = tuple[Node, Node, Node]

# ---- GroupQueryAttention -----------------------------------------------------------------------


@converter("GroupQueryAttention", inputs=(7, 16), domain=MICROSOFT)
def group_query_attention(call: Call) -> Result:
    """Attention with rotary embedding and cache inside.

    Sequence b has seqlens_k[b] + 1 valid keys, the last of them from this call; its new tokens
    stand right behind its valid past. Key j is seen by the query at position p if j <= p and,
    with a window, j > p - window.
    """
    refuse_variants(call)
    q, k, v = query_key_value(call)
    q, k = normalized_heads(call, q, 14), normalized_heads(call, k, 15)
    batch, length = q.shape[0], q.shape[1]
    past = valid_past(call, batch, length)
    places = call.unsqueeze(call.iota(length, i32), [0])
    positions = call.binary("add", call.unsqueeze(past, [1]), places)
    if call.attribute("do_rotary", 0):
        q, k = rotated_pair(call, q, k, positions)
    q, k, v = (call.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
    k, v = present(call, 3, k, past), present(call, 4, v, past)
    mask = visible_keys(call, positions, k.shape[2])
    bias = call.optional(10)
    if bias is not None:
        bias = padded_bias(call, bias, k.shape[2])
        mask = call.where(mask, bias, call.scalar(-math.inf, bias.dtype))
    keys, values, mask = with_sink(call, k, v, mask)
    scale = call.attribute("scale", 0.0) or None
    softcap = call.attribute("softcap", 0.0)
    result = attend(call, q, keys, values, mask, scale=scale, softcap=softcap)
    return call.merge_heads(result), k, v


def refuse_variants(call: Call) -> None:
    """What only newer kernels of ONNX Runtime have."""
    call.refuse("qk_output", 0)
    call.refuse("k_quant_type", "NONE")
    call.refuse("v_quant_type", "NONE")
    call.refuse("sliding_window_cache", 0)
    if any(call.has(index) for index in (12, 13)):
        raise call.error("quantised caches are not supported")


def query_key_value(call: Call) -> Heads:
    """q[b, s, heads, d], k and v [b, s, kv_heads, d] from three inputs or one packed one."""
    heads, kv_heads = int(call.required("num_heads")), int(call.required("kv_num_heads"))
    query = call.input(0)
    if query.rank != 3:
        raise call.error(f"query of rank {query.rank}")
    if call.has(1):
        parts = [query, call.input(1), call.input(2)]
    else:
        size = call.divide(query.shape[2], heads + 2 * kv_heads)
        parts = call.split(query, 2, [heads * size, kv_heads * size, kv_heads * size])
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (
        call.reshape(part, (part.shape[0], part.shape[1], n, call.divide(part.shape[2], n)))
        for part, n in zip(parts, counts, strict=True)
    )
    return q, k, v


def normalized_heads(call: Call, x: Node, index: int) -> Node:
    """Each head divided by its root mean square, if the weight is given."""
    weight = call.optional(index)
    if weight is None:
        return x
    return rms_norm(call, x, weight, call.attribute("qk_norm_epsilon", 1e-6))


def valid_past(call: Call, batch: Dim, length: Dim) -> Node:
    """i32[b]: how many keys of each sequence are valid before this call.

    seqlens_k + 1 - length; a prompt that is padded on the right has none.
    """
    last = call.cast(call.input(5), i32)
    if last.rank == 2:
        last = call.reshape(last, (last.shape[0],))
    call.broadcast_shapes(last.shape, (batch,))
    total = call.shifted(last, 1)
    past = call.binary("sub", total, call.dim(length, i32))
    return call.binary("max", past, call.scalar(0, i32))


def rotated_pair(call: Call, q: Node, k: Node, positions: Node) -> tuple[Node, Node]:
    """q and k by the tables that are inputs 7 and 8, at the positions of input 9 or else these."""
    interleaved = bool(call.attribute("rotary_interleaved", 0))
    given = call.optional(9)
    places = positions if given is None else given
    cos, sin = call.take(call.input(7), places), call.take(call.input(8), places)
    return rotated(call, q, cos, sin, interleaved), rotated(call, k, cos, sin, interleaved)


def present(call: Call, past_index: int, new: Node, past: Node) -> Node:
    """The cache with the new keys (or values) [b, g, s, d] right behind each valid past.

    Where the graph declares that past and present have one length, they share a buffer of that
    length; else the present is longer by the new ones.
    """
    cache = call.optional(past_index)
    if cache is None:
        return new
    if shares_buffer(call, cache, past_index - 2):
        return stored_in(call, cache, new, past)
    both = call.concat([cache, new], 2)
    length = both.shape[2]
    total = call.shape_array(6)
    if total is not None:
        call.require_equal(total.flat()[0], length, "total_sequence_length and past + new")
    place = call.unsqueeze(call.iota(length, i32), [0])
    count = call.unsqueeze(past, [1])
    shift = call.binary("sub", call.dim(cache.shape[2], i32), count)
    behind = call.binary("min", call.binary("add", place, shift), call.dim(length - 1, i32))
    source = call.where(call.binary("less", place, count), place, behind)
    return rows_of(call, both, source)


def shares_buffer(call: Call, cache: Node, output: int) -> bool:
    """Whether the present that the node puts out is declared as long as its past."""
    declared = call.declared_shape(output)
    return (
        declared is not None
        and len(declared) == cache.rank
        and declared[2] is not None
        and dims.known_equal(declared[2], cache.shape[2])
    )


def stored_in(call: Call, cache: Node, new: Node, past: Node) -> Node:
    """The cache with new[b, g, s, d] written from place past[b] on."""
    length, count = cache.shape[2], new.shape[2]
    place = call.unsqueeze(call.iota(length, i32), [0])
    own = call.binary("sub", place, call.unsqueeze(past, [1]))
    inside = call.binary(
        "and",
        call.binary("greater_equal", own, call.scalar(0, i32)),
        call.binary("less", own, call.dim(count, i32)),
    )
    source = call.clamp(own, call.scalar(0, i32), call.dim(count - 1, i32))
    wide = rows_of(call, new, source)
    inside = call.reshape(inside, (inside.shape[0], 1, length, 1))
    return call.where(inside, wide, cache)


def rows_of(call: Call, x: Node, source: Node) -> Node:
    """x[b, g, source[b, t], d] for every t."""
    batch, groups, _, size = x.shape
    length = source.shape[1]
    index = call.reshape(source, (source.shape[0], 1, length, 1))
    index = call.broadcast(index, (batch, groups, length, size))
    return call.make("gather_elements", x, index, axis=2)


def visible_keys(call: Call, positions: Node, keys: Dim) -> Node:
    """bool[b, 1, s, keys]."""
    key = call.iota(keys, i32)
    position = call.reshape(positions, (positions.shape[0], 1, positions.shape[1], 1))
    last = position
    if not call.attribute("causal", 1):  # every valid key, up to this call's last
        last = call.reduce("reduce_max", position, [2])
    visible = call.binary("less_equal", key, last)
    window = int(call.attribute("local_window_size", -1))
    if window <= 0:
        return visible
    return call.binary("and", visible, call.binary("greater", key, call.shifted(position, -window)))


def padded_bias(call: Call, bias: Node, keys: Dim) -> Node:
    """A bias over fewer keys than a shared buffer has: the others are not valid yet."""
    width = bias.shape[-1]
    if dims.known_equal(width, keys) or not dims.known_at_least(keys, width):
        return bias
    zeros = [0] * (bias.rank - 1)
    value = call.scalar(0, bias.dtype)
    return call.make("pad", bias, value, low=(*zeros, 0), high=(*zeros, keys - width))


def with_sink(call: Call, k: Node, v: Node, mask: Node) -> tuple[Node, Node, Node]:
    """Keys, values and mask of a softmax whose denominator has one more term per head: exp(0) with
    smooth_softmax, exp(head_sink). A last key of zeros scores 0, to which the mask adds the sink;
    its value is zero."""
    sink = call.optional(11)
    if sink is None and call.attribute("smooth_softmax", 0) != 1:
        return k, v, mask
    heads = int(call.required("num_heads"))
    if sink is None:
        sink = call.full(0, (heads,), k.dtype)
    dtype = sink.dtype if mask.dtype.kind == "bool" else mask.dtype
    if mask.dtype.kind == "bool":
        hidden = call.scalar(-math.inf, dtype)
        mask = call.where(mask, call.scalar(0, dtype), hidden)
    batch, _, queries, keys = mask.shape
    mask = call.broadcast(mask, (batch, heads, queries, keys))
    column = call.reshape(call.cast(sink, dtype), (1, heads, 1, 1))
    column = call.broadcast(column, (batch, heads, queries, 1))
    k, v = (
        call.concat([x, call.full(0, (*x.shape[:2], 1, x.shape[3]), x.dtype)], 2) for x in (k, v)
    )
    return k, v, call.concat([mask, column], 3)


# ---- MultiHeadAttention and Attention ----------------------------------------------------------


@converter("MultiHeadAttention", inputs=(1, 8), domain=MICROSOFT)
def multi_head_attention(call: Call) -> Result:
    if len(call.node.output) > 3 and call.node.output[3]:
        raise call.error("the output qk is not supported")
    q, k, v = separate_heads(call)
    past_k, past_v = call.optional(6), call.optional(7)
    if past_k is not None and past_v is not None:
        k, v = call.concat([past_k, k], 2), call.concat([past_v, v], 2)
    mask = padding_and_bias(call, call.optional(4), call.optional(5), q.shape[2], k.shape[2])
    return projected_attention(call, (q, k, v), mask), k, v


def separate_heads(call: Call) -> Heads:
    """q, k and v [b, heads, length, size] with their biases, from any of the packed forms."""
    heads, query = int(call.required("num_heads")), call.input(0)
    key, value = call.optional(1), call.optional(2)
    if query.rank == 5:  # [b, s, heads, 3, d]
        parts = unpacked_heads(call, query, 3)
    elif key is None:
        raise call.error("the key is missing")
    elif key.rank == 5:  # [b, t, heads, 2, d]
        parts = [four_axes(call, query, heads), *unpacked_heads(call, key, 2)]
    elif value is None:
        raise call.error("the value is missing")
    elif key.rank == 4:  # keys and values are heads already, and have their biases
        [own] = biased(call, [four_axes(call, query, heads)])
        return call.transpose(own, (0, 2, 1, 3)), key, value
    else:
        parts = [four_axes(call, each, heads) for each in (query, key, value)]
    q, k, v = (call.transpose(each, (0, 2, 1, 3)) for each in biased(call, parts))
    return q, k, v


def four_axes(call: Call, x: Node, heads: int) -> Node:
    """[b, s, heads * size] -> [b, s, heads, size]."""
    if x.rank != 3:
        raise call.error(f"an operand of rank {x.rank}, not 3")
    return call.reshape(x, (*x.shape[:2], heads, call.divide(x.shape[2], heads)))


def unpacked_heads(call: Call, x: Node, count: int) -> list[Node]:
    """[b, s, heads, count, size] -> count times [b, s, heads, size]."""
    call.require_equal(x.shape[3], count, "packed operands")
    shape = (*x.shape[:3], x.shape[4])
    return [call.reshape(call.slice_axis(x, 3, i, i + 1), shape) for i in range(count)]


def biased(call: Call, parts: list[Node]) -> list[Node]:
    """Each of [b, s, heads, size] plus its part of the bias over all of them."""
    bias = call.optional(3)
    if bias is None:
        return parts
    found: list[Node] = []
    offset: Dim = 0
    for part in parts:
        width = part.shape[2] * part.shape[3]
        own = call.reshape(call.slice_axis(bias, 0, offset, offset + width), part.shape[2:])
        found.append(call.binary("add", part, own))
        offset = offset + width
    return found


@converter("Attention", inputs=(2, 6), domain=MICROSOFT)
def attention(call: Call) -> Result:
    """Self attention with its projections; past and present hold keys and values together."""
    call.refuse("do_rotary", 0)
    call.refuse("past_present_share_buffer", 0)
    heads, x, weights = int(call.required("num_heads")), call.input(0), call.input(1)
    projected, bias = call.matmul(x, weights), call.optional(2)
    projected = projected if bias is None else call.binary("add", projected, bias)
    sizes = call.attribute("qkv_hidden_sizes") or [call.divide(projected.shape[2], 3)] * 3
    parts = [call.split_heads(part, heads) for part in call.split(projected, 2, sizes)]
    q, k, v = parts
    past = call.optional(4)
    if past is not None:
        k, v = (
            call.concat([call.reshape(call.slice_axis(past, 0, i, i + 1), past.shape[1:]), new], 2)
            for i, new in enumerate((k, v))
        )
    mask = padding_and_bias(call, call.optional(3), call.optional(5), q.shape[2], k.shape[2])
    result = projected_attention(call, (q, k, v), mask)
    if len(call.node.output) < 2 or not call.node.output[1]:
        return result
    return result, call.concat([call.unsqueeze(each, [0]) for each in (k, v)], 0)


def projected_attention(call: Call, operands: Heads, mask: Node | None) -> Node:
    """[b, s, heads * size] of q, k, v [b, heads, length, size]; the last query sees the last key
    where unidirectional."""
    causal = bool(call.attribute("unidirectional", 0))
    scale = call.attribute("scale", 0.0) or None
    return call.merge_heads(attend(call, *operands, mask, scale=scale, causal=causal))


def padding_and_bias(
    call: Call, mask: Node | None, bias: Node | None, queries: Dim, keys: Dim
) -> Node | None:
    """Both as one additive mask; masked keys get `mask_filter_value`, as in ONNX Runtime."""
    if mask is None:
        return bias
    dtype = call.input(0).dtype
    hidden = call.scalar(call.attribute("mask_filter_value", -10000.0), dtype)
    visible = visible_by_mask(call, mask, queries, keys)
    added = call.where(visible, call.scalar(0, dtype), hidden)
    return added if bias is None else call.binary("add", added, bias)


def visible_by_mask(call: Call, mask: Node, queries: Dim, keys: Dim) -> Node:
    """bool, broadcasting to [b, heads, queries, keys], of any form of mask_index."""
    batch = call.input(0).shape[0]
    if mask.rank == 1:
        return visible_by_lengths(call, mask, batch, keys)
    shape = {2: (mask.shape[0], 1, 1, mask.shape[-1]), 3: (mask.shape[0], 1, *mask.shape[1:])}
    if mask.rank == 4:
        mask = call.slice_axis(mask, 2, keys - queries, keys)
        mask = call.slice_axis(mask, 3, 0, keys)
    else:
        mask = call.reshape(mask, shape[mask.rank])
    return call.binary("greater", mask, call.scalar(0, mask.dtype))


def visible_by_lengths(call: Call, mask: Node, batch: Dim, keys: Dim) -> Node:
    """Of [b] lengths, or [2 * b]: ends and then beginnings."""
    key = call.iota(keys, mask.dtype)
    if not call.symbols.require_equal(mask.shape[0], batch):
        call.require_equal(mask.shape[0], 2 * batch, "mask_index")
    parts = [call.slice_axis(mask, 0, 0, batch)]
    if not dims.known_equal(mask.shape[0], batch):
        parts.append(call.slice_axis(mask, 0, batch, 2 * batch))
    parts = [call.reshape(part, (batch, 1, 1, 1)) for part in parts]
    visible = call.binary("less", key, parts[0])
    if len(parts) == 1:
        return visible
    return call.binary("and", visible, call.binary("greater_equal", key, parts[1]))
