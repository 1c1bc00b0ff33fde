"""Products of many rows in FMAs, through tiles in shared memory: any dtype, any shape.

A block of 16 x 16 threads computes 64 rows x (16 * width columns of every part); each thread 4 rows
x `width` columns of every part. Operands are widened on their way into shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.codegen import elements
from llmc.codegen.llvm import Emitter, i32, i64, ir
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matrix_vector import load_vector
from llmc.codegen.nvptx.product import Epilogue, Product, RowTile
from llmc.ir.dims import Dim, ceildiv, maximum

ROWS, DEPTH = 64, 16  # rows of a tile, and k of a step
SIDE = 16  # threads along rows and along columns
OWN_ROWS = ROWS // SIDE
PADDING = 4  # elements after each line of a tile in shared memory: keeps stores off one bank


@dataclass(frozen=True)
class _Tile:
    """One operand's part of a step in shared memory: [DEPTH][lines + PADDING]."""

    memory: ir.Value
    lines: int
    element: ir.Type

    def place(self, e: Emitter, k: ir.Value, line: ir.Value) -> ir.Value:
        number = e.b.add(e.b.mul(k, i64(self.lines + PADDING)), line)
        return e.offset(self.memory, number, self.element)


class TiledMatmul:
    """A matmul stage of any number of rows."""

    threads = SIDE * SIDE
    shared_bytes = 0

    def __init__(self, product: Product):
        self.product = product
        self.epilogue = Epilogue(product)
        self.width = max(1, 4 // product.parts)  # columns of a part, for a thread
        self.columns = SIDE * self.width  # of a part, for a block
        self.vector = product.vector(4)

    def blocks(self) -> Dim:
        return maximum(1, self._row_tiles()) * -(-self.product.part_size // self.columns)

    def _row_tiles(self) -> Dim:
        return ceildiv(self.product.rows, ROWS)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """One tile; blocks count rows first, so that those side by side share the weight."""
        tiles = frame.dim(self._row_tiles())
        with e.b.if_then(e.b.icmp_signed(">", tiles, i64(0))):
            column_tile = e.b.udiv(e.block, tiles)
            first_row = e.b.mul(e.b.sub(e.block, e.b.mul(column_tile, tiles)), i64(ROWS))
            self.emit_tile(e, frame, self.product.all_rows(frame, first_row), column_tile)

    def emit_tile(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, number: ir.Value
                  ) -> None:
        """The number-th tile of columns of these rows."""
        first_column = e.b.mul(number, i64(self.columns))
        self._finish(e, frame, tile, first_column, self._sums(e, frame, tile, first_column))

    # ---- sums -------------------------------------------------------------------------------

    def _sums(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile,
              first_column: ir.Value) -> list[ir.Value]:
        """[own row][part][own column], of this thread."""
        product = self.product
        left, right = (self._tile(e, lines) for lines in (ROWS, product.parts * self.columns))
        count = OWN_ROWS * product.parts * self.width
        zero = ir.Constant(product.element, 0.0)
        with e.fold(0, product.k, [zero] * count, DEPTH) as (k, sums, finish):
            self._copy_rows(e, frame, left, tile, k)
            self._copy_columns(e, frame, right, tile, first_column, k)
            e.barrier()
            totals = list(sums)
            for depth in range(DEPTH):
                totals = self._step(e, left, right, i64(depth), totals)
            e.barrier()
            finish(totals)
        return finish.results

    def _tile(self, e: DeviceEmitter, lines: int) -> _Tile:
        element = self.product.element
        return _Tile(e.shared(element, DEPTH * (lines + PADDING)), lines, element)

    def _copy_rows(self, e: DeviceEmitter, frame: DeviceFrame, tile: _Tile, rows: RowTile,
                   k: ir.Value) -> None:
        """Rows of the left operand; zeros where k ends."""
        product = self.product
        last = e.b.sub(rows.stop, i64(1))
        for line, offset in self._vectors(e, ROWS):
            row = product.row(e, frame, e.minimum(e.b.add(rows.first, line), last))
            at = e.b.add(k, offset)
            inside = e.minimum(at, i64(product.k - self.vector))
            value = load_vector(e, frame.pointer(product.left), e.b.add(row, inside), product,
                                self.vector)
            value = elements.decode(e, value, product.dtype)
            if product.k % DEPTH:
                zero = ir.Constant(value.type, None)
                value = e.b.select(e.b.icmp_signed("<", at, i64(product.k)), value, zero)
            self._store(e, tile, line, offset, value)

    def _copy_columns(self, e: DeviceEmitter, frame: DeviceFrame, tile: _Tile, rows: RowTile,
                      first: ir.Value, k: ir.Value) -> None:
        """Columns of the weight, part by part; its padding is zero."""
        product = self.product
        last = i64(product.part_size - 1)
        for line, offset in self._vectors(e, tile.lines):
            part = e.b.udiv(line, i64(self.columns))
            own = e.b.sub(line, e.b.mul(part, i64(self.columns)))
            column = product.column(e, rows, part, e.minimum(e.b.add(first, own), last))
            place = e.b.add(column, e.b.add(k, offset))
            value = load_vector(e, frame.pointer(product.weight), place, product, self.vector,
                                constant=True)
            self._store(e, tile, line, offset, elements.decode(e, value, product.dtype))

    def _vectors(self, e: DeviceEmitter, lines: int):
        """(line, k) of each vector of a tile that this thread copies."""
        per_line = DEPTH // self.vector
        total = lines * per_line
        for first in range(0, total, self.threads):
            number = e.b.add(e.thread, i64(first))
            line = e.b.udiv(number, i64(per_line))
            offset = e.b.mul(e.b.sub(number, e.b.mul(line, i64(per_line))), i64(self.vector))
            if first + self.threads <= total:
                yield line, offset
                continue
            with e.b.if_then(e.b.icmp_signed("<", number, i64(total))):
                yield line, offset

    def _store(self, e: DeviceEmitter, tile: _Tile, line: ir.Value, k: ir.Value,
               value: ir.Value) -> None:
        for lane in range(self.vector):
            element = value if self.vector == 1 else e.b.extract_element(value, i32(lane))
            e.store(element, tile.place(e, e.b.add(k, i64(lane)), line))

    def _step(self, e: DeviceEmitter, left: _Tile, right: _Tile, depth: ir.Value,
              sums: list[ir.Value]) -> list[ir.Value]:
        """One k: OWN_ROWS elements of the left tile times the columns of every part."""
        own_row, own_column = self._own(e)
        a = self._load(e, left, depth, own_row, OWN_ROWS)
        b = []
        for part in range(self.product.parts):
            column = e.b.add(own_column, i64(part * self.columns))
            b += self._load(e, right, depth, column, self.width)
        pairs = [(one, other) for one in a for other in b]
        return [e.fma(one, other, total)
                for (one, other), total in zip(pairs, sums, strict=True)]

    def _own(self, e: DeviceEmitter) -> tuple[ir.Value, ir.Value]:
        """First row and first column (of a part) of this thread in the tile."""
        row = e.b.mul(e.b.udiv(e.thread, i64(SIDE)), i64(OWN_ROWS))
        column = e.b.mul(e.b.urem(e.thread, i64(SIDE)), i64(self.width))
        return row, column

    def _load(self, e: DeviceEmitter, tile: _Tile, depth: ir.Value, line: ir.Value,
              count: int) -> list[ir.Value]:
        pointer = tile.place(e, depth, line)
        if count == 1:
            return [e.load(pointer, tile.element)]
        size = 8 if self.product.dtype.bits == 64 else 4
        value = e.load(pointer, ir.VectorType(tile.element, count), min(16, size * count))
        return [e.b.extract_element(value, i32(lane)) for lane in range(count)]

    # ---- results ----------------------------------------------------------------------------

    def _finish(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile,
                first_column: ir.Value, sums: list[ir.Value]) -> None:
        """Rows and columns of this thread that lie inside, in vectors where the parts allow it."""
        product, width = self.product, self.width
        own_row, own_column = self._own(e)
        row, column = e.b.add(tile.first, own_row), e.b.add(first_column, own_column)
        lanes = width if product.part_size % width == 0 else 1
        for i in range(OWN_ROWS):
            at = e.b.add(row, i64(i))
            own = sums[i * product.parts * width:(i + 1) * product.parts * width]
            for j in range(0, width, lanes):
                here = e.b.add(column, i64(j))
                inside = e.b.and_(e.b.icmp_signed("<", at, tile.stop),
                                  e.b.icmp_signed("<", here, i64(product.part_size)))
                values = [elements.collect(e, own[part * width + j:part * width + j + lanes])
                          for part in range(product.parts)]
                with e.b.if_then(inside):
                    self.epilogue.emit(e, frame, at, here, values)
