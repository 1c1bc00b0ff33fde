"""Code that takes second moments and their factors, for `llmc.quantizer`.

    void llmc_add_squares(columns, panels, squares, tokens, k, begin, end)
    void llmc_factor(matrix, diagonal, scaled, lowest, k)

LANES columns of a matrix are a panel, of rows [LANES].

llmc_add_squares adds x x' of `tokens` x to squares f32 [panels, k, LANES], as far as it lies on or
above the diagonal, for panels `begin` to `end`: columns are f32 [k, tokens], panels the same values
as [panels, tokens, LANES].

llmc_factor takes a symmetric matrix f32 [k, k], k a multiple of LANES, apart: it is L D L' with D
diagonal and L - 1 strictly lower triangular, which is left below the matrix's diagonal. No element
of D is taken to be less than `lowest`, f32. diagonal [k] and scaled [k, LANES] are room to work in.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from llmc.codegen.llvm import (
    F32,
    I64,
    POINTER,
    VOID,
    Emitter,
    define,
    emit_object,
    i32,
    i64,
    splat_constant,
)
from llmc.codegen.llvm import vector as vector_type
from llmc.codegen.target import Target

SQUARES = "llmc_add_squares"
FACTOR = "llmc_factor"
LANES = 16
TILE = 4  # rows of a matrix that are multiplied at once: with LANES, sums that fit in registers
WIDE = vector_type(F32, LANES)


def generate_second_moments(target: Target) -> bytes:
    """Object code of both functions."""
    module = ir.Module("second_moments")
    module.triple = target.triple
    _define_squares(module)
    _define_factor(module)
    return emit_object(str(module), target.machine())[0]


def _define_squares(module: ir.Module) -> None:
    function, e = define(module, SQUARES, VOID, [POINTER] * 3 + [I64] * 4, internal=False)
    columns, panels, squares, tokens, k, begin, end = function.args
    with e.loop(begin, end, name="panel") as panel:
        own = e.offset(panels, e.b.mul(panel, tokens), WIDE)
        sums = e.offset(squares, e.b.mul(panel, k), WIDE)
        above = e.minimum(e.b.mul(e.b.add(panel, i64(1)), i64(LANES)), k)

        def add(row: ir.Value, product: ir.Value) -> None:
            at = e.offset(sums, row, WIDE)
            e.store(e.b.fadd(e.load(at, WIDE), product), at)

        multiply(e, columns, tokens, own, (tokens, above), add)
    e.b.ret_void()


def _define_factor(module: ir.Module) -> None:
    function, e = define(module, FACTOR, VOID, [POINTER] * 3 + [F32, I64], internal=False)
    matrix, diagonal, scaled, lowest, k = function.args

    def place(row: ir.Value, column: ir.Value) -> ir.Value:
        return e.offset(matrix, e.b.add(e.b.mul(row, k), column), F32)

    with e.loop(0, k, LANES, name="panel") as first:
        lanes = [e.b.add(first, i64(lane)) for lane in range(LANES)]
        with e.loop(0, first, name="before") as i:
            row = ir.Constant(WIDE, ir.Undefined)
            for lane, each in enumerate(lanes):
                row = e.b.insert_element(row, e.load(place(each, i), F32), i32(lane))
            size = e.splat(e.load(e.offset(diagonal, i, F32), F32), LANES)
            e.store(e.b.fmul(row, size), e.offset(scaled, i, WIDE))

        def subtract(row: ir.Value, product: ir.Value, first: ir.Value = first) -> None:
            at = place(e.b.add(first, row), first)
            e.store(e.b.fsub(e.load(at, WIDE), product), at)

        multiply(e, place(first, i64(0)), k, scaled, (first, e.b.sub(k, first)), subtract)
        rows: list[ir.Value] = []
        inverses: list[ir.Value] = []
        for lane, each in enumerate(lanes):
            row, factors = _eliminated(e, e.load(place(each, first), WIDE), rows, inverses)
            size = e.b.extract_element(row, i32(lane))
            size = e.b.select(e.b.fcmp_ordered(">", size, lowest), size, lowest)
            e.store(size, e.offset(diagonal, each, F32))
            e.store(factors, place(each, first))
            rows.append(row)
            inverses.append(e.b.fdiv(ir.Constant(F32, 1.0), size))
        with e.loop(e.b.add(first, i64(LANES)), k, name="below") as below:
            at = place(below, first)
            e.store(_eliminated(e, e.load(at, WIDE), rows, inverses)[1], at)
    e.b.ret_void()


def _eliminated(e: Emitter, row: ir.Value, above: list[ir.Value], inverses: list[ir.Value]
                ) -> tuple[ir.Value, ir.Value]:
    """A row less multiples of those above, so that it begins with as many zeros; and the multiples.
    inverses: of what the others begin with."""
    factors = splat(0.0)
    for lane, (other, inverse) in enumerate(zip(above, inverses, strict=True)):
        factor = e.b.fmul(e.b.extract_element(row, i32(lane)), inverse)
        factors = e.b.insert_element(factors, factor, i32(lane))
        row = e.b.fsub(row, e.b.fmul(e.splat(factor, LANES), other))
    return row, factors


def multiply(e: Emitter, rows: ir.Value, stride: ir.Value, panel: ir.Value,
              sizes: tuple[ir.Value, ir.Value], use: Callable[[ir.Value, ir.Value], None]) -> None:
    """use(row, sum over i of rows[row, i] * panel[i]) for sizes = how many i, how many rows;
    rows: f32 with so many elements from one to the next."""
    depth, count = sizes
    tiled = e.b.mul(e.b.udiv(count, i64(TILE)), i64(TILE))
    for start, stop, tile in ((i64(0), tiled, TILE), (tiled, count, 1)):
        with e.loop(start, stop, tile, name="tile") as first:
            places = [e.b.add(first, i64(place)) for place in range(tile)]
            bases = [e.offset(rows, e.b.mul(place, stride), F32) for place in places]
            with e.fold(0, depth, [splat(0.0)] * tile, name="deep") as (i, sums, finish):
                x = e.load(e.offset(panel, i, WIDE), WIDE)
                factors = [e.splat(e.load(e.offset(base, i, F32), F32), LANES) for base in bases]
                finish([e.multiply_add(factor, x, total)
                        for factor, total in zip(factors, sums, strict=True)])
            for place, total in zip(places, finish.results, strict=True):
                use(place, total)


def splat(value: float) -> ir.Constant:
    """A constant in all lanes."""
    return splat_constant(WIDE, float(value))
