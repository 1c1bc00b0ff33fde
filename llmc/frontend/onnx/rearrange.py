"""Operators that rearrange blocks and sequences."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter
from llmc.ir.dtypes import i64

# Where the blocks of a depth come from, and go: axes of [batch, ...split depth..., height, width].
DEPTH_TO_SPACE = {"DCR": (0, 3, 4, 1, 5, 2), "CRD": (0, 1, 4, 2, 5, 3)}
SPACE_TO_DEPTH = {"DCR": (0, 3, 5, 1, 2, 4), "CRD": (0, 1, 3, 5, 2, 4)}


def _mode(call: Call) -> str:
    mode = str(call.attribute("mode", "DCR"))
    if mode not in DEPTH_TO_SPACE:
        raise call.error(f"mode={mode!r} is neither 'DCR' nor 'CRD'")
    return mode


@converter("DepthToSpace", inputs=1)
def depth_to_space(call: Call) -> Result:
    x, block, mode = call.input(0), call.required("blocksize"), _mode(call)
    if x.rank != 4:
        raise call.error(f"its input has rank {x.rank}, not 4")
    batch, depth, height, width = x.shape
    channels = call.divide(depth, block * block)
    split = (block, block, channels) if mode == "DCR" else (channels, block, block)
    parts = call.reshape(x, (batch, *split, height, width))
    moved = call.transpose(parts, DEPTH_TO_SPACE[mode])
    return call.reshape(moved, (batch, channels, height * block, width * block))


@converter("SpaceToDepth", inputs=1)
def space_to_depth(call: Call) -> Result:
    x, block, mode = call.input(0), call.required("blocksize"), _mode(call)
    if x.rank != 4:
        raise call.error(f"its input has rank {x.rank}, not 4")
    batch, channels, height, width = x.shape
    rows, columns = call.divide(height, block), call.divide(width, block)
    parts = call.reshape(x, (batch, channels, rows, block, columns, block))
    moved = call.transpose(parts, SPACE_TO_DEPTH[mode])
    return call.reshape(moved, (batch, channels * block * block, rows, columns))


@converter("ReverseSequence", inputs=2)
def reverse_sequence(call: Call) -> Result:
    """The first lengths[b] items along the time axis backwards, the others where they are."""
    x, lengths = call.input(0), call.cast(call.input(1), i64)
    time = call.axis(call.attribute("time_axis", 0), x.rank)
    batch = call.axis(call.attribute("batch_axis", 1), x.rank)
    if time == batch or lengths.rank != 1:
        raise call.error("its axes must differ, and the lengths have one axis")
    call.require_equal(lengths.shape[0], x.shape[batch], "lengths")

    def along(axis: int) -> tuple[int, ...]:
        return tuple(other for other in range(x.rank) if other != axis)

    place = call.unsqueeze(call.iota(x.shape[time]), along(time))
    length = call.unsqueeze(lengths, along(batch))
    mirrored = call.binary("sub", call.shifted(length, -1), place)
    index = call.where(call.binary("less", place, length), mirrored, place)
    return call.make("gather_elements", x, call.broadcast(index, x.shape), axis=time)
