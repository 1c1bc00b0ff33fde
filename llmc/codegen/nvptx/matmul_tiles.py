"""Which tile a product of many rows is cut into: the one whose time an estimate says is least.

The estimate counts waves of blocks; within a wave, a chunk of k costs the longer of its arithmetic
and its bytes from L2. The constants make the rule's choices the best ones that were measured on an
H100 at layer shapes (benchmarks/gpu_matmul.py --tune): within 1 % in the geometric mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import llvmlite.ir as ir

from llmc.codegen.llvm import Emitter
from llmc.codegen.nvptx.matmul_loader import CHUNK, TileShape
from llmc.codegen.nvptx.mma import MmaConsumer
from llmc.codegen.nvptx.product import Product
from llmc.codegen.nvptx.wgmma import WgmmaConsumer

PROCESSORS = 132  # multiprocessors of the GPU that tiles are chosen for
MANY_ROWS = 2048  # what tiles are chosen for where rows are without bound
MOST_STAGES = 12

# Per multiprocessor and microsecond.
WGMMA_FLOPS, MMA_FLOPS = 7.6e6, 3.0e6
L2_BYTES = 126e3
MEMORY_BYTES = 23e3
NARROW = 32  # columns more that a tile's arithmetic costs: it reads its rows once for all columns
LONELY = 1.15  # the same of one warp group, where two would hide each other's waits
CHUNK_TIME = 0.033  # microseconds that every chunk takes at least
BLOCK_TIME = 3.9  # microseconds to start a block, fill its stages, and finish its sums
EXCHANGE_TIME = 0.146  # microseconds for a KiB of sums from other blocks of the cluster

# Shared memory of a multiprocessor; clusters of blocks share out k where there are any.
_SHARED = {"sm_80": 164, "sm_87": 164, "sm_90": 228, "sm_90a": 228, "sm_100": 228}  # KiB
_LEAST_SHARED = 100
_CLUSTERS = ("sm_90", "sm_90a", "sm_100")


@dataclass(frozen=True)
class Tiling:
    """A block's tile; split: blocks (of a cluster) that share out its k; resident: blocks that a
    multiprocessor holds; warps: along rows and columns, None for wgmma."""

    shape: TileShape
    split: int
    resident: int
    warps: tuple[int, int] | None


class Consumer(Protocol):
    """What multiplies the chunks of a tile; see mma and wgmma."""

    lag: int

    def begin(self, e: Emitter, thread: ir.Value) -> list[ir.Value]: ...
    def ready(self, e: Emitter) -> None: ...
    def start(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]: ...
    def finish(self, e: Emitter, stage: ir.Value, sums: list[ir.Value]) -> list[ir.Value]: ...
    def end(self, e: Emitter, sums: list[ir.Value]) -> list[ir.Value]: ...
    def keep(self, e: Emitter, pointer: ir.Value, stride: int, sums: list[ir.Value]) -> None: ...


def make_consumer(tiling: Tiling, name: str) -> Consumer:
    """The arithmetic of a tiling for operands of a dtype."""
    if tiling.warps is None:
        return WgmmaConsumer(tiling.shape, name)
    return MmaConsumer(tiling.shape, name, *tiling.warps)


def chunk_count(product: Product) -> int:
    """Chunks of k."""
    return -(-product.k * product.dtype.bits // 8 // CHUNK)


def choose_tiling(product: Product, architecture: str, rows: int) -> Tiling:
    """The tiling with the least estimated time at so many rows."""
    high = min(rows, MANY_ROWS)
    return min(tilings(product, architecture), key=lambda tiling: estimate(product, tiling, high))


# rows, columns, threads, warps, blocks that the registers of a multiprocessor are enough for
_MMA = [(128, 128, 256, (2, 4), 1), (128, 64, 256, (4, 2), 2), (64, 64, 128, (2, 2), 2),
        (64, 32, 128, (2, 2), 2), (32, 64, 128, (1, 4), 2), (32, 32, 128, (2, 2), 2)]
_WGMMA = [(128, 256, 256, None, 1), (128, 192, 256, None, 1), (128, 128, 256, None, 2),
          (128, 64, 256, None, 2), (64, 256, 128, None, 2), (64, 128, 128, None, 2),
          (64, 64, 128, None, 2)]


def tilings(product: Product, architecture: str) -> Iterator[Tiling]:
    """Every tiling that fits the architecture."""
    shared = _SHARED.get(architecture, _LEAST_SHARED)
    splits = (1, 2, 4, 8) if architecture in _CLUSTERS else (1,)
    choices = _MMA + (_WGMMA if architecture == "sm_90a" else [])
    for rows, columns, threads, warps, most_resident in choices:
        for resident in range(1, most_resident + 1):
            room = (shared // resident - 1) << 10
            stages = min(MOST_STAGES, room // TileShape(rows, columns, threads, 1).stage_bytes)
            if stages < 3 or 4 * rows * (columns + 8) > room:
                continue
            shape = TileShape(rows, columns, threads, stages)
            for split in splits:
                if split == 1 or chunk_count(product) >= 2 * split:
                    yield Tiling(shape, split, resident, warps)


def estimate(product: Product, tiling: Tiling, rows: int) -> float:
    """Microseconds, roughly; rows: of each group."""
    shape = tiling.shape
    tiles = -(-rows // shape.rows) * -(-product.part_size // (shape.columns // product.parts))
    tiles *= product.groups
    blocks = tiles * tiling.split
    active = min(tiling.resident, -(-blocks // PROCESSORS))
    waves = -(-blocks // (PROCESSORS * active))
    flops = 2 * shape.rows * (shape.columns + NARROW) * CHUNK * 8 // product.dtype.bits
    rate = MMA_FLOPS if tiling.warps else WGMMA_FLOPS / (LONELY if shape.rows == 64 else 1)
    chunk = max(active * flops / rate,
                active * shape.stage_bytes / L2_BYTES, CHUNK_TIME)
    exchanged = shape.rows * shape.columns * 4 / 1024 * (tiling.split - 1) / tiling.split
    extra = BLOCK_TIME + EXCHANGE_TIME * exchanged
    time = waves * (chunk_count(product) / tiling.split * chunk + extra)
    columns = product.part_size * product.parts * product.groups
    weight = product.stride * columns * product.dtype.bits // 8
    streaming = weight / MEMORY_BYTES / PROCESSORS + extra
    return (time**6 + streaming**6)**(1 / 6)  # near the greater one, they overlap but partly
