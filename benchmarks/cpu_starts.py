#!/usr/bin/env python3
"""From the start of a process to its first token, and the memory that a model takes.

    python benchmarks/cpu_starts.py [--shape 1b] [--dtype int8] [--threads 4] [--rounds 5] [--json]

`llmc generate` of an artifact in the cache, and llama-bench (if it is on PATH) without warming up,
in turns; 8 tokens of prompt and 1 that is made, until its text is there (llama-bench prints none)
and until the process has ended. One run of each before that is not counted: files are in memory
then, and Python's bytecode is, unless PYTHONDONTWRITEBYTECODE forbids it. Memory is that of a
process that has made 32 tokens behind 128, what it shares counted in part, over the bytes of the
weights.
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
from pathlib import Path
from statistics import median

from cpu_cells import DECODED, own_bytes
from cpu_peers import HERE, Process
from cpu_workers import GGUF_TYPES
from make_gguf import make_gguf
from make_model import LLAMA, make_model

PROMPT = "Once upon a time there was a"  # 8 tokens, with the first one


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Until more than the prompt is written, and until the process has ended."""
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        written = 0
        while written <= len(PROMPT) and (text := os.read(process.stdout.fileno(), 1 << 16)):
            written += len(text)
        first = time.perf_counter() - started
        process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return first, time.perf_counter() - started


def commands(model: Path, dtype: str, threads: int) -> dict[str, list[str]]:
    """What starts each engine that is there."""
    kind = ["--dtype", dtype] if dtype in ("f32", "bf16") else ["--quantize", dtype]
    found = {"llmc": [sys.executable, "-m", "llmc", "generate", str(model), *kind,
                      "--threads", str(threads), "--prompt", PROMPT, "--max-tokens", "1"]}
    if shutil.which("llama-bench"):
        file = model / f"{dtype}.gguf"
        if not file.exists():
            make_gguf(model, file, GGUF_TYPES[dtype])
        found["llama.cpp"] = ["llama-bench", "-m", str(file), "-t", str(threads), "-r", "1",
                              "-p", "0", "-n", "0", "-pg", "8,1", "--no-warmup"]
    return found


def starts(model: Path, dtype: str, threads: int, rounds: int) -> dict[str, float]:
    """Median seconds of each engine, to the end of its process; and of llmc to the first token."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    engines = commands(model, dtype, threads)
    taken: dict[str, list[float]] = {"llmc, first token": []} | {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, command in engines.items():
            first, end = seconds(command, environment)
            if number:
                taken[name].append(end)
                if name == "llmc":
                    taken["llmc, first token"].append(first)
    return {name: round(median(samples), 3) for name, samples in taken.items()}


def memory(model: Path, dtype: str, threads: int) -> float:
    """Bytes of a process of llmc that decodes."""
    process = Process("llmc", {"model": str(model), "dtype": dtype, "threads": threads})
    process.wait()
    process.ask({"work": "decode", "context": 128, "tokens": DECODED})
    taken = process.ask({"work": "memory"})
    process.close()
    if taken is None:
        raise SystemExit(f"llmc: {process.error}")
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(LLAMA), default="1b")
    parser.add_argument("--dtype", choices=list(GGUF_TYPES), default="int8")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, help="where models are kept (default: nowhere)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        stored = "f32" if options.dtype == "f32" else "bf16"
        model = (options.models or Path(temporary)) / f"{options.shape}-{stored}"
        if not (model / "tokenizer.json").exists():
            make_model(options.shape, model, stored, tiled=True)
        taken = starts(model, options.dtype, options.threads, options.rounds)
        resident = memory(model, options.dtype, options.threads)
    share = round(resident / own_bytes(options.shape, options.dtype), 3)
    if options.json:
        print(json.dumps({"start": taken, "memory_over_weights": share}))
        return 0
    for name, value in taken.items():
        print(f"{name}: {value:.2f} s from the start of the process")
    print(f"llmc: {resident / 1e6:.0f} MB resident, {share:.2f} of the weights")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
