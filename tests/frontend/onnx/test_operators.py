"""Single operators over symbolic shapes, interpreted, against NumPy.

`test_standard_cases` runs what the onnx package has for every operator.
"""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llmc.errors import ModelError
from llmc.frontend.onnx import import_onnx
from llmc.ir.interpret import interpret
from llmc.ir.listed import collected


def evaluate(path, given):
    model = import_onnx(path)
    parameters = {name: stored.read() for name, stored in model.parameters.items()}
    with np.errstate(all="ignore"):
        return interpret(model.graph, given, parameters)


@pytest.fixture
def run(tmp_path):
    def run(body, given, opset=18, microsoft=1, **tensors):
        """Runs a graph in ONNX's text form; `tensors` become initializers."""
        opsets = f'"" : {opset}, "com.microsoft" : {microsoft}, "local" : 1'
        model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> {body}")
        for name, array in tensors.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return evaluate(path, given)["y"]

    return run


X = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8) - 20


@pytest.mark.parametrize(
    ("shape", "expected"),
    [([0, -1], (2, 24)), ([-1, 4], (12, 4)), ([0, 0, 2, -1], (2, 3, 2, 4)), ([48], (48,))],
)
def test_reshape(run, shape, expected):
    if shape == [48]:  # nothing proves that a * b * 8 is 48
        with pytest.raises(ModelError, match="reshape"):
            run("g (float[a, b, 8] x) => (float[] y) { y = Reshape(x, s) }", {"x": X}, s=shape)
        return
    y = run("g (float[a, b, 8] x) => (float[] y) { y = Reshape(x, s) }", {"x": X}, s=shape)
    assert (y == X.reshape(expected)).all()


@pytest.mark.parametrize(
    ("start", "end", "axis", "step"),
    [
        (0, 2**63 - 1, 1, 1),
        (-2, 2**63 - 1, 1, 1),
        (1, -1, 2, 2),
        (-1, -(2**63), 1, -1),
        (6, 1, 2, -2),
        (5, 100, 2, 1),
        (100, 200, 2, 1),
        (-1, 0, 0, 1),
    ],
)
def test_slice(run, start, end, axis, step):
    body = "g (float[a, 3, 8] x) => (float[] y) { y = Slice(x, s, e, axis, step) }"
    if axis != 2:
        body = body.replace("[a, 3, 8]", "[2, 3, 8]")
    values = {"s": [start], "e": [end], "axis": [axis], "step": [step]}
    y = run(body, {"x": X}, **{k: np.array(v, np.int64) for k, v in values.items()})
    stop = None if end < -(2**31) else end
    assert (y == X[(slice(None),) * axis + (slice(start, stop, step),)]).all()


def test_slice_up_to_a_symbol(run):
    body = """g (float[a, b] x) => (float[] y) {
        n = Shape <start = 1> (x)
        row = Slice(table, zero, n, one)
        y = Add(x, row)
    }"""
    table = np.arange(10, dtype=np.float32)[None]
    x = np.ones((2, 4), np.float32)
    y = run(body, {"x": x}, table=table, zero=np.array([0]), one=np.array([1]))
    assert (y == x + table[:, :4]).all()


def test_shape_arithmetic(run):
    """Shape, Gather, Concat, Where, Range, Expand as exporters chain them."""
    body = """g (float[a, b, 8] x) => (float[] y) {
        shape = Shape(x)
        rows = Gather(shape, zero)
        length = Gather(shape, one)
        double = Mul(length, two)
        half = Div(double, two)
        asked = Equal(half, minus)
        chosen = Where(asked, one, half)
        ramp = Range(zero, chosen, one)
        floats = Cast <to = 1> (ramp)
        column = Unsqueeze(floats, axis)
        last = Constant <value_ints = [8]> ()
        first = Unsqueeze(rows, front)
        middle = Unsqueeze(chosen, front)
        target = Concat <axis = 0> (first, middle, last)
        wide = Expand(column, target)
        y = Add(x, wide)
    }"""
    scalars = {"zero": 0, "one": 1, "two": 2, "minus": -1}
    tensors = {name: np.array(value) for name, value in scalars.items()}
    y = run(body, {"x": X}, axis=np.array([1]), front=np.array([0]), **tensors)
    assert (y == X + np.arange(3, dtype=np.float32)[:, None]).all()


@pytest.mark.parametrize("operator, size", [("ReduceProd", 48), ("ReduceSum", 13)])
def test_shapes_are_reduced_to_shapes(run, operator, size):
    """Of one item, as Reshape and Expand want them."""
    body = f"""g (float[a, b, 8] x) => (float[] y) {{
        shape = Shape(x)
        size = {operator}(shape)
        y = {'Reshape(x, size)' if operator == 'ReduceProd' else 'Expand(one, size)'}
    }}"""
    parameters = {} if operator == "ReduceProd" else {"one": np.ones(1, np.float32)}
    assert run(body, {"x": X}, **parameters).shape == (size,)


def test_gather_counts_from_the_end(run):
    index = np.array([[-1, 0], [1, -2]])
    body = "g (float[a, b, 8] x, int64[p, q] i) => (float[] y) { y = Gather <axis = 2> (x, i) }"
    assert (run(body, {"x": X, "i": index}) == np.take(X, index, axis=2)).all()
    body = "g (float[a, b, 8] x) => (float[] y) { y = Gather <axis = 1> (x, i) }"
    assert (run(body, {"x": X}, i=np.array(-1)) == X[:, -1]).all()


def test_gather_and_scatter_nd(run):
    index = np.array([[0, -1], [1, 0]])
    body = "g (float[a, b, 8] x, int64[n, 2] i) => (float[] y) { y = GatherND(x, i) }"
    assert (run(body, {"x": X, "i": index}) == X[[0, 1], [-1, 0]]).all()
    updates = np.full((2, 8), 7, np.float32)
    body = """g (float[a, b, 8] x, int64[n, 2] i, float[n, 8] u) => (float[] y) {
        y = ScatterND <reduction = "add"> (x, i, u)
    }"""
    expected = X.copy()
    expected[[0, 1], [-1, 0]] += 7
    assert (run(body, {"x": X, "i": index, "u": updates}) == expected).all()


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap", "constant"])
def test_pad(run, mode):
    body = f'g (float[a, b, 8] x) => (float[] y) {{ y = Pad <mode = "{mode}"> (x, p) }}'
    y = run(body, {"x": X}, opset=19, p=np.array([0, 1, 2, 0, 0, 3]))
    assert (y == np.pad(X, [(0, 0), (1, 0), (2, 3)], mode=mode)).all()


def test_negative_pads_cut(run):
    y = run(
        "g (float[a, b, 8] x) => (float[] y) { y = Pad(x, p) }",
        {"x": X},
        p=np.array([0, 0, -2, 0, 1, -1]),
    )
    assert (y == np.pad(X, [(0, 0), (0, 1), (0, 0)])[:, :, 2:-1]).all()


def test_split_tile_trilu(run):
    body = """g (float[a, b, 8] x) => (float[] y) {
        p, q, r = Split <axis = 2, num_outputs = 3> (x)
        t = Tile(r, n)
        u = Trilu <upper = 0> (t, k)
        y = Concat <axis = -1> (q, p, u)
    }"""
    y = run(body, {"x": X}, n=np.array([1, 1, 2]), k=np.array(1))
    p, q, r = X[..., :3], X[..., 3:6], X[..., 6:]
    assert (y == np.concatenate([q, p, np.tril(np.tile(r, (1, 1, 2)), 1)], -1)).all()


@pytest.mark.parametrize(("op", "expected"), [("Div", [-3, -3, 3]), ("Mod", [1, -1, 1])])
def test_integer_division(run, op, expected):
    a, b = np.array([-7, 7, 7], np.int64), np.array([2, -2, 2], np.int64)
    body = f"g (int64[n] a, int64[n] b) => (int64[n] y) {{ y = {op}(a, b) }}"
    assert run(body, {"a": a, "b": b}).tolist() == expected


@pytest.mark.parametrize(
    "equation",
    ["bij,bjk->bik", "bij,bkj->bik", "bij,kj->bik", "bij->ji", "bij,bij->b", "bij,k->kjib"],
)
def test_einsum(run, equation):
    left, right = equation.split("->")[0].partition(",")[::2]
    sizes = {"b": 2, "i": 3, "j": 8, "k": 5}
    rng = np.random.default_rng(3)
    arrays = [
        rng.normal(size=[sizes[c] for c in term]).astype(np.float32)
        for term in (left, right)
        if term
    ]
    given = dict(zip("pq", arrays, strict=False))
    declared = ", ".join(
        f"float[{', '.join(t)}] {n}" for n, t in zip("pq", (left, right), strict=True) if t
    )
    call = f'Einsum <equation = "{equation}"> ({", ".join(given)})'
    body = f"g ({declared}) => (float[] y) {{ y = {call} }}"
    assert np.allclose(run(body, given), np.einsum(equation, *arrays), atol=1e-5)


def test_gemm(run):
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 3), (5, 8), (5,)))
    body = """g (float[8, n] a) => (float[] y) {
        y = Gemm <alpha = 0.5, beta = 2.0, transA = 1, transB = 1> (a, b, c)
    }"""
    assert np.allclose(run(body, {"a": a}, b=b, c=c), 0.5 * a.T @ b.T + 2 * c, atol=1e-5)


def test_smallest_first(run):
    body = """g (float[a, b, 8] x) => (float[] y) {
        v, i = TopK <largest = 0> (x, k)
        y = Identity(v)
    }"""
    assert (run(body, {"x": X[..., ::-1].copy()}, k=np.array([3])) == X[..., :3]).all()


def test_softmax_before_opset_13_takes_all_trailing_axes(run):
    y = run("g (float[a, 3, 8] x) => (float[] y) { y = Softmax(x) }", {"x": X}, opset=12)
    e = np.exp(X - X.max(axis=(1, 2), keepdims=True))
    assert np.allclose(y, e / e.sum(axis=(1, 2), keepdims=True), atol=1e-6)


def test_local_function_with_attributes(run):
    body = """g (float[n] x) => (float[n] y) { y = local.Twice <by = 3.0> (x) }
    <domain: "local", opset_import: ["" : 18]>
    Twice <by> (a) => (b) {
        factor = Constant <value_float : float = @by> ()
        c = Mul(a, factor)
        b = Mul(c, factor)
    }"""
    assert run(body, {"x": np.array([1, 2], np.float32)}).tolist() == [9, 18]


@pytest.mark.parametrize(("length", "expected"), [(1, -1.0), (3, 2.0)])
def test_if_of_a_known_condition(run, length, expected):
    body = f"""g (float[n, {length}] x) => (float[] y) {{
        n = Shape <start = 1> (x)
        one = Constant <value_ints = [1]> ()
        single = Equal(n, one)
        y = If (single) <
            then_branch = a () => (float[] t) {{ t = Neg(x) }},
            else_branch = b () => (float[] e) {{ e = Add(x, x) }}
        >
    }}"""
    assert (run(body, {"x": np.ones((2, length), np.float32)}) == expected).all()


def test_if_that_depends_on_data_is_refused(run):
    body = """g (bool c, float[n] x) => (float[] y) {
        y = If (c) <
            then_branch = a () => (float[] t) { t = Neg(x) },
            else_branch = b () => (float[] e) { e = Add(x, x) }
        >
    }"""
    with pytest.raises(ModelError, match="depends on data"):
        run(body, {})


# ---- com.microsoft -----------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("window", [-1, 3])
def test_group_query_attention_with_ragged_caches(run, window):
    """Two sequences with 5 and 2 valid keys in a cache of 5; one new token each, without rope."""
    rng = np.random.default_rng(5)
    heads, groups, size, valid = 4, 2, 8, [5, 2]
    q, k, v = (
        rng.normal(size=(2, 1, n * size)).astype(np.float32) for n in (heads, groups, groups)
    )
    past_k, past_v = (rng.normal(size=(2, groups, 5, size)).astype(np.float32) for _ in range(2))
    body = f"""g (float[b, s, 32] q, float[b, s, 16] k, float[b, s, 16] v, float[b, 2, p, d] past_k,
        float[b, 2, p, d] past_v, int32[b] seqlens, float[b, total] mask) => (float[] y) {{
        n = Shape <start = 1> (mask)
        m = Cast <to = 6> (n)
        y, pk, pv = com.microsoft.GroupQueryAttention
            <num_heads = 4, kv_num_heads = 2, local_window_size = {window}>
            (q, k, v, past_k, past_v, seqlens, m)
    }}"""
    given = {"q": q, "k": k, "v": v, "past_k": past_k, "past_v": past_v}
    given |= {"seqlens": np.array(valid, np.int32), "mask": np.ones((2, 6), np.float32)}
    y = run(body, given)
    for b, past in enumerate(valid):
        first = max(0, past + 1 - window) if window > 0 else 0
        for head in range(heads):
            group = head // 2
            keys = np.vstack([past_k[b, group, :past], k[b, :, group * size :][:, :size]])[first:]
            values = np.vstack([past_v[b, group, :past], v[b, :, group * size :][:, :size]])[first:]
            query = q[b, :, head * size :][:, :size]
            expected = softmax(query @ keys.T / np.sqrt(size)) @ values
            assert np.allclose(y[b, :, head * size :][:, :size], expected, atol=1e-5)


@pytest.mark.parametrize(("bits", "columns"), [(4, 40), (8, 33), (2, 64)])
def test_matmul_of_packed_codes(run, bits, columns):
    rng = np.random.default_rng(bits)
    rows, block = 5, 16
    blocks = -(-columns // block)
    codes = rng.integers(0, 1 << bits, (rows, blocks, block)).astype(np.uint8)
    zeros = rng.integers(0, 1 << bits, (rows, blocks)).astype(np.uint8)
    scales = rng.normal(size=(rows, blocks)).astype(np.float32)
    x = rng.normal(size=(3, columns)).astype(np.float32)

    def packed(values):
        per_byte = 8 // bits
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_byte)])
        parts = values.reshape(*values.shape[:-1], -1, per_byte)
        return (parts << np.arange(0, 8, bits)).sum(-1).astype(np.uint8)

    body = f"""g (float[n, {columns}] x) => (float[] y) {{
        y = com.microsoft.MatMulNBits
            <K = {columns}, N = {rows}, bits = {bits}, block_size = {block}> (x, w, s, z)
    }}"""
    y = run(body, {"x": x}, w=packed(codes), s=scales, z=packed(zeros))
    weight = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    assert np.allclose(y, x @ weight.reshape(rows, -1)[:, :columns].T, atol=1e-4)


# ---- the standard's own cases ------------------------------------------------------------------


def as_array(value):
    return (
        numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    )


def constant_inputs(case):
    """The model with small integer inputs (axes, shapes, counts) as initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for declared, value in zip(case.model.graph.input, case.data_sets[0][0], strict=False):
        small = isinstance(value, np.ndarray) and value.ndim <= 1 and value.size <= 16
        if small and value.dtype in (np.int64, np.int32) and len(case.model.graph.input) > 1:
            model.graph.initializer.append(numpy_helper.from_array(value, declared.name))
    return model


def assert_close(found, expected, rtol):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if expected.dtype.kind in "biu":
        np.testing.assert_array_equal(found, expected)
    else:
        low = expected.dtype.itemsize <= 2
        rtol, atol = (2e-2, 1e-2) if low else (max(rtol, 1e-3), 1e-5)
        wide = (found.astype(np.float64), expected.astype(np.float64))
        np.testing.assert_allclose(*wide, rtol=rtol, atol=atol)


def assert_same(found, expected, rtol):
    """Arrays, lists of them, or None."""
    if not isinstance(expected, list):
        assert_close(found, as_array(expected), rtol)
        return
    assert len(found) == len(expected)
    for each, wanted in zip(found, expected, strict=True):
        assert_same(each, wanted, rtol)


# Of an expanded form there is another test; random numbers are those of NumPy's generator.
SKIPPED = ("expanded", "training", "bernoulli")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_standard_cases(tmp_path):
    """Every operator case of the onnx package is computed right, or refused with a ModelError."""
    from onnx.backend.test.case.node import collect_testcases

    path, right = tmp_path / "model.onnx", 0
    for case in collect_testcases(None):
        if any(part in case.name for part in SKIPPED) or not case.data_sets:
            continue
        path.write_bytes(constant_inputs(case).SerializeToString())
        try:
            model = import_onnx(path)
        except ModelError:
            continue
        for inputs, outputs in case.data_sets:
            names = [value.name for value in case.model.graph.input]
            kept = {node["name"] for node in model.graph.inputs}
            given = {n: as_array(a) for n, a in zip(names, inputs, strict=False) if n in kept}
            found = evaluate(path, given)
            for output, expected in zip(case.model.graph.output, outputs, strict=True):
                assert_same(collected(output.name, found), expected, case.rtol)
            right += 1
    assert right > 850
