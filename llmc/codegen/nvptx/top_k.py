"""top_k along the last axis: a block for each line, a warp where lines are short (routers' are).

Each of the k scans takes the greatest of what comes after the one before it: threads look through
every n-th element, which the first scan has brought into the cache, then put their best together.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.codegen.expr import Expression, operand_sources
from llmc.codegen.host.rows import unflatten
from llmc.codegen.host.single import AlongAxisKernel as HostKernel
from llmc.codegen.host.single import order_key, order_limit
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I64, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.single import AlongAxisKernel
from llmc.codegen.target import Target
from llmc.ir.dims import Dim, maximum, product
from llmc.ir.program import Program, Stage

SHORT_LINE = 1024  # elements: up to here a warp suffices
NOTHING = (1 << 63) - 1  # the index that stands for no element

Best = tuple[ir.Value, ir.Value]  # key and index


def top_k(stage: Stage, program: Program, target: Target) -> TopKKernel | AlongAxisKernel:
    """The kernel of a top_k stage."""
    host = HostKernel(stage, program, target)
    if host.axis != host.source.rank - 1:
        return AlongAxisKernel(stage, program, target)
    return TopKKernel(host)


class TopKKernel:
    """host: what is known of the stage."""

    shared_bytes = 0

    def __init__(self, host: HostKernel):
        self.host = host
        size = host.source.shape[-1]
        self.threads = WARP if isinstance(size, int) and size <= SHORT_LINE else 1024

    def blocks(self) -> Dim:
        return maximum(1, product(self.host.outer))

    def emit(self, e: DeviceEmitter, frame: DeviceFrame) -> None:
        """The line of this block."""
        host = self.host
        with e.b.if_then(e.b.icmp_signed("<", e.block, frame.dim(product(host.outer)))):
            sources = operand_sources(host.stage.body, host.stage.operands, host.program.buffers)
            x = Expression(e, frame, sources, 1)
            outer = unflatten(x, host.outer, x.index(e.block))
            first = [order_limit(host.source, True), i64(-1)]
            with x.fold(0, x.dim(host.node["k"]), first) as (rank, (key, where), finish):
                best = self._across(e, self._own(e, x, outer, (key, where)))
                number = x.emit_index(rank)
                with e.b.if_then(e.b.icmp_signed("==", e.thread, i64(0))):
                    self._store(x.fresh(), e.block, number, best[1])
                finish(list(best))

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

    def _across(self, e: DeviceEmitter, best: Best) -> Best:
        """The block's best, in every thread."""
        best, warps = self._across_warp(e, best), self.threads // WARP
        if warps == 1:
            return best
        keys, places = e.shared(best[0].type, warps), e.shared(I64, warps)
        warp, lane = e.b.lshr(e.thread, i64(5)), e.b.and_(e.thread, i64(WARP - 1))
        e.store(best[0], e.offset(keys, warp, best[0].type))
        e.store(best[1], e.offset(places, warp, I64))
        e.barrier()
        best = (e.load(e.offset(keys, lane, best[0].type), best[0].type),
                e.load(e.offset(places, lane, I64), I64))
        e.barrier()
        return self._across_warp(e, best)

    def _across_warp(self, e: DeviceEmitter, best: Best) -> Best:
        step = WARP // 2
        while step:
            other = (e.shuffle(best[0], step), e.shuffle(best[1], step))
            first = self._before(e, other, best)
            best = (e.b.select(first, other[0], best[0]), e.b.select(first, other[1], best[1]))
            step //= 2
        return best

    def _store(self, x: Expression, line: ir.Value, rank: ir.Value, where: ir.Value) -> None:
        """The element taken: its value and its index."""
        results, outer = self.host.results, unflatten(x, self.host.outer, x.index(line))
        place = [*outer, x.index(rank)]
        if 0 in results:
            x.store(results[0], place, x.value(self.host.source, [*outer, x.index(where)]))
        if 1 in results:
            x.store(results[1], place, where)
