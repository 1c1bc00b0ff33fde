"""One engine in a process of its own, for cpu_peers.py: measures when it is told to.

    python benchmarks/cpu_workers.py ENGINE '{"model": ..., "dtype": ..., "threads": 4}'

Prints {"ready": seconds} or {"error": text}, then for each line of JSON on stdin (a job) one line
{"seconds": ...}. Jobs: {"work": "decode", "context": 128, "tokens": 32}, {"work": "prefill",
"tokens": 512}, {"work": "encode", "lengths": [128, 7]}, {"work": "matmul", "k": 2048, "n": 2048,
"rows": 4}, {"work": "memory"} (bytes of this process instead of seconds). Processes stand still
between jobs, so that engines can take turns.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

STREAMED_BYTES = 128 << 20  # of one matmul's weights, where reading them is what takes time
FEW_ROWS = 64
LEAST_SECONDS = 0.1  # of a sample: shorter jobs are repeated
MOST_REPEATS = 10
DRIFT = 256  # tokens by which decoding may move beyond the context that was asked for
GGUF_TYPES = {"f32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
MOST_CONTEXT = 2048  # tokens, before decoding


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def repeated(work: Callable[[], Any]) -> float:
    """Median seconds of as many calls as make a sample long enough."""
    taken = [timed(work)]
    while sum(taken) < LEAST_SECONDS and len(taken) < MOST_REPEATS:
        taken.append(timed(work))
    return median(taken)


class Worker:
    """An engine with a model: `decode`, `prefill`, `encode` and `matmul` return seconds."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.model_path = Path(options.get("model") or ".")
        self.threads = options["threads"]
        self.dtype = options["dtype"]
        self.random = np.random.default_rng(0)
        self.context = 0  # tokens that the sequence in the cache began with
        self.length = 0  # tokens that it has

    def config(self) -> dict[str, Any]:
        return json.loads((self.model_path / "config.json").read_text())

    def ids(self, *shape: int) -> np.ndarray:
        return self.random.integers(0, self.config()["vocab_size"], shape)

    def dense(self, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask [sequences, longest], i64: for engines without ragged batches."""
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return self.ids(*mask.shape) * mask, mask.astype(np.int64)

    def prefill(self, tokens: int) -> float:
        ids = self.ids(tokens)
        self.context = self.length = tokens
        return timed(lambda: self.begin(ids))

    def decode(self, context: int, tokens: int) -> float:
        """Continue the sequence that is there, while it is about as long as was asked for."""
        if context != self.context or self.length + tokens > context + DRIFT:
            self.prefill(context)
        self.length += tokens
        return timed(lambda: self.more(tokens))

    def begin(self, ids: np.ndarray) -> None:
        """Start a new sequence with these tokens."""
        raise NotImplementedError

    def more(self, tokens: int) -> None:
        """Make so many more tokens of it."""
        raise NotImplementedError

    def memory(self) -> int:
        """Bytes of this process that are resident, of what it shares its share."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


class Llmc(Worker):
    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        self.cases: dict[tuple, Any] = {}
        self.sequence: Any = None
        if not options.get("model"):
            return
        import llmc

        floats = {"f32", "bf16"}
        given = {"dtype": self.dtype} if self.dtype in floats else {"quantize": self.dtype}
        self.runtime = llmc.Runtime(options["model"], threads=self.threads, **given)

    def begin(self, ids: np.ndarray) -> None:
        from llmc.runtime.pages import Sequence
        from llmc.runtime.step import Chunk

        if self.sequence is not None:
            self.runtime.release(self.sequence)
        self.sequence = Sequence()
        self.token = int(self.runtime.step([Chunk(self.sequence, ids, 1)]).argmax())

    def more(self, tokens: int) -> None:
        """As `Runtime.generate` does it."""
        from llmc.runtime.decode import Start
        from llmc.runtime.sampling import Sampling

        start = Start(self.token, self.sequence.length, Sampling())
        ahead = self.runtime.decode_ahead([self.sequence], [start], tokens)
        if ahead is None:
            raise RuntimeError("this target does not decode ahead")
        for chosen in ahead:
            self.token = int(chosen[0])

    def encode(self, lengths: list[int]) -> float:
        sentences = [self.ids(length) for length in lengths]
        return repeated(lambda: self.runtime.run(sentences))

    def matmul(self, k: int, n: int, rows: int) -> float:
        import bench_matmul

        case = (k, n, rows > 4, rows > FEW_ROWS)
        if case not in self.cases:
            bench_matmul.STREAMED_BYTES = STREAMED_BYTES if rows <= FEW_ROWS else 0
            self.cases[case] = bench_matmul.Runner(
                bench_matmul.Case("s", k, n, 1, self.dtype, rows > 4), self.threads)
        runner = self.cases[case]
        return repeated(lambda: runner.seconds(rows)) / runner.copies


class ThreadpoolParameters(ctypes.Structure):
    """ggml_threadpool_params of ggml.h."""

    _fields_ = (("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int),
                ("priority", ctypes.c_int), ("poll", ctypes.c_uint32),
                ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool))


class LlamaCpp(Worker):
    """llama.cpp by its Python package, llama_cpp: the calls of llama-bench, in one process."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        if not options.get("model") or self.config()["model_type"] == "bert":
            raise RuntimeError("runs language models only")
        import llama_cpp

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(self.file()).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MOST_CONTEXT + 2 * DRIFT
        settings.n_batch = MOST_CONTEXT
        settings.n_threads = settings.n_threads_batch = self.threads
        self.state = llama_cpp.llama_init_from_model(self.model, settings)
        self.keep_threads()
        self.feed(self.ids(2))

    def keep_threads(self) -> None:
        """Threads that outlast a step: without OpenMP there are new ones in each."""
        base = self.library.llama_cpp._lib
        folder = Path(base._name).parent
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        cpu.ggml_threadpool_new.restype = ctypes.c_void_p
        wanted = ThreadpoolParameters()
        ctypes.CDLL(str(folder / "libggml-base.so")).ggml_threadpool_params_init(
            ctypes.byref(wanted), ctypes.c_int(self.threads))
        self.pool = ctypes.c_void_p(cpu.ggml_threadpool_new(ctypes.byref(wanted)))
        base.llama_attach_threadpool(ctypes.c_void_p(self.state), self.pool, None)

    def file(self) -> Path:
        path = self.model_path / f"{self.dtype}.gguf"
        if not path.exists():
            from make_gguf import make_gguf

            make_gguf(self.model_path, path, GGUF_TYPES[self.dtype])
        return path

    def feed(self, ids: np.ndarray) -> None:
        tokens = (self.library.llama_token * len(ids))(*ids.tolist())
        status = self.library.llama_decode(
            self.state, self.library.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.library.llama_synchronize(self.state)

    def begin(self, ids: np.ndarray) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.state), False)
        self.feed(ids)

    def more(self, tokens: int) -> None:
        for token in self.ids(tokens, 1):
            self.feed(token)


def make_worker(engine: str, options: dict[str, Any]) -> Worker:
    own: dict[str, type[Worker]] = {"llmc": Llmc, "llama.cpp": LlamaCpp}
    if engine in own:
        return own[engine](options)
    from cpu_frameworks import FRAMEWORKS

    return FRAMEWORKS[engine](options)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    started = time.perf_counter()
    try:
        worker = make_worker(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:  # an engine that is not there, or cannot: cpu_peers.py says so
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}), file=answers)
        return 0
    print(json.dumps({"ready": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer: dict[str, Any] = {"seconds": getattr(worker, job.pop("work"))(**job)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
