"""Elementwise operators where they are hard: at signed zeros, tiny, huge and infinite arguments,
and NaN; against NumPy in f64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import helper

from llmc import onnx_backend

# operator: (its function, the largest error in units in the last place)
FUNCTIONS = {
    "Abs": (np.abs, 0), "Ceil": (np.ceil, 0), "Floor": (np.floor, 0), "Round": (np.rint, 0),
    "Neg": (np.negative, 0), "Sqrt": (np.sqrt, 0.5), "Reciprocal": (lambda x: 1 / x, 0.5),
    "Exp": (np.exp, 1), "Log": (np.log, 1), "Tanh": (np.tanh, 3),
    "Sin": (np.sin, 2), "Cos": (np.cos, 2), "Tan": (np.tan, 4),
    "Sinh": (np.sinh, 4), "Cosh": (np.cosh, 4), "Asinh": (np.arcsinh, 4),
    "Acosh": (np.arccosh, 4), "Atanh": (np.arctanh, 4),
    "Asin": (np.arcsin, 4), "Acos": (np.arccos, 4), "Atan": (np.arctan, 4),
    "Softsign": (lambda x: x / (1 + np.abs(x)), 1),
    "Elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), 4),
}
SIZES = (0.0, 1e-30, 1e-10, 1e-5, 1e-3, 0.1, 0.5, 0.9999, 1.0, 1.0001, 2.5, math.pi, 10, 20, 88.7,
         89, 104, 709, 710, 1e4, 1e7, 1e10, 1e15, 1e20, 1e30, 1e300, math.inf)


def arguments(dtype):
    limits = np.finfo(dtype)
    sizes = np.array([*SIZES, limits.tiny, limits.max])
    with np.errstate(over="ignore"):
        return np.concatenate([sizes, -sizes, [np.nan]]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_special_values(op, dtype):
    function, bound = FUNCTIONS[op]
    x = arguments(dtype)
    [got] = onnx_backend.run_node(helper.make_node(op, ["x"], ["y"]), [x], opset_version=22)
    with np.errstate(all="ignore"):
        wide = np.asarray(function(x.astype(np.float64)))
        expected = wide.astype(dtype)
        steps = np.abs(got.astype(np.float64) - wide) / np.spacing(np.abs(expected))
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    wrong = ~same & ~(steps <= bound)
    if op != "Elu":
        wrong |= (got == 0) & (np.signbit(got) != np.signbit(expected))
    assert not wrong.any(), [(a, b, c) for a, b, c in zip(
        x[wrong], got[wrong], expected[wrong], strict=True)]
