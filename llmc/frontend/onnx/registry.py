"""The table of converters: one small function per ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmc.frontend.onnx.shape_array import ShapeArray
from llmc.ir.graph import Node

if TYPE_CHECKING:
    from llmc.frontend.onnx.call import Call

Value = Node | ShapeArray
Result = Value | Sequence[Value | None]

Function = TypeVar("Function", bound="Callable[[Call], Result]")

AI_ONNX = ""
MICROSOFT = "com.microsoft"
PREVIEW = "ai.onnx.preview"


@dataclass(frozen=True)
class Converter:
    """`function` converts one node; it takes `low` to `high` inputs (high None: any number)."""

    function: Callable[[Call], Result]
    low: int
    high: int | None


CONVERTERS: dict[tuple[str, str], Converter] = {}


def converter(
    *op_types: str, inputs: int | tuple[int, int | None], domain: str = AI_ONNX
) -> Callable[[Function], Function]:
    """Registers a function for operators of a domain; `inputs` is their number, or its range."""
    low, high = inputs if isinstance(inputs, tuple) else (inputs, inputs)

    def register(function: Function) -> Function:
        for op_type in op_types:
            assert (domain, op_type) not in CONVERTERS, op_type
            CONVERTERS[domain, op_type] = Converter(function, low, high)
        return function

    return register
