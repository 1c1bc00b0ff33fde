#!/usr/bin/env python3
"""What the GPU target reaches on this machine; every part prints one line of JSON.

    gpu.py [--parts bandwidth,compile-1b,...] [--peers none|decode-eager,...] [--seconds N]
           [--work DIRECTORY] [--output FILE]

bandwidth            bytes per second at which a kernel reads memory: the ceiling of decoding
compile-1b, -8b      a checkpoint of that shape, compiled for this GPU with nothing cached
start-1b             start of a process to its first token, weights in the page cache
steps-1b             decoding at context 1024 where the host takes every step, as a server's does
model-1b, -8b        decoding at context 1024 (ms a token by the clock and by the GPU's events,
                     share of the bandwidth, host's time, GPU busy) and 2048 tokens at once
torch-1b, -8b        the same steps by transformers' Llama on torch, compiled and not; how many
                     times as fast ours are (see gpu_peers.py, which --peers chooses from)
matmul               products of the 8B layers beside torch.mm (cuBLAS)
attention-prefill,   attention alone beside torch's FLASH_ATTENTION
attention-decode

A part is a process of its own with a limit in seconds: one that fails says so in its line, and the
others go on. start, steps and model need the artifact that compile left in --work (by default a
directory that is gone afterwards). Results are merged into benchmarks/results/<device>.json, and a
table beside the peers is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_peers  # noqa: E402
import make_model  # noqa: E402

from llmc.cuda_ceilings import CudaCeilings  # noqa: E402
from llmc.errors import DeviceError  # noqa: E402
from llmc.runtime.cuda_device import Device, record_event, seconds_between  # noqa: E402

CONTEXT = 1024  # tokens behind the middle one of those that are timed
WARM, TIMED, SPARE = 32, 128, 8  # tokens of a decode run; those that are not read keep it going
PROMPT = 2048
MODEL_BYTES = 45 << 30
BANDWIDTH_SAMPLES = 11


def read_bandwidth(device: Any) -> float:
    """Bytes per second at which the GPU reads memory."""
    with CudaCeilings(device) as ceilings:
        ceilings.read_bandwidth()
        return statistics.median(ceilings.read_bandwidth() for _ in range(BANDWIDTH_SAMPLES))


def bandwidth_part(work: Path) -> dict[str, Any]:
    """The ceilings: bytes that are read, and operations, in a second."""
    device = Device()
    with CudaCeilings(device) as ceilings:
        peaks = {name: statistics.median(sample() for _ in range(BANDWIDTH_SAMPLES))
                 for name, sample in (("bf16", ceilings.peak_bf16), ("f32", ceilings.peak_f32))}
    return {"gigabytes": round(read_bandwidth(device) / 1e9)} | {
        f"teraflops_{name}": round(peak / 1e12, 1) for name, peak in peaks.items()}


# ---- compiling and starting ---------------------------------------------------------------------


def compile_part(shape: str, work: Path) -> dict[str, Any]:
    """Seconds of a compile; leaves SHAPE.llmc and not its checkpoint."""
    from llmc.codegen.target import Target
    from llmc.driver import compile_model

    checkpoint = work / shape
    started = time.perf_counter()
    make_model.make_model(shape, checkpoint, tiled=True)
    made = time.perf_counter()
    compiled = compile_model(checkpoint, Target.parse(f"nvptx:{Device().architecture}"))
    seconds = time.perf_counter() - made
    compiled.write(work / f"{shape}.llmc")
    shutil.rmtree(checkpoint)
    return {"seconds": round(seconds, 1), "variants": list(compiled.codes),
            "phases": {name: round(value, 1) for name, value in compiled.timings.items()},
            "checkpoint_seconds": round(made - started, 1)}


FIRST_TOKEN = """
import sys, time
import llmc
loaded = time.time()
with llmc.Runtime(sys.argv[1], target="nvptx", max_context=4096) as runtime:
    ready = time.time()
    next(runtime.generate([1] * 8, 1, ignore_eos=True))
    print(loaded, ready, time.time())
"""


def start_part(shape: str, work: Path) -> dict[str, Any]:
    """Seconds from the start of a process; the second one, for which everything is in memory."""
    for _ in range(2):
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", FIRST_TOKEN, str(work / f"{shape}.llmc")], text=True,
            capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            sys.exit(done.stderr)
    imported, ready, token = (float(text) - started for text in done.stdout.split())
    return {"imported": round(imported, 2), "loaded": round(ready, 2),
            "first_token": round(token, 2)}


# ---- a model's steps ----------------------------------------------------------------------------


def decode_bytes(runtime: Any) -> int:
    """Bytes that a decode step at CONTEXT must read: every weight that is multiplied by, and the
    cache."""
    from llmc.bench import StepCosts

    cost = StepCosts(runtime).of_tokens(1, 1, CONTEXT)
    return cost.weight_bytes + cost.state_bytes


class Timeline:
    """Events round every step that an executor or its decoders run, from now on until `stop`."""

    def __init__(self, executor: Any):
        self.steps: list[tuple[Any, Any]] = []
        self._executor, self._run = executor, executor._run
        executor._run = self._timed
        self._trace(self.steps)

    def _trace(self, steps: list[tuple[Any, Any]] | None) -> None:
        for decoder in self._executor._decoders:
            decoder.trace = steps

    def _timed(self, *arguments: Any) -> None:
        begin = record_event(self._executor.device)
        self._run(*arguments)
        self.steps.append((begin, record_event(self._executor.device)))

    def stop(self) -> list[float]:
        """Seconds of each step."""
        self._executor._run = self._run
        self._trace(None)
        self._executor.device.wait()
        return [seconds_between(begin, end) for begin, end in self.steps]

    def busy(self) -> float:
        """Share of the time from the first step's begin to the last one's end in which one ran."""
        running = sum(seconds_between(begin, end) for begin, end in self.steps)
        return running / seconds_between(self.steps[0][0], self.steps[-1][1])


class Waiting:
    """The seconds for which the host waits for the GPU, from now on until `stop`."""

    def __init__(self, executor: Any):
        self._executor, self._before = executor, executor.waited

    def stop(self) -> float:
        return self._executor.waited - self._before


def decode(runtime: Any, watch: Callable[[], Any] = lambda: None) -> tuple[float, Any]:
    """Seconds a token by the clock, greedy, one sequence; and what `watch` made before the first
    of them."""
    prompt = np.random.default_rng(0).integers(3, 32000, CONTEXT - WARM - TIMED // 2)
    tokens = runtime.generate(prompt, WARM + TIMED + SPARE, ignore_eos=True)
    for _ in range(WARM):
        next(tokens)
    watched = watch()
    started = time.perf_counter()
    for _ in range(TIMED):
        next(tokens)
    seconds = (time.perf_counter() - started) / TIMED
    if watched is not None:
        watched.result = watched.stop()
    tokens.close()
    return seconds, watched


def prefill(runtime: Any) -> tuple[float, float]:
    """Seconds of one step of PROMPT tokens, by the clock and by events."""
    from llmc.runtime.pages import Sequence as CachedSequence
    from llmc.runtime.step import GREEDY, Chunk

    ids = np.random.default_rng(1).integers(3, 32000, PROMPT).astype(np.int32)
    walls = []
    events = Timeline(runtime.executor)
    for _ in range(12):
        sequence = CachedSequence()
        started = time.perf_counter()
        runtime.step([Chunk(sequence, ids, 1)], GREEDY)
        walls.append(time.perf_counter() - started)
        runtime.release(sequence)
    return statistics.median(walls[3:]), statistics.median(events.stop()[3:])


def open_model(shape: str, work: Path) -> Any:
    import llmc

    return llmc.Runtime(work / f"{shape}.llmc", target="nvptx", max_context=4096,
                        specialize="none")


def decoding(runtime: Any, bandwidth: float) -> dict[str, float]:
    """Figures of a token. bandwidth: bytes per second."""
    decode(runtime)
    wall = statistics.median(decode(runtime)[0] for _ in range(3))
    host = statistics.median(watched - waiting.result / TIMED for watched, waiting in (
        decode(runtime, lambda: Waiting(runtime.executor)) for _ in range(3)))
    _, events = decode(runtime, lambda: Timeline(runtime.executor))
    steps = statistics.median(events.result)
    own = decode_bytes(runtime) / bandwidth
    return {"milliseconds": round(wall * 1e3, 3), "events_ms": round(steps * 1e3, 3),
            "share_of_bandwidth": round(own / wall, 3), "events_share": round(own / steps, 3),
            "host_microseconds": round(host * 1e6, 1),
            "gpu_busy": round(events.busy(), 3)}


def steps_part(shape: str, work: Path) -> dict[str, Any]:
    """The host chooses each token before it begins the next step."""
    runtime = open_model(shape, work)
    runtime.executor.borrow_decoder = lambda *_: None
    bandwidth = read_bandwidth(runtime.executor.device)
    return {"decode": decoding(runtime, bandwidth)}


def model_part(shape: str, work: Path) -> dict[str, Any]:
    started = time.perf_counter()
    runtime = open_model(shape, work)
    loading = time.perf_counter() - started
    bandwidth = read_bandwidth(runtime.executor.device)
    clock, device = prefill(runtime)
    return {"load_seconds": round(loading, 2), "bandwidth_gigabytes": round(bandwidth / 1e9),
            "decode": decoding(runtime, bandwidth),
            "prefill": {"tokens": PROMPT, "milliseconds": round(clock * 1e3, 2),
                        "events_ms": round(device * 1e3, 2),
                        "tokens_per_second": round(PROMPT / clock),
                        "events_tokens_per_second": round(PROMPT / device)}}


# ---- peers --------------------------------------------------------------------------------------


def torch_part(shape: str, work: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """What torch makes of the shape; also prints a line after each measurement, of all so far."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    try:
        import torch
        import transformers
    except ImportError as error:
        return {"left_out": str(error)}
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, figures in gpu_peers.measure(make_model.LLAMA[shape], wanted, CONTEXT, TIMED, PROMPT):
        result[name] = figures
        print(json.dumps(result), flush=True)
    return result


def compare(ours: dict[str, Any], peers: dict[str, Any]) -> dict[str, float]:
    """How many times as fast ours is, by the name of what a peer measured."""
    return {name: round(figures["milliseconds"] / ours[kind]["milliseconds"], 2)
            for name, figures in peers.items() if isinstance(figures, dict)
            and (kind := name.partition("-")[0]) in ours and "milliseconds" in figures}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people: ours beside the peers of the same run."""
    lines = []
    for shape in ("1b", "8b"):
        ours, peers = results.get(f"model-{shape}", {}), results.get(f"torch-{shape}", {})
        for kind, what in (("decode", f"ms a token at context {CONTEXT}"),
                           ("prefill", f"ms for {PROMPT} tokens")):
            if kind not in ours:
                continue
            lines.append(f"{shape} {kind:8} {'llmc':28} {ours[kind]['milliseconds']:10.3f} {what}")
            for name, figures in peers.items():
                if not name.startswith(kind):
                    continue
                text = figures.get("failed") or (
                    f"{figures['milliseconds']:10.3f} llmc is {peers['ours_is_faster'][name]:.2f} "
                    f"times as fast; ready after {figures['ready_seconds']} s")
                lines.append(f"{shape} {kind:8} {'torch ' + name.partition('-')[2]:28} {text}")
        if "left_out" in peers:
            lines.append(f"{shape} torch is left out: {peers['left_out']}")
    return lines


# ---- kernels alone ------------------------------------------------------------------------------


def matmul_part(work: Path) -> dict[str, Any]:
    """Products of the 8B layers, beside torch's."""
    from concurrent.futures import ProcessPoolExecutor

    import gpu_matmul

    cases = [gpu_matmul.Case(name, "bf16", k, n, rows)
             for name, (k, n) in gpu_matmul.SHAPES["8b"].items() for rows in gpu_matmul.ROWS]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1)) as pool:  # before there is a context
        built = list(pool.map(gpu_matmul.build, cases, ["sm_90a"] * len(cases)))
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    results = [gpu_matmul.measure(case, each, 5) for case, each in zip(cases, built, strict=True)]
    shares = {f"{each['case']} {each['rows']}": each["share"] for each in results}
    return {"geometric_mean": round(statistics.geometric_mean(shares.values()), 3),
            "least": min(shares.values()), "shares": shares,
            "microseconds": {name: each["microseconds"]
                             for name, each in zip(shares, results, strict=True)}}


def attention_part(kind: str, work: Path) -> dict[str, Any]:
    import gpu_attention
    import torch

    device = gpu_attention.Device()
    torch.cuda.init()
    times = {"prefill": gpu_attention.time_prefill, "decode": gpu_attention.time_decode}[kind]
    results = {each["case"]: each for each in times(torch, device, "")}
    shares = {name: each["share"] for name, each in results.items()}
    return {"geometric_mean": round(statistics.geometric_mean(shares.values()), 3),
            "least": min(shares.values()), "shares": shares,
            "microseconds": {name: each["microseconds"] for name, each in results.items()}}


# ---- all parts ----------------------------------------------------------------------------------

# What is asked for in the process of its own, and the most seconds of each part.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], int]] = {
    "bandwidth": (lambda options: bandwidth_part(options.work), 30),
    "compile-1b": (lambda options: compile_part("1b", options.work), 60),
    "start-1b": (lambda options: start_part("1b", options.work), 40),
    "steps-1b": (lambda options: steps_part("1b", options.work), 40),
    "model-1b": (lambda options: model_part("1b", options.work), 60),
    "torch-1b": (lambda options: torch_part("1b", options.work, options.peers), 200),
    "compile-8b": (lambda options: compile_part("8b", options.work), 120),
    "model-8b": (lambda options: model_part("8b", options.work), 90),
    "torch-8b": (lambda options: torch_part("8b", options.work, options.peers), 200),
    "matmul": (lambda options: matmul_part(options.work), 75),
    "attention-prefill": (lambda options: attention_part("prefill", options.work), 60),
    "attention-decode": (lambda options: attention_part("decode", options.work), 60),
}


def run_part(name: str, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """A part's result, from a process of its own; {"failed": its last words} if it has none, beside
    what it had printed by then."""
    limit = min(PARTS[name][1], left)
    if limit < 1:
        return {"failed": "no time was left"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--inside", name, "--work", str(options.work),
         "--peers", ",".join(options.peers)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    failed = ""
    try:
        output, errors = process.communicate(timeout=limit)
        if process.returncode:
            failed = " | ".join((errors or output).splitlines()[-6:])[-900:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        output, _ = process.communicate()
        failed = f"no result after {limit:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {}
    return result | ({"failed": failed} if failed else {}) | {
        "part_seconds": round(time.perf_counter() - started, 1)}


def make_directory() -> Path:
    """For some 40 GB of models: in memory if it has the room."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MODEL_BYTES
    return Path(tempfile.mkdtemp(prefix="llmc-bench-", dir=memory if roomy else None))


def record(path: Path, device: dict[str, str], name: str, result: dict[str, Any]) -> None:
    """Put a part's result beside those that the file has."""
    found = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    found |= {"device": device, "parts": found["parts"] | {name: result}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def run_parts(names: Sequence[str], options: argparse.Namespace, device: Any) -> bool:
    """Run parts, print and record their results; whether all gave one."""
    facts = {"name": device.name, "architecture": device.architecture, "driver": device.cuda}
    output = options.output or ROOT / "benchmarks/results" / (
        device.name.lower().replace(" ", "-") + ".json")
    end = time.monotonic() + options.seconds
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        result = run_part(name, options, end - time.monotonic())
        if name.startswith("torch-"):
            ours = results.get(name.replace("torch", "model"), {})
            result["ours_is_faster"] = compare(ours, result)
        results[name] = result
        print(json.dumps({"part": name} | result), flush=True)
        record(output, facts, name, result)
    print("\n".join(table(results)), flush=True)
    return not any("failed" in result for result in results.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--peers", default=",".join(gpu_peers.MEASUREMENTS),
                        help="what torch is measured at, or none")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--work", type=Path, help="where models are left")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    options.peers = [] if options.peers in ("none", "") else options.peers.split(",")
    for what, names, known in (("part", options.parts, PARTS),
                               ("peer", options.peers, gpu_peers.MEASUREMENTS)):
        if unknown := set(names) - set(known):
            parser.error(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.inside:
        print(json.dumps(PARTS[options.inside][0](options)))
        return 0
    try:
        device = Device()
    except DeviceError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1
    names = [name for name in options.parts if options.peers or not name.startswith("torch-")]
    own = options.work is None
    options.work = options.work or make_directory()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if run_parts(names, options, device) else 1
    finally:
        if own:
            shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
