"""Layouts: each address is used once, packing follows the addresses, and padding is zero."""

import ml_dtypes
import numpy as np
import pytest

from llmc.ir.dtypes import dtype
from llmc.ir.layouts import (
    Columns,
    KeyPages,
    Panels,
    RowBlocks,
    Rows,
    ValuePages,
    format_layout,
    pack,
    parse_layout,
    split_bits,
    unpack,
)

CASES = [
    (Rows(), (3, 5, 7)),
    (RowBlocks(6, 1), (17, 9)),
    (RowBlocks(12, 2), (2, 7, 9)),
    (KeyPages(), (3, 32, 2, 5)),
    (ValuePages(), (3, 32, 2, 5)),
    (Columns(), (33, 17)), (Columns(), (128, 3)), (Columns(8), (1, 1)),
    *[(Panels(columns, interleave, parts), shape)
      for columns in (16, 32) for interleave in (1, 2, 4)
      for parts, shape in ((1, (1, 1)), (1, (33, 17)), (1, (64, 48)), (2, (34, 6)),
                           (2, (17, 64)))],
]


def values(shape, dtype) -> np.ndarray:
    count = int(np.prod(shape))
    return (np.arange(count) % 120 + 1).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("layout, shape", CASES, ids=lambda value: str(value))
def test_pack_follows_the_addresses(layout, shape, dtype):
    array = values(shape, dtype)
    flat = pack(array, layout, threads=2)
    assert flat.size == layout.elements(shape)
    assert (unpack(flat, layout, shape) == array).all()
    assert np.count_nonzero(flat) == array.size  # the rest is padding


@pytest.mark.parametrize("layout, shape", CASES, ids=lambda value: str(value))
def test_addresses_are_unique_and_inside(layout, shape):
    index = np.indices(shape, sparse=True)
    addresses = np.broadcast_to(layout.address(shape, index), shape).ravel()
    assert len(set(addresses.tolist())) == addresses.size
    assert addresses.min() >= 0 and addresses.max() < layout.elements(shape)


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("shape", [(64, 48), (66, 35), (33, 16)])
def test_a_transposed_matrix_packs_like_its_copy(interleave, shape):
    dtype = {1: np.float32, 2: ml_dtypes.bfloat16, 4: np.int8}[interleave]
    transposed = values(shape[::-1], dtype).T
    layout = Panels(16, interleave)
    expected = pack(np.ascontiguousarray(transposed), layout)
    assert (pack(transposed, layout) == expected).all()


@pytest.mark.parametrize("layout, shape", CASES, ids=lambda value: str(value))
def test_text_form(layout, shape):
    assert parse_layout(format_layout(layout)) == layout


PACKED = {"i4": ml_dtypes.int4, "u4": ml_dtypes.uint4, "i2": ml_dtypes.int2, "u2": ml_dtypes.uint2}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("layout, shape", [
    (Rows(), (3, 5)), (Rows(), (1, 8)), (Panels(16, 8, 1), (33, 17)), (Panels(16, 8, 2), (17, 26)),
    (Panels(32, 16, 1), (40, 40))])
def test_elements_of_less_than_a_byte_share_bytes(name, layout, shape):
    own, array = dtype(name), np.random.default_rng(0).integers(0, 16, shape).astype(PACKED[name])
    joined = pack(array, layout, threads=2)
    assert joined.dtype == np.uint8
    assert joined.size == -(-layout.elements(shape) * own.bits // 8)
    into = np.full_like(joined, 255)
    assert pack(array, layout, out=into) is into and (into == joined).all()
    assert (unpack(split_bits(joined, own), layout, shape) == array).all()
    numbers = split_bits(joined, own).astype(np.int32)
    assert np.count_nonzero(numbers) == np.count_nonzero(array.astype(np.int32))


def test_the_codes_of_a_column_lie_in_one_lane_from_its_low_bits_on():
    array = np.arange(8, dtype=np.uint8).astype(ml_dtypes.uint4)[:, None]
    lanes = pack(np.repeat(array, 4, 1), Panels(4, 8)).view(np.uint32)
    assert lanes.tolist() == [0x76543210] * 4


@pytest.mark.parametrize(("rows", "each"), [
    (0, 1), (1, 1), (6, 6), (7, 4), (8, 4), (9, 5), (12, 6), (13, 5), (31, 6), (128, 6)])
def test_rows_are_dealt_out_evenly_to_as_few_blocks_as_will_do(rows, each):
    layout = RowBlocks(6)
    assert layout.rows_of_block((rows, 9)) == each
    assert -(-rows // each) == -(-rows // 6)
    assert layout.rows_of_block((1, rows, 9)) == each


@pytest.mark.parametrize("name", ["i4", "u4"])
@pytest.mark.parametrize("k, n, parts", [(8, 1, 1), (64, 33, 1), (40, 64, 2), (2048, 70, 1)])
def test_codes_that_lie_side_by_side_are_packed_alike(name, k, n, parts):
    """Checkpoints hold [n, k]: their codes are joined before they are packed."""
    codes = np.random.default_rng(k).integers(-8 if name == "i4" else 0, 8, (n, k + 8))
    stored = codes.astype(np.int8).view(PACKED[name])[:, :k]
    layout = Panels(16, 8, parts)
    slow = pack(np.ascontiguousarray(stored.T), layout)
    assert (pack(stored.T, layout, threads=2) == slow).all()
