"""Checking that stretches of a graph are turns of one loop, and building the loop's body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc.ir.graph import Graph, Node, merge_origins
from llmc.ir.ops import LEAVES, constant_value, make
from llmc.passes.names import template_name
from llmc.passes.rewrite import with_inputs
from llmc.passes.segments import Segments

MINIMUM_NODES = 4  # computed nodes of a turn; fewer are not worth a loop


@dataclass(frozen=True)
class Turns:
    """A loop found in a graph: `final` is the carried value after `count` turns from `initial`."""

    initial: Node
    final: Node
    count: int
    invariants: tuple[Node, ...]
    body: Graph
    states: frozenset[Node]  # states of the graph that the turns update
    nodes: frozenset[Node]  # what the turns compute; nobody else may want any of it


class Mismatch(Exception):
    """Two turns differ in something that a loop cannot express."""


def match_turns(segments: Segments, start: int, period: int, count: int) -> Turns | None:
    """The loop over `count` turns of `period` segments from segment `start`, or over what fits.

    The second turn is the template: the first may read what is an invariant to the others as its
    carried value. Where a turn differs in what a loop cannot express (another input, a constant
    tensor), the loop ends before it, or begins after the first.
    """
    while count >= 2:
        turns = [_Turn(segments, start + turn * period, period) for turn in range(count)]
        template = turns[1]
        maps: list[dict[Node, Node]] = []
        try:
            for turn in turns:
                maps.append(template.match(turn))
        except Mismatch:
            pass
        if len(maps) >= 2:
            return _build(segments, template, turns[: len(maps)], maps)
        start, count = start + period, count - 1
    return None


class _Turn:
    """The segments of one turn: its entry joint, and roots (exit joint, then state updates)."""

    def __init__(self, segments: Segments, start: int, period: int):
        self.segments = segments
        self.range = range(start, start + period)
        self.entry = segments.joints[start - 1]
        self.roots = [segments.joints[start + period - 1]]
        self.roots += [root for index in self.range for root in segments.roots[index]]

    def computes(self, node: Node) -> bool:
        return node is not self.entry and self.segments.index.get(node) in self.range

    def match(self, other: _Turn) -> dict[Node, Node]:
        """Node of this turn -> node of the other in its place. Mismatch if they differ too much."""
        found: dict[Node, Node] = {self.entry: other.entry}
        if len(self.roots) != len(other.roots):
            raise Mismatch
        pending = list(zip(self.roots, other.roots, strict=True))
        while pending:
            mine, theirs = pending.pop()
            if mine in found:
                if found[mine] is not theirs:
                    raise Mismatch
                continue
            found[mine] = theirs
            if self._descends(mine, theirs, other):
                pending += zip(mine.inputs, theirs.inputs, strict=True)
        self._check_updates(other, found)
        return found

    def _descends(self, mine: Node, theirs: Node, other: _Turn) -> bool:
        """Whether the inputs of a pair must be compared too."""
        if self.segments.token(mine) != self.segments.token(theirs):
            raise Mismatch
        if mine.op in LEAVES:
            if mine is not theirs and not _may_differ(mine):
                raise Mismatch
            return False
        if self.computes(mine) != other.computes(theirs) or (
                len(mine.inputs) != len(theirs.inputs)):
            raise Mismatch
        return self.computes(mine) or mine is not theirs or mine in self.segments.copied

    def _check_updates(self, other: _Turn, found: Mapping[Node, Node]) -> None:
        updates = self.segments.updates
        for mine, theirs in zip(self.roots[1:], other.roots[1:], strict=True):
            if found.get(updates[mine], updates[mine]) is not updates[theirs]:
                raise Mismatch


def _may_differ(leaf: Node) -> bool:
    return leaf.op in ("parameter", "state") or (leaf.op == "constant" and leaf.shape == ())


# ---- the loop ----------------------------------------------------------------------------------


def _build(segments: Segments, template: _Turn, turns: Sequence[_Turn],
           maps: Sequence[dict[Node, Node]]) -> Turns | None:
    body = _Body(segments, template, maps)
    value = body.node(template.roots[0])
    updates = tuple((body.node(segments.updates[root]), body.node(root))
                    for root in template.roots[1:])
    if body.computed < MINIMUM_NODES:
        return None
    inputs = (body.carried, *body.invariants.values())
    states = frozenset(segments.updates[root] for turn in turns for root in turn.roots[1:])
    spanned = range(turns[0].range.start, turns[-1].range.stop)
    nodes = frozenset(node for node, index in segments.index.items() if index in spanned)
    final = turns[-1].roots[0]
    return Turns(turns[0].entry, final, len(turns), tuple(body.invariants),
                 Graph("layer", inputs, (("carried", value),), updates), states, nodes - {final})


class _Body:
    """Rebuilds the template's nodes over the leaves of a loop's body."""

    def __init__(self, segments: Segments, template: _Turn, maps: Sequence[dict[Node, Node]]):
        self.segments = segments
        self.template = template
        self.maps = maps
        self.names: set[str] = {"carried"}
        self.carried = make("input", name="carried", type=template.entry.type)
        self.invariants: dict[Node, Node] = {}
        self.made: dict[Node, Node] = {template.entry: self.carried}
        self.computed = 0

    def node(self, root: Node) -> Node:
        stack = [root]
        while stack:
            node = stack[-1]
            pending = []
            if node not in self.made and self._is_copied(node):
                pending = [each for each in node.inputs if each not in self.made]
            if pending:
                stack.extend(reversed(pending))
                continue
            stack.pop()
            if node not in self.made:
                self.made[node] = self._make(node)
        return self.made[root]

    def _is_copied(self, node: Node) -> bool:
        return node.op not in LEAVES and (
            self.template.computes(node) or node in self.segments.copied
            or any(turn.get(node, node) is not node for turn in self.maps))

    def _make(self, node: Node) -> Node:
        if self._is_copied(node):
            self.computed += 1
            return with_inputs(node, [self.made[each] for each in node.inputs])
        if node.op in ("constant", "iota", "dim", "layer", "table", "parameter", "state"):
            return self._leaf(node, [turn.get(node, node) for turn in self.maps])
        return self._invariant(node)

    def _leaf(self, node: Node, turns: Sequence[Node]) -> Node:
        """A leaf of the body: as it is, or with what it is in each turn."""
        if all(each is node for each in turns):
            return node
        if node.op == "constant":
            values = tuple(constant_value(each).item() for each in turns)
            leaf = make("table", dtype=node.dtype, values=values)
        else:
            names = tuple(each["name"] for each in turns)
            attributes = dict(node.attributes) | {"name": self._unique(template_name(names)),
                                                  "names": names}
            leaf = make(node.op, **attributes)
        merge_origins(leaf, *turns)
        return leaf

    def _invariant(self, node: Node) -> Node:
        name = self._unique(node["name"] if node.op == "input" else node.op)
        stand_in = make("input", name=name, type=node.type)
        self.invariants[node] = stand_in
        return stand_in

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self.names:
            number += 1
            unique = f"{name}_{number}"
        self.names.add(unique)
        return unique
