"""a @ w with w a packed weight, of floats or of codes: the two forms of the host's matmul.

few rows    The left operand lies in rows; what comes before it (a norm, a conversion) is computed
            by each worker into its scratch. A tile is one panel: the weight is streamed once, at
            memory bandwidth. Floor: bytes of the weight / read bandwidth.
blocked     The left operand was packed into row blocks by an earlier stage. A tile is a group of
            row blocks x a group of panels. Floor: 2 * rows * n * k flops / peak, while the
            panels of the next tile come from memory.

Both leave a register tile of sums in memory that fits the L1 cache, from where the epilogue takes
it: one copy of the epilogue's code, whatever the tile's shape.

Measured on Zen 3 with bf16 weights at 1B shapes (benchmarks/bench_matmul.py), shares of
the floor on 4 cores: 1 to 4 rows 0.97, 128 rows 0.94, 512 rows 0.97.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llvmlite.ir as ir

from llmc.codegen.host.byte_dot import ByteDot, ByteReader, IntegerBytes
from llmc.codegen.host.coded_rows import RowsInCodes
from llmc.codegen.host.coded_weight import CodedWeight, LeftCodes
from llmc.codegen.host.epilogue import Epilogue
from llmc.codegen.host.kernel import Frame, Kernel, Worker
from llmc.codegen.host.microkernel import (
    ASKED_TWICE,
    CACHE_LINE,
    FAR,
    FROM_CACHE,
    PREFETCH_BYTES,
    IntegerReader,
    Later,
    LeftRows,
    PanelReader,
    Reading,
    many_places,
    prefetch,
    several_places,
)
from llmc.codegen.host.packed_weight import CodeReader, PackedWeight, QuantizedWeight
from llmc.codegen.host.prologue import RowsInPlace, RowsInScratch
from llmc.codegen.llvm import F64, I32, Emitter, i64
from llmc.ir.dims import Dim, bounds, evaluate
from llmc.ir.dims import product as product_of
from llmc.ir.dtypes import DType, dtype, f32, f64, i16
from llmc.ir.graph import Node
from llmc.ir.layouts import CodedRows, Panels, RowBlocks, Rows
from llmc.ir.program import Buffer, Capabilities, Program, Stage, unsupported
from llmc.ir.quantized import coded_rows, quantized, stored_operands

if TYPE_CHECKING:
    from llmc.codegen.target import Target

# Of panels in a group. They stay in half of an L2 cache of 512 KB; or in a quarter of the 1 MB that
# every CPU with vectors of 512 bits has, beside those of the next group, asked for meanwhile.
PANEL_GROUP_BYTES = 256 << 10
ASKING_LANES = 16  # f32 lanes of the vectors of a CPU that asks
ROW_GROUP_BYTES = 4 << 20  # row blocks of a group stay in this worker's share of L3
# Bits of codes -> bytes ahead of 1 row's reads by vectors of 256 bits. Best of 0 to 4096 on Zen 3:
# 1.18 and 1.06 times as fast as PREFETCH_BYTES, which is best of 4 rows.
CODES_AHEAD = {8: 1024, 4: 1536}
WARMED_BYTES = 32 << 10  # of a worker's first panel, before the barrier ahead of its stage
# Row blocks at the end of a tile that ask for the next tile's panels. Unasked, the first row block
# of a tile waits for memory: on Emerald Rapids 16 rows take 1.08 to 1.15 times as long, many rows
# no longer. Groups of 512 KB and 1 MB there are no better. On Zen 3 f32 gains, some bf16 loses.
ASKING_BLOCKS = 8
LEAST_PANEL_GROUPS = 64  # so many tiles along n at least, where n allows it: balance


@dataclass(frozen=True)
class Product:
    """The matmul of a stage: a[rows..., k] @ w[k, n]."""

    stage: Stage
    node: Node
    weight: PackedWeight

    @property
    def reader(self) -> PanelReader:
        return self.weight.reader

    @property
    def left(self) -> Node:
        return self.node.inputs[0]

    @property
    def rows(self) -> Dim:
        return product_of(self.left.shape[:-1])

    @property
    def k(self) -> int:
        return self.weight.k

    @property
    def left_dtype(self) -> DType:
        """What the arithmetic reads: bytes, or pairs of bf16 or i16, for dot products, f64 for
        f64, else f32."""
        if isinstance(self.reader, IntegerBytes):
            return dtype("i8" if self.reader.name == "sdot" else "u8")
        if isinstance(self.reader, IntegerReader):
            return i16
        return dtype("bf16") if self.reader.dot else (f64 if self.reader.element == F64 else f32)

    @property
    def left_bytes(self) -> int:
        return self.left_dtype.bits // 8


def matmul(stage: Stage, program: Program, target: Target) -> Kernel:
    """The kernel of a matmul stage; CompileError where its body is no such product."""
    found = find_product(stage, program)
    buffer = operand_buffer(stage, program, found.left)
    if buffer is not None and isinstance(buffer.layout, (RowBlocks, CodedRows)):
        from llmc.codegen.host.deep_matmul import DeepMatmul, pieces

        if isinstance(found.weight, CodedWeight):
            from llmc.codegen.host.coded_matmul import CodedMatmul

            return CodedMatmul(found, buffer, program)
        kind = DeepMatmul if pieces(found.weight) > 1 else BlockedMatmul
        return kind(found, buffer, program)
    return FewRowsMatmul(found, buffer, program, target)


def find_product(stage: Stage, program: Program) -> Product:
    """The one matmul of the stage's body, whose right operand is a packed weight."""
    found = [node for node in stage.body.nodes() if node.op == "matmul"]
    if len(found) != 1:
        raise unsupported(stage, f"its body holds {len(found)} products, not one")
    return Product(stage, found[0], packed_weight(stage, program, found[0]))


def packed_weight(stage: Stage, program: Program, node: Node) -> PackedWeight:
    """How the right operand lies and is read; CompileError for what has no kernel."""
    buffers = []
    for operand in stored_operands(node.inputs[1]):
        buffer = operand_buffer(stage, program, operand)
        if buffer is None or not isinstance(buffer.layout, Panels):
            raise unsupported(stage, "its right operand is not a packed weight")
        if not all(isinstance(size, int) for size in buffer.type.shape):
            raise unsupported(stage, f"the shape of its weight is symbolic: {buffer.type}")
        buffers.append(buffer)
    weight, *scales = buffers
    own, capabilities = weight.type.dtype, program.capabilities
    packed = capabilities.packed_activation(own, node.inputs[0].dtype)
    lanes = capabilities.vector_lanes // (2 if packed == "f64" else 1)
    assert isinstance(weight.layout, Panels)
    whole = quantized(node.inputs[1])
    if whole is not None:
        if not own.is_integer or whole.group % weight.layout.interleave or packed != "f32":
            raise unsupported(stage, f"no kernel for {own} codes in groups of {whole.group}")
        if node.op == "matmul" and node["activation_block"]:
            return _coded_weight(stage, capabilities, node, whole.group, buffers)
        return QuantizedWeight(weight, CodeReader(own, weight.layout, lanes), scales[0],
                               scales[1] if scales[1:] else None, whole.group)
    if own.is_integer and packed == capabilities.byte_activation and weight.layout.interleave == 4:
        return PackedWeight(weight, IntegerBytes(own, weight.layout, lanes,
                                                 name=capabilities.byte_dot))
    if own.is_integer and packed == "i16" and weight.layout.interleave == 2:
        x86 = capabilities.name.startswith("x86_64")
        return PackedWeight(weight, IntegerReader(own, weight.layout, lanes, True, x86))
    if own.name not in ("f64", "f32", "bf16", "f16"):
        raise unsupported(stage, f"no kernel for weights of {own}")
    return PackedWeight(weight, PanelReader(own, weight.layout, lanes, packed == "bf16"))


def _coded_weight(stage: Stage, capabilities: Capabilities, node: Node, group: int,
                  buffers: Sequence[Buffer]) -> CodedWeight:
    """The weight of a product of codes by codes."""
    weight, scales, *zeros = buffers
    codes, lanes, block = weight.type.dtype, capabilities.vector_lanes, node["activation_block"]
    shared = group % block == 0 or group >= evaluate(weight.type.shape[0], {})
    if not capabilities.byte_dot or not shared:
        raise unsupported(stage, f"no kernel for blocks of {block} codes and groups of {group}")
    assert isinstance(weight.layout, Panels)
    reader = ByteReader(codes, weight.layout, lanes, offset=capabilities.code_offset(codes))
    return CodedWeight(weight, reader, scales, zeros[0] if zeros else None, group,
                       ByteDot(capabilities.byte_dot, lanes, codes.bits), block)


def operand_buffer(stage: Stage, program: Program, node: Node) -> Buffer | None:
    """The buffer of a body input; None for a computed value."""
    for own, name in zip(stage.body.inputs, stage.operands, strict=True):
        if own is node:
            return program.buffers[name]
    return None


def choose_body(e: Emitter, count: ir.Value, sizes: Sequence[int]) -> Iterator[int]:
    """Branch on the smallest of the ascending sizes that is at least count; the caller emits the
    code for each size in turn."""
    done = e.b.append_basic_block("rows.done")
    for size in sizes[:-1]:
        fits = e.b.append_basic_block(f"rows.{size}")
        more = e.b.append_basic_block(f"rows.above.{size}")
        e.b.cbranch(e.b.icmp_signed("<=", count, i64(size)), fits, more)
        e.b.position_at_end(fits)
        yield size
        e.b.branch(done)
        e.b.position_at_end(more)
    yield sizes[-1]
    e.b.branch(done)
    e.b.position_at_end(done)


def body_sizes(most: int, rows: Dim) -> list[int]:
    """Rows of the tiles that code is made for, ascending: from half a block of `most` rows to a
    whole one (a row alone is no faster: its few sums wait for each other); where the number of rows
    is known, those that its blocks need."""
    sizes = sorted({*range(max(1, most // 2), most, max(1, most // 6)), most})
    if not isinstance(rows, int) or rows < 1:
        return sizes
    own = -(-rows // -(-rows // most))
    needed = {next(size for size in sizes if size >= count)
              for count in (own, (rows - 1) % own + 1)}
    return sorted(needed)


@dataclass(frozen=True)
class Turn:
    """A row block's turn in a tile, which has those from `first` to before `last`."""

    block: ir.Value
    first: ir.Value
    last: ir.Value


class BlockedMatmul:
    """Many rows: a tile of accumulators per (row block, panel); the left operand is packed."""

    scratch_bytes: int | Dim = 0

    def __init__(self, product: Product, blocks: Buffer, program: Program):
        layout = CodedRows if isinstance(product.weight, CodedWeight) else RowBlocks
        if not isinstance(blocks.layout, layout) or blocks.type.dtype != product.left_dtype:
            raise unsupported(product.stage, f"its rows are packed as {blocks.type.dtype}, "
                                             f"not {product.left_dtype}")
        self.product, self.blocks = product, blocks
        self.layout: RowBlocks | CodedRows = blocks.layout
        block = self.layout.elements((self.layout.rows, product.k))
        self.block_bytes = evaluate(block, {}) * product.left_bytes
        self.panel_group = max(1, min(PANEL_GROUP_BYTES // max(1, product.weight.panel_bytes),
                                      product.weight.panels // LEAST_PANEL_GROUPS))
        self.panel_groups = -(-product.weight.panels // self.panel_group)
        self.row_group = max(1, ROW_GROUP_BYTES // max(1, self.block_bytes))
        self.asks = (type(product.weight) is PackedWeight
                     and program.capabilities.vector_lanes >= ASKING_LANES)
        self.epilogue = Epilogue(product.stage, program, product.node, product.reader,
                                 self.layout.rows)

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        return e.b.mul(self._row_groups(e, self._blocks(e, frame)), i64(self.panel_groups))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing: an earlier stage packed the rows."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """Each row block of a group past the panels of a group; the block stays in L1 or L2.

        Tiles count panel groups first: workers share the row group in L3 and split the weight.
        """
        panel_group, first_block, last_block = self._groups_of(e, frame, tile)
        first_panel = e.b.mul(panel_group, i64(self.panel_group))
        last_panel = e.minimum(e.b.add(first_panel, i64(self.panel_group)),
                               i64(self.product.weight.panels))
        sums = self.epilogue.reserve(e)
        with (e.loop(first_block, last_block, name="block") as block,
              e.loop(first_panel, last_panel, name="panel") as panel):
            self._block_panel(e, frame, sums, Turn(block, first_block, last_block), panel)

    def _block_panel(self, e: Emitter, frame: Frame, sums: ir.Value, turn: Turn,
                     panel: ir.Value) -> None:
        rows, product, block = self.layout.rows, self.product, turn.block
        columns = product.weight.panel(e, frame, panel)
        start = e.offset(frame.pointer(self.blocks), e.b.mul(block, i64(self.block_bytes)))
        first_row, count = self._rows_of(e, frame, block)
        size = product.weight.panel_bytes
        reading = self._reading(e, turn, columns.weights, size, size * self.panel_group)
        for body in choose_body(e, count, body_sizes(rows, product.rows)):
            product.weight.store_product(e, self._left(e, start, body, reading), columns, sums)
        self.epilogue.emit(e, frame, sums, first_row, count, panel)

    def _reading(self, e: Emitter, turn: Turn, panel: ir.Value, size: int,
                 distance: int) -> Reading:
        """How a row block reads a panel, or a piece of it, of `size` bytes. As many bytes,
        `distance` further on, are what comes next: of these it asks for its share."""
        if not self.asks:
            return FROM_CACHE
        group_bytes = self.product.reader.group_bytes
        blocks = e.b.sub(turn.last, turn.first)
        asking = e.minimum(i64(ASKING_BLOCKS), blocks)
        stride = e.ceildiv(i64(group_bytes), asking)
        number = e.b.sub(turn.block, e.b.sub(turn.last, asking))
        share = e.b.mul(number, e.b.mul(stride, i64(size // group_bytes)))
        asks = e.b.and_(e.b.icmp_signed(">", blocks, i64(1)),
                        e.b.icmp_signed(">=", number, i64(0)))
        start = e.b.select(asks, e.offset(e.offset(panel, distance), share), panel)
        return Reading(1, PREFETCH_BYTES, later=Later(start, e.b.select(asks, stride, i64(0))))

    def _rows_of(self, e: Emitter, frame: Frame, block: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first row of a block, and how many it has."""
        all_rows = frame.dim(self.product.rows)
        own = e.ceildiv(all_rows, e.maximum(i64(1), self._blocks(e, frame)))
        first = e.b.mul(block, own)
        return first, e.minimum(own, e.b.sub(all_rows, first))

    def _left(self, e: Emitter, block: ir.Value, size: int, reading: Reading = FROM_CACHE
              ) -> LeftRows | LeftCodes:
        """The first rows of a block, [k / interleave][rows][interleave]: f32 of one k, or pairs
        of bf16; or codes."""
        if isinstance(self.layout, CodedRows):
            return LeftCodes(tuple(e.offset(block, row, I32) for row in range(size)), self.layout)
        lane = self.layout.interleave * self.product.left_bytes
        step = self.layout.rows * lane
        return LeftRows(tuple(e.offset(block, row * lane) for row in range(size)),
                        group_bytes=step * self.product.reader.steps, step_bytes=step,
                        reading=reading)

    def _groups_of(self, e: Emitter, frame: Frame, tile: ir.Value
                   ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """A tile's panel group, and the first row block of its group and that behind the last."""
        blocks = self._blocks(e, frame)
        size = e.ceildiv(blocks, self._row_groups(e, blocks))
        row_group = e.b.udiv(tile, i64(self.panel_groups))
        panel_group = e.b.sub(tile, e.b.mul(row_group, i64(self.panel_groups)))
        first = e.b.mul(row_group, size)
        return panel_group, first, e.minimum(e.b.add(first, size), blocks)

    def _blocks(self, e: Emitter, frame: Frame) -> ir.Value:
        return e.ceildiv(frame.dim(self.product.rows), i64(self.layout.rows))

    def _row_groups(self, e: Emitter, blocks: ir.Value) -> ir.Value:
        return e.maximum(i64(1), e.ceildiv(blocks, i64(self.row_group)))


class FewRowsMatmul:
    """Few rows: every worker holds the rows and streams its own panels past them."""

    def __init__(self, product: Product, source: Buffer | None, program: Program, target: Target):
        self.product, self.target = product, target
        high = bounds(product.rows)[1]
        largest = program.capabilities.matmul_rows
        if high:  # dealt out evenly: 8 rows by tiles of up to 6 are 4 and 4
            largest = max(1, -(-high // -(-high // largest)))
        self.bodies = sorted({min(size, largest) for size in (1, 2, 4, 8, largest)})
        self.prologue = self._prologue(source, program, high)
        self.scratch_bytes: int | Dim = self.prologue.scratch_bytes
        self.epilogue = Epilogue(product.stage, program, product.node, product.reader, largest)

    def _prologue(self, source: Buffer | None, program: Program,
                  high: int | None) -> RowsInPlace | RowsInScratch | RowsInCodes:
        product = self.product
        if high is not None and isinstance(product.weight, CodedWeight):
            layout = coded_rows(product.node, program.capabilities, 1)
            return RowsInCodes(product.stage, program, product.node, layout, high)
        if (source is not None and source.layout == Rows() and product.left_bytes > 1
                and source.type.dtype == product.left_dtype):
            return RowsInPlace(source, product.k)
        if high is None:
            raise unsupported(product.stage, "its rows are without bound and not packed")
        return RowsInScratch(product.stage, program, product.node, product.left_dtype, high)

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        return i64(self.product.weight.panels)

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        self.prologue.emit(e, frame, worker)

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """All rows past one panel."""
        rows = frame.dim(self.product.rows)
        self.rows_past_panel(e, frame, worker, tile, tile, i64(0), rows)

    def warm(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """The beginning of this worker's first panel."""
        panels = i64(self.product.weight.panels)
        first = e.b.udiv(e.b.mul(panels, worker.index), worker.count)
        start = self.product.weight.panel(e, frame, first).weights
        with e.loop(0, WARMED_BYTES, CACHE_LINE, name="line") as place:
            prefetch(e, e.offset(start, place), CACHE_LINE, FAR)

    def rows_past_panel(self, e: Emitter, frame: Frame, worker: Worker, panel: ir.Value,
                        columns: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        """Rows from begin to end, as many at a time as fit the registers, past a panel of the
        weight; columns: number of that panel in the result."""
        most = self.bodies[-1]
        weights = self.product.weight.panel(e, frame, panel)
        sums = self.epilogue.reserve(e)
        with e.loop(begin, end, most, name="rows") as first:
            count = e.minimum(i64(most), e.b.sub(end, first))
            for size in choose_body(e, count, self.bodies):
                left = self._left(e, frame, worker, first, size)
                self.product.weight.store_product(e, left, weights, sums)
            self.epilogue.emit(e, frame, sums, first, count, columns)

    def _reading(self, rows: int) -> Reading:
        """Of panels that come from memory; groups of codes are too short for several places."""
        weight, reader, far = self.product.weight, self.product.reader, self.target.far_memory
        if type(weight) is PackedWeight:
            return many_places(rows) if far else several_places(reader, rows)
        if far:
            return ASKED_TWICE
        if isinstance(weight, CodedWeight) and rows == 1 and reader.lanes == 8:
            return Reading(1, CODES_AHEAD.get(reader.dtype.bits, PREFETCH_BYTES))
        return FROM_CACHE

    def _left(self, e: Emitter, frame: Frame, worker: Worker, first: ir.Value,
              size: int) -> LeftRows | LeftCodes:
        """Rows beyond the end stand for the last row again; their sums are not used."""
        reader, element = self.product.reader, self.product.left_bytes
        last = e.b.sub(frame.dim(self.product.rows), i64(1))
        pointers = tuple(
            self.prologue.row(e, frame, worker, e.minimum(e.b.add(first, i64(row)), last))
            for row in range(size))
        if isinstance(self.prologue, RowsInCodes):
            return LeftCodes(pointers, self.prologue.layout, self._reading(size))
        return LeftRows(pointers, group_bytes=reader.layout.interleave * element,
                        step_bytes=element, reading=self._reading(size))
