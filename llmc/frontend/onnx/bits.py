"""Operators on the bits of integers."""

from __future__ import annotations

from llmc.frontend.onnx.call import Call
from llmc.frontend.onnx.registry import Result, converter

BITWISE = {"BitwiseAnd": "and", "BitwiseOr": "or", "BitwiseXor": "xor"}
SHIFTS = {"LEFT": "shift_left", "RIGHT": "shift_right"}


@converter(*BITWISE, inputs=2)
def bitwise(call: Call) -> Result:
    return call.binary(BITWISE[call.op_type], call.input(0), call.input(1))


@converter("BitwiseNot", inputs=1)
def bitwise_not(call: Call) -> Result:
    return call.unary("not", call.input(0))


@converter("BitShift", inputs=2)
def bit_shift(call: Call) -> Result:
    direction = call.required("direction")
    if direction not in SHIFTS:
        raise call.error(f"direction={direction!r} is neither 'LEFT' nor 'RIGHT'")
    return call.binary(SHIFTS[direction], call.input(0), call.input(1))
