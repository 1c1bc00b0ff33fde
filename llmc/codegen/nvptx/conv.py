"""Causal convolution over packed tokens on a GPU: bound by memory bandwidth.

Two launches: a thread for each result, which reads the tokens before its own again (they lie in the
cache); then a thread for each sequence and channel, which writes the new state. The second waits
for the first, which reads the old one.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.elementwise import ELEMENTWISE
from llmc.codegen.expr import Expression
from llmc.codegen.host.recurrent import ConvStage
from llmc.codegen.host.sequences import Part, integer
from llmc.codegen.llvm import f32 as number
from llmc.codegen.llvm import i64
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.ir.dims import Dim, ceildiv, maximum
from llmc.ir.dtypes import f32
from llmc.ir.program import Program, Stage

THREADS = 256


class ConvKernel(ConvStage):
    """Two launches, of which a stage may need one."""

    threads = THREADS
    shared_bytes = 0

    def __init__(self, stage: Stage, program: Program, target: object):
        super().__init__(stage, program, lanes=1)
        parts = {0: _Results(self), 1: _NewState(self)}
        self.launches = [parts[index] for index in sorted(self.results)]

    def token(self, x: Expression, part: Part, source: ir.Value, channel: ir.Value) -> ir.Value:
        """A channel of a token, or what the state has of it if it came before this step."""
        e = x.e
        new = x.value(self.x, [e.maximum(source, part.start), channel])
        tap = e.b.add(e.b.sub(source, part.start), i64(self.taps - 1))
        within = e.maximum(e.minimum(tap, i64(self.taps - 2)), i64(0))
        old = x.value(self.state, [part.row, within, channel])
        old = e.b.select(part.fresh, number(0.0), old)
        return e.b.select(e.b.icmp_signed(">=", source, part.start), new, old)


class _Launch:
    """A thread for each of `rows` times the channels."""

    threads = THREADS
    shared_bytes = 0

    def __init__(self, kernel: ConvKernel, rows: Dim):
        self.kernel, self.rows = kernel, rows

    def blocks(self) -> Dim:
        return ceildiv(maximum(1, self.rows * self.kernel.channels), THREADS)

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        place = e.b.add(e.b.mul(e.block, i64(THREADS)), e.thread)
        channels = frame.dim(self.kernel.channels)
        with e.b.if_then(e.b.icmp_signed("<", place, frame.dim(self.rows * self.kernel.channels))):
            x = self.kernel.expression(e, frame)
            self._element(x, e.b.udiv(place, channels), e.b.urem(place, channels))

    def _element(self, x: Expression, row: ir.Value, channel: ir.Value) -> None:
        raise NotImplementedError


class _Results(_Launch):
    """y of a token and channel."""

    def __init__(self, kernel: ConvKernel):
        super().__init__(kernel, kernel.x.shape[0])

    def _element(self, x: Expression, row: ir.Value, channel: ir.Value) -> None:
        kernel, e = self.kernel, x.e
        part = kernel.sequences.part(x, x.index(integer(x, kernel.sequence, x.index(row))))
        total = number(0.0) if kernel.bias is None else x.value(kernel.bias, [channel])
        for tap in range(kernel.taps):
            source = e.b.sub(row, i64(kernel.taps - 1 - tap))
            weight = x.value(kernel.weight, [channel, tap])
            total = e.fma(weight, kernel.token(x, part, source, channel), total)
        if kernel.node["activation"] == "silu":
            total = ELEMENTWISE["silu"](e, f32, total)
        x.store(kernel.results[0], [x.index(row), x.index(channel)], total)


class _NewState(_Launch):
    """The last tokens of a sequence, in one channel."""

    def __init__(self, kernel: ConvKernel):
        super().__init__(kernel, kernel.sequences.count)

    def _element(self, x: Expression, row: ir.Value, channel: ir.Value) -> None:
        kernel, e = self.kernel, x.e
        part = kernel.sequences.part(x, x.index(row))
        first = e.b.sub(part.stop, i64(kernel.taps - 1))
        last = [kernel.token(x, part, e.b.add(first, i64(tap)), channel)
                for tap in range(kernel.taps - 1)]
        with e.b.if_then(e.b.icmp_signed("<", part.start, part.stop)):
            for tap, value in enumerate(last):
                own = x.fresh()
                own.store(kernel.results[1], [own.index(part.row), tap, own.index(channel)], value)
