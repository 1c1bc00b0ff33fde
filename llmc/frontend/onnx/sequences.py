"""Sequences and optionals: lists that exist while a model is imported, and no longer.

How many items a sequence has decides the graph, as a size that depends on data does: a model's
input that is a sequence becomes an input for each item, and what it holds is a value that the
import needs; an output becomes one for each item (`ir.listed` has their names).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from onnx import TypeProto

from llmc.errors import ModelError, ValueNeeded
from llmc.frontend.onnx import shape_array
from llmc.frontend.onnx.builder import Builder
from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.protobuf import element_dtype
from llmc.frontend.onnx.registry import Result, Value, converter
from llmc.frontend.onnx.turns import known_extent
from llmc.ir.dims import Dim
from llmc.ir.dtypes import bool_, i64
from llmc.ir.graph import Node, TensorType
from llmc.ir.listed import ITEMS, NOTHING, described_shapes
from llmc.ir.ops import make


@dataclass(frozen=True, eq=False)
class SequenceValue:
    """The items of a sequence; None for an optional without element."""

    items: tuple[Value, ...] | None


def sequence(items: Sequence[Value] | None) -> Value:
    """A sequence as a value: converters take it from `items_of` only."""
    return cast(Value, SequenceValue(None if items is None else tuple(items)))


def items_of(call: Call, index: int) -> list[Value]:
    """The items of an input that is a sequence."""
    value: Any = call.value(index)
    if not isinstance(value, SequenceValue) or value.items is None:
        raise call.error(f"input {index} is no sequence")
    return list(value.items)


# ---- inputs and outputs of a model ---------------------------------------------------------------


def is_tensor(kind: TypeProto) -> bool:
    return bool(kind.HasField("tensor_type"))


def sequence_input(
    name: str, kind: TypeProto, values: Any, location: str
) -> tuple[list[Node], Value]:
    """(the inputs that its items are, the value) of an input that is a sequence or optional.

    ValueNeeded until `values` says what it holds.
    """
    optional = kind.HasField("optional_type")
    inner = kind.optional_type.elem_type if optional else kind
    listed = inner.HasField("sequence_type")
    element = inner.sequence_type.elem_type if listed else inner
    if not is_tensor(element):
        raise ModelError(f"{location}: it must be a sequence of tensors")
    dtype = element_dtype(element.tensor_type.elem_type, location)
    key = name + ITEMS
    if key not in values:
        text = f"{location}: what it holds decides the program; give it to an InferenceSession"
        raise ValueNeeded(text, key, make("input", name=key, type=TensorType(i64, (1,))))
    shapes = described_shapes(values[key])
    if shapes is None:
        return [], sequence(None)
    nodes = [make("input", name=f"{name}.{number}", type=TensorType(dtype, shape))
             for number, shape in enumerate(shapes)]
    return nodes, sequence(nodes) if listed else nodes[0]


def outputs_of(builder: Builder, name: str, value: Any) -> list[tuple[str, Node]]:
    """The graph's outputs for an output of the model."""
    if not isinstance(value, SequenceValue):
        return [(name, builder.tensor(value))]
    if value.items is None:
        return [(name + ITEMS, builder.scalar(NOTHING, i64))]
    items = [(f"{name}.{n}", builder.tensor(item)) for n, item in enumerate(value.items)]
    return [(name + ITEMS, builder.scalar(len(items), i64)), *items]


# ---- sequences -----------------------------------------------------------------------------------


@converter("SequenceEmpty", inputs=0)
def sequence_empty(call: Call) -> Result:
    return sequence([])


@converter("SequenceConstruct", inputs=(1, None))
def sequence_construct(call: Call) -> Result:
    return sequence([call.value(index) for index in range(len(call.inputs))])


def place(call: Call, index: int, count: int) -> int:
    """A position input, counted from either end, within 0..count - 1."""
    (position,) = call.integers(index, "the position")
    if not -count <= position < count:
        raise call.error(f"position {position} in a sequence of {count}")
    return position % count


@converter("SequenceAt", inputs=2)
def sequence_at(call: Call) -> Result:
    items = items_of(call, 0)
    return items[place(call, 1, len(items))]


@converter("SequenceInsert", inputs=(2, 3))
def sequence_insert(call: Call) -> Result:
    """Before a position; at the end by default."""
    items = items_of(call, 0)
    position = len(items)
    if call.has(2):
        (given,) = call.integers(2, "the position")
        if not -len(items) <= given <= len(items):
            raise call.error(f"position {given} in a sequence of {len(items)}")
        position = given if given >= 0 else given + len(items)
    items.insert(position, call.value(1))
    return sequence(items)


@converter("SequenceErase", inputs=(1, 2))
def sequence_erase(call: Call) -> Result:
    items = items_of(call, 0)
    if not items:
        raise call.error("nothing to erase: the sequence is empty")
    del items[place(call, 1, len(items)) if call.has(1) else -1]
    return sequence(items)


@converter("SequenceLength", inputs=1)
def sequence_length(call: Call) -> Result:
    return shape_array.scalar(len(items_of(call, 0)))


@converter("SplitToSequence", inputs=(1, 2))
def split_to_sequence(call: Call) -> Result:
    """Parts of the sizes in `split`, or all of that size but the last; of size 1 by default."""
    x = call.input(0)
    axis = call.axis(call.attribute("axis", 0), x.rank)
    extent: Dim = x.shape[axis]
    if call.has(1) and len(call.value(1).shape) == 1:
        sizes: list[Dim] = call.dims(1, "split")
    else:
        (size,) = call.integers(1, "split") if call.has(1) else (1,)
        if size < 1:
            raise call.error(f"split={size}")
        length = known_extent(call, extent, "size of the split axis")
        sizes = [min(size, length - start) for start in range(0, length, size)]
    total: Dim = 0
    for part in sizes:
        total = total + part
    call.require_equal(total, extent, "sizes of the parts")
    parts = call.split(x, axis, sizes)
    if not call.has(1) and not call.attribute("keepdims", 1):
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        parts = [call.reshape(each, shape) for each in parts]
    return sequence(parts)


@converter("ConcatFromSequence", inputs=1)
def concat_from_sequence(call: Call) -> Result:
    items = [call.tensor(item) for item in items_of(call, 0)]
    if not items:
        raise call.error("nothing to join: the sequence is empty")
    new_axis = bool(call.attribute("new_axis", 0))
    axis = call.axis(call.required("axis"), items[0].rank + new_axis)
    if new_axis:
        items = [call.unsqueeze(item, [axis]) for item in items]
    return call.concat(items, axis)


@converter("SequenceMap", inputs=(1, None))
def sequence_map(call: Call) -> Result:
    """The body for each item of the first sequence, with the items of the others or with tensors
    that are the same for all."""
    count = len(items_of(call, 0))
    given: list[Any] = [call.value(index) for index in range(len(call.inputs))]
    rows = []
    for number in range(count):
        arguments = [each.items[number] if isinstance(each, SequenceValue) and each.items else each
                     for each in given]
        rows.append(call.inline(call.required("body"), arguments, number))
    columns = zip(*rows, strict=True) if rows else [()] * len(call.node.output)
    return [sequence(list(column)) for column in columns]


# ---- optionals -----------------------------------------------------------------------------------


@converter("Optional", inputs=(0, 1))
def optional(call: Call) -> Result:
    return call.value(0) if call.has(0) else sequence(None)


def is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, SequenceValue) and value.items is None)


@converter("OptionalHasElement", inputs=(0, 1))
def optional_has_element(call: Call) -> Result:
    value = call.inputs[0] if call.inputs else None
    return shape_array.scalar(not is_nothing(value), bool_)


@converter("OptionalGetElement", inputs=1)
def optional_get_element(call: Call) -> Result:
    value = call.value(0)
    if is_nothing(value):
        raise call.error("the optional has no element")
    return value

