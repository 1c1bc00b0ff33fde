"""What attention's tensor core kernels share: products of 16 x 8 tiles, and softmax in registers.

A warp holds `bands` bands of 16 rows. In a tile of 16 x 8 a lane holds four f32: of row lane / 4
the columns 2 * (lane % 4) and the next, then the same columns of row lane / 4 + 8. So the 4 lanes
of a quad hold a row, and weights are already laid out as the left operand of the next product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.llvm import Emitter, f32, i32
from llmc.codegen.nvptx.attention_instructions import (
    WARP,
    add_floats,
    exp2,
    load_matrices,
    maximum,
    multiply_matrices,
    over_lanes,
    pack_pair,
    reciprocal,
    thread_index,
)
from llmc.ir.dtypes import DType

BAND = 16  # rows of a matrix instruction
LOWEST = -1e30  # below every score: a row that has seen nothing yet; finite, so that no NaN arises
_LOG2_E = math.log2(math.e)
_PADDING = 16  # bytes after each row: 8 rows of a matrix lie in different banks


Tile = list[ir.Value]  # four f32, or two or four packed i32


@dataclass(frozen=True)
class Softmax:
    """Scores in units of `factor` powers of 2: a weight is exp2(factor * (score - maximum))."""

    scale: float
    softcap: float

    @property
    def factor(self) -> float:
        return (self.softcap if self.softcap else self.scale) * _LOG2_E

    def scores(self, e: Emitter, products: list[list[Tile]]) -> list[list[Tile]]:
        """Scores of products of queries and keys."""
        if not self.softcap:
            return products
        return [[[self._capped(e, value) for value in tile] for tile in tiles]
                for tiles in products]

    def _capped(self, e: Emitter, product: ir.Value) -> ir.Value:
        """tanh(x) = 1 - 2 / (exp(2 x) + 1): its error, 2^-23, is far below that of the products."""
        power = exp2(e, e.b.fmul(product, f32(2 * _LOG2_E * self.scale / self.softcap)))
        inverse = reciprocal(e, e.b.fadd(power, f32(1.0)))
        return e.fma(inverse, f32(-2.0), f32(1.0))

    def rescale(self, e: Emitter, old: ir.Value, new: ir.Value) -> ir.Value:
        """What multiplies sums made under the maximum old."""
        return exp2(e, e.b.fmul(e.b.fsub(old, new), f32(self.factor)))


def row_bytes(size: int) -> int:
    """Bytes from a row of 16-bit elements to the next in shared memory."""
    return 2 * size + _PADDING


@dataclass(frozen=True)
class Lane:
    """A lane's places; i32 values."""

    number: ir.Value  # in the warp
    row: ir.Value  # of its first row in a band
    column: ir.Value  # of its first column in a tile

    @classmethod
    def of(cls, e: Emitter) -> Lane:
        number = e.b.and_(thread_index(e), i32(WARP - 1))
        return cls(number, e.b.lshr(number, i32(2)), e.b.shl(e.b.and_(number, i32(3)), i32(1)))

    def left_address(self, e: Emitter, base: ir.Value, size: int) -> ir.Value:
        """For load_matrices of a left operand [16 rows, 16] of rows of `size` elements."""
        row, half = e.b.and_(self.number, i32(15)), e.b.lshr(self.number, i32(4))
        return self._address(e, base, size, row, half)

    def key_address(self, e: Emitter, base: ir.Value, size: int) -> ir.Value:
        """For load_matrices of 16 keys x 16 components: two tiles of a right operand."""
        upper = e.b.shl(e.b.lshr(self.number, i32(4)), i32(3))
        row = e.b.add(e.b.and_(self.number, i32(7)), upper)
        return self._address(e, base, size, row, e.b.and_(e.b.lshr(self.number, i32(3)), i32(1)))

    def value_address(self, e: Emitter, base: ir.Value, size: int) -> ir.Value:
        """For load_matrices, transposed, of 16 values x 16 components."""
        return self.left_address(e, base, size)

    @staticmethod
    def _address(e: Emitter, base: ir.Value, size: int, row: ir.Value, half: ir.Value) -> ir.Value:
        offset = e.b.add(e.b.mul(row, i32(row_bytes(size))), e.b.shl(half, i32(4)))
        return e.b.add(base, offset)


def score_tiles(e: Emitter, dtype: DType, queries, keys: ir.Value, bands: int, count: int,
                size: int) -> list[list[Tile]]:
    """Products [band][key / 8] of queries(step, band) and `count` keys at a lane's key_address."""
    products = [[[f32(0.0)] * 4 for _ in range(count // 8)] for _ in range(bands)]
    for step in range(size // BAND):
        left = [queries(step, band) for band in range(bands)]
        for pair in range(count // BAND):
            right = load_matrices(e, keys, pair * BAND * row_bytes(size) + 2 * BAND * step)
            for half in range(2):
                tile = 2 * pair + half
                for band in range(bands):
                    products[band][tile] = multiply_matrices(
                        e, dtype, left[band], right[2 * half:2 * half + 2], products[band][tile])
    return products


def add_values(e: Emitter, dtype: DType, weights: list[list[Tile]], values: ir.Value,
               sums: list[list[Tile]], size: int) -> list[list[Tile]]:
    """sums[band][component / 8] + weights times values at a lane's value_address."""
    count = len(weights[0]) // 2
    sums = [list(band) for band in sums]
    for step in range(count):
        left = [_left_of(e, dtype, band[2 * step], band[2 * step + 1]) for band in weights]
        for pair in range(size // BAND):
            right = load_matrices(e, values, step * BAND * row_bytes(size) + 2 * BAND * pair,
                                  transposed=True)
            for half in range(2):
                tile = 2 * pair + half
                for band, own in enumerate(left):
                    sums[band][tile] = multiply_matrices(
                        e, dtype, own, right[2 * half:2 * half + 2], sums[band][tile])
    return sums


def _left_of(e: Emitter, dtype: DType, first: Tile, second: Tile) -> Tile:
    """Two tiles of weights as one left operand."""
    return [pack_pair(e, dtype, tile[2 * row], tile[2 * row + 1])
            for tile in (first, second) for row in range(2)]


def hide(e: Emitter, tiles: list[Tile], row: int, first: ir.Value | None, last: ir.Value) -> None:
    """Scores of the band's row (0 or 1 of the lane's) become -inf before column first (None: 0)
    and from column last on; both relative to the lane's own first column."""
    for index, tile in enumerate(tiles):
        for i in range(2):
            column = i32(8 * index + i)
            seen = e.b.icmp_signed("<", column, last)
            if first is not None:
                seen = e.b.and_(seen, e.b.icmp_signed(">=", column, first))
            tile[2 * row + i] = e.b.select(seen, tile[2 * row + i], f32(-math.inf))


def merge_if(e: Emitter, condition: ir.Value, tiles: list[list[Tile]], change
             ) -> list[list[Tile]]:
    """Tiles as change(tiles) leaves them where condition holds, else as they are."""
    before, bands = flatten(tiles), len(tiles)
    start = e.b.block
    with e.b.if_then(condition):
        changed = unflatten(before, bands)
        change(changed)
        end = e.b.block
    merged = []
    for old, new in zip(before, flatten(changed), strict=True):
        phi = e.b.phi(old.type)
        phi.add_incoming(old, start)
        phi.add_incoming(new, end)
        merged.append(phi)
    return unflatten(merged, bands)


@dataclass
class RowState:
    """Of each row of a lane, band by band: the maximum so far and the lane's part of the sum."""

    maxima: list[ir.Value]
    totals: list[ir.Value]

    @classmethod
    def start(cls, bands: int) -> RowState:
        return cls([f32(LOWEST)] * (2 * bands), [f32(0.0)] * (2 * bands))

    def flat(self) -> list[ir.Value]:
        return [*self.maxima, *self.totals]

    @classmethod
    def of_flat(cls, values: list[ir.Value]) -> RowState:
        half = len(values) // 2
        return cls(list(values[:half]), list(values[half:]))


def weigh(e: Emitter, softmax: Softmax, scores: list[list[Tile]], state: RowState
          ) -> tuple[RowState, list[ir.Value]]:
    """Scores become weights, in place; (new state, what rescales each row's sums)."""
    new, factors = RowState([], []), []
    for band, tiles in enumerate(scores):
        for row in range(2):
            own = 2 * band + row
            high = state.maxima[own]
            for tile in tiles:
                high = maximum(e, maximum(e, high, tile[2 * row]), tile[2 * row + 1])
            high = over_lanes(e, high, maximum, 4)
            shift = e.b.fmul(high, f32(-softmax.factor))
            factor = softmax.rescale(e, state.maxima[own], high)
            parts = [f32(0.0), f32(0.0)]
            for tile in tiles:
                for i in range(2):
                    exponent = e.fma(tile[2 * row + i], f32(softmax.factor), shift)
                    tile[2 * row + i] = weight = exp2(e, exponent)
                    parts[i] = e.b.fadd(parts[i], weight)
            new.maxima.append(high)
            new.totals.append(e.fma(state.totals[own], factor, e.b.fadd(*parts)))
            factors.append(factor)
    return new, factors


def scale_rows(e: Emitter, sums: list[list[Tile]], factors: list[ir.Value]) -> list[list[Tile]]:
    """Sums times the factor of their row."""
    return [[[e.b.fmul(value, factors[2 * band + i // 2]) for i, value in enumerate(tile)]
             for tile in tiles] for band, tiles in enumerate(sums)]


def inverse_totals(e: Emitter, state: RowState) -> list[ir.Value]:
    """1 / the sum of each row's weights; 0 for rows that saw no key."""
    result = []
    for total in state.totals:
        whole = over_lanes(e, total, add_floats, 4)
        empty = e.b.fcmp_ordered("==", whole, f32(0.0))
        result.append(e.b.select(empty, f32(0.0), e.b.fdiv(f32(1.0), whole)))
    return result


def flatten(sums: list[list[Tile]]) -> list[ir.Value]:
    return [value for tiles in sums for tile in tiles for value in tile]


def unflatten(values: list[ir.Value], bands: int) -> list[list[Tile]]:
    each = len(values) // bands
    return [[list(values[start:start + 4]) for start in range(band * each, (band + 1) * each, 4)]
            for band in range(bands)]


def zero_sums(bands: int, size: int) -> list[ir.Value]:
    return [f32(0.0)] * (bands * size // 8 * 4)
