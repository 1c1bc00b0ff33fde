"""Tensors seen through movement: a shape, strides and an offset over a row-major buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.dims import Dim, known_equal, known_multiple, product
from llmc.ir.graph import Node

MOVEMENT = frozenset({"reshape", "transpose", "slice", "broadcast", "cast"})


@dataclass(frozen=True)
class View:
    """Element (i, j, ...) lies at offset + i * strides[0] + j * strides[1] + ... (elements)."""

    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0

    @classmethod
    def rows(cls, shape: Sequence[Dim]) -> View:
        """The whole of a row-major buffer."""
        strides: list[Dim] = []
        stride: Dim = 1
        for size in reversed(shape):
            strides.append(stride)
            stride = stride * size
        return cls(tuple(shape), tuple(reversed(strides)))

    def transpose(self, permutation: Sequence[int]) -> View:
        return View(tuple(self.shape[axis] for axis in permutation),
                    tuple(self.strides[axis] for axis in permutation), self.offset)

    def slice(self, starts: Sequence[Dim], steps: Sequence[Dim], shape: Sequence[Dim]) -> View:
        offset = self.offset
        for start, stride in zip(starts, self.strides, strict=True):
            offset = offset + start * stride
        strides = tuple(stride * step for stride, step in zip(self.strides, steps, strict=True))
        return View(tuple(shape), strides, offset)

    def broadcast(self, shape: Sequence[Dim]) -> View:
        """NumPy's broadcasting: repeated axes have stride 0."""
        new = len(shape) - len(self.shape)
        strides = [0] * new + [
            0 if known_equal(own, 1) else stride
            for own, stride in zip(self.shape, self.strides, strict=True)]
        return View(tuple(shape), tuple(strides), self.offset)

    def reshape(self, shape: Sequence[Dim]) -> View | None:
        """The same elements in row-major order; None where no strides can say it."""
        old = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True)
               if not known_equal(size, 1)]
        new = [size for size in shape if not known_equal(size, 1)]
        strides: list[Dim] = []
        while new:
            group = _next_group(old, new)
            if group is None:
                return None
            strides.extend(group)
        if old:
            return None
        kept = iter(strides)
        return View(tuple(shape), tuple(0 if known_equal(size, 1) else next(kept)
                                        for size in shape), self.offset)


def _next_group(old: list[tuple[Dim, Dim]], new: list[Dim]) -> list[Dim] | None:
    """Strides of the shortest head of new that holds as many elements as a head of old.

    Both heads are removed. None where the old axes do not follow one another without gaps.
    """
    if not old:
        return None
    size, stride = old.pop(0)
    sizes = [new.pop(0)]
    while not known_equal(size, product(sizes)):
        if old and not known_multiple(size, product(sizes)):
            next_size, next_stride = old.pop(0)
            if not known_equal(stride, next_size * next_stride):
                return None
            size, stride = size * next_size, next_stride
        elif new:
            sizes.append(new.pop(0))
        else:
            return None
    return [product(sizes[i + 1:]) * stride for i in range(len(sizes))]


def source_of(node: Node) -> Node:
    """What a node is movement (or casts) of: the first node on the way that is neither."""
    while node.op in MOVEMENT:
        node = node.inputs[0]
    return node


def view_of(node: Node) -> View | None:
    """How a node reads `source_of(node)`; None for reshapes that would need a copy.

    Casts on the way are passed over: whoever loads converts.
    """
    chain: list[Node] = []
    while node.op in MOVEMENT:
        chain.append(node)
        node = node.inputs[0]
    view: View | None = View.rows(node.shape)
    for step in reversed(chain):
        view = None if view is None else _through(view, step)
    return view


def _through(view: View, node: Node) -> View | None:
    """What a movement node makes of the view of its operand."""
    match node.op:
        case "transpose":
            return view.transpose(node["permutation"])
        case "slice":
            return view.slice(node["starts"], node["steps"], node.shape)
        case "broadcast":
            return view.broadcast(node.shape)
        case "reshape":
            return view.reshape(node.shape)
    return view
