"""Many rows of f16 or bf16 on tensor cores: a block computes a tile of the product.

Copies (cp.async) run some chunks of k ahead of the arithmetic in a ring of stages. Blocks count row
tiles first, so that those running together share the weight's columns in L2. The sums go through
shared memory, so that the epilogue reads and writes whole 16-byte pieces.
Floor: 2 * rows * n * k flops / peak, or the weight's bytes / read bandwidth where rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import llvmlite.ir as ir

from llmc.codegen.llvm import F32, I32, Emitter, i32, i64, vector
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matmul_loader import TileLoader
from llmc.codegen.nvptx.matmul_ptx import (
    barrier,
    cluster_barrier,
    commit_copies,
    load_remote,
    shared_base,
    shared_memory,
    wait_copies,
)
from llmc.codegen.nvptx.matmul_tiles import Tiling, chunk_count, make_consumer
from llmc.codegen.nvptx.overlap import await_earlier, may_overlap
from llmc.codegen.nvptx.product import Epilogue, Place, Product, RowTile
from llmc.ir.dims import Dim, ceildiv

PADDING = 8  # elements behind a row of sums: rows a power of two apart would share banks
VECTOR = 8  # columns that a thread finishes at a time
TOGETHER = 4  # such vectors whose operands it asks for before it stores the first
HELD, HELD_BY_BLOCK = 64, 32768  # values of f32 that they may be, of a thread and of a block


class TensorMatmul:
    """The kernel of a matmul stage for many rows of f16 or bf16."""

    def __init__(self, product: Product, architecture: str, tiling: Tiling):
        self.awaits_earlier = may_overlap(architecture)
        self.product, self.epilogue = product, Epilogue(product)
        self.shape, self.split = tiling.shape, tiling.split
        self.consumer = make_consumer(tiling, product.dtype.name)
        self.threads = self.shape.threads
        self.attributes = {"nvvm.minctasm": tiling.resident}
        if self.split > 1:
            self.attributes["nvvm.cluster_dim"] = self.split
        self.chunks = chunk_count(product)
        self.width = self.shape.columns // product.parts
        self.column_tiles = -(-product.part_size // self.width)
        self.sums = SumTile(self.shape.rows, self.width, self.shape.columns + PADDING,
                            self.threads, self.split)
        self.shared_bytes = max(self.shape.stages * self.shape.stage_bytes, self.sums.bytes)

    def blocks(self) -> Dim:
        row_tiles = ceildiv(self.product.rows, self.shape.rows)
        return row_tiles * (self.column_tiles * self.split)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """This block's tile, if there is one; blocks of a cluster share a tile."""
        row_tiles = e.ceildiv(frame.dim(self.product.rows), i64(self.shape.rows))
        tile = e.b.udiv(e.block, i64(self.split))
        rank = e.b.urem(e.block, i64(self.split))
        count = e.b.mul(row_tiles, i64(self.column_tiles))
        with e.b.if_then(e.b.icmp_signed("<", tile, count)):
            first = e.b.mul(e.b.urem(tile, row_tiles), i64(self.shape.rows))
            self.emit_tile(e, frame, self.product.all_rows(frame, first),
                           e.b.udiv(tile, row_tiles), rank)

    def emit_tile(self, e: DeviceEmitter, frame: DeviceFrame, rows: RowTile, number: ir.Value,
                  rank: ir.Value) -> None:
        """The number-th tile of columns of these rows, by block `rank` of a cluster."""
        thread = e.b.trunc(e.thread, I32)
        first_column = e.b.mul(number, i64(self.width))
        loader = TileLoader(e, frame, self.product, self.shape, thread, rows, first_column)
        first, last = (e.b.udiv(e.b.mul(i64(self.chunks), e.b.add(rank, i64(more))),
                                i64(self.split)) for more in (0, 1))
        sums = self._stream(e, loader, self.consumer.begin(e, thread), first, last)
        self.consumer.keep(e, shared_memory(e), self.sums.stride, sums)
        meet = barrier if self.split == 1 else cluster_barrier
        meet(e)
        self.sums.finish(e, frame, self.epilogue, rows, first_column, rank)
        if self.split > 1:
            meet(e)  # nobody leaves while others read its sums

    def _stream(self, e: DeviceEmitter, loader: TileLoader, sums: list[ir.Value],
                first: ir.Value, last: ir.Value) -> list[ir.Value]:
        """Chunks first..last past the consumer; at the end nobody uses the stages any more."""
        ahead = self.shape.stages - self.consumer.lag
        base = shared_base(e)
        size = self.shape.stage_bytes
        end = e.b.add(base, i32((self.shape.stages - 1) * size))
        filled = [(e.b.add(first, i64(number)), e.b.add(base, i32(number * size)))
                  for number in range(ahead)]
        for chunk, stage in filled:
            with e.b.if_then(e.b.icmp_signed("<", chunk, last)):
                loader.load_right(chunk, stage)
        if self.awaits_earlier:
            await_earlier(e)  # weights come from no kernel, the rows do
        for chunk, stage in filled:
            with e.b.if_then(e.b.icmp_signed("<", chunk, last)):
                loader.load_left(chunk, stage)
            commit_copies(e)
        initial = [base, e.b.add(base, i32(ahead * size)), *sums]
        with e.fold(first, last, initial, name="chunk") as (chunk, (read, write, *sums), finish):
            wait_copies(e, ahead - 1)
            self.consumer.ready(e)
            barrier(e)
            sums = self.consumer.start(e, read, sums)
            self._load(e, loader, e.b.add(chunk, i64(ahead)), last, write)
            sums = self.consumer.finish(e, read, sums)
            read, write = (self._next(e, stage, base, end) for stage in (read, write))
            finish([read, write, *sums])
        _, _, *sums = finish.results
        wait_copies(e, 0)
        sums = self.consumer.end(e, sums)
        barrier(e)
        return sums

    def _load(self, e: DeviceEmitter, loader: TileLoader, chunk: ir.Value, last: ir.Value,
              stage: ir.Value) -> None:
        """Start a chunk's copies, if it exists: one group either way."""
        with e.b.if_then(e.b.icmp_signed("<", chunk, last)):
            loader.load_left(chunk, stage)
            loader.load_right(chunk, stage)
        commit_copies(e)

    def _next(self, e: Emitter, stage: ir.Value, base: ir.Value, last: ir.Value) -> ir.Value:
        """The stage behind one in the ring."""
        wraps = e.b.icmp_signed("==", stage, last)
        return e.b.select(wraps, base, e.b.add(stage, i32(self.shape.stage_bytes)))


@dataclass(frozen=True)
class SumTile:
    """A block's sums in shared memory: f32 [rows][stride], of which part p has columns
    p * width ... (p + 1) * width.

    split: so many blocks of a cluster have sums of the same elements; each finishes its share of
    the rows, and adds up all blocks' sums in their order.
    """

    rows: int
    width: int
    stride: int
    threads: int
    split: int = 1

    @property
    def bytes(self) -> int:
        return 4 * self.rows * self.stride

    def _lanes(self, product: Product) -> int:
        """Columns of a vector: none is cut by the end of a part."""
        return VECTOR if self.width % VECTOR == 0 and product.part_size % VECTOR == 0 else 1

    def finish(self, e: DeviceEmitter, frame: DeviceFrame, epilogue: Epilogue,
               tile: RowTile, first_column: ir.Value, rank: ir.Value) -> None:
        """The epilogue of every element that exists, all threads of the block together."""
        product = epilogue.product
        lanes = self._lanes(product)
        groups = self.width // lanes
        own = self.rows // self.split
        start = e.b.mul(rank, i64(own))
        first_row = e.b.add(tile.first, start)
        rows = e.minimum(i64(own), e.b.sub(tile.stop, first_row))
        held = min(HELD, HELD_BY_BLOCK // self.threads) // (lanes * product.parts * self.split)
        together = max(1, min(TOGETHER, held, -(-own * groups // self.threads)))
        step = together * self.threads
        with e.loop(e.thread, e.b.mul(rows, i64(groups)), step, "vector") as number:
            numbers = [e.b.add(number, i64(turn * self.threads)) for turn in range(together)]
            inner = [self._inside(e, each, rows, groups, lanes) for each in numbers]
            sums = self._loads(e, [e.b.add(e.b.mul(e.b.add(start, row), i64(self.stride)), column)
                                   for row, column, _ in inner], product.parts, lanes)
            places = []
            for (row, inside, wanted), own_sums in zip(inner, sums, strict=True):
                column = e.b.add(first_column, inside)
                if product.part_size % self.width:
                    wanted = e.b.and_(wanted, e.b.icmp_signed("<", column, i64(product.part_size)))
                    column = e.minimum(column, i64(product.part_size - lanes))
                places.append(Place(e.b.add(first_row, row), column, own_sums, wanted))
            epilogue.emit_all(e, frame, places)

    def _inside(self, e: DeviceEmitter, number: ir.Value, rows: ir.Value, groups: int, lanes: int
                ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Row and column in the tile of a vector, the last row's beyond the end; and whether it is
        before that."""
        row = e.b.udiv(number, i64(groups))
        column = e.b.mul(e.b.urem(number, i64(groups)), i64(lanes))
        return (e.minimum(row, e.b.sub(rows, i64(1))), column,
                e.b.icmp_signed("<", row, rows))

    def _loads(self, e: DeviceEmitter, places: list[ir.Value], parts: int, lanes: int
               ) -> list[list[ir.Value]]:
        """Sums of every part at elements of the tile, of all blocks together."""
        everywhere = [[e.b.add(place, i64(part * self.width)) for part in range(parts)]
                      for place in places]
        if self.split == 1:
            return [[self._load(e, place, lanes) for place in each] for each in everywhere]
        loaded = [[self._load_all(e, place, lanes) for place in each] for each in everywhere]
        return [[reduce(e.b.fadd, ranks) for ranks in each] for each in loaded]

    def _load(self, e: DeviceEmitter, place: ir.Value, lanes: int) -> ir.Value:
        return e.load(e.offset(shared_memory(e), place, F32), vector(F32, lanes),
                      align=16 if lanes > 1 else None)

    def _load_all(self, e: DeviceEmitter, place: ir.Value, lanes: int) -> list[ir.Value]:
        """Every block's sums from element `place` of the tile on."""
        address = e.b.add(shared_base(e), e.b.mul(e.b.trunc(place, I32), i32(4)))
        return [load_remote(e, address, rank, lanes) for rank in range(self.split)]
