"""Large angles less their whole quarter turns, by integer arithmetic (Payne and Hanek).

An angle is m 2^p with 64 bits of m. Of 2 / pi only 192 bits count: those before them make multiples
of four quarter turns with m 2^p, those behind too little to be seen: no double but 0 is nearer than
2^-62 to a multiple of pi / 2.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import llvmlite.ir as ir

from llmc.codegen.llvm import F64, I64, Emitter, i64

WORDS = 20  # of 2 / pi, with what the largest double needs
_WIDE = ir.IntType(128)
_FIRST_EXPONENT = 1024  # of the exponent field, whose angle begins to read at the table's bit 0
_TABLE = "llmc_two_over_pi"
HALF_PI = (1.5707963267948966, 6.123233995736766e-17)  # the sum of two doubles


def reduce_angle(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(r, n) with x = n pi / 2 + r, |r| <= pi / 4, for a finite double |x| >= 2: r with an error
    of 1 ulp at most, n as an i64 up to a multiple of 4. Anything for an infinity."""
    b = e.b
    bits = b.bitcast(x, I64)
    fraction = b.and_(bits, i64((1 << 52) - 1))
    m = b.shl(b.or_(fraction, i64(1 << 52)), i64(11))
    exponent = b.and_(b.lshr(bits, i64(52)), i64(0x7FF))
    first = b.sub(exponent, i64(_FIRST_EXPONENT))
    window = _window(e, b.lshr(first, i64(6)), b.and_(first, i64(63)))
    low = b.trunc(b.lshr(_product(e, m, window[2]), _WIDE(64)), I64)
    middle = b.add(_product(e, m, window[1]), b.zext(low, _WIDE))
    high = b.add(b.mul(m, window[0]), b.trunc(b.lshr(middle, _WIDE(64)), I64))
    # `high` has quarter turns in its first two bits; the nearest whole number of them goes.
    n = b.lshr(b.add(high, i64(1 << 61)), i64(62))
    r = _radians(e, b.sub(high, b.shl(n, i64(62))), b.trunc(middle, I64))
    negative = b.icmp_signed("<", bits, i64(0))
    return b.select(negative, b.fneg(r), r), b.select(negative, b.neg(n), n)


def _window(e: Emitter, word: ir.Value, shift: ir.Value) -> list[ir.Value]:
    """192 bits of 2 / pi, from a bit of a word on."""
    table = _table(e.module)
    words = [e.load(e.offset(table, e.b.add(word, i64(number)), I64), I64) for number in range(4)]
    return [e.call("llvm.fshl.i64", I64, first, second, shift)
            for first, second in pairwise(words)]


def _product(e: Emitter, x: ir.Value, y: ir.Value) -> ir.Value:
    return e.b.mul(e.b.zext(x, _WIDE), e.b.zext(y, _WIDE))


def _radians(e: Emitter, high: ir.Value, low: ir.Value) -> ir.Value:
    """high 2^-62 + low 2^-126 quarter turns, |high| <= 2^61, as a double in radians."""
    b = e.b
    sign = b.ashr(high, i64(63))
    high, low = b.xor(high, sign), b.xor(low, sign)
    zeros = e.call("llvm.ctlz.i64", I64, high, ir.Constant(ir.IntType(1), 0))
    digits = e.call("llvm.fshl.i64", I64, high, low, zeros)
    top = b.sitofp(b.lshr(digits, i64(11)), F64)
    rest = b.fmul(b.sitofp(b.and_(digits, i64(0x7FF)), F64), F64(HALF_PI[0] * 2.0**-11))
    r = e.fma(top, F64(HALF_PI[0]), e.fma(top, F64(HALF_PI[1]), rest))
    scale = b.shl(b.sub(i64(1023 - 51), zeros), i64(52))
    r = b.fmul(r, b.bitcast(scale, F64))
    return b.select(b.icmp_signed("<", sign, i64(0)), b.fneg(r), r)


def _table(module: ir.Module) -> ir.GlobalVariable:
    found = module.globals.get(_TABLE)
    if found is None:
        type_ = ir.ArrayType(I64, WORDS)
        found = ir.GlobalVariable(module, type_, _TABLE)
        found.linkage, found.global_constant = "internal", True
        found.align = 64
        found.initializer = ir.Constant(type_, [I64(word) for word in two_over_pi()])
    return found


@cache
def two_over_pi() -> tuple[int, ...]:
    """2 / pi in words of 64 bits: the first before the point, the others behind it."""
    bits = 64 * (WORDS - 1)
    one = 1 << (bits + 64)  # with digits to spare
    pi = 4 * (4 * _arctan(one, 5) - _arctan(one, 239))  # Machin
    value = (one << (bits + 1)) // pi
    return tuple(value >> (64 * (WORDS - 1 - number)) & (1 << 64) - 1 for number in range(WORDS))


def _arctan(one: int, inverse: int) -> int:
    """arctan(1 / inverse) in units of 1 / one, by its series."""
    power, total, odd = one // inverse, 0, 1
    while power:
        total += power // odd if odd % 4 == 1 else -(power // odd)
        power //= inverse * inverse
        odd += 2
    return total
