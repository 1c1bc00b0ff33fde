"""GPU code that comes and goes, on a device that only keeps books: what is loaded, captured,
launched and unloaded when. Real variants are compiled and assembled; nothing is computed. Tests
marked gpu run them."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.codegen.nvptx.assemble import is_available
from llmc.errors import DeviceError
from llmc.runtime import compiler, cuda_executor, session
from llmc.runtime.cuda_device import Device
from llmc.runtime.cuda_executor import CONTEXT_RANGES, CudaExecutor
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.step import Chunk
from tests.conftest import EMBEDDED

SHAPE = {"tokens": 3, "sequences": 1, "rows": 1}
NAME = f"tokens=3,sequences=1,rows=1,table_width={CONTEXT_RANGES[0]}"
PROMPT = [1, 403, 407, 261, 378]


class FakeDevice:
    ordinal, name, architecture, capability = 0, "books", "sm_90a", (9, 0)
    cuda, driver, stream = "13.0", 13000, 0

    def __init__(self, ordinal: int = 0):
        self.waits = 0

    def use(self) -> None: ...

    def wait(self) -> None:
        self.waits += 1

    def free_memory(self) -> int:
        return 4 << 30


class FakeMemory:
    def __init__(self, *arguments: Any):
        size = arguments[1] if isinstance(arguments[0], FakeDevice) else arguments[0]
        self.size, self.address = max(size, 256), 1 << 20
        self.array = np.zeros(self.size if self.size < 1 << 24 else 256, np.uint8)

    def clear(self, device: FakeDevice) -> None: ...

    def close(self) -> None: ...


class FakeUpload:
    def __init__(self, *_: Any): ...

    def wait(self) -> None: ...


class FakeModule:
    loaded: dict[str, FakeModule] = {}  # noqa: RUF012 (the device's books)

    def __init__(self, code: bytes, name: str):
        assert code[:4] == b"\x7fELF", "a cubin"
        self.name, self.open = name, True
        FakeModule.loaded[name] = self

    def function(self, name: str, shared_bytes: int) -> tuple[FakeModule, str]:
        return self, name

    def close(self) -> None:
        assert self.open
        self.open = False


class FakeGraph:
    def __init__(self, device: FakeDevice, record: Any):
        launched.clear()
        record()
        self.modules, self.open = {module for module, _ in launched}, True

    def launch(self) -> None:
        assert self.open and all(module.open for module in self.modules), "unloaded code is run"
        launched[:] = [(module, "graph") for module in self.modules]

    def close(self) -> None:
        self.open = False


launched: list[tuple[FakeModule, str]] = []


def fake_launch(device: FakeDevice, function: tuple[FakeModule, str], *_: Any) -> None:
    assert function[0].open, "unloaded code is run"
    launched.append(function)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, but a device that keeps books; compile processes that a busy machine does not
    starve."""
    if not is_available():
        pytest.skip("nvJitLink is missing")
    for name, fake in {"Device": FakeDevice, "Memory": FakeMemory, "PinnedMemory": FakeMemory,
                       "Module": FakeModule, "Graph": FakeGraph, "launch": fake_launch,
                       "Upload": FakeUpload, "upload": lambda *_: None,
                       "call": lambda *_: 0}.items():
        monkeypatch.setattr(cuda_executor, name, fake)
    monkeypatch.setattr(session, "can_rehearse", lambda _: False)  # books tell no times
    FakeModule.loaded.clear()
    code = "import os; os.nice = lambda _: 0; from llmc.runtime.jit import main; main()"
    monkeypatch.setattr(compiler, "COMMAND", (sys.executable, "-c", code))


@pytest.fixture(scope="module")
def artifact() -> Path:
    return llmc.compile(EMBEDDED, target="nvptx:sm_90a").path


def still(runtime: llmc.Runtime) -> Any:
    specializer = runtime._specializer
    assert specializer is not None and specializer._thread is not None
    specializer._wake.set()
    specializer._thread.join(timeout=10)
    return specializer


def ran(runtime: llmc.Runtime, tokens: int, context: int = 0) -> str:
    """The variant that runs a prompt of so many tokens behind `context` others."""
    before = {v.info.name: v.calls for v in runtime.executor.variants}
    sequence = Sequence()
    sequence.length = context
    launched.clear()
    runtime.step([Chunk(sequence, [1] * tokens, 1)])
    runtime.release(sequence)
    (name,) = (v.info.name for v in runtime.executor.variants
               if v.calls > before.get(v.info.name, 0))
    return name


def test_exact_code_runs_its_shape_and_range_of_contexts_only(books, artifact: Path,
                                                              tmp_path: Path):
    with llmc.Runtime(artifact, specialize="eager", shapes=[SHAPE], cache_dir=tmp_path,
                      max_context=512) as runtime:
        assert isinstance(runtime.executor, CudaExecutor)
        still(runtime)
        assert ran(runtime, 3) == NAME
        assert [module.name for module, _ in launched[:1]] == [NAME]
        assert ran(runtime, 2) != NAME
        for _ in range(3):
            ran(runtime, 3)
        assert launched == [(FakeModule.loaded[NAME], "graph")], "a step that repeats is one graph"
        beyond = runtime.executor.dispatch.shape(
            {**SHAPE, "table_width": CONTEXT_RANGES[0] + 1})
        assert beyond != runtime.executor.dispatch.shape({**SHAPE, "table_width": 1})


def test_evicted_code_is_unloaded_behind_the_last_step_and_leaves_nothing(
        books, artifact: Path, tmp_path: Path):
    with llmc.Runtime(artifact, specialize="eager", shapes=[SHAPE], cache_dir=tmp_path,
                      max_context=512) as runtime:
        specializer = still(runtime)
        executor = runtime.executor
        for _ in range(3):
            assert ran(runtime, 3) == NAME
        (own,) = specializer.promoted
        chosen = executor.dispatch.choose(specializer.traffic.values(own))
        specializer.evict(own)
        assert FakeModule.loaded[NAME].open, "a step may have chosen it"
        executor.unload_retired(chosen)
        assert FakeModule.loaded[NAME].open, "that step runs it"
        waits = executor.device.waits
        assert ran(runtime, 3) != NAME
        assert not FakeModule.loaded[NAME].open and executor.device.waits > waits
        assert not [key for key in (*executor._graphs, *executor._plans) if key[0] == id(chosen)]


def test_lazy_promotes_on_gpus_too(books, artifact: Path, tmp_path: Path):
    options = {"specialize": "lazy", "promote_after": 4, "cache_dir": tmp_path,
               "max_context": 512}
    with llmc.Runtime(artifact, **options) as runtime:
        specializer = still(runtime)
        deadline = time.monotonic() + 60
        while not specializer.promoted:
            runtime.run(PROMPT)
            specializer.tick()
            assert time.monotonic() < deadline and not specializer.error
        (row,) = (row for row in runtime.dispatch_table.rows if row.tier == "exact")
        assert row.key["tokens"] == (5, 5) and row.key["table_width"] == (1, CONTEXT_RANGES[0])
    with llmc.Runtime(artifact, **options) as second:
        assert row.name in str(second.dispatch_table), "the next start is hot"


def test_code_comes_and_goes_between_random_steps(books, artifact: Path, tmp_path: Path):
    """The fakes fail when unloaded code is run."""
    shapes = [{"tokens": n} for n in (1, 2, 5)]
    with llmc.Runtime(artifact, specialize="eager", shapes=shapes, cache_dir=tmp_path,
                      max_context=512) as runtime:
        specializer = still(runtime)
        live = dict(specializer.promoted)
        assert len(live) == 3
        choice = random.Random(0)
        for _ in range(300):
            own = choice.choice(list(live))
            if own in specializer.promoted:
                specializer.evict(own)
            else:
                stored = specializer.compiler.cached(specializer._job(own, live[own].schedule))
                assert stored is not None
                specializer._promote(own, specializer._load(stored), live[own].schedule, stored,
                                     None)
            ran(runtime, choice.choice((1, 2, 3, 5)))


# ---- with a GPU -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> None:
    try:
        Device()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_exact_code_gives_what_generic_code_gives(gpu, tmp_path: Path, dtype: str):
    shapes = [{"tokens": n, "sequences": s, "rows": r} for n, s, r in (
        (1, 1, 1), (5, 1, 1), (17, 1, 1), (33, 1, 33), (9, 9, 9), (16, 16, 16))]
    tolerance = 1e-4 if dtype == "f32" else 0.05
    with (llmc.Runtime(EMBEDDED, target="nvptx", dtype=dtype, specialize="none",
                       max_batch=16) as plain,
          llmc.Runtime(EMBEDDED, target="nvptx", dtype=dtype, specialize="eager", shapes=shapes,
                       cache_dir=tmp_path, max_batch=16) as runtime):
        for each in shapes:
            size = each["tokens"] // each["sequences"]
            results = []
            for own in (plain, runtime):
                sequences = [Sequence() for _ in range(each["sequences"])]
                wanted = each["rows"] // each["sequences"]
                own.step([Chunk(s, [1] * PAGE, 1) for s in sequences])
                results.append(own.step([Chunk(s, [(7 * n + 3) % 500 for n in range(size)], wanted)
                                         for s in sequences]))
                for sequence in sequences:
                    own.release(sequence)
            scale = np.abs(results[0]).max()
            assert np.abs(results[0] - results[1]).max() <= tolerance * scale
        assert sum(row.tier == "exact" for row in runtime.dispatch_table.rows) > 0


@pytest.mark.gpu
def test_code_comes_and_goes_while_tokens_are_made(gpu, tmp_path: Path, embedded_goldens):
    golden = embedded_goldens[0]
    shapes = [{"tokens": 1, "sequences": 1, "rows": 1},
              {"tokens": len(golden["prompt_ids"]), "sequences": 1, "rows": 1}]
    with llmc.Runtime(EMBEDDED, target="nvptx", specialize="eager", shapes=shapes,
                      cache_dir=tmp_path) as runtime:
        specializer = still(runtime)
        live = dict(specializer.promoted)
        for _ in range(4):
            tokens = []
            for token in runtime.generate(golden["prompt_ids"], len(golden["greedy_ids"]),
                                          ignore_eos=True):
                tokens.append(token)
                for own, was in live.items():
                    if own in specializer.promoted:
                        specializer.evict(own)
                    else:
                        stored = specializer.compiler.cached(specializer._job(own, was.schedule))
                        assert stored is not None
                        specializer._promote(own, specializer._load(stored), was.schedule, stored,
                                             None)
            assert tokens == golden["greedy_ids"]
