"""top_k along the last axis: a block for each line, a warp where lines are short (routers' are).

Each of the k scans takes the greatest of what comes after the one before it: threads look through
every n-th element, which the first scan has brought into the cache, then put their best together.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.codegen.expr import Expression
from llmc.codegen.host.rows import unflatten
from llmc.codegen.host.single import order_key, order_limit
from llmc.codegen.integers import Index
from llmc.codegen.llvm import i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter
from llmc.codegen.nvptx.lines import Best, LineKernel, line_kernel
from llmc.codegen.nvptx.single import AlongAxisKernel
from llmc.codegen.target import Target
from llmc.ir.program import Program, Stage

NOTHING = (1 << 63) - 1  # the index that stands for no element


def top_k(stage: Stage, program: Program, target: Target) -> LineKernel | AlongAxisKernel:
    """The kernel of a top_k stage."""
    return line_kernel(TopKKernel, stage, program, target)


class TopKKernel(LineKernel):
    """Emits k scans of a line."""

    short_line, short_threads, repeats = 1024, WARP, True

    def line(self, e: DeviceEmitter, x: Expression, outer: Sequence[Index]) -> None:
        """The first k of the line."""
        first = [order_limit(self.host.source, True), i64(-1)]
        with x.fold(0, x.dim(self.host.node["k"]), first) as (rank, (key, where), finish):
            best = self.across(e, self._own(e, x, outer, (key, where)))
            number = x.emit_index(rank)
            with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
                self._store(x.fresh(), e.block, number, best[1])
            finish(list(best))

    def better(self, e: DeviceEmitter, a: Best, b: Best) -> Best:
        """The one that comes first."""
        first = self._before(e, b, a)
        return e.b.select(first, b[0], a[0]), e.b.select(first, b[1], a[1])

    def _own(self, e: DeviceEmitter, x: Expression, outer: Sequence[Index], last: Best) -> Best:
        """The best of this thread's elements that come after the last one taken."""
        source, b = self.host.source, e.b
        start = [order_limit(source, False), i64(NOTHING)]
        with x.fold(x.index(e.thread), x.dim(source.shape[-1]), start, self.threads) as (
                i, (key, where), finish):
            own = (order_key(e, source, x.value(source, [*outer, i])), x.emit_index(i))
            better = b.and_(self._before(e, last, own), self._before(e, own, (key, where)))
            finish([b.select(better, new, old)
                    for new, old in zip(own, (key, where), strict=True)])
        key, where = finish.results
        return key, where

    def _before(self, e: DeviceEmitter, a: Best, b: Best) -> ir.Value:
        """Whether a comes before b: the greater one, of equals the first in the line."""
        beside = e.b.and_(e.b.icmp_signed("==", a[0], b[0]), e.b.icmp_signed("<", a[1], b[1]))
        return e.b.or_(e.b.icmp_signed(">", a[0], b[0]), beside)

    def _store(self, x: Expression, line: ir.Value, rank: ir.Value, where: ir.Value) -> None:
        """The element taken: its value and its index."""
        results, outer = self.host.results, unflatten(x, self.host.outer, x.index(line))
        place = [*outer, x.index(rank)]
        if 0 in results:
            x.store(results[0], place, x.value(self.host.source, [*outer, x.index(where)]))
        if 1 in results:
            x.store(results[1], place, where)
