"""A plan: programs and host-side functions in order, over values that go by names.

What only a host can compute (text) is a function of Python; everything else is a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HostStep:
    """A function of the host (`runtime.host_functions` has them by `op`). An input that is left out
    is ""; attributes are plain values and arrays."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ProgramStep:
    """A model (the bytes of an .onnx file) that is compiled once its inputs' types are known."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """`constants`: values that no step computes; `outputs`: what the plan gives."""

    steps: tuple[HostStep | ProgramStep, ...]
    constants: dict[str, Any]
    outputs: tuple[str, ...]
