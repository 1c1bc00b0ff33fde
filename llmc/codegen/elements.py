"""Elements in memory and in registers.

Registers hold f32 for every float up to 32 bits, f64, integers of their own width (at least 8 bits)
and i1 for bool. Memory holds bf16 and the 8-bit floats as their bits, bool as a byte, and 2- and
4-bit types packed, low bits first.
"""

from __future__ import annotations

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
from llmc.errors import CompileError
from llmc.ir.dtypes import DType


def register_type(dtype: DType) -> ir.Type:
    """The LLVM element type of a value in a register."""
    if dtype.is_float:
        return F64 if dtype.bits == 64 else F32
    return I1 if dtype.kind == "bool" else ir.IntType(max(8, dtype.bits))


def memory_type(dtype: DType) -> ir.Type:
    """The LLVM element type in memory (bytes for packed types)."""
    if dtype.is_float and dtype.bits >= 16:
        return {64: F64, 32: F32}.get(dtype.bits) or (F16 if dtype.name == "f16" else I16)
    return ir.IntType(max(8, dtype.bits))


def is_packed(dtype: DType) -> bool:
    """Whether several elements share a byte."""
    return dtype.bits < 8


# ---- loads ---------------------------------------------------------------------------------


def load(e: Emitter, base: ir.Value, offset: ir.Value, dtype: DType, lanes: int = 1,
         mask: ir.Value | None = None, align: int | None = None) -> ir.Value:
    """`lanes` consecutive elements from element `offset` of base on, as registers; align: bytes
    that the address is known to be a multiple of (default: an element's)."""
    if is_packed(dtype):
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
        return _extend_packed(e, value, dtype) if is_packed(dtype) else value
    if dtype.bits >= 32:
        return value
    if dtype.name == "bf16":
        return e.bf16_to_f32(value)
    if dtype.name == "f16":
        return e.b.fpext(value, like(value, F32))
    return _decode_small_float(e, value, dtype)


def _extend_packed(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    unused = splat_constant(value.type, 8 - dtype.bits)
    shift = e.b.ashr if dtype.kind == "int" else e.b.lshr
    return shift(e.b.shl(value, unused), unused)


# name -> (mantissa bits, factor that corrects the exponent's bias, bits of NaN (None: no NaN))
_SMALL_FLOATS = {"f8e4m3fn": (3, 2.0**120, 0x7F), "f8e5m2": (2, 2.0**112, None),
                 "f8e4m3fnuz": (3, 2.0**119, 0x80), "f8e5m2fnuz": (2, 2.0**111, 0x80),
                 "f4e2m1": (1, 2.0**126, None)}


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
    mantissa, factor, nan = _SMALL_FLOATS[dtype.name]
    sign_bit = 1 << (dtype.bits - 1)
    moved = e.b.shl(e.b.and_(bits, number(sign_bit - 1)), number(23 - mantissa))
    scaled = e.b.fmul(e.b.bitcast(moved, like(value, F32)),
                      splat_constant(like(value, F32), factor))
    sign = e.b.shl(e.b.and_(bits, number(sign_bit)), number(32 - dtype.bits))
    result = e.b.or_(e.b.bitcast(scaled, bits.type), sign)
    if nan is not None:
        checked = bits if nan == 0x80 else e.b.and_(bits, number(0x7F))
        result = e.b.select(e.b.icmp_signed("==", checked, number(nan)), number(0x7FC00000),
                            result)
    return e.b.bitcast(result, like(value, F32))


# ---- stores --------------------------------------------------------------------------------


def encode(e: Emitter, value: ir.Value, dtype: DType) -> ir.Value:
    """Register form to memory form; floats round to nearest even. CompileError for types that
    only weights have (8-bit floats, packed integers)."""
    if dtype.kind == "bool":
        return e.b.zext(value, like(value, I8))
    if dtype.name == "bf16":
        return e.f32_to_bf16(value)
    if dtype.name == "f16":
        return e.b.fptrunc(value, like(value, F16))
    if dtype.bits < 8 or (dtype.is_float and dtype.bits == 8):
        raise CompileError(f"host code cannot store {dtype} values yet")
    return value


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
    """
    type_ = like(value, register_type(target))
    if target.kind == "bool":
        zero = splat_constant(value.type, 0 if not source.is_float else 0.0)
        if source.kind == "bool":
            return value
        return (e.b.fcmp_unordered("!=", value, zero) if source.is_float
                else e.b.icmp_signed("!=", value, zero))
    if source.is_float and target.is_float:
        if type_ == value.type:
            return value
        return e.b.fpext(value, type_) if target.bits == 64 else e.b.fptrunc(value, type_)
    if source.is_float:
        return _float_to_integer(e, value, target, type_)
    if target.is_float:
        return (e.b.sitofp if source.kind == "int" else e.b.uitofp)(value, type_)
    return _resize(e, value, source, target, type_)


def _float_to_integer(e: Emitter, value: ir.Value, target: DType, type_: ir.Type) -> ir.Value:
    """Towards zero, saturating (out of range is undefined in NumPy and a trap nowhere)."""
    name = "fptosi" if target.kind == "int" else "fptoui"
    result = e.call(f"llvm.{name}.sat.{_suffix(type_)}.{_suffix(value.type)}", type_, value)
    return result


def _resize(e: Emitter, value: ir.Value, source: DType, target: DType,
            type_: ir.Type) -> ir.Value:
    width = register_type(target).width
    own = register_type(source).width
    if width > own:
        return (e.b.sext if source.kind == "int" else e.b.zext)(value, type_)
    result = e.b.trunc(value, type_) if width < own else value
    return _extend_packed(e, result, target) if is_packed(target) else result


def broadcast(e: Emitter, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar as a vector; a vector of that many lanes as it is."""
    return value if lanes_of(value) == lanes else e.splat(value, lanes)
