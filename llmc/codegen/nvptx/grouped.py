"""Mixtures of experts on a GPU: rows sorted into groups, and each group's product with its matrix.

The products are those of matmul.py: what differs is which rows a block takes. It finds them in the
starts of the groups, which an earlier kernel of the step wrote; a group without rows gets no block,
and its matrix is not read. As only the number of rows in all is known when a step is launched, the
grid has as many blocks as their worst distribution needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import llvmlite.ir as ir

from llmc.codegen.expr import Expression
from llmc.codegen.host.matmul import operand_buffer
from llmc.codegen.host.single import SingleOp
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I1, I32, I64, Emitter, i32, i64
from llmc.codegen.nvptx import matvec, tiled_matmul
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matmul_rows import ENDLESS, MOST_PARTS, InRange, RangedMatmul
from llmc.codegen.nvptx.matmul_tensor import TensorMatmul
from llmc.codegen.nvptx.matmul_tiles import choose_tiling
from llmc.codegen.nvptx.matrix_vector import ROW_COUNTS, MatrixVector
from llmc.codegen.nvptx.matvec import TensorMatvec
from llmc.codegen.nvptx.product import (
    Product,
    RowTile,
    count_parts,
    find_operands,
    only_product,
)
from llmc.codegen.nvptx.tiled_matmul import TiledMatmul
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, bounds, minimum
from llmc.ir.graph import Node
from llmc.ir.program import Buffer, Program, Stage, unsupported

OP = "grouped_matmul"
# Rows of a group on average: up to here a matrix streams past them, eight at a time.
FEW_ROWS = 4
TENSOR_ROWS = (32, 128)  # the last ones of each range of tiles, but for the last range


@dataclass(frozen=True)
class GroupedProduct(Product):
    """a[rows, k], of which rows starts[g] ... starts[g + 1] - 1 are multiplied by matrix g. The
    weight has the first part of every matrix, then the second one of each."""

    starts: Buffer

    @property
    def groups(self) -> int:
        return self.node["groups"]

    def column(self, e: Emitter, tile: RowTile, part: ir.Value, column: ir.Value) -> ir.Value:
        stored = self.node["parts"]  # which the body need not read as parts
        size = self.part_size * self.parts // stored
        if stored != self.parts:
            column = e.b.add(column, e.b.mul(part, i64(self.part_size)))
            part = e.b.udiv(column, i64(size))
            column = e.b.sub(column, e.b.mul(part, i64(size)))
        matrix = e.b.add(e.b.mul(part, i64(self.groups)), tile.group)
        column = e.b.add(column, e.b.mul(matrix, i64(size)))
        return e.b.mul(column, i64(self.stride))

    def most_tiles(self, size: int) -> Dim:
        """Tiles of up to `size` rows, none of which has rows of two groups."""
        return minimum(self.rows, self.rows // size + self.groups)

    def find_tile(self, e: DeviceEmitter, frame: DeviceFrame, number: ir.Value, size: int
                  ) -> tuple[ir.Value, RowTile]:
        """Whether there is a tile of that number (i32), and its rows. All lanes of a warp together:
        each counts the tiles of a group, 32 groups at a time."""
        b, lane, end = e.b, lane_of(e), i32(self.groups)
        starts = frame.pointer(self.starts)
        with e.fold(0, self.groups, [i32(0)] * 4, WARP, "group") as (
                base, (before, group, first, stop), finish):
            own = e.minimum(b.add(b.trunc(base, I32), lane), end)
            begin, behind = (e.load(e.offset(starts, b.zext(place, I64), I32), I32)
                             for place in (own, e.minimum(b.add(own, i32(1)), end)))
            tiles = b.sdiv(b.add(b.sub(behind, begin), i32(size - 1)), i32(size))
            last = b.add(before, scan_warp(e, tiles))
            inside = b.sub(number, b.sub(last, tiles))
            here = b.and_(b.icmp_signed(">=", inside, i32(0)),
                          b.icmp_signed("<", inside, tiles))
            votes = e.call("llvm.nvvm.vote.ballot.sync", I32, i32(-1), here)
            lane_there = e.call("llvm.cttz.i32", I32, votes, ir.Constant(I1, 0))
            there = [e.shuffle(value, lane_there, "idx") for value in (
                own, b.add(begin, b.mul(inside, i32(size))), behind)]
            found = b.icmp_signed("!=", votes, i32(0))
            kept = [b.select(found, value, old)
                    for value, old in zip(there, (group, first, stop), strict=True)]
            finish([e.shuffle(last, WARP - 1, "idx"), *kept])
        _, group, first, stop = (b.zext(value, I64) for value in finish.results)
        stop = e.minimum(stop, frame.dim(self.rows))
        return b.icmp_signed("<", first, stop), RowTile(first, stop, group)


class TileKernel(Protocol):
    """A kernel of matmul.py: how it multiplies a tile of rows by a tile of columns.

    rank, for those that share out k: which of the blocks that have the same tile.
    """

    threads: int
    shared_bytes: int

    def emit_tile(self, e: DeviceEmitter, frame: DeviceFrame, tile: RowTile, number: ir.Value,
                  *rank: ir.Value) -> None: ...


class GroupedKernel:
    """Blocks count row tiles first, so that those of a group share its matrix in L2.

    size: rows of a tile; columns: tiles of columns.
    """

    def __init__(self, product: GroupedProduct, kernel: TileKernel, size: int, columns: int):
        self.product, self.kernel, self.size, self.columns = product, kernel, size, columns
        self.split: int = getattr(kernel, "split", 1)
        self.threads, self.shared_bytes = kernel.threads, kernel.shared_bytes
        self.attributes: dict[str, int] = getattr(kernel, "attributes", {})

    def blocks(self) -> Dim:
        return self.product.most_tiles(self.size) * (self.columns * self.split)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """This block's tile, if there is one."""
        most = e.maximum(frame.dim(self.product.most_tiles(self.size)), i64(1))
        tile, rank = e.b.udiv(e.block, i64(self.split)), e.b.urem(e.block, i64(self.split))
        column, number = e.b.udiv(tile, most), e.b.trunc(e.b.urem(tile, most), I32)
        exists, rows = self.product.find_tile(e, frame, number, self.size)
        exists = e.b.and_(exists, e.b.icmp_signed("<", column, i64(self.columns)))
        with e.b.if_then(exists):
            ranks = [rank] if isinstance(self.kernel, TensorMatmul) else []
            self.kernel.emit_tile(e, frame, rows, column, *ranks)


def grouped_matmul(stage: Stage, program: Program, target: Target) -> RangedMatmul:
    """The kernels of a grouped_matmul stage; CompileError where its body is no such product."""
    node = only_product(stage, OP)
    starts = operand_buffer(stage, program, node.inputs[2])
    if starts is None:
        raise unsupported(stage, "the starts of its groups must lie in memory")
    product = GroupedProduct(stage, program, node, *find_operands(stage, program, node),
                             count_parts(stage.body, node), starts)
    low, high = bounds(product.rows)
    launches = []
    for first, last, make in _ranges(product):
        if low <= last and (high is None or first <= high):
            kernel = make(product, target, min(last, high or last))
            launches.append(InRange(kernel, product.rows, [(first, last)]))
    return RangedMatmul(launches)


Make = Callable[[GroupedProduct, Target, int], GroupedKernel]


def _ranges(product: GroupedProduct) -> Iterator[tuple[int, int, Make]]:
    """First and last rows of each range, and what makes its kernel for up to so many rows."""
    tensor = product.dtype.bits == 16 and product.parts <= MOST_PARTS
    first, last = 0, FEW_ROWS * product.groups
    yield first, last, _tensor_matvec if tensor and product.parts <= 2 else _matrix_vector
    for size in TENSOR_ROWS if tensor else ():
        first, last = last + 1, size * product.groups
        yield first, last, _tensor_matmul
    yield last + 1, ENDLESS, _tensor_matmul if tensor else _tiled_matmul


def _tensor_matvec(product: GroupedProduct, target: Target, rows: int) -> GroupedKernel:
    kernel = TensorMatvec(product, target.cpu, min(rows, matvec.ROWS))
    kernel.awaits_earlier = False  # which of the weights it reads, an earlier kernel says
    return GroupedKernel(product, kernel, matvec.ROWS, kernel.tiles)


def _matrix_vector(product: GroupedProduct, target: Target, rows: int) -> GroupedKernel:
    size = min(rows, ROW_COUNTS[-1])
    kernel = MatrixVector(product, (1, size))
    return GroupedKernel(product, kernel, size, -(-product.part_size // kernel.columns_per_block))


def _tensor_matmul(product: GroupedProduct, target: Target, rows: int) -> GroupedKernel:
    """Its tile is chosen for the average group."""
    tiling = choose_tiling(product, target.cpu, -(-rows // product.groups))
    kernel = TensorMatmul(product, target.cpu, tiling)
    kernel.awaits_earlier = False  # as above
    return GroupedKernel(product, kernel, kernel.shape.rows, kernel.column_tiles)


def _tiled_matmul(product: GroupedProduct, target: Target, rows: int) -> GroupedKernel:
    kernel = TiledMatmul(product)
    return GroupedKernel(product, kernel, tiled_matmul.ROWS,
                         -(-product.part_size // kernel.columns))


# ---- sorting rows by group ---------------------------------------------------------------------


class GroupRowsKernel(SingleOp):
    """A block for each group counts the rows before it and its own, then writes where they go.

    A thread takes rows that lie side by side, so that the order is stable. Every block reads all
    numbers, twice: a few words each, from the cache.
    """

    threads = 256
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, ("group_rows",))
        self.numbers: Node = self.node.inputs[0]
        self.groups: int = self.node["groups"]

    def blocks(self) -> Dim:
        return self.groups

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The places of this block's group."""
        x, b = self._expression(e, frame), e.b
        group = b.trunc(e.block, I32)
        rows = frame.dim(self.numbers.shape[0])
        span = e.ceildiv(rows, i64(self.threads))
        first = e.minimum(b.mul(e.thread, span), rows)
        last = e.minimum(b.add(first, span), rows)
        with x.fold(x.index(first), x.index(last), [i32(0), i32(0)]) as (row, (less, own), finish):
            number = self._number(x, row)
            finish([b.add(less, b.zext(b.icmp_signed("<", number, group), I32)),
                    b.add(own, b.zext(b.icmp_signed("==", number, group), I32))])
        start = scan_block(e, finish.results[0], self.threads)[1]
        before, total = scan_block(e, finish.results[1], self.threads)
        self._store_starts(e, x, group, start, b.add(start, total))
        with x.fold(x.index(first), x.index(last), [b.add(start, before)]) as (
                row, (place,), finish):
            here = b.icmp_signed("==", self._number(x, row), group)
            with b.if_then(here):
                number = x.emit_index(row)
                inner = x.fresh()
                self._put(inner, 0, b.zext(place, I64), b.trunc(number, I32))
                self._put(inner, 1, number, place)
            finish([b.add(place, b.zext(here, I32))])

    def _store_starts(self, e: DeviceEmitter, x: Expression, group: ir.Value, start: ir.Value,
                      stop: ir.Value) -> None:
        b = e.b
        with b.if_then(b.icmp_signed("==", e.thread, i64(0))):
            self._put(x.fresh(), 2, b.zext(group, I64), start)
            with b.if_then(b.icmp_signed("==", group, i32(self.groups - 1))):
                self._put(x.fresh(), 2, i64(self.groups), stop)

    def _number(self, x: Expression, row: Index) -> ir.Value:
        """A row's group, i32; one out of range counts as the nearest."""
        value = x.value(self.numbers, [row])
        wide = value if value.type.width == 64 else x.e.b.sext(value, I64)
        return x.e.b.trunc(x.e.maximum(i64(0), x.e.minimum(wide, i64(self.groups - 1))), I32)

    def _put(self, x: Expression, number: int, place: ir.Value, value: ir.Value) -> None:
        if number in self.results:  # others are not read
            x.store(self.results[number], [x.index(place)], value)


def lane_of(e: DeviceEmitter) -> ir.Value:
    """This thread's number in its warp, i32."""
    return e.b.and_(e.b.trunc(e.thread, I32), i32(WARP - 1))


def scan_warp(e: DeviceEmitter, value: ir.Value) -> ir.Value:
    """The sum of the values (i32) of this lane and those before it."""
    lane, step = lane_of(e), 1
    while step < WARP:
        other = e.shuffle(value, e.b.sub(lane, i32(step)), "idx")
        before = e.b.icmp_signed(">=", lane, i32(step))
        value = e.b.add(value, e.b.select(before, other, i32(0)))
        step *= 2
    return value


def scan_block(e: DeviceEmitter, value: ir.Value, threads: int) -> tuple[ir.Value, ir.Value]:
    """(sum of the values (i32) of the threads before this one, that of all threads)"""
    upto, warps = scan_warp(e, value), threads // WARP
    memory = e.shared(I32, warps)
    warp = e.b.lshr(e.thread, i64(5))
    with e.b.if_then(e.b.icmp_signed("==", lane_of(e), i32(WARP - 1))):
        e.store(upto, e.offset(memory, warp, I32))
    e.barrier()
    before, total = e.b.sub(upto, value), i32(0)
    for number in range(warps):
        own = e.load(e.offset(memory, number, I32), I32)
        earlier = e.b.icmp_signed(">", warp, i64(number))
        before = e.b.add(before, e.b.select(earlier, own, i32(0)))
        total = e.b.add(total, own)
    return before, total
