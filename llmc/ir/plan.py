"""A plan: programs, loops round programs and host-side functions in order, over values that go by
names.

What only a host can compute (text) is a function of Python; everything else is a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostStep:
    """A function of the host (`runtime.host_functions` has them by `op`). An input that is left out
    is ""; attributes are plain values and arrays."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ProgramStep:
    """A model (the bytes of an .onnx file) that is compiled once its inputs' types are known."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Scanned:
    """An input of which each turn takes a slice of an axis, or an output to which each turn gives
    one; from the end where `backwards`. Of an output: what it is if there are no turns."""

    name: str
    axis: int = 0
    backwards: bool = False
    empty: Any = None


@dataclass(frozen=True)
class LoopStep:
    """A program that runs once a turn, `trips` times and while `condition` holds ("": no such
    bound), or as often as `scanned` has slices.

    model: the bytes of an .onnx file. It takes, by `takes`, (the number of the turn and the
    condition, if `counted`,) what is carried, the slices, and what it uses from outside (of the
    names `captured`); it gives, by `gives`, (the condition,) what is carried and what is put out.
    carried: (name before the first turn, name after the last one) of each value.
    """

    name: str
    model: bytes
    counted: bool
    trips: str
    condition: str
    carried: tuple[tuple[str, str], ...]
    scanned: tuple[Scanned, ...]
    captured: tuple[str, ...]
    put_out: tuple[Scanned, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """All values that it reads."""
        return (self.trips, self.condition, *(before for before, _ in self.carried),
                *(each.name for each in self.scanned), *self.captured)


@dataclass(frozen=True)
class Plan:
    """`constants`: values that no step computes; `outputs`: what the plan gives."""

    steps: tuple[HostStep | ProgramStep | LoopStep, ...]
    constants: dict[str, Any]
    outputs: tuple[str, ...]
