"""Which tile a product of many rows is cut into: the one whose time an estimate says is least.

The estimate counts waves of blocks; within a wave, a chunk of k costs the longer of its arithmetic
and its bytes from L2. The constants make the rule's choices the best ones that were measured at
layer shapes on an H100, up to 64 rows on an H200 (benchmarks/gpu_matmul.py --tune): within 1 % in
the geometric mean, and within 7 % each. mma.sync was never the best where there is wgmma.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
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
FEW_ENDS, STEP = (32,), 64  # rows that ranges may end at: these, and multiples
MOST_TILINGS = 7  # that a product of any number of rows is compiled for
TILING_COST = 0.0002  # what a further one must save, in shares of the time over rows

# Per multiprocessor and microsecond.
WGMMA_FLOPS, MMA_FLOPS = 7.6e6, 2.4e6
L2_BYTES = 96e3
MEMORY_BYTES = 25e3
NARROW = 21.5  # columns more that a tile's arithmetic costs: it reads its rows once for all columns
LONELY = 1.76  # the same of one warp group, where two would hide each other's waits
CHUNK_TIME = 0.039  # microseconds that every chunk takes at least,
SHALLOW, DEEP = 0.04, 6  # and this share more for each stage that the ring has less than so many
BLOCK_TIME = 1.5  # microseconds to start a block and fill its stages
FINISH_TIME = 0.019  # microseconds to finish a KiB of sums
EXCHANGE_TIME = 0.144  # microseconds for a KiB of sums from other blocks of the cluster
OVERLAP = 6  # near the greater of streaming and computing: they hide each other but partly
# Blocks that run at a time by the size of a cluster, each of which must fit into one of the GPU's
# parts: they have 16 or 18 multiprocessors, or less.
_SLOTS = {1: PROCESSORS, 2: PROCESSORS, 4: 120}

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


def choose_ranges(product: Product, architecture: str, first: int, last: int
                  ) -> dict[Tiling, list[tuple[int, int]]]:
    """At most MOST_TILINGS tilings, and the ranges (first, last row) of first..last for which each
    is the best of them.

    They are chosen such that least time is lost against the best of all, weighed by 1 / rows:
    traffic has as many steps of 100 to 200 rows as of 1000 to 2000. Within STEP rows an estimate is
    the same, as heights are multiples of it; beyond MANY_ROWS they are chosen for so many.
    """
    ends = [end for end in (*FEW_ENDS, *range(STEP, MANY_ROWS, STEP)) if first <= end < last]
    counts = [*ends, min(last, MANY_ROWS)]
    weights = [1 / count for count in counts[:-1]] + [1 / STEP]  # the last one is for all beyond
    lost = {}
    for tiling in tilings(product, architecture):
        lost[tiling] = [estimate(product, tiling, count) for count in counts]
    least = [min(column) for column in zip(*lost.values(), strict=True)]
    for times in lost.values():
        times[:] = [weight * (time / best - 1)
                    for time, best, weight in zip(times, least, weights, strict=True)]
    chosen = _choose_few(lost)
    ranges: dict[Tiling, list[tuple[int, int]]] = {}
    for number, (start, end) in enumerate(zip([first, *(end + 1 for end in ends)], [*ends, last],
                                              strict=True)):
        own = ranges.setdefault(min(chosen, key=lambda tiling: lost[tiling][number]), [])
        if own and own[-1][1] == start - 1:
            start, _ = own.pop()
        own.append((start, end))
    return ranges


def _choose_few(lost: Mapping[Tiling, Sequence[float]]) -> list[Tiling]:
    """The tilings that together lose least: added one by one, then exchanged one by one. lost: by
    each at every count of rows."""
    chosen: list[Tiling] = []
    together = [inf] * len(next(iter(lost.values())))
    while len(chosen) < MOST_TILINGS:
        cost, _, best = min((sum(map(min, together, own)), number, tiling)
                            for number, (tiling, own) in enumerate(lost.items()))
        if sum(together) - cost < TILING_COST:
            break
        chosen.append(best)
        together = list(map(min, together, lost[best]))
    for place in 2 * list(range(len(chosen))):
        others = [lost[tiling] for number, tiling in enumerate(chosen) if number != place]
        together = [min(column) for column in zip(*others, strict=True)] or [inf] * len(together)
        chosen[place] = min(lost, key=lambda tiling: sum(map(min, together, lost[tiling])))
    return chosen


# rows, columns, threads, warps, blocks that the registers of a multiprocessor are enough for
_MMA = [(128, 128, 256, (2, 4), 1), (128, 64, 256, (4, 2), 2), (64, 64, 128, (2, 2), 2),
        (64, 32, 128, (2, 2), 2), (32, 64, 128, (1, 4), 2), (32, 32, 128, (2, 2), 2)]
_WGMMA = [(rows, columns, 2 * rows, None, 1) for rows, many in (
    (64, (64, 96, 128, 192, 256)), (128, (64, 96, 128, 160, 192, 224, 256)),
    (192, (64, 96, 128, 256)), (256, (96, 128)), (320, (128,))) for columns in many]


def tilings(product: Product, architecture: str) -> Iterator[Tiling]:
    """Every tiling that fits the architecture."""
    shared = _SHARED.get(architecture, _LEAST_SHARED)
    splits = tuple(_SLOTS) if architecture in _CLUSTERS else (1,)
    choices = _WGMMA if architecture == "sm_90a" else _MMA
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
    slots = _SLOTS[tiling.split]
    active = min(tiling.resident, -(-blocks // slots))
    waves = -(-blocks // (slots * active))
    flops = 2 * shape.rows * (shape.columns + NARROW) * CHUNK * 8 // product.dtype.bits
    rate = MMA_FLOPS if tiling.warps else WGMMA_FLOPS / (LONELY if shape.rows == 64 else 1)
    chunk = max(active * flops / rate, active * shape.stage_bytes / L2_BYTES,
                CHUNK_TIME * (1 + SHALLOW * max(0, DEEP - shape.stages)))
    sums = shape.rows * shape.columns * 4 / 1024 / tiling.split
    extra = BLOCK_TIME + (FINISH_TIME + EXCHANGE_TIME * (tiling.split - 1)) * sums
    time = waves * (chunk_count(product) / tiling.split * chunk + extra)
    columns = product.part_size * product.parts * product.groups
    weight = product.stride * columns * product.dtype.bits // 8
    streaming = weight / MEMORY_BYTES / PROCESSORS + extra
    return (time**OVERLAP + streaming**OVERLAP)**(1 / OVERLAP)
