"""Where the keys and values of a query lie, and which of them it sees: pages, packed sequences or
dense batches. Keys are numbered from 0 in their sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmc.codegen import elements
from llmc.codegen.expr import Expression
from llmc.codegen.integers import Index
from llmc.codegen.llvm import I64, i64, ir
from llmc.codegen.nvptx.kernel import WARP, DeviceEmitter
from llmc.ir.dtypes import f32
from llmc.ir.dtypes import i64 as long
from llmc.ir.graph import Node
from llmc.ir.ops import PAGE


class Keys(Protocol):
    """The keys of one query in one head. range: first that is seen, and the end; i64 values that
    all threads of the block agree on."""

    range: tuple[ir.Value, ir.Value]

    def key(self, number: Index, component: Index, lanes: int) -> ir.Value:
        """`lanes` components of a key, in f32."""
        ...

    def value(self, number: Index, component: Index, lanes: int) -> ir.Value:
        """`lanes` components of a value, in f32."""
        ...


def make_keys(node: Node, x: Expression, place: Sequence[Index], kv_head: Index) -> Keys:
    """place: the query's token, or its batch and number."""
    kinds: dict[str, Any] = {"paged_attention": PagedKeys, "packed_attention": PackedKeys,
                             "attention": DenseKeys}
    return kinds[node.op](node, x, place, kv_head)


def visible(x: Expression, node: Node, causal: bool, position: ir.Value, count: ir.Value
            ) -> tuple[ir.Value, ir.Value]:
    """(first, end) of the keys, of `count`, that a query at a position sees."""
    e, window = x.e, node["window"]
    low, high = i64(0), count
    if window:
        low = e.maximum(e.b.sub(position, i64(window - 1)), low)
    if causal or window:
        reach = 1 if causal else window
        high = e.maximum(e.minimum(e.b.add(position, i64(reach)), count), i64(0))
    return low, high


def integer(x: Expression, node: Node, *index: Index) -> ir.Value:
    """An element of an integer tensor as i64."""
    return elements.convert(x.e, x.value(node, index), node.dtype, long)


class _Operands:
    """Keys and values read at an index that a subclass makes."""

    def __init__(self, node: Node, x: Expression):
        self.node, self.x = node, x

    def _load(self, operand: Node, index: Sequence[Index], lanes: int) -> ir.Value:
        value = self.x.value(operand, index, lanes)
        value = elements.broadcast(self.x.e, value, lanes)
        return elements.convert(self.x.e, value, operand.dtype, f32)


class PagedKeys(_Operands):
    """A token sees the cached keys of its sequence up to its own position."""

    def __init__(self, node: Node, x: Expression, place: Sequence[Index], kv_head: Index):
        super().__init__(node, x)
        (token,), self.head = place, kv_head
        _, _, _, self.table, sequence, positions, _ = node.inputs
        self.sequence = x.index(integer(x, sequence, token))
        position = integer(x, positions, token)
        self.range = visible(x, node, True, position, x.e.b.add(position, i64(1)))

    def _place(self, number: Index, component: Index) -> list[Index]:
        page = self.x.index(integer(self.x, self.table, self.sequence, number // PAGE))
        return [page, number % PAGE, self.head, component]

    def key(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[1], self._place(number, component), lanes)

    def value(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[2], self._place(number, component), lanes)


class PackedKeys(_Operands):
    """A token sees tokens of its own sequence, which it has to find in the offsets."""

    def __init__(self, node: Node, x: Expression, place: Sequence[Index], kv_head: Index):
        super().__init__(node, x)
        (token,), self.head, e = place, kv_head, x.e
        offsets = node.inputs[3]
        own = x.emit_index(token)
        sequence = x.index(self._sequence(offsets, own))
        start = integer(x, offsets, sequence)
        count = integer(x, node.inputs[4], sequence) if len(node.inputs) == 5 else \
            e.b.sub(integer(x, offsets, sequence + 1), start)
        self.start = x.index(start)
        self.range = visible(x, node, node["causal"], e.b.sub(own, start), count)

    def _sequence(self, offsets: Node, token: ir.Value) -> ir.Value:
        """How many sequences end at or before the token: counted by a warp."""
        x, e = self.x, self.x.e
        assert isinstance(e, DeviceEmitter)
        lane = e.b.and_(e.thread, i64(WARP - 1))
        ends = x.dim(offsets.shape[0]) - 1
        with x.fold(x.index(lane), ends, [i64(0)], WARP) as (number, (total,), finish):
            end = integer(x, offsets, number + 1)
            before = e.b.zext(e.b.icmp_signed("<=", end, token), I64)
            finish([e.b.add(total, before)])
        return e.across_warp(finish.results[0], e.b.add)

    def key(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[1], [self.start + number, self.head, component], lanes)

    def value(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[2], [self.start + number, self.head, component], lanes)


class DenseKeys(_Operands):
    """[batch, heads, keys, size]; the last query stands at the last key."""

    def __init__(self, node: Node, x: Expression, place: Sequence[Index], kv_head: Index):
        super().__init__(node, x)
        self.batch, query = place
        self.head, e = kv_head, x.e
        count = x.emit_index(x.dim(node.inputs[1].shape[2]))
        shift = e.b.sub(count, x.emit_index(x.dim(node.inputs[0].shape[2])))
        position = e.b.add(x.emit_index(query), shift)
        self.range = visible(x, node, node["causal"], position, count)

    def key(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[1], [self.batch, self.head, number, component], lanes)

    def value(self, number: Index, component: Index, lanes: int) -> ir.Value:
        return self._load(self.node.inputs[2], [self.batch, self.head, number, component], lanes)
