"""The packed matmul at layer shapes, next to what this machine can do.

    python benchmarks/bench_matmul.py [--shape 1b|8b|square] [--threads N] [--dtype bf16]
    python benchmarks/bench_matmul.py --dtype i4 --group 32 [--codes]

One program per case: a loop over so many copies of the weight that no cache holds them, one stage,
one native call. Prints one JSON object a line: medians over the rounds of figure / ceiling, the
ceiling sampled on both sides of each figure. Few rows are judged by the bytes of the weight,
many by flops. i8 and i4 are quantised weights, --codes multiplies them by int8 codes of the
activations; their scales (f16) count as bytes too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from llmc.ceilings import Ceilings
from llmc.codegen import generate
from llmc.codegen.target import Target
from llmc.ir.dims import evaluate, symbol
from llmc.ir.dtypes import DType, dtype
from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.layouts import Panels, RowBlocks, Rows
from llmc.ir.ops import make
from llmc.ir.program import Buffer, Loop, Program, Stage
from llmc.ir.quantized import LARGEST_BLOCK, Quantized, coded_rows
from llmc.runtime.host_device import Team, load_object
from llmc.runtime.memory import aligned_empty

SHAPES = {  # name: (k, n, parts)
    "1b": {"qkv": (2048, 3072, 1), "o": (2048, 2048, 1), "gate_up": (2048, 16384, 2),
           "down": (8192, 2048, 1), "head": (2048, 128256, 1)},
    "square": {"s": (2048, 2048, 1), "wide": (2048, 8192, 1), "deep": (8192, 2048, 1)},
    "8b": {"qkv": (4096, 6144, 1), "o": (4096, 4096, 1), "gate_up": (4096, 28672, 2),
           "down": (14336, 4096, 1)},
}
FEW_ROWS = (1, 2, 4)
MANY_ROWS = (8, 32, 128, 512)
MOST_ROWS = 2048
STREAMED_BYTES = 256 << 20  # per call, beyond any cache


@dataclass(frozen=True)
class Case:
    """One weight, once for few rows (prologue inside) and once for packed rows."""

    name: str
    k: int
    n: int
    parts: int
    dtype_name: str
    blocked: bool
    group: int = 0
    coded: bool = False

    def weight_bytes(self) -> int:
        scales = self.n * -(-self.k // self.group) * 2 if self.group else 0
        return self.k * self.n * dtype(self.dtype_name).bits // 8 + scales

    @property
    def activation(self) -> DType:
        """What the rows are before they are packed, and the result."""
        return dtype("f32" if self.group else self.dtype_name)


class Runner:
    """A compiled case; `seconds(rows)` runs every copy of the weight once."""

    def __init__(self, case: Case, threads: int):
        target = Target.host()
        self.case = case
        self.copies = max(1, STREAMED_BYTES // case.weight_bytes())
        self.program = make_program(case, self.copies, target)
        started = time.perf_counter()
        code = generate(self.program, target)
        self.compile_seconds = time.perf_counter() - started
        self._library = load_object(code.object)
        self._step = self._library.function("llmc_step", ctypes.c_int32, ctypes.c_void_p)
        self._team = Team(self._library, threads)
        self._scratch = aligned_empty(max(64, code.scratch_bytes) * threads)
        weights = [_ones(evaluate(buffer.bytes(), {}))
                   for buffer in self.program.with_role("weight") for _ in range(self.copies)]
        most = {"rows": MOST_ROWS}
        left = _ones(evaluate(self.program.buffers["a"].bytes(), most))
        results = [_ones(evaluate(buffer.bytes(), most))
                   for buffer in self.program.with_role("output")]
        self._memory = [*weights, left, *results]
        self._symbols = (ctypes.c_int64 * 1)()
        tables = [_table([left]), _table(results), _table(weights), _table([])]
        self._tables = tables
        cancel = np.zeros(1, np.int32)
        self._memory.append(cancel)
        self._arguments = (ctypes.c_void_p * 9)(
            ctypes.addressof(self._symbols), *[ctypes.addressof(table) for table in tables], 0,
            self._scratch.ctypes.data, self._team.handle, cancel.ctypes.data)

    def seconds(self, rows: int) -> float:
        self._symbols[0] = rows
        started = time.perf_counter()
        self._step(ctypes.addressof(self._arguments))
        return time.perf_counter() - started

    def close(self) -> None:
        self._team.close()


def make_program(case: Case, copies: int, target: Target) -> Program:
    """y = a @ w (or silu(gate) * up) for `copies` weights in turn; every turn rewrites y, and
    codes its rows anew."""
    capabilities = target.capabilities()
    high = MOST_ROWS if case.blocked else capabilities.few_rows
    rows = symbol("rows", 1, high)
    weight = dtype(case.dtype_name)
    packed = case.activation
    if case.blocked:
        packed = dtype(capabilities.packed_activation(weight, case.activation))
    a = make("input", name="a", type=TensorType(packed, (rows, case.k)))
    leaves, matrix = _weight(case)
    product = make("matmul", a, matrix, dtype=dtype("f32"),
                   activation_block=min(case.group, LARGEST_BLOCK) if case.coded else 0)
    y = make("cast", _epilogue(product, rows, case.parts), dtype=case.activation)
    left = RowBlocks(capabilities.matmul_rows, capabilities.interleave(packed)) \
        if case.blocked and not case.coded else Rows()
    buffers = {"a": Buffer("a", a.type, "input", left), "y": Buffer("y", y.type, "output")}
    for leaf in leaves:
        interleave = capabilities.interleave(leaf.dtype) if leaf is leaves[0] else 1
        panels = Panels(capabilities.panel_columns, interleave, case.parts)
        buffers[leaf["name"]] = Buffer(leaf["name"], leaf.type, "weight", panels, copies)
    body = Graph(case.name, (a, *leaves), (("y", y),))
    stage = Stage(case.name, "matmul", body, ("a", *(leaf["name"] for leaf in leaves)), ("y",))
    stages = (stage,)
    if case.blocked and case.coded:
        layout = coded_rows(product, capabilities, capabilities.matmul_rows)
        buffers["codes"] = Buffer("codes", a.type, "output", layout)
        stages = (Stage("codes", "coded_rows", Graph("codes", (a,), (("codes", a),)), ("a",),
                        ("codes",)), replace(stage, operands=("codes", *stage.operands[1:])))
    return Program(case.name, capabilities, (("rows", 1, high),), buffers, {},
                   (Loop(copies, stages),), 0)


def _weight(case: Case) -> tuple[list[Node], Node]:
    """The leaves of the weight, and the matrix[k, n]."""
    w = make("input", name="w", type=TensorType(dtype(case.dtype_name), (case.k, case.n)))
    if not case.group:
        return [w], w
    scales = make("input", name="scales",
                  type=TensorType(dtype("f16"), (-(-case.k // case.group), case.n)))
    codes, of_codes = (make("transpose", each, permutation=(1, 0)) for each in (w, scales))
    return [w, scales], Quantized(codes, of_codes, None, case.group, dtype("f32")).matrix()


def _epilogue(product: Node, rows, parts: int) -> Node:
    if parts == 1:
        return product
    size = product.shape[-1] // 2
    gate, up = (make("slice", product, starts=(0, first), stops=(rows, first + size), steps=(1, 1))
                for first in (0, size))
    return make("mul", make("silu", gate), up)


def _ones(size: int) -> np.ndarray:
    """Memory full of small normal numbers in every dtype: 0x3c3c is 0.0115 as bf16."""
    memory = aligned_empty(size)
    memory[:] = 0x3C
    return memory


def _table(arrays):
    return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])


def measure(runner: Runner, ceilings: Ceilings, rows: int, rounds: int) -> dict:
    """Figure and ceiling, interleaved; the ratio of a round is to the mean of its two ceilings."""
    case = runner.case
    bound = "flops" if case.blocked else "bytes"
    work = runner.copies * (2 * rows * case.k * case.n if case.blocked else case.weight_bytes())
    if case.blocked:
        ceiling = ceilings.peak_int8 if case.coded else (
            ceilings.peak_bf16 if case.dtype_name == "bf16" else ceilings.peak_f32)
    else:
        ceiling = ceilings.read_bandwidth
    runner.seconds(rows)
    figures, ratios = [], []
    for _ in range(rounds):
        before = ceiling()
        figures.append(work / runner.seconds(rows))
        ratios.append(2 * figures[-1] / (before + ceiling()))
    return {"stage": case.name, "group": case.group, "codes": case.coded, "k": case.k, "n": case.n,
            "dtype": case.dtype_name, "rows": rows,
            "bound": bound, "giga_per_second": round(statistics.median(figures) / 1e9, 1),
            "share_of_ceiling": round(statistics.median(ratios), 3),
            "best_share": round(max(ratios), 3),
            "compile_seconds": round(runner.compile_seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--stages", default="", help="comma-separated names; all by default")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16", "i8", "i4"), default="bf16")
    parser.add_argument("--group", type=int, default=32, help="k of a scale, for i8 and i4")
    parser.add_argument("--codes", action="store_true", help="activations as int8 codes")
    parser.add_argument("--rows", default="", help="comma-separated; more than 4 are packed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    ceilings = Ceilings(arguments.threads)
    wanted = arguments.stages.split(",") if arguments.stages else list(SHAPES[arguments.shape])
    few, many = FEW_ROWS, MANY_ROWS
    if arguments.rows:
        given = [int(each) for each in arguments.rows.split(",")]
        few = tuple(each for each in given if each <= 4)
        many = tuple(each for each in given if each > 4)
    quantised = arguments.dtype in ("i8", "i4")
    for name in wanted:
        for blocked in (False, True):
            if blocked and name == "head":  # only the wanted rows reach the head
                continue
            if not (many if blocked else few):
                continue
            case = Case(name, *SHAPES[arguments.shape][name], arguments.dtype, blocked,
                        arguments.group if quantised else 0, arguments.codes)
            runner = Runner(case, arguments.threads)
            for rows in many if blocked else few:
                report = measure(runner, ceilings, rows, arguments.rounds)
                print(json.dumps(report), flush=True)
            runner.close()


if __name__ == "__main__":
    main()
