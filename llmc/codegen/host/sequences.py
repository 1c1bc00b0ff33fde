"""Where the tokens and the state of a sequence lie, for ops with a state of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.expr import Expression
from llmc.codegen.integers import Index
from llmc.codegen.llvm import i64
from llmc.ir.dims import Dim
from llmc.ir.dtypes import i64 as long
from llmc.ir.graph import Node
from llmc.ir.ops import RECURRENT
from llmc.ir.program import Buffer, Program, Stage, unsupported


@dataclass(frozen=True)
class Part:
    """A sequence's tokens start..stop, the row of its state, and whether that is to be taken for
    zeros; LLVM values, i64 and i1."""

    sequence: ir.Value
    start: ir.Value
    stop: ir.Value
    row: ir.Value
    fresh: ir.Value | None

    @property
    def count(self) -> tuple[ir.Value, ir.Value]:
        return self.start, self.stop


class PackedSequences:
    """Tokens of all sequences one after the other, states in slots."""

    def __init__(self, slots: Node, offsets: Node, positions: Node):
        self.slots, self.offsets, self.positions = slots, offsets, positions
        self.count: Dim = slots.shape[0]
        self.tokens: Dim = positions.shape[0]

    def part(self, x: Expression, sequence: Index) -> Part:
        """The sequence's tokens and slot."""
        start = integer(x, self.offsets, sequence)
        stop = integer(x, self.offsets, sequence + 1)
        # Without tokens there is no first one to look at: any will do.
        first = x.scopes.integers.minimum(x.index(start), x.dim(self.tokens) - 1)
        position = integer(x, self.positions, first)
        fresh = x.e.b.icmp_signed("==", position, i64(0))
        return Part(x.emit_index(sequence), start, stop, integer(x, self.slots, sequence), fresh)

    def token(self, x: Expression, part: Part, token: Index) -> list[Index]:
        """The leading indices of a token, by its number from 0 to `stop` - 1."""
        return [token]


class BatchedSequences:
    """[batch, tokens, ..], the state of row b in row b."""

    def __init__(self, batch: Dim, tokens: Dim):
        self.count, self.tokens = batch, tokens

    def part(self, x: Expression, sequence: Index) -> Part:
        """All tokens of a row of the batch."""
        row = x.emit_index(sequence)
        return Part(row, i64(0), x.emit_index(x.dim(self.tokens)), row, None)

    def token(self, x: Expression, part: Part, token: Index) -> list[Index]:
        """The leading indices of a token, by its number from 0 to `stop` - 1."""
        return [x.index(part.sequence), token]


Sequences = PackedSequences | BatchedSequences


def integer(x: Expression, node: Node, index: Index) -> ir.Value:
    """An element of an integer vector, i64."""
    return elements.convert(x.e, x.value(node, [index]), node.dtype, long)


def recurrent_op(stage: Stage, program: Program) -> tuple[Node, dict[int, Buffer]]:
    """The op of a scan stage, and the buffers of its results by their numbers."""
    found = [node for node in stage.body.nodes() if node.op in RECURRENT]
    outputs = [node for _, node in stage.body.outputs]
    if len(found) != 1 or any(node.op != "get" or node.inputs[0] is not found[0]
                              for node in outputs):
        raise unsupported(stage, "its results must be those of one recurrent op")
    if any(each.dtype.is_float and each.dtype.bits > 32 for each in found[0].inputs):
        raise unsupported(stage, "recurrences are computed in f32: no f64 operands")
    buffers = [program.buffers[name] for name in stage.results]
    return found[0], {node["index"]: buffer for node, buffer in zip(outputs, buffers, strict=True)}


def sequences_of(node: Node) -> Sequences:
    """Where the sequences of a linear attention lie."""
    if node.op == "slot_linear_attention":
        return PackedSequences(*node.inputs[4:7])
    return BatchedSequences(*node.inputs[1].shape[:2])


def shared_heads(heads: int, count: int, head: Index) -> Index:
    """The head, of `count`, that head number `head` of `heads` reads: neighbours share one."""
    return head // (heads // count) if heads > count else head


