"""`quantize`: a matrix as codes, scales and zeros, chosen so that the error is small.

Without second moments the error of elements (`rounding.py`); with those of what the matrix is
multiplied by, the error of products (`product_rounding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.ir.dims import ceildiv
from llmc.ir.graph import Node, TensorType, Type
from llmc.ir.ops_core import (
    Array,
    Attribute,
    Attributes,
    Bodies,
    Context,
    Inputs,
    Op,
    element_type,
    integer,
    reject,
    require_float,
    require_rank,
    require_same_dim,
)
from llmc.ir.product_rounding import parts, prepare, quantize_with_moments, round_part
from llmc.ir.rounding import FACTORS, SCALES, ZEROS, CodeRange, quantize_groups


def _infer_quantize(inputs: Inputs, attributes: Attributes, bodies: Bodies) -> Type:
    """matrix[n, k], moments[parts, width, width]? -> codes[n, k], scales[n, ceil(k / group)] and,
    of unsigned codes, zeros like the scales."""
    require_float("quantize", inputs, 0)
    require_rank("quantize", inputs, 0, 2)
    dtype, group = attributes["dtype"], attributes["group"]
    if not dtype.is_integer or dtype.bits not in FACTORS or group < 1:
        reject("quantize", f"no codes of {dtype} in groups of {group}", inputs)
    n, k = inputs[0].shape
    if len(inputs) == 2:
        require_float("quantize", inputs, 1)
        require_rank("quantize", inputs, 1, 3)
        if not isinstance(k, int):
            reject("quantize", "moments are of a matrix of known width", inputs)
        count, width = parts(k)
        for size, wanted in zip(inputs[1].shape, (count, width, width), strict=True):
            require_same_dim("quantize", inputs, "moments", size, wanted)
    scales = (n, ceildiv(k, group))
    results = (TensorType(dtype, (n, k)), TensorType(SCALES, scales))
    return (*results, TensorType(ZEROS, scales)) if CodeRange.of(dtype).zeros else results


def _quantize(node: Node, arrays: Sequence[Array], context: Context) -> tuple[Array, ...]:
    matrix = np.asarray(arrays[0]).astype(np.float32)
    dtype, group = node["dtype"], node["group"]
    if len(arrays) == 2:
        codes, scales, zeros = quantize_with_moments(
            matrix, prepare(np.asarray(arrays[1]), matrix.shape[1]), dtype, group, round_part)
    else:
        codes, scales, zeros = quantize_groups(matrix, dtype, group)
    results = (codes.astype(dtype.numpy), scales, zeros)
    return results if CodeRange.of(dtype).zeros else results[:2]


TABLE = [
    Op("quantize", _infer_quantize, _quantize, arity=(1, 2),
       attributes={"dtype": Attribute(element_type), "group": Attribute(integer)}),
]
