"""Interned integer polynomials over symbols and atoms: the canonical form behind dims.py.

A `Dim` is an int or an `Expression`. Expressions are kept in one canonical form and interned, so
that equality is identity; a polynomial that is constant is a plain int. An atom is a symbol or a
call of floordiv, mod, min or max; `ceildiv(a, n)` is kept as `floordiv(a + n - 1, n)`, so that the
two ways of writing it are one, and printed as `ceildiv(a, n)`.
"""

import math
import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Union, cast
from weakref import WeakValueDictionary

from llmc.errors import GraphError
from llmc.ir.dtypes import DTYPES
from llmc.ir.scan import NAME

MAX = 2**31 - 1
FUNCTIONS = ("ceildiv", "floordiv", "mod", "min", "max")
# words that mean something else where the text form has a dim
_RESERVED = {*FUNCTIONS, *DTYPES, "true", "false", "inf", "nan"}

Dim = Union[int, "Expression"]
Monomial = tuple[tuple["Atom", int], ...]  # (atom, power), sorted by atom.order; () is the constant

_table: "WeakValueDictionary[object, Any]" = WeakValueDictionary()
_lock = threading.RLock()


class Expression:
    """A non-constant dim. Compare with `is` or `==` (identity); order with `known_at_least`.

    `terms` is a tuple of (monomial, coefficient), leading term first; `order` a string that sorts
    expressions the same way in every process.
    """

    __slots__ = ("__weakref__", "_symbols", "order")
    order: str
    _symbols: frozenset["Symbol"]  # unset in a symbol: it would be a cycle

    @property
    def terms(self) -> tuple[tuple[Monomial, int], ...]:
        raise NotImplementedError

    def __add__(self, other: Dim) -> Dim:
        return _add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return _add(self, _multiply(other, -1))

    def __rsub__(self, other: Dim) -> Dim:
        return _add(other, _multiply(self, -1))

    def __mul__(self, other: Dim) -> Dim:
        return _multiply(self, other)

    __rmul__ = __mul__

    def __neg__(self) -> Dim:
        return _multiply(self, -1)

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return mod(other, self)

    def _no_order(self, other: object) -> NoReturn:
        raise TypeError(f"dim '{self}' has no fixed order: use known_at_least, minimum or maximum")

    __lt__ = __le__ = __gt__ = __ge__ = _no_order

    def __copy__(self) -> "Expression":
        return self

    def __deepcopy__(self, memo: object) -> "Expression":
        return self

    def __str__(self) -> str:
        return format_dim(self)

    __repr__ = __str__


class Atom(Expression):
    """An expression that is no sum or product of others."""

    __slots__ = ()

    @property
    def terms(self) -> tuple[tuple[Monomial, int], ...]:
        return ((((self, 1),), 1),)


class Symbol(Atom):
    """A named unknown: any multiple of `multiple` in low..high (both inclusive)."""

    __slots__ = ("high", "low", "multiple", "name")
    name: str
    low: int
    high: int
    multiple: int

    def __reduce__(self) -> tuple[Any, ...]:
        return symbol, (self.name, self.low, self.high, self.multiple)


class Call(Atom):
    """`function` ("floordiv", "mod", "min" or "max") of `arguments`."""

    __slots__ = ("arguments", "function")
    function: str
    arguments: tuple[Dim, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return APPLY[self.function], self.arguments


class Polynomial(Expression):
    """A sum of products of atoms with at least two terms, two atoms or a coefficient."""

    __slots__ = ("_terms",)
    _terms: tuple[tuple[Monomial, int], ...]

    @property
    def terms(self) -> tuple[tuple[Monomial, int], ...]:
        return self._terms

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (dict(self._terms),)


# ---- construction --------------------------------------------------------------------------------


def symbol(name: str, low: int = 1, high: int | None = MAX, multiple: int = 1) -> Symbol:
    """The symbol of this name, range and multiple; high=None stands for MAX. GraphError if bad."""
    high = MAX if high is None else high
    if NAME.fullmatch(name) is None or name in _RESERVED:
        raise GraphError(
            f"{name!r} is no symbol name: not a word of '_', letters, digits, or taken"
        )
    if multiple < 1 or low > high or low > high // multiple * multiple:
        raise GraphError(f"symbol {name}: no multiple of {multiple} in {low}..{high}")
    low, high = -(-low // multiple) * multiple, high // multiple * multiple
    key = (Symbol, name, low, high, multiple)
    with _lock:
        found = _table.get(key)
        if found is None:
            found = Symbol()
            found.name, found.low, found.high, found.multiple = name, low, high, multiple
            found.order = f"{name}[{low}..{high}%{multiple}]"
            _table[key] = found
    return cast(Symbol, found)


def _call(function: str, *arguments: Dim) -> Call:
    key = (Call, function, arguments)
    with _lock:
        found = _table.get(key)
        if found is None:
            found = Call()
            found.function, found.arguments = function, arguments
            found.order = f"~{function}({','.join(map(_order, arguments))})"
            found._symbols = frozenset().union(*map(symbols, arguments))
            _table[key] = found
    return cast(Call, found)


def _order(dim: Dim) -> str:
    return dim.order if isinstance(dim, Expression) else str(dim)


def terms_of(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    """The terms of any dim, as an Expression's `terms`; a constant is one term of ()."""
    if isinstance(dim, Expression):
        return dim.terms
    value = operator.index(dim)
    return (((), value),) if value else ()


def _rank(monomial: Monomial) -> tuple[int, list[str]]:
    """Sorts monomials leading first. Graded lexicographic: respected by products (for division)."""
    atoms = [atom.order for atom, power in monomial for _ in range(power)]
    return -len(atoms), atoms


def _build(terms: Mapping[Monomial, int]) -> Dim:
    """The canonical dim of a sum of terms."""
    kept = {monomial: value for monomial, value in terms.items() if value}
    if all(monomial == () for monomial in kept):
        return kept.get((), 0)
    for monomial, value in kept.items():
        exact = _cancel_exact_division(monomial, value)
        if exact is not None:
            del kept[monomial]
            return _add(_build(kept), exact)
    if len(kept) == 1:
        [(monomial, value)] = kept.items()
        if value == 1 and len(monomial) == 1 and monomial[0][1] == 1:
            return monomial[0][0]
    ordered = tuple(sorted(kept.items(), key=lambda term: _rank(term[0])))
    key = (Polynomial, ordered)
    with _lock:
        found = _table.get(key)
        if found is None:
            found = Polynomial()
            found._terms = ordered
            found.order = "+".join(f"{'*'.join(_rank(m)[1])}*{value}" for m, value in ordered)
            found._symbols = frozenset().union(
                *(symbols(atom) for m, _ in ordered for atom, _ in m)
            )
            _table[key] = found
    return cast(Polynomial, found)


def _cancel_exact_division(monomial: Monomial, value: int) -> Dim | None:
    """A term with a factor floordiv(a, n), n dividing a and gcd(value, n) > 1, simplified."""
    for index, (atom, power) in enumerate(monomial):
        if not (isinstance(atom, Call) and atom.function == "floordiv"):
            continue
        numerator, divisor = atom.arguments
        if not isinstance(divisor, int) or known_divisor(numerator) % divisor:
            continue
        common = math.gcd(value, divisor)
        if common > 1:
            left = ((atom, power - 1),) if power > 1 else ()
            rest = _build({monomial[:index] + left + monomial[index + 1 :]: value // common})
            return _multiply(rest, floordiv(numerator, divisor // common))
    return None


def _add(a: Dim, b: Dim) -> Dim:
    if not isinstance(a, Expression) and not isinstance(b, Expression):
        return operator.index(a) + operator.index(b)
    total = dict(terms_of(a))
    for monomial, value in terms_of(b):
        total[monomial] = total.get(monomial, 0) + value
    return _build(total)


def _multiply(a: Dim, b: Dim) -> Dim:
    if not isinstance(a, Expression) and not isinstance(b, Expression):
        return operator.index(a) * operator.index(b)
    total: dict[Monomial, int] = {}
    for left, left_value in terms_of(a):
        for right, right_value in terms_of(b):
            monomial = _multiply_monomials(left, right)
            total[monomial] = total.get(monomial, 0) + left_value * right_value
    return _build(total)


def _multiply_monomials(a: Monomial, b: Monomial) -> Monomial:
    powers: dict[Atom, int] = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: item[0].order))


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all dims; 1 for none."""
    result: Dim = 1
    for dim in dims:
        result = _multiply(result, dim)
    return result


# ---- division ------------------------------------------------------------------------------------


def floordiv(a: Dim, n: Dim) -> Dim:
    """a // n, rounded down as in Python. GraphError if n is the constant 0."""
    if not isinstance(n, Expression):
        n = _checked_divisor(a, n)
        if n < 0:
            return floordiv(_multiply(a, -1), -n)
        if not isinstance(a, Expression):
            return operator.index(a) // n
        quotient, rest = _split(a, n)
        return _add(quotient, _floordiv_rest(rest, n))
    exact = divide_exactly(a, n)
    if exact is not None:
        return exact
    if known_at_least(a, 0) and known_at_least(n, _add(a, 1)):
        return 0
    return _call("floordiv", a, n)


def ceildiv(a: Dim, n: Dim) -> Dim:
    """a / n, rounded up; n must be positive. GraphError if n is the constant 0."""
    return floordiv(_add(a, _add(n, -1)), n)


def mod(a: Dim, n: Dim) -> Dim:
    """a % n with the sign of n, as in Python. GraphError if n is the constant 0."""
    if not isinstance(n, Expression):
        n = _checked_divisor(a, n)
        if n < 0:
            return _multiply(mod(_multiply(a, -1), -n), -1)
        if not isinstance(a, Expression):
            return operator.index(a) % n
        return _mod_rest(_split(a, n)[1], n)
    if divide_exactly(a, n) is not None:
        return 0
    if known_at_least(a, 0) and known_at_least(n, _add(a, 1)):
        return a
    return _call("mod", a, n)


def _checked_divisor(a: Dim, n: int) -> int:
    if operator.index(n) == 0:
        raise GraphError(f"dim '{format_dim(a)}' is divided by 0")
    return operator.index(n)


def _split(a: Dim, n: int) -> tuple[Dim, Dim]:
    """a as (quotient, rest): a = n*quotient + rest, rest's constant in 0..n-1, n > 0."""
    quotients: dict[Monomial, int] = {}
    rests: dict[Monomial, int] = {}
    for monomial, value in terms_of(a):
        # a constant rounds down, a coefficient towards zero: -x // 4 stays -x // 4
        quotient = value // n if not monomial or value > 0 else -(-value // n)
        quotients[monomial], rests[monomial] = quotient, value - n * quotient
    return _build(quotients), _build(rests)


def _constant_and_content(a: Expression) -> tuple[int, int, int]:
    """(constant term, gcd of the other coefficients, known divisor of the other terms' sum)."""
    values = dict(a.terms)
    constant = values.pop((), 0)
    return constant, math.gcd(*values.values()), known_divisor(_build(values))


def _floordiv_rest(rest: Dim, n: int) -> Dim:
    """rest // n for a rest of `_split`."""
    if not isinstance(rest, Expression):
        return rest // n
    low, high = interval(rest)
    if low // n == high // n:
        return low // n
    constant, content, divisor = _constant_and_content(rest)
    # (g*x + c) // n, g dividing x's terms and n: the low part c % g never carries
    low_part = constant % math.gcd(divisor, n)
    if low_part:
        return floordiv(rest - low_part, n)
    common = math.gcd(content, n)
    if common > 1:
        parts = {monomial: value // common for monomial, value in rest.terms}
        return floordiv(_build(parts), n // common)
    if isinstance(rest, Call) and rest.function == "floordiv":
        numerator, inner = rest.arguments
        if isinstance(inner, int):
            return floordiv(numerator, inner * n)
    return _call("floordiv", rest, n)


def _mod_rest(rest: Dim, n: int) -> Dim:
    """rest % n for a rest of `_split`."""
    if not isinstance(rest, Expression):
        return rest % n
    low, high = interval(rest)
    if low // n == high // n:
        return rest - n * (low // n)
    constant, content, divisor = _constant_and_content(rest)
    if divisor % n == 0:
        return constant % n
    low_part = constant % math.gcd(divisor, n)
    if low_part:
        return mod(rest - low_part, n) + low_part
    common = math.gcd(content, n)
    if common > 1:
        parts = {monomial: value // common for monomial, value in rest.terms}
        return mod(_build(parts), n // common) * common
    return _call("mod", rest, n)


def divide_exactly(a: Dim, n: Expression) -> Dim | None:
    """The polynomial q with a = n*q, if there is one and n cannot be 0 (long division)."""
    low, high = interval(n)
    if low <= 0 <= high:
        return None
    quotient: Dim = 0
    [lead, lead_value] = n.terms[0]
    while terms_of(a):
        monomial, value = terms_of(a)[0]
        factor = _divide_monomials(monomial, lead)
        if factor is None or value % lead_value:
            return None
        step = _build({factor: value // lead_value})
        quotient = _add(quotient, step)
        remaining = _add(a, _multiply(_multiply(step, n), -1))
        # an exact floordiv may cancel and reorder the terms: only go on while this gets smaller
        if terms_of(remaining) and _rank(terms_of(remaining)[0][0]) <= _rank(monomial):
            return None
        a = remaining
    return quotient


def _divide_monomials(a: Monomial, b: Monomial) -> Monomial | None:
    powers = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, 0) - power
    if any(power < 0 for power in powers.values()):
        return None
    return tuple((atom, power) for atom, power in powers.items() if power)


# ---- minimum and maximum -------------------------------------------------------------------------


def minimum(*dims: Dim) -> Dim:
    """The smallest of the dims."""
    return _extreme("min", dims)


def maximum(*dims: Dim) -> Dim:
    """The greatest of the dims."""
    return _extreme("max", dims)


def _extreme(function: str, dims: tuple[Dim, ...]) -> Dim:
    if not dims:
        raise GraphError(f"{function} of no dims")
    flat: list[Dim] = []
    for dim in dims:
        nested = isinstance(dim, Call) and dim.function == function
        flat.extend(cast(Call, dim).arguments if nested else [dim])
    kept: list[Dim] = []
    for dim in sorted(set(flat), key=_order):
        if any(_beats(function, other, dim) for other in kept):
            continue
        kept = [other for other in kept if not _beats(function, dim, other)]
        kept.append(dim)
    return kept[0] if len(kept) == 1 else _call(function, *kept)


def _beats(function: str, a: Dim, b: Dim) -> bool:
    return known_at_least(b, a) if function == "min" else known_at_least(a, b)


APPLY: dict[str, Callable[..., Dim]] = {
    "floordiv": floordiv,
    "ceildiv": ceildiv,
    "mod": mod,
    "min": minimum,
    "max": maximum,
}


# ---- what is known of a dim ----------------------------------------------------------------------


def interval(dim: Dim) -> tuple[int, int]:
    """(low, high) by interval arithmetic: every value of the dim lies in between."""
    if not isinstance(dim, Expression):
        return operator.index(dim), operator.index(dim)
    if isinstance(dim, Symbol):
        return dim.low, dim.high
    if isinstance(dim, Call):
        return _call_interval(dim.function, [interval(value) for value in dim.arguments])
    low = high = 0
    for monomial, value in dim.terms:
        term = (value, value)
        for atom, power in monomial:
            for _ in range(power):
                term = _corners(operator.mul, term, interval(atom))
        low, high = low + term[0], high + term[1]
    return low, high


def _call_interval(function: str, of: list[tuple[int, int]]) -> tuple[int, int]:
    if function == "min":
        return min(low for low, _ in of), min(high for _, high in of)
    if function == "max":
        return max(low for low, _ in of), max(high for _, high in of)
    value, divisor = of
    if function == "mod":
        low, high = min(divisor[0] + 1, 0), max(divisor[1] - 1, 0)
        return (low, min(high, value[1])) if value[0] >= 0 and divisor[0] > 0 else (low, high)
    if divisor[0] <= 0 <= divisor[1]:
        # a divisor of 0 is refused when evaluated; of the others, 1 and -1 give the extremes
        reach = max(abs(value[0]), abs(value[1]))
        return -reach, reach
    return _corners(operator.floordiv, value, divisor)


def _corners(function: Any, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    values = [function(x, y) for x in a for y in b]
    return min(values), max(values)


def known_divisor(dim: Dim) -> int:
    """The greatest integer known to divide the dim; 0 for the constant 0."""
    if not isinstance(dim, Expression):
        return abs(operator.index(dim))
    if isinstance(dim, Symbol):
        return dim.multiple
    if isinstance(dim, Call):
        of = [known_divisor(value) for value in dim.arguments]
        if dim.function != "floordiv":
            return math.gcd(*of)
        divisor = dim.arguments[1]
        exact = isinstance(divisor, int) and of[0] % divisor == 0
        return of[0] // cast(int, divisor) if exact else 1
    return math.gcd(
        *(abs(v) * math.prod(known_divisor(a) ** p for a, p in m) for m, v in dim.terms)
    )


def symbols(dim: Dim) -> frozenset[Symbol]:
    """Every symbol that occurs in the dim."""
    if isinstance(dim, Symbol):
        return frozenset([dim])
    return dim._symbols if isinstance(dim, Expression) else frozenset()


def known_at_least(a: Dim, b: Dim) -> bool:
    """Whether a >= b for all values of the symbols, provably."""
    return a is b or interval(_add(a, _multiply(b, -1)))[0] >= 0


# ---- printing ------------------------------------------------------------------------------------


def format_dim(dim: Dim) -> str:
    """Text such as `tokens*2 + 1`, `ceildiv(tokens, 4)`, `batch*seq`; `parse_dim` reads it."""
    if not isinstance(dim, Expression):
        return str(operator.index(dim))
    if isinstance(dim, Symbol):
        return dim.name
    if isinstance(dim, Call):
        return _format_call(dim)
    text = ""
    for monomial, value in dim.terms:
        factors = [format_dim(atom) for atom, power in monomial for _ in range(power)]
        if abs(value) != 1 or not factors:
            factors.append(str(abs(value)))
        sign = "-" if value < 0 else "+"
        text += (f" {sign} " if text else sign.strip("+")) + "*".join(factors)
    return text


def _format_call(call: Call) -> str:
    function, arguments = call.function, call.arguments
    if function == "floordiv" and isinstance(arguments[1], int):
        rounded_up = arguments[0] - arguments[1] + 1
        if isinstance(rounded_up, Expression) and all(monomial for monomial, _ in rounded_up.terms):
            function, arguments = "ceildiv", (rounded_up, arguments[1])
    return f"{function}({', '.join(map(format_dim, arguments))})"
