import numpy as np
import pytest

from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.shape_array import ShapeArray, fold, from_items, scalar
from llmc.ir import dims
from llmc.ir.dtypes import bool_, i64

SEQ = dims.symbol("seq")
PAST = dims.symbol("past", 0)


def test_known_values_become_numpy():
    known = from_items([3, 4]).known()
    assert known is not None and known.dtype == np.int64 and known.tolist() == [3, 4]
    assert from_items([3, SEQ]).known() is None


def test_fold_broadcasts():
    result = fold(lambda a, b: a + b, [from_items([1, SEQ]), scalar(2)])
    assert isinstance(result, ShapeArray)
    assert result.flat() == [3, SEQ + 2]


def test_fold_gives_up_on_undecidable_and_large():
    assert fold(shape_array.equal, [from_items([SEQ]), from_items([PAST])], bool_) is None
    wide = shape_array.from_numpy(np.arange(17).reshape(17, 1), i64)
    high = shape_array.from_numpy(np.arange(17).reshape(1, 17), i64)
    assert fold(lambda a, b: a + b, [wide, high]) is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(SEQ, SEQ, True), (SEQ, -1, False), (SEQ, 0, False), (PAST, 0, None), (SEQ, PAST, None)],
)
def test_equal(a, b, expected):
    assert shape_array.equal(a, b) is expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(0, SEQ, True), (SEQ, 0, False), (1, SEQ, None), (PAST, PAST + SEQ, True)],
)
def test_less(a, b, expected):
    assert shape_array.less(a, b) is expected


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(-7, 2, -3), (7, -2, -3), (7, 2, 3), (7, 0, None)]
)
def test_division_truncates(a, b, expected):
    assert shape_array.truncating_divide(a, b) == expected


def test_division_of_symbols_needs_known_signs():
    assert shape_array.truncating_divide(4 * SEQ, 2) == 2 * SEQ
    assert shape_array.truncating_divide(PAST - SEQ, 2) is None


def test_small_extents():
    assert shape_array.small_extents((2, 3)) == (2, 3)
    assert shape_array.small_extents((2, SEQ)) is None
    assert shape_array.small_extents((1000, 1000)) is None
    assert shape_array.small_extents((-1, 2)) is None
