"""Causal convolution over packed tokens on the host: bound by memory bandwidth.

A tile is a sequence and a few channels: it walks along the tokens with the last ones in registers.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen import elements
from llmc.codegen.elementwise import ELEMENTWISE
from llmc.codegen.expr import Expression
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.host.recurrent import ConvStage
from llmc.codegen.host.sequences import Part
from llmc.codegen.integers import Index
from llmc.codegen.llvm import F32, Emitter, i64, splat_constant, vector
from llmc.codegen.reductions import whole_lanes
from llmc.ir.dims import Dim
from llmc.ir.dtypes import f32
from llmc.ir.program import Program, Stage


class ConvKernel(ConvStage):
    """A tile is a sequence and a vector of channels."""

    scratch_bytes: int | Dim = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, program.capabilities.vector_lanes)

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Sequences times groups of channels."""
        width = self._width(self.expression(e, frame))
        groups = e.b.udiv(frame.dim(self.channels), i64(width))
        return e.b.mul(frame.dim(self.sequences.count), groups)

    def _width(self, x: Expression) -> int:
        return whole_lanes(self.lanes, x.dim(self.channels))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Nothing is shared by a worker's tiles."""

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """All tokens of a sequence, for one vector of channels."""
        x = self.expression(e, frame)
        count, number = x.dim(self.sequences.count), x.index(tile)
        part = self.sequences.part(x, number % count)
        channel = x.emit_index(number // count * self._width(x))
        with e.b.if_then(e.b.icmp_signed("<", part.start, part.stop)):
            self._walk(e, frame, part, channel)

    def _walk(self, e: Emitter, frame: Frame, part: Part, channel: ir.Value) -> None:
        window = self._old_tokens(e, frame, part, channel)
        x = self.expression(e, frame)
        lanes, column = self._width(x), x.index(channel)
        weights = [elements.collect(e, [x.value(self.weight, [column + lane, tap])
                                        for lane in range(lanes)]) for tap in range(self.taps)]
        bias = splat_constant(vector(F32, lanes), 0.0) if self.bias is None else \
            x.value(self.bias, [column], lanes)
        with x.fold(x.index(part.start), x.index(part.stop), window) as (token, old, finish):
            new = [*old, x.value(self.x, [token, column], lanes)]
            if 0 in self.results:
                total = bias
                for weight, value in zip(weights, new, strict=True):
                    total = e.fma(weight, value, total)
                x.store(self.results[0], [token, column], self._activated(e, total))
            finish(new[1:])
        if 1 in self.results:
            x = self.expression(e, frame)
            self._store_state(x, part, x.index(channel), finish.results)

    def _activated(self, e: Emitter, value: ir.Value) -> ir.Value:
        silu = self.node["activation"] == "silu"
        return ELEMENTWISE["silu"](e, f32, value) if silu else value

    def _old_tokens(self, e: Emitter, frame: Frame, part: Part, channel: ir.Value
                    ) -> list[ir.Value]:
        """The channels' last values from before: of the state, or zeros."""
        x = self.expression(e, frame)
        lanes, row, column = self._width(x), x.index(part.row), x.index(channel)
        zero = splat_constant(vector(F32, lanes), 0.0)
        loaded = [x.value(self.state, [row, tap, column], lanes) for tap in range(self.taps - 1)]
        # A slot that nobody has written yet is memory like any other: it may be read.
        return [e.b.select(part.fresh, zero, value) for value in loaded]

    def _store_state(self, x: Expression, part: Part, column: Index, window: list[ir.Value]
                     ) -> None:
        for tap, value in enumerate(window):
            x.store(self.results[1], [x.index(part.row), tap, column], value)
