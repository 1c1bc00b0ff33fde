"""Results of tensor core attention: from the registers of a warp to their rows in memory."""

from __future__ import annotations

import llvmlite.ir as ir

from llmc.codegen.host.attention_blocks import add
from llmc.codegen.host.attention_queries import Operand
from llmc.codegen.llvm import I64, Emitter, i32, i64
from llmc.codegen.nvptx.attention_instructions import global_memory, pack_pair
from llmc.codegen.nvptx.attention_places import Source, Tile
from llmc.codegen.nvptx.attention_tensor import BAND, Lane
from llmc.codegen.nvptx.kernel import DeviceFrame
from llmc.ir.dims import known_multiple
from llmc.ir.dtypes import f32 as single


def stores_pairs(result: Operand) -> bool:
    """Whether two neighbouring components always lie side by side, aligned to both."""
    view = result.view
    return (view.strides[-1] == 1 and known_multiple(view.offset, 2)
            and all(known_multiple(stride, 2) for stride in view.strides[:-1])
            and (result.dtype is single or result.dtype.name in ("f16", "bf16")))


def store_pair(e: Emitter, result: Operand, pointer: ir.Value, offset, low: ir.Value,
               high: ir.Value) -> None:
    """Two f32 to element `offset` of the result and the next."""
    place = e.offset(pointer, e.b.mul(offset, i64(result.dtype.bits // 8)))
    if result.dtype is single:
        pair = ir.Constant(ir.VectorType(low.type, 2), ir.Undefined)
        pair = e.b.insert_element(e.b.insert_element(pair, low, i32(0)), high, i32(1))
        e.store(pair, place, align=8)
        return
    e.store(pack_pair(e, result.dtype, low, high), place, align=4)


def store_rows(e: Emitter, frame: DeviceFrame, source: Source, result: Operand, tile: Tile,
               lane: Lane, first_row: ir.Value, sums) -> None:
    """Stores a warp's sums[band][component / 8] to the rows of the tile from first_row on."""
    pointer = global_memory(e, frame.pointer(result.buffer))
    for band, tiles in enumerate(sums):
        for half in range(2):
            own = e.b.add(e.b.add(first_row, lane.row), i32(band * BAND + 8 * half))
            row = e.b.zext(own, I64)
            exists = e.b.icmp_signed("<", e.b.add(tile.first, row), tile.rows)
            with e.b.if_then(exists):
                place = source.place(e, tile, tile.row(e, row))
                base = add(e, result.offset(e, frame, *place), e.b.zext(lane.column, I64))
                for index, values in enumerate(tiles):
                    store_pair(e, result, pointer, e.b.add(base, i64(8 * index)),
                               values[2 * half], values[2 * half + 1])
