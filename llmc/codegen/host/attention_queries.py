"""Where attention's operands lie, and blocks of queries: of packed sequences or a dense batch."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import add, load_index, multiply
from llmc.codegen.host.attention_views import operand_view
from llmc.codegen.host.kernel import Frame, operand_buffers
from llmc.codegen.llvm import I32, I64, Emitter, i64
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType
from llmc.ir.graph import Node
from llmc.ir.layouts import Rows
from llmc.ir.program import Buffer, Program, Stage, unsupported
from llmc.ir.views import View


def dim_value(frame: Frame, dim: Dim):
    """A dim as an int where it is one, else as an i64 value."""
    return dim if isinstance(dim, int) else frame.dim(dim)


@dataclass(frozen=True)
class Operand:
    """A tensor operand: a buffer seen through movement."""

    buffer: Buffer
    view: View

    @classmethod
    def of(cls, stage: Stage, program: Program, node: Node) -> Operand:
        source, view = operand_view(stage, node)
        buffer = operand_buffers(stage, program)[source["name"]]
        if buffer.layout != Rows():
            raise unsupported(stage, f"{buffer.name} does not lie in rows")
        return cls(buffer, view)

    @property
    def dtype(self) -> DType:
        return self.buffer.type.dtype

    def offset(self, e: Emitter, frame: Frame, *index):
        """Elements from the buffer's base to an element; axes that are not given are 0."""
        total = dim_value(frame, self.view.offset)
        for position, stride in zip(index, self.view.strides, strict=False):
            total = add(e, total, multiply(e, position, dim_value(frame, stride)))
        return total

    def stride(self, frame: Frame, axis: int):
        return dim_value(frame, self.view.strides[axis])

    def index(self, e: Emitter, frame: Frame, *index) -> ir.Value:
        """An element of an integer tensor, as i64."""
        return load_index(e, frame.pointer(self.buffer), self.offset(e, frame, *index), self.dtype)


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one sequence, and the kv head; i64 values."""

    sequence: ir.Value
    first: ir.Value  # on the axis of queries
    count: ir.Value  # 0: a tile that finds nothing to do
    head: ir.Value


class Packing:
    """Blocks of queries of packed sequences, listed in a table that each worker makes.

    The table: i64 count, then from byte 8 on pairs of i32 (first token, sequence).
    """

    def __init__(self, offsets: Operand, tokens: Dim, query_block: int):
        self.offsets, self.tokens, self.query_block = offsets, tokens, query_block
        self.sequences = offsets.view.shape[0] - 1
        self.bound = tokens // query_block + self.sequences

    @property
    def table_bytes(self) -> Dim:
        return 8 + 8 * self.bound

    def blocks(self, e: Emitter, frame: Frame) -> ir.Value:
        """Upper bound of the number of blocks."""
        return frame.dim(self.bound)

    def fill_table(self, e: Emitter, frame: Frame, table: ir.Value) -> None:
        with e.fold(0, frame.dim(self.sequences), [i64(0)], name="sequence") as (
                sequence, (count,), finish):
            start = self.offsets.index(e, frame, sequence)
            end = self.offsets.index(e, frame, e.b.add(sequence, i64(1)))
            with e.fold(start, end, [count], self.query_block, "block") as (
                    token, (entry,), finish_block):
                pair = e.offset(table, e.b.add(entry, i64(1)), I64)
                e.store(e.b.trunc(token, I32), pair)
                e.store(e.b.trunc(sequence, I32), e.offset(pair, 4))
                finish_block([e.b.add(entry, i64(1))])
            finish(finish_block.results)
        e.store(finish.results[0], table)

    def block(self, e: Emitter, frame: Frame, table: ir.Value, index, head) -> Block:
        """A block by its number; count 0 past the last one."""
        exists = e.b.icmp_signed("<", index, e.load(table, I64))
        slot = e.b.select(exists, index, i64(0))
        pair = e.offset(table, e.b.add(slot, i64(1)), I64)
        first = e.b.sext(e.load(pair, I32), I64)
        sequence = e.b.sext(e.load(e.offset(pair, 4), I32), I64)
        sequence = e.b.select(exists, sequence, i64(0))
        end = self.offsets.index(e, frame, e.b.add(sequence, i64(1)))
        count = e.minimum(e.b.sub(end, first), i64(self.query_block))
        return Block(sequence, first, e.b.select(exists, count, i64(0)), head)

    def place(self, block: Block, query, head) -> tuple:
        """Index of a query's row in the operand, and of its result."""
        return query, head


class Batch:
    """Blocks of queries of a dense batch."""

    table_bytes: Dim = 0

    def __init__(self, batch: Dim, queries: Dim, query_block: int):
        self.batch, self.queries, self.query_block = batch, queries, query_block
        self.per_sequence = (queries + (query_block - 1)) // query_block

    def blocks(self, e: Emitter, frame: Frame) -> ir.Value:
        return frame.dim(self.batch * self.per_sequence)

    def fill_table(self, e: Emitter, frame: Frame, table: ir.Value) -> None:
        """Nothing to list: blocks are computed."""

    def block(self, e: Emitter, frame: Frame, table: ir.Value, index, head) -> Block:
        blocks = frame.dim(self.per_sequence)
        sequence = e.b.udiv(index, blocks)
        first = e.b.mul(e.b.urem(index, blocks), i64(self.query_block))
        rest = e.b.sub(frame.dim(self.queries), first)
        return Block(sequence, first, e.minimum(rest, i64(self.query_block)), head)

    def place(self, block: Block, query, head) -> tuple:
        return block.sequence, head, query
