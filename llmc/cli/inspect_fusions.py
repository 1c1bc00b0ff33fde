"""Which ops of the imported graph went into which stage of the program.

Three ways, in this order: an op that reads a parameter goes where the weight made of it is read; an
op with the origin of a stage's op goes to that stage; what is left goes where its readers went.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmc.ir.graph import Graph, Node, origin_of
from llmc.ir.program import Loop, Program, Stage
from llmc.ir.summary import short_names

VIEWS = {"reshape", "transpose", "cast", "broadcast", "get"}
LEAVES = {"input", "parameter", "state", "constant", "iota", "dim", "layer", "table"}

Place = tuple[int, int]  # index of the stage, turn of the loop (0 outside of loops)


@dataclass(frozen=True)
class SourceOp:
    """An op as the model had it. detail: its weight; sources: indices of the ops that it reads."""

    node: Node
    stage: int
    detail: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Fusions:
    """The ops of one turn, sorted by stage; total: how many the imported graph has in all."""

    ops: list[SourceOp]
    total: int


def find_fusions(graph: Graph, program: Program) -> Fusions:
    """The imported graph's ops of the first turn of every loop, each with its stage."""
    places = _Places(graph, program)
    shown = [node for node in places.computed if places.of[node][1] == 0]
    shown.sort(key=lambda node: places.of[node][0])
    index = {node: number for number, node in enumerate(shown)}
    ops = [SourceOp(node, places.of[node][0], _detail(places.parameters(node)),
                    tuple(sorted({index[s] for s in _through_views(node) if s in index})))
           for node in shown]
    return Fusions(ops, len(places.computed))


class _Places:
    """of: op of the imported graph -> its place."""

    def __init__(self, graph: Graph, program: Program):
        self.stages = list(program.stages())
        self.nodes = list(graph.nodes())
        self.runtime = self._computed_at_run_time()
        self.computed = [node for node in self.nodes if node in self.runtime
                         and node.op not in LEAVES | VIEWS]
        self.looped = {number for number, stage in enumerate(self.stages)
                       if any(stage in step.stages for step in program.steps
                              if isinstance(step, Loop))}
        self.of: dict[Node, Place] = {}
        self._forward(self._weight_readers(program), self._origins())
        self._backward(graph.users())

    def parameters(self, node: Node) -> list[str]:
        """Names of the parameters that an op reads, also through what depends on them only."""
        found: list[str] = []
        pending = list(reversed(node.inputs))
        while pending:
            source = pending.pop()
            if source.op == "parameter":
                found.append(source["name"])
            elif source not in self.runtime:
                pending.extend(source.inputs)
        return found

    def _computed_at_run_time(self) -> set[Node]:
        """Nodes with an input or a state behind them; the others are the prelude."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.op in ("input", "state") or any(source in found for source in node.inputs):
                found.add(node)
        return found

    def _weight_readers(self, program: Program) -> dict[str, list[Place]]:
        """Parameter of the model -> places that read the weight made of it."""
        readers: dict[str, list[Place]] = {}
        for number, stage in enumerate(self.stages):
            for operand in stage.operands:
                weight = program.weights.get(operand)
                for turn, names in enumerate(weight.names if weight else ()):
                    for _, source in names:
                        readers.setdefault(source, []).append((number, turn))
        return readers

    def _origins(self) -> dict[tuple[str, str], list[int]]:
        """Origin of a stage's op, with the op's name and (where a node of a file is named) without,
        to the stages that have it."""
        found: dict[tuple[str, str], list[int]] = {}
        for number, stage in enumerate(self.stages):
            for node in stage.body.nodes():
                if node.op not in LEAVES | VIEWS and origin_of(node) is not None:
                    for key in _origin_keys(node):
                        found.setdefault(key, []).append(number)
        return found

    def _forward(self, readers: dict[str, list[Place]], origins: dict) -> None:
        """By weights and origins. An op without a weight runs in the turn of what it reads, and in
        the first stage with its origin that is not before that."""
        self.reached: dict[Node, Place] = {}  # (turn, stage): the latest that is behind a node
        for node in self.nodes:
            turn, earliest = max((self.reached[s] for s in node.inputs), default=(0, 0))
            place = self._by_weight(node, readers)
            if place is None and node in self.runtime and node.op not in LEAVES | VIEWS:
                keys = [key for key in _origin_keys(node) if key in origins]
                later = [s for s in (origins[keys[0]] if keys else ()) if s >= earliest]
                place = (min(later), turn) if later else None
            if place is not None:
                self._put(node, *place)
                earliest, turn = place
            self.reached[node] = (turn, earliest)

    def _by_weight(self, node: Node, readers: dict[str, list[Place]]) -> Place | None:
        if node not in self.runtime or node.op in VIEWS:
            return None
        for name in self.parameters(node):
            if found := readers.get(name):
                same = [place for place in found if _computes(self.stages[place[0]], node.op)]
                return (same or found)[0]
        return None

    def _backward(self, users: dict[Node, list[Node]]) -> None:
        """What is left is part of what reads it."""
        for node in reversed(self.nodes):
            if node not in self.of:
                stages = [self.of[user][0] for user in users[node] if user in self.of]
                self._put(node, min(stages, default=len(self.stages) - 1), self.reached[node][0])

    def _put(self, node: Node, stage: int, turn: int) -> None:
        self.of[node] = (stage, turn if stage in self.looped else 0)


def _origin_keys(node: Node) -> list[tuple[str, str]]:
    """Layers are told apart by their turns, so numbers in module paths do not count."""
    origin = origin_of(node)
    if origin is None:
        return []
    text = re.sub(r"\d+", "#", f"{origin.module} {origin.line}") if origin.node is None else (
        str(origin))
    return [(node.op, text)] if origin.node is None else [(node.op, text), ("", text)]


def _computes(stage: Stage, op: str) -> bool:
    return any(node.op == op for node in stage.body.nodes())


def _through_views(node: Node) -> list[Node]:
    """The nodes that this one reads, views looked through."""
    found, pending = [], list(node.inputs)
    while pending:
        source = pending.pop()
        if source.op in VIEWS:
            pending.extend(source.inputs)
        else:
            found.append(source)
    return found


def _detail(names: list[str]) -> str:
    """What tells an op from its like: the last words of its weight's name."""
    if not names:
        return ""
    words = names[0].removesuffix(".weight").split(".")
    return words[-1] if len(words[-1]) > 4 or len(words) == 1 else ".".join(words[-2:])


def stage_name(stage: Stage, program: Program) -> str:
    names = short_names(program)
    return ", ".join(names[result] for result in stage.results)
