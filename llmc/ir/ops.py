"""The closed table of ops: `OPS`, and `make`, which builds every node.

Each op has its type rule, NumPy reference and (composites) decomposition in one place, the file of
its group: ops_leaves, ops_structure, ops_elementwise, ops_movement, ops_reduce, ops_matmul,
ops_attention, ops_experts, ops_recurrent, ops_quantize.
"""

from __future__ import annotations

from llmc.ir import (
    ops_attention,
    ops_elementwise,
    ops_experts,
    ops_leaves,
    ops_matmul,
    ops_movement,
    ops_quantize,
    ops_recurrent,
    ops_reduce,
    ops_structure,
)
from llmc.ir.ops_attention import PAGE
from llmc.ir.ops_core import OPS, Context, Op, broadcast_shape, make, promote, same_dim, same_shape
from llmc.ir.ops_elementwise import BINARY, ELEMENTWISE, UNARY, cast
from llmc.ir.ops_leaves import CONSTANT_BYTES, constant, constant_value
from llmc.ir.ops_recurrent import RECURRENT, SLOT_OPS, updated_state

for _group in (
    ops_leaves,
    ops_structure,
    ops_elementwise,
    ops_movement,
    ops_reduce,
    ops_matmul,
    ops_attention,
    ops_experts,
    ops_recurrent,
    ops_quantize,
):
    OPS.update((op.name, op) for op in _group.TABLE)

LEAVES = frozenset(op.name for op in ops_leaves.TABLE)

__all__ = [
    "BINARY",
    "CONSTANT_BYTES",
    "ELEMENTWISE",
    "LEAVES",
    "OPS",
    "PAGE",
    "RECURRENT",
    "SLOT_OPS",
    "UNARY",
    "Context",
    "Op",
    "broadcast_shape",
    "cast",
    "constant",
    "constant_value",
    "make",
    "promote",
    "same_dim",
    "same_shape",
    "updated_state",
]
