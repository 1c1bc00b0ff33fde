#!/usr/bin/env python3
"""The CPU speed of llmc beside the engines that are installed, measured in turns.

    python benchmarks/cpu_peers.py [--only decode,prefill,encoder,matmul] [--threads 1,2,4]
        [--shapes 1b,110m] [--dtypes bf16,int8,int4] [--rounds 5] [--seconds 900] [--json]

Peers: llama.cpp (llama-bench on PATH), torch, onnxruntime (and onnxruntime_genai), openvino.
All get the same random model. A round measures each engine once, with the ceiling that bounds the
work (read bandwidth, or peak arithmetic) before and after, so that clocks and neighbours that
change hit all alike; figures are medians over rounds, a ratio is the median of the rounds' ratios.
Shares are those of the round's ceiling.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from make_gguf import make_gguf
from make_model import BERT, LLAMA, make_model

from llmc.ceilings import Ceilings

HERE = Path(__file__).parent
ENGINES = ("llmc", "llama.cpp", "torch", "onnxruntime", "openvino")
GGUF_TYPES = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
# Bits of a weight, scales included: of llama.cpp's blocks of 32, and of our groups of 128 and 32;
# our head is int8 in both.
BITS = {"f32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}
OWN_BITS = BITS | {"int8": 8.125}
MATMULS = ((2048, 2048), (8192, 2048), (2048, 8192))  # n, k
ROWS = (1, 4, 16, 64, 128, 512, 2048)
ENCODER = ((1, 16), (1, 128), (1, 384), (8, 128))  # batch, tokens
DECODED = 32
PAUSE = 0.25  # seconds: until the last engine's threads stand still


@dataclass(frozen=True)
class Cell:
    """One line of the table. job: for the workers; bound: the ceiling; work: bytes or operations
    of one job; own_work: the same of llmc where that differs."""

    group: str
    name: str
    shape: str
    dtype: str
    job: dict[str, Any]
    bound: str
    work: float
    own_work: float = 0.0


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for shape in options.shapes:
        for dtype in options.dtypes:
            peak = {"f32": "f32", "bf16": "bf16"}.get(dtype, "int8")
            parameters = weights_of(shape)
            for context in (128, 2048) if shape == "1b" else (128,):
                yield Cell("decode", f"context {context}", shape, dtype,
                           {"work": "decode", "context": context, "tokens": DECODED}, "bandwidth",
                           DECODED * parameters * BITS[dtype] / 8,
                           DECODED * own_bytes(shape, dtype))
            for tokens in (128, 512, 2048) if shape == "1b" else (512,):
                inner = parameters - embedding_of(shape)
                yield Cell("prefill", f"{tokens} tokens", shape, dtype,
                           {"work": "prefill", "tokens": tokens}, peak, 2 * tokens * inner)
    for dtype in ("f32", "bf16"):
        for batch, tokens in ENCODER:
            inner = weights_of("bert-base") - embedding_of("bert-base")
            yield Cell("encoder", f"{batch} x {tokens}", "bert-base", dtype,
                       {"work": "encode", "batch": batch, "tokens": tokens}, dtype,
                       2 * batch * tokens * inner)
        for n, k in MATMULS:
            for rows in ROWS:
                few = rows <= 4
                yield Cell("matmul", f"({n}, {k}) rows {rows}", "", dtype,
                           {"work": "matmul", "k": k, "n": n, "rows": rows},
                           "bandwidth" if few else dtype,
                           n * k * BITS[dtype] / 8 if few else 2.0 * rows * n * k)


def own_bytes(shape: str, dtype: str) -> float:
    """Bytes of a model's matrices as llmc stores them."""
    head = embedding_of(shape)
    of_head = OWN_BITS["int8"] if dtype == "int4" else OWN_BITS[dtype]
    return ((weights_of(shape) - head) * OWN_BITS[dtype] + head * of_head) / 8


def weights_of(shape: str) -> int:
    """Elements of a model's matrices, a tied one once."""
    c: dict[str, Any] = BERT if shape == "bert-base" else LLAMA[shape]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads, size = c["num_attention_heads"], c.get("head_dim", hidden // c["num_attention_heads"])
    kv = c.get("num_key_value_heads", heads)
    projections = 2 if shape == "bert-base" else 3
    layer = hidden * size * (2 * heads + 2 * kv) + projections * hidden * inner
    return c["num_hidden_layers"] * layer + embedding_of(shape)


def embedding_of(shape: str) -> int:
    c: dict[str, Any] = BERT if shape == "bert-base" else LLAMA[shape]
    return c["vocab_size"] * c["hidden_size"]


# ---- engines -----------------------------------------------------------------------------------


class Process:
    """A worker of cpu_workers.py; `error` says why there is none."""

    def __init__(self, engine: str, options: dict[str, Any]):
        environment = os.environ | {"LLMC_THREADS": str(options["threads"]),
                                    "OMP_NUM_THREADS": str(options["threads"])}
        environment["PYTHONPATH"] = f"{HERE.parent}:{environment.get('PYTHONPATH', '')}"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "cpu_workers.py"), engine, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment)
        self.error = self._answer().get("error", "")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "its process ended"}

    def seconds(self, job: dict[str, Any]) -> float | None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.error = "its process ended"
            return None
        answer = self._answer()
        self.error = answer.get("error", "")
        return answer.get("seconds")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class LlamaBench:
    """llama-bench, started anew for each sample: it warms up by itself."""

    def __init__(self, options: dict[str, Any]):
        self.error = "" if shutil.which("llama-bench") else "llama-bench is not on PATH"
        model = options["model"]
        if not self.error and (model is None or "bert" in str(model)):
            self.error = "runs language models only"
        if not self.error:
            self.file = Path(model) / f"{options['dtype']}.gguf"
            self.threads = options["threads"]
            try:
                if not self.file.exists():
                    make_gguf(Path(model), self.file, GGUF_TYPES[options["dtype"]])
            except ImportError as error:
                self.error = f"cannot write GGUF: {error}"

    def seconds(self, job: dict[str, Any]) -> float | None:
        prompt, made, depth = job["tokens"], 0, 0
        if job["work"] == "decode":
            prompt, made, depth = 0, job["tokens"], job["context"]
        command = ["llama-bench", "-m", str(self.file), "-t", str(self.threads), "-r", "1", "-o",
                   "json", "-p", str(prompt), "-n", str(made), "-d", str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            self.error = done.stderr.strip()[-200:]
            return None
        return json.loads(done.stdout)[0]["avg_ns"] / 1e9

    def close(self) -> None:
        """Nothing runs between samples."""


# ---- measuring ---------------------------------------------------------------------------------


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + options.seconds
        self.absent: dict[str, str] = {}

    def model(self, shape: str, dtype: str) -> str | None:
        """A checkpoint of the shape: bf16, and f32 of encoders that are to run in f32."""
        if not shape:
            return None
        stored = "f32" if dtype == "f32" else "bf16"
        path = self.folder / f"{shape}-{stored}"
        if not path.exists():
            make_model(shape, path, stored, tiled=True)
        return str(path)

    def table(self, threads: int) -> Iterator[dict[str, Any]]:
        """One line for each cell, while there is time."""
        ceilings = Ceilings(threads)
        wanted = [cell for cell in cells(self.options) if cell.group in self.options.only]
        for key in dict.fromkeys((cell.shape, cell.dtype) for cell in wanted):
            engines = self.engines(*key, threads)
            try:
                for cell in wanted:
                    if (cell.shape, cell.dtype) == key and time.monotonic() < self.deadline:
                        yield {"threads": threads, **self.line(cell, engines, ceilings)}
            finally:
                for engine in engines.values():
                    engine.close()

    def engines(self, shape: str, dtype: str, threads: int) -> dict[str, Any]:
        options = {"model": self.model(shape, dtype), "dtype": dtype, "threads": threads}
        found: dict[str, Any] = {}
        for name in self.options.engines:
            if not shape and name not in ("llmc", "torch"):
                continue
            engine = LlamaBench(options) if name == "llama.cpp" else Process(name, options)
            if engine.error:
                self.absent[f"{name} {shape} {dtype}"] = engine.error
            else:
                found[name] = engine
        return found

    def line(self, cell: Cell, engines: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
        """Medians over rounds; the first sample of each engine warms it up."""
        ceiling = getattr(ceilings, "read_bandwidth" if cell.bound == "bandwidth"
                          else f"peak_{cell.bound}")
        running = {name: engine for name, engine in engines.items()
                   if name == "llama.cpp" or engine.seconds(cell.job) is not None}
        samples: dict[str, list[float]] = {name: [] for name in running}
        limits: list[float] = []
        for _ in range(self.options.rounds):
            before = ceiling()
            for name, engine in running.items():
                time.sleep(PAUSE)
                seconds = engine.seconds(cell.job)
                if seconds is not None:
                    samples[name].append(seconds)
            limits.append(max(before, ceiling()))
            if time.monotonic() > self.deadline:
                break
        return self.report(cell, samples, limits)

    def report(self, cell: Cell, samples: dict[str, list[float]],
               limits: list[float]) -> dict[str, Any]:
        tokens = cell.job.get("tokens", 0) * cell.job.get("batch", 1)
        figures: dict[str, Any] = {}
        for name, taken in samples.items():
            if not taken:
                continue
            work = (cell.own_work or cell.work) if name == "llmc" else cell.work
            figure: dict[str, Any] = {"ms": round(median(taken) * 1e3, 3), "share": round(median(
                work / s / limit for s, limit in zip(taken, limits, strict=False)), 3)}
            if tokens:
                figure["tokens_per_second"] = round(tokens / median(taken), 1)
            figures[name] = figure
        own = samples.get("llmc") or []
        best = [min(others) for others in zip(*(taken for name, taken in samples.items()
                                                if name != "llmc" and taken), strict=False)]
        ratio = median(b / a for a, b in zip(own, best, strict=False)) if own and best else None
        return {"group": cell.group, "shape": cell.shape, "dtype": cell.dtype, "name": cell.name,
                "bound": cell.bound, "ceiling": round(median(limits) / 1e9, 1), "engines": figures,
                "ahead_of_best": ratio and round(ratio, 3)}


def show(line: dict[str, Any]) -> str:
    parts = [f"{name} {figure['ms']:.2f} ms ({figure['share']:.2f})"
             for name, figure in line["engines"].items()]
    ratio = line["ahead_of_best"]
    return (f"{line['threads']} threads  {line['group']:8s} {line['shape']:9s} {line['dtype']:5s} "
            f"{line['name']:22s} {' | '.join(parts)}"
            + (f" | x {ratio:.2f}" if ratio else "")
            + f" | {line['bound']} {line['ceiling']:.0f} G/s")


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=words, default=["decode", "prefill", "encoder", "matmul"])
    parser.add_argument("--engines", type=words, default=list(ENGINES))
    parser.add_argument("--shapes", type=words, default=["1b", "110m"])
    parser.add_argument("--dtypes", type=words, default=["bf16", "int8", "int4"])
    parser.add_argument("--threads", type=words, default=["4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1800, help="stop after so long")
    parser.add_argument("--models", type=Path, help="where models are kept (default: nowhere)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, folder)
        for threads in options.threads:
            for line in bench.table(int(threads)):
                print(json.dumps(line) if options.json else show(line), flush=True)
        for name, reason in bench.absent.items():
            print(json.dumps({"absent": name, "reason": reason}) if options.json
                  else f"without {name}: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
