#!/usr/bin/env python3
"""Replays a trace of prompt lengths and decode batches under four strategies, interleaved.

    specialize.py MODEL [--threads N] [--rounds N] [--warm SECONDS]

generic: the artifact's own variants. eager: exact code of the hot shapes before the first request.
padded: prompts padded to powers of two, on eager exact code of those. lazy: what specialisation
finds by itself. A round replays the same requests under each; ratios are medians over rounds of
paired sums. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import llmc
from llmc.runtime.cache import VariantCache
from llmc.runtime.compiler import Compiler
from llmc.runtime.pages import Sequence
from llmc.runtime.step import Chunk

HOT = (("prompt", 8), ("prompt", 5), ("decode", 8))
LATER = (("prompt", 7), ("prompt", 16), ("decode", 5))
HOT_SHARE = 0.8
MOST_TOKENS = 128
CONTEXT = 100  # tokens that decoded sequences have behind them

Request = tuple[str, int]


def make_trace(hot: tuple[Request, ...], count: int, seed: int) -> list[Request]:
    """Requests: most of them hot, the rest prompts of long-tailed lengths."""
    random = np.random.default_rng(seed)
    trace = []
    for _ in range(count):
        if random.random() < HOT_SHARE:
            trace.append(hot[random.integers(len(hot))])
        else:
            length = int(np.clip(random.lognormal(3.0, 0.8), 1, MOST_TOKENS))
            trace.append(("prompt", length))
    return trace


def shape(request: Request) -> dict[str, int]:
    kind, size = request
    count = size if kind == "decode" else 1
    return {"tokens": size, "sequences": count, "rows": count}


class Strategy:
    """One runtime that replays requests."""

    def __init__(self, name: str, model: Path, threads: int, padded: bool = False, **options: Any):
        self.name, self.padded = name, padded
        self.runtime = llmc.Runtime(model, threads=threads, max_context=1024, max_batch=16,
                                    **options)
        self.random = np.random.default_rng(0)
        vocabulary = self.runtime.config["vocab_size"]
        self.ids = self.random.integers(0, vocabulary, MOST_TOKENS * 2).astype(np.int32)

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
        started = time.perf_counter()
        self.runtime.step(chunks)
        seconds = time.perf_counter() - started
        for sequence in sequences:
            self.runtime.release(sequence)
        return seconds

    def replay(self, trace: list[Request]) -> np.ndarray:
        return np.array([self.run(request) for request in trace])

    def settle(self, trace: list[Request], limit: float) -> float:
        """Replay until every shape has its verdict; seconds that it took."""
        started = time.monotonic()
        wanted = {",".join(f"{name}={value}" for name, value in shape(request).items())
                  for request in trace}
        while time.monotonic() - started < limit:
            for request in trace:
                self.run(request)
            if wanted <= self.state()["verdicts"].keys():
                break
        return time.monotonic() - started

    def state(self) -> dict[str, Any]:
        return self.runtime.stats()["specialize"]


def compare(strategies: list[Strategy], trace: list[Request], hot: tuple[Request, ...],
            rounds: int) -> dict[str, Any]:
    """Ratios of paired rounds: of the whole trace, and of each hot shape."""
    times: dict[str, list[np.ndarray]] = {s.name: [] for s in strategies}
    for _ in range(rounds):
        for strategy in strategies:
            times[strategy.name].append(strategy.replay(trace))
    hot_at = {f"{kind} {size}": np.array([r == (kind, size) for r in trace]) for kind, size in hot}

    def ratio(a: str, b: str, where: np.ndarray | slice = slice(None)) -> float:
        return round(median(float(np.median(x[where] / y[where]))
                            for x, y in zip(times[a], times[b], strict=True)), 3)

    every_hot = np.logical_or.reduce(list(hot_at.values()))
    return {
        "lazy / eager, hot": ratio("lazy", "eager", every_hot),
        "lazy / generic, hot": ratio("lazy", "generic", every_hot),
        "lazy / generic, each hot": {name: ratio("lazy", "generic", at)
                                     for name, at in hot_at.items()},
        "lazy / generic, whole trace": total_ratio(times, "lazy", "generic"),
        "lazy / padded, whole trace": total_ratio(times, "lazy", "padded")}


def total_ratio(times: dict[str, list[np.ndarray]], a: str, b: str) -> float:
    return round(median(x.sum() / y.sum() for x, y in zip(times[a], times[b], strict=True)), 3)


def while_compiling(strategy: Strategy, cache: Path, rounds: int) -> dict[str, float]:
    """p99 latency of a hot request with a compiler busy over p99 without, in paired rounds."""
    specializer = strategy.runtime._specializer
    assert specializer is not None
    compiler = Compiler(specializer.compiler.source, VariantCache(cache))
    ratios = []
    for number in range(rounds):
        quiet = strategy.replay([HOT[0]] * 60)
        for tokens in range(300 + 10 * number, 303 + 10 * number):
            compiler.submit(specializer._job((tokens, 1, 1), {}))
        busy = strategy.replay([HOT[0]] * 60)
        for _ in range(3):
            compiler.finished.get(timeout=300)
        ratios.append(float(np.percentile(busy, 99) / np.percentile(quiet, 99)))
    compiler.close()
    return {"p99 compiling / p99 quiet": round(median(ratios), 3)}


def overhead(strategy: Strategy, calls: int = 20_000) -> float:
    """Microseconds of a step that dispatch and profile take."""
    dispatch = strategy.runtime.executor.dispatch
    values = dict.fromkeys(strategy.runtime.executor.symbols, 1)
    started = time.perf_counter()
    for _ in range(calls):
        dispatch.observe(values, dispatch.choose(values), 1e-9)
    return (time.perf_counter() - started) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--warm", type=float, default=90.0, help="seconds to settle, at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(arguments, Path(directory)), indent=1))


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    artifact = llmc.compile(arguments.model).path

    def strategy(name: str, **options: Any) -> Strategy:
        return Strategy(name, artifact, arguments.threads, **options)

    powers = [{"tokens": 1 << n} for n in range(8)]
    lazy = strategy("lazy", specialize="lazy", max_variants=3, cache_dir=directory / "lazy")
    strategies = [
        strategy("generic"),
        strategy("eager", specialize="eager", shapes=[shape(r) for r in HOT],
                 cache_dir=directory / "eager"),
        strategy("padded", padded=True, specialize="eager", shapes=powers,
                 cache_dir=directory / "padded"),
        lazy]
    result: dict[str, Any] = {"target": lazy.runtime.manifest.target.split(":")[1],
                              "threads": arguments.threads}
    result["seconds to settle"] = round(lazy.settle(list(HOT), arguments.warm), 1)
    trace = make_trace(HOT, arguments.requests, seed=1)
    result["trace"] = compare(strategies, trace, HOT, arguments.rounds)
    result["promoted"] = lazy.state()["promoted"]
    result |= while_compiling(lazy, directory, arguments.rounds)
    result["seconds to settle after the shift"] = round(
        lazy.settle(list(LATER), arguments.warm), 1)
    result["after the shift"] = lazy.state()
    result["dispatch microseconds"] = round(overhead(lazy), 2)
    for each in strategies:
        each.runtime.close()
    return result


if __name__ == "__main__":
    main()
