"""Activations, norms and embeddings of com.microsoft, with the meaning ONNX Runtime documents."""

from __future__ import annotations

from llmc.frontend.onnx.attention import rotate_any_layout
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.matmul import fused_matmul, gemm
from llmc.frontend.onnx.normalization import layer_norm, rms_norm
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir.dtypes import i32, i64
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


@converter("BiasSplitGelu", inputs=2, domain=MICROSOFT)
def bias_split_gelu(call: Call) -> Result:
    """The first half of x + bias times gelu of the second."""
    total = call.binary("add", call.input(0), call.input(1))
    last, width = total.rank - 1, call.divide(total.shape[-1], 2)
    left, right = call.split(total, last, [width, width])
    return call.binary("mul", left, call.unary("gelu", right, approximate="none"))


ACTIVATIONS = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}


@converter("FusedMatMulActivation", inputs=2, domain=MICROSOFT)
def fused_matmul_activation(call: Call) -> Result:
    return activated(call, fused_matmul(call))


@converter("FusedGemm", inputs=(2, 3), domain=MICROSOFT)
def fused_gemm(call: Call) -> Result:
    return activated(call, gemm(call))


def activated(call: Call, x: Node) -> Node:
    """x through the function that the attribute names."""
    kind = str(call.attribute("activation", ""))
    if kind == "LeakyRelu":
        alpha = call.attribute("activation_alpha", 0.01)
        return call.where(
            call.binary("greater", x, call.scalar(0, x.dtype)), x, call.scaled(x, alpha)
        )
    if kind not in ACTIVATIONS:
        raise call.error(f"activation={kind!r} is not supported")
    return call.unary(ACTIVATIONS[kind], x)


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


@converter("EmbedLayerNormalization", inputs=(7, 9), domain=MICROSOFT)
def embed_layer_norm(call: Call) -> Result:
    """layer_norm(words + positions + segments); how many tokens the mask has; that sum."""
    ids, segments, positions = call.input(0), call.optional(1), call.optional(8)
    if positions is None:
        positions = call.unsqueeze(call.iota(ids.shape[1], i64), [0])
    words = call.take(call.input(2), ids)
    total = call.binary("add", words, call.take(call.input(3), positions))
    if segments is not None:
        total = call.binary("add", total, call.take(call.input(4), segments))
    result = layer_norm(
        call, total, call.input(5), call.input(6), call.attribute("epsilon", 1e-12)
    )
    mask = call.optional(7)
    if mask is None:
        counts = call.full(0, ids.shape[:1], i32)
    else:
        counts = call.cast(call.reduce("reduce_sum", mask, [1], keep=False), i32)
    return result, counts, total
