"""Where an expression's instructions go: each value at the outermost loop in which it is known.

Every loop of an expression opens a scope. The block before the loop stays open until the loop's
end, so that a value found to be invariant while the body is emitted still lands before the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import llvmlite.ir as ir

from llmc.codegen.integers import Index, Integer, Integers, emit_operation, high_of, multiple_of
from llmc.codegen.llvm import I64, Emitter, i64


class _Scope:
    """guard: in a branch, the depth from which on nothing may leave it (None for loops)."""

    def __init__(self, guard: int | None = None) -> None:
        self.guard = guard
        self.memo: dict[Any, ir.Value] = {}
        self.open_block: ir.Block | None = None  # end of this scope while an inner loop is emitted


class Scopes:
    """The stack of loops round the current position; scope 0 is where the expression was made."""

    def __init__(self, e: Emitter):
        self.e = e
        self.integers = Integers()
        self._stack = [_Scope()]

    @property
    def depth(self) -> int:
        return len(self._stack) - 1

    def find(self, key: Any, depth: int) -> ir.Value | None:
        """What was emitted for a key that is known from a depth on, if it is there already."""
        for scope in self._stack[depth:]:
            if key in scope.memo:
                return scope.memo[key]
        return None

    def keep(self, key: Any, depth: int, value: ir.Value) -> None:
        """Remember what was emitted in the scope of this depth."""
        self._stack[depth].memo[key] = value

    def place(self, depth: int) -> int:
        """The scope in which a value that is known from a depth on has to be emitted: branches keep
        what depends on their condition's operands."""
        for number in range(depth + 1, len(self._stack)):
            guard = self._stack[number].guard
            if guard is not None and guard <= depth:
                depth = number
        return depth

    @contextmanager
    def at(self, depth: int) -> Iterator[None]:
        """Emit into an enclosing scope, before the loops that are open inside it."""
        if depth == self.depth:
            yield
            return
        inner, self._stack = self._stack[depth + 1:], self._stack[:depth + 1]
        position = self.e.b.block
        self.e.b.position_at_end(self._stack[depth].open_block)
        try:
            yield
        finally:
            self._stack[depth].open_block = self.e.b.block
            self._stack += inner
            self.e.b.position_at_end(position)

    def emit(self, index: Index) -> ir.Value:
        """An index as an i64 LLVM value."""
        if isinstance(index, int):
            return i64(index)
        value = self.find(index, index.depth)
        if value is None:
            arguments = [] if index.op == "value" else [self.emit(a) for a in index.arguments]
            depth = self.place(index.depth)
            with self.at(depth):
                value = emit_operation(self.e, index, arguments)
            self.keep(index, depth, value)
        return value

    @contextmanager
    def branch(self, guard: int) -> Iterator[None]:
        """The scope of a conditional block; guard: the depth from which its condition is known."""
        self._stack.append(_Scope(guard))
        try:
            yield
        finally:
            self._stack.pop()

    @contextmanager
    def fold(self, start: Index, stop: Index, initial: list[ir.Value], step: int = 1,
             name: str = "i") -> Iterator[tuple[Integer, list[ir.Value], Any]]:
        """`Emitter.fold` as a scope: yields (index, carried, finish); see there."""
        b = self.e.b
        first, last = self.emit(start), self.emit(stop)
        outer = self._stack[-1]
        outer.open_block = b.block
        head, body, done = (b.append_basic_block(f"{name}.{part}")
                            for part in ("head", "body", "done"))
        b.position_at_end(head)
        counter = b.phi(I64, name)
        phis = [b.phi(value.type) for value in initial]
        b.cbranch(b.icmp_signed("<", counter, last), body, done)
        b.position_at_end(body)
        self._stack.append(_Scope())
        finish = _Finish(phis)
        yield self._counter(counter, start, stop, step), phis, finish
        self._stack.pop()
        if finish.values is None:
            raise ValueError("the loop's body did not finish its carried values")
        counter.add_incoming(b.add(counter, i64(step), flags=["nsw"]), b.block)
        for phi, value in zip(phis, finish.values, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(outer.open_block)
        counter.add_incoming(first, b.block)
        for phi, value in zip(phis, initial, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(done)

    def _counter(self, counter: ir.Value, start: Index, stop: Index, step: int) -> Integer:
        high = high_of(stop)
        index = self.integers.leaf(counter, self.depth, gcd(multiple_of(start), step),
                                   None if high is None else max(0, high - 1))
        assert isinstance(index, Integer)
        return index


class _Finish:
    def __init__(self, phis: list[ir.Value]):
        self.results = phis
        self.values: list[ir.Value] | None = None if phis else []

    def __call__(self, values: list[ir.Value]) -> None:
        self.values = list(values)
