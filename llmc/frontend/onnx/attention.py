"""Attention, FlexAttention and RotaryEmbedding of ai.onnx (opset 23 on)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import PREVIEW, Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import bool_, f32, f64, i64
from llmc.ir.graph import Node


def attend(
    call: Call,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None,
    *,
    scale: float | None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Node:
    """The attention op on q[b, h, s, d], k[b, g, t, d], v[b, g, t, e]; scale None is 1/sqrt(d)."""
    for axis in (0, 2):
        call.require_equal(k.shape[axis], v.shape[axis], f"keys and values, axis {axis}")
    call.require_equal(q.shape[0], k.shape[0], "batch of queries and keys")
    call.require_equal(q.shape[3], k.shape[3], "head size of queries and keys")
    if scale is None:
        scale = 1 / math.sqrt(constant_dim(call, q.shape[3], "head size"))
    if mask is not None:
        call.broadcast_shapes(mask.shape, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    operands = [q, k, v] if mask is None else [q, k, v, mask]
    options = {"scale": float(scale), "causal": causal, "window": window, "softcap": float(softcap)}
    return call.make("attention", *operands, **options)


def constant_dim(call: Call, dim: Dim, what: str) -> int:
    if not isinstance(dim, int):
        raise call.error(f"{what} is symbolic: {dims.format_dim(dim)}")
    return dim


def rotated(call: Call, x: Node, cos: Node, sin: Node, interleaved: bool) -> Node:
    """rope of x[b, s, h, d] by cos and sin [b, s, r]."""
    call.symbols.same_shape(cos.shape, sin.shape)
    call.broadcast_shapes(cos.shape[:-1], x.shape[:-2])
    return call.make("rope", x, cos, sin, interleaved=interleaved)


# ---- RotaryEmbedding ---------------------------------------------------------------------------


@converter("RotaryEmbedding", inputs=(3, 4))
def rotary_embedding(call: Call) -> Result:
    positions = call.optional(3)
    cos, sin = call.input(1), call.input(2)
    if positions is not None:
        cos, sin = call.take(cos, positions), call.take(sin, positions)
    return rotate_any_layout(call, call.input(0), cos, sin)


def rotate_any_layout(call: Call, x: Node, cos: Node, sin: Node) -> Node:
    """x as [b, h, s, d] or [b, s, h * d]; the attributes of both RotaryEmbedding operators."""
    interleaved = bool(call.attribute("interleaved", 0))
    cos, sin = (rotary_part(call, table) for table in (cos, sin))
    if x.rank == 4:
        turned = rotated(call, call.transpose(x, (0, 2, 1, 3)), cos, sin, interleaved)
        return call.transpose(turned, (0, 2, 1, 3))
    if x.rank != 3:
        raise call.error(f"input of rank {x.rank}")
    heads = call.attribute("num_heads", 0)
    size = call.divide(x.shape[2], heads) if heads else 2 * cos.shape[-1]
    heads = heads or dims.floordiv(x.shape[2], size)
    split = call.reshape(x, (x.shape[0], x.shape[1], heads, size))
    return call.reshape(rotated(call, split, cos, sin, interleaved), x.shape)


def rotary_part(call: Call, table: Node) -> Node:
    """The first rotary_embedding_dim / 2 columns of a table, where that attribute is given."""
    width = int(call.attribute("rotary_embedding_dim", 0))
    return call.slice_axis(table, table.rank - 1, 0, width // 2) if width else table


# ---- Attention ---------------------------------------------------------------------------------


@converter("Attention", inputs=(3, 7))
def attention(call: Call) -> Result:
    flat = call.input(0).rank == 3
    q, k, v = (split_operand(call, index) for index in range(3))
    past_key, past_value = call.optional(4), call.optional(5)
    offset: Dim = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = call.concat([past_key, k], 2), call.concat([past_value, v], 2)
    elif past_key is not None or past_value is not None:
        raise call.error("past_key and past_value go together")
    mask, causal, window = combined_mask(call, q.shape[2], k.shape[2], offset)
    softcap = float(call.attribute("softcap", 0.0))
    wide_q, wide_k, wide_v = (in_precision(call, each) for each in (q, k, v))
    result = attend(
        call,
        wide_q,
        wide_k,
        wide_v,
        mask,
        scale=call.attribute("scale"),
        causal=causal,
        window=window,
        softcap=softcap,
    )
    result = call.cast(result, q.dtype)
    scores = None
    if len(call.node.output) > 3 and call.node.output[3]:
        scores = score_output(call, (wide_q, wide_k), (mask, causal, window), softcap)
        scores = call.cast(scores, q.dtype)
    return call.merge_heads(result) if flat else result, k, v, scores


def in_precision(call: Call, x: Node) -> Node:
    """x in f64 where softmax_precision asks for that; else as it is, since all narrower types are
    computed in f32."""
    code = call.attribute("softmax_precision")
    dtype = f32 if code is None else element_dtype(code, call.location)
    if not dtype.is_float or dtype.bits < 16:
        raise call.error(f"softmax_precision {dtype} is not supported")
    return call.cast(x, f64) if dtype is f64 else x


def score_output(
    call: Call,
    operands: Sequence[Node],
    visibility: tuple[Node | None, bool, int],
    softcap: float,
) -> Node:
    """qk_matmul_output [b, h, s, t]: the scaled products (mode 0), capped (1), with the mask (2),
    or their softmax, in which rows that see nothing are zero (3)."""
    mode = int(call.attribute("qk_matmul_output_mode", 0))
    q, k = (call.cast(each, f64 if each.dtype is f64 else f32) for each in operands)
    size = constant_dim(call, q.shape[3], "head size")
    scores = raw_scores(call, q, k, call.attribute("scale") or 1 / math.sqrt(size))
    if mode >= 1 and softcap:
        scores = call.scaled(call.unary("tanh", call.scaled(scores, 1 / softcap)), softcap)
    if mode < 2:
        return scores
    scores = masked_scores(call, scores, *visibility)
    return softmax_or_zero(call, scores) if mode == 3 else scores


def raw_scores(call: Call, q: Node, k: Node, scale: float) -> Node:
    """scale * q[b, h, s, d] @ k[b, g, t, d]^T as [b, h, s, t]; each head of k serves h / g of q."""
    keys = repeated_heads(call, k, constant_dim(call, q.shape[1], "heads"))
    return call.scaled(call.matmul(q, call.swap_last(keys)), scale)


def repeated_heads(call: Call, x: Node, heads: int) -> Node:
    """[b, g, t, d] -> [b, heads, t, d]."""
    batch, groups, length, size = x.shape
    if groups == heads:
        return x
    repeats = heads // constant_dim(call, groups, "key and value heads")
    wide = call.broadcast(call.unsqueeze(x, [2]), (batch, groups, repeats, length, size))
    return call.reshape(wide, (batch, heads, length, size))


def masked_scores(
    call: Call, scores: Node, mask: Node | None, causal: bool, window: int
) -> Node:
    """Scores with what `combined_mask` found applied: -inf where nothing is seen."""
    queries, keys = scores.shape[2:]
    hidden = call.scalar(-math.inf, scores.dtype)
    if mask is not None and mask.dtype is bool_:
        scores = call.where(mask, scores, hidden)
    elif mask is not None:
        scores = call.binary("add", scores, call.cast(mask, scores.dtype))
    if causal:
        windows = [window - 1, -1]
        seen = visible_places(call, (queries, keys, keys - queries), None, windows)
        scores = call.where(seen, scores, hidden)
    return scores


def softmax_or_zero(call: Call, scores: Node) -> Node:
    """softmax over the last axis; rows of -inf only become zeros."""
    lowest = call.scalar(-math.inf, scores.dtype)
    zero = call.scalar(0, scores.dtype)
    seen = call.binary("greater", call.reduce("reduce_max", scores, [scores.rank - 1]), lowest)
    return call.where(seen, call.make("softmax", scores, axis=scores.rank - 1), zero)


# ---- FlexAttention -----------------------------------------------------------------------------


@converter("FlexAttention", inputs=3, domain=PREVIEW)
def flex_attention(call: Call) -> Result:
    """Attention whose scores and probabilities pass through graphs given as attributes.

    The scores are written out, so that the modifiers see them; modifiers that scale, cap and mask
    are recognised like any other decomposed attention.
    """
    q, k, v = (call.input(index) for index in range(3))
    if any(each.rank != 4 for each in (q, k, v)):
        raise call.error("queries, keys and values must have rank 4")
    code = call.attribute("softmax_precision")
    dtype = f64 if q.dtype is f64 else f32
    dtype = dtype if code is None else element_dtype(code, call.location)
    size = constant_dim(call, q.shape[3], "head size")
    scale = call.attribute("scale") or 1 / math.sqrt(size)
    wide = [call.cast(each, dtype) for each in (q, k, v)]
    scores = raw_scores(call, wide[0], wide[1], scale)
    scores = modified(call, "score_mod", scores)
    probabilities = modified(call, "prob_mod", call.make("softmax", scores, axis=3))
    values = repeated_heads(call, wide[2], constant_dim(call, q.shape[1], "heads"))
    return call.cast(call.matmul(probabilities, values), q.dtype)


def modified(call: Call, name: str, x: Node) -> Node:
    """x through the graph of an attribute, if it is given."""
    graph = call.attribute(name)
    if graph is None:
        return x
    [result] = call.inline(graph, [x])
    y = call.tensor(result)
    if y.type != x.type:
        raise call.error(f"{name} makes {y.type} of {x.type}")
    return y


# ---- operands and masks ------------------------------------------------------------------------


def split_operand(call: Call, index: int) -> Node:
    """Query, key or value as [b, heads, length, size]."""
    x = call.input(index)
    if x.rank == 4:
        return x
    if x.rank != 3:
        raise call.error(f"input {index} has rank {x.rank}, not 3 or 4")
    return call.split_heads(x, call.required("kv_num_heads" if index else "q_num_heads"))


def combined_mask(
    call: Call, queries: Dim, keys: Dim, offset: Dim
) -> tuple[Node | None, bool, int]:
    """(mask operand or None, whether the op's own causal rule applies, the op's window)."""
    mask = padded_mask(call, keys)
    lengths = call.optional(6)
    windows = [int(call.attribute(f"{side}_window_size", -1)) for side in ("left", "right")]
    causal = bool(call.attribute("is_causal", 0))
    aligned = dims.known_equal(keys, queries + offset)  # the last query sees the last key
    if lengths is None and aligned and causal:
        return mask, True, windows[0] + 1  # the causal rule is tighter than any right window
    if lengths is None and max(windows) < 0 and not causal:
        return mask, False, 0
    visible = visible_places(call, (queries, keys, offset), lengths, windows)
    return merged_masks(call, mask, visible), False, 0


def padded_mask(call: Call, keys: Dim) -> Node | None:
    """The mask input; a bool or float mask shorter than the keys hides the rest."""
    mask = call.optional(3)
    if mask is None or mask.rank == 0:
        return mask
    width = mask.shape[-1]
    if width == 1 or dims.known_equal(width, keys) or not dims.known_at_least(keys, width):
        return mask  # equal as it is, or `attend` unifies the two
    hidden = call.scalar(0 if mask.dtype is bool_ else -math.inf, mask.dtype)
    zeros = [0] * (mask.rank - 1)
    return call.make("pad", mask, hidden, low=(*zeros, 0), high=(*zeros, keys - width))


def visible_places(
    call: Call, extents: tuple[Dim, Dim, Dim], lengths: Node | None, windows: list[int]
) -> Node:
    """bool[(b, 1,) queries, keys]: what causality, windows and valid key counts leave visible."""
    queries, keys, offset = extents
    key = call.iota(keys)
    position = call.unsqueeze(call.binary("add", call.iota(queries), call.dim(offset)), [1])
    if lengths is not None:
        lengths = call.reshape(call.cast(lengths, i64), (lengths.shape[0], 1, 1, 1))
        if not call.has(4):
            first = call.binary("sub", lengths, call.dim(queries))
            position = call.binary("add", call.unsqueeze(call.iota(queries), [1]), first)
    rules = [] if lengths is None else [call.binary("less", key, lengths)]
    if call.attribute("is_causal", 0):
        rules.append(call.binary("less_equal", key, position))
    left, right = windows
    if left >= 0:
        rules.append(call.binary("greater_equal", key, call.shifted(position, -left)))
    if right >= 0:
        rules.append(call.binary("less_equal", key, call.shifted(position, right)))
    result = rules[0]
    for rule in rules[1:]:
        result = call.binary("and", result, rule)
    return result


def merged_masks(call: Call, mask: Node | None, visible: Node) -> Node:
    """Both masks as one operand: bool, or additive if the given mask is."""
    if mask is None:
        return visible
    if mask.dtype is bool_:
        return call.binary("and", mask, visible)
    return call.where(visible, mask, call.scalar(-math.inf, mask.dtype))
