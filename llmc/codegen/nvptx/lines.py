"""A block for each line along the last axis: what argmax, argmin and top_k have in common.

Threads look for the best of every n-th vector, then warps by shuffles, then the block in shared
memory. What is compared is a pair (key, index), so that the first (or last) of equals wins whatever
the order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.rows import unflatten
from llmc.codegen.host.single import AlongAxisKernel as HostKernel
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I64, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.single import AlongAxisKernel
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, maximum, product
from llmc.ir.program import Program, Stage

THREADS = 1024

Best = tuple[ir.Value, ir.Value]  # key and index


class LineKernel(ABC):
    """host: what is known of the stage. Lines of up to `short_line` elements get a block of
    `short_threads`, a warp or more; `repeats`: the best is asked for more than once."""

    shared_bytes = 0
    lanes = 1
    short_line: int
    short_threads: int
    repeats: bool

    def __init__(self, host: HostKernel):
        self.host = host
        size = host.source.shape[-1]
        is_short = isinstance(size, int) and size <= self.short_line
        self.threads = self.short_threads if is_short else THREADS

    @abstractmethod
    def line(self, e: DeviceEmitter, x: Expression, outer: Sequence[Index]) -> None:
        """Emit the work on the line with these leading indices, in every thread of its block."""

    @abstractmethod
    def better(self, e: DeviceEmitter, a: Best, b: Best) -> Best:
        """The better one of two."""

    def blocks(self) -> Dim:
        """One for each line."""
        return maximum(1, product(self.host.outer))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The line of this block."""
        host = self.host
        with e.b.if_then(e.b.icmp_signed("<", e.block, frame.dim(product(host.outer)))):
            sources = operand_sources(host.stage.body, host.stage.operands, host.program.buffers)
            x = Expression(e, frame, sources, self.lanes)
            self.line(e, x, unflatten(x, host.outer, x.index(e.block)))

    def across(self, e: DeviceEmitter, best: Best) -> Best:
        """The best of all threads, in every thread of the first warp; in all if it repeats."""
        best, warps = self._across_warp(e, best), self.threads // WARP
        if warps == 1:
            return best
        keys, places = e.shared(best[0].type, warps), e.shared(I64, warps)
        warp = e.b.lshr(e.thread, i64(5))
        e.store(best[0], e.offset(keys, warp, best[0].type))
        e.store(best[1], e.offset(places, warp, I64))
        e.barrier()
        lane = e.minimum(e.b.and_(e.thread, i64(WARP - 1)), i64(warps - 1))
        best = (e.load(e.offset(keys, lane, best[0].type), best[0].type),
                e.load(e.offset(places, lane, I64), I64))
        if self.repeats:
            e.barrier()
        return self._across_warp(e, best)

    def _across_warp(self, e: DeviceEmitter, best: Best) -> Best:
        step = WARP // 2
        while step:
            best = self.better(e, best, (e.shuffle(best[0], step), e.shuffle(best[1], step)))
            step //= 2
        return best


def line_kernel(kind: type[LineKernel], stage: Stage, program: Program, target: Target
                ) -> LineKernel | AlongAxisKernel:
    """The kernel of a stage: of that kind where its axis is the last one."""
    host = HostKernel(stage, program, target)
    if host.axis != host.source.rank - 1:
        return AlongAxisKernel(stage, program, target)
    return kind(host)
