"""Quantised matrices: the expressions by which a matmul reads a weight as codes, scales and zeros.

Checkpoints hold codes[n, k] with scales and zeros[n, k / group], which is what `dequantize` takes:
`transpose(dequantize(codes, scales, zeros))` is the matrix[k, n] that a matmul multiplies by.
Packed weights are [k, n] like all others, so there the operands are transposed once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.dtypes import DType, f64
from llmc.ir.graph import Node
from llmc.ir.layouts import CodedRows
from llmc.ir.ops import make
from llmc.ir.program import Capabilities

SWAP = (1, 0)
LARGEST_BLOCK = 128  # of activations: more k to a scale would cost too much precision
LEAST_BLOCK = 16
FLOAT_START_VALUE = 1.5 * 2.0**23
FLOAT_START = 0x4B400000  # its bits as f32: integers that are added to them are added to it


@dataclass(frozen=True)
class Quantized:
    """matrix[k, n] = (codes[n, k] - zeros) * scales, one scale and zero[n, k / group] for `group`
    consecutive k. dtype is the matrix's; without zeros they are 0."""

    codes: Node
    scales: Node
    zeros: Node | None
    group: int
    dtype: DType

    @property
    def operands(self) -> tuple[Node, ...]:
        """Codes, scales and, where there are any, zeros."""
        return tuple(each for each in (self.codes, self.scales, self.zeros) if each is not None)

    def matrix(self) -> Node:
        """The expression that `quantized` recognises."""
        return make("transpose", make("dequantize", *self.operands, group=self.group,
                                      dtype=self.dtype), permutation=SWAP)

    def with_operands(self, operands: Sequence[Node]) -> Quantized:
        """The same with other codes, scales and zeros."""
        codes, scales, *zeros = operands
        return Quantized(codes, scales, zeros[0] if zeros else None, self.group, self.dtype)


def quantized(matrix: Node) -> Quantized | None:
    """What a matmul's right operand is dequantised from; None if it is no such expression."""
    if matrix.op != "transpose" or matrix["permutation"] != SWAP:
        return None
    (source,) = matrix.inputs
    if source.op != "dequantize":
        return None
    whole = Quantized(source.inputs[0], source.inputs[1], None, source["group"], source.dtype)
    return whole.with_operands(source.inputs)


def stored(operand: Node) -> Node | None:
    """What an operand of a matrix that is read from packed weights is the transpose of."""
    if operand.op == "transpose" and operand["permutation"] == SWAP:
        return operand.inputs[0]
    return None


def stored_operands(matrix: Node) -> tuple[Node, ...]:
    """Packed codes[k, n], scales and zeros[k / group, n] that a matmul's right operand is read
    from; the operand itself if it is not quantised."""
    found = quantized(matrix)
    sources = tuple(map(stored, found.operands)) if found is not None else ()
    return tuple(each for each in sources if each is not None) or (matrix,)


def takes_codes(matmul: Node, capabilities: Capabilities) -> bool:
    """Whether the target's kernel multiplies codes of activations by this matmul's weight."""
    left, right = matmul.inputs
    found, block = quantized(right), matmul["activation_block"]
    if not capabilities.byte_dot or found is None or left.dtype is f64:
        return False
    k = left.shape[-1]
    if not all(each.op == "parameter" for each in stored_operands(right)):
        return False
    return (found.codes.dtype.bits <= 8 and block <= LARGEST_BLOCK
            and (block % LEAST_BLOCK == 0 or block == k)
            and (found.group % block == 0 or found.group >= k))


def coded_rows(matmul: Node, capabilities: Capabilities, rows: int) -> CodedRows:
    """How the left operand of a matmul that takes codes lies, in blocks of `rows` rows.

    Where scales are so short that 1.5 * 2**23 times a scale is exact, integers start from
    FLOAT_START, and are floats without a conversion.
    """
    found = quantized(matmul.inputs[1])
    assert found is not None
    codes = found.codes.dtype
    exact = found.zeros is None and found.scales.dtype.bits == 16
    return CodedRows(rows, matmul["activation_block"], codes.bits,
                     capabilities.code_offset(codes), int(found.zeros is not None),
                     FLOAT_START if exact else 0)
