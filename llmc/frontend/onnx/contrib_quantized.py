"""Quantised operators of com.microsoft besides MatMulNBits: integer products, rows of tables."""

from __future__ import annotations

from llmc.frontend.onnx.attention import constant_dim
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.quantization import (
    UNSIGNED,
    centred,
    dynamically_quantized,
    integer_product,
    per_axis,
    unpacked,
)
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir.dtypes import f32, u8
from llmc.ir.graph import Node


@converter("MatMulIntegerToFloat", inputs=(4, 7), domain=MICROSOFT)
def matmul_integer_to_float(call: Call) -> Result:
    a, b = call.input(0), call.input(1)
    product = integer_product(call, a, b, call.optional(4), call.optional(5))
    scale = call.binary("mul", by_column(call, 2), by_column(call, 3))
    return scaled_product(call, product, scale, call.optional(6))


@converter("DynamicQuantizeMatMul", inputs=(3, 5), domain=MICROSOFT)
def dynamic_quantize_matmul(call: Call) -> Result:
    """The left operand is quantised to u8 as a whole, with the scale that its range asks for."""
    codes, scale, zero = dynamically_quantized(call, call.input(0))
    product = integer_product(call, codes, call.input(1), zero, call.optional(3))
    return scaled_product(
        call, product, call.binary("mul", scale, by_column(call, 2)), call.optional(4)
    )


def by_column(call: Call, index: int) -> Node:
    """A scale input: one for all, or one per column."""
    scale = call.input(index)
    return call.reshape(scale, ()) if scale.shape == (1,) else scale


def scaled_product(call: Call, product: Node, scale: Node, bias: Node | None) -> Node:
    """scale * product + bias, as floats."""
    result = call.binary("mul", call.cast(product, scale.dtype), scale)
    return result if bias is None else call.binary("add", result, bias)


@converter("GatherBlockQuantized", inputs=(3, 4), domain=MICROSOFT)
def gather_block_quantized(call: Call) -> Result:
    """Rows of a table of codes with a scale (and zero point) per block of `block_size`: what is
    picked is dequantised, the table stays as it is."""
    data, index, scales = call.input(0), call.input(1), call.input(2)
    bits, block = int(call.attribute("bits", 4)), int(call.attribute("block_size", 128))
    axis = call.axis(int(call.attribute("gather_axis", 0)), data.rank)
    quantized = call.axis(int(call.attribute("quantize_axis", 1)), data.rank)
    zeros = call.optional(3)
    if data.dtype is u8:
        if bits not in UNSIGNED:
            raise call.error(f"bits={bits} is not 2, 4 or 8")
        data = call.cast(unpacked(call, data, bits), UNSIGNED[bits])
        zeros = default_zeros(call, zeros, scales, bits)
    if axis == quantized:
        raise call.error(f"gather_axis and quantize_axis are both {axis}: not supported")
    parts = [data, scales] if zeros is None else [data, scales, zeros]
    codes, scales, *rest = (call.take(part, index, axis) for part in parts)
    place = quantized if quantized < axis else quantized + index.rank - 1
    block = block or constant_dim(call, codes.shape[place], "the block")
    scale = per_axis(call, scales, codes, place, block)
    zero = per_axis(call, rest[0], codes, place, block) if rest else None
    values = call.cast(centred(call, codes, zero, f32), scales.dtype)
    return call.binary("mul", values, scale)


def default_zeros(call: Call, zeros: Node | None, scales: Node, bits: int) -> Node:
    """Packed zero points, one per scale; the middle of the range if they are not given."""
    if zeros is None:
        return call.full(1 << (bits - 1), scales.shape, u8)
    return call.slice_axis(unpacked(call, zeros, bits), scales.rank - 1, 0, scales.shape[-1])
