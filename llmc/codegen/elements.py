"""Elements in memory and in registers.

Registers hold f32 for every float up to 32 bits, f64, integers of their own width (at least 8 bits)
and i1 for bool. Memory holds bf16 and smaller floats as their bits, bool as a byte. 2- and 4-bit
types have a byte each, as in NumPy, so that threads never share one; only weights are packed, low
bits first.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.llvm import (
    F16,
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    Emitter,
    i32,
    i64,
    lanes_of,
    like,
    splat_constant,
    vector,
)
from llmc.ir.dtypes import DType, f32


def register_type(dtype: DType) -> ir.Type:
    """The LLVM element type of a value in a register."""
    if dtype.is_float:
        return F64 if dtype.bits == 64 else F32
    return I1 if dtype.kind == "bool" else ir.IntType(max(8, dtype.bits))


def memory_type(dtype: DType) -> ir.Type:
    """The LLVM element type in memory."""
    if dtype.is_float and dtype.bits >= 16:
        return {64: F64, 32: F32}.get(dtype.bits) or (F16 if dtype.name == "f16" else I16)
    return ir.IntType(max(8, dtype.bits))


# ---- loads ---------------------------------------------------------------------------------


def load(e: Emitter, base: ir.Value, offset: ir.Value, dtype: DType, lanes: int = 1,
         mask: ir.Value | None = None, align: int | None = None, packed: bool = False) -> ir.Value:
    """`lanes` consecutive elements from element `offset` of base on, as registers; align: bytes
    that the address is known to be a multiple of (default: an element's). packed: 2- and 4-bit
    types share bytes."""
    if packed and dtype.bits < 8:
        return _load_packed(e, base, offset, dtype, lanes, mask)
    element = memory_type(dtype)
    pointer = e.offset(base, offset, element)
    if mask is None:
        return decode(e, e.load(pointer, vector(element, lanes), align), dtype)
    return decode(e, _masked_load(e, pointer, vector(element, lanes), mask), dtype)


def _masked_load(e: Emitter, pointer: ir.Value, type_: ir.Type, mask: ir.Value) -> ir.Value:
    zeros = ir.Constant(type_, None)
    return e.call(f"llvm.masked.load.{_suffix(type_)}.p0", type_, pointer, mask, zeros)


def _load_packed(e: Emitter, base: ir.Value, offset: ir.Value, dtype: DType, lanes: int,
                 mask: ir.Value | None) -> ir.Value:
    per_byte = 8 // dtype.bits
    values = []
    for lane in range(lanes):
        position = e.b.add(offset, i64(lane))
        if mask is not None:
            position = e.b.select(e.b.extract_element(mask, i32(lane)), position, offset)
        byte = e.load(e.offset(base, e.b.udiv(position, i64(per_byte))), I8)
        shift = e.b.mul(e.b.trunc(e.b.urem(position, i64(per_byte)), I8),
                        ir.Constant(I8, dtype.bits))
        values.append(e.b.lshr(byte, shift))
    return decode(e, collect(e, values), dtype)


def collect(e: Emitter, values: list[ir.Value]) -> ir.Value:
    """Scalars as one vector (the scalar itself if there is one)."""
    if len(values) == 1:
        return values[0]
    result = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
    for lane, value in enumerate(values):
        result = e.b.insert_element(result, value, i32(lane))
    return result


def decode(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """Memory form to register form."""
    if dtype.kind == "bool":
        return e.b.icmp_signed("!=", value, splat_constant(value.type, 0))
    if not dtype.is_float:
        return _extend(e, value, dtype) if dtype.bits < 8 else value
    if dtype.bits >= 32:
        return value
    if dtype.name == "bf16":
        return e.bf16_to_f32(value)
    if dtype.name == "f16":
        return e.b.fpext(value, like(value, F32))
    return _decode_small_float(e, value, dtype)


def _extend(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """The low 2 or 4 bits of a byte as an integer of 8 bits."""
    unused = splat_constant(value.type, 8 - dtype.bits)
    shift = e.b.ashr if dtype.kind == "int" else e.b.lshr
    return shift(e.b.shl(value, unused), unused)


@dataclass(frozen=True)
class SmallFloat:
    """A float of 4 or 8 bits: its layout, the bits of the largest finite number and of NaN, and
    what numbers beyond the largest become. `unsigned_zero`: there is no -0, its bits are NaN's."""

    mantissa: int
    bias: int
    largest: int
    nan: int
    beyond: int
    unsigned_zero: bool = False

    @property
    def factor(self) -> float:
        """Corrects the exponent's bias of bits that were moved into place in an f32."""
        return 2.0 ** (127 - self.bias)


SMALL_FLOATS = {
    "f8e4m3fn": SmallFloat(3, 7, 0x7E, 0x7F, 0x7F),
    "f8e5m2": SmallFloat(2, 15, 0x7B, 0x7E, 0x7C),
    "f8e4m3fnuz": SmallFloat(3, 8, 0x7F, 0x80, 0x80, True),
    "f8e5m2fnuz": SmallFloat(2, 16, 0x7F, 0x80, 0x80, True),
    "f4e2m1": SmallFloat(1, 1, 0x7, 0x8, 0x7),  # no NaN: it becomes -0, as in ml_dtypes
}


def _decode_small_float(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """8- and 4-bit floats: exponent and mantissa moved into place, then scaled (denormals too)."""
    bits = e.b.zext(value, like(value, I32))

    def number(x: int) -> ir.Constant:
        return splat_constant(bits.type, x)

    if dtype.name == "f8e8m0":
        tiny = e.b.select(e.b.icmp_signed("==", bits, number(0)), number(0x400000),
                          e.b.shl(bits, number(23)))
        whole = e.b.select(e.b.icmp_signed("==", bits, number(255)), number(0x7FC00000), tiny)
        return e.b.bitcast(whole, like(value, F32))
    if dtype.name == "f8e5m2":  # the upper half of an f16
        half = e.b.bitcast(e.b.shl(e.b.zext(value, like(value, I16)),
                                   splat_constant(like(value, I16), 8)), like(value, F16))
        return e.b.fpext(half, like(value, F32))
    form = SMALL_FLOATS[dtype.name]
    sign_bit = 1 << (dtype.bits - 1)
    moved = e.b.shl(e.b.and_(bits, number(sign_bit - 1)), number(23 - form.mantissa))
    scaled = e.b.fmul(e.b.bitcast(moved, like(value, F32)),
                      splat_constant(like(value, F32), form.factor))
    sign = e.b.shl(e.b.and_(bits, number(sign_bit)), number(32 - dtype.bits))
    result = e.b.or_(e.b.bitcast(scaled, bits.type), sign)
    if dtype.bits == 8:
        checked = bits if form.nan == 0x80 else e.b.and_(bits, number(0x7F))
        result = e.b.select(e.b.icmp_signed("==", checked, number(form.nan)), number(0x7FC00000),
                            result)
    return e.b.bitcast(result, like(value, F32))


# ---- stores --------------------------------------------------------------------------------


def encode(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """Register form to memory form; floats round to nearest even."""
    if dtype.kind == "bool":
        return e.b.zext(value, like(value, I8))
    if dtype.name == "bf16":
        return e.f32_to_bf16(value)
    if dtype.name == "f16":
        return e.b.fptrunc(value, like(value, F16))
    if dtype.is_float and dtype.bits <= 8:
        return _encode_small_float(e, value, dtype)
    if dtype.bits < 8:  # NumPy keeps the upper bits zero
        return e.b.and_(value, splat_constant(value.type, (1 << dtype.bits) - 1))
    return value


def _encode_small_float(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """f32 to 8- and 4-bit floats, rounded once; what is too large becomes infinite, NaN or, where
    there is neither, the largest number."""
    bits = e.b.bitcast(value, like(value, I32))

    def number(x: int) -> ir.Constant:
        return splat_constant(bits.type, x)

    magnitude = e.b.and_(bits, number(0x7FFFFFFF))
    if dtype.name == "f8e8m0":
        return _encode_exponent(e, bits, magnitude)
    form = SMALL_FLOATS[dtype.name]
    code = e.b.select(
        e.b.icmp_unsigned("<", magnitude, number((128 - form.bias) << 23)),
        _denormal_code(e, magnitude, form), _normal_code(e, magnitude, form))
    code = e.b.select(e.b.icmp_unsigned(">", code, number(form.largest)), number(form.beyond), code)
    not_a_number = e.b.icmp_unsigned(">", magnitude, number(0x7F800000))
    code = e.b.select(not_a_number, number(form.nan), code)
    sign = e.b.and_(e.b.lshr(bits, number(32 - dtype.bits)), number(1 << (dtype.bits - 1)))
    if form.unsigned_zero:
        sign = e.b.select(e.b.icmp_signed("==", code, number(0)), number(0), sign)
    return e.b.trunc(e.b.or_(code, sign), like(value, I8))


def _normal_code(e: Emitter, magnitude: ir.Value, form: SmallFloat) -> ir.Value:
    """Exponent rebiased, mantissa rounded to nearest even by a carry into the bits that stay."""
    shift = 23 - form.mantissa
    one = splat_constant(magnitude.type, 1)
    kept = splat_constant(magnitude.type, shift)
    rebiased = e.b.sub(magnitude, splat_constant(magnitude.type, (127 - form.bias) << 23))
    odd = e.b.and_(e.b.lshr(rebiased, kept), one)
    half = splat_constant(magnitude.type, (1 << (shift - 1)) - 1)
    return e.b.lshr(e.b.add(e.b.add(rebiased, half), odd), kept)


def _denormal_code(e: Emitter, magnitude: ir.Value, form: SmallFloat) -> ir.Value:
    """Multiples of the least number: adding a power of 2 whose last bit it is rounds to one."""
    power = splat_constant(like(magnitude, F32), 2.0 ** (24 - form.bias - form.mantissa))
    total = e.b.fadd(e.b.bitcast(magnitude, like(magnitude, F32)), power)
    return e.b.sub(e.b.bitcast(total, magnitude.type), e.b.bitcast(power, magnitude.type))


def _encode_exponent(e: Emitter, bits: ir.Value, magnitude: ir.Value) -> ir.Value:
    """To f8e8m0, powers of 2 only: the nearest, the larger of two; NaN for what has none."""
    def number(x: int) -> ir.Constant:
        return splat_constant(bits.type, x)

    code = e.b.lshr(e.b.add(magnitude, number(0x400000)), number(23))
    tiny = e.b.icmp_unsigned("<=", magnitude, number(0x400000))  # 2^-127, the least
    code = e.b.select(tiny, number(0), code)
    has_none = e.b.or_(e.b.icmp_signed("<=", bits, number(0)),
                       e.b.icmp_unsigned(">", code, number(255)))
    return e.b.trunc(e.b.select(has_none, number(255), code), like(bits, I8))


def store(e: Emitter, value: ir.Value, base: ir.Value, offset: ir.Value, dtype: DType,
          mask: ir.Value | None = None, align: int | None = None) -> None:
    """Store register values to consecutive elements from element `offset` of base on."""
    encoded = encode(e, value, dtype)
    pointer = e.offset(base, offset, memory_type(dtype))
    if mask is None:
        e.store(encoded, pointer, align)
    else:
        e.call(f"llvm.masked.store.{_suffix(encoded.type)}.p0", ir.VoidType(), encoded, pointer,
               mask)


def _suffix(type_: ir.Type) -> str:
    element = type_.element if isinstance(type_, ir.VectorType) else type_
    name = f"i{element.width}" if isinstance(element, ir.IntType) else element.intrinsic_name
    return f"v{type_.count}{name}" if isinstance(type_, ir.VectorType) else name


# ---- conversions ---------------------------------------------------------------------------


def convert(e: Emitter, value: ir.Value, source: DType, target: DType) -> ir.Value:
    """A register value of dtype source as one of dtype target, as NumPy's astype does it.

    Between floats of up to 32 bits nothing happens: the value stays in f32 and rounds when stored.
    Floats of 8 bits and fewer are the exception: they are quantised on purpose.
    """
    type_ = like(value, register_type(target))
    if target.kind == "bool":
        zero = splat_constant(value.type, 0 if not source.is_float else 0.0)
        if source.kind == "bool":
            return value
        return (e.b.fcmp_unordered("!=", value, zero) if source.is_float
                else e.b.icmp_signed("!=", value, zero))
    if target.is_float and target.bits <= 8:
        single = value if source.is_float and source.bits <= 32 else convert(e, value, source, f32)
        return single if source is target else decode(e, encode(e, single, target), target)
    if source.is_float and target.is_float:
        if type_ == value.type:
            return value
        return e.b.fpext(value, type_) if target.bits == 64 else e.b.fptrunc(value, type_)
    if source.is_float:
        return _float_to_integer(e, value, target, type_)
    if target.is_float:
        return (e.b.sitofp if source.kind == "int" else e.b.uitofp)(value, type_)
    return _resize(e, value, source, target, type_)


def reinterpret(e: Emitter, value: ir.Value, source: DType, target: DType) -> ir.Value:
    """The bits of a register value of dtype source as a value of dtype target, of equal width."""
    return decode(e, e.b.bitcast(encode(e, value, source), like(value, memory_type(target))),
                  target)


def _float_to_integer(e: Emitter, value: ir.Value, target: DType, type_: ir.Type) -> ir.Value:
    """Towards zero, saturating (out of range is undefined in NumPy and a trap nowhere)."""
    name = "fptosi" if target.kind == "int" else "fptoui"
    if target.bits < 8:
        type_ = like(value, I32)  # wraps round, as in NumPy
        name = "fptosi"
    elif lanes_of(value) > 1 and (target.bits < 32 or target.name == "i32"):
        return _lanes_to_integers(e, value, target, type_)
    result = e.call(f"llvm.{name}.sat.{_suffix(type_)}.{_suffix(value.type)}", type_, value)
    if target.bits < 8:
        return _extend(e, e.b.trunc(result, like(value, I8)), target)
    return result


def _lanes_to_integers(e: Emitter, value: ir.Value, target: DType, type_: ir.Type) -> ir.Value:
    """The same of vectors and integers of up to 32 bits: LLVM takes saturating conversions of x86
    apart, lane by lane."""
    def number(x: float) -> ir.Constant:
        return splat_constant(value.type, x)

    signed = target.kind == "int"
    low = -(1 << target.bits - 1) if signed else 0
    high = low + (1 << target.bits) - 1
    most = 2147483520 if target.bits == 32 and value.type.element is F32 else high
    known = e.b.select(e.b.fcmp_ordered("ord", value, value), value, number(0.0))
    known = e.b.select(e.b.fcmp_ordered("<", known, number(low)), number(low), known)
    known = e.b.select(e.b.fcmp_ordered(">", known, number(most)), number(most), known)
    result = e.b.fptosi(known, like(value, I32))
    if most < high:  # the largest integer is no f32
        beyond = e.b.fcmp_ordered(">", value, number(most))
        result = e.b.select(beyond, splat_constant(result.type, high), result)
    return result if target.bits == 32 else e.b.trunc(result, type_)


def _resize(e: Emitter, value: ir.Value, source: DType, target: DType,
            type_: ir.Type) -> ir.Value:
    width = register_type(target).width
    own = register_type(source).width
    if width > own:
        return (e.b.sext if source.kind == "int" else e.b.zext)(value, type_)
    result = e.b.trunc(value, type_) if width < own else value
    return _extend(e, result, target) if target.bits < 8 else result


def broadcast(e: Emitter, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar as a vector; a vector of that many lanes as it is."""
    return value if lanes_of(value) == lanes else e.splat(value, lanes)
