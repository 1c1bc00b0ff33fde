"""What a matmul or a row-wise reduction computes with its result before storing it."""

from __future__ import annotations

from collections.abc import Callable

from llmc.ir.graph import Node
from llmc.ir.ops import ELEMENTWISE
from llmc.passes.match import PRODUCTS, last_axis_slice
from llmc.passes.partition import Group, Partition


def absorb_epilogue(partition: Partition, group: Group) -> None:
    """Grows the group by elementwise users of its result, as far as one result leaves it.

    The group takes in nodes in topological order; it is left as it was the last time that a single
    node was read from outside. Elements are read at (row, column) only; a matmul's result may be
    cut into equal parts of its last axis (gate and up).
    """
    members = set(group.nodes)
    best = set(members)
    is_product = group.core.op in PRODUCTS
    fits = _matmul_epilogue(partition, group.core) if is_product else _row_epilogue(group.core)
    rejected: set[Node] = set()
    while True:
        node = _next_user(partition, members, rejected)
        if node is None:
            break
        if fits(node, members) and _is_free_to_join(partition, group, members, node):
            members.add(node)
            exits = partition.exits(members)
            if len(exits) == 1 and _uses_all_parts(members, exits[0]):
                best = set(members)
        else:
            rejected.add(node)
    for node in sorted(best - group.nodes, key=partition.position.__getitem__):
        partition.merge(group, partition.group[node])


def _next_user(partition: Partition, members: set[Node], rejected: set[Node]) -> Node | None:
    users = {user for node in members for user in partition.users[node]
             if user in partition.group} - members - rejected
    return min(users, key=partition.position.__getitem__, default=None)


def _is_free_to_join(partition: Partition, group: Group, members: set[Node], node: Node) -> bool:
    """The node is in no other fusion, and nothing else that it reads needs the group."""
    own = partition.group[node]
    if own.nodes != {node} or own.anchor not in ("map", "view"):
        return False
    others = {partition.group[each] for each in node.inputs
              if each in partition.group and each not in members}
    # Members that are tried out are still groups of their own: look from each of them.
    return not any(partition.depends(other, partition.group[member])
                   for other in others for member in members)


def _matmul_epilogue(partition: Partition, matmul: Node) -> Callable[[Node, set[Node]], bool]:
    full = matmul.shape
    # A weight is packed for its parts; another product with it may not have these.
    divisible = len(partition.users[matmul.inputs[1]]) == 1

    def fits(node: Node, members: set[Node]) -> bool:
        if node.op == "slice":
            return divisible and _is_part(node, full)
        if node.op not in ELEMENTWISE or node.shape[:-1] != full[:-1]:
            return False
        return all(each.shape == node.shape for each in node.inputs if each in members)

    return fits


def _is_part(node: Node, full: tuple) -> bool:
    """Whether a slice is one of the equal parts that tile the last axis."""
    bounds = last_axis_slice(node)
    if bounds is None or node.inputs[0].shape != full:
        return False
    start, stop, width = *bounds, full[-1]
    if not all(isinstance(each, int) for each in (start, stop, width)):
        return False
    size = stop - start
    return size > 0 and width % size == 0 and start % size == 0


def _uses_all_parts(members: set[Node], exit_: Node) -> bool:
    """Parts count only if they tile the whole result (a lone first half is no epilogue)."""
    slices = [node for node in members if node.op == "slice"]
    if not slices:
        return True
    size, width = exit_.shape[-1], slices[0].inputs[0].shape[-1]
    if not (isinstance(size, int) and isinstance(width, int)):
        return False
    return {node.shape[-1] for node in slices} == {size} and \
        {node["starts"][-1] for node in slices} == set(range(0, width, size))


def _row_epilogue(core: Node) -> Callable[[Node, set[Node]], bool]:
    row = core.inputs[0].shape

    def fits(node: Node, members: set[Node]) -> bool:
        if node.op not in ELEMENTWISE or node.shape not in (row, core.shape):
            return False
        keeps_rows = core.rank == len(row)
        return all(each.shape == node.shape or keeps_rows
                   for each in node.inputs if each in members)

    return fits
