"""Steps on nobody's behalf: of the shape that was asked for, and without a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime.pages import PAGE
from llmc.runtime.rehearsal import make_step


@pytest.mark.parametrize(("tokens", "count", "rows"), [
    (1, 1, 1), (8, 1, 1), (8, 1, 8), (8, 8, 8), (17, 3, 3), (33, 4, 2), (5, 2, 0)])
def test_a_step_has_the_shape_that_was_asked_for(tokens, count, rows):
    arrays = make_step({"tokens": tokens, "sequences": count, "rows": rows}, 7, 512)
    assert arrays is not None
    assert all(array.dtype == np.int32 for array in arrays.values())
    assert arrays["ids"].shape == arrays["positions"].shape == arrays["sequence"].shape == (
        tokens,)
    assert arrays["rows"].shape == (rows,) and len(set(arrays["rows"])) == rows
    assert (np.diff(arrays["offsets"]) >= 1).all() and arrays["offsets"][-1] == tokens
    assert (arrays["page_table"] == 7).all() and len(arrays["page_table"]) == count
    assert arrays["positions"].max() < arrays["page_table"].shape[1] * PAGE
    if rows == count:
        np.testing.assert_array_equal(arrays["rows"], arrays["offsets"][1:] - 1)


@pytest.mark.parametrize(("tokens", "count", "rows"), [(2, 3, 1), (2, 1, 3), (2, 0, 1),
                                                       (600, 1, 1)])
def test_what_is_no_step_is_none(tokens, count, rows):
    assert make_step({"tokens": tokens, "sequences": count, "rows": rows}, 7, 512) is None


def test_sequences_do_not_notice(embedded_artifact: Path, tmp_path: Path):
    prompt = [1, 403, 407, 261]
    with llmc.Runtime(embedded_artifact, threads=2, cache_dir=tmp_path) as runtime:
        expected = runtime.run(prompt)
        tokens = runtime.generate(prompt, 12)
        first = [next(tokens) for _ in range(4)]
        for number, count in ((8, 1), (4, 4)):
            assert runtime._rehearse({"tokens": number, "sequences": count, "rows": count})
        assert {seen.shape["tokens"] for seen in runtime.shapes()} == {1, 4}
        assert first + list(tokens) == list(runtime.generate(prompt, 12))
        np.testing.assert_array_equal(runtime.run(prompt), expected)
        assert not runtime._rehearse({"tokens": 2, "sequences": 3, "rows": 1})
