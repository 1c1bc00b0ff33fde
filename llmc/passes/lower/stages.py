"""Fusions to stages, repeats to loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmc.errors import CompileError
from llmc.ir.dims import bounds, product
from llmc.ir.dtypes import dtype, f32
from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.layouts import RowBlocks, Rows
from llmc.ir.ops import make, updated_state
from llmc.ir.program import Buffer, Capabilities, Loop, Stage, Step, Weight
from llmc.ir.quantized import coded_rows, stored_operands
from llmc.ir.views import source_of, view_of
from llmc.passes.lower.bodies import (
    VIEWS,
    absorb,
    body_input,
    copy_body,
    is_row_wise,
    is_rows_of_input,
    prune,
    reads_in_place,
    retarget,
    split_prologue,
)
from llmc.passes.lower.memory import readers
from llmc.passes.lower.outputs import rename_stage
from llmc.passes.lower.weights import (
    anchor_of,
    first_state,
    state_layouts,
    tied_sources,
    weight_uses,
)
from llmc.passes.match import ATTENTION

STAGE_KINDS = {"map", "reduce", "matmul", "dense_matmul", "attention", "cumsum", "argmax", "argmin",
               "top_k", "scatter", "scan", "group_rows", "grouped_matmul"}


class Lowering:
    """State of one lowering: buffers and weights by name, and which buffer holds each node."""

    def __init__(self, graph: Graph, capabilities: Capabilities):
        self.graph = graph
        self.capabilities = capabilities
        self.preludes = dict(graph.prelude)
        self.panels = weight_uses(graph, capabilities)
        self.tied = tied_sources(graph, self.panels)
        self.layouts = state_layouts(graph, capabilities)
        self.buffers: dict[str, Buffer] = {}
        self.weights: dict[str, Weight] = {}
        self.homes: dict[Node, str] = {}  # node -> name of the buffer that holds its value
        self.parts: dict[tuple[Node, int], str] = {}  # the same for the elements of tuples

    def run(self) -> list[Step]:
        for node in self.graph.inputs:
            self._home(node, node["name"], "input")
        steps = self._scope(self.graph)
        steps += self._outputs()
        return steps

    # ---- scopes ---------------------------------------------------------------------------

    def _scope(self, graph: Graph) -> list[Step]:
        """The steps of a graph (or of a repeat's body), in topological order."""
        steps: list[Step] = []
        for node in graph.nodes():
            if node.op == "fusion":
                steps += self._fusion(node)
            elif node.op == "repeat":
                steps += self._repeat(node, graph)
            elif node.op == "get":
                self.homes[node] = self.parts[node.inputs[0], node["index"]]
            elif node.inputs and node.op not in VIEWS:
                raise CompileError(f"no kernel computes {node.op} : {node.type}")
        return steps

    def _repeat(self, node: Node, graph: Graph) -> list[Step]:
        body, count, carried = node.bodies[0], node["count"], node["carried"]
        before: list[Step] = []
        users = graph.users()
        held = {value for _, value in graph.outputs}
        loop_buffers = []
        for stand_in, initial in zip(body.inputs[:carried], node.inputs, strict=False):
            home = self._own_copy(initial, users, held, before)
            loop_buffers.append(home)
            self.homes[stand_in] = home
        for stand_in, value in zip(body.inputs[carried:], node.inputs[carried:], strict=True):
            self.homes[stand_in] = self._whole(value, before)
        inner = self._scope(body)
        if any(isinstance(step, Loop) for step in inner):
            raise CompileError("a repeat inside a repeat cannot be lowered yet")
        stages = self._close_loop([s for s in inner if isinstance(s, Stage)], body, loop_buffers)
        for index, home in enumerate(loop_buffers):
            self.parts[node, index] = home
        self.homes[node] = loop_buffers[0]
        return [*before, Loop(count, tuple(stages))]

    def _own_copy(self, initial: Node, users, held, before: list[Step]) -> str:
        """A buffer the loop may overwrite: the initial value's own if nobody else wants it."""
        home = self.homes.get(initial)
        if home and self.buffers[home].role == "arena" and initial not in held \
                and len(users[initial]) == 1:
            return home
        return self._copied(initial, "carried", before)

    def _whole(self, value: Node, before: list[Step]) -> str:
        """A buffer that holds a value and nothing else: views and constants are copied out."""
        if value in self.homes or value.op in ("parameter", "state"):
            return self._operand(value)
        return self._copied(value, "invariant", before)

    def _copied(self, value: Node, name: str, before: list[Step]) -> str:
        """A new buffer, and a stage before the loop that copies the value into it."""
        body, operands = absorb(copy_body(value.tensor_type), [value])
        body, names = self._operands(body, operands)
        copy = self._new_buffer(name, value.tensor_type, "arena")
        before.append(self._stage("map", body, names, [copy]))
        return copy

    def _close_loop(self, stages: list[Stage], body: Graph, loop_buffers: list[str]) -> list[Stage]:
        """Make each turn leave the carried values where the next turn reads them.

        The last writer stores straight into the loop's buffer where no later stage reads the old
        value (and the writer itself reads it in place only); otherwise a copy ends the turn.
        """
        sources = [self._operand(value) for _, value in body.outputs]
        copies: list[tuple[str, str]] = []
        for source, target in zip(sources, loop_buffers, strict=True):
            if source == target:
                continue
            if sources.count(source) == 1 and self._may_overwrite(stages, source, target):
                stages = [rename_stage(stage, source, target) for stage in stages]
                del self.buffers[source]
                self.homes = {n: target if h == source else h for n, h in self.homes.items()}
                self.parts = {n: target if h == source else h for n, h in self.parts.items()}
            else:
                copies.append((source, target))
        moved = []
        for source, target in copies:  # through temporaries where carried values trade places
            if source in loop_buffers:
                temporary = self._new_buffer("carried", self.buffers[source].type, "arena")
                stages.append(self._copy(source, temporary))
                source = temporary
            moved.append((source, target))
        return stages + [self._copy(source, target) for source, target in moved]

    def _may_overwrite(self, stages: list[Stage], source: str, target: str) -> bool:
        writers = [i for i, stage in enumerate(stages) if source in stage.results]
        if len(writers) != 1 or self.buffers[source].role != "arena":
            return False
        writer = writers[0]
        reading = readers(stages, target)
        if any(index > writer for index in reading):
            return False
        if writer not in reading:
            return True
        stage = stages[writer]
        output = stage.body.outputs[stage.results.index(source)][1]
        old = [node for node, name in zip(stage.body.inputs, stage.operands, strict=True)
               if name == target]
        return len(stage.results) == 1 and all(
            reads_in_place(stage.body, node, output) for node in old)

    # ---- fusions --------------------------------------------------------------------------

    def _fusion(self, node: Node) -> list[Step]:
        anchor = node["anchor"]
        if anchor not in STAGE_KINDS:
            raise CompileError(f"no stage kind for the fusion {node['name']!r} ({anchor})")
        body, operands = absorb(node.bodies[0], list(node.inputs))
        body, names = self._operands(body, operands)
        results = self._results(node, body, names)
        if anchor == "matmul":
            return self._matmul(node["name"], body, names, results)
        if anchor == "grouped_matmul":
            return self._grouped(node["name"], body, names, results)
        if anchor == "attention":
            return self._attention(node["name"], body, names, results)
        return [self._stage(anchor, body, names, results, node["name"])]

    def _operands(self, body: Graph, operands: list[Node]) -> tuple[Graph, list[str]]:
        """Buffers of the operands; a tied matrix is read through its transpose, the packed one."""
        change, inputs, names = {}, [], []
        for stand_in, operand in zip(body.inputs, operands, strict=True):
            packed = self.tied.get(operand)
            if packed is not None:
                source = body_input(stand_in["name"], packed.tensor_type)
                change[stand_in] = make("transpose", source, permutation=(1, 0))
                stand_in, operand = source, packed
            inputs.append(stand_in)
            names.append(self._operand(operand))
        return (retarget(body, change, inputs) if change else body), names

    def _results(self, node: Node, body: Graph, operands: Sequence[str]) -> list[str]:
        """Buffers of the results: new ones in the arena, or the state that is updated in place."""
        results = []
        for index, (name, value) in enumerate(body.outputs):
            if updated_state(value) is not None:
                home = operands[body.inputs.index(first_state(value))]
            else:
                label = node["name"] if len(body.outputs) == 1 else name
                home = self._new_buffer(label, value.tensor_type, "arena")
            self.parts[node, index] = home
            results.append(home)
        self.homes[node] = results[0]
        return results

    def _matmul(self, name: str, body: Graph, operands: list[str],
                results: list[str]) -> list[Step]:
        """Few rows: one stage, each worker prepares its rows. Else the rows are packed in a stage.

        Targets that take plain rows need that stage only where the rows have to be computed.
        """
        matmul = anchor_of(body, "matmul")
        high = bounds(product(matmul.inputs[0].shape[:-1]))[1]
        columns = self.capabilities.weight_layout == "columns"
        if not columns and high is not None and high <= self.capabilities.few_rows:
            return [self._stage("matmul", body, operands, results, name)]
        coded = bool(matmul["activation_block"])
        packed = f32 if coded else dtype(self.capabilities.packed_activation(
            stored_operands(matmul.inputs[1])[0].dtype, matmul.inputs[0].dtype))
        if columns and matmul.inputs[0].dtype is packed and is_rows_of_input(matmul.inputs[0]):
            return [self._stage("matmul", body, operands, results, name)]
        prologue, rest, stand_in = split_prologue(body, matmul, packed)
        rows = self._new_buffer(f"{name}_rows", stand_in.tensor_type, "arena")
        if not columns:
            block = self.capabilities.matmul_rows
            layout = coded_rows(matmul, self.capabilities, block) if coded else RowBlocks(
                block, self.capabilities.interleave(packed))
            self.buffers[rows] = replace(self.buffers[rows], layout=layout)
        kind = "coded_rows" if coded else "reduce" if is_row_wise(prologue) else "map"
        return [self._stage(kind, prologue, operands, [rows], f"{name}_rows"),
                self._stage("matmul", rest, [*operands, rows], results, name)]

    def _grouped(self, name: str, body: Graph, operands: list[str],
                 results: list[str]) -> list[Step]:
        """The kernel reads rows in the dtype of its arithmetic: a stage picks or converts them."""
        product = anchor_of(body, "grouped_matmul")
        rows, weight = product.inputs[:2]
        packed = dtype(self.capabilities.packed_activation(weight.dtype, rows.dtype))
        if rows.dtype is packed and is_rows_of_input(rows):
            return [self._stage("grouped_matmul", body, operands, results, name)]
        prologue, rest, stand_in = split_prologue(body, product, packed)
        buffer = self._new_buffer(f"{name}_rows", stand_in.tensor_type, "arena")
        return [self._stage("map", prologue, operands, [buffer], f"{name}_rows"),
                self._stage("grouped_matmul", rest, [*operands, buffer], results, name)]

    def _attention(self, name: str, body: Graph, operands: list[str],
                   results: list[str]) -> list[Step]:
        """Attention reads buffers through strides: an operand that is computed, or moved in a way
        that no strides can say, is made by a stage of its own."""
        core = next(node for node in body.nodes() if node.op in ATTENTION)
        steps: list[Step] = []
        made: dict[Node, Node] = {}
        for operand in core.inputs:
            source = source_of(operand)
            value = operand if source.op == "input" else source
            if value in made or (source.op == "input" and view_of(operand) is not None):
                continue
            prologue = Graph("operand", body.inputs, (("x", value),))
            home = self._new_buffer(f"{name}_operand", value.tensor_type, "arena")
            steps.append(self._stage("map", prologue, operands, [home]))
            made[value] = body_input(home, value.tensor_type)
            operands = [*operands, home]
        if made:
            body = retarget(body, made, [*body.inputs, *made.values()])
        return [*steps, self._stage("attention", body, operands, results, name)]

    def _stage(self, kind: str, body: Graph, operands: Sequence[str], results: Sequence[str],
               name: str | None = None) -> Stage:
        body, kept = prune(body, list(operands))
        return Stage(name or results[0], kind, body, kept, tuple(results))

    def _copy(self, source: str, target: str) -> Stage:
        return self._stage("map", copy_body(self.buffers[source].type), [source], [target])

    # ---- buffers --------------------------------------------------------------------------

    def _operand(self, node: Node) -> str:
        """The buffer of a value; weights and states get theirs when first used."""
        if node not in self.homes:
            if node.op == "parameter":
                self._weight(node)
            elif node.op == "state":
                count = len(node.get_attribute("names") or ("",))
                self._home(node, node["name"], "state", self.layouts.get(node, Rows()), count)
            else:
                raise CompileError(f"{node.op} : {node.type} has no buffer")
        return self.homes[node]

    def _weight(self, node: Node) -> None:
        expression = self.preludes.get(node["name"]) or Graph(
            node["name"], (), (("value", node),))
        names = node.get_attribute("names")
        count = len(names) if names else 1
        layout = self.panels.get(node, Rows())
        buffer = self._home(node, node["name"], "weight", layout, count)
        sources = [(leaf["name"], leaf.get_attribute("names") or (leaf["name"],) * count)
                   for leaf in expression.parameters()]
        self.weights[buffer] = Weight(buffer, expression, tuple(
            tuple((name, turns[turn]) for name, turns in sources) for turn in range(count)))

    def _home(self, node: Node, name: str, role: str, layout=None, count: int = 1) -> str:
        home = self._new_buffer(name, node.tensor_type, role, layout, count)
        self.homes[node] = home
        return home

    def _new_buffer(self, name: str, type_: TensorType, role: str, layout=None,
                    count: int = 1) -> str:
        unique, number = name, 1
        while unique in self.buffers:
            number += 1
            unique = f"{name}_{number}"
        self.buffers[unique] = Buffer(unique, type_, role, layout or Rows(), count)
        return unique

    # ---- outputs --------------------------------------------------------------------------

    def _outputs(self) -> list[Step]:
        """Output buffers are filled by copies; outputs.py then removes the needless ones."""
        steps: list[Step] = []
        for name, value in self.graph.outputs:
            body, operands = absorb(copy_body(value.tensor_type), [value])
            body, names = self._operands(body, operands)
            output = self._new_buffer(name, value.tensor_type, "output")
            steps.append(self._stage("map", body, names, [output]))
        return steps
