"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import MICROSOFT, Result, converter
from llmc.ir import dims
from llmc.ir.dims import Dim
from llmc.ir.graph import Node


@converter("MatMul", inputs=2)
def matmul(call: Call) -> Result:
    return call.matmul(call.input(0), call.input(1))


@converter("FusedMatMul", inputs=2, domain=MICROSOFT)
def fused_matmul(call: Call) -> Node:
    a, b = (batch_moved(call, call.input(index), side) for index, side in enumerate("AB"))
    return scaled_matmul(call, a, b, call.attribute("alpha", 1.0))


def batch_moved(call: Call, x: Node, side: str) -> Node:
    """x with its first axis behind the batch axes, where transBatchA or B says so."""
    if not call.attribute(f"transBatch{side}", 0) or x.rank < 3:
        return x
    return call.transpose(x, [*range(1, x.rank - 1), 0, x.rank - 1])


@converter("Gemm", inputs=(2, 3))
def gemm(call: Call) -> Node:
    product = scaled_matmul(call, call.input(0), call.input(1), call.attribute("alpha", 1.0))
    bias = call.optional(2)
    if bias is None:
        return product
    beta = call.attribute("beta", 1.0)
    bias = bias if beta == 1.0 else call.scaled(bias, beta)
    if call.broadcast_shapes(product.shape, bias.shape) != product.shape:
        raise call.error("its bias is larger than the product")
    return call.binary("add", product, bias)


def scaled_matmul(call: Call, a: Node, b: Node, alpha: float) -> Node:
    """alpha * a @ b with the transA and transB attributes applied."""
    a = call.swap_last(a) if call.attribute("transA", 0) else a
    b = call.swap_last(b) if call.attribute("transB", 0) else b
    product = call.matmul(a, b)
    return product if alpha == 1.0 else call.scaled(product, alpha)


@converter("Einsum", inputs=(1, None))
def einsum(call: Call) -> Result:
    equation = str(call.required("equation")).replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(call.inputs) or "." in equation:
        raise call.error(f"equation {equation!r} is not supported")
    if not arrow:
        output = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    operands = [call.input(index) for index in range(len(terms))]
    for term, operand in zip(terms, operands, strict=True):
        if len(set(term)) != len(term) or len(term) != operand.rank:
            raise call.error(f"equation {equation!r}: term '{term}' is not supported")
    labels, result = terms[0], operands[0]
    for index in range(1, len(terms)):
        kept = set(output).union(*terms[index + 1 :])
        labels, result = contract(call, (labels, result), (terms[index], operands[index]), kept)
    return arrange(call, labels, result, output)


def contract(
    call: Call, a: tuple[str, Node], b: tuple[str, Node], kept: set[str]
) -> tuple[str, Node]:
    """Two operands to one: batch labels, labels of a, labels of b, as a batched matmul."""
    a_only = [c for c in a[0] if c not in b[0] and c in kept]
    b_only = [c for c in b[0] if c not in a[0] and c in kept]
    batch = [c for c in a[0] if c in b[0] and c in kept]
    inner = [c for c in a[0] if c in b[0] and c not in kept]
    left = arrange(call, *a, "".join(batch + a_only + inner))
    right = arrange(call, *b, "".join(batch + inner + b_only))
    sizes = dict(zip(batch + a_only + inner, left.shape, strict=True))
    others = dict(zip(batch + inner + b_only, right.shape, strict=True))
    for label in inner + batch:
        call.require_equal(sizes[label], others[label], f"axis '{label}'")
    sizes = {**others, **sizes}

    def extent(group: Sequence[str]) -> Dim:
        return dims.product(sizes[label] for label in group)

    heads = [sizes[label] for label in batch]
    left = call.reshape(left, [*heads, extent(a_only), extent(inner)])
    right = call.reshape(right, [*heads, extent(inner), extent(b_only)])
    labels = "".join(batch + a_only + b_only)
    return labels, call.reshape(call.matmul(left, right), [sizes[label] for label in labels])


def arrange(call: Call, labels: str, x: Node, wanted: str) -> Node:
    """Sums away the labels that are not wanted and orders the others."""
    if not set(wanted) <= set(labels):
        raise call.error(f"output '{wanted}' has labels that no input has")
    gone = [axis for axis, label in enumerate(labels) if label not in wanted]
    x = call.reduce("reduce_sum", x, gone, keep=False)
    left = [label for label in labels if label in wanted]
    return call.transpose(x, [left.index(label) for label in wanted])
