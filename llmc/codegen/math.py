"""Elementary functions on f32 and f64 scalars and vectors, as polynomial code; only sines of huge
angles branch.

Every function takes an Emitter and values of one type (`float`, `double`, or a vector of them) and
returns a value of that type. No library call is made, so the code vectorises on the host and
assembles for NVPTX, where most libm intrinsics do not exist. No fast-math flag is set: NaN,
infinities, signed zeros and denormals are handled as IEEE 754 and C99 ask. The bounds in the
docstrings are in units in the last place, measured by tests/codegen/test_math.py against an
oracle of higher precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from llmc.codegen.angles import HALF_PI, reduce_angle
from llmc.codegen.llvm import (
    F32,
    F64,
    I1,
    I32,
    I64,
    Emitter,
    define,
    lanes_of,
    like,
    splat_constant,
)


@dataclass(frozen=True)
class _Format:
    """Constants of a float format, and the polynomials that fit its precision."""

    integer: ir.Type
    mantissa_bits: int
    bias: int
    round_magic: float  # adding it leaves round(x) in the low mantissa bits
    least_normal: float
    exp_range: tuple[float, float]  # below: exp is 0; above: infinity
    tanh_limit: float  # tanh is 1 from here on
    ln2_high: float
    ln2_low: float
    exp: tuple[float, ...]  # (e^r - 1 - r) / r^2, |r| <= ln(2) / 2
    log: tuple[float, ...]  # atanh series in s^2, s = f / (2 + f)
    sin: tuple[float, ...]  # (sin(r) / r - 1) / r^2, |r| <= pi / 4
    cos: tuple[float, ...]  # (cos(r) - 1 + r^2 / 2) / r^4


_SINGLE = _Format(
    integer=I32, mantissa_bits=23, bias=127, round_magic=1.5 * 2**23, least_normal=2.0**-126,
    exp_range=(-104.5, 89.0), tanh_limit=10.0,
    ln2_high=0.693359375, ln2_low=-2.12194440e-4,
    exp=(5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3,
         1.9875691500e-4),
    log=(0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
    sin=(-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4),
    cos=(4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5),
)
_DOUBLE = _Format(
    integer=I64, mantissa_bits=52, bias=1023, round_magic=1.5 * 2**52, least_normal=2.0**-1022,
    exp_range=(-746.0, 710.0), tanh_limit=22.0,
    ln2_high=6.93147180369123816490e-01, ln2_low=1.90821492927058770002e-10,
    exp=tuple(1 / math.factorial(k) for k in range(2, 15)),
    log=(6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
         2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
         1.479819860511658591e-01),
    sin=(-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
         2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10),
    cos=(4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
         -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11),
)

# 2^r = 1 + r * (...), |r| <= 1/2: enough for results that are rounded or summed in f32.
_EXP2 = (0.69314718246, 0.24022647738, 0.05550332367, 9.6184368777e-3, 1.3398875017e-3,
         1.5353361960e-4)
# The same to 1.1e-4 of 2^r: enough for results that are rounded to bf16.
_EXP2_COARSE = (0.69328290, 0.24221097, 0.05500892)

# erf(x) = 1 - exp(-t - t * tail(t)) from 475/512 on, x + x * near(x^2) below.
_ERF_NEAR = (1.28379166e-1, -3.76125336e-1, 1.12819925e-1, -2.67681349e-2, 4.99119423e-3,
             -5.96761703e-4)
_ERF_TAIL = (-1.28717512e-1, -6.34846687e-1, -1.06777877e-1, 2.42546219e-2, -3.88396438e-3,
             3.83197126e-4, -1.72853470e-5)

# log2 of erfc(t / sqrt(2)), up to t = 6.
_NORMAL = (-1.151112675666809, -0.45914146304130554, -0.05269092321395874, 7.321406155824661e-3,
           -3.0959417927078903e-4, -1.2873786909040064e-4, 3.207960253348574e-5,
           -3.2502061912964564e-6, 1.294347669045237e-7)
_NORMAL_END = 6.0

# f64: erf(x) = x * T(x^2) / U(x^2) below 1, 1 - exp(-x^2) * P(x) / Q(x) above (Cephes).
_ERF_T = (5.55923013010394962768e4, 7.00332514112805075473e3, 2.23200534594684319226e3,
          9.00260197203842689217e1, 9.60497373987051638749e0)
_ERF_U = (4.92673942608635921086e4, 2.26290000613890934246e4, 4.59432382970980127987e3,
          5.21357949780152679795e2, 3.35617141647503099647e1, 1.0)
_ERF_P = (5.57535335369399327526e2, 1.02755188689515710272e3, 9.34528527171957607540e2,
          5.26445194995477358631e2, 1.96520832956077098242e2, 4.86371970985681366614e1,
          7.46321056442269912687e0, 5.64189564831068821977e-1, 2.46196981473530512524e-10)
_ERF_Q = (5.57535340817727675546e2, 1.65666309194161350182e3, 2.24633760818710981792e3,
          1.82390916687909736289e3, 9.75708501743205489753e2, 3.54937778887819891062e2,
          8.67072140885989742329e1, 1.32281951154744992508e1, 1.0)

# pi / 2 in three parts of 53 bits each.
_HALF_PI = (*HALF_PI, -1.4973849048591833e-33)
FAR = 2.0**45  # from here on a product cannot tell the quarter turns: rounded, it is off by some
FAR_SINE = "llmc_far_sine"


def _element(x: ir.Value) -> ir.Type:
    return x.type.element if isinstance(x.type, ir.VectorType) else x.type


def _format(x: ir.Value) -> _Format:
    return _DOUBLE if _element(x) == F64 else _SINGLE


def _constant(x: ir.Value, value) -> ir.Constant:
    """A constant with x's type."""
    return splat_constant(x.type, value)


def _polynomial(e: Emitter, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """coefficients[0] + coefficients[1] x + ..., by Horner's rule."""
    result: ir.Value = _constant(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = e.fma(result, x, _constant(x, coefficient))
    return result


def _unary(e: Emitter, name: str, x: ir.Value) -> ir.Value:
    element = _element(x)
    suffix = f"f{64 if element == F64 else 32}"
    if isinstance(x.type, ir.VectorType):
        suffix = f"v{x.type.count}{suffix}"
    return e.call(f"llvm.{name}.{suffix}", x.type, x)


def _clamp(e: Emitter, x: ir.Value, low: float | None, high: float | None) -> ir.Value:
    """x within [low, high]; a NaN stays NaN."""
    if low is not None:
        below = e.b.fcmp_ordered("<", x, _constant(x, low))
        x = e.b.select(below, _constant(x, low), x)
    if high is not None:
        above = e.b.fcmp_ordered(">", x, _constant(x, high))
        x = e.b.select(above, _constant(x, high), x)
    return x


def _bits(e: Emitter, x: ir.Value) -> ir.Value:
    return e.b.bitcast(x, like(x, _format(x).integer))


def _round_small(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(round(x) as a float, as an integer), half to even, for |x| below 2^22 (2^51).

    By adding a large constant and not by a conversion, which would be poison for NaN.
    """
    magic = _constant(x, _format(x).round_magic)
    shifted = e.b.fadd(x, magic)
    return e.b.fsub(shifted, magic), e.b.sub(_bits(e, shifted), _bits(e, magic))


def _power_of_two(e: Emitter, exponent: ir.Value, float_type: ir.Type, f: _Format) -> ir.Value:
    """2^exponent for exponents of normal numbers."""
    biased = e.b.add(exponent, splat_constant(exponent.type, f.bias))
    shift = splat_constant(exponent.type, f.mantissa_bits)
    return e.b.bitcast(e.b.shl(biased, shift), float_type)


# ---- sign and rounding --------------------------------------------------------------------------


def absolute(e: Emitter, x: ir.Value) -> ir.Value:
    """|x|, exact."""
    return _unary(e, "fabs", x)


def copysign(e: Emitter, magnitude: ir.Value, sign_of: ir.Value) -> ir.Value:
    """magnitude with the sign bit of sign_of, exact."""
    bits = _bits(e, magnitude)
    f = _format(magnitude)
    mask = 1 << (f.integer.width - 1)
    signed = e.b.and_(_bits(e, sign_of), splat_constant(bits.type, mask))
    plain = e.b.and_(bits, splat_constant(bits.type, mask - 1))
    return e.b.bitcast(e.b.or_(signed, plain), magnitude.type)


def sign(e: Emitter, x: ir.Value) -> ir.Value:
    """-1, 0 or 1; zeros and NaN are returned as they are."""
    one = copysign(e, _constant(x, 1.0), x)
    return e.b.select(e.b.fcmp_ordered("!=", x, _constant(x, 0.0)), one, x)


def floor(e: Emitter, x: ir.Value) -> ir.Value:
    """Largest integer not above x, exact."""
    return _unary(e, "floor", x)


def ceil(e: Emitter, x: ir.Value) -> ir.Value:
    """Smallest integer not below x, exact."""
    return _unary(e, "ceil", x)


def round_half_even(e: Emitter, x: ir.Value) -> ir.Value:
    """Nearest integer, ties to even, exact."""
    return _unary(e, "roundeven", x)


def truncate(e: Emitter, x: ir.Value) -> ir.Value:
    """x without its fraction, exact."""
    return _unary(e, "trunc", x)


# ---- roots --------------------------------------------------------------------------------------


def sqrt(e: Emitter, x: ir.Value) -> ir.Value:
    """Correctly rounded square root."""
    return _unary(e, "sqrt", x)


def rsqrt(e: Emitter, x: ir.Value) -> ir.Value:
    """1 / sqrt(x), max 1.5 ulp."""
    return e.b.fdiv(_constant(x, 1.0), sqrt(e, x))


# ---- exponentials -------------------------------------------------------------------------------


def _reduce_exp(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(n, r) with x = n ln 2 + r, |r| <= ln(2) / 2; n an integer value."""
    f = _format(x)
    n, integer = _round_small(e, e.b.fmul(x, _constant(x, 1 / math.log(2))))
    r = e.fma(n, _constant(x, -f.ln2_high), x)
    return integer, e.fma(n, _constant(x, -f.ln2_low), r)


def exp(e: Emitter, x: ir.Value) -> ir.Value:
    """e^x, max 1 ulp (f32 and f64), denormal results included."""
    f = _format(x)
    x = _clamp(e, x, *f.exp_range)
    n, r = _reduce_exp(e, x)
    tail = e.b.fmul(e.b.fmul(r, r), _polynomial(e, r, f.exp))
    y = e.b.fadd(e.b.fadd(tail, r), _constant(x, 1.0))
    # In two steps: 2^n itself need not be a normal number.
    half = e.b.ashr(n, splat_constant(n.type, 1))
    y = e.b.fmul(y, _power_of_two(e, half, x.type, f))
    return e.b.fmul(y, _power_of_two(e, e.b.sub(n, half), x.type, f))


def exp2_nonpositive(e: Emitter, x: ir.Value, coarse: bool = False) -> ir.Value:
    """2^x for f32 x <= 0, max 2 ulp; 0 below -126 (and for -inf), NaN for NaN. coarse: to 1.1e-4
    of the result (an eighteenth of bf16's last place).

    The cheap form for softmax, whose arguments have their maximum subtracted.
    """
    clamped = _clamp(e, x, -127.0, None)
    n, integer = _round_small(e, clamped)
    r = e.b.fsub(clamped, n)
    y = _polynomial(e, r, (1.0, *(_EXP2_COARSE if coarse else _EXP2)))
    # n = -127 gives the bits of +0.
    return e.b.fmul(y, _power_of_two(e, integer, x.type, _SINGLE))


def expm1(e: Emitter, x: ir.Value) -> ir.Value:
    """e^x - 1, max 2 ulp (f32 and f64), also near zero."""
    f = _format(x)
    limits = (-40.0, f.exp_range[1])
    clamped = _clamp(e, x, *limits)
    n, r = _reduce_exp(e, clamped)
    y = e.fma(e.b.fmul(r, r), _polynomial(e, r, f.exp), r)
    # 2^(n-1), doubled at the end: 2^n overflows before e^x does.
    scale = _power_of_two(e, e.b.sub(n, splat_constant(n.type, 1)), x.type, f)
    y = e.fma(y, scale, e.b.fsub(scale, _constant(x, 0.5)))
    y = e.b.fadd(y, y)
    # -0.0 stays -0.0, and the smallest denormals stay themselves.
    tiny = e.b.fcmp_ordered("<", absolute(e, x), _constant(x, f.least_normal))
    return e.b.select(tiny, x, y)


def tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """Hyperbolic tangent, max 3 ulp (f32 and f64)."""
    f = _format(x)
    magnitude = _clamp(e, absolute(e, x), None, f.tanh_limit)
    growth = expm1(e, e.b.fadd(magnitude, magnitude))
    y = e.b.fdiv(growth, e.b.fadd(growth, _constant(x, 2.0)))
    return copysign(e, y, x)


def sigmoid(e: Emitter, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), max 3 ulp (f32 and f64), denormal results included."""
    decay = exp(e, e.b.fneg(absolute(e, x)))
    one = _constant(x, 1.0)
    negative = e.b.fcmp_ordered("<", x, _constant(x, 0.0))
    return e.b.fdiv(e.b.select(negative, decay, one), e.b.fadd(one, decay))


def softplus(e: Emitter, x: ir.Value) -> ir.Value:
    """log(1 + e^x), max 3 ulp (f32 and f64)."""
    decay = log1p_positive(e, exp(e, e.b.fneg(absolute(e, x))))
    zero = _constant(x, 0.0)
    return e.b.fadd(e.b.select(e.b.fcmp_ordered("<", x, zero), zero, x), decay)


# ---- logarithms ---------------------------------------------------------------------------------


def log(e: Emitter, x: ir.Value) -> ir.Value:
    """Natural logarithm, max 1 ulp (f32 and f64), denormals included."""
    f = _format(x)
    zero, infinity = _constant(x, 0.0), _constant(x, math.inf)
    exponent, m = _split(e, x, f)
    y = _log_of_parts(e, exponent, e.b.fsub(m, _constant(x, 1.0)), f)
    y = e.b.select(e.b.fcmp_ordered("==", x, infinity), infinity, y)
    y = e.b.select(e.b.fcmp_ordered("==", x, zero), _constant(x, -math.inf), y)
    valid = e.b.fcmp_ordered(">=", x, zero)
    return e.b.select(valid, y, _constant(x, math.nan))


def _split(e: Emitter, x: ir.Value, f: _Format) -> tuple[ir.Value, ir.Value]:
    """(exponent as a float, m) with x = m 2^exponent, sqrt(1/2) <= m < sqrt(2), for x > 0."""
    lift = f.mantissa_bits + 1
    denormal = e.b.fcmp_ordered("<", x, _constant(x, f.least_normal))
    lifted = e.b.select(denormal, e.b.fmul(x, _constant(x, 2.0**lift)), x)
    bits = _bits(e, lifted)
    root_half = _bits(e, _constant(x, math.sqrt(0.5)))
    shift = splat_constant(bits.type, f.mantissa_bits)
    n = e.b.ashr(e.b.sub(bits, root_half), shift)
    m = e.b.bitcast(e.b.sub(bits, e.b.shl(n, shift)), x.type)
    drop = e.b.select(denormal, _constant(x, -float(lift)), _constant(x, 0.0))
    return e.b.fadd(e.b.sitofp(n, x.type), drop), m


def _log_of_parts(e: Emitter, exponent: ir.Value, fraction: ir.Value, f: _Format) -> ir.Value:
    """exponent ln 2 + log(1 + fraction), |fraction| < 0.42 (fdlibm's form of the atanh series)."""
    half_square = e.b.fmul(_constant(fraction, 0.5), e.b.fmul(fraction, fraction))
    s = e.b.fdiv(fraction, e.b.fadd(fraction, _constant(fraction, 2.0)))
    z = e.b.fmul(s, s)
    series = e.b.fmul(z, _polynomial(e, z, f.log))
    correction = e.fma(s, e.b.fadd(half_square, series),
                       e.b.fmul(exponent, _constant(fraction, f.ln2_low)))
    y = e.b.fsub(fraction, e.b.fsub(half_square, correction))
    return e.fma(exponent, _constant(fraction, f.ln2_high), y)


def log1p_positive(e: Emitter, x: ir.Value) -> ir.Value:
    """log(1 + x) for finite x >= 0 (or NaN), max 3 ulp."""
    one = _constant(x, 1.0)
    total = e.b.fadd(one, x)
    lost = e.b.fsub(x, e.b.fsub(total, one))
    large = e.b.fcmp_ordered(">", x, one)
    lost = e.b.select(large, e.b.fsub(one, e.b.fsub(total, x)), lost)
    return e.b.fadd(log(e, total), e.b.fdiv(lost, total))


def power(e: Emitter, x: ir.Value, y: ir.Value) -> ir.Value:
    """x^y with C99's special cases; f32 max 1 ulp, f64 relative error |y log x| 2^-52."""
    wide = like(x, F64)
    if _element(x) == F32:
        return e.b.fptrunc(power(e, e.b.fpext(x, wide), e.b.fpext(y, wide)), x.type)
    zero, one = _constant(x, 0.0), _constant(x, 1.0)
    magnitude = absolute(e, x)
    result = exp(e, e.b.fmul(y, log(e, magnitude)))
    integral = e.b.fcmp_ordered("==", floor(e, y), y)
    half = e.b.fmul(y, _constant(y, 0.5))
    odd = e.b.and_(integral, e.b.fcmp_unordered("!=", floor(e, half), half))
    result = e.b.select(odd, copysign(e, result, x), result)
    # The sign bit of -inf to a fraction is dropped above; a finite negative base has no such power.
    finite_negative = e.b.and_(e.b.fcmp_ordered("<", x, zero),
                               e.b.fcmp_ordered(">", x, _constant(x, -math.inf)))
    undefined = e.b.and_(finite_negative, e.b.fcmp_unordered("!=", floor(e, y), y))
    result = e.b.select(undefined, _constant(x, math.nan), result)
    minus_one = e.b.and_(e.b.fcmp_ordered("==", x, _constant(x, -1.0)),
                         e.b.fcmp_ordered("==", absolute(e, y), _constant(y, math.inf)))
    is_one = e.b.or_(e.b.fcmp_ordered("==", y, zero), e.b.fcmp_ordered("==", x, one))
    return e.b.select(e.b.or_(minus_one, is_one), one, result)


# ---- error function -----------------------------------------------------------------------------


def erf(e: Emitter, x: ir.Value) -> ir.Value:
    """Error function, max 2 ulp (f32), 4 ulp (f64)."""
    if _element(x) == F64:
        return _erf_double(e, x)
    magnitude = absolute(e, x)
    t = _clamp(e, magnitude, None, 4.0)
    tail = e.fma(_polynomial(e, t, _ERF_TAIL), t, e.b.fneg(t))
    far = copysign(e, e.b.fsub(_constant(x, 1.0), exp(e, tail)), x)
    near = e.fma(_polynomial(e, e.b.fmul(x, x), _ERF_NEAR), x, x)
    is_near = e.b.fcmp_ordered("<=", magnitude, _constant(x, 475 / 512))
    return e.b.select(is_near, near, far)


def gelu(e: Emitter, x: ir.Value) -> ir.Value:
    """x times the normal distribution function of x; of f32 to 4e-7 and, above -3, 2e-6 of the
    result; zero below -6.

    The function of -|x| is 2^P(|x|): one polynomial and one power of 2 for all x.
    """
    if _element(x) == F64:
        half = e.b.fmul(x, _constant(x, 0.5))
        return e.fma(half, erf(e, e.b.fmul(x, _constant(x, math.sqrt(0.5)))), half)
    t = absolute(e, x)
    power = e.fma(_polynomial(e, t, _NORMAL), t, _constant(x, -1.0))
    beyond = e.b.fcmp_ordered(">", t, _constant(x, _NORMAL_END))
    below = exp2_nonpositive(e, e.b.select(beyond, _constant(x, -math.inf), power))
    negative = e.b.fcmp_ordered("<", x, _constant(x, 0.0))
    return e.b.fmul(x, e.b.select(negative, below, e.b.fsub(_constant(x, 1.0), below)))


def _erf_double(e: Emitter, x: ir.Value) -> ir.Value:
    magnitude = absolute(e, x)
    t = _clamp(e, magnitude, None, 6.0)
    z = e.b.fmul(t, t)
    tail = e.b.fdiv(_polynomial(e, t, _ERF_P), _polynomial(e, t, _ERF_Q))
    far = e.b.fsub(_constant(x, 1.0), e.b.fmul(exp(e, e.b.fneg(z)), tail))
    near = e.b.fmul(t, e.b.fdiv(_polynomial(e, z, _ERF_T), _polynomial(e, z, _ERF_U)))
    is_near = e.b.fcmp_ordered("<=", magnitude, _constant(x, 1.0))
    return copysign(e, e.b.select(is_near, near, far), x)


# ---- trigonometry -------------------------------------------------------------------------------


def sin(e: Emitter, x: ir.Value) -> ir.Value:
    """Sine, max 2 ulp (f32 and f64)."""
    sine, cosine, quadrant = _sine_and_cosine(e, x)
    y = _by_quadrant(e, quadrant, sine, cosine)
    y = e.b.select(e.b.fcmp_ordered("==", x, _constant(x, 0.0)), x, y)  # keeps -0.0
    return _or_far(e, x, y, 0)


def cos(e: Emitter, x: ir.Value) -> ir.Value:
    """Cosine, max 2 ulp (f32 and f64)."""
    sine, cosine, quadrant = _sine_and_cosine(e, x)
    next_quadrant = e.b.add(quadrant, splat_constant(quadrant.type, 1))
    return _or_far(e, x, _by_quadrant(e, next_quadrant, sine, cosine), 1)


def _sine_and_cosine(e: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(sin r, cos r, n) with x = n pi / 2 + r, |r| <= pi / 4; anything where |x| is FAR or more.

    The reduction is done in f64 also for f32: fma makes n times the leading part exact, as long as
    n is.
    """
    single = _element(x) == F32
    wide = e.b.fpext(x, like(x, F64)) if single else x
    n, quadrant = _round_small(e, e.b.fmul(wide, _constant(wide, 2 / math.pi)))
    r = wide
    for part in _HALF_PI[: 2 if single else 3]:
        r = e.fma(n, _constant(wide, -part), r)
    r = e.b.fptrunc(r, x.type) if single else r
    sine, cosine = _near_zero(e, r)
    return sine, cosine, e.b.trunc(quadrant, like(x, I32)) if single else quadrant


def _near_zero(e: Emitter, r: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(sin r, cos r) for |r| <= pi / 4."""
    f = _format(r)
    z = e.b.fmul(r, r)
    sine = e.fma(e.b.fmul(r, z), _polynomial(e, z, f.sin), r)
    half = e.b.fmul(z, _constant(r, 0.5))
    one = _constant(r, 1.0)
    head = e.b.fsub(one, half)
    lost = e.b.fsub(e.b.fsub(one, head), half)
    return sine, e.b.fadd(head, e.fma(e.b.fmul(z, z), _polynomial(e, z, f.cos), lost))


def _by_quadrant(e: Emitter, quadrant: ir.Value, sine: ir.Value, cosine: ir.Value) -> ir.Value:
    def bit(number: int) -> ir.Value:
        masked = e.b.and_(quadrant, splat_constant(quadrant.type, number))
        return e.b.icmp_signed("!=", masked, splat_constant(quadrant.type, 0))

    y = e.b.select(bit(1), cosine, sine)
    return e.b.select(bit(2), e.b.fneg(y), y)


def _or_far(e: Emitter, x: ir.Value, y: ir.Value, quarter: int) -> ir.Value:
    """y, but sin(x + quarter pi / 2) where |x| is FAR or more: in a branch that is hardly ever
    taken, one lane after the other."""
    far = e.b.fcmp_ordered(">=", absolute(e, x), _constant(x, FAR))
    before, lanes = e.b.block, lanes_of(x)
    some = far if lanes == 1 else e.call(f"llvm.vector.reduce.or.v{lanes}i1", I1, far)
    with e.b.if_then(some, likely=False):
        if lanes == 1:
            z = _far_sine(e, x, quarter)
        else:
            z = y
            for lane in map(I32, range(lanes)):
                one = _far_sine(e, e.b.extract_element(x, lane), quarter)
                z = e.b.insert_element(z, one, lane)
            z = e.b.select(far, z, y)
        after = e.b.block
    result = e.b.phi(y.type)
    result.add_incoming(y, before)
    result.add_incoming(z, after)
    return result


def _far_sine(e: Emitter, x: ir.Value, quarter: int) -> ir.Value:
    """A call of the module's function for one large angle, in f64."""
    if x.type == F32:
        return e.b.fptrunc(_far_sine(e, e.b.fpext(x, F64), quarter), F32)
    if FAR_SINE not in e.module.globals:
        _define_far_sine(e.module)
    return e.b.call(e.module.globals[FAR_SINE], [x, I64(quarter)])


def _define_far_sine(module: ir.Module) -> None:
    """f64 (x, quarter): sin(x + quarter pi / 2) for |x| of FAR or more (NaN if infinite), anything
    for others."""
    function, e = define(module, FAR_SINE, F64, [F64, I64], attributes=("noinline",))
    x, quarter = function.args
    magnitude = absolute(e, x)
    is_far = e.b.fcmp_ordered(">=", magnitude, F64(FAR))
    # Lanes beside a large angle come here too, and must not read before the table.
    r, n = reduce_angle(e, e.b.select(is_far, x, F64(FAR)))
    y = _by_quadrant(e, e.b.add(n, quarter), *_near_zero(e, r))
    is_finite = e.b.fcmp_ordered("<", magnitude, F64(math.inf))
    e.b.ret(e.b.select(is_finite, y, F64(math.nan)))


# ---- remainders ---------------------------------------------------------------------------------


def fmod(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    """C's fmod (the sign of a). Exact for f32 while |a / b| < 2^29; f64: while |a / b| < 2^52."""
    if _element(a) == F32:
        wide = like(a, F64)
        return e.b.fptrunc(fmod(e, e.b.fpext(a, wide), e.b.fpext(b, wide)), a.type)
    zero = _constant(a, 0.0)
    top, divisor = absolute(e, a), absolute(e, b)
    quotient = truncate(e, e.b.fdiv(top, divisor))
    rest = e.fma(e.b.fneg(quotient), divisor, top)
    # The rounded quotient may be one too large.
    rest = e.b.select(e.b.fcmp_ordered("<", rest, zero), e.b.fadd(rest, divisor), rest)
    both = e.b.and_(e.b.fcmp_ordered("==", divisor, _constant(a, math.inf)),
                    e.b.fcmp_ordered("<", top, _constant(a, math.inf)))
    return copysign(e, e.b.select(both, top, rest), a)


def mod(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    """NumPy's mod (the sign of b); exactness as fmod."""
    zero = _constant(a, 0.0)
    rest = fmod(e, a, b)
    differs = e.b.xor(e.b.fcmp_ordered("<", rest, zero), e.b.fcmp_ordered("<", b, zero))
    moved = e.b.select(differs, e.b.fadd(rest, b), rest)
    is_zero = e.b.fcmp_ordered("==", rest, zero)
    return e.b.select(is_zero, copysign(e, zero, b), moved)


def floor_div(e: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    """NumPy's a // b: floor of the exact quotient; a / b when b is 0."""
    exact = e.b.fdiv(e.b.fsub(a, mod(e, a, b)), b)
    quotient = e.b.fdiv(a, b)
    whole = round_half_even(e, exact)
    is_zero = e.b.fcmp_ordered("==", whole, _constant(a, 0.0))
    whole = e.b.select(is_zero, copysign(e, whole, quotient), whole)
    return e.b.select(e.b.fcmp_ordered("==", b, _constant(b, 0.0)), quotient, whole)
