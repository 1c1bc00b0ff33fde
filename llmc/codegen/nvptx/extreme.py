"""argmax and argmin along the last axis: a block for each line, bound by reading it.

Threads look for the best of every n-th vector, then warps by shuffles, then the block in shared
memory. What is compared is a pair (key, index), so that the first (or last) of equals wins whatever
the order.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.rows import unflatten
from llmc.codegen.host.single import AlongAxisKernel as HostKernel
from llmc.codegen.host.single import order_key, order_limit
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I64, i32, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.rows import most_lanes
from llmc.codegen.nvptx.single import AlongAxisKernel
from llmc.codegen.reductions import whole_lanes
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, maximum, product
from llmc.ir.program import Program, Stage

SHORT_LINE = 4096  # elements: up to here a block of 128 threads suffices

Best = tuple[ir.Value, ir.Value]  # key and index


def extreme(stage: Stage, program: Program, target: Target) -> ExtremeKernel | AlongAxisKernel:
    """The kernel of an argmax or argmin stage."""
    host = HostKernel(stage, program, target)
    if host.axis != host.source.rank - 1:
        return AlongAxisKernel(stage, program, target)
    return ExtremeKernel(host)


class ExtremeKernel:
    """host: what is known of the stage."""

    shared_bytes = 0

    def __init__(self, host: HostKernel):
        self.host = host
        size = host.source.shape[-1]
        self.threads = 128 if isinstance(size, int) and size <= SHORT_LINE else 1024
        self.lanes = most_lanes(host.stage, host.program)

    def blocks(self) -> Dim:
        return maximum(1, product(self.host.outer))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The line of this block."""
        host = self.host
        line = e.block
        with e.b.if_then(e.b.icmp_signed("<", line, frame.dim(product(host.outer)))):
            sources = operand_sources(host.stage.body, host.stage.operands, host.program.buffers)
            x = Expression(e, frame, sources, self.lanes)
            outer = unflatten(x, host.outer, x.index(line))
            best = self._across(e, self._own(x, outer))
            with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
                place = [*outer, 0] if host.node["keep"] else outer
                buffer = host.results[0]
                x.store(buffer, place or [0] * buffer.type.rank, best[1])

    def _own(self, x: Expression, outer: Sequence[Index]) -> Best:
        """The best of this thread's elements."""
        node, source = self.host.node, self.host.source
        size = x.dim(source.shape[-1])
        width = whole_lanes(self.lanes, size)
        start = [order_limit(source, node.op == "argmin"), i64(0)]
        assert isinstance(x.e, DeviceEmitter)
        first = x.index(x.e.thread) * width
        with x.fold(first, size, start, width * self.threads) as (i, (key, where), finish):
            vector = x.value(source, [*outer, i], width)
            best = (key, where)
            for lane in range(width):
                value = x.e.b.extract_element(vector, i32(lane)) if width > 1 else vector
                own = order_key(x.e, source, value, nan_is_least=node.op == "argmin")
                best = self._better(x.e, best, (own, x.emit_index(i + lane)))
            finish(list(best))
        key, where = finish.results
        return key, where

    def _better(self, e: DeviceEmitter, a: Best, b: Best) -> Best:
        """The more extreme of two; of equals the first (or last) in the line."""
        build = e.b
        more = build.icmp_signed("<" if self.host.node.op == "argmin" else ">", b[0], a[0])
        beside = build.icmp_signed(">" if self.host.node["last"] else "<", b[1], a[1])
        chosen = build.or_(more, build.and_(build.icmp_signed("==", a[0], b[0]), beside))
        return build.select(chosen, b[0], a[0]), build.select(chosen, b[1], a[1])

    def _across(self, e: DeviceEmitter, best: Best) -> Best:
        """The block's best, in every thread of its first warp."""
        best = self._across_warp(e, best)
        warps = self.threads // WARP
        keys, places = e.shared(best[0].type, warps), e.shared(I64, warps)
        warp = e.b.lshr(e.thread, i64(5))
        e.store(best[0], e.offset(keys, warp, best[0].type))
        e.store(best[1], e.offset(places, warp, I64))
        e.barrier()
        lane = e.minimum(e.b.and_(e.thread, i64(WARP - 1)), i64(warps - 1))
        return self._across_warp(e, (e.load(e.offset(keys, lane, best[0].type), best[0].type),
                                     e.load(e.offset(places, lane, I64), I64)))

    def _across_warp(self, e: DeviceEmitter, best: Best) -> Best:
        step = WARP // 2
        while step:
            other = (e.shuffle(best[0], step), e.shuffle(best[1], step))
            best = self._better(e, best, other)
            step //= 2
        return best
