"""Let the last writer of an output store it directly, instead of a copy stage at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmc.ir.layouts import Rows
from llmc.ir.program import Buffer, Loop, Stage, Step


def direct_outputs(steps: Sequence[Step], buffers: dict[str, Buffer]
                   ) -> tuple[list[Step], dict[str, Buffer]]:
    """Drop each `output = copy of arena buffer` whose buffer can be the output itself.

    It can when the copy is plain (no view between), the buffer lies in rows, and no other output
    claims it.
    """
    steps = list(steps)
    buffers = dict(buffers)
    number = 0
    while number < len(steps):
        step = steps[number]
        if not isinstance(step, Stage) or not _is_plain_copy(step, buffers):
            number += 1
            continue
        source, output = step.operands[0], step.results[0]
        del steps[number]
        buffers.pop(source)
        steps = [_rename_step(other, source, output) for other in steps]
    return steps, buffers


def _is_plain_copy(step: Stage, buffers: dict[str, Buffer]) -> bool:
    if step.kind != "map" or len(step.results) != 1:
        return False
    value = step.body.outputs[0][1]
    if value.op != "input" or buffers[step.results[0]].role != "output":
        return False
    source = buffers[step.operands[0]]
    return source.role == "arena" and source.layout == Rows()


def _rename_step(step: Step, old: str, new: str) -> Step:
    if isinstance(step, Loop):
        return Loop(step.count, tuple(rename_stage(stage, old, new) for stage in step.stages))
    return rename_stage(step, old, new)


def rename_stage(stage: Stage, old: str, new: str) -> Stage:
    return replace(stage,
                   operands=tuple(new if name == old else name for name in stage.operands),
                   results=tuple(new if name == old else name for name in stage.results))
