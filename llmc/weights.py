"""A program's weights: evaluated, quantised, packed, and written to a file, tensor by tensor."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from llmc import knobs
from llmc.errors import CompileError
from llmc.frontend.model import ImportedModel
from llmc.ir import interpret
from llmc.ir.dims import Dim
from llmc.ir.dtypes import from_numpy
from llmc.ir.graph import Graph, Node, rebuild, walk
from llmc.ir.layouts import Layout, format_layout, pack
from llmc.ir.ops import make
from llmc.ir.program import Buffer, Program, Weight
from llmc.passes.names import result_name
from llmc.quantizer import QuantizedMatrix, Quantizer
from llmc.runtime.artifact import ALIGNMENT, QuantizedInfo, WeightInfo
from llmc.runtime.progress import Progress

HUGE_PAGE = 2 << 20  # bytes, of x86-64 and of AArch64 with small pages of 4 KiB
Names = tuple[tuple[str, str], ...]  # parameter in an expression -> in the model's files


def place(size: int, count: int) -> int:
    """Offset at which the next `count` bytes of weights go, after `size` bytes: a page or more
    begins on a page, less on a cache line."""
    return size + -size % (ALIGNMENT if count >= ALIGNMENT else 64)


class WeightFile:
    """Appends packed weights to a file, aligned and hashed. A thread of its own writes, so that
    writing one tensor and packing the next overlap.

    It writes whole huge pages: where the system's page cache can hold such, weights are mapped by
    them, and streamed without waiting for the tables of small ones.
    """

    def __init__(self, file):
        self.file = file
        self.size = 0
        self.hash = hashlib.sha256()
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._rest = bytearray()  # of a huge page that is not full yet

    def append(self, packed: np.ndarray) -> int:
        """Write raw bytes; returns their offset. At most one tensor waits."""
        offset = place(self.size, packed.nbytes)
        padding = offset - self.size
        self.size = offset + packed.nbytes
        self.flush()
        self._pending = self._writer.submit(self._write, b"\0" * padding, packed)
        return offset

    def _write(self, padding: bytes, packed: np.ndarray) -> None:
        for part in (memoryview(padding), packed.reshape(-1).view(np.uint8).data):
            self.hash.update(part)
            room = -len(self._rest) % HUGE_PAGE
            self._rest += part[:room]
            if len(self._rest) == HUGE_PAGE:
                self.file.write(self._rest)
                self._rest = bytearray()
            whole = max(0, len(part) - room) // HUGE_PAGE * HUGE_PAGE
            self.file.write(part[room:room + whole])
            self._rest += part[room + whole:]

    def flush(self) -> None:
        """Wait for what was appended; raises its OSError."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> str:
        """Finish; the contents' SHA-256."""
        self.flush()
        self.file.write(self._rest)
        self._writer.shutdown()
        return self.hash.hexdigest()


def write_weights(program: Program, maker: WeightMaker, file: WeightFile, progress: Progress
                  ) -> Iterator[WeightInfo]:
    """Evaluate, pack and append every weight, tensor by tensor. Copies that are made of the same
    tensors (turns of a loop share a block) are one."""
    total = sum(w_bytes(program, w) * program.buffers[w.buffer].count
                for w in program.weights.values())
    for weight in program.weights.values():
        buffer = program.buffers[weight.buffer]
        places: dict[Names, int] = {}
        for names in weight.names:
            if names not in places:
                places[names] = file.append(maker.packed(weight.expression, names, buffer.layout))
            progress("weights", file.size / max(total, 1))
        offsets = [places[names] for names in weight.names]
        yield WeightInfo(
            buffer.name, str(buffer.type.dtype), static_shape(buffer),
            format_layout(buffer.layout), w_bytes(program, weight), tuple(offsets),
            tuple(tuple(source for _, source in names) for names in weight.names))


def static_shape(buffer: Buffer) -> tuple[int, ...]:
    """The shape of a weight; CompileError if it has symbols."""
    shape = tuple(dim for dim in buffer.type.shape if isinstance(dim, int))
    if len(shape) != len(buffer.type.shape):
        raise CompileError(f"weight {buffer.name} has a symbolic shape: {buffer.type}")
    return shape


def w_bytes(program: Program, weight: Weight) -> int:
    size: Dim = program.buffers[weight.buffer].bytes()
    if not isinstance(size, int):
        raise CompileError(f"weight {weight.buffer} has a symbolic size {size}")
    return size


class WeightMaker:
    """Evaluates the prelude's expressions for a model's tensors.

    A matrix is quantised once: its codes are packed at once, its scales and zeros are kept until
    they are asked for. `quantized` tells what was lost.

    moments_limit: seconds that choosing codes by second moments may take; the matrices behind are
    rounded without (`skipped` says so). moments_seconds: what it took.
    """

    def __init__(self, model: ImportedModel, moments_limit: float = math.inf):
        self.moments_seconds = 0.0
        self.skipped = ""
        self._moments_limit = moments_limit
        self.quantized: list[QuantizedInfo] = []
        self._model = model
        self._threads = knobs.cores()
        self._quantizer: Quantizer | None = None
        self._parts: dict[tuple[Node, Names], dict[int, np.ndarray]] = {}

    def prepare(self, program: Program) -> None:
        """Compile what the program's weights are quantised by: LLVM does one thing at a time, and
        nobody wants to wait when it is busy with something else."""
        for weight in program.weights.values():
            for node in weight.expression.nodes():
                if node.op == "quantize":
                    self._quantizer = self._quantizer or Quantizer(self._threads)
                    source = None if len(node.inputs) > 1 else node.inputs[0].dtype
                    self._quantizer.prepare(source, node["dtype"], node["group"])

    def packed(self, expression: Graph, names: Names, layout: Layout) -> np.ndarray:
        """One copy of a weight as raw bytes in its layout."""
        value = self.value(expression, names)
        return pack(np.asarray(value), layout, threads=self._threads).view(np.uint8)

    def value(self, expression: Graph, names: Names) -> np.ndarray:
        """One copy of a weight."""
        arrays: dict[str, np.ndarray] = {}
        parts: dict[Node, Node] = {}
        for node in expression.nodes():
            if node.op == "get" and node.inputs[0].op == "quantize":
                name = f"quantized.{len(parts)}"
                parts[node] = make("parameter", name=name, type=node.type)
                arrays[name] = self._part(node, names)
        return self._interpreted(rebuild(expression, parts), names, arrays)

    def _interpreted(self, expression: Graph, names: Names, arrays: dict[str, np.ndarray]
                     ) -> np.ndarray:
        wanted = {leaf["name"] for leaf in expression.parameters()}
        read = {leaf: self._model.parameters[source].read() for leaf, source in names
                if leaf in wanted}
        with interpret.allowed():
            (value,) = interpret.interpret(expression, {}, read | arrays).values()
        return np.asarray(value)

    def _part(self, node: Node, names: Names) -> np.ndarray:
        """A result of the op `quantize`, which is computed for all of its results at once."""
        whole = node.inputs[0]
        leaves = {leaf["name"] for leaf in walk([whole]) if leaf.op == "parameter"}
        key = whole, tuple(each for each in names if each[0] in leaves)
        if node["index"] not in self._parts.get(key, {}):
            self._parts[key] = dict(enumerate(self._quantize(*key).parts))
        return self._parts[key].pop(node["index"])

    def _quantize(self, whole: Node, names: Names) -> QuantizedMatrix:
        inputs = whole.inputs
        if len(inputs) > 1 and self.moments_seconds >= self._moments_limit:
            self.skipped = ("the machine was too busy to end in time (--calibrate always: all "
                            "that it takes)")
            inputs = inputs[:1]
        operands = [self._interpreted(Graph("operand", (), (("value", each),)), names, {})
                    for each in inputs]
        started = time.perf_counter()
        self._quantizer = self._quantizer or Quantizer(self._threads)
        found = self._quantizer(operands[0], whole["dtype"], whole["group"], *operands[1:])
        if len(operands) > 1:
            self.moments_seconds += time.perf_counter() - started
        leaves = {leaf["name"] for leaf in walk(whole.inputs[:1]) if leaf.op == "parameter"}
        n, k = operands[0].shape
        stored = sum(each.size * from_numpy(each.dtype).bits for each in found.parts) // 8
        self.quantized.append(QuantizedInfo(
            result_name([source for leaf, source in names if leaf in leaves]),
            whole["dtype"].name, whole["group"], (n, k), found.error, operands[0].nbytes, stored,
            len(operands) > 1))
        return found
