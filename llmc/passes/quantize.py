"""quantize: the matrices of parameters that matmuls multiply by become codes and scales.

    x @ w  ->  x @ transpose(dequantize(codes, scales)), (codes, scales) = quantize(transpose(w))

which is the form that quantised checkpoints have too (`ir/quantized.py`). An embedding that is tied
to a quantised head is read from the head's codes: there is one copy. Runs before layers become
loops, while every weight still has a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from llmc.ir.dims import evaluate
from llmc.ir.dtypes import f32, f64
from llmc.ir.graph import Graph, Node, TensorType, map_graph, walk
from llmc.ir.ops import ELEMENTWISE, make
from llmc.ir.product_rounding import parts as parts_of
from llmc.ir.program import QUANTIZED_MATMUL, Capabilities
from llmc.ir.quantization import Quantization
from llmc.ir.quantized import SWAP, Quantized, quantized, stored
from llmc.ir.rounding import CodeRange
from llmc.passes.match import VIEWS, without_cast
from llmc.passes.names import result_name
from llmc.passes.prelude import weight_expressions

LEAST_COLUMNS = 32  # fewer save next to nothing; and routers of experts choose by small differences


@dataclass(frozen=True)
class Candidate:
    """A product by a matrix of parameters: what to make of it, or why not (`reason`).

    name: of the parameters that the matrix is made of. matrix: [n, k] as it is stored.
    """

    product: Node
    name: str
    matrix: Node
    options: Quantization | None
    reason: str = ""


def candidates(graph: Graph, options: Quantization, has_head: bool) -> list[Candidate]:
    """Every product by parameters, in order; has_head: the last one makes logits."""
    weights = weight_expressions(graph)
    heads = set(_heads(graph)) if has_head else set()
    return [each for node in graph.nodes() if node.op in _MATRICES and node not in weights
            for each in _of_node(node, weights, options, node in heads)]


_MATRICES = {"matmul": (1,), "routed_experts": (3, 4, 5)}


def _of_node(node: Node, weights: set[Node], options: Quantization,
             is_head: bool) -> Iterator[Candidate]:
    for place in _MATRICES[node.op]:
        right = node.inputs[place]
        if right not in weights:
            continue
        names = [leaf["name"] for leaf in walk([right]) if leaf.op == "parameter"]
        name = result_name(list(islice(dict.fromkeys(names), 3)))
        chosen = options.of_head() if is_head else options
        reason = _reason(node, right) or ("" if chosen else "it makes logits: see the option head")
        matrix = right if reason else _stored(right)
        yield Candidate(node, name, matrix, None if reason else chosen, reason)


def _reason(node: Node, right: Node) -> str:
    """Why a matrix must stay as it is; "" if it need not."""
    if node.op == "routed_experts":
        return "the matrices of experts are multiplied as floats"
    if quantized(right) is not None or any(
            leaf.op == "parameter" and not leaf.dtype.is_float for leaf in walk([right])):
        return "it is quantised already"
    if not right.dtype.is_float or right.dtype is f64:
        return f"it is {right.dtype}"
    if right.rank != 2:
        return f"it has {right.rank} axes"
    if right.shape[1] < LEAST_COLUMNS:
        return f"it has fewer than {LEAST_COLUMNS} columns"
    return ""


def _stored(right: Node) -> Node:
    """[n, k], in the dtype of the file where casts came between."""
    matrix = stored(right) or make("transpose", right, permutation=SWAP)
    return without_cast(matrix)


def _heads(graph: Graph) -> Iterator[Node]:
    """The products that outputs are made of elementwise: those that make logits."""
    pending, seen = [node for _, node in graph.outputs], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "matmul":
            yield node
        elif node.op in ELEMENTWISE | VIEWS and isinstance(node.type, TensorType):
            pending += node.inputs


# ---- the rewrite -------------------------------------------------------------------------------


def quantize(graph: Graph, chosen: Sequence[Candidate], capabilities: Capabilities,
             moments: Mapping[str, str] | None = None) -> Graph:
    """The graph with the candidates' weights quantised. moments: name of a weight -> parameter that
    holds the second moments of what it is multiplied by."""
    keeps_codes = QUANTIZED_MATMUL in capabilities.kernels
    wholes: dict[Node, Quantized] = {}  # of the matrices [n, k]
    rights: dict[Node, Node] = {}
    for each in chosen:
        if each.options is not None:
            right = each.product.inputs[1]
            whole = wholes.setdefault(each.matrix,
                                      _quantized(each, (moments or {}).get(each.name)))
            rights.setdefault(right, replace(whole, dtype=right.dtype).matrix())

    def quantized_user(node: Node) -> Node | None:
        if node.op == "matmul" and node.inputs[1] in rights:
            return make("matmul", node.inputs[0], rights[node.inputs[1]], dtype=node.dtype)
        if node.op == "gather" and node["axis"] == 0:
            whole = wholes.get(without_cast(node.inputs[0]))
            return _gathered(node, whole, keeps_codes) if whole is not None else None
        return None

    return map_graph(graph, quantized_user)


def _quantized(candidate: Candidate, moments: str | None) -> Quantized:
    assert candidate.options is not None
    matrix, options = candidate.matrix, candidate.options
    operands = [matrix]
    if moments is not None and options.weights == "int4":
        count, width = parts_of(evaluate(matrix.shape[1], {}))
        operands.append(make("parameter", name=moments,
                             type=TensorType(f32, (count, width, width))))
    whole = make("quantize", *operands, dtype=options.codes, group=options.group)
    parts = [make("get", whole, index=index)
             for index in range(3 if CodeRange.of(options.codes).zeros else 2)]
    return Quantized(parts[0], parts[1], parts[2] if parts[2:] else None, options.group,
                     matrix.dtype)


def _gathered(node: Node, whole: Quantized, keeps_codes: bool) -> Node:
    """Rows of the matrix, dequantised after they were picked; where products take no codes, picked
    from the floats that they take."""
    table, index = node.inputs
    if not keeps_codes:
        floats = make("dequantize", *whole.operands, group=whole.group, dtype=table.dtype)
        return make("gather", floats, index, axis=0)
    rows = [make("gather", each, index, axis=0) for each in whole.operands]
    return make("dequantize", *rows, group=whole.group, dtype=table.dtype)
