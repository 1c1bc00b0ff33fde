"""Which variant runs a step: a table that is replaced whole, and trials of new code on real calls.

The step path reads `Dispatch.table` once and never waits: whoever changes the table makes a new one
and assigns it. A step that runs holds its variant, so evicted code is freed behind the last step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from llmc.errors import ShapeError
from llmc.runtime.artifact import Manifest, VariantInfo
from llmc.runtime.profile import Profile, Shape

MEMO_SHAPES = 4096
TRIAL_PAIRS = 12  # calls of old and new code, side by side, that a verdict takes at least
MOST_PAIRS = 96  # where noise hides the answer
LEAST_GAIN = 0.01
STEP_SYMBOLS = ("tokens", "sequences", "rows")  # of a language model's step or an encoder's


class Code(Protocol):
    """A loaded variant, of any target."""

    info: VariantInfo
    calls: int
    seconds: float

    def covers(self, values: Mapping[str, int]) -> bool: ...

    def width(self) -> int: ...


class Trial:
    """New code against old for one shape, call by call: old, new, new, old, ...

    The first pair warms caches up and does not count.
    """

    def __init__(self, old: Code, new: Code, pairs: int = TRIAL_PAIRS):
        self.old, self.new = old, new
        self.calls = 0
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self._wanted = pairs + 1

    @property
    def done(self) -> bool:
        return min(len(seconds) for seconds in self._seconds) >= self._wanted

    def pick(self) -> Code:
        """What runs the next call."""
        if self.done:
            return self.old
        self.calls += 1
        return self.new if self.calls % 4 in (2, 3) else self.old

    def observe(self, variant: Code, seconds: float) -> None:
        self._seconds[variant is self.new].append(seconds)

    def gain(self) -> float:
        """Share of the time that the new code saves: median over the pairs; negative if slower."""
        return 1.0 - median(self._ratios())

    def noise(self) -> float:
        """Standard error of the gain."""
        ratios = self._ratios()
        middle = median(ratios)
        spread = 1.4826 * median(abs(ratio - middle) for ratio in ratios)
        return 1.2533 * spread / len(ratios) ** 0.5

    def extend(self) -> bool:
        """Take twice as many pairs if noise hides the answer; False if more would not help."""
        if abs(self.gain() - LEAST_GAIN) > 2.0 * self.noise() or self._wanted > MOST_PAIRS:
            return False
        self._wanted *= 2
        return True

    def is_faster(self) -> bool:
        """Whether the gain is more than noise."""
        return self.gain() > max(LEAST_GAIN, 2.0 * self.noise())

    def _ratios(self) -> list[float]:
        old, new = self._seconds
        return [b / a for a, b in zip(old[1:], new[1:], strict=False)]


@dataclass(frozen=True)
class Table:
    """Variants, the most specific first, and trials by shape. memo: shape -> variant."""

    variants: tuple[Code, ...]
    trials: Mapping[Shape, Trial] = field(default_factory=dict)
    memo: dict[Shape, Code] = field(default_factory=dict)

    def choose(self, shape: Shape, values: Mapping[str, int]) -> Code:
        """The most specific variant that covers the values; ShapeError if there is none."""
        variant = self.memo.get(shape)
        if variant is not None and variant.covers(values):
            return variant
        for variant in self.variants:
            if variant.covers(values):
                if len(self.memo) >= MEMO_SHAPES:
                    self.memo.clear()
                self.memo[shape] = variant
                return variant
        raise ShapeError(f"no compiled variant covers {dict(values)}; the model was compiled for "
                         f"{[dict(v.info.key) for v in self.variants]}")


class Dispatch:
    """The table of one executor. exact: the symbols whose values make a shape; ranges: symbols of
    which only the range counts -> last values of these ranges, but for the last one's. A shape has
    the value of each of the former, and the last value of the latter's range.

    `choose` and `observe` belong to the thread that steps; the other methods to the policy.
    """

    def __init__(self, variants: Iterable[Code], exact: Sequence[str] = (),
                 ranges: Mapping[str, Sequence[int]] | None = None):
        self.table = Table(tuple(sorted(variants, key=lambda variant: variant.width())))
        self.exact = tuple(exact)
        self.limits = self.table.variants[-1].info.key
        self.ranges = {name: _ends(ends, *self.limits[name])
                       for name, ends in (ranges or {}).items()}
        self.names = (*self.exact, *self.ranges)
        self.profile: Profile | None = None

    def shape(self, values: Mapping[str, int]) -> Shape:
        shape = [values[name] for name in self.exact]
        for name, ends in self.ranges.items():
            shape.append(ends[bisect_left(ends, values[name])])
        return tuple(shape)

    def key(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """The shape key of code for a shape: its values, its ranges, and whatever the generic code
        covers of the other symbols."""
        key = {**self.limits}
        for name, value in zip(self.names, shape, strict=True):
            ends = self.ranges.get(name)
            if ends is None:
                key[name] = (value, value)
            else:
                below = ends.index(value)
                key[name] = (ends[below - 1] + 1 if below else self.limits[name][0], value)
        return key

    def choose(self, values: Mapping[str, int]) -> Code:
        """The variant that runs these values, or the one whose turn it is in a trial."""
        table, shape = self.table, self.shape(values)
        variant = table.choose(shape, values)
        trial = table.trials.get(shape)
        if trial is not None and trial.old is variant and trial.new.covers(values):
            return trial.pick()
        return variant

    def observe(self, values: Mapping[str, int], variant: Code, seconds: float) -> None:
        """Count a call that `choose` gave a variant for."""
        if self.profile is None:
            return
        shape = self.shape(values)
        self.profile.observe(shape, variant.info.name, seconds)
        trial = self.table.trials.get(shape)
        if trial is not None and variant in (trial.old, trial.new):
            trial.observe(variant, seconds)

    # ---- changing the table -------------------------------------------------------------------

    def replace(self, add: Iterable[Code] = (), remove: Iterable[Code] = (),
                trials: Mapping[Shape, Trial] | None = None) -> None:
        """Swap in a table with other variants or other trials. One thread at a time."""
        gone = set(remove)
        kept = [variant for variant in self.table.variants if variant not in gone]
        variants = sorted([*kept, *add], key=lambda variant: variant.width())
        self.table = Table(tuple(variants), self.table.trials if trials is None else trials)

    def start_trial(self, shape: Shape, values: Mapping[str, int], new: Code,
                    pairs: int = TRIAL_PAIRS) -> Trial:
        """Let new code run every other call of a shape until the trial is done."""
        trial = Trial(self.table.choose(shape, values), new, pairs)
        self.replace(trials={**self.table.trials, shape: trial})
        return trial

    def end_trial(self, shape: Shape) -> None:
        """Go back to the old code, or to what is added next."""
        self.replace(trials={own: trial for own, trial in self.table.trials.items()
                             if own != shape})


@dataclass(frozen=True)
class TableRow:
    """A live variant. tier: generic, ranged or exact; key: the symbols that it is narrower in than
    the generic one -> (low, high); calls, and seconds of all of them; gain: share of the time that
    it was measured to save (None: not measured); trial: it runs every other call only, so far."""

    tier: str
    name: str
    key: Mapping[str, tuple[int, int]]
    calls: int
    seconds: float
    gain: float | None = None
    trial: bool = False

    @property
    def mean(self) -> float:
        """Seconds of a call."""
        return self.seconds / self.calls if self.calls else 0.0

    def __str__(self) -> str:
        key = ", ".join(_format_range(name, *ends) for name, ends in self.key.items())
        gain = "on trial" if self.trial else "" if self.gain is None else f"gain {self.gain:.1%}"
        return (f"{self.tier:8} {self.name:30} {key:50} {self.calls:8} calls "
                f"{self.mean * 1e3:9.3f} ms  {gain}").rstrip()


@dataclass(frozen=True)
class DispatchTable:
    """Which variant runs for which shapes. gains: of variants, by name."""

    dispatch: Dispatch
    gains: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[TableRow, ...]:
        """The live variants, the most specific first, then those on trial."""
        table = self.dispatch.table
        trials = [trial.new for trial in table.trials.values()]
        return tuple([self._row(variant) for variant in table.variants]
                     + [self._row(variant, trial=True) for variant in trials])

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def _row(self, variant: Code, trial: bool = False) -> TableRow:
        widest = self.dispatch.table.variants[-1]
        key = {name: ends for name, ends in variant.info.key.items()
               if ends != widest.info.key[name] or variant is widest}
        name = variant.info.name
        return TableRow(self.tier(variant), name, key, variant.calls, variant.seconds,
                        self.gains.get(name), trial)

    def tier(self, variant: Code) -> str:
        """generic, ranged or exact."""
        if variant is self.dispatch.table.variants[-1]:
            return "generic"
        keys = variant.info.key
        exact = all(keys[name][0] == keys[name][1] for name in self.dispatch.exact)
        return "exact" if exact else "ranged"


def _ends(ends: Sequence[int], low: int, high: int) -> tuple[int, ...]:
    """Last values of the ranges that low..high falls into."""
    return (*(end for end in ends if low <= end < high), high)


def _format_range(name: str, low: int, high: int) -> str:
    return f"{name} {low}" if low == high else f"{name} {low}..{high}"


def exact_symbols(manifest: Manifest) -> tuple[str, ...]:
    """The symbols whose values make a shape: those of the step, or all of a graph's. A page table
    that grows with every page is no shape of its own."""
    names = tuple(info.name for info in manifest.symbols)
    if manifest.kind in ("causal_lm", "encoder"):
        return tuple(name for name in names if name in STEP_SYMBOLS)
    return names
