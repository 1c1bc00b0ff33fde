"""Operators whose node tests leave something out: interpreted, against NumPy."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llmc.errors import ModelError, ShapeError, ValueNeeded
from llmc.frontend.onnx import import_onnx_bytes
from llmc.ir.interpret import interpret

RNG = np.random.default_rng(0)


def run(body, given, opset=21, domain="", values=None, **tensors):
    """The outputs of a graph in ONNX's text form; `tensors` become initializers."""
    domains = f'"" : {opset}' + (f', "{domain}" : 1' if domain else "")
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{domains}]> {body}")
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    imported = import_onnx_bytes(model.SerializeToString(), values=values)
    parameters = {name: stored.read() for name, stored in imported.parameters.items()}
    with np.errstate(all="ignore"):
        return interpret(imported.graph, given, parameters)


@pytest.mark.parametrize("equation", [
    "bij,bjk->bik", "...ij,jk->...ik", "ii->i", "iij->j", "...ii->...i", "ij,kl->jilk", "bij->",
    "i,i", "ba", "...j,...j->...", "aab,bc->ac"])
def test_einsum(equation):
    sizes = {"b": 2, "i": 3, "j": 5, "k": 4, "l": 7, "a": 3, "c": 1}
    shapes = [[2, 3] * term.count("...") + [sizes[c] for c in term.replace("...", "")]
              for term in equation.partition("->")[0].split(",")]
    arrays = {f"x{n}": RNG.standard_normal(shape, np.float32) for n, shape in enumerate(shapes)}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}" for n, a in arrays.items())
    call = f'Einsum <equation = "{equation}"> ({", ".join(arrays)})'
    body = f"g ({declared}) => (float[] y) {{ y = {call} }}"
    got = run(body, arrays)["y"]
    np.testing.assert_allclose(got, np.einsum(equation, *arrays.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij->ijk", "i->i", "ij->i.", "ij->é"])
def test_einsum_refuses(equation):
    body = f'g (float[2,3] x) => (float[] y) {{ y = Einsum <equation = "{equation}"> (x) }}'
    with pytest.raises(ModelError, match="Einsum"):
        run(body, {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_determinants_need_pivots(size):
    x = RNG.standard_normal((4, size, size)).astype(np.float64)
    x[1, 0, 0] = 0
    x[2, -1] = x[2, 0]  # singular, but for one row
    x[3] = np.eye(size)[::-1]
    got = run(f"g (double[4,{size},{size}] x) => (double[] y) {{ y = Det(x) }}", {"x": x})["y"]
    np.testing.assert_allclose(got, np.linalg.det(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_inverse_functions(name, kind):
    ends = {"Asin": (-1, 1), "Acos": (-1, 1), "Acosh": (1, 50), "Atanh": (-0.999, 0.999)}
    low, high = ends.get(name, (-50, 50))
    x = np.linspace(low, high, 999).astype(kind)
    x = np.concatenate([x, x[abs(x - low) < 0.2] * 0 + low, kind([1e-6, -1e-6, 1e-20])])
    x = x[(x >= low) & (x <= high)]
    text = "float" if kind == np.float32 else "double"
    got = run(f"g ({text}[n] x) => ({text}[] y) {{ y = {name}(x) }}", {"x": x})["y"]
    want = getattr(np, name.lower().replace("a", "arc", 1))(x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=4e-6 if kind == np.float32 else 1e-12, atol=1e-30)


@pytest.mark.parametrize("length", [6, 9])
@pytest.mark.parametrize("wanted", [4, 6, 11])
def test_transforms_there_and_back(length, wanted):
    """Forward, one-sided, and the inverse of both; cut or padded to the wanted length."""
    x = RNG.standard_normal((2, length, 3), np.float32)
    n = np.array(wanted)
    body = """g (float[b, n, 3, 1] x) => (float[] full, float[] half, float[] back, float[] real) {
        full = DFT(x, n, axis)
        half = DFT <onesided = 1> (x, n, axis)
        back = DFT <inverse = 1> (full, , axis)
        real = DFT <inverse = 1, onesided = 1> (half, n, axis)
    }"""
    got = run(body, {"x": x[..., None]}, n=n, axis=np.array(1))
    fitted = np.pad(x, ((0, 0), (0, max(wanted - length, 0)), (0, 0)))[:, :wanted]
    full = np.fft.fft(fitted, axis=1)
    np.testing.assert_allclose(got["full"][..., 0] + 1j * got["full"][..., 1], full, atol=1e-5)
    half = np.fft.rfft(fitted, axis=1)
    np.testing.assert_allclose(got["half"][..., 0] + 1j * got["half"][..., 1], half, atol=1e-5)
    np.testing.assert_allclose(got["back"][..., 0], fitted, atol=1e-6)
    np.testing.assert_allclose(got["real"][..., 0], fitted, atol=1e-6)


def test_labels_that_are_numbers():
    body = """g (float[n] x) => (int64[] y) {
        y = ai.onnx.ml.LabelEncoder <keys_floats = [1.5, -2.0, 4.0], values_int64s = [7, 8, 9],
            default_int64 = -5> (x) }"""
    x = np.array([4, 1.5, 0, -2, np.nan], np.float32)
    got = run(body, {"x": x}, domain="ai.onnx.ml")["y"]
    np.testing.assert_array_equal(got, [9, 7, -5, 8, -5])


def test_operands_of_old_opsets_are_aligned_by_an_axis():
    x, b = RNG.standard_normal((2, 3, 4), np.float32), np.array([1, 2, 3], np.float32)
    body = """g (float[2,3,4] x, float[3] b) => (float[] y) {
        y = Add <broadcast = 1, axis = 1> (x, b) }"""
    got = run(body, {"x": x, "b": b}, opset=6)["y"]
    np.testing.assert_array_equal(got, x + b[:, None])


def test_a_value_that_decides_shapes_is_asked_for_and_then_used():
    body = """g (float[1] x, int64[k] shape) => (float[] y) {
        twice = Add(shape, shape)
        y = Expand(x, twice)
    }"""
    given = {"x": np.ones(1, np.float32), "shape": np.array([2])}
    with pytest.raises(ValueNeeded, match="the new shape depends on data") as needed:
        run(body, given)
    assert needed.value.key == "twice"
    model = needed.value.model
    assert [name for name, _ in model.graph.outputs] == ["value"]
    twice = interpret(model.graph, given, {})["value"]
    np.testing.assert_array_equal(run(body, given, values={"twice": twice})["y"], np.ones(4))
    with pytest.raises(ShapeError, match="tensor 'twice'"):
        run(body, given, values={"twice": np.float32(4)})


# ---- random numbers ------------------------------------------------------------------------------


def draw(operator, given=None, dtype="float"):
    names = ", ".join(given or {})
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}"
                         for n, a in (given or {}).items())
    return run(f"g ({declared}) => ({dtype}[] y) {{ y = {operator} ({names}) }}", given or {})["y"]


def test_uniform_numbers():
    x = draw("RandomUniform <shape = [300, 33], low = -1.0, high = 3.0, seed = 1.0>")
    assert x.shape == (300, 33)
    assert x.dtype == np.float32
    assert x.min() >= -1
    assert x.max() < 3
    counts, _ = np.histogram(x, 16, (-1, 3))
    assert (abs(counts / x.size - 1 / 16) < 0.01).all()
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.03
    other = draw("RandomUniform <shape = [300, 33], low = -1.0, high = 3.0, seed = 2.0>")
    assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < 0.03


def test_normal_numbers_like_another_tensor():
    like = np.zeros((100, 77), np.float32)
    x = draw("RandomNormalLike <mean = 2.0, scale = 3.0>", {"x": like}).astype(np.float64)
    assert x.shape == like.shape
    assert abs(x.mean() - 2) < 0.15
    assert abs(x.std() - 3) < 0.15
    assert abs(((x - 2) ** 4).mean() / 81 - 3) < 0.4  # a normal distribution's kurtosis


def test_drawn_with_probabilities():
    share = np.repeat(np.array([0, 0.25, 0.75, 1], np.float32)[:, None], 2000, 1)
    drawn = draw("Bernoulli", {"x": share})
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_allclose(drawn.mean(1), [0, 0.25, 0.75, 1], atol=0.04)
    weights = np.log(np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 1e-30]], np.float32))
    chosen = draw("Multinomial <sample_size = 3000, dtype = 7>", {"x": weights}, "int64")
    assert chosen.dtype == np.int64
    counts = np.stack([np.bincount(row, minlength=3) for row in chosen]) / 3000
    np.testing.assert_allclose(counts, [[0.1, 0.2, 0.7], [0.5, 0.5, 0]], atol=0.04)


@pytest.mark.parametrize("ratio", [0, 0.25])
def test_dropped_in_training(ratio):
    x = RNG.standard_normal((50, 70), np.float32)
    body = """g (float[50,70] x, float r, bool t) => (float[] y, bool[] mask) {
        y, mask = Dropout <seed = 3> (x, r, t) }"""
    values = {"r": np.float32(ratio), "t": np.array(True)}
    got = run(body, {"x": x, **values}, values=values)
    assert abs(got["mask"].mean() - 1 + ratio) < 0.03
    np.testing.assert_allclose(got["y"], x * got["mask"] / np.float32(1 - ratio), rtol=1e-6)
