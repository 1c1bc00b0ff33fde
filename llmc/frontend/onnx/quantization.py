"""Quantised operators, as exact integer arithmetic or as dequantised floats."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.casts import cast_node
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.reduction import constant_scalar
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType, bool_, f32, i2, i4, i8, i16, i32, u2, u4, u8
from llmc.ir.graph import Node
from llmc.ir.quantized import LARGEST_BLOCK

SIGNED = {2: i2, 4: i4, 8: i8}
UNSIGNED = {2: u2, 4: u4, 8: u8}


def integer_range(dtype: DType) -> tuple[int, int]:
    """Least and greatest value of an integer dtype."""
    if dtype.kind == "uint":
        return 0, (1 << dtype.bits) - 1
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1


def per_axis(call: Call, parameter: Node, x: Node, axis: int, block: int) -> Node:
    """A scale or zero point shaped to broadcast over x: scalar, one per place of an axis, or one
    per block of `block` places."""
    if block:
        repeated = [*parameter.shape[: axis + 1], block, *parameter.shape[axis + 1 :]]
        wide = call.broadcast(call.unsqueeze(parameter, [axis + 1]), repeated)
        flat = [
            *parameter.shape[:axis],
            parameter.shape[axis] * block,
            *parameter.shape[axis + 1 :],
        ]
        return call.slice_axis(call.reshape(wide, flat), axis, 0, x.shape[axis])
    if parameter.rank == 0 or dims.product(parameter.shape) == 1:
        return call.reshape(parameter, ())
    if parameter.rank != 1:
        raise call.error(f"scale of rank {parameter.rank} without block_size")
    call.require_equal(parameter.shape[0], x.shape[axis], "scales along the axis")
    return call.reshape(parameter, [x.shape[axis]] + [1] * (x.rank - axis - 1))


def is_zero(zero: Node) -> bool:
    """Whether zero points are known to be 0, as those of symmetric codes are."""
    while zero.op in ("broadcast", "reshape"):
        zero = zero.inputs[0]
    return constant_scalar(zero) == 0


def centred(call: Call, codes: Node, zero: Node | None, dtype: DType) -> Node:
    """codes - zero in a wider dtype, exact for the integers that it can hold."""
    wide = call.cast(codes, dtype)
    if zero is None or is_zero(zero):
        return wide
    return call.binary("sub", wide, call.cast(zero, dtype))


def axis_and_block(call: Call, x: Node) -> tuple[int, int]:
    """The axis that scales belong to, and the elements that share one (0: all of an index)."""
    axis = call.attribute("axis", 1)
    return (call.axis(axis, x.rank) if -x.rank <= axis < x.rank else 0), call.attribute(
        "block_size", 0
    )


@converter("DequantizeLinear", inputs=(2, 3))
@converter("DequantizeLinear", inputs=(2, 3), domain=MICROSOFT)
def dequantize_linear(call: Call) -> Result:
    x, scale, zero = call.input(0), call.input(1), call.optional(2)
    axis, block = axis_and_block(call, x)
    scale = per_axis(call, scale, x, axis, block)
    zero = None if zero is None else per_axis(call, zero, x, axis, block)
    code = call.attribute("output_dtype", 0)
    dtype = element_dtype(code, call.location) if code else scale.dtype
    exact = x.dtype.bits > 16  # 32-bit codes are subtracted as integers, the others fit f32
    values = centred(call, x, zero, i32 if exact else f32)
    return call.binary("mul", call.cast(values, dtype), call.cast(scale, dtype))


@converter("QuantizeLinear", inputs=(2, 3))
@converter("QuantizeLinear", inputs=(2, 3), domain=MICROSOFT)
def quantize_linear(call: Call) -> Result:
    x, scale, zero = call.input(0), call.input(1), call.optional(2)
    axis, block = axis_and_block(call, x)
    code = call.attribute("output_dtype", 0)
    dtype = element_dtype(code, call.location) if code else u8
    dtype = dtype if zero is None else zero.dtype
    if dtype is bool_:
        raise call.error("quantising to bool is not supported")
    precision = call.attribute("precision", 0)
    wide = element_dtype(precision, call.location) if precision else scale.dtype
    scale = per_axis(call, scale, x, axis, block)
    zero = None if zero is None else per_axis(call, zero, x, axis, block)
    return quantized(call, call.cast(x, wide), call.cast(scale, wide), zero, dtype)


def quantized(call: Call, x: Node, scale: Node, zero: Node | None, dtype: DType) -> Node:
    """round(x / scale) + zero, saturated to the dtype; small floats round as they are stored."""
    codes = call.binary("div", x, scale)
    if dtype.is_integer:
        codes = call.unary("round", codes)
    if zero is not None and not is_zero(zero):
        codes = call.binary("add", codes, call.cast(zero, codes.dtype))
    if dtype.is_float:
        return cast_node(call, codes, dtype)
    low, high = (call.scalar(limit, codes.dtype) for limit in integer_range(dtype))
    return call.cast(call.clamp(codes, low, high), dtype)


@converter("DynamicQuantizeLinear", inputs=1)
def dynamic_quantize_linear(call: Call) -> Result:
    return dynamically_quantized(call, call.input(0))


def dynamically_quantized(call: Call, x: Node) -> tuple[Node, Node, Node]:
    """u8 codes of a whole tensor, with 0 exactly representable; codes, scale, zero point."""
    zero, limit = call.scalar(0, x.dtype), call.scalar(255, x.dtype)
    low = call.binary("min", call.reduce("reduce_min", x, range(x.rank), keep=False), zero)
    high = call.binary("max", call.reduce("reduce_max", x, range(x.rank), keep=False), zero)
    width = call.binary("sub", high, low)
    flat = call.binary("equal", width, zero)
    scale = call.where(flat, call.scalar(1, x.dtype), call.binary("div", width, limit))
    origin = call.unary("neg", call.binary("div", low, scale))
    point = call.cast(call.unary("round", call.clamp(origin, zero, limit)), u8)
    return quantized(call, x, scale, point, u8), scale, point


@converter("MatMulInteger", inputs=(2, 4))
def matmul_integer(call: Call) -> Result:
    return integer_product(call, call.input(0), call.input(1), call.optional(2), call.optional(3))


def integer_product(
    call: Call, a: Node, b: Node, a_zero: Node | None, b_zero: Node | None
) -> Node:
    """i32 product of centred 8-bit codes, exact; a zero point for all, for each row of a, or for
    each column of b."""
    if a_zero is not None and a_zero.rank == 1 and a_zero.shape[0] != 1:
        a_zero = call.unsqueeze(a_zero, [1])
    a_zero, b_zero = (
        call.reshape(zero, ()) if zero is not None and zero.shape == (1,) else zero
        for zero in (a_zero, b_zero)
    )
    return call.matmul(centred_codes(call, a, a_zero), centred_codes(call, b, b_zero), i32)


def centred_codes(call: Call, codes: Node, zero: Node | None) -> Node:
    """codes - zero in i16, which holds every difference; codes as they are where zero is 0."""
    if zero is None or is_zero(zero):
        return codes
    return call.binary("sub", call.cast(codes, i16), call.cast(zero, i16))


INT8_ACCURACY = 4  # of accuracy_level


@converter("MatMulNBits", inputs=(3, 6), domain=MICROSOFT)
def matmul_n_bits(call: Call) -> Result:
    """a @ w^T for w of N rows in blocks along K: (codes - zero) * scale. accuracy_level 4 allows a
    to be rounded to int8, block by block."""
    call.refuse("weight_prepacked", 0)
    a, codes, scales = call.input(0), call.input(1), call.input(2)
    rows, columns = int(call.required("N")), int(call.required("K"))
    bits, block = int(call.attribute("bits", 4)), int(call.required("block_size"))
    if bits not in (2, 4, 8) or block < 16 or rows < 1 or columns < 1:
        raise call.error(f"bits={bits}, block_size={block}, N={rows}, K={columns} is not supported")
    blocks = -(-columns // block)
    codes = call.reshape(unpacked(call, codes, bits), (rows, blocks * block))
    codes = call.slice_axis(codes, 1, 0, columns)
    scales = call.reshape(scales, (rows, blocks))
    if call.has(3):
        zeros = nbits_zero_points(call, call.input(3), (rows, blocks), bits)
        operands = [call.cast(codes, UNSIGNED[bits]), scales, zeros]
    else:
        operands = [signed(call, codes, bits), scales]
    group = block
    if call.has(4):  # the group of each column: one scale per column
        index = call.slice_axis(call.input(4), 0, 0, columns)
        operands[1:] = [call.take(each, index, 1) for each in operands[1:]]
        group = 1
    weight = call.make("dequantize", *operands, group=group, dtype=a.dtype)
    coded = call.attribute("accuracy_level", 0) == INT8_ACCURACY and group == block
    product = call.make("matmul", a, call.swap_last(weight), dtype=a.dtype,
                        activation_block=min(block, LARGEST_BLOCK) if coded else 0)
    bias = call.optional(5)
    return product if bias is None else call.binary("add", product, bias)


def signed(call: Call, codes: Node, bits: int) -> Node:
    """Codes without zero points: the middle of their range becomes 0."""
    middle = call.scalar(1 << (bits - 1), i32)
    return call.cast(call.binary("sub", call.cast(codes, middle.dtype), middle), SIGNED[bits])


def nbits_zero_points(call: Call, zeros: Node, shape: tuple[int, int], bits: int) -> Node:
    """Zero points of all blocks: packed or as floats."""
    rows, blocks = shape
    if zeros.dtype is not u8:
        return call.reshape(zeros, shape)
    packed = call.reshape(zeros, (rows, (blocks * bits + 7) // 8))
    return call.slice_axis(unpacked(call, packed, bits), 1, 0, blocks)


def unpacked(call: Call, packed: Node, bits: int) -> Node:
    """u8[..., n] holding 8 / bits codes each, first in the low bits -> u8[..., n * 8 / bits]."""
    if packed.dtype is not u8:
        raise call.error(f"packed codes are {packed.dtype}, not u8")
    if bits == 8:
        return packed
    parts = []
    for shift in range(0, 8, bits):
        part = (
            packed if shift == 0 else call.binary("floor_div", packed, call.scalar(1 << shift, u8))
        )
        last = shift + bits == 8
        parts.append(part if last else call.binary("mod", part, call.scalar(1 << bits, u8)))
    stacked = call.concat([call.unsqueeze(part, [packed.rank]) for part in parts], packed.rank)
    width: Dim = packed.shape[-1] * len(parts)
    return call.reshape(stacked, [*packed.shape[:-1], width])


@converter("QLinearMatMul", inputs=8)
def quantized_matmul(call: Call) -> Result:
    """Dequantises both sides, multiplies in f32 and quantises the product."""
    a, b = (dequantized_operand(call, first, row=first == 0) for first in (0, 3))
    scale, zero = call.reshape(call.input(6), ()), call.reshape(call.input(7), ())
    return quantized(call, call.matmul(a, b), call.cast(scale, f32), zero, zero.dtype)


def dequantized_operand(call: Call, first: int, row: bool) -> Node:
    """Codes, scale and zero point from input `first` on; per row or per column if vectors."""
    codes = call.input(first)
    axis = codes.rank - 2 if row else codes.rank - 1
    scale = per_axis(call, call.input(first + 1), codes, axis, 0)
    zero = per_axis(call, call.input(first + 2), codes, axis, 0)
    return call.binary("mul", centred(call, codes, zero, f32), call.cast(scale, f32))
