"""Symbols from shapes; what does not fit is refused by name."""

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.runtime.artifact import SymbolInfo, TensorInfo
from llmc.runtime.binding import Tensor, bind, check_inputs, make_symbols

SYMBOLS = make_symbols([SymbolInfo("batch", 1, 8), SymbolInfo("past", 0, 100),
                        SymbolInfo("blocks", 2, 64, 2)])


def tensors():
    return [Tensor(TensorInfo("x", "i64", ("batch", "past + 3")), SYMBOLS),
            Tensor(TensorInfo("y", "f32", ("batch", "blocks*4", "7")), SYMBOLS)]


def arrays(batch=2, past=0, blocks=4):
    return {"x": np.zeros((batch, past + 3), np.int64), "y": np.zeros((batch, blocks * 4, 7),
                                                                       np.float32)}


def solve(given):
    return bind(tensors(), check_inputs(tensors(), given), {})


def test_affine_dims_are_solved():
    assert solve(arrays(2, 5, 6)) == {"batch": 2, "past": 5, "blocks": 6}


@pytest.mark.parametrize("given, message", [
    (arrays(batch=9), "batch must be in 1..8"),
    (arrays(blocks=3), "multiple of 2"),
    ({**arrays(2), "y": arrays(3)["y"]}, "axis 0 has 3, expected 2, which is batch with batch = 2"),
    ({"x": arrays()["x"]}, "missing input y"),
    ({**arrays(), "z": np.zeros(1)}, "unknown input z"),
    ({**arrays(), "x": np.zeros((2, 3, 1), np.int64)}, "2 axes"),
    ({**arrays(), "x": np.zeros((2, 3), np.float32)}, "cannot take values"),
    ({**arrays(), "y": np.zeros((2, 16, 6), np.float32)}, "axis 2 has 6, expected 7$"),
])
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ShapeError, match=message):
        solve(given)


def test_narrower_integers_are_taken():
    given = check_inputs(tensors(), {**arrays(), "x": np.zeros((2, 3), np.int32)})
    assert given[0].dtype == np.int64


def test_scalars_stay_scalars():
    scalar = [Tensor(TensorInfo("x", "f32", ()), SYMBOLS)]
    given = check_inputs(scalar, {"x": np.float64(2.5)})
    assert given[0].shape == () and bind(scalar, given, {}) == {}


@pytest.mark.parametrize("wrong", [-1, 7])
def test_integers_that_pick_rows_stay_inside_the_table(wrong):
    ids = [Tensor(TensorInfo("ids", "i64", ("batch",), limit=7), SYMBOLS)]
    check_inputs(ids, {"ids": np.array([0, 6])})
    with pytest.raises(ShapeError, match=r"outside 0\.\.6"):
        check_inputs(ids, {"ids": np.array([0, wrong])})
