"""Every op: type rule, reference against a formula, decomposition against reference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import GraphError, ShapeError
from llmc.ir import dtypes, ops
from llmc.ir.dims import ceildiv, symbol
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType, format_type
from llmc.ir.interpret import interpret
from llmc.ir.ops import OPS, PAGE, constant, make

TOKENS = symbol("tokens")
ROWS = symbol("rows", low=0)


def leaf(name, kind, *shape):
    return make("input", name=name, type=TensorType(dtype(kind), shape))


def operands(*arrays):
    return [
        make("input", name=f"x{i}", type=TensorType(dtypes.from_numpy(a.dtype), a.shape))
        for i, a in enumerate(arrays)
    ]


def value_of(node, *arrays, exact=False):
    """The node's value where `operands(*arrays)` have the arrays' values."""
    graph = Graph("test", tuple(operands(*arrays)), (("value", node),))
    return interpret(graph, {f"x{i}": a for i, a in enumerate(arrays)}, exact=exact)["value"]


def run(op, *arrays, exact=False, **attributes):
    return value_of(make(op, *operands(*arrays), **attributes), *arrays, exact=exact)


def random(*shape, seed=0, kind="f32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype(kind).numpy)


# ---- elementwise -------------------------------------------------------------------------------

UNARY = {
    "neg": lambda x: -x,
    "abs": abs,
    "exp": math.exp,
    "log": lambda x: math.log(x) if x > 0 else math.nan,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rsqrt": lambda x: 1 / math.sqrt(x) if x > 0 else math.nan,
    "reciprocal": lambda x: 1 / x,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "erf": math.erf,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "sign": lambda x: (x > 0) - (x < 0),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "atan": math.atan,
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
}


def by_element(function, x):
    return np.array([function(float(each)) for each in x.ravel()]).reshape(x.shape)


@pytest.mark.parametrize("kind", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("name", sorted(UNARY))
def test_unary(name, kind):
    x = (random(3, 17) * 3).astype(dtype(kind).numpy)
    got, want = run(name, x), by_element(UNARY[name], x)
    assert got.dtype == x.dtype
    tolerance = {"f32": 4e-7, "f64": 1e-15, "bf16": 2**-8, "f16": 2**-11}[kind]
    np.testing.assert_allclose(got.astype("f8"), want, rtol=4 * tolerance, atol=tolerance)
    exact = run(name, x, exact=True)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, want, rtol=1e-14, atol=1e-15)


def test_gelu_tanh():
    x = random(33)
    want = by_element(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi)
                                                         * (v + 0.044715 * v**3))), x)
    np.testing.assert_allclose(run("gelu", x, approximate="tanh"), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_no_overflow_at_the_ends(name):
    got = run(name, np.array([-200.0, 200.0], np.float32))
    assert np.isfinite(got).all()


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floor_div": np.floor_divide,
    "mod": np.mod, "max": np.maximum, "min": np.minimum, "equal": np.equal,
    "not_equal": np.not_equal, "less": np.less, "less_equal": np.less_equal,
    "greater": np.greater, "greater_equal": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["f32", "i32", "u8", "i64"])
@pytest.mark.parametrize("name", sorted(BINARY))
def test_binary_broadcasts(name, kind):
    a = np.arange(1, 52).reshape(3, 1, 17).astype(dtype(kind).numpy)
    b = np.arange(1, 6).reshape(5, 1).astype(dtype(kind).numpy)
    np.testing.assert_array_equal(run(name, a, b), BINARY[name](a, b))


def test_integer_division():
    a, b = np.array([7, -7, 7, -7, 6, 1], np.int32), np.array([2, 2, -2, -2, 3, 0], np.int32)
    np.testing.assert_array_equal(run("div", a, b), [3, -3, -3, 3, 2, 0])
    np.testing.assert_array_equal(run("floor_div", a, b)[:5], [3, -4, -4, 3, 2])
    np.testing.assert_array_equal(run("mod", a, b)[:5], [1, 1, -1, -1, 0])


def test_bits_and_booleans():
    a, b = np.array([True, True, False]), np.array([True, False, False])
    for name, want in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        np.testing.assert_array_equal(run(name, a, b), want)
    np.testing.assert_array_equal(run("not", a), ~a)
    bits = np.array([0, 5, 255], np.uint8)
    np.testing.assert_array_equal(run("not", bits), [255, 250, 0])


@pytest.mark.parametrize("kind", ["i8", "u8", "i32", "u64"])
def test_shifts(kind):
    """By the width or more, or backwards, all bits are shifted out."""
    numpy, width = dtype(kind).numpy, dtype(kind).bits
    a = np.array([1, 5, 77, 100, 3, 127, 9], np.int64).astype(numpy)
    a[1] = ~a[1]
    b = np.array([0, 1, width - 1, width, width + 1, -1, 3], np.int64).astype(numpy)
    bits, mask = [int(x) for x in a], (1 << width) - 1
    inside = [0 <= int(n) < width for n in b]
    left = [(x << int(n)) & mask if ok else 0 for x, n, ok in zip(bits, b, inside, strict=True)]
    right = [x >> int(n) if ok else -(x < 0) for x, n, ok in zip(bits, b, inside, strict=True)]
    got = run("shift_left", a, b)
    assert [int(x) & mask for x in got] == left
    assert [int(x) for x in run("shift_right", a, b)] == right
    assert got.dtype == numpy


@pytest.mark.parametrize(("exclusive", "reverse", "want"), [
    (False, False, [2, 6, 24]), (True, False, [1, 2, 6]), (False, True, [24, 12, 4]),
    (True, True, [12, 4, 1])])
def test_cumulative_product(exclusive, reverse, want):
    x = np.array([[2, 3, 4]], np.int32)
    got = run("cumprod", x, axis=1, exclusive=exclusive, reverse=reverse)
    np.testing.assert_array_equal(got, [want])


def test_bf16_is_computed_in_f32_and_rounded_once():
    x = random(33, kind="bf16")
    want = (x.astype("f4") * x.astype("f4")).astype(x.dtype)
    np.testing.assert_array_equal(run("mul", x, x), want)


def test_where_clamp_pow_is_nan():
    x = random(3, 17)
    condition = x > 0
    np.testing.assert_array_equal(run("where", condition, x, x[:1]), np.where(condition, x, x[:1]))
    low, high = np.float32([-0.5]), np.float32([0.25])
    np.testing.assert_array_equal(run("clamp", x, low, high), np.clip(x, -0.5, 0.25))
    np.testing.assert_allclose(run("pow", abs(x), np.float32([2.5])), abs(x) ** 2.5, rtol=1e-6)
    np.testing.assert_array_equal(run("is_nan", np.float32([np.nan, 1])), [True, False])


@pytest.mark.parametrize("kind", ["f16", "bf16", "f64", "f8e4m3fn", "i32", "i8", "i4", "u8"])
def test_cast_to(kind):
    x = np.float32([-1.9, -0.5, 0.0, 0.5, 1.75, 6.0])
    x = abs(x) if kind == "u8" else x
    want = x if dtype(kind).is_float else np.trunc(x).astype(np.int64)
    np.testing.assert_array_equal(run("cast", x, dtype=kind), want.astype(dtype(kind).numpy))


def test_cast_to_and_from_bool():
    np.testing.assert_array_equal(run("cast", np.float32([0, 0.25, -3]), dtype="bool"), [0, 1, 1])
    np.testing.assert_array_equal(run("cast", np.array([True, False]), dtype="f32"), [1, 0])


# ---- movement ----------------------------------------------------------------------------------


def test_shapes_move():
    x = random(3, 5, 7)
    np.testing.assert_array_equal(run("reshape", x, shape=(15, 7)), x.reshape(15, 7))
    np.testing.assert_array_equal(run("transpose", x, permutation=(2, 0, 1)), x.transpose(2, 0, 1))
    wide = run("broadcast", x[:, :1], shape=(2, 3, 5, 7))
    np.testing.assert_array_equal(wide, np.broadcast_to(x[:, :1], (2, 3, 5, 7)))
    np.testing.assert_array_equal(run("concat", x, x[:, :2], axis=-2),
                                  np.concatenate([x, x[:, :2]], 1))
    padded = run("pad", x, np.float32(9), low=(0, 1, 0), high=(2, 0, 1))
    want = np.pad(x, ((0, 2), (1, 0), (0, 1)), constant_values=9)
    np.testing.assert_array_equal(padded, want)


@given(st.data(), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_slice(data, size, step):
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    x = np.arange(size)
    node = make("slice", *operands(x), starts=(start,), stops=(stop,), steps=(step,))
    assert node.shape == x[start:stop:step].shape
    np.testing.assert_array_equal(value_of(node, x), x[start:stop:step])
    backwards = run("slice", x, starts=(start,), stops=(stop,), steps=(-1,))
    np.testing.assert_array_equal(backwards, x[start:stop][::-1])


def test_gathers():
    x, index = random(5, 7, 3), np.array([[4, 0], [2, 2]], np.int32)
    np.testing.assert_array_equal(run("gather", x, index, axis=0), x[index])
    np.testing.assert_array_equal(run("gather", x, index, axis=1), np.take(x, index, 1))
    along = np.argsort(x, axis=1)
    np.testing.assert_array_equal(run("gather_elements", x, along, axis=1), np.sort(x, axis=1))
    places = np.array([[1, 2], [4, 6]])
    np.testing.assert_array_equal(run("gather_nd", x, places), x[[1, 4], [2, 6]])
    rows = np.array([[3], [6], [0], [1], [5]])
    got = run("gather_nd", x, rows, batch_dims=1)
    np.testing.assert_array_equal(got, x[np.arange(5), rows[:, 0]])


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_outside_is_an_error(bad):
    with pytest.raises(ShapeError, match=r"gather: index .* outside 0\.\.4"):
        run("gather", random(5, 3), np.array([0, bad]), axis=0)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatters(reduction):
    x, updates = random(5, 3), random(2, 3, seed=1)
    function = {"none": lambda a, b: b, "add": np.add, "mul": np.multiply,
                "max": np.maximum, "min": np.minimum}[reduction]
    want = x.copy()
    want[[4, 1]] = function(want[[4, 1]], updates)
    got = run("scatter_nd", x, np.array([[4], [1]]), updates, reduction=reduction)
    np.testing.assert_array_equal(got, want)
    index = np.array([[4, 4, 4], [1, 1, 1]])
    got = run("scatter_elements", x, index, updates, axis=0, reduction=reduction)
    np.testing.assert_array_equal(got, want)


def test_scatter_adds_every_update_of_one_element():
    got = run("scatter_nd", np.zeros(3, np.float32), np.array([[1], [1]]), np.float32([2, 3]),
              reduction="add")
    np.testing.assert_array_equal(got, [0, 5, 0])


# ---- reductions --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axes", [(0,), (-1,), (0, 2), (0, 1, 2), ()])
def test_reductions(axes, keep):
    x = random(3, 17, 5)
    for name in ("sum", "mean", "max", "min", "prod"):
        want = getattr(np, name)(x.astype("f8"), axis=axes, keepdims=keep)
        got = run(f"reduce_{name}", x, axes=axes, keep=keep)
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_reductions_of_nothing():
    x = np.zeros((3, 0), np.float32)
    np.testing.assert_array_equal(run("reduce_sum", x, axes=1), [0, 0, 0])
    np.testing.assert_array_equal(run("reduce_max", x, axes=1), [-np.inf] * 3)


def test_arg_extremes():
    x = np.float32([[1, 5, 5, 0], [0, 2, 0, 2]])
    np.testing.assert_array_equal(run("argmax", x, axis=1), [1, 1])
    np.testing.assert_array_equal(run("argmax", x, axis=1, last=True), [2, 3])
    np.testing.assert_array_equal(run("argmin", x, axis=-1, keep=True), [[3], [0]])
    assert run("argmin", x, axis=0, last=True).dtype == np.int64


def test_cumsum():
    x = np.arange(1, 6, dtype=np.int32)
    np.testing.assert_array_equal(run("cumsum", x, axis=0), [1, 3, 6, 10, 15])
    np.testing.assert_array_equal(run("cumsum", x, axis=0, exclusive=True), [0, 1, 3, 6, 10])
    np.testing.assert_array_equal(run("cumsum", x, axis=0, reverse=True), [15, 14, 12, 9, 5])
    both = run("cumsum", x, axis=0, exclusive=True, reverse=True)
    np.testing.assert_array_equal(both, [14, 12, 9, 5, 0])
    assert run("cumsum", np.zeros((2, 0), np.float32), axis=1, exclusive=True).shape == (2, 0)


def test_top_k():
    x = np.float32([[1, 9, 9, 3], [4, 0, 2, 4]])
    both = make("top_k", *operands(x), k=3, axis=1)
    values = value_of(make("get", both, index=0), x)
    indices = value_of(make("get", both, index=1), x)
    np.testing.assert_array_equal(values, [[9, 9, 3], [4, 4, 2]])
    np.testing.assert_array_equal(indices, [[1, 2, 3], [0, 3, 2]])
    assert format_type(both.type) == "(f32[2, 3], i64[2, 3])"


def test_norms_and_softmax_in_f64():
    x, weight, bias = random(3, 33), random(33, seed=1), random(33, seed=2)
    wide = x.astype("f8")
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(run("rms_norm", x, weight, epsilon=1e-5, exact=True), rms, 1e-12)
    layer = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    got = run("layer_norm", x, weight, bias, epsilon=1e-5, exact=True)
    np.testing.assert_allclose(got, layer * weight + bias, 1e-12, 1e-14)
    e = np.exp(wide)
    got = run("softmax", x, axis=0, exact=True)
    np.testing.assert_allclose(got, e / e.sum(0), 1e-12)


def test_rms_norm_takes_a_weight_of_another_float_type():
    x, weight = random(3, 17, kind="bf16"), random(17, seed=1)
    assert run("rms_norm", x, weight, epsilon=1e-6).dtype == x.dtype


# ---- matmul ------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b", [
    ((3, 17), (17, 5)), ((17,), (17, 5)), ((3, 17), (17,)), ((17,), (17,)),
    ((2, 1, 3, 17), (4, 17, 5)), ((0, 17), (17, 5)), ((3, 0), (0, 5)),
])  # fmt: skip
def test_matmul_shapes(a, b):
    left, right = random(*a), random(*b, seed=1)
    want = np.matmul(left.astype("f8"), right)
    got = run("matmul", left, right)
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_matmul_result_types():
    x = random(3, 33, kind="bf16")
    full = x.astype("f4") @ x.astype("f4").T
    np.testing.assert_array_equal(run("matmul", x, x.T.copy()), full.astype(x.dtype))
    np.testing.assert_array_equal(run("matmul", x, x.T.copy(), dtype="f32"), full)
    codes = np.full((2, 300), 127, np.int8)
    got = run("matmul", codes, codes.T.copy())
    assert got.dtype == np.int32 and (got == 300 * 127 * 127).all()


@pytest.mark.parametrize("kind", ["i8", "u8", "i4", "u4"])
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantize(kind, zeros):
    low = 0 if kind[0] == "u" else -8
    codes = np.random.default_rng(0).integers(low, low + 16, (5, 34)).astype(dtype(kind).numpy)
    scales = random(5, 3, seed=1)
    shifts = np.arange(15).reshape(5, 3).astype(np.uint8)
    given = (codes, scales, shifts) if zeros else (codes, scales)
    wide = codes.astype("f4")
    for column in range(34):
        shift = shifts[:, column // 16] if zeros else 0
        wide[:, column] = (wide[:, column] - shift) * scales[:, column // 16]
    np.testing.assert_array_equal(run("dequantize", *given, group=16), wide)


# ---- attention ---------------------------------------------------------------------------------


def naive_attention(q, k, v, scale, sees, softcap=0.0, added=None):
    """Loops over [h, s, d] and [g, t, d]; sees(i, j) for the query's index and the key's."""
    heads, s, _ = q.shape
    groups, t, _ = k.shape
    result = np.zeros((heads, s, v.shape[-1]))
    for h in range(heads):
        for i in range(s):
            keys = [j for j in range(t) if sees(i, j)]
            scores = np.array([q[h, i] @ k[h * groups // heads, j] * scale for j in keys])
            if softcap:
                scores = np.tanh(scores / softcap) * softcap
            if added is not None:
                scores = scores + [added[h, i, j] for j in keys]
            if keys:
                e = np.exp(scores - scores.max())
                result[h, i] = e @ v[h * groups // heads, keys] / e.sum()
    return result


ATTENTION = [
    {}, {"causal": True}, {"causal": True, "window": 3}, {"window": 2},
    {"softcap": 0.75}, {"causal": True, "scale": 0.3, "softcap": 5.0},
]  # fmt: skip


def sees_by(attributes, shift):
    causal, window = attributes.get("causal", False), attributes.get("window", 0)

    def sees(i, j):
        distance = i + shift - j
        return (distance >= 0 or not causal) and (not window or abs(distance) < window)

    return sees


@pytest.mark.parametrize("attributes", ATTENTION)
@pytest.mark.parametrize("heads, groups, s, t", [(4, 2, 5, 5), (3, 1, 1, 7), (2, 2, 3, 9)])
def test_attention(heads, groups, s, t, attributes):
    q, k = random(2, heads, s, 8), random(2, groups, t, 8, seed=1)
    v = random(2, groups, t, 6, seed=2)
    scale = attributes.get("scale", 8**-0.5)
    got = run("attention", q, k, v, exact=True, **attributes)
    for batch in range(2):
        want = naive_attention(q[batch].astype("f8"), k[batch], v[batch], scale,
                               sees_by(attributes, t - s), attributes.get("softcap", 0))
        np.testing.assert_allclose(got[batch], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks(boolean):
    q, k, v = random(1, 2, 3, 8), random(1, 2, 5, 8, seed=1), random(1, 2, 5, 8, seed=2)
    seen = np.random.default_rng(3).random((1, 1, 3, 5)) > 0.5
    seen[0, 0, 1] = False
    mask = seen if boolean else np.where(seen, np.float32(0.5), np.float32(-np.inf))
    got = run("attention", q, k, v, mask)
    want = naive_attention(q[0], k[0], v[0], 8**-0.5, lambda i, j: seen[0, 0, i, j])
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)
    assert (got[0, :, 1] == 0).all()  # sees nothing


@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention(causal):
    q, k, v = random(9, 4, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)
    offsets = np.array([0, 1, 1, 9], np.int32)
    got = run("packed_attention", q, k, v, offsets, causal=causal, window=4)
    sequence = np.repeat([0, 2], [1, 8])
    inside = sees_by({"causal": causal, "window": 4}, 0)
    want = naive_attention(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), 8**-0.5,
                           lambda i, j: sequence[i] == sequence[j] and inside(i, j))
    np.testing.assert_allclose(got, want.swapaxes(0, 1), rtol=1e-5, atol=1e-6)


def paged_inputs(lengths, new):
    """Sequences of `lengths` tokens, of which the last `new` are this step's."""
    width = max(-(-length // PAGE) for length in lengths)
    pool = np.random.default_rng(5).permutation(len(lengths) * width + 2)[: len(lengths) * width]
    return (
        pool.reshape(len(lengths), width).astype(np.int32),
        np.repeat(np.arange(len(lengths)), new).astype(np.int32),
        np.concatenate([np.arange(a - b, a) for a, b in zip(lengths, new, strict=True)])
        .astype(np.int32),
        np.cumsum([0, *new]).astype(np.int32),
    )


@pytest.mark.parametrize("window", [0, 5])
def test_the_paged_cache_is_attention_over_each_sequence(window):
    lengths, new = [1, 33, 70], [1, 3, 40]
    table, sequence, positions, offsets = paged_inputs(lengths, new)
    past = [random(n, 2, 8, seed=n) for n in lengths]
    states = []
    for part in range(2):
        state = np.full((table.size + 2, PAGE, 2, 8), np.nan, np.float32)
        every, all_sequence, all_positions, _ = paged_inputs(lengths, lengths)
        values = np.concatenate(past) * (part + 1)
        states.append(run("cache_append", state, values, every, all_sequence, all_positions))
    assert np.isfinite(states[0]).sum() == sum(lengths) * 16
    q = random(sum(new), 4, 8, seed=9)
    got = run("paged_attention", q, *states, table, sequence, positions, offsets, window=window)
    for each, (length, count) in enumerate(zip(lengths, new, strict=True)):
        rows = slice(offsets[each], offsets[each + 1])
        k = past[each].swapaxes(0, 1)
        want = naive_attention(q[rows].swapaxes(0, 1), k, 2 * k, 8**-0.5,
                               sees_by({"causal": True, "window": window}, length - count))
        np.testing.assert_allclose(got[rows], want.swapaxes(0, 1), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("r", [4, 3])
def test_rope(r):
    x, angles = random(5, 3, 8), random(5, r, seed=1)
    got = run("rope", x, np.cos(angles), np.sin(angles))
    mixed = run("rope", x, np.cos(angles), np.sin(angles), interleaved=True)
    turn = np.exp(1j * angles)[:, None]
    plain = (x[..., :r] + 1j * x[..., r : 2 * r]) * turn
    want = np.concatenate([plain.real, plain.imag, x[..., 2 * r :]], -1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    pairs = (x[..., : 2 * r : 2] + 1j * x[..., 1 : 2 * r : 2]) * turn
    np.testing.assert_allclose(mixed[..., : 2 * r : 2], pairs.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed[..., 1 : 2 * r : 2], pairs.imag, rtol=1e-5, atol=1e-6)


def test_rope_broadcasts_tables_over_a_batch():
    x, angles = random(2, 5, 3, 8), random(5, 4, seed=1)
    got = run("rope", x, np.cos(angles), np.sin(angles))
    one = run("rope", x[1], np.cos(angles), np.sin(angles))
    np.testing.assert_array_equal(got[1], one)


# ---- decompositions ----------------------------------------------------------------------------

COMPOSITES = {
    "sigmoid": ([(3, 17)], {}),
    "silu": ([(3, 17)], {}),
    "softplus": ([(3, 17)], {}),
    "atan": ([(3, 17)], {}),
    "gelu": ([(3, 17)], {}),
    "gelu/tanh": ([(3, 17)], {"approximate": "tanh"}),
    "softmax": ([(3, 17, 5)], {"axis": 1}),
    "rms_norm": ([(3, 33), (33,)], {"epsilon": 1e-5}),
    "layer_norm": ([(3, 33), (33,), (33,)], {"epsilon": 1e-5}),
    "rope": ([(5, 3, 8), (5, 4), (5, 4)], {}),
    "rope/partial": ([(5, 3, 9), (5, 4), (5, 4)], {}),
    "rope/interleaved": ([(2, 5, 3, 9), (5, 4), (5, 4)], {"interleaved": True}),
    **{
        f"attention/{index}": ([(2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 7)], attributes)
        for index, attributes in enumerate(ATTENTION)
    },
}


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_decomposition(name, kind):
    shapes, attributes = COMPOSITES[name]
    arrays = [random(*shape, seed=i, kind=kind) for i, shape in enumerate(shapes)]
    node = make(name.partition("/")[0], *operands(*arrays), **attributes)
    simpler = OPS[node.op].decompose(node)
    assert simpler.type == node.type
    step = 2**-8 if kind == "bf16" else 2e-6
    got, want = (value_of(each, *arrays).astype("f4") for each in (simpler, node))
    np.testing.assert_allclose(got, want, rtol=step, atol=2e-6)
    got, want = (value_of(each, *arrays, exact=True) for each in (simpler, node))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("boolean", [True, False])
def test_decomposed_attention_masks(boolean):
    arrays = [random(1, 2, 3, 8), random(1, 2, 5, 8, seed=1), random(1, 2, 5, 8, seed=2)]
    seen = np.random.default_rng(3).random((1, 1, 3, 5)) > 0.5
    seen[0, 0, 1] = False
    arrays.append(seen if boolean else np.where(seen, np.float32(0.5), np.float32(-np.inf)))
    node = make("attention", *operands(*arrays), causal=True)
    simpler = OPS["attention"].decompose(node)
    np.testing.assert_allclose(value_of(simpler, *arrays), value_of(node, *arrays), 1e-5, 1e-6)


def test_composites_have_decompositions():
    have = {name for name, op in OPS.items() if op.decompose}
    elsewhere = {"routed_experts"}  # its operands have more than one dtype: models/test_experts
    assert have - elsewhere == {name.partition("/")[0] for name in COMPOSITES}


# ---- leaves and structure ----------------------------------------------------------------------


def test_constants():
    node = constant([[1, 2], [3, 4]], "bf16")
    assert format_type(node.type) == "bf16[2, 2]"
    np.testing.assert_array_equal(ops.constant_value(node).astype("f4"), [[1, 2], [3, 4]])
    assert constant(1.5).dtype is dtypes.f32 and constant(3).dtype is dtypes.i64
    assert constant(0.0) is not constant(-0.0)
    assert constant(np.float32([1, 2])) is constant([1, 2], "f32")
    with pytest.raises(GraphError, match="make it a parameter"):
        constant(np.zeros(64 * 1024 // 4 + 1, np.float32))
    with pytest.raises(GraphError, match="needs 8 bytes, got 3"):
        make("constant", dtype="f32", shape=(2,), data=b"abc")


def test_iota_and_dims():
    x = leaf("x", "f32", TOKENS, 3)
    column = make("iota", dtype="i32", shape=(TOKENS, 3), axis=0)
    count = make("dim", value=ceildiv(TOKENS, 2), dtype="i64")
    graph = Graph("test", (x,), (("column", column), ("count", count)))
    got = interpret(graph, {"x": np.zeros((5, 3), np.float32)})
    np.testing.assert_array_equal(got["column"][:, 1], np.arange(5))
    assert got["count"] == 3 and got["count"].dtype == np.int64


# ---- errors ------------------------------------------------------------------------------------

X = leaf("x", "f32", TOKENS, 8)
Y = leaf("y", "f32", 8, ROWS)
IDS = leaf("ids", "i32", TOKENS)


@pytest.mark.parametrize("build, reason", [
    (lambda: make("frobnicate", X), "unknown op 'frobnicate'"),
    (lambda: make("add", X), r"add\(f32\[tokens, 8\]\): takes 2 inputs, got 1"),
    (lambda: make("add", X, IDS), "dims 8 and tokens do not broadcast"),
    (lambda: make("add", X, leaf("z", "f16", 8)), "operands are f32 and f16; cast one"),
    (lambda: make("exp", IDS), "operands must be of type float, not i32"),
    (lambda: make("and", X, X), "bool or integer"),
    (lambda: make("add", X, 3), "operand 3 is not a node"),
    (lambda: make("softmax", X, axis=2), "axis 2 is not an axis of a tensor of rank 2"),
    (lambda: make("softmax", X, axes=1), r"no attribute 'axes' \(it has: axis\)"),
    (lambda: make("reduce_sum", X), "attribute 'axes' is missing"),
    (lambda: make("reduce_sum", X, axes=(1, -1)), "an axis occurs twice"),
    (lambda: make("rms_norm", X, Y, epsilon="small"), "'epsilon' must be a number, not 'small'"),
    (lambda: make("rms_norm", X, leaf("w", "f32", 7), epsilon=1.0), "last axis: 7 and 8 differ"),
    (lambda: make("reshape", X, shape=(TOKENS, 9)), r"\[tokens, 8\] and \[tokens, 9\]"),
    (lambda: make("reshape", X, shape=(-1, 8)), "may differ in size"),
    (lambda: make("transpose", X, permutation=(0, 0)), "no permutation"),
    (lambda: make("slice", X, starts=(0, 3), stops=(TOKENS, 2)), "3:2 does not lie in 0:8"),
    (lambda: make("slice", X, starts=(0, 0), stops=(TOKENS, 9)), "0:9 does not lie in 0:8"),
    (lambda: make("slice", X, starts=(0,), stops=(TOKENS,)), "needs 2 starts"),
    (lambda: make("concat", X, Y, axis=0), "axis 1: 8 and rows differ"),
    (lambda: make("broadcast", X, shape=(8,)), "does not broadcast to"),
    (lambda: make("gather", X, X), "input 1 must be of an integer type, not f32"),
    (lambda: make("matmul", X, X), "contracted dims: 8 and tokens differ"),
    (lambda: make("matmul", X, leaf("z", "i8", 8, 2)), "one operand is float"),
    (lambda: make("top_k", X, k=9), "k = 9 of 8"),
    (lambda: make("get", X, index=0), "a tensor, not a tuple"),
    (lambda: make("cast", X, dtype="f33"), "unknown dtype 'f33'"),
    (lambda: make("gelu", X, approximate="sigmoid"), "one of none, tanh"),
    (lambda: make("attention", *[leaf(n, "f32", 1, h, TOKENS, 8)
                                 for n, h in (("q", 3), ("k", 2), ("v", 2))]),
     "3 query heads are no multiple of 2 key heads"),
])  # fmt: skip
def test_what_does_not_fit_is_named(build, reason):
    with pytest.raises(GraphError, match=reason) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_symbolic_shapes():
    assert make("matmul", X, Y).shape == (TOKENS, ROWS)
    assert make("concat", X, X, axis=0).shape == (TOKENS * 2, 8)
    assert make("reshape", X, shape=(TOKENS * 8,)).shape == (TOKENS * 8,)
    half = make("slice", X, starts=(0, 0), stops=(TOKENS, 8), steps=(2, 1))
    assert half.shape == (ceildiv(TOKENS, 2), 8)
    assert make("pad", X, constant(0.0), low=(1, 0), high=(0, 0)).shape == (TOKENS + 1, 8)
    assert make("gather", X, IDS, axis=1).shape == (TOKENS, TOKENS)


def test_attributes_are_canonical():
    assert make("softmax", X) is make("softmax", X, axis=-1) is make("softmax", X, axis=1)
    assert make("reduce_sum", X, axes=-1) is make("reduce_sum", X, axes=[1], keep=False)
    assert make("rms_norm", X, leaf("w", "f32", 8), epsilon=1)["epsilon"] == 1.0
    assert make("matmul", X, Y) is make("matmul", X, Y, dtype="f32")
