"""argmax and argmin along the last axis: a block for each line, bound by reading it."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.codegen.expr import Expression
from llmc.codegen.host.single import AlongAxisKernel as HostKernel
from llmc.codegen.host.single import order_key, order_limit
from llmc.codegen.integers import Index
from llmc.codegen.llvm import i32, i64
from llmc.codegen.nvptx.kernel import DeviceEmitter
from llmc.codegen.nvptx.lines import Best, LineKernel, line_kernel
from llmc.codegen.nvptx.rows import most_lanes
from llmc.codegen.nvptx.single import AlongAxisKernel
from llmc.codegen.reductions import whole_lanes
from llmc.codegen.target import Target
from llmc.ir.program import Program, Stage


def extreme(stage: Stage, program: Program, target: Target) -> LineKernel | AlongAxisKernel:
    """The kernel of an argmax or argmin stage."""
    return line_kernel(ExtremeKernel, stage, program, target)


class ExtremeKernel(LineKernel):
    """Emits one look through a line, a vector at a time."""

    short_line, short_threads, repeats = 4096, 128, False

    def __init__(self, host: HostKernel):
        super().__init__(host)
        self.lanes = most_lanes(host.stage, host.program)

    def line(self, e: DeviceEmitter, x: Expression, outer: Sequence[Index]) -> None:
        """The index of the line's most extreme element."""
        host = self.host
        best = self.across(e, self._own(e, x, outer))
        with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
            place = [*outer, 0] if host.node["keep"] else outer
            buffer = host.results[0]
            x.store(buffer, place or [0] * buffer.type.rank, best[1])

    def better(self, e: DeviceEmitter, a: Best, b: Best) -> Best:
        """The more extreme of two; of equals the first (or last) in the line."""
        build = e.b
        more = build.icmp_signed("<" if self.host.node.op == "argmin" else ">", b[0], a[0])
        beside = build.icmp_signed(">" if self.host.node["last"] else "<", b[1], a[1])
        chosen = build.or_(more, build.and_(build.icmp_signed("==", a[0], b[0]), beside))
        return build.select(chosen, b[0], a[0]), build.select(chosen, b[1], a[1])

    def _own(self, e: DeviceEmitter, x: Expression, outer: Sequence[Index]) -> Best:
        """The best of this thread's elements."""
        node, source = self.host.node, self.host.source
        size = x.dim(source.shape[-1])
        width = whole_lanes(self.lanes, size)
        start = [order_limit(source, node.op == "argmin"), i64(0)]
        first = x.index(e.thread) * width
        with x.fold(first, size, start, width * self.threads) as (i, (key, where), finish):
            vector = x.value(source, [*outer, i], width)
            best = (key, where)
            for lane in range(width):
                value = e.b.extract_element(vector, i32(lane)) if width > 1 else vector
                own = order_key(e, source, value, nan_is_least=node.op == "argmin")
                best = self.better(e, best, (own, x.emit_index(i + lane)))
            finish(list(best))
        key, where = finish.results
        return key, where
