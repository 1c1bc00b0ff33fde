"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

import string
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
    operands = [call.input(index) for index in range(len(call.inputs))]
    terms, output = parsed_equation(call, [operand.rank for operand in operands])
    for index, term in enumerate(terms):
        terms[index], operands[index] = diagonal(call, term, operands[index])
    labels, result = terms[0], operands[0]
    for index in range(1, len(terms)):
        kept = set(output).union(*terms[index + 1 :])
        labels, result = contract(call, (labels, result), (terms[index], operands[index]), kept)
    return arrange(call, labels, result, output)


def parsed_equation(call: Call, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The labels of each operand and of the result; capital letters that the equation does not
    have stand for the axes of an ellipsis."""
    equation = str(call.required("equation")).replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise call.error(f"equation {equation!r} is for {len(terms)} operands, not {len(ranks)}")
    free = [c for c in string.ascii_letters if c not in equation]
    named = [len(term.replace("...", "")) for term in terms]
    extra = max(0, *(rank - count for rank, count in zip(ranks, named, strict=True)))
    if extra > len(free):
        raise call.error(f"equation {equation!r} has too many axes")
    hidden = "".join(free[:extra])
    if not arrow:
        labels = left.replace(",", "").replace(".", "")
        output = "".join(sorted(c for c in labels if labels.count(c) == 1))
        output = "..." + output if "..." in left else output
    for index, rank in enumerate(ranks):
        count = rank - named[index]
        terms[index] = terms[index].replace("...", hidden[len(hidden) - count :] if count else "")
        if len(terms[index]) != rank or not all(label.isalpha() for label in terms[index]):
            raise call.error(f"equation {equation!r} does not fit operand {index} of rank {rank}")
    return terms, output.replace("...", hidden)


def diagonal(call: Call, labels: str, x: Node) -> tuple[str, Node]:
    """A label that occurs twice walks along the diagonal: everything beside it is summed as 0."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first, second = labels.index(label), labels.rindex(label)
            call.require_equal(x.shape[first], x.shape[second], f"axis '{label}'")
            places = [
                call.unsqueeze(call.iota(x.shape[first]), [a for a in range(x.rank) if a != axis])
                for axis in (first, second)
            ]
            same = call.binary("equal", *places)
            x = call.where(same, x, call.scalar(0, x.dtype))
            x = call.reduce("reduce_sum", x, [second], keep=False)
            labels = labels[:second] + labels[second + 1 :]
    return labels, x


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
