"""Runs the turns of a loop: one program, its state carried from turn to turn as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.errors import ShapeError
from llmc.ir.plan import LoopStep, Scanned

Array = np.ndarray[Any, Any]
Program = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def run_loop(step: LoopStep, values: Mapping[str, Array], program: Program) -> dict[str, Array]:
    """What the loop makes of the values, by name. ShapeError where scanned inputs differ in length,
    or turns in the shape of what they put out."""
    condition = values[step.condition] if step.condition else np.array(True)
    carried = [np.asarray(values[before]) for before, _ in step.carried]
    outside = {name: values[name] for name in step.captured}
    slices = [_turned(np.asarray(values[each.name]), each) for each in step.scanned]
    limit, turn, rows = _limit(step, values, slices), 0, list[list[Array]]()
    while (limit is None or turn < limit) and np.all(condition):
        head = [np.array(turn), np.asarray(condition, bool)] if step.counted else []
        given = [*head, *carried, *(each[turn] for each in slices)]
        made = program({**dict(zip(step.takes, given, strict=True)), **outside})
        results = [made[name] for name in step.gives]
        if step.counted:
            condition, *results = results
        carried, out = results[: len(carried)], results[len(carried) :]
        rows.append(out)
        turn += 1
    found = dict(zip((after for _, after in step.carried), carried, strict=True))
    for number, each in enumerate(step.put_out):
        found[each.name] = _stacked(step, each, [row[number] for row in rows])
    return {name: value for name, value in found.items() if name}


def _turned(array: Array, scanned: Scanned) -> Array:
    """With the slices of the turns along the first axis, in their order."""
    moved = np.moveaxis(array, scanned.axis, 0)
    return moved[::-1] if scanned.backwards else moved


def _limit(step: LoopStep, values: Mapping[str, Array], slices: Sequence[Array]) -> int | None:
    """How many turns there are at most; None for no bound."""
    if not slices:
        return int(values[step.trips].reshape(-1)[0]) if step.trips else None
    if len({len(each) for each in slices}) > 1:
        sizes = ", ".join(f"{each.name} {len(array)}"
                          for each, array in zip(step.scanned, slices, strict=True))
        raise ShapeError(f"node '{step.name}': scanned inputs of different lengths: {sizes}")
    return len(slices[0])


def _stacked(step: LoopStep, scanned: Scanned, rows: Sequence[Array]) -> Array:
    """What the turns put out, on an axis of its own."""
    if not rows:
        if scanned.empty is None:
            raise ShapeError(f"node '{step.name}': no turns, and the type of its output "
                             f"{scanned.name} is not declared")
        return np.asarray(scanned.empty)
    if len({row.shape for row in rows}) > 1:
        raise ShapeError(f"node '{step.name}': its turns put out {scanned.name} in shapes "
                         f"{rows[0].shape} and {rows[-1].shape}")
    stacked = np.stack(rows[::-1] if scanned.backwards else rows)
    axis = scanned.axis + stacked.ndim if scanned.axis < 0 else scanned.axis
    return np.moveaxis(stacked, 0, axis)
