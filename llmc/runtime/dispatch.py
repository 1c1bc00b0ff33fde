"""Which variant runs a step: a table that is replaced whole, and trials of new code on real calls.

The step path reads `Dispatch.table` once and never waits: whoever changes the table makes a new one
and assigns it. A step that runs holds its variant, so evicted code is freed behind the last step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmc.errors import ShapeError
from llmc.runtime.artifact import Manifest
from llmc.runtime.profile import Profile, Shape
from llmc.runtime.trials import TRIAL_PAIRS, Code, Pairs, RangeTrial, Trial

MEMO_SHAPES = 4096
STEP_SYMBOLS = ("tokens", "sequences", "rows")  # of a language model's step or an encoder's


@dataclass(frozen=True)
class Table:
    """Variants, the most specific first, trials by shape, and one of a range. memo: shape ->
    variant."""

    variants: tuple[Code, ...]
    trials: Mapping[Shape, Trial] = field(default_factory=dict)
    wide: RangeTrial | None = None
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

    `choose`, `observe` and `count` belong to the thread that steps; the other methods to the
    policy. What was chosen outside a trial is chosen again for these values as long as `table` is
    the same object.
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
        self.rehearsing = False  # steps are not traffic: they count for trials only
        self.trial: Trial | None = None  # that the last choice belongs to

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
        if trial is None and table.wide is not None and table.wide.new.covers(values) \
                and table.wide.new.width() <= variant.width():
            trial = table.wide.part(shape, variant)
        if trial is not None and trial.old is variant and trial.new.covers(values):
            self.trial = trial
            return trial.pick()
        self.trial = None
        return variant

    def observe(self, values: Mapping[str, int], variant: Code, seconds: float) -> None:
        """Count the call that `choose` last gave a variant for."""
        self.count(values, variant, seconds)
        trial = self.trial
        if trial is not None and variant in (trial.old, trial.new):
            trial.observe(variant, seconds)

    def count(self, values: Mapping[str, int], variant: Code, seconds: float, calls: int = 1
              ) -> None:
        """Count calls that belong to no trial; seconds: of all of them."""
        if self.profile is not None and not self.rehearsing:
            self.profile.observe(self.shape(values), variant.info.name, seconds, calls)

    # ---- changing the table -------------------------------------------------------------------

    def replace(self, add: Iterable[Code] = (), remove: Iterable[Code] = (),
                trials: Mapping[Shape, Trial] | None = None) -> None:
        """Swap in a table with other variants or other trials. One thread at a time."""
        gone, table = set(remove), self.table
        kept = [variant for variant in table.variants if variant not in gone]
        variants = sorted([*kept, *add], key=lambda variant: variant.width())
        self.table = Table(tuple(variants), table.trials if trials is None else trials, table.wide)

    def start_trial(self, shape: Shape, values: Mapping[str, int], new: Code,
                    pairs: int = TRIAL_PAIRS) -> Trial:
        """Let new code run every other call of a shape until the trial is done."""
        trial = Trial(self.table.choose(shape, values), new, pairs)
        self.replace(trials={**self.table.trials, shape: trial})
        return trial

    def start_range_trial(self, new: Code, pairs: int = TRIAL_PAIRS) -> RangeTrial:
        """As start_trial, for all shapes that the new code covers and is narrowest for; one at a
        time."""
        trial = RangeTrial(new, pairs)
        self.table = Table(self.table.variants, self.table.trials, trial)
        return trial

    def end_trial(self, trial: Pairs) -> None:
        """Go back to the old code, or to what is added next."""
        trials = {shape: own for shape, own in self.table.trials.items() if own is not trial}
        wide = None if self.table.wide is trial else self.table.wide
        self.table = Table(self.table.variants, trials, wide)


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
        trials: list[Pairs] = [*table.trials.values(), *([table.wide] if table.wide else [])]
        return tuple([self._row(variant) for variant in table.variants]
                     + [self._row(trial.new, trial=True) for trial in trials])

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
