#!/usr/bin/env python3
"""The CPU speed of llmc beside the engines that are installed, measured in turns.

    python benchmarks/cpu_peers.py [--only decode,prefill,encoder,matmul,noise] [--threads 1,2,4]
        [--shapes 1b,110m] [--dtypes bf16,int8,int4] [--rounds 5] [--seconds 900] [--json]

Peers: llama.cpp (the package llama_cpp), torch (also compiled), onnxruntime (onnxruntime_genai),
openvino (optimum-intel and nncf make its models). All get the same random model. A round measures
each engine once, with the ceiling that bounds the work (read bandwidth, or peak arithmetic) before
and after, so that clocks and neighbours that change hit all alike; figures are medians over rounds,
a ratio is the median of the rounds' ratios. Shares are those of the round's ceiling. The end says
what holds of the bars of cpu_summary.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from cpu_cells import Cell, cells
from cpu_summary import show_verdict, verdicts
from make_model import make_model

from llmc.ceilings import Ceilings

HERE = Path(__file__).parent
GROUPS = ("decode", "prefill", "encoder", "matmul", "noise")
ENGINES = ("llmc", "llama.cpp", "torch", "torch compiled", "onnxruntime", "openvino",
           "openvino f32")


class Process:
    """A worker of cpu_workers.py; `error` says why there is none.

    It is stopped between jobs: threads that spin in wait for work would take another's turn.
    """

    def __init__(self, engine: str, options: dict[str, Any]):
        environment = os.environ | {"LLMC_THREADS": str(options["threads"]),
                                    "OMP_NUM_THREADS": str(options["threads"])}
        environment["PYTHONPATH"] = f"{HERE.parent}:{environment.get('PYTHONPATH', '')}"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "cpu_workers.py"), engine, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment)
        self.error = ""

    def wait(self) -> None:
        """Until it is ready: several start at the same time."""
        self.error = self._answer().get("error", "")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line) if line else {"error": "its process ended"}

    def ask(self, job: dict[str, Any]) -> float | None:
        """Seconds that the job took (bytes, of the job "memory")."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
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
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process takes one of the cores."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + options.seconds
        self.absent: dict[str, str] = {}

    def model(self, shape: str, dtype: str) -> str | None:
        """A checkpoint of the shape: bf16, and f32 of encoders that do not run in bf16."""
        if not shape:
            return None
        stored = "f32" if dtype == "f32" or (shape, dtype) == ("bert-base", "int8") else "bf16"
        path = self.folder / f"{shape}-{stored}"
        if not (path / "tokenizer.json").exists():
            make_model(shape, path, stored, tiled=True)
        return str(path)

    def table(self, threads: int) -> Iterator[dict[str, Any]]:
        """One line for each cell, while there is time."""
        ceilings = Ceilings(threads)
        wanted = list(cells(self.options))
        for key in dict.fromkeys((cell.shape, cell.dtype) for cell in wanted):
            if time.monotonic() > self.deadline:
                return
            engines = self.engines(*key, threads)
            try:
                for cell in wanted:
                    if (cell.shape, cell.dtype) == key and time.monotonic() < self.deadline:
                        line = self.noise if cell.group == "noise" else self.line
                        yield {"threads": threads, **line(cell, engines, ceilings)}
            finally:
                for engine in engines.values():
                    engine.close()

    def engines(self, shape: str, dtype: str, threads: int) -> dict[str, Process]:
        options = {"model": self.model(shape, dtype), "dtype": dtype, "threads": threads}
        found = {name: Process(name, options) for name in self.options.engines}
        for name, engine in list(found.items()):
            engine.wait()
            if engine.error:
                self.absent[f"{name} {shape} {dtype}"] = engine.error
                found.pop(name).close()
        return found

    def warm(self, cell: Cell, engines: dict[str, Process]) -> dict[str, Process]:
        """The engines that can do the job, warmed up."""
        for name, engine in engines.items():
            if engine.ask(cell.job) is None:
                self.absent[f"{name} {cell.shape} {cell.dtype} {cell.group}"] = engine.error
        return {name: engine for name, engine in engines.items() if not engine.error}

    def rounds(self) -> Iterator[int]:
        """At least one, no more than were asked for or than a cell has time for."""
        end = min(self.deadline, time.monotonic() + self.options.cell_seconds)
        for number in range(self.options.rounds):
            yield number
            if time.monotonic() > end:
                return

    def line(self, cell: Cell, engines: dict[str, Process],
             ceilings: Ceilings) -> dict[str, Any]:
        """Medians over rounds; the first sample of each engine warms it up."""
        ceiling = getattr(ceilings, "read_bandwidth" if cell.bound == "bandwidth"
                          else f"peak_{cell.bound}")
        running = self.warm(cell, engines)
        taken: dict[str, list[float]] = {name: [] for name in running}
        limits: list[float] = []
        for _ in self.rounds():
            before = ceiling()
            for name, engine in running.items():
                taken[name].append(engine.ask(cell.job) or float("inf"))
            limits.append(max(before, ceiling()))
        return report(cell, taken, limits)

    def noise(self, cell: Cell, engines: dict[str, Process],
              ceilings: Ceilings) -> dict[str, Any]:
        """What each engine loses while another process spins on one of the cores."""
        running = self.warm(cell, engines)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
        for _ in self.rounds():
            for name, engine in running.items():
                quiet = engine.ask(cell.job) or float("inf")
                with busy_core():
                    taken[name].append((quiet, engine.ask(cell.job) or float("inf")))
        return {**named(cell), "engines": {name: noise_figures(each)
                                           for name, each in taken.items()}}


def noise_figures(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Of (quiet, beside a busy core) seconds; loss: of speed, the median of the rounds'."""
    quiet, busy = (median(each) * 1e3 for each in zip(*samples, strict=True))
    return {"quiet_ms": round(quiet, 3), "ms": round(busy, 3),
            "loss": round(median(1 - a / b for a, b in samples), 3)}


def named(cell: Cell) -> dict[str, Any]:
    return {"group": cell.group, "shape": cell.shape, "dtype": cell.dtype, "name": cell.name}


def report(cell: Cell, taken: dict[str, list[float]], limits: list[float]) -> dict[str, Any]:
    """The line of a cell: `ahead` is each peer's time over llmc's, round by round."""
    figures: dict[str, Any] = {}
    for name, samples in taken.items():
        work = (cell.own_work or cell.work) if name == "llmc" else cell.work
        shares = [work / s / limit for s, limit in zip(samples, limits, strict=True)]
        figures[name] = {"ms": round(median(samples) * 1e3, 3), "share": round(median(shares), 3)}
        if cell.tokens:
            figures[name]["tokens_per_second"] = round(cell.tokens / median(samples), 1)
    own = taken.get("llmc", [])
    peers = {name: samples for name, samples in taken.items() if name != "llmc"}
    ahead = {name: ratio(samples, own) for name, samples in peers.items() if own}
    if ahead:
        ahead["best"] = ratio([min(each) for each in zip(*peers.values(), strict=True)], own)
    return {**named(cell), "bound": cell.bound, "ceiling": round(median(limits) / 1e9, 1),
            "engines": figures, "ahead": ahead}


def ratio(theirs: list[float], own: list[float]) -> float:
    return round(median(b / a for a, b in zip(own, theirs, strict=True)), 3)


def show(line: dict[str, Any]) -> str:
    head = (f"{line['threads']} threads  {line['group']:8s} {line['shape']:9s} {line['dtype']:5s} "
            f"{line['name']:22s} ")
    if line["group"] == "noise":
        return head + " | ".join(f"{name} {figure['quiet_ms']:.2f} -> {figure['ms']:.2f} ms"
                                 for name, figure in line["engines"].items())
    parts = [f"{name} {figure['ms']:.2f} ms ({figure['share']:.2f})"
             for name, figure in line["engines"].items()]
    best = line["ahead"].get("best")
    return (head + " | ".join(parts) + (f" | x {best:.2f}" if best else "")
            + f" | {line['bound']} {line['ceiling']:.0f} G/s")


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def some_of(known: Iterable[str]) -> dict[str, Any]:
    """An option that takes some of these words, all of them where it is left out."""
    def parse_words(text: str) -> list[str]:
        found = words(text)
        if not found or (unknown := [word for word in found if word not in known]):
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) if found else 'nothing'}: it must be some of "
                f"{', '.join(known)}")
        return found

    return {"type": parse_words, "default": list(known), "help": f"some of {', '.join(known)}"}


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", **some_of(GROUPS))
    parser.add_argument("--engines", **some_of(ENGINES))
    parser.add_argument("--shapes", **some_of(("1b", "110m")))
    parser.add_argument("--dtypes", **some_of(("bf16", "int8", "int4")))
    parser.add_argument("--contexts", type=numbers, help="tokens in front of those decoded")
    parser.add_argument("--prompts", type=numbers, help="tokens of prompts")
    parser.add_argument("--encoder-dtypes", **some_of(("f32", "bf16", "int8")))
    parser.add_argument("--matmul-dtypes", **some_of(("f32", "bf16")))
    parser.add_argument("--threads", type=numbers, default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1800, help="stop after so long")
    parser.add_argument("--cell-seconds", type=float, default=60,
                        help="no round of a cell begins later")
    parser.add_argument("--models", type=Path, help="where models are kept (default: nowhere)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args()


def main() -> int:
    options = parse()
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, folder)
        for threads in options.threads:
            for line in bench.table(threads):
                lines.append(line)
                print(json.dumps(line) if options.json else show(line), flush=True)
    for verdict in verdicts(lines):
        print(json.dumps(verdict) if options.json else show_verdict(verdict), flush=True)
    for name, reason in bench.absent.items():
        print(json.dumps({"absent": name, "reason": reason}) if options.json
              else f"without {name}: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
