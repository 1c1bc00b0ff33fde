"""Products of few rows: bound by reading the weight once.

A warp takes COLUMNS columns of every part. Its lanes split k: each reads 16 bytes of every column
and row at a time, several loads in flight, and adds the products up in registers; then the sums
of the lanes are added by shuffles, and each lane finishes one element of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmc.codegen import elements
from llmc.codegen.llvm import Emitter, i32, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.product import Epilogue, Product, RowTile
from llmc.ir.dims import Dim, ceildiv

COLUMNS = 2  # of each part, for a warp
LOADS = 8  # 16-byte loads of the weight that a lane has in flight
ROW_COUNTS = (1, 2, 4, 8)  # code exists for so many rows; a step takes the next that suffices


class MatrixVector:
    """A matmul stage whose rows are at most the target's few_rows."""

    threads = 128
    shared_bytes = 0

    def __init__(self, product: Product, limits: tuple[int, int | None]):
        """limits: least and most rows of a tile."""
        self.product = product
        self.epilogue = Epilogue(product)
        self.columns_per_block = self.threads // WARP * COLUMNS
        low, high = limits
        assert high is not None
        sizes = [size for size in ROW_COUNTS if size < high] + [max(1, high)]
        self.row_counts = [size for size in sizes if size >= low]
        self.width = product.vector(8)

    def blocks(self) -> Dim:
        return ceildiv(self.product.part_size, self.columns_per_block)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        self.emit_tile(e, frame, self.product.all_rows(frame), e.block)

    def emit_tile(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, number: ir.Value
                  ) -> None:
        """The columns of this warp in the number-th block's, past these rows."""
        warp = e.b.lshr(e.thread, i64(5))
        first = e.b.add(e.b.mul(number, i64(self.columns_per_block)),
                        e.b.mul(warp, i64(COLUMNS)))
        rows = e.b.sub(tile.stop, tile.first)
        inside = e.b.and_(e.b.icmp_signed("<", first, i64(self.product.part_size)),
                          e.b.icmp_signed(">", rows, i64(0)))
        with e.b.if_then(inside):
            for count in self._choose(e, rows):
                self._finish(e, frame, tile, first, rows,
                             self._sums(e, frame, tile, first, rows, count))

    def _choose(self, e: DeviceEmitter, rows: ir.Value) -> Iterator[int]:
        """Branch to the code for the least number of rows that suffices; the caller emits each."""
        done = e.b.append_basic_block("rows.done")
        for count in self.row_counts[:-1]:
            fits = e.b.append_basic_block(f"rows.{count}")
            more = e.b.append_basic_block(f"rows.above.{count}")
            e.b.cbranch(e.b.icmp_signed("<=", rows, i64(count)), fits, more)
            e.b.position_at_end(fits)
            yield count
            e.b.branch(done)
            e.b.position_at_end(more)
        yield self.row_counts[-1]
        e.b.branch(done)
        e.b.position_at_end(done)

    def _sums(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, first: ir.Value,
              rows: ir.Value, count: int) -> list[list[ir.Value]]:
        """[row * COLUMNS + column][part]: sums in every lane.

        Rows and columns beyond the end stand for the last ones again.
        """
        product, parts = self.product, self.product.parts
        last_row, last_column = e.b.sub(rows, i64(1)), i64(product.part_size - 1)
        left = [product.row(e, frame, e.b.add(tile.first, e.minimum(i64(row), last_row)))
                for row in range(count)]
        columns = [e.minimum(e.b.add(first, i64(column)), last_column) for column in range(COLUMNS)]
        weight = [product.column(e, tile, i64(part), column)
                  for column in columns for part in range(parts)]
        lane = e.b.and_(e.thread, i64(WARP - 1))
        start, chunk = e.b.mul(lane, i64(self.width)), WARP * self.width
        unroll = max(1, min(LOADS // len(weight), product.k // chunk))
        whole = product.k // (chunk * unroll) * chunk * unroll
        zero = ir.Constant(product.element, 0.0)
        with e.fold(start, i64(whole), [zero] * (count * len(weight)), chunk * unroll) as (
                k, sums, finish):
            finish(self._multiply(e, frame, left, weight,
                                  [e.b.add(k, i64(chunk * step)) for step in range(unroll)], sums))
        with e.fold(e.b.add(start, i64(whole)), i64(product.k), finish.results, chunk) as (
                k, sums, finish):
            finish(self._multiply(e, frame, left, weight, [k], sums))
        totals = [e.across_warp(total, e.b.fadd) for total in finish.results]
        return [totals[i:i + parts] for i in range(0, len(totals), parts)]

    def _multiply(self, e: DeviceEmitter, frame: DeviceFrame, left: Sequence[ir.Value],
                  weight: Sequence[ir.Value], steps: Sequence[ir.Value],
                  sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Adds the products of a vector of k at each step; all of the weight is asked for first."""
        product, sums = self.product, list(sums)
        right = [[load_vector(e, frame.pointer(product.weight), e.b.add(column, k), product,
                              self.width, constant=True) for column in weight] for k in steps]
        for k, columns in zip(steps, right, strict=True):
            values = [elements.decode(e, column, product.dtype) for column in columns]
            for row, base in enumerate(left):
                a = elements.decode(e, load_vector(e, frame.pointer(product.left),
                                                   e.b.add(base, k), product, self.width),
                                    product.dtype)
                for column, b in enumerate(values):
                    place = row * len(weight) + column
                    sums[place] = dot(e, a, b, sums[place])
        return sums

    def _finish(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, first: ir.Value,
                rows: ir.Value, sums: list[list[ir.Value]]) -> None:
        """Lane i finishes element i (row i / COLUMNS, column i % COLUMNS)."""
        lane = e.b.and_(e.thread, i64(WARP - 1))
        chosen = sums[0]
        for number, values in enumerate(sums[1:], start=1):
            own = e.b.icmp_signed("==", lane, i64(number))
            chosen = [e.b.select(own, value, other)
                      for value, other in zip(values, chosen, strict=True)]
        row = e.b.lshr(lane, i64(COLUMNS.bit_length() - 1))
        column = e.b.add(first, e.b.and_(lane, i64(COLUMNS - 1)))
        inside = e.b.and_(e.b.icmp_signed("<", row, rows),
                          e.b.icmp_signed("<", column, i64(self.product.part_size)))
        inside = e.b.and_(inside, e.b.icmp_signed("<", lane, i64(len(sums))))
        with e.b.if_then(inside):
            self.epilogue.emit(e, frame, e.b.add(tile.first, row), column, chosen)


def load_vector(e: Emitter, base: ir.Value, offset: ir.Value, product: Product, width: int,
                constant: bool = False) -> ir.Value:
    """`width` elements in memory form, aligned to their size; constant: nothing writes them."""
    element = elements.memory_type(product.dtype)
    type_ = element if width == 1 else ir.VectorType(element, width)
    value = e.load(e.offset(base, offset, element), type_, width * product.dtype.bits // 8)
    if constant:
        value.set_metadata("invariant.load", e.module.add_metadata([]))
    return value


def dot(e: Emitter, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """total + sum of a[i] b[i], in order."""
    if not isinstance(a.type, ir.VectorType):
        return e.fma(a, b, total)
    for lane in range(a.type.count):
        total = e.fma(e.b.extract_element(a, i32(lane)), e.b.extract_element(b, i32(lane)), total)
    return total
