"""Dense batches to packed rows and back."""

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.runtime.padding import pad, read_dense

IDS = np.array([[0, 0, 5, 6], [7, 8, 9, 0]])
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])


def test_rows_lose_their_padding_on_either_side():
    batch = read_dense({"input_ids": IDS, "attention_mask": MASK})
    assert [row.tolist() for row in batch.rows("ids")] == [[5, 6], [7, 8, 9]]
    assert [t.tolist() for t in batch.rows("types")] == [[0, 0], [0, 0, 0]]
    dense = pad([np.ones((2, 3)), np.full((3, 3), 2.0)], batch.mask)
    assert dense.shape == (2, 4, 3)
    assert (dense[0, :2] == 0).all() and (dense[0, 2:] == 1).all() and (dense[1, 3] == 0).all()


@pytest.mark.parametrize("arrays, message", [
    ({"attention_mask": MASK}, "input_ids at least"),
    ({"input_ids": IDS, "colour": IDS}, "colour"),
    ({"input_ids": IDS[0]}, r"\[batch, length\]"),
    ({"input_ids": IDS, "attention_mask": MASK[:, :3]}, "shape"),
    ({"input_ids": IDS, "attention_mask": np.array([[1, 0, 1, 1], [1, 1, 1, 1]])}, "one run"),
    ({"input_ids": IDS, "attention_mask": MASK, "position_ids": IDS}, "position_ids"),
])
def test_what_does_not_fit_is_refused(arrays, message):
    with pytest.raises(ShapeError, match=message):
        read_dense(arrays).require_counted_positions()


def test_positions_that_count_the_tokens_are_fine():
    positions = np.array([[9, 9, 0, 1], [0, 1, 2, 9]])
    batch = read_dense({"input_ids": IDS, "attention_mask": MASK, "position_ids": positions})
    batch.require_counted_positions()
