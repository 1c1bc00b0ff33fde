"""Measures every function of codegen/math against an oracle of higher precision."""

import ctypes
import math

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
import pytest

from llmc.codegen import math as codegen_math
from llmc.codegen.llvm import F32, F64, I64, POINTER, VOID, define, emit_object, vector

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

LANES = 8
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 2.0**-126]


@pytest.fixture(scope="module")
def functions():
    """call(function, *arrays) -> array: compiles once per function and dtype."""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3,
        reloc="pic", codemodel="small")
    jit = llvm.create_lljit_compiler(machine)
    loaded = {}

    def call(function, *arrays):
        dtype = arrays[0].dtype
        key = function.__name__, str(dtype)
        if key not in loaded:
            code, _ = emit_object(module_of(function, dtype, len(arrays), machine), machine)
            name = f"{function.__name__}_{dtype}"
            library = llvm.JITLibraryBuilder().add_object_img(code).export_symbol("loop")
            loaded[key] = library.link(jit, name)
        address = loaded[key]["loop"]
        return run(address, arrays)

    return call


def module_of(function, dtype, arity, machine):
    element = F32 if dtype == np.float32 else F64
    module = ir.Module("math")
    module.triple = machine.triple
    _, e = define(module, "loop", VOID, [POINTER] * (arity + 1) + [I64], internal=False)
    *inputs, output, count = e.b.function.args
    with e.loop(0, count, LANES) as i:
        values = [e.load(e.offset(p, i, element), vector(element, LANES)) for p in inputs]
        e.store(function(e, *values), e.offset(output, i, element))
    e.b.ret_void()
    return str(module)


def run(address, arrays):
    count = -(-len(arrays[0]) // LANES) * LANES
    padded = [np.zeros(count, a.dtype) for a in arrays]
    for target, source in zip(padded, arrays, strict=True):
        target[: len(source)] = source
    out = np.empty(count, arrays[0].dtype)
    pointers = [a.ctypes.data for a in (*padded, out)]
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers), ctypes.c_int64)
    signature(address)(*pointers, count)
    return out[: len(arrays[0])]


def ulps(got, want):
    """Largest error in units of got's last place; infinite where specials differ."""
    dtype = got.dtype
    with np.errstate(all="ignore"):
        rounded = want.astype(dtype)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        spacing = np.maximum(np.spacing(np.abs(rounded)), np.finfo(dtype).smallest_subnormal)
        error = np.abs(got.astype(want.dtype) - want) / spacing.astype(want.dtype)
    error = np.where(same & ~np.isfinite(error), 0, error)
    error = np.where(same, np.minimum(np.nan_to_num(error), 0.5), np.nan_to_num(error, nan=np.inf))
    return float(error.max())


def everywhere(dtype, low, high, count=1_000_000):
    """Values uniform in [low, high], values uniform in bit pattern, and the special ones."""
    random = np.random.default_rng(1)
    uniform = random.uniform(low, high, count).astype(dtype)
    width = np.uint32 if dtype == np.float32 else np.uint64
    pattern = random.integers(0, np.iinfo(width).max, count, dtype=width, endpoint=True)
    tiny = random.uniform(-1, 1, count // 10) * 10.0 ** random.uniform(-12, 0, count // 10)
    return np.concatenate([np.array(SPECIAL, dtype), uniform, pattern.view(dtype),
                           tiny.astype(dtype)])


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    decay = np.exp(-np.abs(x))
    return np.where(x < 0, decay, 1) / (1 + decay)


def rsqrt(x):
    return 1 / np.sqrt(x)


erf = np.vectorize(math.erf, otypes=[np.float64])

CASES = [
    # name, oracle, range, max ulp in f32, max ulp in f64
    ("exp", np.exp, (-105, 90), 1.01, 1.01),
    ("expm1", np.expm1, (-20, 90), 2, 2),
    ("log", np.log, (0, 10), 1, 1),
    ("tanh", np.tanh, (-12, 12), 3, 3),
    ("sigmoid", sigmoid, (-105, 105), 3, 3),
    ("softplus", softplus, (-105, 105), 3, 3),
    ("erf", erf, (-5, 5), 2, 4),
    ("sqrt", np.sqrt, (0, 10), 0.501, 0.501),
    ("rsqrt", rsqrt, (0, 10), 1.5, 1.5),
    ("floor", np.floor, (-10, 10), 0.5, 0.5),
    ("ceil", np.ceil, (-10, 10), 0.5, 0.5),
    ("round_half_even", np.rint, (-10, 10), 0.5, 0.5),
    ("truncate", np.trunc, (-10, 10), 0.5, 0.5),
    ("sign", np.sign, (-10, 10), 0.5, 0.5),
    ("absolute", np.abs, (-10, 10), 0.5, 0.5),
]


@pytest.mark.parametrize("name, oracle, span, single, double", CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_max_ulp(functions, name, oracle, span, single, double, dtype):
    x = everywhere(dtype, *span, count=100_000 if name == "erf" else 1_000_000)
    got = functions(getattr(codegen_math, name), x)
    wide = np.float64 if dtype == np.float32 or name == "erf" else np.longdouble
    with np.errstate(all="ignore"):
        want = oracle(x.astype(wide))
    assert ulps(got, want) <= (single if dtype == np.float32 else double)


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("span", [4, 1e3, 1e5, 1e6])
def test_trigonometry(functions, name, dtype, span):
    random = np.random.default_rng(1)
    near_zeros = (np.arange(100_000) * (math.pi / 2)).astype(dtype)
    near_zeros = near_zeros[near_zeros <= span]
    special = np.array([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40], dtype)
    x = np.concatenate([special, random.uniform(-span, span, 1_000_000).astype(dtype), near_zeros])
    wide = np.float64 if dtype == np.float32 else np.longdouble
    with np.errstate(all="ignore"):
        want = getattr(np, name)(x.astype(wide))
    assert ulps(functions(getattr(codegen_math, name), x), want) <= 2


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_sines_of_any_angle(functions, name, dtype):
    """Bit patterns of all sizes, lanes beside each other; where the way to reduce changes; the
    largest; the double that is nearest to a multiple of pi / 2."""
    x = everywhere(dtype, 0, 1, count=500_000)
    random = np.random.default_rng(2)
    edge = random.uniform(0.99, 1.01, 100_000) * codegen_math.FAR
    powers = 2.0 ** np.arange(np.finfo(dtype).maxexp)
    worst = [6381956970095103.0 * 2.0**797] if dtype == np.float64 else []
    x = np.concatenate([x, *(np.array(each).astype(dtype) for each in (
        edge, codegen_math.FAR * 2.0 ** random.uniform(-8, 16, 100_000), powers, -powers, worst,
        [np.finfo(dtype).max, -np.finfo(dtype).max]))])
    wide = np.float64 if dtype == np.float32 else np.longdouble
    with np.errstate(all="ignore"):
        want = getattr(np, name)(x.astype(wide))
    assert ulps(functions(getattr(codegen_math, name), x), want) <= 2


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "tanh", "erf", "sin", "floor", "sign"])
def test_zeros_keep_their_sign(functions, name):
    x = np.array([0.0, -0.0], np.float32)
    want = {"exp": [1, 1], "log": [-np.inf, -np.inf]}.get(name, [0.0, -0.0])
    got = functions(getattr(codegen_math, name), x)
    assert got.tolist() == want and np.signbit(got).tolist() == np.signbit(want).tolist()


def test_exp2_nonpositive(functions):
    x = -np.random.default_rng(1).uniform(0, 126, 1_000_000).astype(np.float32)
    got = functions(codegen_math.exp2_nonpositive, x)
    assert ulps(got, np.exp2(x.astype(np.float64))) <= 2
    edge = np.array([0.0, -0.0, -127.5, -1e30, -np.inf, np.nan, -126.0], np.float32)
    want = np.array([1, 1, 0, 0, 0, np.nan, 2.0**-126], np.float32)
    np.testing.assert_array_equal(functions(codegen_math.exp2_nonpositive, edge), want)


def test_exp2_nonpositive_for_bf16(functions):
    x = -np.random.default_rng(1).uniform(0, 126, 100_000).astype(np.float32)
    want = np.exp2(x.astype(np.float64))
    got = functions(lambda e, x: codegen_math.exp2_nonpositive(e, x, coarse=True), x)
    assert (np.abs(got - want) < 1.1e-4 * want).all()


def test_gelu(functions):
    x = np.random.default_rng(2).uniform(-7, 7, 200_000).astype(np.float32)
    want = x * 0.5 * (1 + erf(x.astype(np.float64) / math.sqrt(2)))
    error = np.abs(functions(codegen_math.gelu, x) - want)
    assert error.max() < 4e-7
    assert (error[x > -3] <= 2e-6 * np.abs(want[x > -3])).all()
    edge = np.array([0.0, -0.0, 1e30, np.inf, -1e30, np.nan], np.float32)
    want = np.array([0, -0.0, 1e30, np.inf, -0.0, np.nan], np.float32)
    np.testing.assert_array_equal(functions(codegen_math.gelu, edge), want)


SPECIAL_PAIRS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 2.5, 1e10, -1e10,
                 math.inf, -math.inf, math.nan]


def pairs(dtype):
    a, b = np.meshgrid(np.array(SPECIAL_PAIRS, dtype), np.array(SPECIAL_PAIRS, dtype))
    return a.ravel(), b.ravel()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_power_specials(functions, dtype):
    x, y = pairs(dtype)
    with np.errstate(all="ignore"):  # NumPy's own power of f32 is off by more on some CPUs
        want = np.power(x.astype(np.float64), y.astype(np.float64)).astype(dtype)
    got = functions(codegen_math.power, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-7 if dtype == np.float32 else 1e-13)
    np.testing.assert_array_equal(np.signbit(got) & ~np.isnan(got),
                                  np.signbit(want) & ~np.isnan(want))


def test_power_ulp(functions):
    random = np.random.default_rng(1)
    x = random.uniform(0, 20, 1_000_000).astype(np.float32)
    y = random.uniform(-30, 30, 1_000_000).astype(np.float32)
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), y.astype(np.float64))
    assert ulps(functions(codegen_math.power, x, y), want) <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name, oracle", [("fmod", np.fmod), ("mod", np.mod),
                                          ("floor_div", np.floor_divide)])
def test_remainders(functions, name, oracle, dtype):
    random = np.random.default_rng(1)
    a = random.uniform(-1e3, 1e3, 200_000).astype(dtype)
    b = (random.uniform(-10, 10, 200_000)).astype(dtype)
    b[::3] = np.rint(b[::3])
    a[::3] = np.rint(a[::3])
    special_a, special_b = pairs(dtype)
    if name == "floor_div":
        finite = np.isfinite(special_a) & np.isfinite(special_b)
        special_a, special_b = special_a[finite], special_b[finite]
    a, b = np.concatenate([a, special_a]), np.concatenate([b, special_b])
    with np.errstate(all="ignore"):
        want = oracle(a, b)
    np.testing.assert_array_equal(functions(getattr(codegen_math, name), a, b), want)


@pytest.mark.parametrize("lanes", [1, 3, 4, 16])
def test_other_lane_counts_compile(lanes):
    module = ir.Module("lanes")
    _, e = define(module, "loop", VOID, [POINTER], internal=False)
    x = e.load(e.b.function.args[0], vector(F32, lanes))
    for name in ("exp", "log", "tanh", "erf", "sin", "floor"):
        x = getattr(codegen_math, name)(e, x)
    e.store(x, e.b.function.args[0])
    e.b.ret_void()
    llvm.parse_assembly(str(module)).verify()
