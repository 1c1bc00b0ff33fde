"""Host attention next to what this machine can do: FMA peak for prefill, read bandwidth for decode.

    python benchmarks/bench_attention.py [--threads N] [--rounds R]

Prints one JSON object a line: the median over rounds of achieved / ceiling, both taken in the same
round. Prefill counts the multiply-adds of visible keys only; decode counts the bytes of keys and
values, which are rotated through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen"))
from attention_harness import Harness, leaf, machine, paged_case

from llmc.codegen.host.ceilings import generate_ceilings
from llmc.codegen.target import Target
from llmc.ir.ops import make


class Ceilings:
    """Rates of this machine with all threads: flops and bytes per second."""

    def __init__(self, pool, threads):
        code = generate_ceilings(Target.host())
        self.flops_per_turn = code.f32_flops
        builder = llvm.JITLibraryBuilder().add_object_img(code.object).add_current_process()
        for name in ("llmc_read", "llmc_peak_f32"):
            builder.export_symbol(name)
        self.jit = llvm.create_lljit_compiler(machine())
        self.library = builder.link(self.jit, "ceilings")
        signature = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_void_p, ctypes.c_int64)
        self.read = signature(self.library["llmc_read"])
        self.peak = signature(self.library["llmc_peak_f32"])
        self.pool, self.threads = pool, threads
        self.memory = np.ones((threads, 64 << 20), np.uint8)

    def flops(self):
        turns = 200_000
        pointer = self.memory.ctypes.data
        seconds = timed(self.pool, self.threads, lambda worker: self.peak(pointer, turns))
        return self.threads * turns * self.flops_per_turn / seconds

    def bytes(self):
        count = self.memory.shape[1]
        seconds = timed(self.pool, self.threads,
                        lambda worker: self.read(self.memory[worker].ctypes.data, count))
        return self.memory.size / seconds


def timed(pool, threads, function):
    """Seconds for function(worker) on all threads at once."""
    start = time.perf_counter()
    list(pool.map(function, range(threads)))
    return time.perf_counter() - start


def attention_runs(harness, arrays, threads):
    """One run(worker, workers) per thread, each with scratch of its own."""
    out = np.empty([int(dim) for dim in harness.result.shape], harness.result.dtype.numpy)
    return [harness.prepare(out, **arrays) for _ in range(threads)]


def prefill(pool, threads, ceilings, size, heads, kv_heads, tokens, dtype_name, rounds):
    inputs, result, layouts, arrays, _ = paged_case([(tokens, 0)], heads, kv_heads, size,
                                                    dtype_name)
    runs = attention_runs(Harness(inputs, result, layouts=layouts), arrays, threads)
    flops = 4 * heads * size * tokens * (tokens + 1) / 2
    return compare(pool, threads, runs, flops, ceilings.flops, rounds)


def packed(pool, threads, ceilings, size, heads, tokens, sequences, dtype_name, rounds):
    q, k, v = (leaf(name, dtype_name, tokens * sequences, heads, size) for name in "qkv")
    offsets = leaf("offsets", "i32", sequences + 1)
    harness = Harness([q, k, v, offsets], make("packed_attention", q, k, v, offsets))
    random = np.random.default_rng(1)
    arrays = {name: random.standard_normal((tokens * sequences, heads, size), np.float32
                                           ).astype(q.dtype.numpy) for name in "qkv"}
    arrays["offsets"] = (np.arange(sequences + 1) * tokens).astype(np.int32)
    runs = attention_runs(harness, arrays, threads)
    flops = 4 * heads * size * tokens * tokens * sequences
    return compare(pool, threads, runs, flops, ceilings.flops, rounds)


def decode(pool, threads, ceilings, size, heads, kv_heads, context, dtype_name, rounds):
    element = 4 if dtype_name == "f32" else 2
    sequence_bytes = 2 * context * kv_heads * size * element
    sequences = max(1, (128 << 20) // sequence_bytes)  # beyond the caches
    inputs, result, layouts, arrays, _ = paged_case([(1, context - 1)] * sequences, heads,
                                                    kv_heads, size, dtype_name)
    runs = attention_runs(Harness(inputs, result, layouts=layouts), arrays, threads)
    return compare(pool, threads, runs, sequences * sequence_bytes, ceilings.bytes, rounds)


def compare(pool, threads, runs, work, ceiling, rounds):
    rates, ratios = [], []
    for _ in range(rounds + 1):
        seconds = timed(pool, threads, lambda worker: runs[worker](worker, threads))
        rates.append(work / seconds)
        ratios.append(rates[-1] / ceiling())
    return {"rate": round(statistics.median(rates[1:]) / 1e9, 1),
            "of_ceiling": round(statistics.median(ratios[1:]), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    threads, rounds = options.threads, options.rounds
    with ThreadPoolExecutor(threads) as pool:
        ceilings = Ceilings(pool, threads)

        def report(kind, unit, function, *shape):
            figures = function(pool, threads, ceilings, *shape, rounds)
            print(json.dumps({"kind": kind, "shape": shape, "threads": threads, "unit": unit,
                              **figures}), flush=True)

        for dtype_name in ("f32", "bf16"):
            for size, heads, kv_heads in ((64, 32, 8), (128, 16, 4), (64, 8, 8)):
                report("prefill", "GFLOP/s", prefill, size, heads, kv_heads, 512, dtype_name)
                report("decode", "GB/s", decode, size, heads, kv_heads, 1024, dtype_name)
            report("packed", "GFLOP/s", packed, 64, 12, 128, 8, dtype_name)


if __name__ == "__main__":
    main()
