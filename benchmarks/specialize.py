#!/usr/bin/env python3
"""What specialisation gains and costs: replays traces under several strategies, interleaved.

    specialize.py MODEL [--target host|nvptx] [--only trace,search,...] [--search] [--json]

trace      requests with three hot shapes and a long tail, under: generic (the artifact's own
           variants), eager (exact code of the hot shapes before the first request, twice: the
           second shows the noise), padded (prompts padded to powers of two, with exact code of
           those), lazy (what specialisation finds by itself). Every request runs under each before
           the next; ratios are medians of paired requests, or of rounds' sums.
shift      then the hot shapes change: what lazy promotes and evicts, and how long that takes
search     every hot shape by every schedule of a grid: best, exact as promoted, and generic
latency    p99 of a hot request while compiles run over p99 without, in paired rounds
restart    start to first token of a process with the profile and code of an earlier one, over one
           that does not specialise, in pairs of processes
overhead   microseconds of a step that dispatch and profile take

On an H100 with a 1B shape of 4 layers all of it takes about three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import llmc
from llmc.runtime.cache import VariantCache
from llmc.runtime.compiler import Compiler, Job
from llmc.runtime.dispatch import Table
from llmc.runtime.pages import Sequence
from llmc.runtime.step import Chunk

Request = tuple[str, int]  # "prompt" of so many tokens, or "decode" of so many sequences

HOT_SHARE = 0.8
CONTEXT = 100  # tokens that decoded sequences have behind them
LARGEST = {"host": 128, "nvptx": 512}  # prompt
TAIL = {"host": (3.0, 0.8), "nvptx": (4.5, 0.8)}  # log-normal lengths of the other prompts
HOT: Mapping[str, tuple[Request, ...]] = {
    "host": (("prompt", 8), ("prompt", 5), ("decode", 8)),
    "nvptx": (("prompt", 100), ("prompt", 300), ("decode", 16))}
LATER: Mapping[str, tuple[Request, ...]] = {
    "host": (("prompt", 7), ("prompt", 16), ("decode", 5)),
    "nvptx": (("prompt", 50), ("prompt", 200), ("decode", 24))}
GRID: Mapping[str, tuple[dict[str, int], ...]] = {
    "host": ({}, {"few_rows": 0}, {"few_rows": 8}, *(
        {"matmul_rows": rows, "few_rows": few} for rows in (3, 4, 5, 7) for few in (0, 4))),
    "nvptx": ({}, {"few_rows": 16}, {"few_rows": 32})}
SECTIONS = ("trace", "shift", "search", "latency", "restart", "overhead")


def make_trace(target: str, hot: tuple[Request, ...], count: int, seed: int) -> list[Request]:
    """Requests: most of them hot, the rest prompts of long-tailed lengths."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(*TAIL[target], count), 1, LARGEST[target]).astype(int)
    return [hot[random.integers(len(hot))] if random.random() < HOT_SHARE
            else ("prompt", int(length)) for length in lengths]


def shape(request: Request) -> dict[str, int]:
    kind, size = request
    count = size if kind == "decode" else 1
    return {"tokens": size, "sequences": count, "rows": count}


class Strategy:
    """One runtime that replays requests."""

    def __init__(self, name: str, artifact: Path, arguments: argparse.Namespace,
                 padded: bool = False, **options: Any):
        self.name, self.padded = name, padded
        self.runtime = llmc.Runtime(artifact, target=arguments.target, threads=arguments.threads,
                                    max_context=1024, max_batch=32, **options)
        self.clock = time.thread_time if arguments.cpu_time else time.perf_counter
        random = np.random.default_rng(0)
        self.ids = random.integers(0, self.runtime.config["vocab_size"], 1024).astype(np.int32)

    def run(self, request: Request) -> float:
        """Seconds of one request's step."""
        kind, size = request
        if kind == "prompt" and self.padded:
            size = 1 << (size - 1).bit_length()
        sequences = [Sequence() for _ in range(size if kind == "decode" else 1)]
        if kind == "decode":
            for sequence in sequences:
                sequence.length = CONTEXT
        tokens = 1 if kind == "decode" else size
        chunks = [Chunk(sequence, self.ids[:tokens], 1) for sequence in sequences]
        started = self.clock()
        self.runtime.step(chunks)
        seconds = self.clock() - started
        for sequence in sequences:
            self.runtime.release(sequence)
        return seconds

    def settle(self, requests: tuple[Request, ...], limit: float) -> float:
        """Replay until each of the requests' shapes has its verdict; seconds that it took."""
        started = time.monotonic()
        wanted = [",".join(f"{name}={value}" for name, value in shape(request).items())
                  for request in requests]
        while time.monotonic() - started < limit:
            for request in requests * 10:
                self.run(request)
            verdicts = " ".join(self.state()["verdicts"])
            if all(name in verdicts for name in wanted):
                break
        return time.monotonic() - started

    def state(self) -> dict[str, Any]:
        return self.runtime.stats()["specialize"]


# ---- the trace ----------------------------------------------------------------------------------


def replay(strategies: list[Strategy], trace: list[Request], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds, requests] by strategy. Every request runs under each before the next, and
    who begins changes."""
    times = {each.name: np.zeros((rounds, len(trace))) for each in strategies}
    for round_ in range(rounds):
        for number, request in enumerate(trace):
            turn = (number + round_) % len(strategies)
            for each in strategies[turn:] + strategies[:turn]:
                times[each.name][round_, number] = each.run(request)
    return times


def compare(times: dict[str, np.ndarray], trace: list[Request], hot: tuple[Request, ...]
            ) -> dict[str, Any]:
    """Ratios of paired requests: of the hot ones, and of the whole trace."""
    places = {request: [own == request for own in trace] for request in hot}

    def each(a: str, b: str) -> dict[str, float]:
        return {f"{kind} {size}": _median(times[a][:, at] / times[b][:, at])
                for (kind, size), at in places.items()}

    def whole(a: str, b: str) -> float:
        return _median(times[a].sum(1) / times[b].sum(1))

    hot_at = np.logical_or.reduce(list(places.values()))
    pairs = {"eager again / eager": ("eager again", "eager"), "lazy / eager": ("lazy", "eager"),
             "lazy / generic": ("lazy", "generic")}
    return {"hot": {name: _median(times[a][:, hot_at] / times[b][:, hot_at])
                    for name, (a, b) in pairs.items()},
            "each hot": {name: each(a, b) for name, (a, b) in pairs.items()},
            "whole trace": {f"{a} / {b}": whole(a, b) for a, b in (
                ("lazy", "generic"), ("lazy", "padded"), ("lazy", "eager"))}}


def _median(ratios: np.ndarray) -> float:
    return round(float(np.median(ratios)), 3)


def trace_section(lazy: Strategy, artifact: Path, arguments: argparse.Namespace, directory: Path
                  ) -> dict[str, Any]:
    hot = HOT[arguments.target]
    powers = {1 << (size - 1).bit_length() for kind, size in hot if kind == "prompt"}
    padded_shapes = [{"tokens": size} for size in sorted(powers)] + [
        shape(request) for request in hot if request[0] == "decode"]

    def eager(name: str, shapes: list, padded: bool = False) -> Strategy:
        return Strategy(name, artifact, arguments, padded, specialize="eager", shapes=shapes,
                        cache_dir=directory / "eager")

    settled = lazy.settle(hot, arguments.warm)
    shapes = [shape(request) for request in hot]
    strategies = [Strategy("generic", artifact, arguments, specialize="none"),
                  eager("eager", shapes), eager("eager again", shapes),
                  eager("padded", padded_shapes, padded=True), lazy]
    trace = make_trace(arguments.target, hot, arguments.requests, seed=1)
    replay(strategies, trace, 1)
    result = {"seconds to settle": round(settled, 1),
              **compare(replay(strategies, trace, arguments.rounds), trace, hot),
              "promoted": lazy.state()["promoted"], "verdicts": lazy.state()["verdicts"]}
    for each in strategies[:-1]:
        each.runtime.close()
    return result


def shift_section(lazy: Strategy, arguments: argparse.Namespace) -> dict[str, Any]:
    """The hot shapes change, with room for as many variants only."""
    after = max((event.number for event in lazy.runtime.events()), default=0)
    settled = lazy.settle(LATER[arguments.target], arguments.warm)
    events = lazy.runtime.events(after)
    return {"seconds to settle": round(settled, 1), "promoted": list(lazy.state()["promoted"]),
            **{kind: [event.variant for event in events if event.kind == kind]
               for kind in ("kept", "dropped", "evicted")}}


# ---- the best there is --------------------------------------------------------------------------


def search_section(artifact: Path, arguments: argparse.Namespace, directory: Path
                   ) -> dict[str, Any]:
    """Per hot shape: time of generic and of exact code by every schedule, relative to the best."""
    generic = Strategy("generic", artifact, arguments, specialize="none")
    eager = Strategy("eager", artifact, arguments, specialize="eager",
                     shapes=[shape(request) for request in HOT[arguments.target]],
                     cache_dir=directory / "eager")
    specializer = eager.runtime._specializer
    assert specializer is not None
    result = {}
    for request in HOT[arguments.target]:
        own = specializer.traffic.asked(shape(request))
        jobs = {json.dumps(schedule): specializer._job(own, schedule)
                for schedule in GRID[arguments.target]}
        promoted = specializer.promoted.get(own)
        exact = json.dumps(dict(promoted.schedule)) if promoted else "generic"
        times = measure_jobs(generic, request, jobs, specializer.compiler, arguments)
        best = min(times, key=lambda name: times[name])
        result[" ".join(map(str, request))] = {
            "best schedule": best, "kept schedule": exact,
            "best / exact": round(times[best] / times[exact], 3),
            "best / generic": round(times[best] / times["generic"], 3),
            "exact / generic": round(times[exact] / times["generic"], 3),
            "each / generic": {name: round(value / times["generic"], 3)
                               for name, value in times.items()}}
    generic.runtime.close()
    eager.runtime.close()
    return result


def measure_jobs(strategy: Strategy, request: Request, jobs: dict[str, Job], compiler: Compiler,
                 arguments: argparse.Namespace) -> dict[str, float]:
    """Name -> time of a request over that of generic code (the median of pairs); "generic" is 1."""
    executor = strategy.runtime.executor
    own = executor.dispatch.table.variants
    tables = {"generic": Table(own)}
    for name, job in jobs.items():
        stored = compiler.compile(job).variant
        if stored is not None:
            code = executor.load(stored.info, stored.object, stored.launches)
            tables[name] = Table((code, *own))
    times: dict[str, list[float]] = {name: [] for name in tables}
    random = np.random.default_rng(0)
    for _ in range(3 + 8 * arguments.rounds):
        for name in random.permutation(list(tables)):
            executor.dispatch.table = tables[name]
            times[name].append(strategy.run(request))
    executor.dispatch.table = Table(own)
    base = np.array(times["generic"][3:])
    return {name: float(np.median(np.array(each[3:]) / base)) for name, each in times.items()}


# ---- what it costs ------------------------------------------------------------------------------


def latency_section(strategy: Strategy, arguments: argparse.Namespace, directory: Path
                    ) -> dict[str, Any]:
    """Rounds of a hot request: as many as two compiles take, and as many without any."""
    specializer = strategy.runtime._specializer
    assert specializer is not None
    compiler = Compiler(specializer.compiler.source, VariantCache(directory / "latency"))
    request, ratios, medians = HOT[arguments.target][0], [], []
    for round_ in range(max(5, arguments.rounds)):
        for tokens in (300 + 2 * round_, 301 + 2 * round_):
            own = specializer.traffic.asked({"tokens": tokens})
            compiler.submit(specializer._job(own, {}))
        busy = []
        while compiler.counts.compiled + compiler.counts.failed < 2 * (round_ + 1):
            busy.append(strategy.run(request))
        quiet = [strategy.run(request) for _ in busy]
        ratios.append(float(np.percentile(busy, 99) / np.percentile(quiet, 99)))
        medians.append(median(busy) / median(quiet))
    compiler.close()
    return {"p99 compiling / quiet": round(median(ratios), 3),
            "rounds": np.round(ratios, 3).tolist(),
            "median compiling / quiet": round(median(medians), 3),
            "compiles": compiler.counts.compiled}


FIRST_TOKEN = """
import sys, time, json
import llmc
options = json.loads(sys.argv[2])
with llmc.Runtime(sys.argv[1], **options) as runtime:
    runtime.run([1, 2, 3, 4, 5, 6, 7, 8])
    ready = time.time()
    exact = sum(row.tier == "exact" and row.calls > 0 for row in runtime.dispatch_table.rows)
    print(json.dumps([ready, exact]))
"""


def restart_section(artifact: Path, arguments: argparse.Namespace, directory: Path
                    ) -> dict[str, Any]:
    """A first process promotes the shape of a prompt; later ones start with and without that."""
    options = {"target": arguments.target, "threads": arguments.threads, "max_context": 1024,
               "cache_dir": str(directory / "restart")}
    with llmc.Runtime(artifact, specialize="lazy", promote_after=2, **options) as first:
        for _ in range(600):
            first.run([1, 2, 3, 4, 5, 6, 7, 8])
            if first.stats()["specialize"]["promoted"]:
                break
            time.sleep(0.05)
    hot, cold, ready = [], [], 0
    for _ in range(max(5, arguments.rounds)):
        for mode, seconds in (("none", cold), ("lazy", hot)):
            started = time.time()
            output = subprocess.run(
                [sys.executable, "-c", FIRST_TOKEN, str(artifact),
                 json.dumps(options | {"specialize": mode})], check=True, capture_output=True,
                env=os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}).stdout
            first_token, exact = json.loads(output)
            seconds.append(first_token - started)
            ready += exact
    return {"hot / generic, start to first token": _median(np.array(hot) / np.array(cold)),
            "seconds": [round(median(hot), 3), round(median(cold), 3)],
            "processes whose first request ran exact code": ready}


def overhead_section(strategy: Strategy, calls: int = 20_000) -> dict[str, Any]:
    """Choosing and counting, on their own; and a whole step's time outside native code."""
    executor = strategy.runtime.executor
    values = executor.known | dict.fromkeys(executor.symbols.keys() - executor.known.keys(), 1)
    variant = executor.dispatch.choose(values)
    started = time.perf_counter()
    for _ in range(calls):
        executor.dispatch.choose(values)
        executor.dispatch.observe(values, variant, 1e-9)
    return {"microseconds of a step": round((time.perf_counter() - started) / calls * 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--target", choices=("host", "nvptx"), default="host")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections")
    parser.add_argument("--search", action="store_true", help="the same as --only search")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60, help="of the trace")
    parser.add_argument("--warm", type=float, default=None,
                        help="seconds to settle, at most (default: 150, on a GPU 30)")
    parser.add_argument("--cpu-time", action="store_true",
                        help="CPU seconds, for --threads 1 on a machine that others use")
    parser.add_argument("--json", action="store_true", help="one line of JSON only")
    arguments = parser.parse_args()
    if arguments.warm is None:
        arguments.warm = 30.0 if arguments.target == "nvptx" else 150.0
    if arguments.cpu_time and (arguments.threads > 1 or arguments.target != "host"):
        parser.error("--cpu-time is the caller's own: it needs --threads 1 on the host")
    sections = ["search"] if arguments.search else arguments.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as directory:
        result = measure(arguments, sections, Path(directory))
    print(json.dumps(result, indent=None if arguments.json else 1))


def measure(arguments: argparse.Namespace, sections: list[str], directory: Path) -> dict[str, Any]:
    with llmc.Runtime(arguments.model, target=arguments.target, specialize="none") as runtime:
        artifact = runtime.artifact.directory
    lazy = Strategy("lazy", artifact, arguments, specialize="lazy", max_variants=3,
                    cache_dir=directory / "lazy")
    own = {"trace": lambda: trace_section(lazy, artifact, arguments, directory),
           "shift": lambda: shift_section(lazy, arguments),
           "search": lambda: search_section(artifact, arguments, directory),
           "latency": lambda: latency_section(lazy, arguments, directory),
           "restart": lambda: restart_section(artifact, arguments, directory),
           "overhead": lambda: overhead_section(lazy)}
    result: dict[str, Any] = {"target": lazy.runtime.manifest.target.split(":")[1],
                              "threads": arguments.threads}
    for name in SECTIONS:
        if name in sections:
            started = time.monotonic()
            result[name] = own[name]()
            print(f"{name}, {time.monotonic() - started:.0f} s: {json.dumps(result[name])}",
                  file=sys.stderr, flush=True)
    lazy.runtime.close()
    return result


if __name__ == "__main__":
    main()
