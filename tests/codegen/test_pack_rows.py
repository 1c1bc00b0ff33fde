"""Rows copied into row blocks, several words of several rows at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc.codegen.host.pack_rows import PackRows
from llmc.ir.dims import symbol
from llmc.ir.dtypes import bf16, f8e5m2, f32
from llmc.ir.layouts import RowBlocks
from llmc.ir.ops import make
from tests.codegen.harness import Runner, leaf, random, stage_program

TOKENS = symbol("tokens", 0, 1000)
KEY = [("tokens", 0, 1000)]
INTERLEAVE = {"f32": 1, "bf16": 2, "u8": 4, "i32": 1}


def program_of(dtype_name, shape, rows, lanes, value=lambda x: x):
    x = leaf("x", dtype_name, *shape)
    layout = RowBlocks(rows, INTERLEAVE[dtype_name])
    program = stage_program("map", {"rows": value(x)}, KEY, {"rows": layout})
    return replace(program, capabilities=replace(program.capabilities, vector_lanes=lanes)), x


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(("dtype_name", "rows"), [("f32", 6), ("f32", 12), ("bf16", 12),
                                                  ("u8", 6), ("bf16", 1)])
def test_every_row_is_where_the_layout_says(dtype_name, rows, lanes):
    for words in (1, 17, 600):
        width = words * INTERLEAVE[dtype_name]
        program, x = program_of(dtype_name, (TOKENS, width), rows, lanes)
        assert PackRows.of(next(program.stages()), program) is not None
        runner = Runner(program, 3)
        rng = np.random.default_rng(0)
        for tokens in (0, 1, 3, 6, 13, 33):
            array = random(rng, x, {"tokens": tokens})
            got = runner.run({"x": array}, {"tokens": tokens})["rows"]
            np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype_name", ["f16", "bf16"])
def test_short_floats_are_widened(dtype_name, lanes):
    for width in (1, 17, 600):
        x = leaf("x", dtype_name, TOKENS, width)
        program = stage_program("map", {"rows": make("cast", x, dtype=f32)}, KEY,
                                {"rows": RowBlocks(6, 1)})
        program = replace(program, capabilities=replace(program.capabilities, vector_lanes=lanes))
        assert PackRows.of(next(program.stages()), program) is not None
        runner = Runner(program, 3)
        for tokens in (0, 1, 6, 13):
            array = random(np.random.default_rng(0), x, {"tokens": tokens})
            got = runner.run({"x": array}, {"tokens": tokens})["rows"]
            np.testing.assert_array_equal(got, array.astype(np.float32))


def test_axes_in_front_are_rows():
    program, x = program_of("f32", (TOKENS, 3, 40), 6, 8, lambda x: make(
        "reshape", x, shape=(TOKENS, 3, 40)))
    assert PackRows.of(next(program.stages()), program) is not None
    array = random(np.random.default_rng(1), x, {"tokens": 7})
    got = Runner(program, 2).run({"x": array}, {"tokens": 7})["rows"]
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(("dtype_name", "width", "value"), [
    ("bf16", 33, lambda x: x), ("f32", 32, lambda x: make("neg", x)),
    ("i32", 32, lambda x: make("cast", x, dtype=f32)),
    ("f32", 32, lambda x: make("cast", make("cast", x, dtype=bf16), dtype=f32)),
    ("bf16", 32, lambda x: make("cast", make("cast", x, dtype=f8e5m2), dtype=f32)),
    ("f32", 32, lambda x: make("transpose", make("transpose", x, permutation=(1, 0)),
                               permutation=(1, 0)))])
def test_all_else_is_left_to_maps(dtype_name, width, value):
    program, _ = program_of(dtype_name, (TOKENS, width), 6, 8, value)
    assert PackRows.of(next(program.stages()), program) is None
