"""Decode attention whose blocks join what they found through each other's shared memory.

On Hopper the blocks of a cluster can read it: a short context needs no trip through device memory,
which takes longer than reading its keys and values.
"""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.llvm import F32, I32, I64, f32, i32, i64, splat_constant
from llmc.codegen.nvptx.attention_decode import (
    CLUSTER,
    VECTOR,
    VECTOR_TYPE,
    Block,
    DecodeKernel,
    Work,
)
from llmc.codegen.nvptx.attention_instructions import barrier, maximum, shared_address
from llmc.codegen.nvptx.attention_tensor import BAND
from llmc.codegen.nvptx.kernel import DeviceEmitter, DeviceFrame
from llmc.codegen.nvptx.matmul_ptx import cluster_barrier, load_remote
from llmc.ir.dims import Dim


class ClusterDecodeKernel(DecodeKernel):
    """As DecodeKernel, for few queries and short contexts on Hopper; tokens are queries."""

    cluster = CLUSTER
    attributes = {"nvvm.cluster_dim": CLUSTER}  # noqa: RUF012 (never changed)

    def _use(self, clusters_first: bool) -> Dim:
        return self.suits_clusters()

    def _split_bound(self, places: Dim) -> Dim:
        return 1  # the cluster is the split

    def block(self, e: DeviceEmitter, frame: DeviceFrame, work: Work) -> Block:
        return _ClusterBlock(self, e, frame, work)


class _ClusterBlock(Block):
    """Joins the warps' results into the first warp's place, then those of all blocks: each block
    finishes a part of the components."""

    def _join_warps(self) -> None:
        e = self.e
        self._join_in_place()
        cluster_barrier(e)

        def finish(row: ir.Value, component: ir.Value) -> None:
            factors, total = self._block_shares(row)
            inverse = e.splat(e.b.fdiv(f32(1.0), total), VECTOR)
            value = self._sum_of_blocks(row, component, factors)
            self._store(row, component, e.b.fmul(value, inverse))

        self._each_vector_of_rank(finish)
        cluster_barrier(e)  # nobody leaves while others read

    def _join_in_place(self) -> None:
        e = self.e
        size = i64(self.geometry.value_size)

        def join(row: ir.Value, component: ir.Value) -> None:
            place = e.b.add(e.b.mul(row, size), component)
            e.store(self._joined(row, component, whole=False),
                    e.offset(self._warp_floats(0, "sums"), place, F32), 16)

        self._each_vector(join)
        row = e.b.and_(e.b.zext(self.thread, I64), i64(BAND - 1))
        _, high, total = self._warp_shares(row)
        barrier(e)
        e.store(high, e.offset(self._warp_floats(0, "maxima"), row, F32))
        e.store(total, e.offset(self._warp_floats(0, "totals"), row, F32))

    def _each_vector_of_rank(self, emit) -> None:
        """emit(row, component) for this block's part of every 4th component."""
        e, vectors = self.e, self.geometry.value_size // VECTOR
        count = e.b.mul(self._heads(), i64(vectors))
        each = e.b.udiv(e.b.add(count, i64(CLUSTER - 1)), i64(CLUSTER))
        first = e.b.mul(e.b.zext(self.work.rank, I64), each)
        last = e.minimum(e.b.add(first, each), count)
        start = e.b.add(first, e.b.zext(self.thread, I64))
        with e.loop(start, last, self.kernel.threads, "place") as index:
            short = e.b.trunc(index, I32)
            component = e.b.mul(e.b.urem(short, i32(vectors)), i32(VECTOR))
            emit(e.b.zext(e.b.udiv(short, i32(vectors)), I64), e.b.zext(component, I64))

    def _remote(self, field: str, place: ir.Value, lanes: int) -> list[ir.Value]:
        """Every block's f32 (lanes: 1 or 4) at a place of a field of its first warp."""
        e, size = self.e, self.geometry.value_size
        start = {"sums": 0, "maxima": BAND * size, "totals": BAND * (size + 1)}[field]
        offset = e.b.shl(e.b.add(e.b.trunc(place, I32), i32(start)), i32(2))
        address = e.b.add(shared_address(e), offset)
        return [load_remote(e, address, rank, lanes) for rank in range(CLUSTER)]

    def _block_shares(self, row: ir.Value) -> tuple[list[ir.Value], ir.Value]:
        """(what rescales each block's sums, total) of a row."""
        e = self.e
        maxima, totals = self._remote("maxima", row, 1), self._remote("totals", row, 1)
        high = maxima[0]
        for another in maxima[1:]:
            high = maximum(e, high, another)
        factors = [self.kernel.softmax.rescale(e, each, high) for each in maxima]
        total = f32(0.0)
        for factor, each in zip(factors, totals, strict=True):
            total = e.fma(factor, each, total)
        return factors, total

    def _sum_of_blocks(self, row: ir.Value, component: ir.Value, factors: list[ir.Value]
                       ) -> ir.Value:
        e = self.e
        place = e.b.add(e.b.mul(row, i64(self.geometry.value_size)), component)
        result = splat_constant(VECTOR_TYPE, 0.0)
        for value, factor in zip(self._remote("sums", place, VECTOR), factors, strict=True):
            result = e.fma(value, e.splat(factor, VECTOR), result)
        return result
