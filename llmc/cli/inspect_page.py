"""`llmc inspect --html`: one page that needs no network, in light or dark, on a phone or a desk."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from llmc.cli.inspect_fusions import find_fusions, stage_name
from llmc.cli.inspect_picture import FusionPicture, arena_picture
from llmc.cli.inspect_style import SCRIPT, STYLE
from llmc.driver import Compiled
from llmc.ir.cost import Cost, Shape, program_cost, stage_cost
from llmc.ir.dims import evaluate
from llmc.ir.layouts import format_layout
from llmc.ir.program import Loop, Program, Stage
from llmc.ir.summary import describe, fused_ops, short_names

CONTEXT = 512  # tokens that a decode step sees, and of a prefill
COLUMNS = ("", "stage", "computes", "result", "weights", "cache", "reads", "writes", "flops",
           "share", "arena")


@dataclass(frozen=True)
class Case:
    """A shape that people ask about, and the program that runs it. bound: what limits it."""

    title: str
    program: Program
    shape: Shape
    bound: str


def write_page(path: Path, compiled: Compiled, variant: str) -> None:
    """Write the page of a compiled model; the picture shows the program of `variant`."""
    program = compiled.programs[variant]
    cases = find_cases(compiled)
    fusions = find_fusions(compiled.model.graph, program)
    body = [
        f"<h1>{escape(program.name)}</h1><p class='lead'>{_lead(compiled, program)}</p>",
        _cards(compiled, cases),
        "<h2>From ops to stages</h2>"
        f"<p>Left: the ops of the model, {fusions.total} in all; one layer is drawn where layers "
        "repeat, and ops on weights alone are left out: they are computed when the weights are "
        f"packed. Right: the {len(list(program.stages()))} stages that compute them, one kernel "
        "each. Arcs are data. Tap a stage for its figures.</p>",
        f"<div class='legend'>{_legend(program)}</div>",
        f"<div class='picture'>{FusionPicture(fusions, program).svg()}</div>",
        *[_case(case, number == 0) for number, case in enumerate(cases)],
        _weights(program),
    ]
    path.write_text(_document(program.name, "\n".join(body)), encoding="utf-8")


def find_cases(compiled: Compiled) -> list[Case]:
    """Decoding and prefill of a language model; else one shape of middling size."""
    symbols = {s.name: s for s in compiled.graph.symbols()}
    if {"tokens", "rows", "table_width"} <= symbols.keys():
        limit = getattr(compiled.model.config, "max_context", None) or CONTEXT
        context = min(CONTEXT, limit)
        wanted = [(f"Decode: one token after {context - 1}", 1, "bytes"),
                  (f"Prefill: {context} tokens", context, "flops")]
        shapes = [(title, {"tokens": tokens, "sequences": 1, "rows": 1, "table_width": pages,
                           "pool_pages": pages}, bound)
                  for title, tokens, bound in wanted for pages in [-(-context // 32)]]
        found = [_covering(compiled, title, values, context, bound)
                 for title, values, bound in shapes]
    else:
        values = {name: _middling(s) for name, s in symbols.items()}
        title = ", ".join(f"{name} {value}" for name, value in values.items()) or "Its one shape"
        found = [_covering(compiled, title, values, 0, "flops")]
    return [case for case in found if case is not None]


def _middling(symbol) -> int:
    wanted = 1 if symbol.name in ("sequences", "batch", "batch_size") else 128
    wanted = symbol.low if "past" in symbol.name else wanted
    high = symbol.high or wanted
    return max(symbol.low, min(high, wanted) // symbol.multiple * symbol.multiple)


def _covering(compiled: Compiled, title: str, values: dict[str, int], context: int, bound: str
              ) -> Case | None:
    """The case, with the narrowest program that covers its shape."""
    covering = [p for p in compiled.programs.values() if p.covers(values)]
    narrowest = min(covering, key=lambda p: sum(high - low for _, low, high in p.symbols),
                    default=None)
    return Case(title, narrowest, Shape(values, context), bound) if narrowest else None


def _lead(compiled: Compiled, program: Program) -> str:
    loops = [step for step in program.steps if isinstance(step, Loop)]
    layers = "; ".join(f"{step.count} layers of {len(step.stages)} stages" for step in loops)
    facts = [compiled.model.kind.replace("_", " "), str(compiled.target.text()).split(":+")[0],
             layers]
    return escape(" · ".join(filter(None, facts)))


def _cards(compiled: Compiled, cases: list[Case]) -> str:
    weights = sum(_weight_bytes(buffer) for buffer in cases[0].program.with_role("weight"))
    code = sum(len(code.object) for code in compiled.codes.values())
    seconds = sum(compiled.timings.values())
    cards = [("weights", amount(weights, "B")), ("object code", amount(code, "B")),
             ("compiled in", f"{seconds:.2f} s")]
    for case in cases:
        cost = program_cost(case.program, case.shape)
        name = case.title.split(":")[0].lower()
        cards.append((f"{name}: bytes moved", amount(_moved(cost), "B")))
        cards.append((f"{name}: arithmetic", amount(cost.flops, "FLOP")))
        arena = evaluate(case.program.arena_bytes, case.shape.symbols)
        cards.append((f"{name}: arena", amount(arena, "B")))
    return "<div class='cards'>" + "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cards
    ) + "</div>"


def _legend(program: Program) -> str:
    kinds = dict.fromkeys(stage.kind for stage in program.stages())
    return "".join(f"<span class='k-{kind}'><i></i>{kind}</span>" for kind in kinds)


def _case(case: Case, linked: bool) -> str:
    """Figures of every stage at a shape; the first case's rows are what the picture links to."""
    total = program_cost(case.program, case.shape)
    rows, number = [], 0
    for step in case.program.steps:
        stages, turns = (step.stages, step.count) if isinstance(step, Loop) else ((step,), 1)
        if isinstance(step, Loop):
            rows.append(f"<tr class='loop-row'><td colspan='{len(COLUMNS)}'>{step.count} layers, "
                        "each:</td></tr>")
        for stage in stages:
            rows.append(_row(case, stage, number, turns, total, linked))
            number += 1
        if isinstance(step, Loop):
            rows.append(f"<tr class='loop-row end'><td colspan='{len(COLUMNS)}'></td></tr>")
    cells = "".join(f"<td>{amount(value, unit)}</td>" for value, unit in _figures(total))
    rows.append(f"<tr class='total'><td colspan='4'>a step in all</td>{cells}<td></td><td></td>"
                "</tr>")
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return (f"<h2>{escape(case.title)}</h2><p>{_bound_text(case, total)}</p><div class='scroll'>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
            "<h3>Arena</h3><p>Memory of a step: stages from left to right, bytes upwards. Buffers "
            "whose lives do not meet share memory.</p><div class='scroll'>"
            f"{arena_picture(case.program, case.shape)}</div>")


def _bound_text(case: Case, total: Cost) -> str:
    intensity = total.flops / max(1, _moved(total))
    limit = ("few operations for each byte: the time is that of reading memory"
             if case.bound == "bytes" else "arithmetic is what takes time")
    return f"{intensity:.1f} flops for each byte moved; {limit}. Shares are of {case.bound}."


def _row(case: Case, stage: Stage, number: int, turns: int, total: Cost, linked: bool) -> str:
    cost = stage_cost(stage, case.program, case.shape)
    part, whole = ((cost.flops, total.flops) if case.bound == "flops"
                   else (_moved(cost), _moved(total)))
    share = part * turns / max(1, whole)
    anchor = f" id='stage-{number}'" if linked else ""
    fused = ", ".join(fused_ops(stage, case.program))
    note = f"<small>fuses {escape(fused)}</small>" if fused else ""
    expressions = "<br>".join(map(escape, describe(stage, case.program)))
    types = "<br>".join(escape(str(case.program.buffers[r].type)) for r in stage.results)
    figures = "".join(f"<td>{amount(value, unit)}</td>" for value, unit in _figures(cost))
    return (f"<tr class='k-{stage.kind}'{anchor}><td>{number + 1}</td>"
            f"<td><b>{escape(stage_name(stage, case.program))}</b><br><i></i>{stage.kind}</td>"
            f"<td class='code'>{expressions}{note}</td><td class='code'>{types}</td>{figures}"
            f"<td><div class='bar'><div style='width:{share:.1%}'></div></div>{share:.1%}</td>"
            f"<td>{_places(case, stage)}</td></tr>")


def _figures(cost: Cost) -> list[tuple[int, str]]:
    return [(cost.weight_bytes, "B"), (cost.state_bytes, "B"), (cost.read_bytes, "B"),
            (cost.written_bytes, "B"), (cost.flops, "")]


def _places(case: Case, stage: Stage) -> str:
    """Offset and size in the arena of each result that lives there."""
    places = []
    for name in stage.results:
        buffer = case.program.buffers[name]
        if buffer.offset is None:
            places.append(buffer.role)
        else:
            offset = evaluate(buffer.offset, case.shape.symbols)
            places.append(f"{amount(case.shape.bytes(buffer.type), 'B')} at {offset:,}")
    return "<br>".join(places)


def _moved(cost: Cost) -> int:
    return cost.weight_bytes + cost.state_bytes + cost.read_bytes + cost.written_bytes


def _weights(program: Program) -> str:
    names = short_names(program)
    rows = []
    for buffer in program.with_role("weight"):
        weight = program.weights[buffer.name]
        sources = ", ".join(dict.fromkeys(source for _, source in weight.names[0]))
        rows.append(f"<tr><td><b>{escape(names[buffer.name])}</b></td><td class='code'>"
                    f"{buffer.type}</td><td>{buffer.count}</td><td>"
                    f"{amount(_weight_bytes(buffer), 'B')}</td><td class='code'>"
                    f"{format_layout(buffer.layout)}</td><td class='code'>{escape(sources)}</td>"
                    "</tr>")
    head = "".join(f"<th>{name}</th>" for name in
                   ("weight", "type", "copies", "bytes", "layout", "made of (first copy)"))
    return ("<h2>Weights</h2><p>As the artifact stores them: merged, and packed for the kernels "
            f"that read them.</p><div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>"
            f"{''.join(rows)}</tbody></table></div>")


def _weight_bytes(buffer) -> int:
    return evaluate(buffer.bytes(), {}) * buffer.count


def amount(value: float, unit: str) -> str:
    """1234567 -> 1.23 MB; nothing for zero."""
    if not value:
        return ""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            digits = 0 if not prefix or value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f} {prefix}{unit}".strip()
        value /= 1000
    return ""


def _document(title: str, body: str) -> str:
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)} · "
            "llmc</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<style>{STYLE}</style></head><body><main>{body}</main><script>{SCRIPT}</script>"
            "</body></html>\n")
