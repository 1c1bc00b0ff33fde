"""fuse: every node that computes something ends in a `fusion`, anchored on one op.

| anchor | core | what joins it |
|---|---|---|
| matmul | matmul by a weight | before: norm, picked rows, elementwise; after: elementwise, parts |
| dense_matmul | matmul of two computed tensors | nothing |
| attention | attention, packed_attention, paged_attention | views of q, k and v |
| reduce | norm, softmax, reduction of the last axis | elementwise on its rows, before and after |
| map | elementwise, movement, rope, cache_append | each other, where they run over the same rows |
| scan | linear_attention, slot_linear_attention, slot_conv | before: elementwise, views |
| grouped_matmul | product of each group of rows | as matmul, without norms |
| group_rows, cumsum (and cumprod), argmax, argmin, top_k, scatter | that op | nothing |

Matmuls choose first, then reductions and attention; maps share out the rest. Views that nobody
took in (reshape, transpose, slice, broadcast of a whole buffer) stay as they are: whoever reads
them reads the buffer through them. Scalars and index ramps that depend on dims only are copied to
their readers, and so is the `dequantize` of a matmul's weight.
"""

from __future__ import annotations

from llmc.ir.dtypes import i16, i32
from llmc.ir.graph import Graph, Node
from llmc.ir.ops import ELEMENTWISE, LEAVES, RECURRENT
from llmc.ir.program import INTEGER_MATMUL, Capabilities
from llmc.ir.quantized import quantized, stored_operands
from llmc.passes.bodies import build
from llmc.passes.epilogue import absorb_epilogue
from llmc.passes.match import ATTENTION, MOVEMENT, NORMS, REDUCTIONS, VIEWS, is_last_axis
from llmc.passes.partition import Group, Partition
from llmc.passes.prelude import weight_expressions
from llmc.passes.rewrite import with_repeats

SINGLE = {"cumsum": "cumsum", "cumprod": "cumsum", "argmax": "argmax", "argmin": "argmin",
          "top_k": "top_k", "group_rows": "group_rows", "grouped_matmul": "grouped_matmul",
          "scatter_nd": "scatter", "scatter_elements": "scatter",
          **dict.fromkeys(RECURRENT, "scan")}
STRUCTURE = frozenset({"repeat", "get", "fusion"})
COSTLY = frozenset({"exp", "log", "sin", "cos", "tanh", "erf", "pow", "sigmoid", "silu", "softplus",
                    "gelu", "mod"})
CHEAP = ELEMENTWISE - COSTLY


def fuse(graph: Graph, capabilities: Capabilities) -> Graph:
    """The graph as fusions, repeats (their bodies too), `get`s, views and leaves."""
    graph = with_repeats(graph, lambda body: fuse(body, capabilities))
    weights = weight_expressions(graph)
    if INTEGER_MATMUL not in capabilities.kernels:
        weights = {node for node in weights if not node.dtype.is_integer}
    anchors = {node: anchor_of(node, weights) for node in graph.nodes() if node.op not in LEAVES}
    partition = Partition(graph, anchors, _free_nodes(graph) | _dequantized(graph))
    _join_parts_of_tuples(partition)
    for anchor in ("matmul", "grouped_matmul", "reduce"):
        for group in _anchored(partition, anchor):
            absorb_epilogue(partition, group)
    for group in _anchored(partition, "matmul"):
        _absorb_norm(partition, group)
    for anchor, ops in (("matmul", PROLOGUE), ("grouped_matmul", PROLOGUE), ("reduce", PROLOGUE),
                        ("attention", VIEWS), ("scan", VIEWS | CHEAP)):
        for group in _anchored(partition, anchor):
            _absorb_prologue(partition, group, ops)
    _merge_maps(partition)
    return build(partition)


def anchor_of(node: Node, weights: set[Node]) -> str:
    """The kind of fusion that a node is the core of; `view` and `structure` are no fusions."""
    if node.op == "matmul":
        weight = node.inputs[1]
        is_weight = weight in weights and weight.rank == 2 and _has_kernel(node)
        return "matmul" if is_weight and node.inputs[0].rank >= 1 else "dense_matmul"
    if node.op in ATTENTION:
        return "attention"
    if node.op in NORMS or (node.op in REDUCTIONS
                            and is_last_axis(node["axes"], node.inputs[0].rank)):
        return "reduce"
    if node.op in STRUCTURE:
        return "structure"
    if node.op in VIEWS - {"cast"}:
        return "view"
    return SINGLE.get(node.op, "map")


def _has_kernel(matmul: Node) -> bool:
    """Whether the kernel for weights multiplies these types: floats, or integers of up to 16 bits
    (u16 is none of i16's pairs) with sums in i32."""
    operands = [each.dtype for each in matmul.inputs]
    if operands[1].is_float:
        return True
    return matmul.dtype is i32 and all(
        each.bits == 8 or each is i16 for each in operands)


PROLOGUE = ELEMENTWISE | {"broadcast", "gather"}


def _free_nodes(graph: Graph) -> set[Node]:
    """Elementwise functions and views of constants, ramps and dims: copied to their readers."""
    free: set[Node] = set()
    for node in graph.nodes():
        if node.op in ELEMENTWISE | MOVEMENT and node.inputs and all(
                each in free or each.op in ("constant", "iota", "dim", "layer", "table")
                for each in node.inputs):
            free.add(node)
    return free - {node for _, node in graph.outputs} - {
        each for node in graph.nodes() if node.op in STRUCTURE for each in node.inputs}


def _dequantized(graph: Graph) -> set[Node]:
    """What lies between matmuls and the parameters that their quantised weights are stored as."""
    found: set[Node] = set()
    for node in graph.nodes():
        matrix = node.inputs[1] if node.op == "matmul" else None
        if matrix is not None and quantized(matrix) is not None and all(
                each.op == "parameter" for each in stored_operands(matrix)):
            found.update((matrix, matrix.inputs[0], *matrix.inputs[0].inputs))
    return found


def _anchored(partition: Partition, anchor: str) -> list[Group]:
    return [group for group in partition.groups() if group.anchor == anchor]


def _join_parts_of_tuples(partition: Partition) -> None:
    """The `get`s of an op with several results belong to its group (those of a repeat stay)."""
    for node in list(partition.group):
        if node.op == "get" and node.inputs[0].op not in STRUCTURE:
            partition.merge(partition.group[node.inputs[0]], partition.group[node])


# ---- what comes before -------------------------------------------------------------------------


def _absorb_norm(partition: Partition, group: Group) -> None:
    """norm(x) @ w: a norm that only this matmul reads is computed with its rows."""
    left = group.core.inputs[0]
    producer = partition.group.get(left)
    if producer is None or producer.core.op not in ("rms_norm", "layer_norm"):
        return
    if partition.consumers(producer) == {group} and partition.exits(producer.nodes) == [left] \
            and left not in partition.results:
        partition.merge(group, producer)


def _absorb_prologue(partition: Partition, group: Group, ops: frozenset[str] | set[str]) -> None:
    """Takes in what computes the rows that the group reads, and that nobody else reads."""
    pending = list(_prologue_operands(group))
    while pending:
        node = pending.pop()
        producer = partition.group.get(node)
        if producer is None or producer is group or producer.anchor not in ("map", "view"):
            continue
        if producer.nodes != {node} or not _is_prologue(node, ops):
            continue
        if node in partition.results or partition.consumers(producer) != {group}:
            continue
        partition.merge(group, producer)
        pending += node.inputs


def _prologue_operands(group: Group) -> list[Node]:
    """Where a prologue may begin: the rows of a matmul (or of its norm), all operands of others."""
    if group.core.op != "matmul":
        return list(group.core.inputs)
    found, pending = [], [group.core.inputs[0]]
    while pending:
        node = pending.pop()
        if node in group.nodes:
            pending += node.inputs
        else:
            found.append(node)
    return found


def _is_prologue(node: Node, ops: frozenset[str] | set[str]) -> bool:
    if node.op not in ops:
        return False
    return node.op != "gather" or (node["axis"] == 0 and node.inputs[0].rank == 2)


# ---- maps --------------------------------------------------------------------------------------


def _merge_maps(partition: Partition) -> None:
    """Merges maps and views along their edges, then maps that read the same values, until done."""
    while _merge_along_edges(partition) or _merge_siblings(partition):
        pass


def _merge_along_edges(partition: Partition) -> bool:
    changed = False
    for producer in reversed(partition.groups()):
        if producer.anchor not in ("map", "view") or not partition.is_live(producer):
            continue
        consumers = partition.consumers(producer)
        only = len(consumers) == 1 and not producer.nodes & partition.results
        for consumer in sorted(consumers, key=lambda each: each.level):
            if consumer.anchor not in ("map", "view") or not _may_join(
                    partition, producer, consumer, only):
                continue
            _merge_maps_pair(partition, producer, consumer)
            changed = True
            break
    return changed


def _may_join(partition: Partition, producer: Group, consumer: Group, only: bool) -> bool:
    if _recomputes(partition, producer, consumer):
        return False
    if only:
        return True
    if "view" in (producer.anchor, consumer.anchor):
        return False  # a view that several read is free for each of them
    return _rows(partition, producer) == _rows(partition, consumer) and partition.can_merge(
        producer, consumer)


def _recomputes(partition: Partition, producer: Group, consumer: Group) -> bool:
    """Whether one fusion would compute a costly value several times over."""
    if not any(node.op in COSTLY for node in producer.nodes):
        return False
    return any(
        user.op not in ELEMENTWISE or user.shape != node.shape
        for node in producer.nodes for user in partition.users[node] if user in consumer.nodes)


def _merge_siblings(partition: Partition) -> bool:
    """Merges maps that read the same group, one after the other, and run over the same rows."""
    changed = False
    for producer in filter(partition.is_live, partition.groups()):
        last: Group | None = None
        for reader in _map_readers(partition, producer):
            if last is not None and _rows(partition, last) == _rows(partition, reader) \
                    and partition.can_merge(last, reader):
                partition.merge(last, reader)
                changed = True
            else:
                last = reader
    return changed


def _map_readers(partition: Partition, producer: Group) -> list[Group]:
    """The maps that read a group, directly or through views, in order."""
    found: dict[Group, None] = {}
    pending, seen = [producer], {producer}
    while pending:
        for each in partition.consumers(pending.pop()) - seen:
            seen.add(each)
            if each.anchor == "map":
                found[each] = None
            elif each.anchor == "view":
                pending.append(each)
    return sorted(found, key=lambda each: min(partition.position[node] for node in each.nodes))


def _rows(partition: Partition, group: Group) -> set:
    """The leading dims that a map's results run over (an append runs over its values)."""
    rows = set()
    for node in partition.exits(group.nodes):
        values = node.inputs[1] if node.op == "cache_append" else node
        rows.add(values.shape[0] if values.rank else 1)
    return rows


def _merge_maps_pair(partition: Partition, first: Group, second: Group) -> None:
    if first.anchor == "view" and second.anchor == "map":
        first, second = second, first
    partition.merge(first, second)
