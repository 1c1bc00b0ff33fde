"""Where two runs of a model part: compares what comes out of it, bisects the ops that a wrong one
is computed from, and names the first that differs too much.

In a round a few values, evenly spaced over what is still in question, are read from both sides;
the next round looks between the last that agreed and the first that did not. Both sides compute
from their own values, so an error shows from where it arises to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from llmc.errors import LlmcError
from llmc.examine.taps import TappedModel, describe, module_of
from llmc.ir.graph import Node, walk
from llmc.runtime.progress import Progress, silent

TAPS = 16  # values of a round, at most
MEMORY = 256 << 20  # bytes of them, of each side


@dataclass(frozen=True)
class Difference:
    """How far `b` is from `a`. relative: the largest difference over the largest |a|; rms: root
    mean square of the differences over that of a; worst: where the largest is, with both values;
    not_finite: items that are NaN or infinite on one side only."""

    relative: float
    rms: float
    largest: float
    mean: float
    worst: tuple[int, ...]
    values: tuple[float, float]
    not_finite: int

    def exceeds(self, tolerance: float) -> bool:
        return self.not_finite > 0 or not self.relative <= tolerance


@dataclass(frozen=True)
class Checked:
    """A value that both sides have: what made it, and how much they differ there."""

    number: int
    what: str
    module: str | None
    shape: tuple[int, ...]
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """first: the first op whose error exceeds the tolerance, None if none does; operands: what it
    was computed from; all others that were looked at, in order; points: how many there are."""

    first: Checked | None
    operands: tuple[Checked, ...]
    checked: tuple[Checked, ...]
    points: int
    tolerance: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Side(Protocol):
    """Where the second values come from; points are numbers of the first side's pairs."""

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class ModelSide:
    """Another run of the model, or another model; nodes: its part of each pair."""

    tapped: TappedModel
    nodes: Sequence[Node]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return self.tapped.read([self.nodes[number] for number in numbers])


@dataclass(frozen=True)
class SavedSide:
    """Values that were captured, in the order of the points."""

    values: Sequence[np.ndarray]

    def read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return [self.values[number] for number in numbers]


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """LlmcError if the two have not the same number of items (axes of size 1 aside)."""
    if a.size != b.size:
        raise LlmcError(f"shapes {list(a.shape)} and {list(b.shape)} cannot be compared")
    x, y = a.astype(np.float64), b.astype(np.float64).reshape(a.shape)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    finite = np.isfinite(x) & np.isfinite(y)
    apart = np.abs(np.where(finite, x, 0.0) - np.where(finite, y, 0.0))
    if not a.size:
        return Difference(0.0, 0.0, 0.0, 0.0, (), (0.0, 0.0), 0)
    where = np.unravel_index(int((apart + np.where(finite | same, 0.0, np.inf)).argmax()), a.shape)
    magnitude = float(np.abs(x[finite]).max(initial=0.0)) or 1.0
    root = float(np.sqrt(np.mean(np.square(x[finite])))) if finite.any() else 0.0
    return Difference(
        relative=float(apart.max()) / magnitude,
        rms=float(np.sqrt(np.mean(np.square(apart)))) / (root or 1.0),
        largest=float(apart.max()), mean=float(apart.mean()),
        worst=tuple(int(each) for each in where), values=(float(x[where]), float(y[where])),
        not_finite=int((~finite & ~same).sum()))


class Comparison:
    """Looks for the first of the points whose error exceeds the tolerance.

    points: nodes of the first side's graph, in the order in which they are computed.
    """

    def __init__(self, first: TappedModel, points: Sequence[Node], second: Side,
                 tolerance: float, progress: Progress = silent):
        self.first, self.points, self.second = first, points, second
        self.tolerance, self.progress = tolerance, progress
        self.checked: dict[int, Checked] = {}
        self._numbers = {node: number for number, node in enumerate(points)}

    def run(self) -> Verdict:
        """The verdict. All ends are looked at, then what the first wrong one is computed from, or
        some of all points if the ends agree: what was wrong may have been lost in a rounding."""
        ends = self._ends()
        for portion in self._portions(ends):
            self._check(portion)
        wrong = next(filter(self._is_wrong, ends), None)
        within = range(len(self.points)) if wrong is None else self._ancestors(wrong)
        bad = self._bisect(within)
        self.progress("compare", 1.0)
        return self._verdict(None if bad is None else self._earliest(bad))

    def _ends(self) -> list[int]:
        """The graph's outputs, and points that no other is computed from: nothing shows their
        errors but themselves."""
        outputs = {node for _, node in self.first.graph.outputs}
        used = set(walk([node for point in self.points for node in point.inputs]))
        return [number for number, node in enumerate(self.points)
                if node in outputs or node not in used]

    def _portions(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """The numbers in parts of which each fits into memory, or is a single one."""
        portion: list[int] = []
        size = 0
        for number in numbers:
            more = self.first.bytes_of([self.points[number]])
            if portion and size + more > MEMORY:
                yield portion
                portion, size = [], 0
            portion.append(number)
            size += more
        if portion:
            yield portion

    def _ancestors(self, number: int) -> list[int]:
        """The points that a point is computed from, and itself, in order."""
        return sorted({self._numbers[node] for node in walk([self.points[number]])
                       if node in self._numbers} | {number})

    def _bisect(self, within: Sequence[int]) -> int | None:
        """The first of the values that differs too much, of those that were looked at."""
        good, bad = -1, len(within)
        while bad - good > 1:
            self.progress("compare", 1 - (bad - good) / (len(within) + 1))
            places = self._spaced(within, good + 1, min(bad, len(within) - 1))
            self._check([within[place] for place in places])
            wrong = [place for place in places if self._is_wrong(within[place])]
            if not wrong:
                break
            bad = wrong[0]
            good = max((place for place in range(bad) if within[place] in self.checked), default=-1)
        return within[bad] if bad < len(within) else None

    def _spaced(self, within: Sequence[int], low: int, high: int) -> list[int]:
        """At most TAPS places from low to high, both included, as many as memory allows."""
        count = min(TAPS, high - low + 1)
        while True:
            places = sorted({low + round(step * (high - low) / max(1, count - 1))
                             for step in range(count)} | {high})
            nodes = [self.points[within[place]] for place in places]
            if count <= 2 or self.first.bytes_of(nodes) <= MEMORY:
                return places
            count //= 2

    def _check(self, numbers: Sequence[int]) -> None:
        """Looks at those of the values that were not looked at yet."""
        numbers = [number for number in numbers if number not in self.checked]
        if not numbers:
            return
        nodes = [self.points[number] for number in numbers]
        pairs = zip(numbers, nodes, self.first.read(nodes), self.second.read(numbers), strict=True)
        for number, node, a, b in pairs:
            try:
                found = difference(a, b)
            except LlmcError as error:
                raise LlmcError(f"{describe(node)}: {error}") from None
            self.checked[number] = Checked(number, describe(node), module_of(node), a.shape, found)

    def _is_wrong(self, number: int) -> bool:
        return self.checked[number].difference.exceeds(self.tolerance)

    def _earliest(self, bad: int) -> int:
        """Goes from a wrong value to the first wrong one among those that it is computed from."""
        while True:
            operands = self._operands(bad)
            self._check(operands)
            wrong = [number for number in operands if self._is_wrong(number)]
            if not wrong:
                return bad
            bad = wrong[0]

    def _operands(self, number: int) -> list[int]:
        """The points that a point is computed from, through nodes that are no points."""
        found: set[int] = set()
        todo = list(self.points[number].inputs)
        seen: set[Node] = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._numbers:
                found.add(self._numbers[node])
            else:
                todo.extend(node.inputs)
        return sorted(found)

    def _verdict(self, bad: int | None) -> Verdict:
        checked = tuple(self.checked[number] for number in sorted(self.checked))
        if bad is None:
            return Verdict(None, (), checked, len(self.points), self.tolerance)
        operands = tuple(self.checked[number] for number in self._operands(bad)
                         if number in self.checked)
        return Verdict(self.checked[bad], operands, checked, len(self.points), self.tolerance)


def saved_points(nodes: Sequence[Node], saved: Mapping[int, np.ndarray]
                 ) -> tuple[list[Node], SavedSide]:
    """Those of a graph's tap points that were captured, and their values."""
    numbers = sorted(number for number in saved if 0 <= number < len(nodes))
    return [nodes[number] for number in numbers], SavedSide([saved[n] for n in numbers])
