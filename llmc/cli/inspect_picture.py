"""The pictures of the inspect page as SVG text: ops beside the stages they were fused into, and the
arena over time. Colours are the page's, by class names `k-KIND`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from html import escape

from llmc.cli.inspect_fusions import Fusions, SourceOp, stage_name
from llmc.ir.cost import Shape
from llmc.ir.dims import evaluate
from llmc.ir.graph import origin_of
from llmc.ir.program import Loop, Program, Stage
from llmc.ir.summary import describe, short_names
from llmc.passes.lower.memory import find_lifetimes

ROW, GAP, LINE = 26, 12, 13  # heights of an op, of the space between stages, of a line of text
LEFT, OP_WIDTH, RIGHT, STAGE_WIDTH, WIDTH = 56, 168, 268, 276, 600
TEXT_COLUMNS = 41  # characters of a stage's expression in a line
ARENA_HEIGHT, ARENA_STEP = 220, 44


class FusionPicture:
    """Two columns: the model's ops on the left, the stages that compute them on the right."""

    def __init__(self, fusions: Fusions, program: Program):
        self.program = program
        self.fusions = fusions
        self.stages = list(program.stages())
        self.texts = [self._text(stage) for stage in self.stages]
        self.groups = [[n for n, op in enumerate(fusions.ops) if op.stage == number]
                       for number in range(len(self.stages))]
        self.tops: list[int] = []
        self.heights: list[int] = []
        self._arrange()

    def svg(self) -> str:
        height = self.tops[-1] + self.heights[-1] + 16
        parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="ops of the model '
                 'beside the stages they were fused into">', *self._loops(), *self._arcs()]
        for number, stage in enumerate(self.stages):
            parts += self._group(number, stage)
        return "\n".join([*parts, "</svg>"])

    def _arrange(self) -> None:
        top, loop_starts = 24, set()
        position = 0
        for step in self.program.steps:
            count = len(step.stages) if isinstance(step, Loop) else 1
            if isinstance(step, Loop):
                loop_starts |= {position, position + count}
            position += count
        for number, group in enumerate(self.groups):
            top += 22 if number in loop_starts else 0
            height = max(ROW * len(group), 26 + LINE * len(self.texts[number]))
            self.tops.append(top)
            self.heights.append(height)
            top += height + GAP

    def _text(self, stage: Stage) -> list[str]:
        lines: list[str] = []
        for text in describe(stage, self.program):
            lines += textwrap.wrap(text, TEXT_COLUMNS, break_long_words=True)
        return lines if len(lines) <= 5 else [*lines[:5], "..."]

    def _group(self, number: int, stage: Stage) -> list[str]:
        """One stage: its ops, the band, its box."""
        top, height = self.tops[number], self.heights[number]
        kind, group = f"k-{stage.kind}", self.groups[number]
        parts = [f'<g class="{kind} stage">']
        if group:
            bottom = self._op_top(group[-1]) + ROW - 4
            edge, start = LEFT + OP_WIDTH, self._op_top(group[0])
            parts.append(f'<path class="band" d="M{edge} {start} L{RIGHT} {top} '
                         f'V{top + height} L{edge} {bottom} Z"/>')
        for each in group:
            parts += _op_box(self.fusions.ops[each], self._op_top(each))
        parts.append(f'<a href="#stage-{number}"><rect class="box" x="{RIGHT}" y="{top}" '
                     f'width="{STAGE_WIDTH}" height="{height}" rx="7"/>')
        name = escape(stage_name(stage, self.program))
        parts.append(f'<text class="name" x="{RIGHT + 9}" y="{top + 17}">{name}'
                     f'<tspan class="kind" dx="7">{stage.kind}</tspan></text>')
        parts += [f'<text class="code" x="{RIGHT + 9}" y="{top + 18 + LINE * n}">{escape(line)}'
                  "</text>" for n, line in enumerate(self.texts[number], 1)]
        return [*parts, "</a></g>"]

    def _op_top(self, op: int) -> int:
        number = self.fusions.ops[op].stage
        group = self.groups[number]
        spare = self.heights[number] - ROW * len(group)
        return self.tops[number] + spare // 2 + ROW * group.index(op) + 2

    def _loops(self) -> list[str]:
        """A frame round the stages that every layer runs."""
        parts, position = [], 0
        for step in self.program.steps:
            count = len(step.stages) if isinstance(step, Loop) else 1
            if isinstance(step, Loop):
                top, last = self.tops[position] - 22, position + count - 1
                height = self.tops[last] + self.heights[last] + 8 - top
                parts.append(f'<rect class="loop" x="2" y="{top}" width="{WIDTH - 4}" '
                             f'height="{height}" rx="10"/><text class="loop-name" '
                             f'x="{RIGHT - 8}" y="{top + 15}">one layer of {step.count}</text>')
            position += count
        return parts

    def _arcs(self) -> list[str]:
        """What reads what: ops on the left margin, stages on the right one."""
        parts = []
        for number, op in enumerate(self.fusions.ops):
            for source in op.sources:
                if source != number - 1 or self.fusions.ops[source].stage != op.stage:
                    parts.append(_arc(LEFT, self._op_top(source) + ROW // 2,
                                      self._op_top(number) + ROW // 2 - 4, -1))
        writers: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            for name in stage.operands:
                if name in writers:
                    parts.append(_arc(RIGHT + STAGE_WIDTH, self._middle(writers[name]) + 4,
                                      self._middle(number) - 4, 1))
            writers |= dict.fromkeys(stage.results, number)
        return parts

    def _middle(self, stage: int) -> int:
        return self.tops[stage] + self.heights[stage] // 2


def _op_box(op: SourceOp, top: int) -> Iterable[str]:
    origin = origin_of(op.node)
    title = f"{op.node.op} : {op.node.type}" + (f" from {origin}" if origin else "")
    yield (f'<g class="op"><title>{escape(title)}</title><rect class="box" x="{LEFT}" y="{top}" '
           f'width="{OP_WIDTH}" height="{ROW - 4}" rx="5"/>')
    detail = op.detail if len(op.detail) <= 16 else op.detail[:15] + "…"
    yield (f'<text class="op-name" x="{LEFT + 8}" y="{top + 15}">{op.node.op}'
           f'<tspan class="detail" dx="6">{escape(detail)}</tspan></text></g>')


def _arc(x: int, start: int, end: int, side: int) -> str:
    reach = x + side * min(48, 10 + abs(end - start) // 9)
    return f'<path class="arc" d="M{x} {start} C{reach} {start} {reach} {end} {x} {end}"/>'


def arena_picture(program: Program, shape: Shape) -> str:
    """Buffers of the arena: from left to right the stages that they live through, upwards bytes."""
    stages = list(program.stages())
    names = short_names(program)
    total = max(1, evaluate(program.arena_bytes, shape.symbols))
    width = ARENA_STEP * len(stages) + 10
    parts = [f'<svg class="arena" viewBox="0 0 {width} {ARENA_HEIGHT + 24}" role="img" '
             f'aria-label="lives of the buffers" style="min-width:{width * 3 // 4}px">']
    kinds = {result: stage.kind for stage in reversed(stages) for result in stage.results}
    for name, life in find_lifetimes(program.steps, dict(program.buffers)).items():
        buffer = program.buffers[name]
        offset, size = evaluate(buffer.offset or 0, shape.symbols), shape.bytes(buffer.type)
        height = max(2.0, size / total * ARENA_HEIGHT)
        top = ARENA_HEIGHT - offset / total * ARENA_HEIGHT - height
        left, span = 5 + life.first * ARENA_STEP, (life.last - life.first + 1) * ARENA_STEP - 2
        text = escape(names[name][:(span - 6) // 6])
        label = f'<text x="{left + 4}" y="{top + height / 2 + 4:.1f}">{text}</text>'
        label = label if height > 11 else ""
        parts.append(f'<g class="k-{kinds.get(name, "map")}"><title>{escape(names[name])}: '
                     f'{buffer.type}, {size} bytes at {offset}</title><rect class="box" x="{left}" '
                     f'y="{top:.1f}" width="{span}" height="{height:.1f}" rx="3"/>{label}</g>')
    parts += [f'<text class="tick" x="{5 + (n + 0.5) * ARENA_STEP}" y="{ARENA_HEIGHT + 16}">{n + 1}'
              "</text>" for n in range(len(stages))]
    return "\n".join([*parts, "</svg>"])
