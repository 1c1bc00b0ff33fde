"""Trials: new code beside old on real calls, until it is known whether it is faster.

Calls are paired in time (old, new, new, old, ...), so that what slows both down cancels out. Of the
logarithms of the pairs' ratios, Wilcoxon's signed-rank test gives an interval that holds the true
ratio, whatever the noise is like (it asks only that noise favours neither side): a few disturbed
calls move it little, and a gain of 2 % shows where pairs differ by 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.runtime.artifact import VariantInfo
from llmc.runtime.profile import Shape

WARM_PAIRS = 2  # calls of old and new code before those that count
TRIAL_PAIRS = 12  # calls of old and new code, side by side, that a verdict takes at least
MOST_PAIRS = 384  # where noise hides the answer
LEAST_GAIN = 0.01  # what is certainly less needs no longer trial
CONFIDENCE = 2.33  # standard deviations: either end of the interval is wrong once in 100 trials
MOST_SHAPES = 4096  # of a range that are told apart


class Code(Protocol):
    """A loaded variant, of any target."""

    info: VariantInfo
    calls: int
    seconds: float

    def covers(self, values: Mapping[str, int]) -> bool: ...

    def width(self) -> int: ...


@dataclass(frozen=True)
class Gain:
    """Share of the time that new code saves, negative if it is slower: the estimate, and the ends
    of the interval that it is in; pairs: measured so far."""

    low: float
    middle: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.middle:.1%} ({self.low:.1%} to {self.high:.1%}, {self.pairs} pairs)"


def estimate(ratios: list[float]) -> Gain:
    """The gain that ratios of new to old times say: Hodges and Lehmann's estimate, the median of
    the means of any two (in logarithms), and the interval that belongs to Wilcoxon's test."""
    count = len(ratios)
    logs = np.log(ratios)
    first, second = np.triu_indices(count)
    means = np.sort((logs[first] + logs[second]) / 2.0)
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24.0)
    outside = max(0, math.floor(len(means) / 2.0 - CONFIDENCE * spread))
    low, middle, high = (1.0 - math.exp(value) for value in (
        means[-1 - outside], np.median(means), means[outside]))
    return Gain(low, middle, high, count)


class Pairs:
    """Calls of new and old code, side by side: is the new code faster by more than noise?"""

    def __init__(self, new: Code, pairs: int):
        self.new = new
        self._wanted = pairs

    @property
    def calls(self) -> int:
        """Calls so far, of either."""
        raise NotImplementedError

    def ratios(self) -> list[float]:
        """Time of new over old code, of every pair."""
        raise NotImplementedError

    def seconds(self) -> float:
        """What all calls took."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        return len(self.ratios()) >= self._wanted

    def gain(self) -> Gain:
        """What is known by now; at least one pair must have been measured."""
        return estimate(self.ratios())

    def extend(self, least: float = LEAST_GAIN) -> bool:
        """Take twice as many pairs if noise hides the answer, which is a gain or certainly less
        than `least`; False if more would not help."""
        gain = self.gain()
        if gain.low > 0.0 or gain.high < least or 2 * self._wanted > MOST_PAIRS:
            return False
        self._wanted *= 2
        return True

    def is_faster(self) -> bool:
        """Whether the new code is certainly faster."""
        return self.gain().low > 0.0

    def is_slower(self) -> bool:
        """Whether the new code is certainly slower."""
        return self.gain().high < 0.0


class Trial(Pairs):
    """New code against old for one shape, call by call: old, new, new, old, ...

    The first `warm` pairs warm caches up (a GPU's second step is captured) and do not count.
    """

    def __init__(self, old: Code, new: Code, pairs: int = TRIAL_PAIRS, warm: int = WARM_PAIRS):
        super().__init__(new, pairs)
        self.old, self._warm = old, warm
        self._calls = 0
        self._seconds: tuple[list[float], list[float]] = ([], [])

    @property
    def calls(self) -> int:
        return self._calls

    def pick(self) -> Code:
        """What runs the next call."""
        if self.done:
            return self.old
        self._calls += 1
        return self.new if self._calls % 4 in (2, 3) else self.old

    def observe(self, variant: Code, seconds: float) -> None:
        self._seconds[variant is self.new].append(seconds)

    def seconds(self) -> float:
        return sum(map(sum, self._seconds))

    @property
    def done(self) -> bool:
        return min(map(len, self._seconds)) >= self._wanted + self._warm

    def ratios(self) -> list[float]:
        old, new = self._seconds
        return [b / a for a, b in zip(old[self._warm:], new[self._warm:], strict=False)]


class RangeTrial(Pairs):
    """New code against what runs the shapes of a range: a trial for each shape, judged together.
    Shapes may come too rarely for any pair to be spared."""

    def __init__(self, new: Code, pairs: int = TRIAL_PAIRS):
        super().__init__(new, pairs)
        self._parts: dict[Shape, Trial] = {}

    def part(self, shape: Shape, old: Code) -> Trial | None:
        """The trial of one shape; None when all is known."""
        if self.done:
            return None
        if shape not in self._parts and len(self._parts) < MOST_SHAPES:
            self._parts[shape] = Trial(old, self.new, pairs=1 << 30, warm=0)
        return self._parts.get(shape)

    @property
    def calls(self) -> int:
        return sum(part.calls for part in list(self._parts.values()))

    def seconds(self) -> float:
        return sum(part.seconds() for part in list(self._parts.values()))

    def ratios(self) -> list[float]:
        return [ratio for part in list(self._parts.values()) for ratio in part.ratios()]
