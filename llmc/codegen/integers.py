"""Index arithmetic that folds before it is emitted.

An index is an `int` or an `Integer`: an immutable, interned expression over i64 values that are
never negative. What is known of it (upper bound, multiple) removes divisions; its depth is the loop
scope in which it becomes known, so that it is emitted there and not in inner loops.
"""

from __future__ import annotations

from math import gcd
from typing import Any, Union

import llmc.codegen.llvm as ll
from llmc.codegen.llvm import Emitter

Index = Union[int, "Integer"]


class Integer:
    """op: value (a leaf), add, sub, mul, div, mod, min, or select(a, b, x, y): x if a < b else y.

    high: greatest possible value or None; multiple: a number that divides it (0 divides 0 only).
    """

    __slots__ = ("arguments", "depth", "high", "multiple", "op", "table")

    def __init__(self, table: Integers, op: str, arguments: tuple, depth: int, multiple: int,
                 high: int | None):
        self.table = table
        self.op = op
        self.arguments = arguments
        self.depth = depth
        self.multiple = multiple
        self.high = high

    def __add__(self, other: Index) -> Index:
        return self.table.add(self, other)

    def __radd__(self, other: int) -> Index:
        return self.table.add(other, self)

    def __sub__(self, other: Index) -> Index:
        return self.table.subtract(self, other)

    def __rsub__(self, other: int) -> Index:
        return self.table.subtract(other, self)

    def __mul__(self, other: Index) -> Index:
        return self.table.multiply(self, other)

    def __rmul__(self, other: int) -> Index:
        return self.table.multiply(self, other)

    def __floordiv__(self, other: Index) -> Index:
        return self.table.divide(self, other)

    def __mod__(self, other: Index) -> Index:
        return self.table.modulo(self, other)

    def __rfloordiv__(self, other: int) -> Index:
        return self.table.divide(other, self)

    def __rmod__(self, other: int) -> Index:
        return self.table.modulo(other, self)


def high_of(a: Index) -> int | None:
    return a if isinstance(a, int) else a.high


def multiple_of(a: Index) -> int:
    return a if isinstance(a, int) else a.multiple


def depth_of(a: Index) -> int:
    return 0 if isinstance(a, int) else a.depth


class Integers:
    """The intern table of one expression: equal expressions are one object."""

    def __init__(self) -> None:
        self._table: dict[tuple, Integer] = {}

    def leaf(self, value: Any, depth: int, multiple: int = 1, high: int | None = None) -> Index:
        """An i64 LLVM value that is known from `depth` on."""
        if isinstance(value, ll.ir.Constant):
            return int(value.constant)
        key = ("value", id(value))
        if key not in self._table:
            self._table[key] = Integer(self, "value", (value,), depth, multiple, high)
        return self._table[key]

    def _make(self, op: str, arguments: tuple[Index, ...], multiple: int,
              high: int | None) -> Integer:
        key = (op, *arguments)
        if key not in self._table:
            depth = max(depth_of(argument) for argument in arguments)
            self._table[key] = Integer(self, op, arguments, depth, multiple, high)
        return self._table[key]

    def add(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        if b == 0:
            return a
        if isinstance(a, int):
            a, b = b, a
        if isinstance(b, int) and isinstance(a, Integer) and a.op == "add" \
                and isinstance(a.arguments[1], int):
            return self.add(a.arguments[0], a.arguments[1] + b)
        highs = high_of(a), high_of(b)
        high = None if None in highs else highs[0] + highs[1]  # type: ignore[operator]
        return self._make("add", (a, b), gcd(multiple_of(a), multiple_of(b)), high)

    def subtract(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        if b == 0:
            return a
        if a is b:
            return 0
        if isinstance(a, Integer) and a.op == "add":
            for mine, other in (a.arguments, a.arguments[::-1]):
                if mine is b or (isinstance(mine, int) and mine == b):
                    return other
        return self._make("sub", (a, b), gcd(multiple_of(a), multiple_of(b)), high_of(a))

    def multiply(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if isinstance(a, int):
            a, b = b, a
        if b == 0:
            return 0
        if b == 1:
            return a
        if isinstance(b, int) and isinstance(a, Integer) and a.op == "mul" \
                and isinstance(a.arguments[1], int):
            return self.multiply(a.arguments[0], a.arguments[1] * b)
        highs = high_of(a), high_of(b)
        high = None if None in highs else highs[0] * highs[1]  # type: ignore[operator]
        return self._make("mul", (a, b), multiple_of(a) * multiple_of(b), high)

    def divide(self, a: Index, b: Index) -> Index:
        """a // b for b > 0."""
        if b == 0:  # the size of an empty axis: the code never runs
            return 0
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        if b == 1 or a == 0:
            return a
        if a is b:
            return 1
        if isinstance(b, int) and isinstance(a, Integer):
            simple = self._divide_by_constant(a, b)
            if simple is not None:
                return simple
        elif isinstance(a, Integer) and a.op == "mul" and b in a.arguments:
            return a.arguments[0] if a.arguments[1] is b else a.arguments[1]
        high = high_of(a)
        multiple = 1
        if isinstance(b, int):
            multiple = multiple_of(a) // b if multiple_of(a) % b == 0 else 1
            high = None if high is None else high // b
        return self._make("div", (a, b), multiple, high)

    def _divide_by_constant(self, a: Integer, b: int) -> Index | None:
        if a.high is not None and a.high < b:
            return 0
        if a.op == "mul" and isinstance(a.arguments[1], int):
            factor = a.arguments[1]
            if factor % b == 0:
                return self.multiply(a.arguments[0], factor // b)
            if b % factor == 0:
                return self.divide(a.arguments[0], b // factor)
        if a.op == "add" and any(multiple_of(part) % b == 0 for part in a.arguments):
            return self.add(self.divide(a.arguments[0], b), self.divide(a.arguments[1], b))
        if a.op == "div" and isinstance(a.arguments[1], int):
            return self.divide(a.arguments[0], a.arguments[1] * b)
        return None

    def modulo(self, a: Index, b: Index) -> Index:
        """a % b for b > 0."""
        if b == 0:  # as in `divide`
            return 0
        if isinstance(a, int) and isinstance(b, int):
            return a % b
        if b == 1 or a == 0 or a is b:
            return 0
        if isinstance(b, int) and isinstance(a, Integer):
            if a.multiple % b == 0:
                return 0
            if a.high is not None and a.high < b:
                return a
            if a.op == "add":
                for part, rest in (a.arguments, a.arguments[::-1]):
                    if multiple_of(part) % b == 0:
                        return self.modulo(rest, b)
        multiple = gcd(multiple_of(a), b) if isinstance(b, int) else 1
        high = b - 1 if isinstance(b, int) else high_of(a)
        return self._make("mod", (a, b), multiple, high)

    def minimum(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        for one, other in ((a, b), (b, a)):
            high = high_of(one)
            if isinstance(other, int) and high is not None and high <= other:
                return one
        bounds = [high for high in (high_of(a), high_of(b)) if high is not None]
        return self._make("min", (a, b), gcd(multiple_of(a), multiple_of(b)),
                          min(bounds, default=None))

    def is_less(self, a: Index, b: Index) -> bool | None:
        """Whether a < b, where that is known."""
        if isinstance(a, int) and isinstance(b, int):
            return a < b
        high = high_of(a)
        if isinstance(b, int) and high is not None and high < b:
            return True
        if b == 0:
            return False
        return None

    def select_less(self, a: Index, b: Index, x: Index, y: Index) -> Index:
        """x if a < b else y; both are evaluated."""
        known = self.is_less(a, b)
        if known is not None or x is y:
            return y if known is False else x
        highs = high_of(x), high_of(y)
        high = None if None in highs else max(highs)  # type: ignore[type-var]
        return self._make("select", (a, b, x, y), gcd(multiple_of(x), multiple_of(y)), high)


def emit_operation(e: Emitter, integer: Integer, arguments: list) -> ll.ir.Value:
    """The instruction of one Integer, its arguments given as LLVM values."""
    if integer.op == "value":
        return integer.arguments[0]
    if integer.op == "min":
        return e.minimum(*arguments)
    if integer.op == "select":
        a, b, x, y = arguments
        return e.b.select(e.b.icmp_signed("<", a, b), x, y)
    if integer.op in ("div", "mod"):
        return (e.b.udiv if integer.op == "div" else e.b.urem)(*arguments)
    return {"add": e.b.add, "sub": e.b.sub, "mul": e.b.mul}[integer.op](*arguments, flags=["nsw"])
