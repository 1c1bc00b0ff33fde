"""From a partition to a graph of `fusion` nodes: their bodies, operands, results and names."""

from __future__ import annotations

from llmc.ir.graph import Graph, Node, merge_origins
from llmc.ir.ops import LEAVES, make
from llmc.ir.quantized import stored_operands
from llmc.passes.match import PRODUCTS, VIEWS
from llmc.passes.movement import slice_of_elementwise
from llmc.passes.partition import Group, Partition
from llmc.passes.rewrite import rewrite, with_inputs, with_roots

# Leaves that bodies hold themselves.
COPIED = frozenset({"constant", "iota", "dim", "layer", "table"})
NOTABLE = ("gather", "rope", "cache_append", "attention", "dequantize", "cos", "sin")


def build(partition: Partition) -> Graph:
    """The graph with each group of the partition as one fusion."""
    return _Builder(partition).graph()


class _Builder:
    def __init__(self, partition: Partition):
        self.partition = partition
        self.done: dict[Node, Node] = {}
        self.names: dict[str, int] = {}

    def graph(self) -> Graph:
        graph = self.partition.graph
        for node in graph.inputs:
            self.done[node] = node
        for group in self.partition.in_order():
            if group.anchor in ("structure", "view"):
                for node in sorted(group.nodes, key=self.partition.position.__getitem__):
                    self.done[node] = with_inputs(node, [self._value(x) for x in node.inputs])
            else:
                self._fusion(group)
        return with_roots(graph, self._value)

    def _value(self, node: Node) -> Node:
        """What stands for a node outside fusions: leaves and free nodes stand for themselves."""
        return self.done.get(node, node)

    def _fusion(self, group: Group) -> None:
        exits = self.partition.exits(group.nodes)
        body, operands = self._body(group, exits)
        fusion = make("fusion", *map(self._value, operands), bodies=(body,),
                      anchor=group.anchor, name=self._unique(fusion_name(group, exits)))
        merge_origins(fusion, group.core, *exits)
        for index, node in enumerate(exits):
            self.done[node] = fusion if len(exits) == 1 else make("get", fusion, index=index)

    def _body(self, group: Group, exits: list[Node]) -> tuple[Graph, list[Node]]:
        """The body, and the nodes outside that its inputs stand for."""
        made: dict[Node, Node] = {}
        stand_ins: dict[Node, Node] = {}
        taken: dict[str, int] = {}
        stack = list(reversed(exits))
        while stack:
            node = stack[-1]
            if node in made:
                stack.pop()
            elif node in group.nodes or node in self.partition.free:
                pending = [each for each in node.inputs if each not in made]
                stack.extend(reversed(pending))
                if not pending:
                    made[stack.pop()] = with_inputs(node, [made[each] for each in node.inputs])
            elif node.op in COPIED:
                made[stack.pop()] = node
            else:
                name = _numbered(_operand_name(node), taken)
                made[stack.pop()] = stand_ins[node] = make("input", name=name, type=node.type)
        labels: dict[str, int] = {}
        outputs = tuple((_numbered("result" if len(exits) == 1 else node.op, labels), made[node])
                        for node in exits)
        body = Graph("body", tuple(stand_ins.values()), outputs)
        if group.anchor in PRODUCTS:
            body = rewrite(body, [slice_of_elementwise])
        return body, list(stand_ins)

    def _unique(self, name: str) -> str:
        return _numbered(name, self.names)


def _numbered(name: str, taken: dict[str, int]) -> str:
    """The name, with a number from the second time on."""
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


def _operand_name(node: Node) -> str:
    """A short name for an operand of a body: the last word of a leaf's name, or the op's name."""
    if node.op not in LEAVES:
        return "x" if node.op in ("fusion", "get", "repeat", *VIEWS) else node.op
    return _short(node["name"])


def _short(name: str) -> str:
    """`model.layers.{}.self_attn.qkv_proj` -> `qkv_proj`; `...norm.weight` -> `norm_weight`."""
    words = name.split(".")
    if words[-1] in ("weight", "bias") and len(words) > 1:
        return f"{words[-2]}_{words[-1]}"
    return words[-1]


def fusion_name(group: Group, exits: list[Node]) -> str:
    """A name for people: a matmul's is its weight's; a map's tells the notable ops in it."""
    if group.anchor in PRODUCTS:
        weight = stored_operands(group.core.inputs[1])[0].get_attribute("name") or "matmul"
        return _short(weight).removesuffix("_weight")
    if group.anchor != "map":
        return group.core.op
    ops = {node.op for node in group.nodes}
    notable = [op.removeprefix("cache_") for op in NOTABLE if op in ops]
    return "_".join(notable) or exits[-1].op
