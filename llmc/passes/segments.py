"""Where a graph's layers meet, and which stretches between the meeting points look alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.ops import LEAVES
from llmc.passes.names import is_regular

COPIED = frozenset({"parameter", "constant", "iota", "dim"})


def descendants(nodes: Sequence[Node], source: Node) -> list[Node]:
    """The nodes that depend on source, in the order of `nodes`, without source itself."""
    found = {source}
    stream = []
    for node in _parts_beside_tuples(nodes):
        if any(each in found for each in node.inputs):
            found.add(node)
            stream.append(node)
    return stream


def _parts_beside_tuples(nodes: Sequence[Node]) -> Iterator[Node]:
    """The nodes with each `get` right behind what it reads. One that only a state's update wants
    comes last in a graph, but belongs to its layer."""
    parts: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op == "get":
            parts.setdefault(node.inputs[0], []).append(node)
    for node in nodes:
        if node.op != "get":
            yield node
            yield from parts.get(node, ())


def find_joints(stream: Sequence[Node]) -> list[Node]:
    """The nodes that every path through the stream meets, in order.

    A node whose value is used more than half the stream away (an embedding that every layer reads
    again) does not count as a path: it will be an invariant of the loop.
    """
    position = {node: index for index, node in enumerate(stream)}
    last_use = list(range(len(stream)))
    for index, node in enumerate(stream):
        for each in node.inputs:
            if each in position:
                last_use[position[each]] = index
    joints, reach = [], -1
    for index, node in enumerate(stream):
        if reach <= index and isinstance(node.type, TensorType):
            joints.append(node)
        if last_use[index] - index <= len(stream) // 2:
            reach = max(reach, last_use[index])
    return joints


def without_inputs(graph: Graph) -> set[Node]:
    """Non-leaf nodes of which every turn may hold a copy: functions of parameters and constants,
    and scalars of dims."""
    copied: set[Node] = set()
    weights: set[Node] = set()
    for node in graph.nodes():
        if node.op == "parameter":
            weights.add(node)
        elif node.inputs and all(each in copied or each.op in COPIED for each in node.inputs):
            if any(each in weights for each in node.inputs):
                weights.add(node)
            if node in weights or (isinstance(node.type, TensorType) and not node.shape):
                copied.add(node)
    return copied


class Segments:
    """The stream cut at its joints. Segment i (i >= 1) lies between joints i - 1 and i."""

    def __init__(self, graph: Graph, stream: Sequence[Node], joints: Sequence[Node]):
        self.joints = joints
        self.copied = without_inputs(graph)
        self.updates = {value: state for state, value in graph.updates}
        self.index: dict[Node, int] = {}
        is_joint, index = set(joints), 0
        for node in stream:
            self.index[node] = index
            index += node in is_joint
        self.roots: list[list[Node]] = [[] for _ in range(index + 1)]
        for _, value in graph.updates:
            if value in self.index:
                self.roots[self.index[value]].append(value)
        results = {value for _, value in graph.outputs if value in self.index}
        # A segment that gives out an inner value stays what it is: no turn of a loop. A joint that
        # is given out may end a loop, but not lie inside one.
        self.fixed = {self.index[value] for value in results - is_joint}
        self.barriers = {self.index[value] for value in results & is_joint}
        self._tokens: dict[tuple, int] = {}

    def token(self, node: Node) -> int:
        """A number for the node's structure: op, attributes, type and bodies, without names."""
        if node.op in ("parameter", "state", "constant"):
            key: tuple = (node.op, node.type)
        else:
            key = (node.op, node.attributes, node.type, node.bodies)
        return self._tokens.setdefault(key, len(self._tokens))

    def is_inside(self, node: Node, index: int) -> bool:
        """Whether the segment computes the node itself; else it comes from outside."""
        return node not in self.joints[index - 1:index] and node.op not in LEAVES and (
            self.index.get(node) == index or node in self.copied)

    def signature(self, index: int) -> tuple:
        """The structure of a segment: equal for segments that may be turns of one loop."""
        if index in self.fixed:
            return ("fixed", index)
        order: dict[Node, int] = {}
        parts: list[tuple] = []
        for root in (self.joints[index], *self.roots[index]):
            for node in self._post_order(root, index, order):
                operands = tuple(order[each] if each in order else self._outside(each)
                                 for each in node.inputs)
                order[node] = len(order)
                parts.append((self.token(node), operands))
            parts.append(("root", order[root]))
        return tuple(parts)

    def _outside(self, node: Node) -> str:
        """What a signature says of a leaf or of a value from outside the segment."""
        return f"{node.op} {self.token(node)}" if node.op in LEAVES else str(node.type)

    def _post_order(self, root: Node, index: int, seen: dict[Node, int]) -> Iterator[Node]:
        """The nodes that the segment computes for the root, inputs first, those in `seen` not."""
        stack = [root]
        while stack:
            node = stack[-1]
            pending = [each for each in node.inputs
                       if each not in seen and self.is_inside(each, index)]
            if node not in seen and pending:
                stack.extend(reversed(pending))
                continue
            stack.pop()
            if node not in seen:
                yield node

    def runs(self) -> list[tuple[int, int, int]]:
        """Periodic runs (first segment, period, count): the longest first, then the least period.

        Where a run may begin at several segments, those come first whose turns name their weights
        alike: a norm before the first layer belongs to no layer.
        """
        numbers: dict[tuple, int] = {}
        signs = [-1] + [numbers.setdefault(self.signature(index), len(numbers))
                        for index in range(1, len(self.joints))]
        found = [
            (start + shift, period, length // period)
            for period in _candidate_periods(signs)
            for stretch in _stretches(signs, period)
            for start, length in self._between_barriers(*stretch)
            if length >= 2 * period
            for shift in range(min(length % period, period - 1) + 1)
        ]
        found.sort(key=lambda run: (-run[1] * run[2], run[1]))
        best = [run for run in found if run[1:] == found[0][1:]]
        return sorted(best, key=self._irregular_names) + found[len(best):]

    def _between_barriers(self, start: int, length: int) -> list[tuple[int, int]]:
        """The stretch cut after each of its segments that ends in a barrier."""
        stops = [each + 1 for each in sorted(self.barriers) if start <= each < start + length - 1]
        edges = [start, *stops, start + length]
        return [(a, b - a) for a, b in pairwise(edges)]

    def _irregular_names(self, run: tuple[int, int, int]) -> int:
        """How many weights of the first two turns have names that differ in more than numbers."""
        start, period, _ = run
        first, second = (
            [leaf["name"] for index in range(begin, begin + period)
             for leaf in self._parameters(index)]
            for begin in (start, start + period))
        return sum(not is_regular(pair) for pair in zip(first, second, strict=False))

    def _parameters(self, index: int) -> Iterator[Node]:
        """The weights that a segment reads, in the order of its signature."""
        order: dict[Node, int] = {}
        for node in self._post_order(self.joints[index], index, order):
            order[node] = len(order)
            yield from (each for each in node.inputs if each.op == "parameter")


def _stretches(signs: Sequence[int], period: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches, two periods long or more, that have this period."""
    found = []
    start = 1
    while start + 2 * period <= len(signs):
        length = 0
        while (start + length + period < len(signs)
               and signs[start + length] == signs[start + length + period]):
            length += 1
        if length >= period:
            found.append((start, length + period))
        start += length + 1
    return found


def _candidate_periods(signs: Sequence[int]) -> list[int]:
    """Distances between equal numbers that are up to eight occurrences apart, least first."""
    places: dict[int, list[int]] = {}
    for index, sign in enumerate(signs):
        places.setdefault(sign, []).append(index)
    periods: set[int] = set()
    for where in places.values():
        for step in range(1, min(len(where), 9)):
            periods.update(b - a for a, b in zip(where, where[step:], strict=False))
    return sorted(period for period in periods if 2 * period < len(signs))[:64]
