"""Activations as int8 codes: what a matmul with `activation_block` does to its left operand.

For each row and `block` consecutive k (the last block may be shorter): scale = max |x| / 127 (as a
product with 1 / 127 in f32), code = x * (1 / scale) rounded half to even, and x becomes code *
scale. Codes are -127 to 127, so that they can be negated. A block that holds an infinity or NaN
becomes NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.ir import dtypes
from llmc.ir.dims import ceildiv
from llmc.ir.graph import Node
from llmc.ir.ops_core import make
from llmc.ir.ops_leaves import constant

LARGEST_CODE = 127
PER_CODE = np.float32(1) / np.float32(LARGEST_CODE)
LEAST_SCALE = 2.0**-100  # a block below is zeros: one over its scale might overflow


def coded(x: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """x[.., k] of f32 (or f64) rounded to codes, in the same dtype."""
    k, wide = x.shape[-1], x.dtype.type
    blocks = -(-k // block)
    padded = np.zeros((*x.shape[:-1], blocks * block), x.dtype)
    padded[..., :k] = x
    parts = padded.reshape(*x.shape[:-1], blocks, block)
    with np.errstate(all="ignore"):
        scales = np.abs(parts).max(-1, keepdims=True, initial=0) * wide(PER_CODE)
        inverse = np.where(scales >= LEAST_SCALE, wide(1) / scales, wide(0))
        values = np.where(np.isfinite(scales), np.rint(parts * inverse) * scales, wide(np.nan))
    return values.reshape(padded.shape)[..., :k]


def without_codes(matmul: Node) -> Node:
    """The matmul without `activation_block`: other ops round its left operand."""
    left, right = matmul.inputs
    block, k, leading = matmul["activation_block"], left.shape[-1], left.shape[:-1]
    blocks, axes = ceildiv(k, block), left.rank
    wide = left if left.dtype.bits >= 32 else make("cast", left, dtype=dtypes.f32)
    zero = constant(0, wide.dtype)
    padded = make("pad", wide, zero, low=(0,) * axes,
                  high=(*(0,) * (axes - 1), blocks * block - k))
    parts = make("reshape", padded, shape=(*leading, blocks, block))
    largest = make("reduce_max", make("abs", parts), axes=(axes,), keep=True)
    scales = make("mul", largest, constant(float(PER_CODE), wide.dtype))
    fits = make("greater_equal", scales, constant(LEAST_SCALE, wide.dtype))
    inverse = make("where", fits, make("reciprocal", scales), zero)
    values = make("mul", make("round", make("mul", parts, inverse)), scales)
    flat = make("reshape", values, shape=padded.shape)
    rounded = make("slice", flat, starts=(0,) * axes, stops=left.shape, steps=(1,) * axes)
    return make("matmul", rounded, right, dtype=matmul.dtype)
