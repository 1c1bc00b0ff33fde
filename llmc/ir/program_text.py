"""The text form of programs: `format_program` and `parse_program` are inverses.

    program "llama" on "avx2" (8, 6, 16, 4, false, ("rope", "softmax"))
    symbol tokens in 1..8192
    arena tokens*4096
    buffer "x" arena bf16[tokens, 2048] Rows() 1 at 0
    weight "qkv" ((("q", "model.layers.0.q"), ...), ...) graph ... { ... }
    stage "qkv" matmul ("x", "qkv") -> ("t",) graph ... { ... }
    loop 16 { stage ... }

`symbol` lines carry the shape key; a graph declares the symbols of its own types again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llmc.errors import GraphError
from llmc.ir.dims import Dim, Symbol, format_dim, scan_dim, symbol, symbols
from llmc.ir.layouts import format_layout, parse_layout
from llmc.ir.program import Buffer, Capabilities, Loop, Program, Stage, Step, Weight
from llmc.ir.scan import Scanner
from llmc.ir.text import format_graph, format_value, scan_graph, scan_type, scan_value

_LAYOUT = re.compile(r"[A-Za-z]+\([-0-9,]*\)")
_WORD = re.compile(r"[a-z_]+")


def format_program(program: Program) -> str:
    """The program's text; equal programs have equal texts."""
    lines = [_header(program)]
    multiples = {s.name: s.multiple for s in _symbols_of(program)}
    for name, low, high in program.symbols:
        multiple = multiples.get(name, 1)
        suffix = f" multiple {multiple}" if multiple > 1 else ""
        lines.append(f"symbol {name} in {low}..{high}{suffix}")
    lines.append(f"arena {format_dim(program.arena_bytes)}")
    for buffer in program.buffers.values():
        place = "" if buffer.offset is None else f" at {format_dim(buffer.offset)}"
        lines.append(f"buffer {format_value(buffer.name)} {buffer.role} {buffer.type} "
                     f"{format_layout(buffer.layout)} {buffer.count}{place}")
    for weight in program.weights.values():
        lines.append(f"weight {format_value(weight.buffer)} {format_value(weight.names)} "
                     + format_graph(weight.expression).rstrip())
    for step in program.steps:
        if isinstance(step, Loop):
            lines.append(f"loop {step.count} {{")
            lines += [_indent(_stage(stage)) for stage in step.stages]
            lines.append("}")
        else:
            lines.append(_stage(step))
    return "\n".join(lines) + "\n"


def _header(program: Program) -> str:
    c = program.capabilities
    values = tuple(tuple(sorted(value)) if isinstance(value, frozenset) else value
                   for value in (getattr(c, field.name) for field in fields(c)[1:]))
    return (f"program {format_value(program.name)} on {format_value(c.name)} "
            f"{format_value(values)}")


def _symbols_of(program: Program) -> set[Symbol]:
    found: set[Symbol] = set(symbols(program.arena_bytes))
    for buffer in program.buffers.values():
        for dim in buffer.type.shape:
            found |= symbols(dim)
    return found


def _stage(stage: Stage) -> str:
    return (f"stage {format_value(stage.name)} {stage.kind} {format_value(stage.operands)} -> "
            f"{format_value(stage.results)} {format_graph(stage.body).rstrip()}")


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def parse_program(text: str) -> Program:
    """The program of a text; GraphError with line and column if it is not one."""
    scanner = Scanner(text)
    try:
        program = _scan_program(scanner)
    except (ValueError, TypeError) as error:
        raise GraphError(f"{scanner.place()}: {error}") from None
    if not scanner.at_end():
        scanner.fail("expected the end of the text")
    return program


def _scan_program(scanner: Scanner) -> Program:
    scanner.expect("program")
    name = _string(scanner)
    scanner.expect("on")
    capabilities = _scan_capabilities(scanner)
    ranges, named = _scan_symbols(scanner)
    scanner.expect("arena")
    arena = scan_dim(scanner, named)
    buffers: dict[str, Buffer] = {}
    while scanner.accept("buffer"):
        buffer = _scan_buffer(scanner, named)
        buffers[buffer.name] = buffer
    weights: dict[str, Weight] = {}
    while scanner.accept("weight"):
        weight = Weight(_string(scanner), names=scan_value(scanner, {}),
                        expression=scan_graph(scanner, named))
        weights[weight.buffer] = weight
    steps: list[Step] = []
    while not scanner.at_end():
        steps.append(_scan_step(scanner, named))
    return Program(name, capabilities, ranges, buffers, weights, tuple(steps), arena)


def _scan_capabilities(scanner: Scanner) -> Capabilities:
    name, values = _string(scanner), scan_value(scanner, {})
    plain: list[Any] = [frozenset(v) if isinstance(v, tuple) else v for v in values]
    return Capabilities(name, *plain)


def _scan_symbols(scanner: Scanner) -> tuple[tuple[tuple[str, int, int], ...], dict[str, Dim]]:
    ranges: list[tuple[str, int, int]] = []
    named: dict[str, Dim] = {}
    while scanner.accept("symbol"):
        name = scanner.name("a symbol")
        scanner.expect("in")
        low = scanner.integer()
        scanner.expect("..")
        high = scanner.integer()
        multiple = scanner.integer() if scanner.accept("multiple") else 1
        ranges.append((name, low, high))
        named[name] = low if low == high else symbol(name, low, high, multiple)
    return tuple(ranges), named


def _scan_buffer(scanner: Scanner, named: Mapping[str, Dim]) -> Buffer:
    name = _string(scanner)
    role = scanner.match(_WORD) or scanner.fail("expected a role")
    type_: Any = scan_type(scanner, named)
    layout = parse_layout(scanner.match(_LAYOUT) or scanner.fail("expected a layout"))
    count = scanner.integer()
    offset = scan_dim(scanner, named) if scanner.accept("at") else None
    return Buffer(name, type_, role, layout, count, offset)


def _scan_step(scanner: Scanner, named: Mapping[str, Dim]) -> Step:
    if not scanner.accept("loop"):
        return _scan_stage(scanner, named)
    count = scanner.integer()
    scanner.expect("{")
    stages = []
    while not scanner.accept("}"):
        stages.append(_scan_stage(scanner, named))
    return Loop(count, tuple(stages))


def _scan_stage(scanner: Scanner, named: Mapping[str, Dim]) -> Stage:
    scanner.expect("stage")
    name = _string(scanner)
    kind = scanner.match(_WORD) or scanner.fail("expected a kind of stage")
    operands = scan_value(scanner, {})
    scanner.expect("->")
    results = scan_value(scanner, {})
    return Stage(name, kind, scan_graph(scanner, named), operands, results)


def _string(scanner: Scanner) -> str:
    value = scan_value(scanner, {})
    return value if isinstance(value, str) else scanner.fail("expected a string")
