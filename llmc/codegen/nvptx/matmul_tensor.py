"""Many rows of f16 or bf16 on tensor cores: a block computes a tile of the product.

Copies (cp.async) run some chunks of k ahead of the arithmetic in a ring of stages. Blocks count row
tiles first, so that those running together share the weight's columns in L2. The sums go through
shared memory, so that the epilogue reads and writes whole 16-byte pieces.
Floor: 2 * rows * n * k flops / peak, or the weight's bytes / read bandwidth where rows are few.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import llvmlite.ir as ir

from llmc.codegen.llvm import F32, I32, Emitter, i32, i64, vector
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matmul_loader import CHUNK, TileLoader, TileShape
from llmc.codegen.nvptx.matmul_ptx import (
    barrier,
    commit_copies,
    shared_base,
    shared_memory,
    wait_copies,
)
from llmc.codegen.nvptx.mma import MmaConsumer
from llmc.codegen.nvptx.product import Epilogue, Product
from llmc.codegen.nvptx.wgmma import WgmmaConsumer
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, bounds, ceildiv

PADDING = 8  # elements behind a row of sums: rows a power of two apart would share banks
VECTOR = 8  # columns that a thread finishes at a time
PROCESSORS = 132  # of the GPU that tiles are chosen for
MANY_ROWS = 2048  # what tiles are chosen for where rows are without bound


class Consumer(Protocol):
    """What multiplies the chunks of a tile; see mma, wgmma and fma."""

    lag: int

    def begin(self, e: Emitter, thread: ir.Value) -> list[ir.Value]: ...
    def ready(self, e: Emitter) -> None: ...
    def start(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]: ...
    def finish(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]: ...
    def end(self, e: Emitter, sums: list[ir.Value]) -> list[ir.Value]: ...
    def keep(self, e: Emitter, pointer: ir.Value, stride: int, sums: list[ir.Value]) -> None: ...


@dataclass(frozen=True)
class Tiling:
    """A tile's shape, and what multiplies it."""

    shape: TileShape
    make_consumer: Callable[[TileShape], Consumer]


class TensorMatmul:
    """The kernel of a matmul stage for many rows of f16 or bf16."""

    def __init__(self, product: Product, tiling: Tiling):
        self.product, self.epilogue = product, Epilogue(product)
        self.shape = tiling.shape
        self.consumer = tiling.make_consumer(tiling.shape)
        self.threads = self.shape.threads
        self.chunks = -(-product.k * product.dtype.bits // 8 // CHUNK)
        self.width = self.shape.columns // product.parts
        self.column_tiles = -(-product.part_size // self.width)
        self.sums = SumTile(self.shape.rows, self.width, self.shape.columns + PADDING, self.threads)
        self.shared_bytes = max(self.shape.stages * self.shape.stage_bytes, self.sums.bytes)

    def blocks(self) -> Dim:
        return ceildiv(self.product.rows, self.shape.rows) * self.column_tiles

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """This block's tile, if there is one."""
        row_tiles = e.ceildiv(frame.dim(self.product.rows), i64(self.shape.rows))
        column_tile = e.b.udiv(e.block, row_tiles)
        row_tile = e.b.urem(e.block, row_tiles)
        with e.b.if_then(e.b.icmp_signed("<", column_tile, i64(self.column_tiles))):
            self._tile(e, frame, e.b.mul(row_tile, i64(self.shape.rows)),
                       e.b.mul(column_tile, i64(self.width)))

    def _tile(self, e: DeviceEmitter, frame: DeviceFrame, first_row: ir.Value,
              first_column: ir.Value) -> None:
        thread = e.b.trunc(e.thread, I32)
        loader = TileLoader(e, frame, self.product, self.shape, thread, first_row, first_column)
        sums = self._stream(e, loader, self.consumer.begin(e, thread))
        self.consumer.keep(e, shared_memory(e), self.sums.stride, sums)
        barrier(e)
        self.sums.finish(e, frame, self.epilogue, first_row, first_column)

    def _stream(self, e: DeviceEmitter, loader: TileLoader, sums: list[ir.Value]
                ) -> list[ir.Value]:
        """All chunks past the consumer; at the end nobody uses the stages any more."""
        ahead = self.shape.stages - self.consumer.lag
        base, chunks = shared_base(e), self.chunks
        size = self.shape.stage_bytes
        last = e.b.add(base, i32((self.shape.stages - 1) * size))
        for chunk in range(ahead):
            if chunk < chunks:
                loader.load(i64(chunk), e.b.add(base, i32(chunk * size)))
            commit_copies(e)
        initial = [base, e.b.add(base, i32(ahead * size)), *sums]
        with e.fold(0, chunks, initial, name="chunk") as (chunk, (read, write, *sums), finish):
            wait_copies(e, ahead - 1)
            self.consumer.ready(e)
            barrier(e)
            sums = self.consumer.start(e, read, sums)
            coming = e.b.add(chunk, i64(ahead))
            with e.b.if_then(e.b.icmp_signed("<", coming, i64(chunks))):
                loader.load(coming, write)
            commit_copies(e)
            sums = self.consumer.finish(e, read, sums)
            read, write = (self._next(e, stage, base, last) for stage in (read, write))
            finish([read, write, *sums])
        _, _, *sums = finish.results
        wait_copies(e, 0)
        sums = self.consumer.end(e, sums)
        barrier(e)
        return sums

    def _next(self, e: Emitter, stage: ir.Value, base: ir.Value, last: ir.Value) -> ir.Value:
        """The stage behind one in the ring."""
        wraps = e.b.icmp_signed("==", stage, last)
        return e.b.select(wraps, base, e.b.add(stage, i32(self.shape.stage_bytes)))


@dataclass(frozen=True)
class SumTile:
    """A block's sums in shared memory: f32 [rows][stride], of which part p has columns
    p * width ... (p + 1) * width."""

    rows: int
    width: int
    stride: int
    threads: int

    @property
    def bytes(self) -> int:
        return 4 * self.rows * self.stride

    def _lanes(self, product: Product) -> int:
        """Columns of a vector: none is cut by the end of a part."""
        return VECTOR if self.width % VECTOR == 0 and product.part_size % VECTOR == 0 else 1

    def finish(self, e: DeviceEmitter, frame: DeviceFrame, epilogue: Epilogue,
               first_row: ir.Value, first_column: ir.Value) -> None:
        """The epilogue of every element that exists, all threads of the block together."""
        product = epilogue.product
        lanes = self._lanes(product)
        groups = self.width // lanes
        rows = e.minimum(i64(self.rows), e.b.sub(frame.dim(product.rows), first_row))
        with e.loop(e.thread, e.b.mul(rows, i64(groups)), self.threads, "vector") as number:
            row = e.b.udiv(number, i64(groups))
            inside = e.b.mul(e.b.urem(number, i64(groups)), i64(lanes))
            column = e.b.add(first_column, inside)
            exists = e.b.icmp_signed("<", column, i64(product.part_size))
            with e.b.if_then(exists) if product.part_size % self.width else nullcontext():
                self._vector(e, frame, epilogue, e.b.add(first_row, row), column, row, inside)

    def _vector(self, e: DeviceEmitter, frame: DeviceFrame, epilogue: Epilogue, row: ir.Value,
                column: ir.Value, own_row: ir.Value, own_column: ir.Value) -> None:
        product = epilogue.product
        lanes = self._lanes(product)
        place = e.b.add(e.b.mul(own_row, i64(self.stride)), own_column)
        start = e.offset(shared_memory(e), place, F32)
        sums = [e.load(e.offset(start, part * self.width, F32), vector(F32, lanes),
                       align=16 if lanes > 1 else None) for part in range(product.parts)]
        epilogue.emit(e, frame, row, column, sums)


Choice = tuple[int, TileShape, tuple[int, int] | None]

# ---- which tiles -----------------------------------------------------------------------------


def tensor_matmul(product: Product, target: Target) -> TensorMatmul | None:
    """The kernel for a product of 16-bit floats; None for other dtypes."""
    if product.dtype.bits != 16 or product.parts > 4:
        return None
    return TensorMatmul(product, choose_tiling(product, target.cpu))


def choose_tiling(product: Product, architecture: str) -> Tiling:
    """The largest tile that still gives (nearly) every processor one."""
    high = min(bounds(product.rows)[1] or MANY_ROWS, MANY_ROWS)
    columns = product.part_size * product.parts

    def fits(choice: Choice) -> bool:
        tiles = -(-high // choice[1].rows) * -(-columns // choice[1].columns)
        return high > choice[0] and tiles >= PROCESSORS * 3 // 4

    choices = _WGMMA if architecture == "sm_90a" else _MMA
    _, shape, grid = next(filter(fits, choices), choices[-1])
    name = product.dtype.name
    if grid is None:
        return Tiling(shape, partial(WgmmaConsumer, name=name))
    return Tiling(shape, partial(MmaConsumer, name=name, warp_rows=grid[0], warp_columns=grid[1]))


# (rows beyond which a tile is taken, tile, warps along rows and columns: None for wgmma), largest
# first. Shared memory: three stages of 32 KiB fit every GPU since sm_80, and two blocks fit Hopper.
_SMALL: list[Choice] = [
    (32, TileShape(64, 64, 128, 4), (2, 2)), (32, TileShape(64, 32, 128, 6), (2, 2)),
    (0, TileShape(32, 64, 128, 6), (1, 4)), (0, TileShape(32, 32, 128, 8), (2, 2))]
_MMA: list[Choice] = [
    (64, TileShape(128, 128, 256, 3), (2, 4)), (64, TileShape(128, 64, 256, 4), (4, 2)), *_SMALL]
_WGMMA: list[Choice] = [
    (64, TileShape(128, 256, 256, 4), None), (64, TileShape(128, 128, 256, 6), None),
    (64, TileShape(128, 64, 256, 8), None), *_SMALL]
