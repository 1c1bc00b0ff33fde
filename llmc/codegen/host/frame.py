"""Dims and buffers of a step as LLVM values, read from the step's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.ir as ir

from llmc.codegen.llvm import I64, POINTER, Emitter, i64
from llmc.errors import CompileError
from llmc.ir.dims import Call, Dim, Expression, Symbol
from llmc.ir.program import Buffer, Program

FIELDS = ("symbols", "inputs", "outputs", "weights", "states", "arena", "scratch", "team", "cancel")
ARGUMENTS = {name: 8 * index for index, name in enumerate(FIELDS)}  # byte offsets
_TABLES = {"input": "inputs", "output": "outputs", "weight": "weights", "state": "states"}


class StageFrame:
    """The Frame of a function whose first argument is the step's arguments.

    Everything is emitted once, at the end of the function's entry block (which must hold nothing
    but a branch to the code), so that it is known wherever it is used.
    """

    alignment = 1  # inputs and outputs are the caller's

    def __init__(self, program: Program, e: Emitter, arguments: ir.Value, layer: ir.Value):
        self.program = program
        self.layer = layer
        self._e = e
        self._arguments = arguments
        self._tables: dict[str, ir.Value] = {}
        self._pointers: dict[str, ir.Value] = {}
        self._dims: dict[Dim, ir.Value] = {}
        self._fixed = {name: low for name, low, high in program.symbols if low == high}
        self._slots = {name: slot for role in _TABLES for name, slot in program.slots(role).items()}
        self._places = {name: 8 * i for i, (name, _, _) in enumerate(program.symbols)}

    def dim(self, dim: Dim) -> ir.Value:
        """The value of a dim, i64; a constant where the shape key fixes it."""
        if not isinstance(dim, Expression):
            return i64(dim)
        if dim not in self._dims:
            with self._in_entry():
                self._dims[dim] = self._evaluate(dim)
        return self._dims[dim]

    def pointer(self, buffer: Buffer) -> ir.Value:
        """Base address of the buffer (of this turn's copy, inside a Loop)."""
        if buffer.name not in self._pointers:
            with self._in_entry():
                self._pointers[buffer.name] = self._address(buffer)
        return self._pointers[buffer.name]

    @contextmanager
    def _in_entry(self) -> Iterator[None]:
        """Before the entry block's terminator; leaving restores the position, so not twice."""
        if self._e.b.block is self._e.b.function.entry_basic_block:
            yield
            return
        with self._e.b.goto_entry_block():
            yield

    def _address(self, buffer: Buffer) -> ir.Value:
        if buffer.role == "arena":
            if buffer.offset is None:
                raise CompileError(f"buffer {buffer.name} has no place in the arena")
            return self._e.offset(self._table("arena"), self.dim(buffer.offset))
        slot: ir.Value = i64(self._slots[buffer.name])
        if buffer.count > 1:
            slot = self._e.b.add(slot, self.layer)
        entry = self._e.offset(self._table(_TABLES[buffer.role]), slot, POINTER)
        return self._load_pointer(entry)

    def _load_pointer(self, place: ir.Value) -> ir.Value:
        return self._e.load(place, POINTER)

    def _table(self, field: str) -> ir.Value:
        if field not in self._tables:
            place = self._e.offset(self._arguments, ARGUMENTS[field])
            self._tables[field] = self._load_pointer(place)
        return self._tables[field]

    def _evaluate(self, dim: Expression) -> ir.Value:
        if isinstance(dim, Symbol):
            return self._symbol(dim)
        if isinstance(dim, Call):
            return self._call(dim)
        b, total = self._e.b, None
        for monomial, coefficient in dim.terms:
            term: ir.Value = i64(coefficient)
            for atom, power in monomial:
                for _ in range(power):
                    factor = self.dim(atom)
                    term = factor if term == i64(1) else b.mul(term, factor, flags=["nsw"])
            total = term if total is None else b.add(total, term, flags=["nsw"])
        return total

    def _symbol(self, dim: Symbol) -> ir.Value:
        if dim.name in self._fixed:
            return i64(self._fixed[dim.name])
        if dim.name not in self._places:
            raise CompileError(f"program {self.program.name} has no symbol {dim.name}")
        place = self._e.offset(self._table("symbols"), self._places[dim.name])
        return self._e.load(place, I64)

    def _call(self, dim: Call) -> ir.Value:
        e = self._e
        a, c = (self.dim(argument) for argument in dim.arguments[:2])
        if dim.function in ("min", "max"):
            combine = e.minimum if dim.function == "min" else e.maximum
            for argument in dim.arguments[2:]:
                a = combine(a, self.dim(argument))
            return combine(a, c)
        quotient = self._floor_divide(a, c)
        if dim.function == "floordiv":
            return quotient
        return e.b.sub(a, e.b.mul(quotient, c))

    def _floor_divide(self, a: ir.Value, c: ir.Value) -> ir.Value:
        """Dims may be negative on the way (tokens - 5): rounds down, for c > 0."""
        b = self._e.b
        quotient = b.sdiv(a, c)
        rest = b.sub(a, b.mul(quotient, c))
        return b.select(b.icmp_signed("<", rest, i64(0)), b.sub(quotient, i64(1)), quotient)
