"""Attention on the host: flash style, so that the matrix of scores is never stored.

A tile is a block of queries of one sequence times one kv head: attention_tiles.py. Floors: prefill
is bound by its multiply-adds, decode by reading the cache once: all heads of a group share what is
read, and a tile of one query widens cached values in registers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import Multiplier, fill
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.host.attention_sources import KEYS, Geometry, PagedSource, make_source
from llmc.codegen.host.attention_tiles import ManyQueries, Scratch, SingleQuery
from llmc.codegen.host.attention_views import result_view
from llmc.codegen.host.kernel import Frame, Worker
from llmc.codegen.llvm import Emitter, i64
from llmc.ir.dims import Dim
from llmc.ir.graph import Node
from llmc.ir.program import Program, Stage, unsupported

_OPS = ("paged_attention", "packed_attention", "attention")
_LOG2_E = math.log2(math.e)


class AttentionKernel:
    """A stage of kind "attention": paged_attention, packed_attention or attention.

    The operands may be movement (slices, reshapes, transposes) of buffers, and movement and a cast
    may follow; anything else raises CompileError.
    """

    def __init__(self, stage: Stage, program: Program, target: object):
        self.stage = stage
        nodes = [node for node in stage.body.nodes() if node.op in _OPS]
        if len(nodes) != 1:
            raise unsupported(stage, f"holds {len(nodes)} attention ops, not one")
        self.node = node = nodes[0]
        lanes = program.capabilities.vector_lanes
        self.geometry = g = _geometry(stage, node, lanes)
        self.source = make_source(stage, program, node, g)
        self.result = Operand(program.buffers[stage.results[0]],
                              result_view(stage, stage.body, node))
        has_mask = node.op == "attention" and len(node.inputs) == 4
        self.mask = _mask_operand(stage, program, node) if has_mask else None
        self.multiplier = Multiplier(lanes)
        self.pairs = (program.capabilities.bf16_dot and self.source.has_pairs
                      and g.size % 2 == 0)
        self.layout = Scratch.of(g)
        self.scratch_bytes: int | Dim = self.layout.table + self.source.packing.table_bytes
        # With an additive mask scores stay in natural units: -FLT_MAX * log2(e) would overflow.
        self.unit = 1.0 if self.mask is not None else _LOG2_E
        self.softcap: float = node["softcap"]

    # ---- the four answers -------------------------------------------------------------------

    def tiles(self, e: Emitter, frame: Frame) -> ir.Value:
        """Blocks of queries times kv heads, i64."""
        return e.b.mul(self.source.packing.blocks(e, frame), i64(self.geometry.kv_heads))

    def setup(self, e: Emitter, frame: Frame, worker: Worker) -> None:
        """Lists the blocks, and clears what pads values to whole vectors."""
        self.source.packing.fill_table(e, frame, e.offset(worker.scratch, self.layout.table))
        if self.geometry.padded != self.geometry.value_size:
            values = e.offset(worker.scratch, self.layout.values)
            fill(e, values, KEYS * self.geometry.padded, 0.0, self.geometry.lanes)

    def tile(self, e: Emitter, frame: Frame, worker: Worker, tile: ir.Value) -> None:
        """All keys for one block of queries and one kv head."""
        packing = self.source.packing
        blocks = packing.blocks(e, frame)
        head = e.b.udiv(tile, blocks)
        table = e.offset(worker.scratch, self.layout.table)
        number = _fold_over(e, e.b.urem(tile, blocks), blocks)
        block = packing.block(e, frame, table, number, head)
        least = 1
        if isinstance(self.source, PagedSource):
            least = 2
            with e.b.if_then(e.b.icmp_signed("==", block.count, i64(1))):
                SingleQuery(self, e, frame, worker, block, self.geometry.group).emit()
        with e.b.if_then(e.b.icmp_signed(">=", block.count, i64(least))):
            rows = e.b.mul(block.count, i64(self.geometry.group))
            ManyQueries(self, e, frame, worker, block, rows).emit()


def _fold_over(e: Emitter, index, count) -> ir.Value:
    """0, count - 1, 1, count - 2, ...: with causal masks late blocks cost more than early ones, and
    so every run of consecutive tiles costs about the same."""
    half = e.b.lshr(index, i64(1))
    from_end = e.b.sub(e.b.sub(count, i64(1)), half)
    odd = e.b.icmp_signed("==", e.b.and_(index, i64(1)), i64(1))
    return e.b.select(odd, from_end, half)


def _geometry(stage: Stage, node: Node, lanes: int) -> Geometry:
    query, key, value = node.inputs[:3]
    head_axis = 1 if node.op != "paged_attention" else 2
    heads, size = query.shape[1], query.shape[-1]
    kv_heads = key.shape[head_axis]
    value_size = value.shape[-1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)
            and isinstance(value_size, int)):
        raise unsupported(stage, "the number of heads and their size must be constants")
    if heads % kv_heads:
        raise unsupported(stage, f"{heads} heads over {kv_heads} kv heads")
    for tensor in (query, key, value):
        if tensor.dtype.bits > 32:
            raise unsupported(stage, f"attention sums in f32: no {tensor.dtype} operands")
    causal = node.op == "paged_attention" or node["causal"]
    return Geometry(heads, kv_heads, size, value_size, lanes, node["window"], causal)


def _mask_operand(stage: Stage, program: Program, node: Node) -> Operand:
    mask = Operand.of(stage, program, node.inputs[3])
    return replace(mask, view=mask.view.broadcast(
        (*node.inputs[0].shape[:3], node.inputs[1].shape[2])))
