"""NumPy evaluation of graphs: the definition that compiled code is compared with.

At run time only the prelude and constant folding may use it; LLMC_NO_INTERPRET=1 enforces that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc import knobs
from llmc.errors import GraphError, LlmcError, ShapeError
from llmc.ir.dims import Dim, Symbol, affine, bounds, evaluate, format_dim, symbols
from llmc.ir.graph import Graph, Node, TensorType, walk
from llmc.ir.ops import OPS, Context
from llmc.ir.ops_core import Array, round_to

_allowed: ContextVar[bool] = ContextVar("interpreting allowed", default=False)


@contextmanager
def allowed() -> Iterator[None]:
    """Lets the code inside interpret even under LLMC_NO_INTERPRET=1 (prelude, folding, tests)."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def interpret(
    graph: Graph,
    inputs: Mapping[str, Array],
    parameters: Mapping[str, Any] | None = None,
    states: Mapping[str, Array] | None = None,
    *,
    exact: bool = False,
    dims: Mapping[str, int] | None = None,
    in_place_states: bool = False,
) -> dict[str, Array]:
    """The outputs of the graph by name; see `interpret_step`.

    New values of states are dropped, or with `in_place_states` written into the arrays of `states`.
    """
    outputs, new_states = interpret_step(
        graph, inputs, parameters, states, exact=exact, dims=dims
    )
    if in_place_states:
        for name, array in (states or {}).items():
            array[...] = new_states[name]
    return outputs


def interpret_step(
    graph: Graph,
    inputs: Mapping[str, Array],
    parameters: Mapping[str, Any] | None = None,
    states: Mapping[str, Array] | None = None,
    *,
    exact: bool = False,
    dims: Mapping[str, int] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(outputs, states after the step), by name; floats are f64 if `exact`.

    `parameters` maps names to arrays or to objects with `.read()`; results of the graph's prelude
    that are missing there are evaluated. `states` maps names to arrays, which stay untouched.
    `dims` binds symbols that no input's shape gives. ShapeError: an input is missing, has another
    dtype or rank, or a size that breaks a symbol's range or another axis's value.
    """
    if knobs.no_interpret() and not _allowed.get():
        raise LlmcError("the interpreter was used at run time under LLMC_NO_INTERPRET=1")
    bound = bind_symbols(graph, inputs, dims or {})
    run = _Run(bound, exact, parameters or {}, dict(states or {}), dict(graph.prelude))
    operands = [np.asarray(inputs[node["name"]]) for node in graph.inputs]
    results = run.graph(graph, operands, 0)
    outputs = {name: value for (name, _), value in zip(graph.outputs, results, strict=True)}
    return outputs, run.states


def evaluate_constant(node: Node) -> np.ndarray | None:
    """The value of a node made of constants only, in its dtype; None if it is not, or a tuple."""
    if not isinstance(node.type, TensorType):
        return None
    order = []
    for each in walk([node]):
        if _varies(each):
            return None
        order.append(each)
    context, values = Context(), dict[Node, Any]()
    for each in order:
        arrays = [values[operand] for operand in each.inputs]
        values[each] = OPS[each.op].reference(each, arrays, context)
    return np.asarray(values[node])


def _varies(node: Node) -> bool:
    if node.bodies or node.op in ("input", "parameter", "state", "layer", "table"):
        return True
    return any(_symbolic(value) for _, value in node.attributes)


def _symbolic(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_symbolic, value))
    return bool(symbols(value)) if not isinstance(value, (str, bytes, float)) else False


# ---- symbols -----------------------------------------------------------------------------------


def bind_symbols(
    graph: Graph, inputs: Mapping[str, Array], extra: Mapping[str, int]
) -> dict[str, int]:
    """The values of all symbols in the shapes of the inputs, and `extra`; ShapeError as
    `interpret` says."""
    bound = dict(extra)
    axes: list[tuple[str, Dim, int]] = []
    for node in graph.inputs:
        name = node["name"]
        if name not in inputs:
            raise ShapeError(f"input '{name}' is missing")
        array = np.asarray(inputs[name])
        if array.ndim != node.rank:
            raise ShapeError(f"input '{name}' has {array.ndim} axes, {node.tensor_type} wants "
                             f"{node.rank}")
        if array.dtype != node.dtype.numpy and not (node.dtype.is_float and array.dtype == "f8"):
            raise ShapeError(f"input '{name}' is {array.dtype}, not {node.dtype}")
        for index, (dim, size) in enumerate(zip(node.shape, array.shape, strict=True)):
            axes.append((f"input '{name}' axis {index}", dim, size))
    for where, dim, size in axes:
        _solve(where, dim, size, bound)
    for where, dim, size in axes:
        expected = evaluate(dim, bound)
        if expected != size:
            raise ShapeError(f"{where} has size {size}, but {format_dim(dim)} is {expected}")
    return bound


def _solve(where: str, dim: Dim, size: int, bound: dict[str, int]) -> None:
    """Binds the dim's symbol if the dim is `coefficient * symbol + constant` of a new symbol."""
    form = affine(dim)
    if form is None:
        return
    constant, coefficients = form
    unknown = {each: by for each, by in coefficients.items() if each.name not in bound}
    if len(unknown) != 1:
        return
    [(symbol, coefficient)] = unknown.items()
    known = sum(by * bound[each.name] for each, by in coefficients.items() if each is not symbol)
    value, rest = divmod(size - constant - known, coefficient)
    if rest:
        raise ShapeError(f"{where} has size {size}, which no {symbol.name} makes "
                         f"{format_dim(dim)}")
    _check_range(where, symbol, value)
    bound[symbol.name] = value


def _check_range(where: str, symbol: Symbol, value: int) -> None:
    low, high = bounds(symbol)
    if value < low or (high is not None and value > high) or value % symbol.multiple:
        multiple = f", a multiple of {symbol.multiple}" if symbol.multiple > 1 else ""
        raise ShapeError(f"{where}: {symbol.name} = {value} is outside {low}..{high}{multiple}")


# ---- evaluation --------------------------------------------------------------------------------


@dataclass
class _Run:
    """One evaluation: symbol values, leaves by name, and the states' current values."""

    dims: dict[str, int]
    exact: bool
    parameters: Mapping[str, Any]
    states: dict[str, Array]
    prelude: dict[str, Graph]

    def graph(self, graph: Graph, operands: Sequence[Array], turn: int) -> list[Array]:
        """The outputs, in order; updates are stored when all is computed."""
        given = {
            node: round_to(array, node.dtype, self.exact)
            for node, array in zip(graph.inputs, operands, strict=True)
        }
        read = functools.partial(self._read, given, turn)
        context = Context(self.exact, self.dims, turn, read, self.graph)
        wanted = [node for _, node in graph.outputs] + [node for _, node in graph.updates]
        values = _evaluate(graph, wanted, context)
        for state, node in graph.updates:
            self.states[_leaf_name(state, turn)] = values[node]
        return [values[node] for _, node in graph.outputs]

    def _read(self, given: Mapping[Node, Array], turn: int, node: Node) -> Array:
        if node.op == "input":
            if node not in given:
                raise GraphError(f"input '{node['name']}' is none of the graph's inputs")
            return given[node]
        if node.op == "state":
            name = _leaf_name(node, turn)
            if name not in self.states:
                raise ShapeError(f"state '{name}' is missing")
            return self._checked(f"state '{name}'", node, self.states[name])
        return self._parameter(node, turn)

    def _parameter(self, node: Node, turn: int) -> Array:
        for name in (_leaf_name(node, turn), node["name"]):
            if name in self.parameters:
                stored = self.parameters[name]
                array = stored.read() if hasattr(stored, "read") else stored
                return self._checked(f"parameter '{name}'", node, array)
        if node["name"] not in self.prelude:
            raise ShapeError(f"parameter '{_leaf_name(node, turn)}' is missing")
        return self.graph(self.prelude[node["name"]], (), turn)[0]

    def _checked(self, what: str, node: Node, array: Array) -> Array:
        shape = tuple(evaluate_or_size(d, size, self.dims) for d, size in _axes(what, node, array))
        if shape != np.shape(array):
            raise ShapeError(f"{what} has shape {np.shape(array)}, not {shape}")
        return round_to(array, node.dtype, self.exact)


def _axes(what: str, node: Node, array: Array) -> list[tuple[Dim, int]]:
    if np.ndim(array) != node.rank:
        raise ShapeError(f"{what} has {np.ndim(array)} axes, {node.tensor_type} wants {node.rank}")
    return list(zip(node.shape, np.shape(array), strict=True))


def evaluate_or_size(dim: Dim, size: int, bound: dict[str, int]) -> int:
    """The dim's value; a state's own unbound symbol (the pool's pages) takes the array's size."""
    _solve("a state", dim, size, bound)
    return evaluate(dim, bound)


def _leaf_name(node: Node, turn: int) -> str:
    names = node["names"]
    return names[turn] if names else node["name"]


def _evaluate(graph: Graph, wanted: Sequence[Node], context: Context) -> dict[Node, Any]:
    """The values of the wanted nodes; other values are freed when their last user ran."""
    order = graph.nodes()
    last_user = {operand: node for node in order for operand in node.inputs}
    kept = set(wanted)
    values: dict[Node, Any] = {}
    for node in order:
        arrays = [values[operand] for operand in node.inputs]
        values[node] = OPS[node.op].reference(node, arrays, context)
        for operand in set(node.inputs):
            if last_user[operand] is node and operand not in kept:
                del values[operand]
    return values
