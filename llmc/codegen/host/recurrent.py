"""What the kernels of recurrent ops know of their stages, on the host and on GPUs."""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.kernel import Frame
from llmc.codegen.host.sequences import PackedSequences, Part, recurrent_op, sequences_of
from llmc.codegen.llvm import Emitter
from llmc.ir.dims import Dim
from llmc.ir.ops_recurrent import gates
from llmc.ir.program import Program, Stage


class RecurrentStage:
    """A stage of one recurrent op; elementwise functions of operands and movement may come before
    it. lanes: of the vectors that the kernel computes with."""

    def __init__(self, stage: Stage, program: Program, lanes: int):
        self.stage, self.program, self.lanes = stage, program, lanes
        self.node, self.results = recurrent_op(stage, program)

    def expression(self, e: Emitter, frame: Frame) -> Expression:
        """The operands at any index."""
        sources = operand_sources(self.stage.body, self.stage.operands, self.program.buffers)
        return Expression(e, frame, sources, self.lanes)


class LinearAttentionStage(RecurrentStage):
    """The op is linear_attention or slot_linear_attention. heads: of the state, whose rows are the
    `size` elements of a key and whose columns those of a value; group: query heads of each."""

    def __init__(self, stage: Stage, program: Program, lanes: int):
        super().__init__(stage, program, lanes)
        self.state, self.query, self.key, self.value = self.node.inputs[:4]
        self.decay, self.beta = gates(self.node)
        self.per_key = self.decay is not None and self.decay.rank == self.value.rank
        self.sequences = sequences_of(self.node)
        _, self.heads, self.size, self.columns = (
            size if isinstance(size, int) else 0 for size in self.state.shape)
        self.query_heads: int = self.query.shape[-2]  # type: ignore[assignment]
        self.key_heads: int = self.key.shape[-2]  # type: ignore[assignment]
        self.group = max(1, self.query_heads // self.heads)

    def place(self, x: Expression, number: ir.Value, slices: int
              ) -> tuple[Part, ir.Value, ir.Value]:
        """The sequence, head and slice of the columns with a number. Sequences vary fastest: each
        worker gets its share of the long ones."""
        count, index = x.dim(self.sequences.count), x.index(number)
        part = self.sequences.part(x, index % count)
        head, piece = (x.emit_index(each) for each in (
            index // count // slices, index // count % slices))
        return part, head, piece


class ConvStage(RecurrentStage):
    """The op is slot_conv. taps: tokens that a result depends on."""

    def __init__(self, stage: Stage, program: Program, lanes: int):
        super().__init__(stage, program, lanes)
        self.state, self.x, self.weight, slots, offsets, positions, self.sequence = (
            self.node.inputs[:7])
        self.bias = self.node.inputs[7] if len(self.node.inputs) > 7 else None
        self.sequences = PackedSequences(slots, offsets, positions)
        self.taps: int = self.weight.shape[1]  # type: ignore[assignment]
        self.channels: Dim = self.x.shape[1]
