"""What shapes arrive, how often, and what they cost: the facts that specialisation decides by.

A cell counts the calls of one variant at one shape. The step path only adds to it; `fold`, called
by the policy's thread, turns new calls into a weight that halves every HALF_LIFE seconds, so that a
weight stands for the calls to expect again. What is evicted is chosen by a weight that halves
sooner: where traffic has moved, yesterday's favourites make room at once. Memory is bounded: a full
profile drops its colder half, which a shape that keeps coming survives.

Profiles are files in the cache. `save` adds what is new to what other processes wrote; a damaged
file is an empty profile.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

FORMAT = 2
CAPACITY = 1024  # cells
HALF_LIFE = 180.0  # seconds
RECENT_LIFE = 15.0  # seconds


class Cell:
    """Calls of one variant at one shape. calls, seconds: of this process, written by steps only;
    weight, weighted_seconds: the same, decayed; recent: seconds, decayed sooner; the rest: what was
    folded and saved of them."""

    __slots__ = ("calls", "folded", "folded_seconds", "recent", "saved", "saved_seconds",
                 "seconds", "weight", "weighted_seconds")

    def __init__(self, weight: float = 0.0, weighted_seconds: float = 0.0) -> None:
        self.calls = self.folded = self.saved = 0
        self.seconds = self.folded_seconds = self.saved_seconds = self.recent = 0.0
        self.weight = weight
        self.weighted_seconds = weighted_seconds

    def heat(self) -> float:
        """Decayed calls, those since the last fold included."""
        return self.weight + self.calls - self.folded

    def fold(self, factor: float, recent_factor: float) -> None:
        calls, seconds = self.calls, self.seconds
        self.recent = self.recent * recent_factor + seconds - self.folded_seconds
        self.weight = self.weight * factor + calls - self.folded
        self.weighted_seconds = self.weighted_seconds * factor + seconds - self.folded_seconds
        self.folded, self.folded_seconds = calls, seconds


@dataclass(frozen=True)
class Verdict:
    """What became of a shape's own code. state: "kept", "dropped" (no faster than what it should
    replace) or "failed" (reason says how). gain: share of the time that it saves; compile_seconds;
    sources: identity of the compiler that made it, since another may do better; schedule: what it
    was lowered with, if kept."""

    state: str
    gain: float = 0.0
    compile_seconds: float = 0.0
    sources: str = ""
    reason: str = ""
    schedule: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """One shape over all its variants: decayed calls and seconds; recent: seconds, decayed
    sooner."""

    shape: Shape
    calls: float
    seconds: float
    recent: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds of a call."""
        return self.seconds / self.calls if self.calls else 0.0


class Profile:
    """Calls by shape and variant. names: the symbols whose values make a shape, in order."""

    def __init__(self, names: Iterable[str], capacity: int = CAPACITY):
        self.names = tuple(names)
        self.capacity = capacity
        self.cells: dict[tuple[Shape, str], Cell] = {}
        self.verdicts: dict[Shape, Verdict] = {}
        self.ranges: dict[tuple[int, int], Verdict] = {}  # by (fewest, most) tokens
        self.model = self.target = ""  # in words, for whoever finds the file
        self._folded_at = time.monotonic()
        self._folding = threading.Lock()

    def observe(self, shape: Shape, variant: str, seconds: float, calls: int = 1) -> None:
        """Count calls, with the seconds of all. One thread at a time; costs well under a
        microsecond."""
        cell = self.cells.get((shape, variant))
        if cell is None:
            cell = self._add(shape, variant)
        cell.calls += calls
        cell.seconds += seconds

    def _add(self, shape: Shape, variant: str) -> Cell:
        if len(self.cells) >= self.capacity:
            coldest = sorted(self.cells.items(), key=lambda item: item[1].heat())
            for key, _ in coldest[:len(coldest) // 2]:
                self.cells.pop(key, None)
        return self.cells.setdefault((shape, variant), Cell())

    def fold(self, now: float | None = None) -> None:
        """Take new calls into the weights, and let the old ones fade. From any thread."""
        with self._folding:
            now = time.monotonic() if now is None else now
            passed = max(0.0, now - self._folded_at)
            factors = 0.5 ** (passed / HALF_LIFE), 0.5 ** (passed / RECENT_LIFE)
            self._folded_at = now
            for cell in list(self.cells.values()):
                cell.fold(*factors)

    def hottest(self) -> list[Heat]:
        """Every shape, the one that most time goes to first."""
        sums: dict[Shape, list[float]] = {}
        for (shape, _), cell in list(self.cells.items()):
            entry = sums.setdefault(shape, [0.0, 0.0, 0.0])
            entry[0] += cell.weight
            entry[1] += cell.weighted_seconds
            entry[2] += cell.recent
        found = [Heat(shape, *entry) for shape, entry in sums.items()]
        return sorted(found, key=lambda heat: (-heat.seconds, heat.shape))

    def calls(self) -> dict[Shape, int]:
        """Calls of every shape in this process, as far as they are remembered."""
        sums: dict[Shape, int] = {}
        for (shape, _), cell in list(self.cells.items()):
            sums[shape] = sums.get(shape, 0) + cell.calls
        return sums

    # ---- files ------------------------------------------------------------------------------

    def load(self, path: Path) -> None:
        """Begin with what earlier processes saw; nothing if there is no readable profile of these
        symbols."""
        saved = read_profile(path)
        if saved is None or saved.names != self.names:
            return
        for (shape, variant), cell in saved.cells.items():
            self.cells.setdefault((shape, variant), cell)
        self.verdicts = saved.verdicts | self.verdicts
        self.ranges = saved.ranges | self.ranges

    def save(self, path: Path) -> None:
        """Add what is new since the last save to the file. OSError where it cannot be written."""
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=10):
            merged = read_profile(path)
            if merged is None or merged.names != self.names:
                merged = Profile(self.names, self.capacity)
            self._add_new_to(merged)
            _replace(path, json.dumps(merged.as_json()))

    def _add_new_to(self, merged: Profile) -> None:
        for (shape, variant), cell in list(self.cells.items()):
            calls, seconds = cell.calls, cell.seconds
            if calls > cell.saved:
                other = merged.cells.get((shape, variant)) or merged._add(shape, variant)
                other.weight += calls - cell.saved
                other.weighted_seconds += seconds - cell.saved_seconds
                cell.saved, cell.saved_seconds = calls, seconds
        merged.verdicts |= self.verdicts
        merged.ranges |= self.ranges
        merged.model, merged.target = self.model, self.target

    def as_json(self) -> dict[str, Any]:
        """What a profile file holds; verdicts of shapes that are forgotten go too."""
        shapes = {shape for shape, _ in self.cells}
        return {
            "format": FORMAT, "time": time.time(), "names": self.names,
            "model": self.model, "target": self.target,
            "cells": [[shape, variant, cell.weight, cell.weighted_seconds]
                      for (shape, variant), cell in self.cells.items()],
            "verdicts": [[shape, asdict(verdict)] for shape, verdict in self.verdicts.items()
                         if shape in shapes],
            "ranges": [[ends, asdict(verdict)] for ends, verdict in self.ranges.items()]}


def read_profile(path: Path, now: float | None = None) -> Profile | None:
    """The profile of a file, faded by its age; None if it is missing or damaged.

    It fades by one half-life at most: a night without traffic says nothing about the traffic.
    """
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        data = json.loads(path.read_text())
        if data["format"] == FORMAT:
            age = (time.time() if now is None else now) - float(data["time"])
            return _from_json(data, 0.5 ** min(1.0, max(0.0, age) / HALF_LIFE))
    return None


def _from_json(data: Mapping[str, Any], factor: float) -> Profile:
    profile = Profile(str(name) for name in data["names"])
    profile.model, profile.target = str(data.get("model", "")), str(data.get("target", ""))
    for shape, variant, weight, seconds in data["cells"]:
        key = _shape(shape, profile.names), str(variant)
        profile.cells[key] = Cell(float(weight) * factor, float(seconds) * factor)
    for shape, verdict in data["verdicts"]:
        profile.verdicts[_shape(shape, profile.names)] = Verdict(**verdict)
    for (low, high), verdict in data["ranges"]:
        profile.ranges[int(low), int(high)] = Verdict(**verdict)
    return profile


def _shape(values: Iterable[Any], names: tuple[str, ...]) -> Shape:
    shape = tuple(int(value) for value in values)
    if len(shape) != len(names):
        raise ValueError("a shape has one value for each symbol")
    return shape


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
