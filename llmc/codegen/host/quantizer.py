"""Code that quantises matrices, for `llmc.quantizer`: the search of `ir.rounding`, compiled.

    void llmc_quantize(source, codes, scales, zeros, sums, factors, count, begin, end)

Groups `begin` to `end` of contiguous elements at `source` become bytes of codes, bf16 scales and
bytes of zeros (untouched where codes have none). `factors` are `count` f32 sizes of steps to try.
The squares of what is lost, and of the elements, are added to the two f64 at `sums`.

A group stays in registers for all candidates: a candidate costs six vector instructions per vector
and two horizontal sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.llvm import (
    F32,
    F64,
    I8,
    I32,
    I64,
    POINTER,
    VOID,
    Emitter,
    define,
    emit_object,
    f32,
    i64,
    like,
    splat_constant,
)
from llmc.codegen.llvm import vector as vector_type
from llmc.codegen.target import Target
from llmc.ir.dtypes import DType
from llmc.ir.rounding import CodeRange

EXPORT = "llmc_quantize"
LANES = 8  # of a vector; groups are multiples
INFINITY = float("inf")


def generate_quantizer(target: Target, source: DType, codes: DType, group: int) -> bytes:
    """Object code of llmc_quantize for matrices of f32 or bf16; group: a multiple of LANES."""
    module = ir.Module("quantizer")
    module.triple = target.triple
    arguments = [POINTER] * 6 + [I64] * 3
    function, e = define(module, EXPORT, VOID, arguments, internal=False)
    at, out_codes, out_scales, out_zeros, sums, factors, count, begin, end = function.args
    emit = _Group(e, source, CodeRange.of(codes), group)
    zero = ir.Constant(F64, 0.0)
    with e.fold(begin, end, [zero, zero], name="group") as (index, totals, finish):
        first = e.b.mul(index, i64(group))
        x = [elements.load(e, at, e.b.add(first, i64(place)), source, LANES)
             for place in range(0, group, LANES)]
        ends = emit.ends(x)
        scale = e.f32_to_bf16(emit.best_scale(x, ends, factors, count))
        e.store(scale, e.offset(out_scales, e.b.mul(index, i64(2))), 2)
        rounded = emit.rounded(x, emit.inverse(e.bf16_to_f32(scale)), ends)
        zeros = emit.zero_bytes(ends)
        if zeros is not None:
            e.store(zeros, e.offset(out_zeros, index))
        emit.store_codes(rounded, zeros, e.offset(out_codes, first))
        lost = emit.squares(emit.missing(x, rounded, e.bf16_to_f32(scale)))
        finish([e.b.fadd(total, e.b.fpext(each, F64))
                for total, each in zip(totals, (lost, emit.squares(x)), strict=True)])
    for place, total in enumerate(finish.results):
        slot = e.offset(sums, place * 8)
        e.store(e.b.fadd(e.load(slot, F64), total), slot)
    e.b.ret_void()
    return emit_object(str(module), target.machine())[0]


@dataclass(frozen=True)
class _Ends:
    """Of a group, f32: steps per unit that make the whole range fit, lowest and highest c - z."""

    inverse: ir.Value
    low: ir.Value
    high: ir.Value


@dataclass(frozen=True)
class _Group:
    """Emits the parts of `ir.rounding.quantize_groups` for one group, in vectors."""

    e: Emitter
    source: DType
    range: CodeRange
    group: int

    def ends(self, x: Sequence[ir.Value]) -> _Ends:
        """The group's range."""
        e, own = self.e, self.range
        low, high = self._reduce(x, self.minimum), self._reduce(x, self.maximum)
        if own.zeros:
            low, high = self.minimum(low, f32(0.0)), self.maximum(high, f32(0.0))
            inverse = self.inverse(e.b.fdiv(e.b.fsub(high, low), f32(own.steps)))
            zero = self.rint(e.b.fmul(e.b.fneg(low), inverse))
            return _Ends(inverse, e.b.fneg(zero), e.b.fsub(f32(own.steps), zero))
        below = e.b.fcmp_ordered(">", e.b.fneg(low), high)
        largest = e.b.select(below, low, high)
        inverse = self.inverse(e.b.fdiv(largest, f32(own.low)))
        return _Ends(inverse, f32(own.low), f32(own.low + own.steps))

    def best_scale(self, x: Sequence[ir.Value], ends: _Ends, factors: ir.Value,
                   count: ir.Value) -> ir.Value:
        """The f32 scale of the candidate that loses least."""
        e = self.e
        with e.fold(0, count, [f32(-1.0), f32(0.0)], name="factor") as (index, best, finish):
            factor = e.load(e.offset(factors, index, F32), F32)
            d = self.rounded(x, e.b.fmul(ends.inverse, factor), ends)
            products = self._dot(x, d)
            squares = self._dot(d, d)
            empty = e.b.fcmp_ordered("==", squares, f32(0.0))
            fitted = e.b.fdiv(products, e.b.select(empty, f32(1.0), squares))
            gain = e.b.fmul(products, fitted)
            better = e.b.fcmp_ordered(">", gain, best[0])
            finish([e.b.select(better, gain, best[0]), e.b.select(better, fitted, best[1])])
        return finish.results[1]

    def rounded(self, x: Sequence[ir.Value], inverse: ir.Value, ends: _Ends) -> list[ir.Value]:
        """The codes less the zero."""
        steps, low, high = (self.e.splat(each, LANES) for each in (inverse, ends.low, ends.high))
        return [self.minimum(self.maximum(self.rint(self.e.b.fmul(each, steps)), low), high)
                for each in x]

    def zero_bytes(self, ends: _Ends) -> ir.Value | None:
        """The zero as a byte; None of codes that have none."""
        return self.e.b.fptoui(self.e.b.fneg(ends.low), I8) if self.range.zeros else None

    def store_codes(self, rounded: Sequence[ir.Value], zero: ir.Value | None,
                    at: ir.Value) -> None:
        """The codes as bytes."""
        e = self.e
        for place, each in enumerate(rounded):
            code = e.b.trunc(e.b.fptosi(each, like(each, I32)), like(each, I8))
            if zero is not None:
                code = e.b.add(code, e.splat(zero, LANES))
            e.store(code, e.offset(at, place * LANES))

    def missing(self, x: Sequence[ir.Value], rounded: Sequence[ir.Value],
                scale: ir.Value) -> list[ir.Value]:
        """What the codes lack."""
        wide = self.e.splat(self.e.b.fneg(scale), LANES)
        return [self.e.multiply_add(d, wide, each) for each, d in zip(x, rounded, strict=True)]

    def squares(self, x: Sequence[ir.Value]) -> ir.Value:
        """The sum of the squares."""
        return self._dot(x, x)

    def inverse(self, value: ir.Value) -> ir.Value:
        """1 / value; 0 where that is not finite."""
        inverse = self.e.b.fdiv(f32(1.0), value)
        size = self.e.call("llvm.fabs.f32", F32, inverse)
        finite = self.e.b.fcmp_ordered("<", size, f32(INFINITY))
        return self.e.b.select(finite, inverse, f32(0.0))

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.e.b.select(self.e.b.fcmp_ordered("<", a, b), a, b)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.e.b.select(self.e.b.fcmp_ordered(">", a, b), a, b)

    def rint(self, value: ir.Value) -> ir.Value:
        """To the nearest integer, halves to even."""
        suffix = f"v{LANES}f32" if isinstance(value.type, ir.VectorType) else "f32"
        return self.e.call(f"llvm.roundeven.{suffix}", value.type, value)

    def _dot(self, a: Sequence[ir.Value], b: Sequence[ir.Value]) -> ir.Value:
        total = splat_constant(vector_type(F32, LANES), 0.0)
        for left, right in zip(a, b, strict=True):
            total = self.e.multiply_add(left, right, total)
        return self.e.reduce_add(total)

    def _reduce(self, x: Sequence[ir.Value], combine) -> ir.Value:
        value = x[0]
        for each in x[1:]:
            value = combine(value, each)
        while value.type.count > 2:
            value = combine(*self.e.halves(value))
        parts = [self.e.b.extract_element(value, ir.Constant(I32, lane)) for lane in range(2)]
        return combine(*parts)
