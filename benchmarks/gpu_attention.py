"""Attention alone on a GPU: right against f64, then timed beside torch's flash attention.

    python benchmarks/gpu_attention.py [--check] [--time] [--only TEXT]

Prefill is judged by TFLOP/s (causal: half of all products), decode by GB/s of cache read once; the
caches of decode are rotated, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "codegen"), str(ROOT / "tests/codegen/nvptx")]

import attention_harness as reference  # noqa: E402
from attention_cases import LAYOUTS, TOLERANCE, cases  # noqa: E402
from attention_on_device import Device, DeviceStage, LoadedStage  # noqa: E402

from llmc.ir.dims import symbol  # noqa: E402
from llmc.ir.ops import PAGE, make  # noqa: E402

# ---- right or wrong ----------------------------------------------------------------------------


def check(device, only: str) -> int:
    wrong = 0
    for name, dtype, run in cases():
        if only not in name:
            continue
        start = time.time()
        try:
            error = run(device)
            verdict = "ok" if error < TOLERANCE[dtype] else "WRONG"
            note = f"{error:.2e}"
        except Exception as problem:  # a table of all cases, whatever one does
            verdict, note = "FAILED", f"{problem} {traceback.format_exc().splitlines()[-4:]}"[:600]
        wrong += verdict != "ok"
        print(f"{verdict:6} {name}: {note} ({time.time() - start:.1f} s)", flush=True)
        if "ILLEGAL" in note or "LAUNCH_FAILED" in note:
            print("the device does not go on after this")
            return wrong
    print(f"{wrong} wrong")
    return wrong


# ---- fast or slow ------------------------------------------------------------------------------


def paged_stage(heads, kv_heads, size, few: bool, single: bool = False) -> DeviceStage:
    """A stage with symbolic dims, as programs have them."""
    most = 8 if few else 32768
    tokens, sequences = symbol("tokens", 1, most), symbol("sequences", 1, 256)
    width, pool = symbol("table_width", 1), symbol("pool_pages", 1)
    leaf = reference.leaf
    inputs = [leaf("q", "bf16", tokens, heads, size), leaf("k", "bf16", pool, PAGE, kv_heads, size),
              leaf("v", "bf16", pool, PAGE, kv_heads, size),
              leaf("page_table", "i32", sequences, width), leaf("sequence", "i32", tokens),
              leaf("positions", "i32", tokens), leaf("offsets", "i32", sequences + 1)]
    symbols = {"tokens": (1, most), "sequences": (1, 256), "table_width": (1, 8192),
               "pool_pages": (1, 1 << 24)}
    return DeviceStage(inputs, make("paged_attention", *inputs), symbols, LAYOUTS)


def step(torch, device, stage, sequences, heads, kv_heads, size, caches: int):
    """LoadedStages of one shape, each with a cache of its own. sequences: (new, past)."""
    integers = {"dtype": torch.int32, "device": "cuda"}
    lengths = [new + past for new, past in sequences]
    width = max(-(-length // PAGE) for length in lengths)
    pages = width * len(sequences)
    tokens = sum(new for new, _ in sequences)
    held = {
        "q": torch.randn(tokens, heads, size, dtype=torch.bfloat16, device="cuda"),
        "page_table": torch.randperm(pages, device="cuda").to(torch.int32),
        "sequence": torch.tensor([i for i, (new, _) in enumerate(sequences)
                                  for _ in range(new)], **integers),
        "positions": torch.tensor([p for new, past in sequences
                                   for p in range(past, past + new)], **integers),
        "offsets": torch.tensor(np.cumsum([0] + [new for new, _ in sequences]), **integers),
        "result": torch.empty(tokens, heads, size, dtype=torch.bfloat16, device="cuda"),
    }
    dims = {"tokens": tokens, "sequences": len(sequences), "table_width": width,
            "pool_pages": pages}
    loaded = []
    for _ in range(caches):
        held = dict(held)
        for name in ("k", "v"):
            held[name] = torch.randn(pages, kv_heads, PAGE, size, dtype=torch.bfloat16,
                                     device="cuda")
        stage_here = LoadedStage(device, stage, dims,
                                 {name: tensor.data_ptr() for name, tensor in held.items()})
        stage_here.held.append(held)
        loaded.append(stage_here)
    return loaded


def graph_time(torch, runs) -> float:
    """Median microseconds of one of `runs`, captured one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:
            run(stream.cuda_stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for run in runs:
                run(stream.cuda_stream)
        times = []
        for _ in range(12):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1000 / len(runs))
    return statistics.median(times[2:])


def peer(torch, batch, queries, keys, heads, kv_heads, size, causal, count: int) -> float:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def random(length, many):
        return torch.randn(batch, many, length, size, dtype=torch.bfloat16, device="cuda")

    q = random(queries, heads)
    caches = [(random(keys, kv_heads), random(keys, kv_heads)) for _ in range(count)]
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return graph_time(torch, [lambda _, k=k, v=v: attend(
            q, k, v, is_causal=causal, enable_gqa=heads != kv_heads) for k, v in caches])


def time_prefill(torch, device, only: str) -> Iterator[dict]:
    """Each case: its name, microseconds of ours and of torch's, TFLOP/s, share of torch's speed."""
    for heads, kv_heads, size in ((32, 8, 128), (32, 8, 64)):
        stage = paged_stage(heads, kv_heads, size, few=False)
        for length in (512, 2048, 8192, 16384):
            name = f"prefill {heads}/{kv_heads} x {size}, {length}"
            if only not in name:
                continue
            loaded = step(torch, device, stage, [(length, 0)], heads, kv_heads, size, 3)
            ours = graph_time(torch, [each.run for each in loaded])
            theirs = peer(torch, 1, length, length, heads, kv_heads, size, True, 3)
            flops = 2 * length * length * size * heads
            yield row(name, ours, theirs, teraflops=round(flops / ours / 1e6))


def row(name: str, ours: float, theirs: float, **figures: float) -> dict:
    return {"case": name, "microseconds": round(ours, 2), "torch": round(theirs, 2),
            "share": round(theirs / ours, 3), **figures}


def time_decode(torch, device, only: str) -> Iterator[dict]:
    """The same of decode steps, with GB/s of cache."""
    for heads, kv_heads, size, batch, context in (
            (32, 8, 64, 1, 1024), (32, 8, 128, 1, 1024), (32, 8, 128, 1, 16384),
            (32, 8, 128, 1, 131072), (32, 8, 128, 8, 1024), (32, 8, 128, 32, 1024),
            (32, 8, 64, 32, 1024), (32, 8, 128, 64, 4096)):
        name = f"decode {heads}/{kv_heads} x {size}, {batch} x {context}"
        if only not in name:
            continue
        stage = paged_stage(heads, kv_heads, size, few=batch <= 8)
        moved = 4 * batch * context * kv_heads * size
        count = max(2, min(32, 200_000_000 // moved + 1))
        loaded = step(torch, device, stage, [(1, context - 1)] * batch, heads, kv_heads, size,
                      count)
        ours = graph_time(torch, [each.run for each in loaded])
        theirs = peer(torch, batch, 1, context, heads, kv_heads, size, False, count)
        yield row(name, ours, theirs, gigabytes=round(moved / ours / 1e3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    device = Device()
    wrong = check(device, options.only) if options.check else 0
    if options.time and not wrong:
        import torch

        torch.cuda.init()
        for times in (time_decode, time_prefill):
            for each in times(torch, device, options.only):
                print(json.dumps(each), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
