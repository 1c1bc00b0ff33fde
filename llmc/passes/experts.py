"""Mixtures of experts as products of the chosen experts only, for targets that have them.

With T tokens, C experts chosen for each and rows r = t * C + c:

    order, place, starts = group_rows(numbers)            rows sorted by expert
    both = grouped_matmul(x[order / C], gates | ups)      [T * C, 2 I]
    out  = grouped_matmul(activation(gate) * up, downs)   [T * C, H]
    y[t] = sum over c of scores[t, c] * out[place[t * C + c]]
"""

from __future__ import annotations

import numpy as np

from llmc.ir.dims import evaluate
from llmc.ir.dtypes import f32, i32
from llmc.ir.graph import Node
from llmc.ir.ops import cast, constant, make
from llmc.ir.ops_experts import activation
from llmc.ir.program import GROUPED_MATMUL, Capabilities
from llmc.passes.rewrite import Rule


def expand_experts(capabilities: Capabilities) -> Rule:
    """The rule that expands `routed_experts` where the target's kernel takes its matrices."""

    def expand(node: Node) -> Node | None:
        inner, columns = node.inputs[3].shape[0] // node["experts"], capabilities.panel_columns
        hidden = node.inputs[0].shape[1]
        if GROUPED_MATMUL not in capabilities.kernels or node.dtype.bits == 64 \
                or inner % max(1, columns // 2) or hidden % columns:
            return None
        return _chosen_only(node)

    return Rule("expand_experts", ("routed_experts",), expand)


def _chosen_only(node: Node) -> Node:
    x, numbers, scores, gates, ups, downs = node.inputs
    (tokens, chosen), experts = numbers.shape, node["experts"]
    flat = make("reshape", numbers, shape=(tokens * chosen,))
    groups = make("group_rows", flat, groups=experts)
    order, place, starts = (make("get", groups, index=number) for number in range(3))
    token = make("floor_div", order, constant(np.int32(evaluate(chosen, {})), i32))
    rows = make("gather", x, token, axis=0)
    wide = make("concat", _turned(gates), _turned(ups), axis=1)
    both = make("grouped_matmul", rows, wide, starts, groups=experts, parts=2)
    inner = both.shape[1] // 2
    gate, up = (make("slice", both, starts=(0, first), stops=(both.shape[0], first + inner),
                     steps=(1, 1)) for first in (0, inner))
    product = make("mul", activation(node["activation"], gate), up)
    out = make("grouped_matmul", product, _turned(downs), starts, groups=experts)
    return _mixed(node, out, make("reshape", place, shape=(tokens, chosen)), scores)


def _turned(matrix: Node) -> Node:
    return make("transpose", matrix, permutation=(1, 0))


def _mixed(node: Node, out: Node, places: Node, scores: Node) -> Node:
    """The weighted sum of each token's rows, in f32, rounded once."""
    tokens, chosen = places.shape[0], evaluate(places.shape[1], {})
    total: Node | None = None
    for rank in range(chosen):
        place, score = (make("slice", each, starts=(0, rank), stops=(tokens, rank + 1),
                             steps=(1, 1)) for each in (places, scores))
        row = make("gather", out, make("reshape", place, shape=(tokens,)), axis=0)
        part = make("mul", cast(row, f32), cast(score, f32))
        total = part if total is None else make("add", total, part)
    assert total is not None
    return cast(total, node.dtype)
