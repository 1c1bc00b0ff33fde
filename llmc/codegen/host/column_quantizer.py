"""Code for `llmc.quantizer` that chooses the codes that lose least of products: the definition of
`ir.product_rounding`, compiled.

    void llmc_round_products(wanted, errors, codes, scales, zeros, feedback, moments, factors,
                             count, k, size, sweeps, begin, end)

Rows of a matrix do not know of each other: LANES of them are a panel, [k, LANES], and panels
`begin` to `end` are done without a word to other threads, PANELS at a time, which are multiplied by
the same rows of `feedback` and `moments`, [k, k], while these are in the cache. wanted f32, errors
f32 (zeros at first) and codes are [panels, k, LANES], scales and zeros [panels, groups, LANES];
`size` is that of a group, `factors` are `count` f32 sizes of steps to try.

Every lane does what `ir.product_rounding` does, in its order of sums; products by feedback and
moments are fused multiply-adds where the CPU has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.second_moments import LANES, WIDE, multiply, splat
from llmc.codegen.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    VOID,
    Emitter,
    define,
    emit_object,
    i64,
)
from llmc.codegen.llvm import vector as vector_type
from llmc.codegen.target import Target
from llmc.ir.dtypes import DType
from llmc.ir.rounding import CodeRange

ROUND = "llmc_round_products"
PANELS = 4
LARGEST = 128  # columns of a group
INFINITY = float("inf")


def generate_column_quantizer(target: Target, codes: DType) -> bytes:
    """Object code of llmc_round_products; codes: their dtype."""
    module = ir.Module("column_quantizer")
    module.triple = target.triple
    function, e = define(module, ROUND, VOID, [POINTER] * 8 + [I64] * 6, internal=False)
    *arrays, feedback, moments, factors, count, k, size, sweeps, begin, end = function.args
    groups = e.ceildiv(k, size)
    stack = [e.stack(WIDE, LARGEST) for _ in range(3)]

    def each_group(first: ir.Value, last: ir.Value, emit: Callable[[_Lanes], None]) -> None:
        with e.loop(0, groups, name="group") as group, e.loop(first, last, name="panel") as panel:
            emit(_Lanes.at(e, CodeRange.of(codes), arrays, (k, size, groups), (panel, group),
                           stack))

    with e.loop(begin, end, PANELS, name="panels") as first:
        last = e.minimum(e.b.add(first, i64(PANELS)), end)
        each_group(first, last, lambda lanes: lanes.round(feedback, factors, count))
        with e.loop(0, sweeps, name="sweep"):
            each_group(first, last, lambda lanes: lanes.refine(moments))
    e.b.ret_void()
    return emit_object(str(module), target.machine())[0]


@dataclass(frozen=True)
class _Lanes:
    """Emits what is done with a group of a panel.

    Of the group: wanted, errors and codes [columns, LANES], scales and zeros [LANES]; columns: how
    many; start: the first. panel: all errors of the panel, [k, LANES]. moving: [columns, LANES],
    targets or the gradient, on the stack while they change; steps: c - z of the codes; curved:
    their products by moments.
    """

    e: Emitter
    range: CodeRange
    wanted: ir.Value
    errors: ir.Value
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value
    panel: ir.Value
    k: ir.Value
    start: ir.Value
    columns: ir.Value
    moving: ir.Value
    steps: ir.Value
    curved: ir.Value

    @classmethod
    def at(cls, e: Emitter, own: CodeRange, arrays: list[ir.Value],
           sizes: tuple[ir.Value, ir.Value, ir.Value], place: tuple[ir.Value, ir.Value],
           stack: list[ir.Value]) -> _Lanes:
        """sizes: k, of a group, number of groups; place: panel, group."""
        k, size, groups = sizes
        panel, group = place
        start = e.b.mul(group, size)
        first = e.b.mul(panel, k)
        here = e.b.add(first, start)
        scale = e.b.add(e.b.mul(panel, groups), group)
        wanted, errors, codes, scales, zeros = arrays
        return cls(e, own, e.offset(wanted, here, WIDE), e.offset(errors, here, WIDE),
                   e.offset(codes, here, vector_type(I8, LANES)),
                   e.offset(scales, scale, vector_type(I16, LANES)),
                   e.offset(zeros, scale, vector_type(I8, LANES)), e.offset(errors, first, WIDE),
                   k, start, e.minimum(size, e.b.sub(k, start)), *stack)

    # ---- the two steps -------------------------------------------------------------------------

    def round(self, feedback: ir.Value, factors: ir.Value, count: ir.Value) -> None:
        """`product_rounding.round_group`."""
        e = self.e
        self._multiply_by(feedback, self.start, lambda row, total: e.b.fadd(
            e.load(self.at_row(self.wanted, row), WIDE), total))
        inverse, low, high = self._ends()
        stored = e.f32_to_bf16(self._best_scale((inverse, low, high), factors, count))
        e.store(stored, self.scales)
        if self.range.zeros:
            e.store(e.b.fptoui(e.b.fneg(low), vector_type(I8, LANES)), self.zeros)
        scale = e.bf16_to_f32(stored)
        inverse = self._inverse(scale)
        with e.loop(0, self.columns, name="column") as column:
            d = self._rounded(e.load(self.at_row(self.moving, column), WIDE), inverse, low, high)
            self._store_code(d, low, column)
            wanted = e.load(self.at_row(self.wanted, column), WIDE)
            error = e.b.fsub(wanted, e.b.fmul(d, scale))
            e.store(error, self.at_row(self.errors, column))
            self._add_to_rest(feedback, column, error, e.b.fadd)

    def refine(self, moments: ir.Value) -> None:
        """`product_rounding.refine_group`."""
        e = self.e
        self._multiply_by(moments, self.k, lambda row, total: total)
        low, high = self._load_steps()
        before = e.bf16_to_f32(e.load(self.scales, vector_type(I16, LANES)))
        scale = self._better_scale(before, moments)
        e.store(e.f32_to_bf16(scale), self.scales)
        inverse = self._inverse(scale)
        with e.loop(0, self.columns, name="column") as column:
            old = e.load(self.at_row(self.steps, column), WIDE)
            gradient = e.load(self.at_row(self.moving, column), WIDE)
            share = e.b.fdiv(gradient, self._factor(moments, column, column))
            d = self._rounded(e.b.fadd(e.b.fmul(old, scale), share), inverse, low, high)
            self._add_to_rest(moments, column, e.b.fmul(e.b.fsub(d, old), scale), e.b.fsub)
            self._store_code(d, low, column)
            wanted = e.load(self.at_row(self.wanted, column), WIDE)
            e.store(e.b.fsub(wanted, e.b.fmul(d, scale)), self.at_row(self.errors, column))

    # ---- their parts ---------------------------------------------------------------------------

    def _multiply_by(self, matrix: ir.Value, depth: ir.Value,
                     value: Callable[[ir.Value, ir.Value], ir.Value]) -> None:
        """Fill `moving` with value(row, the group's row of the matrix times the first `depth`
        errors)."""
        rows = self.e.offset(matrix, self.e.b.mul(self.start, self.k), F32)
        multiply(self.e, rows, self.k, self.panel, (depth, self.columns),
                  lambda row, total: self.e.store(value(row, total),
                                                  self.at_row(self.moving, row)))

    def _ends(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """`rounding.ranges` of the targets."""
        e, own = self.e, self.range
        first = e.load(self.at_row(self.moving, i64(0)), WIDE)
        with e.fold(1, self.columns, [first, first], name="row") as (row, (low, high), finish):
            x = e.load(self.at_row(self.moving, row), WIDE)
            finish([self._minimum(x, low), self._maximum(x, high)])
        low, high = finish.results
        if own.zeros:
            low, high = self._minimum(low, splat(0.0)), self._maximum(high, splat(0.0))
            inverse = self._inverse(e.b.fdiv(e.b.fsub(high, low), splat(own.steps)))
            zero = self._rint(e.b.fmul(e.b.fneg(low), inverse))
            return inverse, e.b.fneg(zero), e.b.fsub(splat(own.steps), zero)
        below = e.b.fcmp_ordered(">", e.b.fneg(low), high)
        inverse = self._inverse(e.b.fdiv(e.b.select(below, low, high), splat(own.low)))
        return inverse, splat(own.low), splat(own.low + own.steps)

    def _best_scale(self, ends: tuple[ir.Value, ir.Value, ir.Value], factors: ir.Value,
                    count: ir.Value) -> ir.Value:
        """The scale that loses least, of `count` sizes of steps."""
        e = self.e
        inverse, low, high = ends
        initial = [splat(-1.0), splat(0.0)]
        with e.fold(0, count, initial, name="factor") as (index, best, finish):
            factor = e.splat(e.load(e.offset(factors, index, F32), F32), LANES)
            steps = e.b.fmul(inverse, factor)

            def rounded(row: ir.Value) -> tuple[ir.Value, ir.Value]:
                x = e.load(self.at_row(self.moving, row), WIDE)
                return x, self._rounded(x, steps, low, high)

            products, squares = self._sums(rounded)
            empty = e.b.fcmp_ordered("==", squares, splat(0.0))
            fitted = e.b.fdiv(products, e.b.select(empty, splat(1.0), squares))
            gain = e.b.fmul(products, fitted)
            better = e.b.fcmp_ordered(">", gain, best[0])
            finish([e.b.select(better, gain, best[0]), e.b.select(better, fitted, best[1])])
        return finish.results[1]

    def _sums(self, pair: Callable[[ir.Value], tuple[ir.Value, ir.Value]]
              ) -> tuple[ir.Value, ir.Value]:
        """Of pairs (x, d), one of each row: the sums of x d and of d d."""
        e = self.e
        with e.fold(0, self.columns, [splat(0.0)] * 2, name="row") as (row, sums, finish):
            x, d = pair(row)
            finish([e.b.fadd(sums[0], e.b.fmul(x, d)), e.b.fadd(sums[1], e.b.fmul(d, d))])
        return finish.results[0], finish.results[1]

    def _load_steps(self) -> tuple[ir.Value, ir.Value]:
        """Fill `steps` from the codes; their lowest and highest."""
        e, own = self.e, self.range
        low = splat(own.low)
        if own.zeros:
            zero = e.load(self.zeros, vector_type(I8, LANES))
            low = e.b.fneg(e.b.uitofp(zero, WIDE))
        widened = e.b.uitofp if own.zeros else e.b.sitofp
        with e.loop(0, self.columns, name="row") as row:
            code = e.load(self._code(row), vector_type(I8, LANES))
            wide = widened(code, WIDE)
            d = e.b.fadd(wide, low) if own.zeros else wide
            e.store(d, self.at_row(self.steps, row))
        return low, e.b.fadd(low, splat(own.steps))

    def _better_scale(self, scale: ir.Value, moments: ir.Value) -> ir.Value:
        """`product_rounding._better_scale`; the gradient is that of the new scale."""
        e = self.e
        with e.fold(0, self.columns, [splat(0.0)] * 2, name="row") as (row, sums, finish):
            with e.fold(0, self.columns, [splat(0.0)], name="column") as (column, (total,), add):
                d = e.load(self.at_row(self.steps, column), WIDE)
                add([e.b.fadd(total, e.b.fmul(self._factor(moments, row, column), d))])
            e.store(add.results[0], self.at_row(self.curved, row))
            d = e.load(self.at_row(self.steps, row), WIDE)
            gradient = e.load(self.at_row(self.moving, row), WIDE)
            finish([e.b.fadd(sums[0], e.b.fmul(gradient, d)),
                    e.b.fadd(sums[1], e.b.fmul(add.results[0], d))])
        products, squares = finish.results
        divisor = e.b.select(e.b.fcmp_ordered(">", squares, splat(0.0)), squares, splat(1.0))
        fitted = e.b.fadd(scale, e.b.fdiv(products, divisor))
        step = e.b.fsub(e.bf16_to_f32(e.f32_to_bf16(fitted)), scale)
        gain = e.b.fmul(step, e.b.fsub(e.b.fmul(step, squares), e.b.fmul(splat(2.0), products)))
        step = e.b.select(e.b.fcmp_ordered("<", gain, splat(0.0)), step, splat(0.0))
        with e.loop(0, self.columns, name="row") as row:
            at = self.at_row(self.moving, row)
            moved = e.b.fmul(step, e.load(self.at_row(self.curved, row), WIDE))
            e.store(e.b.fsub(e.load(at, WIDE), moved), at)
        return e.b.fadd(scale, step)

    def _add_to_rest(self, matrix: ir.Value, column: ir.Value, value: ir.Value,
                     combine: Callable[[ir.Value, ir.Value], ir.Value]) -> None:
        """Rows behind `column` and `value` times their share of the matrix's row `column`."""
        e = self.e
        with e.loop(e.b.add(column, i64(1)), self.columns, name="rest") as rest:
            at = self.at_row(self.moving, rest)
            share = e.b.fmul(self._factor(matrix, rest, column), value)
            e.store(combine(e.load(at, WIDE), share), at)

    def _factor(self, matrix: ir.Value, row: ir.Value, column: ir.Value) -> ir.Value:
        """An element of the group's own part of a matrix [k, k], in all lanes."""
        b = self.e.b
        index = b.add(b.mul(b.add(row, self.start), self.k), b.add(column, self.start))
        return self.e.splat(self.e.load(self.e.offset(matrix, index, F32), F32), LANES)

    def _rounded(self, x: ir.Value, inverse: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        steps = self._rint(self.e.b.fmul(x, inverse))
        return self._minimum(self._maximum(steps, low), high)

    def _store_code(self, d: ir.Value, low: ir.Value, row: ir.Value) -> None:
        e = self.e
        shifted = e.b.fsub(d, low) if self.range.zeros else d
        code = e.b.trunc(e.b.fptosi(shifted, vector_type(I32, LANES)), vector_type(I8, LANES))
        e.store(code, self._code(row))

    def _code(self, row: ir.Value) -> ir.Value:
        return self.e.offset(self.codes, row, vector_type(I8, LANES))

    def at_row(self, array: ir.Value, row: ir.Value) -> ir.Value:
        """Where a row of an array f32 [columns, LANES] is."""
        return self.e.offset(array, row, WIDE)

    def _inverse(self, value: ir.Value) -> ir.Value:
        """`rounding.inverse_of`."""
        e = self.e
        inverse = e.b.fdiv(splat(1.0), value)
        size = e.call(f"llvm.fabs.v{LANES}f32", WIDE, inverse)
        finite = e.b.fcmp_ordered("<", size, splat(INFINITY))
        return e.b.select(finite, inverse, splat(0.0))

    def _minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.e.b.select(self.e.b.fcmp_ordered("<", a, b), a, b)

    def _maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.e.b.select(self.e.b.fcmp_ordered(">", a, b), a, b)

    def _rint(self, value: ir.Value) -> ir.Value:
        return self.e.call(f"llvm.roundeven.v{LANES}f32", WIDE, value)
