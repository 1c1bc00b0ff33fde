"""Operators of the com.microsoft domain, with the meaning ONNX Runtime documents for them."""

from __future__ import annotations

import math

from llmc.frontend.onnx.attention import attend, rotate_any_layout, rotated
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.normalization import layer_norm, rms_norm
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i32
from llmc.ir.graph import Node

# ---- activations and norms ---------------------------------------------------------------------


@converter("Gelu", inputs=1, domain=MICROSOFT)
def gelu(call: Call) -> Result:
    return call.unary("gelu", call.input(0), approximate="none")


@converter("BiasGelu", inputs=2, domain=MICROSOFT)
def bias_gelu(call: Call) -> Result:
    return call.unary("gelu", call.binary("add", call.input(0), call.input(1)), approximate="none")


@converter("FastGelu", inputs=(1, 2), domain=MICROSOFT)
def fast_gelu(call: Call) -> Result:
    x, bias = call.input(0), call.optional(1)
    x = x if bias is None else call.binary("add", x, bias)
    return call.unary("gelu", x, approximate="tanh")


@converter("QuickGelu", inputs=1, domain=MICROSOFT)
def quick_gelu(call: Call) -> Result:
    x = call.input(0)
    inner = call.scaled(x, call.attribute("alpha", 1.702))
    return call.binary("mul", x, call.unary("sigmoid", inner))


def residual_sum(call: Call, bias: Node | None) -> Node:
    """input + skip (+ bias)."""
    total = call.binary("add", call.input(0), call.input(1))
    return total if bias is None else call.binary("add", total, bias)


@converter("SkipSimplifiedLayerNormalization", inputs=(3, 4), domain=MICROSOFT)
def skip_rms_norm(call: Call) -> Result:
    """RMSNorm of the residual sum, which is the fourth output; the two between are not used."""
    total = residual_sum(call, call.optional(3))
    return rms_norm(call, total, call.input(2), call.attribute("epsilon", 1e-5)), None, None, total


@converter("SkipLayerNormalization", inputs=(3, 5), domain=MICROSOFT)
def skip_layer_norm(call: Call) -> Result:
    total = residual_sum(call, call.optional(4))
    weight, beta, epsilon = call.input(2), call.optional(3), call.attribute("epsilon", 1e-5)
    return layer_norm(call, total, weight, beta, epsilon), None, None, total


@converter("RotaryEmbedding", inputs=4, domain=MICROSOFT)
def rotary_embedding(call: Call) -> Result:
    """positions: [b, s], or one offset for all."""
    call.refuse("is_packed_batching", 0)
    call.refuse("scale", 1.0)
    x, positions = call.input(0), call.input(1)
    if positions.rank == 1:
        batch, length = x.shape[0], x.shape[2] if x.rank == 4 else x.shape[1]
        places = call.binary("add", call.iota(length, positions.dtype), call.reshape(positions, ()))
        positions = call.broadcast(places, (batch, length))
    cos, sin = (call.take(call.input(index), positions) for index in (2, 3))
    return rotate_any_layout(call, x, cos, sin)


# ---- GroupQueryAttention -----------------------------------------------------------------------


@converter("GroupQueryAttention", inputs=(7, 14), domain=MICROSOFT)
def group_query_attention(call: Call) -> Result:
    """Attention with rotary embedding and cache inside.

    Sequence b has seqlens_k[b] + 1 valid keys, the last of them from this call; its new tokens
    stand right behind its valid past. Key j is seen by the query at position p if j <= p and,
    with a window, j > p - window.
    """
    refuse_variants(call)
    q, k, v = query_key_value(call)
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
        mask = call.where(mask, bias, call.scalar(-math.inf, bias.dtype))
    scale = call.attribute("scale", 0.0) or None
    softcap = call.attribute("softcap", 0.0)
    return call.merge_heads(attend(call, q, k, v, mask, scale=scale, softcap=softcap)), k, v


def refuse_variants(call: Call) -> None:
    """What only newer kernels of ONNX Runtime have."""
    call.refuse("smooth_softmax", 0, -1)
    call.refuse("qk_output", 0)
    call.refuse("k_quant_type", "NONE")
    call.refuse("v_quant_type", "NONE")
    if any(call.has(index) for index in (11, 12, 13)):
        raise call.error("head_sink and quantised caches are not supported")


def query_key_value(call: Call) -> tuple[Node, Node, Node]:
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
    interleaved = bool(call.attribute("rotary_interleaved", 0))
    given = call.optional(9)
    places = positions if given is None else given
    cos, sin = call.take(call.input(7), places), call.take(call.input(8), places)
    return rotated(call, q, cos, sin, interleaved), rotated(call, k, cos, sin, interleaved)


def present(call: Call, past_index: int, new: Node, past: Node) -> Node:
    """The cache with the new keys (or values) [b, g, s, d] right behind each valid past."""
    cache = call.optional(past_index)
    total = call.shape_array(6)
    if cache is None:
        return new
    both = call.concat([cache, new], 2)
    length = both.shape[2]
    if total is not None:
        call.require_equal(total.flat()[0], length, "total_sequence_length and past + new")
    place = call.unsqueeze(call.iota(length, i32), [0])
    count = call.unsqueeze(past, [1])
    shift = call.binary("sub", call.dim(cache.shape[2], i32), count)
    behind = call.binary("min", call.binary("add", place, shift), call.dim(length - 1, i32))
    source = call.where(call.binary("less", place, count), place, behind)
    source = call.reshape(source, (source.shape[0], 1, length, 1))
    return call.make("gather_elements", both, call.broadcast(source, both.shape), axis=2)


def visible_keys(call: Call, positions: Node, keys: Dim) -> Node:
    """bool[b, 1, s, keys]."""
    key = call.iota(keys, i32)
    position = call.reshape(positions, (positions.shape[0], 1, positions.shape[1], 1))
    visible = call.binary("less_equal", key, position)
    window = int(call.attribute("local_window_size", -1))
    if window <= 0:
        return visible
    return call.binary("and", visible, call.binary("greater", key, call.shifted(position, -window)))
