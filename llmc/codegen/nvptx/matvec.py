"""Few rows (up to 16): the weight streams through registers once, at read bandwidth.

Tensor cores multiply, with the operands' roles swapped: 16 columns of the weight are the rows of an
mma fragment, the activations' rows its columns. k may be taken in any order that both operands
share, so each lane's fragments are whole 16-byte pieces of a column: no shared memory on the way.
The warps of a block share out k and add up their sums in a fixed order.
Floor: bytes of the weight / read bandwidth.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.llvm import F32, I32, I64, f32, i32, i64, vector
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matmul_ptx import (
    WARP,
    barrier,
    load_streaming,
    multiply_fragments,
    shared_memory,
)
from llmc.codegen.nvptx.matmul_tensor import SumTile
from llmc.codegen.nvptx.matmul_tiles import PROCESSORS
from llmc.codegen.nvptx.overlap import await_earlier, may_overlap
from llmc.codegen.nvptx.product import Epilogue, Product, RowTile
from llmc.ir.dims import Dim, minimum

SLOTS = 16  # columns of a block's tile: the rows of a fragment
ROWS = 8  # rows that one fragment takes
STEP = 64  # elements of k of a step: a cache line of each column
LINES = 2  # steps that a warp has in flight while it multiplies the two before


class TensorMatvec:
    """A block computes 16 columns (of all parts together) for up to `rows` rows."""

    def __init__(self, product: Product, architecture: str, rows: int):
        """Warps share out k: enough in all to keep every processor's loads in flight."""
        tiles = product.part_size * product.parts // SLOTS * min(rows, product.groups)
        warps = 16 if tiles < 2 * PROCESSORS else 8
        self.product, self.epilogue = product, Epilogue(product)
        self.row_fragments = -(-rows // ROWS)
        self.name = product.dtype.name
        self.steps = product.stride // STEP
        self.warps = max(1, min(warps, self.steps))
        self.threads = self.warps * WARP
        self.width = SLOTS // product.parts
        self.tiles = -(-product.part_size // self.width)
        self.sums = SumTile(self.row_fragments * ROWS, self.width, SLOTS + 4, self.threads)
        self.shared_bytes = self.warps * self.sums.bytes
        self.awaits_earlier = may_overlap(architecture)
        self.attributes = {"nvvm.minctasm": max(1, 512 // self.threads)}

    def blocks(self) -> Dim:
        return minimum(1, self.product.rows) * self.tiles

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        self.emit_tile(e, frame, self.product.all_rows(frame), e.block)

    def emit_tile(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, number: ir.Value
                  ) -> None:
        """The number-th columns of these rows: sums of every warp, added up, and the epilogue."""
        thread = e.b.trunc(e.thread, I32)
        self.lane = e.b.and_(thread, i32(WARP - 1))
        self.warp = e.b.lshr(thread, i32(5))
        first_column = e.b.mul(number, i64(self.width))
        columns = self._columns(e, frame, tile, first_column)
        loaded = self._load(e, columns, e.b.zext(self.warp, I64))
        if self.awaits_earlier:
            await_earlier(e)  # weights come from no kernel, the rows do
        sums = self._stream(e, columns, self._rows(e, frame, tile), loaded)
        memory = shared_memory(e)
        self._keep(e, memory, sums)
        barrier(e)
        self._add_up(e, memory, thread)
        barrier(e)
        self.sums.finish(e, frame, self.epilogue, tile, first_column, i64(0))

    # ---- addresses ---------------------------------------------------------------------------

    def _piece(self, e: DeviceEmitter) -> ir.Value:
        """Where in each 32 elements of k this lane's eight lie; i64."""
        return e.b.zext(e.b.shl(e.b.and_(self.lane, i32(3)), i32(3)), I64)

    def _columns(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, first: ir.Value
                 ) -> list[ir.Value]:
        """This lane's two columns of the weight, from its first piece on."""
        base = frame.pointer(self.product.weight)
        pointers = []
        for half in range(2):
            slot = e.b.add(e.b.zext(e.b.lshr(self.lane, i32(2)), I64), i64(ROWS * half))
            part = e.minimum(e.b.udiv(slot, i64(self.width)), i64(self.product.parts - 1))
            inside = e.b.sub(slot, e.b.mul(part, i64(self.width)))
            column = e.minimum(e.b.add(first, inside), i64(self.product.part_size - 1))
            place = e.b.add(self.product.column(e, tile, part, column), self._piece(e))
            pointers.append(e.offset(base, e.b.mul(place, i64(2))))
        return pointers

    def _rows(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile) -> list[ir.Value]:
        """This lane's row of every fragment; beyond the end, the last one."""
        base = frame.pointer(self.product.left)
        last = e.b.sub(e.maximum(tile.stop, i64(1)), i64(1))
        rows = []
        for fragment in range(self.row_fragments):
            own = e.b.add(e.b.zext(e.b.lshr(self.lane, i32(2)), I64), i64(ROWS * fragment))
            own = e.b.add(tile.first, own)
            place = e.b.add(e.b.mul(e.minimum(own, last), i64(self.product.k)), self._piece(e))
            rows.append(e.offset(base, e.b.mul(place, i64(2))))
        return rows

    # ---- sums --------------------------------------------------------------------------------

    def _load(self, e: DeviceEmitter, columns: list[ir.Value], first: ir.Value
              ) -> list[ir.Value]:
        """This lane's pieces of the weight in step `first` and the warp's next ones."""
        loaded = []
        for line in range(LINES):
            step = e.b.add(first, i64(line * self.warps))
            exists = e.b.icmp_signed("<", step, i64(self.steps))
            for pointer in columns:
                for half in range(2):
                    place = e.b.add(e.b.mul(step, i64(2 * STEP)), i64(STEP * half))
                    loaded += load_streaming(e, e.offset(pointer, place), exists)
        return loaded

    def _stream(self, e: DeviceEmitter, columns: list[ir.Value], rows: list[ir.Value],
                loaded: list[ir.Value]) -> list[ir.Value]:
        """Steps warp, warp + warps, ... of k: the next ones are loaded before these are used."""
        stride = self.warps * LINES
        zeros = [f32(0.0)] * (4 * self.row_fragments)
        with e.fold(e.b.zext(self.warp, I64), self.steps, [*loaded, *zeros], stride, "step") as (
                step, carried, finish):
            current, sums = carried[:16 * LINES], carried[16 * LINES:]
            coming = self._load(e, columns, e.b.add(step, i64(stride)))
            for line in range(LINES):
                sums = self._multiply(e, e.b.add(step, i64(line * self.warps)),
                                      current[16 * line:16 * line + 16], rows, sums)
            finish([*coming, *sums])
        return finish.results[16 * LINES:]

    def _multiply(self, e: DeviceEmitter, step: ir.Value, weight: list[ir.Value],
                  rows: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
        """Add a step's products; steps beyond the end take zeros from the rows."""
        sums = list(sums)
        for half in range(2):
            top, bottom = weight[4 * half:4 * half + 4], weight[8 + 4 * half:12 + 4 * half]
            for fragment, row in enumerate(rows):
                b = self._row_piece(e, row, step, half)
                at = 4 * fragment
                for pair in range(0, 4, 2):
                    a = [top[pair], bottom[pair], top[pair + 1], bottom[pair + 1]]
                    sums[at:at + 4] = multiply_fragments(e, self.name, a, b[pair:pair + 2],
                                                         sums[at:at + 4])
        return sums

    def _row_piece(self, e: DeviceEmitter, row: ir.Value, step: ir.Value, half: int
                   ) -> list[ir.Value]:
        """Eight elements of a row as 4 x i32; zeros beyond its end."""
        k = self.product.k
        first = e.b.add(e.b.mul(step, i64(STEP)), i64(STEP // 2 * half))
        place = e.offset(row, e.b.mul(first, i64(2)))
        whole = self.steps * STEP == k and self.steps % (self.warps * LINES) == 0
        pieces = vector(I32, 4)
        zeros = ir.Constant(pieces, None)
        if whole:
            value = e.load(place, pieces, align=16)
        elif k % 8 == 0:
            value = self._if_less(e, e.b.add(first, self._piece(e)), k,
                                  lambda: e.load(place, pieces, align=16), zeros)
        else:
            start = e.b.add(first, self._piece(e))
            short = ir.IntType(16)
            loaded = [self._if_less(e, e.b.add(start, i64(lane)), k, self._element(e, place, lane),
                                    ir.Constant(short, 0)) for lane in range(8)]
            value = e.b.bitcast(elements.collect(e, loaded), pieces)
        return [e.b.extract_element(value, i32(lane)) for lane in range(4)]

    def _element(self, e: DeviceEmitter, place: ir.Value, lane: int):
        return lambda: e.load(e.offset(place, 2 * lane), ir.IntType(16))

    def _if_less(self, e: DeviceEmitter, a: ir.Value, stop: int, load, otherwise: ir.Value
                 ) -> ir.Value:
        """load() where a < stop; it is not executed elsewhere."""
        before = e.b.block
        with e.b.if_then(e.b.icmp_signed("<", a, i64(stop))):
            value = load()
            inside = e.b.block
        phi = e.b.phi(otherwise.type)
        phi.add_incoming(otherwise, before)
        phi.add_incoming(value, inside)
        return phi

    def _keep(self, e: DeviceEmitter, memory: ir.Value, sums: list[ir.Value]) -> None:
        """This warp's sums, transposed: [row][slot]. A lane holds two rows of two slots."""
        slot = e.b.lshr(self.lane, i32(2))
        row = e.b.shl(e.b.and_(self.lane, i32(3)), i32(1))
        place = e.b.add(e.b.mul(self.warp, i32(self.sums.bytes // 4)),
                        e.b.add(e.b.mul(row, i32(self.sums.stride)), slot))
        start = e.offset(memory, e.b.zext(place, I64), F32)
        for number, value in enumerate(sums):
            fragment, bottom, lower = number // 4, number // 2 % 2, number % 2
            offset = (ROWS * fragment + lower) * self.sums.stride + ROWS * bottom
            e.store(value, e.offset(start, offset, F32))

    def _add_up(self, e: DeviceEmitter, memory: ir.Value, thread: ir.Value) -> None:
        """The sums of all warps, in their order, in the first one's place."""
        with e.loop(e.b.zext(thread, I64), self.sums.bytes // 4, self.threads, "sum") as place:
            pointer = e.offset(memory, place, F32)
            total = e.load(pointer, F32)
            for warp in range(1, self.warps):
                other = e.offset(pointer, warp * self.sums.bytes // 4, F32)
                total = e.b.fadd(total, e.load(other, F32))
            e.store(total, pointer)
