#!/usr/bin/env python3
"""What specialisation gains and costs: replays traces under several strategies, interleaved.

    specialize.py MODEL [--target host|nvptx] [--only trace,search,...] [--search] [--json]

trace      requests with three hot shapes and a long tail, under: generic (the artifact's own
           variants), eager (exact code of the hot shapes before the first request, twice: the
           second shows the noise), padded (prompts padded to powers of two, with exact code of
           those), lazy (what specialisation finds by itself). Every request runs under each before
           the next; ratios are medians of paired requests, or of rounds' sums.
batched    the same, of four prompts at a time
shift      the hot shapes change, with room for as many variants as are hot: what is promoted and
           evicted, and how long that takes; by measured gain, and by a threshold of calls
search     every hot shape by every schedule of a grid: best, exact as promoted, and generic
latency    p99 of a hot request while compiles run over p99 without, in paired rounds
restart    start to first token of a process with the profile and code of an earlier one, over one
           that does not specialise, in pairs of processes
overhead   microseconds of a step that dispatch and profile take

"checks" says what holds of what specialisation promises; the exit status is 1 if anything does not.
On an H100 with a 1B shape of 4 layers all of it takes about four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import llmc
from llmc.errors import LlmcError
from llmc.runtime.cache import VariantCache
from llmc.runtime.compiler import Compiler, Job
from llmc.runtime.dispatch import Table
from llmc.runtime.pages import Sequence
from llmc.runtime.specialize import Specializer
from llmc.runtime.step import GREEDY, Chunk
from llmc.runtime.trials import Gain, estimate

Request = tuple[str, int]  # "prompt" or "batch" of so many tokens, or "decode" of as many sequences

HOT_SHARE = 0.8
CONTEXT = 100  # tokens that decoded sequences have behind them
BATCH = 4  # prompts of a batch
LATENCY_REQUESTS = 200  # of a half round, at least; and for so many seconds
LATENCY_SECONDS = 4.0
FIRST_OTHER = 100  # tokens of the first shape that is compiled for beside them
THRESHOLD = 10  # calls that promote where no gain is measured
# Prompts of a CPU are short; those of a GPU have the lengths of chats (medians of two services'
# traces are 1,020 and 1,500 tokens: Patel et al., "Splitwise", 2023). The next power of two is, of
# any length, 1/ln 2 = 1.44 times as much on the average; of the GPU's hot ones 1.46, 1.49.
LARGEST = {"host": {"prompt": 128, "batch": 48}, "nvptx": {"prompt": 2048, "batch": 512}}
TAIL: Mapping[str, Mapping[str, tuple[float, float]]] = {  # log-normal lengths of the others
    "host": {"prompt": (3.0, 0.8), "batch": (3.0, 0.8)},
    "nvptx": {"prompt": (6.0, 0.8), "batch": (5.3, 0.8)}}
CONTEXT_LIMIT = 2048
HOT: Mapping[str, tuple[Request, ...]] = {
    "host": (("prompt", 8), ("prompt", 5), ("decode", 8)),
    "nvptx": (("prompt", 300), ("prompt", 850), ("decode", 16))}
HOT_BATCHES: Mapping[str, tuple[Request, ...]] = {
    "host": (("batch", 8), ("batch", 5), ("decode", 8)),
    "nvptx": (("batch", 150), ("batch", 400), ("decode", 24))}
LATER: Mapping[str, tuple[Request, ...]] = {
    "host": (("prompt", 7), ("prompt", 16), ("decode", 5)),
    "nvptx": (("prompt", 200), ("prompt", 600), ("decode", 24))}
GRID: Mapping[str, tuple[dict[str, int], ...]] = {
    "host": ({}, {"few_rows": 0}, {"few_rows": 16}, *(
        {"matmul_rows": rows, "few_rows": few} for rows in (3, 4, 5, 7) for few in (0, 4))),
    "nvptx": ({}, {"few_rows": 16}, {"few_rows": 32})}
SECTIONS = ("trace", "batched", "shift", "search", "latency", "restart", "overhead")


def make_trace(target: str, hot: tuple[Request, ...], count: int, seed: int) -> list[Request]:
    """Requests: most of them hot, the rest prompts, or batches of them, of long-tailed lengths."""
    random, kind = np.random.default_rng(seed), hot[0][0]
    lengths = random.lognormal(*TAIL[target][kind], count)
    lengths = np.clip(lengths, 1, LARGEST[target][kind]).astype(int)
    return [hot[random.integers(len(hot))] if random.random() < HOT_SHARE
            else (kind, int(length)) for length in lengths]


def count_of(request: Request) -> int:
    """Its sequences."""
    return {"prompt": 1, "batch": BATCH}.get(request[0], request[1])


def shape(request: Request) -> dict[str, int]:
    kind, size = request
    count = count_of(request)
    return {"tokens": count * (1 if kind == "decode" else size), "sequences": count, "rows": count}


def name_of(request: Request) -> str:
    """The beginning of its variant's name."""
    return ",".join(f"{name}={value}" for name, value in shape(request).items())


def padded(request: Request) -> Request:
    kind, size = request
    return request if kind == "decode" else (kind, 1 << (size - 1).bit_length())


class Strategy:
    """One runtime that replays requests."""

    def __init__(self, name: str, artifact: Path, arguments: argparse.Namespace,
                 is_padded: bool = False, **options: Any):
        self.name, self.is_padded = name, is_padded
        self.runtime = llmc.Runtime(artifact, target=arguments.target, threads=arguments.threads,
                                    max_context=CONTEXT_LIMIT, max_batch=32, **options)
        # A GPU chooses tokens itself, as it does for the server: logits of 16 rows take longer to
        # the host than the step.
        self.output = GREEDY if arguments.target == "nvptx" else "logits"
        self.clock = time.thread_time if arguments.cpu_time else time.perf_counter
        random = np.random.default_rng(0)
        words = self.runtime.config["vocab_size"]
        self.ids = random.integers(0, words, CONTEXT_LIMIT).astype(np.int32)

    def run(self, request: Request) -> float:
        """Seconds of one request's step."""
        kind, size = padded(request) if self.is_padded else request
        sequences = [Sequence() for _ in range(count_of(request))]
        if kind == "decode":
            for sequence in sequences:
                sequence.length = CONTEXT
        tokens = 1 if kind == "decode" else size
        chunks = [Chunk(sequence, self.ids[:tokens], 1) for sequence in sequences]
        started = self.clock()
        self.runtime.step(chunks, self.output)
        seconds = self.clock() - started
        for sequence in sequences:
            self.runtime.release(sequence)
        return seconds

    def settle(self, requests: tuple[Request, ...], limit: float,
               trace: list[Request] | None = None) -> float:
        """Replay these requests, or a trace that they are the hot ones of, until each of their
        shapes has its verdict; seconds that it took."""
        started = time.monotonic()
        wanted = [name_of(request) for request in requests]
        while time.monotonic() - started < limit:
            for request in trace or requests * 10:
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


def trace_section(artifact: Path, arguments: argparse.Namespace, directory: Path,
                  hot: tuple[Request, ...]) -> dict[str, Any]:
    def start(name: str, mode: str, shapes: list, is_padded: bool = False) -> Strategy:
        return Strategy(name, artifact, arguments, is_padded, specialize=mode, shapes=shapes,
                        cache_dir=directory / mode)

    shapes = [shape(request) for request in hot]
    powers = [dict(sizes) for sizes in {tuple(shape(padded(each)).items()): 0 for each in hot}]
    strategies = [start("generic", "none", []), start("eager", "eager", shapes),
                  start("eager again", "eager", shapes),
                  start("padded", "eager", powers, is_padded=True)]
    lazy = start("lazy", "lazy", [])  # the last one: nothing else runs beside its trials
    strategies.append(lazy)
    trace = make_trace(arguments.target, hot, arguments.requests, seed=1)
    settled = lazy.settle(hot, arguments.warm, trace)
    replay(strategies, trace, 1)
    result = {"seconds to settle": round(settled, 1),
              **compare(replay(strategies, trace, arguments.rounds), trace, hot),
              "promoted": lazy.state()["promoted"], "verdicts": lazy.state()["verdicts"]}
    for each in strategies:
        each.runtime.close()
    return result


def check_trace(result: Mapping[str, Any]) -> dict[str, bool]:
    return {"lazy is within 3 % of eager on hot requests": result["hot"]["lazy / eager"] <= 1.03,
            "lazy beats padding by 8 %": result["whole trace"]["lazy / padded"] <= 0.92}


def shift_section(artifact: Path, arguments: argparse.Namespace, directory: Path
                  ) -> dict[str, Any]:
    """The hot shapes change, with room for as many variants only."""
    return {name: shift(artifact, arguments, directory / name, options) for name, options in (
        ("by measured gain", {}), ("by a threshold", {"promote_after": THRESHOLD}))}


def shift(artifact: Path, arguments: argparse.Namespace, cache_dir: Path, options: dict[str, int]
          ) -> dict[str, Any]:
    hot, later = HOT[arguments.target], LATER[arguments.target]
    lazy = Strategy("lazy", artifact, arguments, specialize="lazy", cache_dir=cache_dir,
                    max_variants=len(hot), **options)
    settled = lazy.settle(hot, arguments.warm)
    before = list(lazy.state()["promoted"])
    after = max((event.number for event in lazy.runtime.events()), default=0)
    shifted = lazy.settle(later, arguments.warm)
    events = lazy.runtime.events(after)
    result = {"seconds to settle": [round(settled, 1), round(shifted, 1)],
              "promoted before": before, "promoted after": list(lazy.state()["promoted"]),
              "gains": {name: each["gain"] for name, each in lazy.state()["promoted"].items()},
              **{kind: [event.variant for event in events if event.kind == kind]
                 for kind in ("kept", "dropped", "evicted")}}
    lazy.runtime.close()
    return result


def check_shift(result: Mapping[str, Any], target: str) -> dict[str, bool]:
    """By a threshold, all hot shapes change places. By measured gain, whatever code was kept is
    there, and only as much went as it needed room."""
    checks = {}
    for name, found in result.items():
        before, after = found["promoted before"], found["promoted after"]
        new = {own for own in found["kept"] if own.startswith(tuple(map(name_of, LATER[target])))}
        room = len(HOT[target]) - len(before)
        checks[f"the new hot shapes are promoted, {name}"] = new <= set(after) and bool(new)
        checks[f"old ones are evicted for them, {name}"] = (
            set(found["evicted"]) <= set(before)
            and len(found["evicted"]) == max(0, len(new) - room))
    strict = result["by a threshold"]
    checks["all of them, by a threshold"] = len(strict["promoted before"]) == len(
        strict["evicted"]) == len(strict["promoted after"]) == len(HOT[target])
    return checks


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
        gains = measure_jobs(generic, request, jobs, specializer.compiler, arguments)
        times = {name: 1.0 - gain.middle for name, gain in gains.items()}
        best = min(times, key=lambda name: times[name])
        result[" ".join(map(str, request))] = {
            "best schedule": best, "kept schedule": exact,
            "best / exact": round(times[best] / times[exact], 3),
            "best / generic": round(times[best] / times["generic"], 3),
            "exact / generic": round(times[exact] / times["generic"], 3),
            "exact is slower, certainly": gains[exact].high < 0.0,
            "each / generic": {name: round(value / times["generic"], 3)
                               for name, value in times.items()}}
    generic.runtime.close()
    eager.runtime.close()
    return result


def check_search(result: Mapping[str, Any]) -> dict[str, bool]:
    each = list(result.values())
    return {"exact reaches 0.97 of the best": all(own["best / exact"] >= 0.97 for own in each),
            "generic reaches 0.85 of the best": all(own["best / generic"] >= 0.85 for own in each),
            "exact is never slower than generic": not any(
                own["exact is slower, certainly"] for own in each)}


def measure_jobs(strategy: Strategy, request: Request, jobs: dict[str, Job], compiler: Compiler,
                 arguments: argparse.Namespace) -> dict[str, Gain]:
    """Name -> what a request gains over generic code; "generic" gains nothing."""
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
    base = times["generic"]
    return {name: estimate([new / old for new, old in zip(each[3:], base[3:], strict=True)])
            for name, each in times.items()}


# ---- what it costs ------------------------------------------------------------------------------


class Compiles:
    """Compiles that follow one another as long as one wants, each of a shape that is new; what is
    made is loaded, put into the table and taken out again."""

    def __init__(self, specializer: Specializer, cache: Path):
        self.specializer = specializer
        self.compiler = Compiler(specializer.compiler.source, VariantCache(cache))
        self.made = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _work(self) -> None:
        traffic, executor = self.specializer.traffic, self.specializer.executor
        while not self._stop.is_set():
            own = traffic.asked({"tokens": FIRST_OTHER + self.made})
            stored = self.compiler.compile(self.specializer._job(own, {})).variant
            assert stored is not None
            code = executor.load(stored.info, stored.object, stored.launches)
            executor.dispatch.replace(add=[code])
            executor.dispatch.replace(remove=[code])
            executor.retire(code)
            self.made += 1


def latency_section(strategy: Strategy, arguments: argparse.Namespace, directory: Path
                    ) -> dict[str, Any]:
    """Rounds of a hot request, beside compiles and without; who begins changes."""
    specializer = strategy.runtime._specializer
    assert specializer is not None
    specializer._wake.set()  # it compiles nothing by itself
    compiles = Compiles(specializer, directory / "other")
    request, ratios, medians = HOT[arguments.target][0], [], []
    measure_requests(strategy, request)
    for round_ in range(max(5, arguments.rounds)):
        times = {}
        for busy in ((True, False), (False, True))[round_ % 2]:
            with compiles if busy else nullcontext():
                times[busy] = measure_requests(strategy, request)
        ratios.append(float(np.percentile(times[True], 99) / np.percentile(times[False], 99)))
        medians.append(median(times[True]) / median(times[False]))
    compiles.compiler.close()
    return {"p99 compiling / quiet": round(median(ratios), 3),
            "rounds": np.round(ratios, 3).tolist(),
            "median compiling / quiet": round(median(medians), 3),
            "requests of a half round, at least": LATENCY_REQUESTS, "compiles": compiles.made}


def measure_requests(strategy: Strategy, request: Request) -> list[float]:
    """Seconds of so many requests that a hundredth of them are a few, and some compiles fit in."""
    times: list[float] = []
    until = time.monotonic() + LATENCY_SECONDS
    while len(times) < LATENCY_REQUESTS or time.monotonic() < until:
        times.append(strategy.run(request))
    return times


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
    options = {"target": arguments.target, "threads": arguments.threads,
               "max_context": CONTEXT_LIMIT, "cache_dir": str(directory / "restart")}
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
        try:
            result = measure(arguments, sections, Path(directory))
        except LlmcError as error:
            sys.exit(f"specialize.py: {error}")
    print(json.dumps(result, indent=None if arguments.json else 1))
    sys.exit(not all(result["checks"].values()))


def measure(arguments: argparse.Namespace, sections: list[str], directory: Path) -> dict[str, Any]:
    with llmc.Runtime(arguments.model, target=arguments.target, specialize="none") as runtime:
        artifact = runtime.artifact.directory
    result: dict[str, Any] = {"target": runtime.manifest.target.split(":")[1],
                              "threads": arguments.threads}
    checks: dict[str, bool] = {}
    for name in SECTIONS:
        if name in sections:
            started = time.monotonic()
            result[name], own = section(name, artifact, arguments, directory / name)
            checks |= {f"{name}: {text}": holds for text, holds in own.items()}
            print(f"{name}, {time.monotonic() - started:.0f} s: {json.dumps(result[name])}",
                  file=sys.stderr, flush=True)
    return {**result, "checks": checks}


def section(name: str, artifact: Path, arguments: argparse.Namespace, directory: Path
            ) -> tuple[dict[str, Any], dict[str, bool]]:
    """What was measured, and what that says of what is promised."""
    target = arguments.target
    if name in ("trace", "batched"):
        hot = (HOT if name == "trace" else HOT_BATCHES)[target]
        found = trace_section(artifact, arguments, directory, hot)
        return found, check_trace(found)
    if name == "shift":
        found = shift_section(artifact, arguments, directory)
        return found, check_shift(found, target)
    if name == "search":
        found = search_section(artifact, arguments, directory)
        return found, check_search(found)
    if name == "restart":
        found = restart_section(artifact, arguments, directory)
        return found, {"a hot start is within 10 %":
                       found["hot / generic, start to first token"] <= 1.1}
    lazy = Strategy("lazy", artifact, arguments, specialize="lazy", cache_dir=directory)
    if name == "latency":
        found = latency_section(lazy, arguments, directory)
        checks = {"p99 is within 25 % while compiling": found["p99 compiling / quiet"] <= 1.25}
    else:
        found, checks = overhead_section(lazy), {}
    lazy.runtime.close()
    return found, checks


if __name__ == "__main__":
    main()
