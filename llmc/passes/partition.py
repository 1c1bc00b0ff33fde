"""Groups of nodes that become fusions: a partition of a graph that stays free of cycles.

Every node that computes something starts as a group of its own; `merge` contracts two groups. Each
group has a level, above those of all that it reads, so that "does A depend on B" need only look at
groups of levels in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmc.ir.graph import Graph, Node
from llmc.ir.ops import LEAVES


class Group:
    """Nodes to compute together. `anchor` is the fusion's kind, `core` the node it is named for."""

    __slots__ = ("anchor", "core", "level", "nodes")

    def __init__(self, node: Node, anchor: str):
        self.nodes: set[Node] = {node}
        self.anchor = anchor
        self.core = node
        self.level = 0


class Partition:
    """The groups of a graph. `free` nodes belong to no group: whoever reads them copies them."""

    def __init__(self, graph: Graph, anchor_of: dict[Node, str], free: set[Node]):
        self.graph = graph
        self.free = free
        self.position = {node: index for index, node in enumerate(graph.nodes())}
        self.users = graph.users()
        self.results = {node for _, node in (*graph.outputs, *graph.updates)}
        self.group: dict[Node, Group] = {}
        for node in graph.nodes():
            if node.op not in LEAVES and node not in free:
                group = self.group[node] = Group(node, anchor_of[node])
                group.level = 1 + max((each.level for each in self.producers(group)), default=0)

    def groups(self) -> list[Group]:
        """All groups, by the position of their first node."""
        return list(dict.fromkeys(self.group.values()))

    def is_live(self, group: Group) -> bool:
        """Whether the group has not been merged into another."""
        return self.group[group.core] is group

    def producers(self, group: Group) -> set[Group]:
        """The groups that the group reads."""
        found = {self.group[each] for node in group.nodes for each in node.inputs
                 if each in self.group}
        found.discard(group)
        return found

    def consumers(self, group: Group) -> set[Group]:
        """The groups that read the group."""
        found = {self.group[user] for node in group.nodes for user in self.users[node]
                 if user in self.group}
        found.discard(group)
        return found

    def exits(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes that are read outside the set (or are results), in topological order."""
        inside = nodes if isinstance(nodes, (set, frozenset)) else set(nodes)
        return sorted((node for node in inside if node in self.results or any(
            user not in inside for user in self.users[node])), key=self.position.__getitem__)

    def depends(self, group: Group, on: Group) -> bool:
        """Whether some path leads from `on` to `group` (true for the group itself)."""
        pending, seen = [group], {group}
        while pending:
            each = pending.pop()
            if each is on:
                return True
            if each.level > on.level:
                new = self.producers(each) - seen
                seen |= new
                pending += new
        return False

    def can_merge(self, first: Group, second: Group) -> bool:
        """Whether one fusion of both is possible: no path from one to the other runs outside."""
        for one, other in ((first, second), (second, first)):
            for producer in self.producers(other) - {one}:
                if self.depends(producer, one):
                    return False
        return True

    def merge(self, target: Group, other: Group) -> None:
        """Moves the nodes of `other` to `target`, whose anchor and core stay."""
        for node in other.nodes:
            self.group[node] = target
        target.nodes |= other.nodes
        level = 1 + max((each.level for each in self.producers(target)), default=0)
        target.level = max(target.level, other.level, level)
        pending = [target]
        while pending:
            group = pending.pop()
            for each in self.consumers(group):
                if each.level <= group.level:
                    each.level = group.level + 1
                    pending.append(each)

    def in_order(self) -> Iterator[Group]:
        """Groups in an order that computes each after what it reads."""
        yield from sorted(self.groups(), key=lambda group: (
            group.level, min(self.position[node] for node in group.nodes)))
