"""Memory planning: one arena for everything that lives only within a step.

Buffers whose lifetimes do not overlap share a slot. Sizes may be symbolic: a slot is as large as
the largest of its buffers (`maximum`), and offsets are sums of slot sizes, so both may be
expressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmc.ir.dims import Dim, ceildiv, known_at_least, known_equal, maximum
from llmc.ir.program import Buffer, Loop, Stage, Step

ALIGNMENT = 64


@dataclass
class Lifetime:
    """The first and last step that a buffer is used in."""

    first: int
    last: int


@dataclass
class Slot:
    """A piece of the arena: bytes, and the last step that needs what it holds."""

    size: Dim
    free_after: int


def plan_memory(steps: Sequence[Step], buffers: dict[str, Buffer]) -> tuple[dict[str, Buffer], Dim]:
    """Buffers with the arena's offsets filled in, and the arena's size in bytes."""
    lifetimes = find_lifetimes(steps, buffers)
    slots: list[Slot] = []
    chosen: dict[str, Slot] = {}
    for name in sorted(lifetimes, key=lambda n: lifetimes[n].first):
        size = ceildiv(buffers[name].bytes(), ALIGNMENT) * ALIGNMENT
        slot = _choose_slot(slots, size, lifetimes[name].first)
        slot.size = maximum(slot.size, size)
        slot.free_after = lifetimes[name].last
        chosen[name] = slot
    offsets: dict[int, Dim] = {}
    total: Dim = 0
    for slot in slots:
        offsets[id(slot)] = total
        total = total + slot.size
    placed = {name: replace(buffer, offset=offsets[id(chosen[name])]) if name in chosen else buffer
              for name, buffer in buffers.items()}
    return placed, total


def _choose_slot(slots: list[Slot], size: Dim, first: int) -> Slot:
    """A free slot: of the same size, else large enough, else any; else a new one."""
    free = [slot for slot in slots if slot.free_after < first]
    for fits in (known_equal, known_at_least, lambda a, b: True):
        for slot in free:
            if fits(slot.size, size):
                return slot
    slots.append(Slot(size, first))
    return slots[-1]


def find_lifetimes(steps: Sequence[Step], buffers: dict[str, Buffer]) -> dict[str, Lifetime]:
    """First and last position of every arena buffer; positions count stages in order.

    What is alive before a loop and used in it lives to the loop's end: the next turn needs it.
    """
    lifetimes: dict[str, Lifetime] = {}
    position = 0
    for step in steps:
        stages = step.stages if isinstance(step, Loop) else (step,)
        start, end = position, position + len(stages) - 1
        for stage in stages:
            for name in (*stage.operands, *stage.results):
                if buffers[name].role == "arena":
                    _touch(lifetimes, name, position, start, end)
            position += 1
    return lifetimes


def _touch(lifetimes: dict[str, Lifetime], name: str, position: int, start: int, end: int) -> None:
    lifetime = lifetimes.setdefault(name, Lifetime(position, position))
    lifetime.last = end if lifetime.first < start else position


def readers(stages: Sequence[Stage], name: str) -> list[int]:
    """Indices of the stages that read a buffer."""
    return [index for index, stage in enumerate(stages) if name in stage.operands]
