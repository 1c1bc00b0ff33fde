"""MoE and QMoE of com.microsoft: an MLP of which each token uses the few parts a router chose.

As in `models.experts`, every expert is evaluated for every token, as one wide product, and those
that were not chosen weigh nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.quantization import UNSIGNED, signed, unpacked
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import f32
from llmc.ir.graph import Node


@dataclass(frozen=True)
class Layer:
    """A linear layer of all experts: weight [experts, outputs, inputs], bias [experts, outputs]."""

    weight: Node
    bias: Node | None

    @property
    def outputs(self) -> Dim:
        return self.weight.shape[1]


@converter("MoE", inputs=(5, 8), domain=MICROSOFT)
def mixture_of_experts(call: Call) -> Result:
    layers = [
        Layer(call.input(index), call.optional(index + 1)) if call.has(index) else None
        for index in (2, 4, 6)
    ]
    return mixture(call, layers)


@converter("QMoE", inputs=(7, 15), domain=MICROSOFT)
def quantized_mixture_of_experts(call: Call) -> Result:
    call.refuse("quant_type", "int")
    call.refuse("weights_prepacked", 0, -1)
    layers = [
        Layer(expert_weights(call, number), call.optional(3 * number + 1))
        if call.has(3 * number - 1)
        else None
        for number in (1, 2, 3)
    ]
    return mixture(call, layers)


def expert_weights(call: Call, number: int) -> Node:
    """[experts, outputs, inputs] behind `dequantize`, from packed codes and scales for each output,
    or for each block of its inputs."""
    codes, scales, zeros = (call.optional(i) for i in (3 * number - 1, 3 * number, 10 + number))
    if codes is None or scales is None:
        raise call.error(f"the codes or scales of fc{number} are missing")
    bits = call.attribute("expert_weight_bits", 4)
    bits = int(call.attribute(f"fc{number}_expert_weight_bits", bits))
    if bits not in UNSIGNED:
        raise call.error(f"expert_weight_bits={bits} is not 2, 4 or 8")
    codes = unpacked(call, codes, bits)
    scales = call.unsqueeze(scales, [2]) if scales.rank == 2 else scales
    group = int(call.attribute("block_size", 0)) or codes.shape[2]
    if zeros is None:
        operands = [signed(call, codes, bits), scales]
    else:
        zeros = unpacked(call, zeros, bits)
        if zeros.rank == 2:
            zeros = call.unsqueeze(call.slice_axis(zeros, 1, 0, scales.shape[1]), [2])
        zeros = call.slice_axis(zeros, 2, 0, scales.shape[2])
        operands = [call.cast(codes, UNSIGNED[bits]), scales, zeros]
    dtype = call.input(0).dtype
    return call.make("dequantize", *operands, group=group, dtype=dtype)


def mixture(call: Call, layers: list[Layer | None]) -> Node:
    """x [tokens.., hidden] through the chosen experts' layers fc1 (and fc3, its gate) and fc2."""
    call.refuse("use_sparse_mixer", 0)
    x = call.input(0)
    first, second, gate = layers
    if first is None or second is None:
        raise call.error("the weights of fc1 or fc2 are missing")
    tokens = dims.product(x.shape[:-1])
    flat = call.reshape(x, (tokens, x.shape[-1]))
    scores = call.cast(expert_scores(call), x.dtype)
    inner = activated(call, flat, first, gate)
    chosen = call.binary("greater", scores, call.scalar(0, scores.dtype))
    shape = (*scores.shape, 1)
    weighted = call.binary("mul", inner, call.reshape(scores, shape))
    # Chosen by `where`: what an expert that was not chosen makes of x may be infinite.
    weighted = call.where(call.reshape(chosen, shape), weighted, call.scalar(0, x.dtype))
    width = inner.shape[1] * inner.shape[2]
    result = call.matmul(call.reshape(weighted, (tokens, width)), stacked(call, second.weight, 1))
    if second.bias is not None:
        result = call.binary("add", result, call.matmul(scores, second.bias))
    return call.reshape(result, x.shape)


def stacked(call: Call, weight: Node, experts: int) -> Node:
    """[experts, outputs, inputs] as one matrix of all experts: [inputs, experts * outputs], or with
    `experts` = 1 [experts * inputs, outputs]. What is dequantised stays so."""
    if weight.op == "dequantize":
        parts = [rows_of_experts(call, each, experts) for each in weight.inputs]
        matrix = call.make("dequantize", *parts, group=weight["group"], dtype=weight.dtype)
    else:
        matrix = rows_of_experts(call, weight, experts)
    return call.swap_last(matrix)


def rows_of_experts(call: Call, x: Node, axis: int) -> Node:
    """[experts, outputs, inputs]: the experts' rows below (0) or beside (1) one another."""
    experts, outputs, inputs = x.shape
    if axis == 0:
        return call.reshape(x, (experts * outputs, inputs))
    return call.reshape(call.transpose(x, (1, 0, 2)), (outputs, experts * inputs))


def linear(call: Call, x: Node, layer: Layer) -> Node:
    """x[tokens, inputs] -> [tokens, experts, outputs]."""
    experts, outputs = layer.weight.shape[:2]
    product = call.matmul(x, stacked(call, layer.weight, 0))
    result = call.reshape(product, (x.shape[0], experts, outputs))
    return result if layer.bias is None else call.binary("add", result, layer.bias)


def activated(call: Call, x: Node, first: Layer, gate: Layer | None) -> Node:
    """[tokens, experts, inner]: the activation of fc1, times fc3 where there is one."""
    kind = str(call.attribute("activation_type", "relu"))
    hidden = linear(call, x, first)
    if kind == "swiglu":
        return gated_swish(call, *gate_and_linear(call, x, hidden, gate))
    if kind == "gelu":
        hidden = call.unary("gelu", hidden, approximate="tanh")  # as ONNX Runtime computes it
    elif kind in ("relu", "silu"):
        hidden = call.unary(kind, hidden)
    elif kind != "identity":
        raise call.error(f"activation_type={kind!r} is not supported")
    return hidden if gate is None else call.binary("mul", hidden, linear(call, x, gate))


def gate_and_linear(
    call: Call, x: Node, hidden: Node, gate: Layer | None
) -> tuple[Node, Node]:
    """The two halves of SwiGLU: fc1 and fc3, or both of fc1, in turns or one after the other."""
    fusion = int(call.attribute("swiglu_fusion", 0))
    if fusion == 0:
        if gate is None:
            raise call.error("swiglu_fusion=0 needs the weights of fc3")
        return hidden, linear(call, x, gate)
    half = call.divide(hidden.shape[2], 2)
    if fusion == 1:
        width = hidden.shape[2]
        return call.slice_axis(hidden, 2, 0, width, 2), call.slice_axis(hidden, 2, 1, width, 2)
    return call.slice_axis(hidden, 2, 0, half), call.slice_axis(hidden, 2, half, 2 * half)


def gated_swish(call: Call, gate: Node, linear_part: Node) -> Node:
    """G * sigmoid(alpha * G) * (L + beta), G and L clamped if there is a limit."""
    alpha, beta = call.attribute("activation_alpha", 1.0), call.attribute("activation_beta", 0.0)
    limit = call.attribute("swiglu_limit")
    if limit is not None:
        high, low = call.scalar(limit, gate.dtype), call.scalar(-limit, gate.dtype)
        gate, linear_part = call.binary("min", gate, high), call.clamp(linear_part, low, high)
    if alpha == 1.0:
        swish = call.unary("silu", gate)
    else:
        swish = call.binary("mul", gate, call.unary("sigmoid", call.scaled(gate, alpha)))
    return call.binary("mul", swish, call.shifted(linear_part, beta) if beta else linear_part)


def expert_scores(call: Call) -> Node:
    """f32[tokens, experts]: what each expert's result counts; 0 for those not chosen."""
    logits, count = call.cast(call.input(1), f32), int(call.attribute("k", 1))
    experts = logits.shape[1]
    found = call.make("top_k", call.make("softmax", logits, axis=1), k=count, axis=1)
    values, numbers = call.make("get", found, index=0), call.make("get", found, index=1)
    expert = call.make("iota", dtype=numbers.dtype, shape=(1, experts), axis=1)
    if call.has(14):
        given = call.cast(call.input(14), f32)
        values = call.make("gather_elements", given, numbers, axis=1)
    if call.attribute("normalize_routing_weights", 0):
        values = call.binary("div", values, call.reduce("reduce_sum", values, [1]))
    total = None
    for rank in range(count):
        own, number = (call.slice_axis(each, 1, rank, rank + 1) for each in (values, numbers))
        mine = call.binary("equal", number, expert)
        score = call.where(mine, own, call.scalar(0, f32))
        total = score if total is None else call.binary("add", total, score)
    if total is None:
        raise call.error(f"k={count} experts")
    return total
