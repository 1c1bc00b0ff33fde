"""Symbolic dims of an imported graph, and what the operators prove about them.

Exported graphs name dynamic axes freely: the attention mask has an axis of its own for what is
past + sequence, a head size is a name although the weights fix it. Where an operator demands that
two dims be equal, `SymbolTable.require_equal` solves the equation for one symbol and raises
`SymbolSolved`; the import starts over with the solution in place, so that every type in the graph
is built from the unified dims.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from llmc.errors import GraphError
from llmc.ir import dims
from llmc.ir.dims import Dim, Expression, Symbol

MAX_SOLUTIONS = 64


class SymbolSolved(Exception):
    """An equation gave `name` a value; the import has to start over with it."""

    def __init__(self, name: str, value: Dim) -> None:
        super().__init__(f"{name} = {value}")
        self.name, self.value = name, value


class SymbolTable:
    """The symbols of one import: declared names, and the solutions found so far.

    All start at 0 if axes `may_be_empty`, else only those that caches alone have.
    """

    def __init__(self, solutions: dict[str, Dim], may_be_empty: bool = False) -> None:
        self._solutions, self._may_be_empty = solutions, may_be_empty
        self._symbols: dict[str, Symbol] = {}
        self._cached: set[str] = set()

    def declare(self, name: str, cached: bool = False) -> Symbol:
        """The symbol of an axis; the first declaration of a name decides its range."""
        identifier = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        if not re.match(r"[A-Za-z_]", identifier) or identifier in dims.FUNCTIONS:
            identifier = f"dim_{identifier}"
        if identifier not in self._symbols:
            low = 0 if cached or self._may_be_empty else 1
            self._symbols[identifier] = dims.symbol(identifier, low)
            self._cached |= {identifier} if cached else set()
        return self._symbols[identifier]

    def resolve(self, dim: Dim) -> Dim:
        """The dim with every known solution substituted."""
        for _ in range(MAX_SOLUTIONS):
            resolved = dims.substitute(dim, self._solutions)
            if resolved is dim:
                return dim
            dim = resolved
        return dim

    def parse(self, text: str) -> Dim | None:
        """The dim of an exporter's axis text (`s15 + seq`), or None if it uses unknown names."""
        try:
            return self.resolve(dims.parse_dim(text, self._symbols))
        except GraphError:
            return None

    def require_equal(self, a: Dim, b: Dim) -> bool:
        """Whether a = b is proved. Raises SymbolSolved when one symbol can be solved for it."""
        if dims.known_equal(a, b):
            return True
        solution = solve(a, b) or _upper_bound(a, b) or _upper_bound(b, a)
        if solution is not None:
            raise SymbolSolved(*solution)
        return False

    def require_at_least(self, dim: Dim, least: int) -> None:
        """Raises SymbolSolved where dim >= least only holds if some axis is longer: not empty, or,
        where the dim is an axis, of that size."""
        if dims.known_at_least(dim, least) or isinstance(dim, int):
            return
        if isinstance(dim, Symbol):
            if dim.high is None or dim.high >= least:
                raise SymbolSolved(dim.name, dims.symbol(dim.name, least, dim.high, dim.multiple))
            return
        longer = {
            each.name: dims.symbol(each.name, 1, each.high, each.multiple)
            for each in dims.symbols(dim)
            if each.low == 0 and each.name not in self._cached
        }
        if longer and dims.known_at_least(dims.substitute(dim, longer), least):
            raise SymbolSolved(*min(longer.items()))

    def require_multiple(self, dim: Dim, n: Dim) -> None:
        """Raises SymbolSolved where dim, some times an axis, is only a multiple of n if that axis
        is one of a certain number."""
        form = dims.affine(dim)
        if form is None or form[0] != 0 or len(form[1]) != 1 or not isinstance(n, int):
            return
        [(axis, count)] = form[1].items()
        multiple = math.lcm(axis.multiple, n // math.gcd(count, n))
        if multiple != axis.multiple:
            raise SymbolSolved(axis.name, dims.symbol(axis.name, axis.low, axis.high, multiple))

    def same_shape(self, a: Iterable[Dim], b: Iterable[Dim]) -> bool:
        """require_equal over two shapes of one rank."""
        return all(self.require_equal(x, y) for x, y in zip(a, b, strict=True))


def solve(a: Dim, b: Dim) -> tuple[str, Dim] | None:
    """(symbol name, its value) that makes a = b, or None.

    A side that is a lone symbol is given the other side's value; of two lone symbols the one that
    may be smaller gives way, so that ranges only shrink. Else an affine equation is solved for a
    symbol whose coefficient is one, or for its only symbol.
    """
    if isinstance(a, Symbol) and isinstance(b, Symbol):
        gone, kept = (a, b) if (a.low, a.name) < (b.low, b.name) else (b, a)
        return gone.name, kept
    for symbol, other in ((a, b), (b, a)):
        if isinstance(symbol, Symbol) and symbol not in dims.symbols(other):
            return (symbol.name, other) if _within(other, symbol) else None
    return _solve_affine(a, b)


def _solve_affine(a: Dim, b: Dim) -> tuple[str, Dim] | None:
    form = dims.affine(a - b)
    if form is None:
        return None
    constant, coefficients = form
    if len(coefficients) == 1:
        [(symbol, coefficient)] = coefficients.items()
        value = -constant // coefficient
        if constant % coefficient == 0 and _within(value, symbol):
            return symbol.name, value
        return None
    for symbol, coefficient in sorted(coefficients.items(), key=lambda item: item[0].name):
        rest = a - b - coefficient * symbol
        if abs(coefficient) == 1 and _within(-coefficient * rest, symbol):
            return symbol.name, -coefficient * rest
    return None


def _within(value: Dim, symbol: Symbol) -> bool:
    """Whether the value can never fall below the symbol's range (above: the door checks)."""
    low, high = dims.bounds(value)
    return low >= min(symbol.low, 1) and (high is None or high >= symbol.low)


def _upper_bound(clamped: Dim, dim: Dim) -> tuple[str, Dim] | None:
    """min(n, limit) = n means that n is at most limit: the symbol with its range shortened."""
    if not isinstance(dim, Symbol) or not isinstance(clamped, Expression):
        return None
    _, limit = dims.bounds(clamped)
    if limit is None or dim.low > limit or dims.minimum(dim, limit) is not clamped:
        return None
    return dim.name, dims.symbol(dim.name, dim.low, limit, dim.multiple)
