"""Elements of every dtype: stored from f32, read back, converted, and reinterpreted, as ml_dtypes
does it."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.codegen.elements import SMALL_FLOATS
from llmc.ir.dtypes import dtype
from llmc.ir.ops import make
from tests.codegen.harness import leaf, run

SMALL = (*SMALL_FLOATS, "f8e8m0")
PACKABLE = ("i2", "u2", "i4", "u4", "f4e2m1")


def interesting(name):
    """Every number of the dtype, the middles between neighbours, what lies just beside those, and
    what lies beyond the largest."""
    own = dtype(name)
    codes = np.arange(1 << own.bits, dtype=np.uint8).view(own.numpy)
    numbers = np.unique(codes.astype(np.float64)[np.isfinite(codes.astype(np.float64))])
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = np.concatenate([numbers, middles, -numbers, 2 * numbers[-1:], -3 * numbers[-1:]])
    with np.errstate(over="ignore"):
        singles = points.astype(np.float32)
    beside = [np.nextafter(singles, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40], np.float32)
    return np.concatenate([singles, *beside, special])


@pytest.mark.parametrize("name", SMALL)
def test_small_floats_round_as_in_ml_dtypes(name):
    values = interesting(name)
    with np.errstate(all="ignore"):
        wanted = values.astype(dtype(name).numpy)
    x = leaf("x", "f32", values.size)
    stored = make("cast", x, dtype=dtype(name))
    outputs = {"stored": stored, "back": make("cast", stored, dtype=dtype("f32"))}
    got = run("map", outputs, arrays={"x": values})
    not_a_number = np.isnan(wanted.astype(np.float32))
    assert (np.isnan(got["stored"].astype(np.float32)) == not_a_number).all()
    codes, right = got["stored"].view(np.uint8), wanted.view(np.uint8)
    assert (codes == right)[~not_a_number].all()
    np.testing.assert_array_equal(got["back"], wanted.astype(np.float32))


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("size", (1, 3, 17, 33))
def test_parts_of_a_byte_have_a_byte_each(name, size):
    """Moved, converted to and from f32 and i32: NumPy's representation on both sides."""
    values = np.resize(np.arange(1 << dtype(name).bits, dtype=np.uint8), 3 * size)
    array = values.reshape(3, size).view(dtype(name).numpy)
    x = leaf("x", name, 3, size)
    single = make("cast", x, dtype=dtype("f32"))
    outputs = {"moved": make("transpose", x, permutation=(1, 0)), "single": single,
               "again": make("cast", single, dtype=dtype(name))}
    got = run("map", outputs, arrays={"x": array})
    assert (got["moved"].view(np.uint8) == array.T.view(np.uint8)).all()
    assert (got["single"] == array.astype(np.float32)).all()
    assert (got["again"].view(np.uint8) == array.view(np.uint8)).all()


@pytest.mark.parametrize("name", ("i2", "u2", "i4", "u4"))
def test_integers_out_of_range_lose_their_upper_bits(name):
    values = np.arange(-20, 21, dtype=np.int32)
    x = leaf("x", "i32", values.size)
    got = run("map", {"out": make("cast", x, dtype=dtype(name))}, arrays={"x": values})
    mask = (1 << dtype(name).bits) - 1
    assert (got["out"].view(np.uint8) == values & mask).all()


@pytest.mark.parametrize(("source", "target"), [
    ("f32", "i32"), ("i32", "f32"), ("f64", "u64"), ("f16", "u16"), ("i16", "bf16"),
    ("u8", "f8e4m3fn"), ("f8e8m0", "i8"), ("i4", "u4"), ("bool", "u8")])
def test_bits_are_kept(source, target):
    own = dtype(source)
    bits = np.arange(256 if own.bits >= 8 else 1 << own.bits, dtype=np.uint8)
    if source == "f8e8m0":
        bits = bits[1:]
    count = bits.size if own.bits <= 8 else 8
    array = (bits % 2 if source == "bool" else bits).view(own.numpy) if own.bits <= 8 else \
        np.linspace(-3, 3, count).astype(own.numpy)
    x = leaf("x", source, array.size)
    got = run("map", {"out": make("bitcast", x, dtype=dtype(target))}, arrays={"x": array})
    codes = got["out"].view(np.uint8)
    wanted = array.view(np.uint8)
    if source.startswith("f8") or target.startswith("f8"):  # NaNs may change their bits
        floats = array if own.is_float else array.view(dtype(target).numpy)
        same = ~np.isnan(floats.astype(np.float32))
        codes, wanted = codes[same], wanted[same]
    assert (codes == wanted).all()


@pytest.mark.parametrize("name", ["u8", "i8", "u16", "i16", "i32"])
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("size", [5, 67])
def test_floats_become_integers_towards_zero_and_saturate(name, source, size):
    low, high = np.iinfo(dtype(name).numpy).min, np.iinfo(dtype(name).numpy).max
    points = [0.0, -0.0, 0.9, -0.9, 1.5, -1.5, 2.5, low, high, low - 1.0, high + 1.0, 3e9, -3e9,
              1e30, -1e30, np.inf, -np.inf, np.nan, 2147483520.0, 2147483648.0]
    values = np.resize(np.array(points, dtype(source).numpy), size)
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(np.clip(np.trunc(values.astype(np.float64)), low, high), nan=0)
    x = leaf("x", source, size)
    got = run("map", {"y": make("cast", x, dtype=dtype(name))}, arrays={"x": values})
    np.testing.assert_array_equal(got["y"], wanted.astype(dtype(name).numpy))
