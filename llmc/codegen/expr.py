"""Values of a body graph at an index: the expression emitter of all kernels and targets.

`Expression.value(node, index, lanes)` pulls: it emits what is needed to know `lanes` elements of a
node along its last axis, starting at `index`, and nothing else. Elementwise ops work on registers,
movement ops only change the index, operands are loaded, reductions become loops. Whatever does not
depend on an inner loop's index is emitted before that loop, once.

An Expression belongs to the place where it was made. Loops inside it are opened with its own `fold`
or `loop`; after any other change of control flow, take a `fresh()` one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any, Protocol

import llvmlite.ir as ir

from llmc.codegen import elements, movement, reductions
from llmc.codegen.elementwise import ELEMENTWISE, gelu
from llmc.codegen.host.kernel import Frame
from llmc.codegen.integers import Index, Integer, depth_of, multiple_of
from llmc.codegen.leaves import LEAVES
from llmc.codegen.llvm import Emitter, i32, lanes_of
from llmc.codegen.scopes import Scopes
from llmc.errors import CompileError
from llmc.ir.dims import Dim, bounds, known_multiple
from llmc.ir.dims import Expression as DimExpression
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, Node
from llmc.ir.layouts import Rows, ValuePages
from llmc.ir.program import Buffer

MOST_ALIGNMENT = 16  # bytes: no access is wider where alignment matters

Source = Callable[[tuple[Index, ...], int, "ir.Value | None"], ir.Value]
Key = tuple[Node, tuple[Index, ...], int, Any]


class Group(Protocol):
    """Threads that run an expression side by side, and reduce a row together."""

    count: int
    index: ir.Value  # i64, this thread's number

    def across(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]
               ) -> ir.Value:
        """The combination of all threads' values (scalars), in each of them."""
        ...


class Expression:
    """sources: for a node, the buffer that holds it or a function (index, lanes, mask) -> register
    value, which stands for the node from then on (any node, not only inputs).

    lanes: vector width that loops over reduced axes use. mask: `<lanes x i1>`, for loads beyond the
    end of an axis; the value of masked lanes is undefined. group: threads that come to the place
    where the expression was made together, and leave its loops only together.
    """

    def __init__(self, e: Emitter, frame: Frame, sources: Mapping[Node, Buffer | Source],
                 lanes: int = 1, group: Group | None = None):
        self.e = e
        self.group = group
        self.frame = frame
        self.lanes = lanes
        self.scopes = Scopes(e)
        self._sources: dict[Node, Buffer | Source] = dict(sources)
        self._bound_at: dict[Node, int] = {}
        self._floors: dict[Node, int] = {}
        self._decomposed: dict[Node, Node] = {}

    def fresh(self) -> Expression:
        """The same sources, for another place: nothing emitted so far is reused."""
        return Expression(self.e, self.frame, self._sources, self.lanes)

    def bind(self, node: Node, source: Source) -> None:
        """Let a function give a node's values; it is called in this scope or a deeper one."""
        self._sources[node] = source
        self._bound_at[node] = self.scopes.depth
        self._floors.clear()

    # ---- indices ----------------------------------------------------------------------------

    def index(self, value: int | ir.Value | Integer) -> Index:
        """An i64 LLVM value (known here) or int as an index."""
        if isinstance(value, ir.Value):
            return self.scopes.integers.leaf(value, self.scopes.depth)
        return value

    def dim(self, dim: Dim) -> Index:
        """A dim as an index; its bound and multiple are known to later simplification."""
        if not isinstance(dim, DimExpression):
            return dim
        multiple = next((n for n in (64, 32, 16, 8, 4, 2) if known_multiple(dim, n)), 1)
        return self.scopes.integers.leaf(self.frame.dim(dim), 0, multiple, bounds(dim)[1])

    def less(self, a: Index, b: Index) -> ir.Value:
        """a < b as an i1."""
        return self.e.b.icmp_signed("<", self.scopes.emit(a), self.scopes.emit(b))

    def emit_index(self, index: Index) -> ir.Value:
        """An index as an i64 LLVM value."""
        return self.scopes.emit(index)

    @contextmanager
    def loop(self, start: Index, stop: Index, step: int = 1) -> Iterator[Integer]:
        """`for i in range(start, stop, step)`; values that do not need i are emitted before it."""
        with self.scopes.fold(start, stop, [], step) as (index, _, _):
            yield index

    def fold(self, start: Index, stop: Index, initial: list[ir.Value], step: int = 1) -> Any:
        """A loop that carries registers: see `Scopes.fold`."""
        return self.scopes.fold(start, stop, initial, step)

    # ---- values -----------------------------------------------------------------------------

    def value(self, node: Node, index: Sequence[int | ir.Value | Integer], lanes: int = 1,
              mask: ir.Value | None = None) -> ir.Value:
        """`lanes` elements of node along its last axis from index on, in register form.

        index: one per axis of the node. Chains of elementwise ops are walked without recursion.
        """
        wanted: Key = (node, tuple(self.index(i) for i in index), lanes, mask)
        pending = [wanted]
        while pending:
            key = pending[-1]
            if self._known(key) is not None:
                pending.pop()
                continue
            missing = [other for other in self._operands(key) if self._known(other) is None]
            if missing:
                pending += missing
            else:
                self._emit(pending.pop())
        return self._known(wanted)

    def _known(self, key: Key) -> ir.Value | None:
        return self.scopes.find(key, self._depth(key))

    def _depth(self, key: Key) -> int:
        """The outermost scope in which a value is known."""
        node, index, _, mask = key
        if mask is not None:
            return self.scopes.depth
        return max([self._floor(node), *map(depth_of, index)])

    def value_depth(self, node: Node, index: Sequence[Index]) -> int:
        """The scope in which `value(node, index)` is emitted."""
        return self.scopes.place(self._depth((node, tuple(index), 1, None)))

    def is_source(self, node: Node) -> bool:
        """Whether a node is read or bound rather than computed."""
        return node in self._sources

    def _floor(self, node: Node) -> int:
        """The scope of the innermost bound node that a node depends on."""
        if not self._bound_at:
            return 0
        pending = [node]
        while pending:
            top = pending[-1]
            sources = [] if top in self._sources else top.inputs
            missing = [source for source in sources if source not in self._floors]
            if missing:
                pending += missing
            else:
                own = self._bound_at.get(top, 0)
                self._floors[top] = max([own, *(self._floors[source] for source in sources)])
                pending.pop()
        return self._floors[node]

    def _operands(self, key: Key) -> list[Key]:
        """The values that an elementwise op needs; none for other nodes (they recurse)."""
        node, index, lanes, mask = key
        if node in self._sources or not is_elementwise(node):
            return []
        return [self.operand(source, node, index, lanes, mask) for source in node.inputs]

    def operand(self, source: Node, node: Node, index: tuple[Index, ...], lanes: int,
                mask: ir.Value | None) -> Key:
        """The value of source that node's value at index needs, by NumPy broadcasting."""
        own = index[node.rank - source.rank:]
        mapped = tuple(0 if size == 1 else i for size, i in zip(source.shape, own, strict=True))
        if source.rank == 0 or (source.shape[-1] == 1 and node.shape[-1] != 1):
            lanes, mask = 1, None
        return (source, mapped, lanes, mask)

    def _emit(self, key: Key) -> None:
        depth = self.scopes.place(self._depth(key))
        with self.scopes.at(depth):
            value = self._evaluate(*key)
        self.scopes.keep(key, depth, value)

    def _evaluate(self, node: Node, index: tuple[Index, ...], lanes: int,
                  mask: ir.Value | None) -> ir.Value:
        source = self._sources.get(node)
        if isinstance(source, Buffer):
            return self.load(source, index, lanes, mask)
        if source is not None:
            return source(index, lanes, mask)
        if is_elementwise(node):
            operands = self._operands((node, index, lanes, mask))
            values = [self._known(operand) for operand in operands]
            return self._apply(node, values, lanes)
        for table in (LEAVES, movement.MOVEMENT, reductions.REDUCTIONS):
            if node.op in table:
                return table[node.op](self, node, index, lanes, mask)
        return self.value(self._decompose(node), index, lanes, mask)

    def _decompose(self, node: Node) -> Node:
        if node not in self._decomposed:
            self._decomposed[node] = decompose(node)
        return self._decomposed[node]

    def _apply(self, node: Node, values: Sequence[ir.Value], lanes: int) -> ir.Value:
        """An elementwise op on operands' register values."""
        lanes = max([lanes, *(lanes_of(value) for value in values)])
        values = [elements.broadcast(self.e, value, lanes) for value in values]
        dtypes = [source.dtype for source in node.inputs]
        if node.op == "cast":
            return elements.convert(self.e, values[0], dtypes[0], node.dtype)
        if node.op == "bitcast":
            return elements.reinterpret(self.e, values[0], dtypes[0], node.dtype)
        if node.op == "where":
            return self.e.b.select(*values)
        if node.op == "gelu":
            return gelu(self.e, values[0], node["approximate"])
        return ELEMENTWISE[node.op](self.e, dtypes[0], *values)

    def per_lane(self, node: Node, index: tuple[Index, ...], lanes: int,
                 mask: ir.Value | None) -> ir.Value:
        """A vector of elements that do not lie side by side: each by itself."""
        end = self.dim(node.shape[-1])
        values = []
        for lane in range(lanes):
            last = index[-1] + lane
            if mask is not None:
                last = self.scopes.integers.minimum(last, end - 1)
            values.append(self.value(node, (*index[:-1], last)))
        return elements.collect(self.e, values)

    def unsupported(self, node: Node, reason: str) -> CompileError:
        """The error of a node that host code cannot compute."""
        return CompileError(f"host code cannot compute {node.op} : {node.type}: {reason}")

    # ---- memory -----------------------------------------------------------------------------

    def load(self, buffer: Buffer, index: tuple[Index, ...], lanes: int,
             mask: ir.Value | None) -> ir.Value:
        """Elements of a buffer, by its layout."""
        dtype = buffer.type.dtype
        if lanes == 1 or is_contiguous(buffer):
            place = self.address(buffer, index)
            base = self.frame.pointer(buffer)
            return elements.load(self.e, base, self.scopes.emit(place), dtype, lanes, mask,
                                 self._alignment(place, dtype), buffer.packed)
        values = [self.load(buffer, (*index[:-1], index[-1] + lane), 1, None)
                  for lane in range(lanes)]
        return elements.collect(self.e, values)

    def _alignment(self, place: Index, dtype: DType) -> int | None:
        """Bytes that an element's address is known to be a multiple of, at most 16."""
        size = max(1, dtype.bits // 8)
        known = gcd(multiple_of(place) * size, self.frame.alignment, MOST_ALIGNMENT)
        return known if known > size else None

    def address(self, buffer: Buffer, index: Sequence[Index]) -> Index:
        """Position of an element in its buffer, in elements."""
        shape = [self.dim(size) for size in buffer.type.shape]
        return buffer.layout.address(shape, list(index))

    def store(self, buffer: Buffer, index: Sequence[Index], value: ir.Value,
              mask: ir.Value | None = None) -> None:
        """Store register values to a buffer, rounded to its dtype, from index on along the last
        axis."""
        dtype = buffer.type.dtype
        base = self.frame.pointer(buffer)
        lanes = lanes_of(value)
        if lanes == 1 or is_contiguous(buffer):
            address = self.address(buffer, index)
            elements.store(self.e, value, base, self.scopes.emit(address), dtype, mask,
                           self._alignment(address, dtype))
            return
        encoded = elements.encode(self.e, value, dtype)
        for lane in range(lanes):
            with self._if_lane(mask, lane):
                place = self.scopes.emit(self.address(buffer, (*index[:-1], index[-1] + lane)))
                pointer = self.e.offset(base, place, elements.memory_type(dtype))
                self.e.store(self.e.b.extract_element(encoded, i32(lane)), pointer)

    @contextmanager
    def _if_lane(self, mask: ir.Value | None, lane: int) -> Iterator[None]:
        if mask is None:
            yield
            return
        with self.e.b.if_then(self.e.b.extract_element(mask, i32(lane))), self.scopes.branch(0):
            yield


def is_elementwise(node: Node) -> bool:
    """Whether a node's element depends on the same element of its (broadcast) inputs only."""
    return node.op in ELEMENTWISE or node.op in ("cast", "bitcast", "where", "gelu")


def is_contiguous(buffer: Buffer) -> bool:
    """Whether elements along the last axis lie side by side."""
    return isinstance(buffer.layout, (Rows, ValuePages))


def decompose(node: Node) -> Node:
    """A composite op as simpler ones; CompileError if it has no decomposition."""
    from llmc.ir.ops import OPS

    op = OPS.get(node.op)
    if op is None or op.decompose is None:
        raise CompileError(f"host code cannot compute {node.op} : {node.type}")
    return op.decompose(node)


def operand_sources(body: Graph, operands: Sequence[str],
                    buffers: Mapping[str, Buffer]) -> dict[Node, Buffer | Source]:
    """Body inputs -> the buffers that hold them."""
    return {node: buffers[name] for node, name in zip(body.inputs, operands, strict=True)}
