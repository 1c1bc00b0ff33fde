"""Symbolic dimensions: what the rest of llmc imports.

A `Dim` is an int or an `Expression`: an interned integer polynomial over symbols and the atoms
floordiv, mod, min and max (see polynomial.py for the canonical form). Equality is identity.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

from llmc.errors import ShapeError
from llmc.ir.polynomial import (
    APPLY,
    FUNCTIONS,
    MAX,
    Atom,
    Call,
    Dim,
    Expression,
    Monomial,
    Polynomial,
    Symbol,
    ceildiv,
    divide_exactly,
    floordiv,
    format_dim,
    interval,
    known_at_least,
    known_divisor,
    maximum,
    minimum,
    mod,
    product,
    symbol,
    symbols,
    terms_of,
)
from llmc.ir.scan import NAME, Scanner

__all__ = [
    "MAX",
    "Atom",
    "Call",
    "Dim",
    "Expression",
    "Monomial",
    "Polynomial",
    "Symbol",
    "affine",
    "bounds",
    "ceildiv",
    "evaluate",
    "floordiv",
    "format_dim",
    "known_at_least",
    "known_equal",
    "known_multiple",
    "maximum",
    "minimum",
    "mod",
    "parse_dim",
    "product",
    "scan_dim",
    "substitute",
    "symbol",
    "symbols",
    "terms_of",
]


def bounds(dim: Dim) -> tuple[int, int | None]:
    """(low, high): every value of the dim lies in between; high None means no bound is known."""
    return interval(dim)


def known_equal(a: Dim, b: Dim) -> bool:
    """Whether the two are provably equal (False: unknown or different)."""
    return a is b or interval(a - b) == (0, 0)


def known_multiple(dim: Dim, n: Dim) -> bool:
    """Whether n provably divides the dim."""
    if isinstance(n, Expression):
        return divide_exactly(dim, n) is not None
    return operator.index(n) != 0 and known_divisor(dim) % n == 0


def affine(dim: Dim) -> tuple[int, dict[Symbol, int]] | None:
    """(constant, {symbol: coefficient}) if the dim is that sum, else None."""
    constant, coefficients = 0, {}
    for monomial, value in terms_of(dim):
        if not monomial:
            constant = value
        elif len(monomial) == 1 and monomial[0][1] == 1 and isinstance(monomial[0][0], Symbol):
            coefficients[monomial[0][0]] = value
        else:
            return None
    return constant, coefficients


def substitute(dim: Dim, mapping: Mapping[Any, Dim]) -> Dim:
    """The dim with symbols (keys: the symbol or its name) replaced, all at once."""
    if isinstance(dim, Symbol):
        return mapping.get(dim, mapping.get(dim.name, dim))
    if not isinstance(dim, Expression):
        return dim
    if not any(each in mapping or each.name in mapping for each in symbols(dim)):
        return dim
    if isinstance(dim, Call):
        return APPLY[dim.function](*(substitute(value, mapping) for value in dim.arguments))
    total: Dim = 0
    for monomial, value in dim.terms:
        factors = (substitute(atom, mapping) for atom, power in monomial for _ in range(power))
        total = total + product(factors) * value
    return total


def evaluate(dim: Dim, values: Mapping[str, int], known: dict[Expression, int] | None = None
             ) -> int:
    """The dim's value with symbols by name. ShapeError: a symbol is missing, a divisor is 0.

    known: what expressions came to, read and added to: dims that share parts are evaluated together
    in less time.
    """
    if not isinstance(dim, Expression):
        return operator.index(dim)
    if known is not None and dim in known:
        return known[dim]
    result = _evaluate(dim, values, known)
    if known is not None:
        known[dim] = result
    return result


def _evaluate(dim: Expression, values: Mapping[str, int], known: dict[Expression, int] | None
              ) -> int:
    if isinstance(dim, Symbol):
        if dim.name not in values:
            raise ShapeError(f"no value for the symbol '{dim.name}'")
        return operator.index(values[dim.name])
    if isinstance(dim, Call):
        arguments = [evaluate(value, values, known) for value in dim.arguments]
        if dim.function in ("floordiv", "mod") and arguments[1] == 0:
            raise ShapeError(f"division by zero in '{dim}'")
        return _EVALUATE[dim.function](*arguments)
    return sum(
        value * math.prod(evaluate(atom, values, known) ** power for atom, power in monomial)
        for monomial, value in dim.terms
    )


_EVALUATE: dict[str, Any] = {
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
}


# ---- text ----------------------------------------------------------------------------------------


def parse_dim(text: str, symbols: Mapping[str, Dim]) -> Dim:
    """The dim that `format_dim` printed, its symbols taken by name. GraphError on bad text."""
    scanner = Scanner(text)
    dim = scan_dim(scanner, symbols)
    if not scanner.at_end():
        scanner.fail("expected the end of the dim")
    return dim


def scan_dim(scanner: Scanner, symbols: Mapping[str, Dim]) -> Dim:
    """Reads a dim (sums of products of atoms) from the scanner; GraphError on bad text."""
    dim = _scan_product(scanner, symbols)
    while True:
        if scanner.accept("+"):
            dim = dim + _scan_product(scanner, symbols)
        elif scanner.accept("-"):
            dim = dim - _scan_product(scanner, symbols)
        else:
            return dim


def _scan_product(scanner: Scanner, symbols: Mapping[str, Dim]) -> Dim:
    dim = _scan_factor(scanner, symbols)
    while True:
        if scanner.accept("*"):
            dim = dim * _scan_factor(scanner, symbols)
        elif scanner.accept("//"):
            dim = floordiv(dim, _scan_factor(scanner, symbols))
        elif scanner.accept("%"):
            dim = mod(dim, _scan_factor(scanner, symbols))
        else:
            return dim


def _scan_factor(scanner: Scanner, symbols: Mapping[str, Dim]) -> Dim:
    if scanner.accept("-"):
        return -_scan_factor(scanner, symbols)
    if scanner.accept("("):
        dim = scan_dim(scanner, symbols)
        scanner.expect(")")
        return dim
    start = scanner.position
    name = scanner.match(NAME)
    if name is None:
        return scanner.integer()
    if name not in FUNCTIONS:
        if name not in symbols:
            scanner.fail(f"unknown symbol '{name}'", start)
        return symbols[name]
    scanner.expect("(")
    arguments = [scan_dim(scanner, symbols)]
    while scanner.accept(","):
        arguments.append(scan_dim(scanner, symbols))
    scanner.expect(")")
    if name not in ("min", "max") and len(arguments) != 2:
        scanner.fail(f"{name} takes two dims", start)
    return APPLY[name](*arguments)
