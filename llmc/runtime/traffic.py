"""What the policy of specialisation knows of the shapes that arrive: how hot each is, what became
of code for it, and what such code would save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmc.errors import LlmcError
from llmc.runtime.dispatch import Dispatch
from llmc.runtime.profile import Heat, Profile, Shape, Verdict
from llmc.runtime.tiers import (
    EXPECTED_GAIN,
    Schedule,
    choose_ranges,
    exact_schedules,
    range_schedules,
)

MOST_RANGES = 4
LEAST_SHAPES = 4  # that a range must hold: fewer are hot themselves, or not worth code
PRIOR = 2.0  # verdicts that the expected gain of a first attempt weighs as much as


@dataclass(frozen=True)
class Range:
    """Shapes of low..high tokens, whatever else they are."""

    low: int
    high: int

    def meets(self, other: Range) -> bool:
        return self.low <= other.high and other.low <= self.high


Own = Shape | Range  # what may get code of its own


@dataclass(frozen=True)
class SeenShape:
    """A shape of the profile. calls, seconds: decayed; variant: what runs it now; verdict: what
    became of its own code (kept, dropped, failed, or "": not tried), gain: share of the time that
    this saves."""

    shape: Mapping[str, int]
    calls: float
    seconds: float
    variant: str
    verdict: str = ""
    gain: float | None = None


class Traffic:
    """The profile of one executor's dispatch, read by the policy. sources: identity of what
    compiles: verdicts of others do not count; on_device: the code is for a GPU."""

    def __init__(self, dispatch: Dispatch, sources: str, on_device: bool):
        self.dispatch, self.sources, self.on_device = dispatch, sources, on_device
        self.profile = Profile(dispatch.names)
        self.hot: dict[Shape, Heat] = {}  # hottest first, as of the last look
        self.calls: dict[Shape, int] = {}  # of this process, as of the last look

    def look(self) -> None:
        self.profile.fold()
        self.hot = {heat.shape: heat for heat in self.profile.hottest()}
        self.calls = self.profile.calls()

    # ---- one shape or range -------------------------------------------------------------------

    def shapes_of(self, own: Own) -> list[Heat]:
        """The shapes that code for `own` would run, the hottest first."""
        if not isinstance(own, Range):
            return [self.hot.get(own) or Heat(own, 0.0, 0.0)]
        return [heat for shape, heat in self.hot.items()
                if own.low <= self.tokens(shape) <= own.high]

    def heat(self, own: Own, without: Iterable[Own] = ()) -> Heat:
        """Heat of a shape, or of a range's shapes but for some that have code of their own. (The
        shape of a range's heat is that of the hottest.)"""
        gone = set(without)
        found = [heat for heat in self.shapes_of(own)
                 if heat.shape not in gone or heat.shape == own]
        return Heat(found[0].shape if found else (), sum(heat.calls for heat in found),
                    sum(heat.seconds for heat in found), sum(heat.recent for heat in found))

    def tokens(self, shape: Shape) -> int:
        return dict(zip(self.dispatch.names, shape, strict=True)).get("tokens", 0)

    def key(self, own: Own) -> dict[str, tuple[int, int]]:
        """The shape key of its code."""
        if not isinstance(own, Range):
            return self.dispatch.key(own)
        limits = self.dispatch.limits
        few = {name: (limits[name][0], min(limits[name][1], own.high))
               for name in self.dispatch.exact}
        return {**limits, **few, "tokens": (own.low, own.high)}

    def values(self, shape: Shape) -> dict[str, int]:
        """Values of all symbols that are such a shape."""
        return {name: low for name, (low, _) in self.dispatch.key(shape).items()}

    def name(self, own: Own) -> str:
        if isinstance(own, Range):
            return f"tokens={own.low}..{own.high}"
        return ",".join(f"{n}={v}" for n, v in zip(self.dispatch.names, own, strict=True))

    def sizes(self, shape: Shape) -> dict[str, int]:
        """A shape as users write it (`shapes`)."""
        return dict(zip(self.dispatch.names, shape, strict=True))

    def schedules(self, own: Own) -> list[Schedule]:
        """What to try for its code: after an eviction, only what was kept."""
        verdict = self.verdict(own)
        if verdict is not None and verdict.state == "kept":
            return [verdict.schedule]
        if isinstance(own, Range):
            return range_schedules(self.on_device, own.high)
        return exact_schedules(self.on_device, self.values(own))

    # ---- verdicts -----------------------------------------------------------------------------

    def verdict(self, own: Own) -> Verdict | None:
        """What became of its code, if the same compiler made it."""
        found = (self.profile.ranges.get((own.low, own.high)) if isinstance(own, Range)
                 else self.profile.verdicts.get(own))
        return found if found is not None and found.sources == self.sources else None

    def remember(self, own: Own, verdict: Verdict) -> None:
        verdict = replace(verdict, sources=self.sources)
        if isinstance(own, Range):
            self.profile.ranges[own.low, own.high] = verdict
        else:
            self.profile.verdicts[own] = verdict

    def is_settled(self, own: Own) -> bool:
        """Whether its code was tried, and not kept."""
        verdict = self.verdict(own)
        return verdict is not None and verdict.state != "kept"

    def expected_gain(self, own: Own) -> float:
        """Share of its time that code of its own saves: as measured, else as others did."""
        verdict = self.verdict(own)
        if verdict is not None and verdict.gain:
            return verdict.gain
        known = [max(0.0, other.gain) for other in list(self.profile.verdicts.values())
                 if other.sources == self.sources and other.state != "failed"]
        return (PRIOR * EXPECTED_GAIN + sum(known)) / (PRIOR + len(known))

    # ---- ranges -------------------------------------------------------------------------------

    def kept(self) -> list[Own]:
        """Whatever had code that was kept, the hottest first."""
        shapes: list[Own] = [shape for shape in self.hot
                             if (verdict := self.verdict(shape)) and verdict.state == "kept"]
        ranges = [Range(*ends) for ends in self.profile.ranges]
        return shapes + [own for own in ranges
                         if (verdict := self.verdict(own)) and verdict.state == "kept"]

    def ranges(self, promoted: Iterable[Own]) -> list[Range]:
        """Ranges of the shapes without code of their own, such that least work is wasted; only
        those that meet none that was tried before."""
        if "tokens" not in self.dispatch.names:
            return []
        gone = set(promoted)
        seconds: dict[int, float] = {}
        counts: dict[int, int] = {}
        for shape, heat in self.hot.items():
            if shape not in gone:
                tokens = self.tokens(shape)
                seconds[tokens] = seconds.get(tokens, 0.0) + heat.seconds
                counts[tokens] = counts.get(tokens, 0) + 1
        tried = [Range(*ends) for ends in self.profile.ranges
                 if self.verdict(Range(*ends)) is not None]
        found = [Range(*ends) for ends in choose_ranges(seconds, MOST_RANGES, self.on_device)]
        return [own for own in found if not any(own.meets(other) for other in tried) and sum(
            count for tokens, count in counts.items() if own.low <= tokens <= own.high)
            >= LEAST_SHAPES]

    # ---- for people ---------------------------------------------------------------------------

    def asked(self, given: Mapping[str, int]) -> Shape:
        """The shape of what the user wrote; of symbols that were left out there are as few as can
        be."""
        if unknown := set(given) - set(self.dispatch.names):
            raise LlmcError(f"unknown symbol {', '.join(sorted(unknown))} in shapes; this model "
                            f"has {', '.join(self.dispatch.names)}")
        values = {}
        for name in self.dispatch.names:
            low, high = self.dispatch.limits[name]
            value = given.get(name, max(low, 1))
            if not isinstance(value, int) or not low <= value <= high:
                raise LlmcError(f"{name} in shapes must be in {low}..{high}, got {value!r}")
            values[name] = value
        return self.dispatch.shape(values)

    def seen(self) -> list[SeenShape]:
        """The shapes that arrive, the one that most time goes to first."""
        self.profile.fold()
        return [self._seen(heat) for heat in self.profile.hottest()]

    def _seen(self, heat: Heat) -> SeenShape:
        verdict = self.profile.verdicts.get(heat.shape)
        code = self.dispatch.table.choose(heat.shape, self.values(heat.shape))
        return SeenShape(self.sizes(heat.shape), heat.calls,
                         heat.seconds, code.info.name, verdict.state if verdict else "",
                         verdict.gain if verdict else None)

    def verdicts(self) -> dict[str, str]:
        """Name of every shape and range that was tried -> state."""
        found = {self.name(shape): verdict.state
                 for shape, verdict in list(self.profile.verdicts.items())}
        return found | {self.name(Range(*ends)): verdict.state
                        for ends, verdict in list(self.profile.ranges.items())}
