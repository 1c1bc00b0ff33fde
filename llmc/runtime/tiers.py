"""The rules of specialisation that were measured: which schedules are worth trying for which
shapes, on which target, and how traffic of many shapes is cut into ranges.

A schedule is what lowering is told instead of the target's own capabilities ({}: nothing). Trials
decide; these tables only say what to try, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

Schedule = Mapping[str, int]

EXPECTED_GAIN = 0.05  # share of the time that code of its own saves a shape, before any was tried
SPARE_SHARE = 0.05  # of a second of serving that a compile costs where it has a core to itself
MOST_FEW = 16  # tokens up to which a matmul may prepare its own rows instead of a stage before it
MOST_COUNTS = 32  # numbers of tokens that ranges are chosen by: the hottest
MOST_DECODING = 64  # sequences up to which attention takes every token as a query of its own


@dataclass(frozen=True)
class Tier:
    """Tokens low..high: the schedules to try for code of exactly one shape."""

    low: int
    high: int | None
    schedules: tuple[Schedule, ...]


# Zen 3, 1B shapes and the embedded model (docs/specialisation.md). few_rows 0: no product prepares
# its own rows, which reads the weights of a large model 1 to 6 % faster where only the logits do.
# Small models have a stage and a barrier less for each product where all do, and gain 4 to 6 %.
# Tiles have even heights in generic code too.
HOST = (
    Tier(1, 4, ({}, {"few_rows": 0})),
    Tier(5, MOST_FEW, ({"few_rows": 0}, {"few_rows": MOST_FEW})),
    Tier(MOST_FEW + 1, None, ({"few_rows": 0}, {})),
)
# The generic code has a kernel for each range of rows already, and skips those of other ranges.
DEVICE = (Tier(1, None, ({},)),)


def compile_cost(seconds: float, cores: int, threads: int) -> float:
    """Seconds of serving that a compile takes away: it has one core, at the lowest priority.
    threads: those of a step; a GPU's steps have none."""
    return seconds * (SPARE_SHARE if threads < cores else 1.0 / cores)


def find_tier(tiers: Sequence[Tier], tokens: int) -> Tier:
    """The tier that steps of so many tokens are in."""
    for tier in tiers:
        if tier.low <= tokens and (tier.high is None or tokens <= tier.high):
            return tier
    return tiers[-1]


def exact_schedules(on_device: bool, values: Mapping[str, int]) -> list[Schedule]:
    """What to try for code of one shape. values: of its symbols."""
    tokens = values.get("tokens", 0)
    if not on_device:
        return list(find_tier(HOST, tokens).schedules)
    schedules = list(find_tier(DEVICE, tokens).schedules)
    if 8 < tokens == values.get("sequences", 0) <= MOST_DECODING:
        schedules.insert(0, {"few_rows": tokens})  # decode alone: attention without prefill's part
    return schedules


def range_schedules(on_device: bool, high: int) -> list[Schedule]:
    """What to try for code of up to `high` tokens."""
    few = [{"few_rows": high}] if high <= MOST_FEW and not on_device else []
    return [*few, {}]


def tile_of(on_device: bool, high: int) -> int:
    """Rows that code for up to `high` tokens works on at a time."""
    return min(high, 128 if on_device else 6)


def waste(tokens: int, tile: int) -> float:
    """Share of the work on `tokens` rows that a tile's rows beyond the end are."""
    return -tokens % tile / tokens


def waste_of(tokens: int, on_device: bool) -> float:
    """Share of the products' work on so many tokens that is for rows which are not there. A GPU
    has tiles of 8 or 64 rows; a host deals rows out evenly to tiles of 3 to 6 (with AVX-512 6 to
    12), or has 1, 2 or 4 at once."""
    if on_device:
        return waste(tokens, 8 if tokens <= MOST_FEW else 64)
    if tokens <= 4:
        return (-tokens % 4 if tokens > 2 else 0) / tokens
    own = -(-tokens // -(-tokens // 6))
    rest = tokens % own
    return (max(3, rest) - rest) / tokens if rest else 0.0


def choose_ranges(seconds: Mapping[int, float], most: int, on_device: bool = False
                  ) -> list[tuple[int, int]]:
    """At most `most` ranges of tokens that together hold every count seen (of very many, the
    hottest), such that least time goes to rows that are not there. seconds: tokens -> time spent on
    them.

    The best ranges end at counts that were seen, so a table over (counts, ranges) finds them.
    """
    hottest = sorted(seconds, key=lambda count: -seconds[count])[:MOST_COUNTS]
    counts = sorted(count for count in hottest if count > 0)

    @cache
    def cost(first: int, last: int) -> float:
        tile = tile_of(on_device, counts[last])
        return sum(seconds[count] * waste(count, tile) for count in counts[first:last + 1])

    # best[n]: (cost, starts of ranges) of the first n counts
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [
        (cost(0, last), (0,)) for last in range(len(counts))]
    for _ in range(most - 1):
        best = [best[0]] + [
            min([best[last + 1], *((best[first][0] + cost(first, last), (*best[first][1], first))
                                   for first in range(1, last + 1))])
            for last in range(len(counts))]
    starts = (*best[-1][1], len(counts))
    return [(counts[first], counts[after - 1]) for first, after in pairwise(starts)]
