"""Graphs of immutable, interned nodes: equality of nodes is identity.

Walks are iterative, so chains of a hundred thousand nodes are fine. The intern table and the
origins are weak: what nobody holds is freed.
"""

import operator
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from llmc.errors import GraphError
from llmc.ir.dims import Dim, Expression, Symbol, format_dim, substitute, symbols
from llmc.ir.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape (dims, outermost first), printed `bf16[tokens, 2048]`."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        shape = tuple(d if isinstance(d, Expression) else operator.index(d) for d in self.shape)
        object.__setattr__(self, "shape", shape)
        if any(isinstance(dim, int) and dim < 0 for dim in shape):
            raise GraphError(f"negative dim in the shape of {self}")

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(format_dim, self.shape))}]"

    __repr__ = __str__


Type: TypeAlias = "TensorType | tuple[Type, ...]"
Attribute: TypeAlias = (
    "int | float | bool | str | bytes | Expression | DType | TensorType | tuple[Attribute, ...]"
)


class Node:
    """One op applied to inputs. Made by `intern_node` (or `ops.make`, which infers the type).

    `attributes` is a tuple of (name, value) sorted by name; `bodies` a tuple of graphs that the
    node owns; `type` a TensorType, or a tuple of types that `get` nodes read.
    """

    __slots__ = ("__weakref__", "attributes", "bodies", "inputs", "op", "type")
    op: str
    attributes: tuple[tuple[str, Attribute], ...]
    inputs: tuple["Node", ...]
    bodies: tuple["Graph", ...]
    type: Type

    def __getitem__(self, name: str) -> Any:
        """The attribute's value; GraphError if the node has none of that name."""
        for key, value in self.attributes:
            if key == name:
                return value
        raise GraphError(f"{self.op} node{_origin_suffix(self)} has no attribute '{name}'")

    def get_attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or `default`."""
        return next((value for key, value in self.attributes if key == name), default)

    @property
    def tensor_type(self) -> TensorType:
        """The type of a node that is one tensor; GraphError for a tuple."""
        if not isinstance(self.type, TensorType):
            raise GraphError(f"{self.op} node{_origin_suffix(self)} is a tuple, not a tensor")
        return self.type

    @property
    def dtype(self) -> DType:
        return self.tensor_type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor_type.shape

    @property
    def rank(self) -> int:
        return len(self.tensor_type.shape)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"nodes are immutable: cannot set {name!r}")

    def __copy__(self) -> "Node":
        return self

    def __deepcopy__(self, memo: object) -> "Node":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("nodes are not pickled: use format_graph and parse_graph")

    def __repr__(self) -> str:
        return f"<{self.op} : {format_type(self.type)}>"


def format_type(type: Type) -> str:
    """`bf16[tokens, 2048]`, or `(f32[2], i64[2])` for a tuple."""
    if isinstance(type, TensorType):
        return str(type)
    return f"({', '.join(map(format_type, type))}{',' if len(type) == 1 else ''})"


# ---- interning ---------------------------------------------------------------------------------

_table: "WeakValueDictionary[tuple[Any, ...], Node]" = WeakValueDictionary()
_lock = threading.RLock()


def intern_node(
    op: str,
    attributes: Mapping[str, Any] | Iterable[tuple[str, Any]],
    inputs: Iterable[Node],
    bodies: Iterable["Graph"],
    type: Type,
) -> Node:
    """The one node with these parts. Attribute values: int, float, bool, str, bytes, Dim, DType,
    TensorType and tuples (or lists) of these; GraphError for others."""
    items = attributes.items() if isinstance(attributes, Mapping) else attributes
    plain = tuple(
        sorted(((name, _plain(op, name, value)) for name, value in items), key=lambda item: item[0])
    )
    inputs, bodies = tuple(inputs), tuple(bodies)
    key = (op, tuple((name, attribute_key(value)) for name, value in plain), inputs, bodies, type)
    with _lock:
        node = _table.get(key)
        if node is None:
            node = object.__new__(Node)
            for slot, part in zip(_SLOTS, (op, plain, inputs, bodies, type), strict=True):
                object.__setattr__(node, slot, part)
            _table[key] = node
    return node


_SLOTS = ("op", "attributes", "inputs", "bodies", "type")


def _plain(op: str, name: str, value: Any) -> Attribute:
    """The attribute value in the one form that is stored (NumPy scalars and subclasses undone)."""
    if isinstance(value, (bool, str, bytes, Expression, DType, TensorType)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(op, name, each) for each in value)
    if hasattr(value, "__index__"):
        return operator.index(value)
    raise GraphError(f"{op}: attribute '{name}' cannot hold {value!r}")


def attribute_key(value: Attribute) -> Any:
    """What stands for an attribute value in keys: type and bits, so that 0.0, -0.0, 0 and False
    stay apart and a NaN equals itself."""
    if isinstance(value, tuple):
        return tuple(map(attribute_key, value))
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, bool):
        return bool, value
    return value


# ---- graphs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Named inputs to named outputs; two graphs are equal if their names and nodes are the same.

    `inputs` are `input` nodes; `outputs` (name, node) pairs; `updates` (state node, node of its
    new value) pairs; `prelude` (parameter name, graph that makes it from other parameters) pairs.
    """

    name: str
    inputs: tuple[Node, ...]
    outputs: tuple[tuple[str, Node], ...]
    updates: tuple[tuple[Node, Node], ...] = ()
    prelude: tuple[tuple[str, "Graph"], ...] = ()

    def __post_init__(self) -> None:
        for name, pairs in (("outputs", self.outputs), ("updates", self.updates)):
            object.__setattr__(self, name, tuple(tuple(pair) for pair in pairs))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "prelude", tuple(tuple(pair) for pair in self.prelude))

    def nodes(self) -> tuple[Node, ...]:
        """Every node that outputs and updates need, inputs before users, in an order that depends
        on the graph alone. Bodies are not entered."""
        return self._nodes

    @cached_property
    def _nodes(self) -> tuple[Node, ...]:
        roots = [node for _, node in self.outputs]
        for state, value in self.updates:
            roots += (state, value)
        return tuple(walk(roots))

    def users(self) -> dict[Node, list[Node]]:
        """The nodes that read each node, each user once, in the order of `nodes()`."""
        users: dict[Node, list[Node]] = {node: [] for node in (*self.inputs, *self.nodes())}
        for node in self.nodes():
            for each in dict.fromkeys(node.inputs):
                users[each].append(node)
        return users

    def all_nodes(self) -> Iterator[Node]:
        """`nodes()` with the nodes of a node's bodies (of all depths) before the node."""
        for node in self.nodes():
            for body in node.bodies:
                yield from body.all_nodes()
            yield node

    def parameters(self) -> tuple[Node, ...]:
        """Every `parameter` node, those in bodies included, by first use."""
        return tuple(dict.fromkeys(n for n in self.all_nodes() if n.op == "parameter"))

    def states(self) -> tuple[Node, ...]:
        """Every `state` node, those in bodies included, by first use."""
        return tuple(dict.fromkeys(n for n in self.all_nodes() if n.op == "state"))

    def symbols(self) -> tuple[Symbol, ...]:
        """Every symbol in types and attributes, bodies included: inputs first, by first use."""
        found: dict[Symbol, None] = {}
        for node in dict.fromkeys((*self.inputs, *self.all_nodes())):
            for value in (node.type, *(value for _, value in node.attributes)):
                found.update(dict.fromkeys(_symbols_in(value)))
            for body in node.bodies:
                for each in body.inputs:
                    found.update(dict.fromkeys(_symbols_in(each.type)))
        return tuple(found)


def _symbols_in(value: Any) -> list[Symbol]:
    if isinstance(value, Expression):
        return sorted(symbols(value), key=lambda each: each.order)
    if isinstance(value, TensorType):
        value = value.shape
    if isinstance(value, tuple):
        return [symbol for each in value for symbol in _symbols_in(each)]
    return []


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """Everything that the nodes need and the nodes themselves, each once, inputs before users
    (depth first, first input first)."""
    done: set[Node] = set()
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = () if node in done else [each for each in node.inputs if each not in done]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                yield node


# ---- rebuilding --------------------------------------------------------------------------------


def rebuild(graph: Graph, replace: Mapping[Node, Node]) -> Graph:
    """The graph with nodes replaced; their users are made again, with types inferred again.

    Replacements are taken as they are: what they read is not replaced. An input or state of the
    graph that is replaced by another input or state is replaced in `inputs` and `updates` too.
    """
    new: dict[Node, Node] = {}
    for node in _needed(graph):
        if node in replace:
            new[node] = replace[node]
            merge_origins(new[node], node)
        else:
            new[node] = with_inputs(node, tuple(new[each] for each in node.inputs))
    return _with_nodes(graph, new)


def map_graph(graph: Graph, function: Callable[[Node], Node | None]) -> Graph:
    """The graph made again from inputs to outputs: `function` sees each node, its inputs already
    mapped, and returns what stands for it (None: itself). Bodies are not entered."""
    new: dict[Node, Node] = {}
    for node in _needed(graph):
        mapped = with_inputs(node, tuple(new[each] for each in node.inputs))
        new[node] = function(mapped) or mapped
        merge_origins(new[node], node)
    return _with_nodes(graph, new)


def with_inputs(node: Node, inputs: tuple[Node, ...]) -> Node:
    """The same op on other inputs, its type inferred again, its origin kept."""
    if inputs == node.inputs:
        return node
    from llmc.ir import ops  # ops builds on this module

    new = ops.make(node.op, *inputs, bodies=node.bodies, **dict(node.attributes))
    merge_origins(new, node)
    return new


def substitute_symbols(graph: Graph, mapping: Mapping[Any, Dim]) -> Graph:
    """The graph with symbols (keys: the symbol or its name) replaced by dims everywhere, bodies
    included; types are inferred again."""
    from llmc.ir import ops

    new: dict[Node, Node] = {}
    for node in _needed(graph):
        inputs = (new[each] for each in node.inputs)
        bodies = tuple(substitute_symbols(body, mapping) for body in node.bodies)
        attributes = {name: _substitute_value(v, mapping) for name, v in node.attributes}
        new[node] = ops.make(node.op, *inputs, bodies=bodies, **attributes)
        merge_origins(new[node], node)
    return _with_nodes(graph, new)


def _substitute_value(value: Any, mapping: Mapping[Any, Dim]) -> Any:
    if isinstance(value, Expression):
        return substitute(value, mapping)
    if isinstance(value, TensorType):
        return TensorType(value.dtype, tuple(substitute(dim, mapping) for dim in value.shape))
    if isinstance(value, tuple):
        return tuple(_substitute_value(each, mapping) for each in value)
    return value


def _needed(graph: Graph) -> Iterable[Node]:
    return dict.fromkeys((*graph.inputs, *graph.nodes()))


def _with_nodes(graph: Graph, new: Mapping[Node, Node]) -> Graph:
    def leaf(node: Node) -> Node:
        return new[node] if new[node].op == node.op else node

    return Graph(
        graph.name,
        tuple(map(leaf, graph.inputs)),
        tuple((name, new[node]) for name, node in graph.outputs),
        tuple((leaf(state), new[value]) for state, value in graph.updates),
        graph.prelude,
    )


# ---- origins -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node came from: model file, its node there, module path, line of user code."""

    file: str | None = None
    node: str | None = None
    module: str | None = None
    line: str | None = None

    def __str__(self) -> str:
        return ", ".join(part for part in (self.node, self.module, self.line, self.file) if part)


_origins: "WeakKeyDictionary[Node, Origin]" = WeakKeyDictionary()


def origin_of(node: Node) -> Origin | None:
    """Where the node came from, if that is known."""
    return _origins.get(node)


def set_origin(node: Node, origin: Origin) -> Node:
    """Records where the node came from (the last call counts) and returns the node."""
    _origins[node] = origin
    return node


def merge_origins(new: Node, *old: Node) -> None:
    """Gives `new`, unless it has an origin, the first origin that the old nodes have."""
    if new not in _origins:
        origin = next((_origins[each] for each in old if each in _origins), None)
        if origin is not None:
            _origins[new] = origin


def _origin_suffix(node: Node) -> str:
    origin = origin_of(node)
    return f" ({origin})" if origin else ""
