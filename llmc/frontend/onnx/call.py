"""One ONNX node while it is converted: its inputs as values, its attributes, node makers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from llmc.errors import ModelError
from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.registry import Value
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.symbols import SymbolTable
from llmc.ir.dims import Dim, Expression
from llmc.ir.graph import Node, Origin

Inline = Callable[[Any, Sequence[Value]], list[Value]]


def no_graphs(graph: Any, arguments: Sequence[Value]) -> list[Value]:
    """For calls outside an import: nothing there has graphs as attributes."""
    raise ModelError("a graph as attribute needs the importer")


class Call(Builder):
    """What a converter gets. `version` is the opset of the node's domain.

    `inputs` has None for an input that is left out; `attributes` plain Python values (bytes as
    str, tensors as TensorProto, graphs as GraphProto); `inline(graph, arguments)` gives the
    outputs of a graph that is an attribute.
    """

    def __init__(
        self,
        symbols: SymbolTable,
        location: str,
        origin: Origin,
        node: NodeProto,
        version: int,
        inputs: Sequence[Value | None],
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(symbols, location, origin)
        self.node = node
        self.version = version
        self.inputs = list(inputs)
        self.attributes = attributes
        self.inline: Inline = no_graphs

    @property
    def op_type(self) -> str:
        return str(self.node.op_type)

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """An input that must be given."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise self.error(f"input {index} is missing")
        return value

    def input(self, index: int) -> Node:
        """An input as a tensor."""
        return self.tensor(self.value(index))

    def optional(self, index: int) -> Node | None:
        """An input as a tensor, None if left out."""
        return self.input(index) if self.has(index) else None

    def shape_array(self, index: int) -> ShapeArray | None:
        """An input if it is known at compile time."""
        value = self.inputs[index] if index < len(self.inputs) else None
        return value if isinstance(value, ShapeArray) else None

    def shape_arrays(self) -> list[ShapeArray] | None:
        """All inputs if all are known at compile time."""
        arrays = [value for value in self.inputs if isinstance(value, ShapeArray)]
        return arrays if len(arrays) == len(self.inputs) else None

    def dims(self, index: int, what: str) -> list[Dim]:
        """An input that has to be known at compile time, as a list of dims."""
        value = self.value(index)
        if isinstance(value, ShapeArray):
            return value.flat()
        if value.op != "constant":
            raise self.error(f"{what} depends on data; only shapes and constants are supported")
        return [int(item) for item in np.frombuffer(value["data"], value.dtype.numpy)]

    def integers(self, index: int, what: str) -> list[int]:
        """As `dims`, where no symbol may occur."""
        items = self.dims(index, what)
        if any(isinstance(item, Expression) for item in items):
            raise self.error(f"{what} must be constant, not [{', '.join(map(str, items))}]")
        return [int(item) for item in items]  # type: ignore[arg-type]

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def required(self, name: str) -> Any:
        """An attribute without default."""
        if name not in self.attributes:
            raise self.error(f"attribute '{name}' is missing")
        return self.attributes[name]

    def refuse(self, name: str, *accepted: Any) -> None:
        """ModelError if an attribute is given with another value than these."""
        if name in self.attributes and self.attributes[name] not in accepted:
            raise self.error(f"{name}={self.attributes[name]!r} is not supported")

    def axes(self, rank: int, position: int, since: int) -> list[int] | None:
        """Axes from the attribute (before opset `since`) or the input at `position`; None if not
        given. Sorted, non-negative, without repetition."""
        if self.version >= since:
            given = self.integers(position, "axes") if self.has(position) else None
        else:
            given = self.attribute("axes")
        if given is None:
            return None
        axes = sorted(self.axis(int(axis), rank) for axis in given)
        if len(set(axes)) != len(axes):
            raise self.error(f"axes {list(given)} repeat")
        return axes
