"""Compiles programs made by hand, runs them on arrays and compares with the reference in f64."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from llmc.codegen import generate
from llmc.codegen.target import Target
from llmc.ir.dims import evaluate
from llmc.ir.dtypes import dtype
from llmc.ir.graph import Graph, TensorType
from llmc.ir.layouts import Rows, pack, unpack
from llmc.ir.ops import OPS, Context, make
from llmc.ir.program import Buffer, Program, Stage
from llmc.runtime.host_device import Team, load_object
from llmc.runtime.memory import aligned_empty

POINTER = ctypes.c_void_p


@cache
def host() -> Target:
    return Target.host()


def leaf(name, dtype_name, *shape):
    return make("input", name=name, type=TensorType(dtype(dtype_name), shape))


def reference(outputs, arrays, dims, exact=True):
    """Reference values of nodes; exact: in f64."""
    context, values = Context(exact=exact, dims=dims), {}
    for node in Graph("body", (), tuple(outputs.items())).nodes():
        if node.op == "input":
            values[node] = arrays[node["name"]]
        else:
            operands = [values[source] for source in node.inputs]
            values[node] = OPS[node.op].reference(node, operands, context)
    return {name: values[node] for name, node in outputs.items()}


def stage_program(kind, outputs, symbols=(), layouts=None, states=(), target=None):
    """A program of one stage. outputs: name -> node; states: names of inputs that are states (an
    output with the name of a state updates it)."""
    layouts = layouts or {}
    body = Graph("body", (), tuple(outputs.items()))
    inputs = [node for node in body.nodes() if node.op == "input"]
    buffers = {}
    for node in inputs:
        role = "state" if node["name"] in states else "input"
        name = node["name"]
        buffers[name] = Buffer(name, node.type, role, layouts.get(name, Rows()))
    for name, node in outputs.items():
        if name not in buffers:
            buffers[name] = Buffer(name, node.type, "output", layouts.get(name, Rows()))
    body = Graph("body", tuple(inputs), tuple(outputs.items()))
    stage = Stage("stage", kind, body, tuple(x["name"] for x in inputs), tuple(outputs))
    capabilities = (target or host()).capabilities()
    return Program("test", capabilities, tuple(symbols), buffers, {}, (stage,), 0)


class Runner:
    """A compiled program; `run` may be called for several shapes."""

    def __init__(self, program, workers=1):
        self.program = program
        self.code = generate(program, host())
        self.library = load_object(self.code.object)
        self.step = self.library.function("llmc_step", ctypes.c_int32, POINTER)
        self.workers = workers
        self.team = Team(self.library, workers)
        self.cancel = np.zeros(1, np.int32)

    def run(self, arrays, dims=None):
        """Every output and state by name; the arena and the outputs begin as NaN bit patterns."""
        dims = dict(dims or {})
        program = self.program
        memory = self.memory = {
            name: self._fill(buffer, arrays, dims)
            for name, buffer in program.buffers.items() if buffer.role != "arena"}
        roles = [self.table(role, memory) for role in ("input", "output", "weight", "state")]
        tables = [(POINTER * max(1, len(addresses)))(*addresses) for addresses in roles]
        symbols = np.array([dims.get(name, low) for name, low, _ in program.symbols] or [0],
                           np.int64)
        arena = aligned_empty(max(64, evaluate(program.arena_bytes, dims)))
        arena[:] = 0xFF
        scratch = aligned_empty(max(64, self.code.scratch_bytes) * self.workers)
        arguments = (POINTER * 9)(
            symbols.ctypes.data, *(ctypes.addressof(table) for table in tables),
            arena.ctypes.data, scratch.ctypes.data, self.team.handle, self.cancel.ctypes.data)
        self.returned = self.step(ctypes.addressof(arguments))
        return {name: self._read(program.buffers[name], memory[name], dims)
                for name in memory if program.buffers[name].role in ("output", "state")}

    def table(self, role, memory):
        """Addresses of the buffers of a role."""
        return [memory[buffer.name].ctypes.data for buffer in self.program.with_role(role)]

    def _fill(self, buffer, arrays, dims):
        shape = tuple(evaluate(size, dims) for size in buffer.type.shape)
        size = max(1, evaluate(buffer.elements(), dims))
        flat = aligned_empty(size * buffer.type.dtype.numpy.itemsize)
        if buffer.name in arrays:
            array = np.asarray(arrays[buffer.name])
            assert array.shape == shape and array.dtype == buffer.type.dtype.numpy, buffer.name
            alone = buffer.type.dtype.bits < 8 and not buffer.packed
            laid = np.ascontiguousarray(array) if alone else pack(array, buffer.layout)
            if array.size:
                flat[:] = laid.view(np.uint8).reshape(-1)[:flat.size]
        else:
            flat[:] = 0xFF
        return flat

    def _read(self, buffer, flat, dims):
        shape = tuple(evaluate(size, dims) for size in buffer.type.shape)
        return unpack(flat.view(buffer.type.dtype.numpy), buffer.layout, shape) \
            if buffer.layout != Rows() else \
            flat.view(buffer.type.dtype.numpy)[:int(np.prod(shape))].reshape(shape)


def random(rng, node, dims=None, low=-2.0, high=2.0):
    """Random values for an input node."""
    shape = tuple(evaluate(size, dims or {}) for size in node.shape)
    if node.dtype.kind == "bool":
        return rng.random(shape) < 0.5
    if node.dtype.is_float:
        return rng.uniform(low, high, shape).astype(node.dtype.numpy)
    first = 0 if node.dtype.kind == "uint" else -7
    return rng.integers(first, 8, shape).astype(node.dtype.numpy)


TOLERANCE = {"f64": 1e-13, "f32": 3e-6, "bf16": 4.5e-3, "f16": 6e-4}


def assert_close(got, wanted, dtype_name, scale=None):
    """|got - wanted| within the dtype's rounding, relative to the largest value (at least 1)."""
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    assert got.shape == wanted.shape
    if not got.size:
        return
    finite = np.where(np.isfinite(wanted), wanted, 0)
    scale = scale or max(1.0, float(np.max(np.abs(finite))))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[dtype_name] * scale)


def run(kind, outputs, arrays, dims=None, **how):
    """Compile one stage and run it on arrays."""
    return Runner(stage_program(kind, outputs, **how)).run(arrays, dims)


def check(kind, outputs, dims=None, symbols=(), workers=1, layouts=None, seed=0, arrays=None,
          **random_range):
    """Compile, run and compare every output with the f64 reference."""
    program = stage_program(kind, outputs, symbols, layouts)
    rng = np.random.default_rng(seed)
    values = dict(arrays or {})
    for node in program.steps[0].body.inputs:
        if node["name"] not in values:
            values[node["name"]] = random(rng, node, dims, **random_range)
    got = Runner(program, workers).run(values, dims)
    wanted = reference(outputs, values, dims or {})
    for name, node in outputs.items():
        if node.dtype.is_float:
            assert_close(got[name], wanted[name], node.dtype.name)
        else:
            np.testing.assert_array_equal(got[name], wanted[name])
    return got
