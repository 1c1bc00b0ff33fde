"""One ONNX node while it is converted: its inputs as values, its attributes, node makers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from llmc.errors import ModelError, ValueNeeded
from llmc.frontend.model import StoredTensor
from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.registry import Value
from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.frontend.onnx.symbols import SymbolTable
from llmc.ir.dims import Dim
from llmc.ir.graph import Node, Origin
from llmc.ir.interpret import evaluate_constant

Inline = Callable[..., list[Value]]


def no_graphs(graph: Any, arguments: Sequence[Value], turn: int | None = None) -> list[Value]:
    """For calls outside an import: nothing there has graphs as attributes."""
    raise ModelError("a graph as attribute needs the importer")


class Call(Builder):
    """What a converter gets. `version` is the opset of the node's domain.

    `inputs` has None for an input that is left out; `attributes` plain Python values (bytes as
    str, tensors as TensorProto, graphs as GraphProto); `inline(graph, arguments, turn)` gives the
    outputs of a graph that is an attribute (`turn`: number of a loop's turn). `keys` name the
    inputs, and `values` has what is known of tensors that depend on data, by key (see
    `ValueNeeded`); `stored` has the weights by name. `declared_shape(index)` is what the
    model declares for an output of its own that this node makes.
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
        self.declared_shape: Callable[[int], list[Dim | None] | None] = lambda index: None
        self.keys: list[str] = []
        self.values: Mapping[str, np.ndarray[Any, Any]] = {}
        self.stored: Mapping[str, StoredTensor] = {}

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
        return [int(item) for item in self.known(index, what).reshape(-1)]

    def integers(self, index: int, what: str) -> list[int]:
        """As `dims`, where no symbol may occur."""
        return [int(item) for item in self.known(index, what).reshape(-1)]

    def known(self, index: int, what: str) -> np.ndarray[Any, Any]:
        """The value of an input that decides shapes. ValueNeeded if it depends on data."""
        value = self.value(index)
        array = self.constant_of(value)
        if array is None:
            raise self._needed(self.keys[index], self.tensor(value), what)
        return array

    def measured(self, label: str, node: Node) -> np.ndarray[Any, Any]:
        """The value of a node that the converter made, such as a count; `label` tells several
        apart. ValueNeeded if it depends on data and is not known yet."""
        array = self.constant_of(node)
        if array is not None:
            return array
        key = f"{self.origin.node if self.origin else ''}#{label}"
        if key not in self.values:
            raise self._needed(key, node, label)
        return np.asarray(self.values[key])

    def constant_of(self, value: Value) -> np.ndarray[Any, Any] | None:
        """What is known at compile time, a weight too; None of what depends on more."""
        if isinstance(value, ShapeArray):
            return value.known()
        if value.op == "parameter" and value["name"] in self.stored:
            return self.stored[value["name"]].read()
        return evaluate_constant(value)

    def _needed(self, key: str, node: Node, what: str) -> ValueNeeded:
        """The value of a graph input is known by that input's name."""
        text = (f"{what} depends on data; no artifact holds such a model: an InferenceSession and"
                " `llmc run` compile it for what arrives")
        return ValueNeeded(str(self.error(text)), node["name"] if node.op == "input" else key, node)

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
