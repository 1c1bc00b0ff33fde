"""The GPU's matmul kernels at layer shapes, next to torch (cuBLAS) in the same run.

    python benchmarks/gpu_matmul.py [--shapes 8b,1b] [--rows 1,8,...] [--rounds R] [--check-only]

First every kernel's result is compared with float64; then times are medians over interleaved
rounds of captured graphs that walk over more copies of the weight than the L2 cache holds. Prints
one JSON object per case and a table last. Needs an NVIDIA GPU and torch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/codegen/nvptx")]

SHAPES = {  # name: (k, n)
    "8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672),
           "down": (14336, 4096)},
    "1b": {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384),
           "down": (8192, 2048), "head": (2048, 128256)},
}
ROWS = (1, 8, 16, 64, 128, 512, 2048)
LAUNCHES = 12  # in a graph
COLD_BYTES = 160 << 20  # weights that a graph walks over: beyond any L2
CHECKS = [  # dtype, k, n, rows, options
    *(("bf16", k, n, rows, {"result": "f32"}) for k, n in ((33, 17), (128, 130), (264, 96))
      for rows in (1, 3, 8, 9, 16, 17, 33, 65, 129, 300)),
    *(("f16", 2048, 1024, rows, {"residual": True}) for rows in (1, 2, 7, 33, 64, 129, 512)),
    *(("bf16", 1024, 2048, rows, {"gated": True}) for rows in (1, 8, 16, 17, 64, 128, 513, 2047)),
    *(("bf16", 4096, 4096, rows, {"residual": True}) for rows in (1, 8, 16, 64, 128, 513, 2047)),
    *(("bf16", k, 3072, 512, {}) for k in (1088, 2048)),
    *(("f32", 512, 320, rows, {"residual": True}) for rows in (1, 8, 65, 300)),
]


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    k: int
    n: int
    rows: int
    options: tuple = ()


@dataclass(frozen=True)
class Built:
    """What a launch needs."""

    kernel: str
    function: str
    cubin: bytes
    blocks: int
    threads: int
    shared_bytes: int
    registers: int
    spills: int


def build(case: Case, architecture: str, tiling=None) -> Built:
    """A case's kernel, with the tiling that the rule chooses or with this one."""
    from matmul_on_device import MatmulStage, first_rows, product_body, rows_symbol

    from llmc.codegen.nvptx import matmul_rows
    from llmc.codegen.nvptx.matmul_tiles import choose_ranges
    from llmc.ir.dims import evaluate

    matmul_rows.choose_ranges = (lambda *given: {tiling: [given[2:]]}) if tiling \
        else choose_ranges
    body = product_body(case.dtype, case.k, case.n, rows_symbol(case.rows) if case.rows > 1 else 1,
                        **dict(case.options))
    stage = MatmulStage(*body, architecture=architecture, rows=(first_rows(case.rows), case.rows))
    kernel = stage.kernel
    name = type(kernel).__name__
    if hasattr(kernel, "shape"):
        name = (f"{type(kernel.consumer).__name__} {kernel.shape.rows}x{kernel.shape.columns}"
                f"x{kernel.shape.stages}/{kernel.split}*{kernel.attributes['nvvm.minctasm']}")
    registers, spills = (stage.report.registers, stage.report.spill_bytes) if stage.report \
        else (0, 0)
    return Built(name, stage.launches[0].kernel, stage.cubin,
                 evaluate(kernel.blocks(), {"rows": case.rows}), kernel.threads,
                 kernel.shared_bytes, registers, spills)


class Launch:
    """A kernel with its arguments, on torch tensors."""

    def __init__(self, built: Built, rows: int, inputs: list, result):
        import torch

        from llmc.runtime.cuda_device import Module

        self.built, self.overlaps = built, False
        self.module = Module(built.cubin, "matmul")
        self.function = self.module.function(built.function, built.shared_bytes)

        def table(values):
            return torch.tensor(values, dtype=torch.int64, device="cuda")

        self.held = [inputs, result, table([rows]), table([x.data_ptr() for x in inputs]),
                     table([result.data_ptr()])]
        self.arguments = table([x.data_ptr() for x in self.held[2:]] + [0] * 6)

    def __call__(self) -> None:
        import torch

        from llmc.runtime.cuda_device import launch

        built = self.built
        stream = torch.cuda.current_stream().cuda_stream
        launch(SimpleNamespace(stream=stream, driver=13000), self.function, built.blocks,
               built.threads, built.shared_bytes, self.arguments.data_ptr(), 0, self.overlaps)


def torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[name]


def columns(weight, k: int):
    """[n, k] as the Columns layout keeps it."""
    import torch

    return torch.nn.functional.pad(weight, (0, -k % 64)).contiguous()


def check(case: Case, built: Built) -> float:
    """Relative error against float64 of fresh random operands; NaN where something is unwritten."""
    import torch

    options = dict(case.options)
    type_ = torch_dtype(case.dtype)
    a = torch.randn(case.rows, case.k, device="cuda").to(type_)
    w = (torch.randn(case.n, case.k, device="cuda") / math.sqrt(case.k)).to(type_)
    expected = a.double() @ w.double().t()
    if options.get("gated"):
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    inputs = [a, columns(w, case.k)]
    if options.get("residual"):
        inputs.append(torch.randn(expected.shape, device="cuda").to(type_))
        expected = expected + inputs[-1].double()
    out = torch.full(expected.shape, math.nan, device="cuda",
                     dtype=torch_dtype(options.get("result", case.dtype)))
    launch = Launch(built, case.rows, inputs, out)
    launch()
    torch.cuda.synchronize()
    first = out.clone()
    for _ in range(3):
        launch()
    torch.cuda.synchronize()
    if not torch.equal(first, out):
        return math.inf
    return ((out.double() - expected).norm() / expected.norm()).item()


def graph_of(calls: list):
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(graph) -> float:
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def measure(case: Case, built: Built, rounds: int, overlaps: bool = False) -> dict:
    """Times of one product, ours and torch's."""
    import torch

    type_ = torch_dtype(case.dtype)
    copies = max(2, -(-COLD_BYTES // (2 * case.k * case.n)))
    a = torch.randn(case.rows, case.k, device="cuda").to(type_)
    weights = [torch.randn(case.n, case.k, device="cuda", dtype=type_).mul_(0.02)
               for _ in range(copies)]
    out = torch.empty(case.rows, case.n, device="cuda", dtype=type_)
    ours = [Launch(built, case.rows, [a, w], out) for w in weights]
    count = max(LAUNCHES, copies)
    for launch in ours[1:]:
        launch.overlaps = overlaps
    own = graph_of([ours[i % copies] for i in range(count)])
    peer = graph_of([lambda w=weights[i % copies]: torch.mm(a, w.t(), out=out)
                     for i in range(count)])
    times = [(seconds(own) / count, seconds(peer) / count) for _ in range(rounds + 2)][2:]
    mine, theirs = (statistics.median(t[i] for t in times) for i in range(2))
    ratio = statistics.median(t[1] / t[0] for t in times)
    return {"case": case.name, "rows": case.rows, "kernel": built.kernel,
            "microseconds": round(mine * 1e6, 2), "torch": round(theirs * 1e6, 2),
            "share": round(ratio, 3), "gigabytes": round(2e-9 * case.k * case.n / mine, 0),
            "teraflops": round(2e-12 * case.rows * case.k * case.n / mine, 1),
            "registers": built.registers, "blocks": built.blocks}


def tune(cases: list[Case], pool, options) -> None:
    """Every tiling of every case, timed."""
    from llmc.codegen.nvptx.matmul_tiles import tilings

    pairs = [(case, tiling) for case in cases
             for tiling in tilings(case_product(case), options.architecture)
             if tiling.shape.rows < 2 * max(case.rows, 32)]
    built = list(pool.map(build, [case for case, _ in pairs], [options.architecture] * len(pairs),
                          [tiling for _, tiling in pairs], chunksize=4))
    for (case, _), each in zip(pairs, built, strict=True):
        if not each.spills:
            print(json.dumps(measure(case, each, options.rounds, options.overlap)), flush=True)


def case_product(case: Case):
    """What the rule sees of a case."""
    from matmul_on_device import MatmulStage, first_rows, product_body, rows_symbol

    body = product_body(case.dtype, case.k, case.n, rows_symbol(case.rows))
    return MatmulStage(*body, rows=(first_rows(case.rows), case.rows)).kernel.product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="8b,1b")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="launches that overlap")
    parser.add_argument("--tune", action="store_true", help="time every tiling of every case")
    parser.add_argument("--architecture", default="sm_90a")
    options = parser.parse_args()
    checks = [Case("check", *each[:4], tuple(each[4].items())) for each in CHECKS]
    cases = [] if options.check_only else [
        Case(f"{model} {name}", "bf16", k, n, int(rows)) for model in options.shapes.split(",")
        for name, (k, n) in SHAPES[model].items() for rows in options.rows.split(",")]
    with ProcessPoolExecutor(12) as pool:
        if options.tune:
            tune(cases, pool, options)
            return
        built = list(pool.map(build, [*checks, *cases],
                              [options.architecture] * len([*checks, *cases])))
    import torch

    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for case, each in zip(checks, built, strict=False):
        error = check(case, each)
        most = 2e-6 if case.dtype == "f32" or ("result", "f32") in case.options else 4e-3
        if not error <= most or each.spills:
            print(f"WRONG {case} {each.kernel}: error {error:.2g}, spills {each.spills}")
    results = []
    for case, each in zip(cases, built[len(checks):], strict=True):
        results.append(measure(case, each, options.rounds, options.overlap))
        print(json.dumps(results[-1]), flush=True)
    for model in options.shapes.split(",") if cases else ():
        shares = [r["share"] for r in results if r["case"].startswith(model)]
        print(f"{model}: geometric mean {statistics.geometric_mean(shares):.3f} of torch, "
              f"least {min(shares):.3f}")


if __name__ == "__main__":
    main()
