"""Kernels that measure what this CPU can do at best: reading memory, and multiplying in registers.

Benchmarks put their figures next to these. Exported functions:

    f32 llmc_read(pointer, bytes)        reads bytes (a multiple of 1024) once, in order
    f32 llmc_peak_f32(pointer, turns)    turns * f32_flops flops of FMA; reads 128 bytes
    f32 llmc_peak_bf16(pointer, turns)   likewise with bf16 dot products, where they exist
    f32 llmc_peak_int8(pointer, turns)   likewise with products of bytes, where they exist
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.byte_dot import ByteDot
from llmc.codegen.host.microkernel import dot_product
from llmc.codegen.llvm import F32, I32, I64, POINTER, Emitter, define, emit_object, splat_constant
from llmc.codegen.llvm import vector as vector_type
from llmc.codegen.target import Target

READ_BYTES = 1024  # per turn of the read loop
CHAINS = 12  # independent accumulators: 2 pipes x 4 cycles of latency need 8
UNROLL = 8


@dataclass(frozen=True)
class CeilingCode:
    """object: the functions above. *_flops: floating-point operations per turn, 0 where absent."""

    object: bytes
    f32_flops: int
    bf16_flops: int
    int8_flops: int

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of the functions that are there."""
        return ("llmc_read", "llmc_peak_f32", *(name for name, flops in (
            ("llmc_peak_bf16", self.bf16_flops), ("llmc_peak_int8", self.int8_flops)) if flops))


def generate_ceilings(target: Target) -> CeilingCode:
    """Code for the ceilings of one core of a host target."""
    capabilities = target.capabilities()
    lanes = capabilities.vector_lanes
    module = ir.Module("ceilings")
    module.triple = target.triple
    _emit_read(module, lanes)
    _emit_peak(module, "llmc_peak_f32", lanes, lambda e, x, y, sum_: e.fma(x, y, sum_))
    if capabilities.bf16_dot:
        _emit_peak(module, "llmc_peak_bf16", lanes, _dot)
    if capabilities.byte_dot:
        dot = ByteDot(capabilities.byte_dot, lanes, 8)
        _emit_peak(module, "llmc_peak_int8", lanes, lambda e, x, y, sum_: dot.add(
            e, [[sum_]], [[_hidden(e, x) if dot.name == "maddubs" else x]], lambda *_: y)[0][0],
            I32)
    code, _ = emit_object(str(module), target.machine())
    flops = CHAINS * UNROLL * lanes * 2
    return CeilingCode(code, flops, 2 * flops if capabilities.bf16_dot else 0,
                       4 * flops if capabilities.byte_dot else 0)


def _dot(e: Emitter, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
    return dot_product(e, total, x, y)


def _hidden(e: Emitter, value: ir.Value) -> ir.Value:
    """The value as one that LLVM knows nothing of: products of pairs would leave the loop."""
    return e.b.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], True)


def _emit_read(module: ir.Module, lanes: int) -> None:
    function, e = define(module, "llmc_read", F32, [POINTER, I64], internal=False)
    pointer, count = function.args
    type_ = vector_type(I32, lanes)
    with e.fold(0, count, [splat_constant(type_, 0)] * 8, READ_BYTES) as (at, sums, finish):
        sums = list(sums)
        for number, offset in enumerate(range(0, READ_BYTES, lanes * 4)):
            loaded = e.load(e.offset(e.offset(pointer, at), offset), type_)
            sums[number % 8] = e.b.xor(sums[number % 8], loaded)
        finish(sums)
    total = finish.results[0]
    for other in finish.results[1:]:
        total = e.b.xor(total, other)
    e.b.ret(e.reduce_add(e.b.bitcast(total, vector_type(F32, lanes))))


def _emit_peak(module: ir.Module, name: str, lanes: int, multiply_add,
               element: ir.Type = F32) -> None:
    function, e = define(module, name, F32, [POINTER, I64], internal=False)
    pointer, turns = function.args
    type_ = vector_type(element, lanes)
    x = e.load(pointer, type_)
    y = e.load(e.offset(pointer, 64), type_)
    zero = splat_constant(type_, 0.0 if element is F32 else 0)
    with e.fold(0, turns, [zero] * CHAINS) as (_, sums, finish):
        sums = list(sums)
        for _ in range(UNROLL):
            sums = [multiply_add(e, x, y, each) for each in sums]
        finish(sums)
    total = finish.results[0]
    for other in finish.results[1:]:
        total = e.b.fadd(total, other) if element is F32 else e.b.add(total, other)
    e.b.ret(e.reduce_add(e.b.bitcast(total, vector_type(F32, lanes))))
