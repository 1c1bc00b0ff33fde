"""The lowered form of one graph for one target and shape key: buffers, and stages in order.

Text form: `format_program` and `parse_program` are inverses; compile processes are fed with it.
`llmc.ir.summary.summarize` is the short form for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llmc.errors import CompileError
from llmc.ir.dims import Dim
from llmc.ir.dtypes import DType
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import Layout, Rows

GROUPED_MATMUL = "grouped_matmul"  # of targets that multiply rows by the matrix of their group
QUANTIZED_MATMUL = "quantized_matmul"  # among the kernels of targets whose matmul reads codes
INTEGER_MATMUL = "integer_matmul"  # of targets whose matmul multiplies integers by packed weights


@dataclass(frozen=True)
class Capabilities:
    """What lowering may ask of a target; equal capabilities give equal weight layouts and step ABI.

    vector_lanes      f32 lanes of a vector register
    matmul_rows       rows of the matmul micro-kernel's tile
    panel_columns     columns of a packed weight's panel
    few_rows          up to so many rows, a matmul streams weights and computes its own prologue
    bf16_dot          bf16 x bf16 dot products are the fastest: bf16 activations are packed as bf16
    kernels           composite and special ops that have a kernel; others are decomposed.
                      QUANTIZED_MATMUL: matmul reads quantised weights as codes;
                      INTEGER_MATMUL: it multiplies integers by weights of integers
    weight_layout     "panels", or "columns": weights column by column, the activations of products
                      in plain rows (computed by a stage of their own), both caches as ValuePages
    byte_dot          by what products of four bytes are added up in 32 bits: "vnni" (unsigned x
                      signed), "maddubs" (the same by pairs, in 16 bits), "sdot" (signed x signed),
                      or "": there is no kernel for activations as int8 codes
    """

    name: str
    vector_lanes: int
    matmul_rows: int
    panel_columns: int
    few_rows: int
    bf16_dot: bool
    kernels: frozenset[str]
    weight_layout: str = "panels"
    byte_dot: str = ""

    def interleave(self, dtype: DType) -> int:
        """How many consecutive k of a packed weight fill a 32-bit lane; 1 for f16, whose conversion
        to f32 wants the columns side by side."""
        return 1 if dtype.name == "f16" else max(1, 32 // dtype.bits)

    def packed_activation(self, weight: DType, activation: DType) -> str:
        """Name of the dtype in which a matmul wants its packed left operand."""
        if weight.is_integer and activation.is_integer:
            whole = weight.name == "i8" and activation.name == self.byte_activation
            return self.byte_activation if whole else "i16"
        if weight.name == "f64" or activation.name == "f64":
            return "f64"
        if self.weight_layout == "columns":  # both operands alike, as tensor cores take them
            return weight.name
        return "bf16" if self.bf16_dot and weight.name == "bf16" else "f32"


    @property
    def byte_activation(self) -> str:
        """Name of the dtype of left bytes whose products by signed ones are added up four at a time
        in one instruction; "" where there is none."""
        return {"vnni": "u8", "sdot": "i8"}.get(self.byte_dot, "")

    def code_offset(self, codes: DType) -> int:
        """How much more than a weight's code the byte is that byte_dot multiplies."""
        if codes.bits < 8:
            return 1 << codes.bits - 1 if codes.kind == "int" else 0
        if self.byte_dot == "vnni":
            return 128 if codes.kind == "int" else 0
        return 0 if codes.kind == "int" else -128


@dataclass(frozen=True)
class Buffer:
    """Memory of one tensor. role: input, output, weight, state or arena.

    count > 1: one copy per turn of the repeat, each reached through the pointer table.
    offset: bytes into the arena, a multiple of 64; None for the other roles.
    """

    name: str
    type: TensorType
    role: str
    layout: Layout = field(default_factory=Rows)
    count: int = 1
    offset: Dim | None = None

    def elements(self) -> Dim:
        return self.layout.elements(self.type.shape)

    @property
    def packed(self) -> bool:
        """Whether elements of 2 and 4 bits share bytes: only what nobody writes does that, which is
        weights, and all that lies in a layout of weights."""
        weight = self.role == "weight" or self.layout != Rows()
        return weight and self.type.dtype.bits < 8

    def bytes(self) -> Dim:
        """Size in bytes of one copy."""
        bits = self.type.dtype.bits if self.packed else max(8, self.type.dtype.bits)
        return (self.elements() * bits + 7) // 8


@dataclass(frozen=True)
class Weight:
    """How a packed weight is made: an expression of parameters, evaluated and packed once per copy.

    names: for each copy, parameter name in the expression -> name in the model's files.
    """

    buffer: str
    expression: Graph
    names: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class Stage:
    """One kernel over a grid of tiles. Body inputs stand for operands, body outputs for results."""

    name: str
    kind: str
    body: Graph
    operands: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """Stages that run `count` times; `layer` is the number of the turn."""

    count: int
    stages: tuple[Stage, ...]


Step = Stage | Loop


@dataclass(frozen=True)
class Program:
    """buffers and weights in ABI order. symbols: name -> (low, high), the shape key, in ABI order;
    a symbol whose low equals its high does not occur in any type any more."""

    name: str
    capabilities: Capabilities
    symbols: tuple[tuple[str, int, int], ...]
    buffers: Mapping[str, Buffer]
    weights: Mapping[str, Weight]
    steps: tuple[Step, ...]
    arena_bytes: Dim

    def with_role(self, role: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers.values() if buffer.role == role]

    def stages(self) -> Iterator[Stage]:
        """Every stage once, in order, those of loops included."""
        for step in self.steps:
            yield from step.stages if isinstance(step, Loop) else (step,)

    def slots(self, role: str) -> dict[str, int]:
        """First index of each buffer of a role in the ABI's pointer table."""
        slots, next_slot = {}, 0
        for buffer in self.with_role(role):
            slots[buffer.name] = next_slot
            next_slot += buffer.count
        return slots

    def covers(self, shape: Mapping[str, int]) -> bool:
        """Whether the code for this key may run at these values of the symbols."""
        return all(low <= shape[name] <= high for name, low, high in self.symbols)


def unsupported(stage: Stage, reason: str) -> CompileError:
    """The error of a kernel that cannot compute a stage's body."""
    return CompileError(f"stage {stage.name} ({stage.kind}): {reason}")
