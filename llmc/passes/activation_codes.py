"""Activations as int8 codes: an option for products by quantised matrices.

`code_activations` sets it, on a graph of any stage before `split_prelude`; on a target without such
a kernel, or where the matrix is not one that the kernel reads, other ops do the same arithmetic.
"""

from __future__ import annotations

from llmc.ir.activation_codes import without_codes
from llmc.ir.dtypes import f64
from llmc.ir.graph import Graph, Node
from llmc.ir.ops import make
from llmc.ir.program import Capabilities
from llmc.ir.quantized import LARGEST_BLOCK, LEAST_BLOCK, quantized, takes_codes
from llmc.passes.rewrite import Rule, rewrite, rule


def code_activations(graph: Graph) -> Graph:
    """The graph whose products by quantised matrices round their left operands to int8 codes, in
    blocks as long as the matrix's groups, or that divide these and are not longer than 128."""
    return rewrite(graph, [_code_activations])


@rule("matmul")
def _code_activations(node: Node) -> Node | None:
    """x @ dequantize(codes) -> the same with activation_block"""
    left, right = node.inputs
    found, k = quantized(right), left.shape[-1]
    if found is None or node["activation_block"] or left.dtype is f64 or not isinstance(k, int):
        return None
    group = k if found.group >= k else found.group
    block = group if group <= LARGEST_BLOCK else next(
        (size for size in (128, 96, 64, 48, 32, 16)
         if found.group >= k or group % size == 0), 0)
    if not block or (block % LEAST_BLOCK and block != k):
        return None
    return make("matmul", left, right, dtype=node.dtype, activation_block=block)


def expand_activation_codes(graph: Graph, capabilities: Capabilities) -> Graph:
    """The graph in which only products that the target's kernel takes have coded activations."""
    def expand(node: Node) -> Node | None:
        if not node["activation_block"] or takes_codes(node, capabilities):
            return None
        return without_codes(node)

    return rewrite(graph, [Rule("expand_activation_codes", ("matmul",), expand)])
