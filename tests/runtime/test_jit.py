"""Background compilation: processes that die, hang or talk nonsense; the cache they share."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from llmc.errors import CompileError
from llmc.runtime import compiler as compiler_module
from llmc.runtime.artifact import Artifact, VariantInfo
from llmc.runtime.cache import StoredVariant, VariantCache
from llmc.runtime.compiler import Compiler, Job, Outcome, Source, Worker
from llmc.runtime.specialize import make_source

JOB = Job("tokens=2", {"tokens": (2, 2)}, {})
SOURCE = Source("graph", "program", "host")


def source_of(artifact: Artifact) -> Source:
    source = make_source(artifact, artifact.manifest.target)
    assert source is not None
    return source


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, sys, time\n{code}")


def exact_job(artifact: Artifact, tokens: int = 2) -> Job:
    (generic,) = (v for v in artifact.manifest.variants if v.name == "generic")
    exact = {"tokens": (tokens, tokens), "sequences": (1, 1), "rows": (1, 1)}
    return Job(f"tokens={tokens}", {**generic.key, **exact}, {})


@pytest.fixture(autouse=True)
def not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile processes that a busy machine does not starve."""
    code = "import os; os.nice = lambda _: 0; from llmc.runtime.jit import main; main()"
    monkeypatch.setattr(compiler_module, "COMMAND", (sys.executable, "-c", code))


@pytest.fixture(scope="module")
def artifact(embedded_artifact: Path) -> Artifact:
    return Artifact(embedded_artifact)


def finish(compiler: Compiler, job: Job) -> Outcome:
    assert compiler.submit(job)
    return compiler.finished.get(timeout=120)


def stored(size: int = 100) -> StoredVariant:
    info = VariantInfo("tokens=2", {"tokens": (2, 2)}, "64", "0", 3)
    return StoredVariant(info, b"\x7fELF\n" + bytes(size), 1.5)


# ---- real compiles ----------------------------------------------------------------------------


def test_a_variant_is_compiled_once_and_then_cached(artifact: Artifact, tmp_path: Path):
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    first = finish(compiler, exact_job(artifact))
    assert first.variant is not None and not first.cached, first.error
    assert first.variant.info.key["tokens"] == (2, 2)
    assert first.variant.object[:4] == b"\x7fELF"
    again = finish(compiler, exact_job(artifact))
    assert again.cached and again.variant == first.variant
    compiler.close()


def test_a_key_that_the_graph_does_not_have_fails_and_the_next_compiles(artifact: Artifact,
                                                                         tmp_path: Path):
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    bad = compiler.compile(Job("bad", {"nonsense": (1, 1)}, {}))
    assert bad.variant is None and "no symbol nonsense" in bad.error
    assert compiler.compile(exact_job(artifact, 3)).variant is not None
    compiler.close()


def test_code_that_would_read_other_weights_is_refused(artifact: Artifact, tmp_path: Path):
    """A schedule that changes how weights lie, as another version of llmc might."""
    job = exact_job(artifact)
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    outcome = compiler.compile(Job(job.name, job.key, {"panel_columns": 4}))
    assert outcome.variant is None and "lie differently" in outcome.error
    compiler.close()


# ---- faults of the process ----------------------------------------------------------------------


def test_a_process_that_dies_fails_its_job_and_the_next_gets_a_new_one(tmp_path: Path):
    command = script("print('LLVM ERROR: out of luck', file=sys.stderr); os.abort()")
    compiler = Compiler(SOURCE, VariantCache(tmp_path), command=command)
    for _ in range(2):
        outcome = finish(compiler, JOB)
        assert outcome.variant is None
        assert "exit status -6" in outcome.error and "out of luck" in outcome.error
    compiler.close()


def test_a_process_that_hangs_is_ended(tmp_path: Path):
    compiler = Compiler(SOURCE, VariantCache(tmp_path), timeout=0.5,
                        command=script("time.sleep(60)"))
    started = time.monotonic()
    assert "took longer than 0.5 s" in finish(compiler, JOB).error
    assert time.monotonic() - started < 10
    compiler.close()


@pytest.mark.parametrize("code", [
    "sys.stdout.buffer.write(b'x' * 100)", "sys.stdout.buffer.write(bytes(8) + b'{')",
    "sys.stdout.buffer.write((10).to_bytes(8, 'little') + b'half')"])
def test_nonsense_from_a_process_is_an_error(code: str):
    worker = Worker(script(code))
    with pytest.raises(CompileError):
        worker.ask({}, timeout=10)
    worker.stop()


def test_a_killed_process_is_replaced(artifact: Artifact, tmp_path: Path):
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    assert compiler.compile(exact_job(artifact)).variant is not None
    assert compiler._worker._process is not None
    os.kill(compiler._worker._process.pid, signal.SIGKILL)
    assert compiler.compile(exact_job(artifact, 3)).variant is not None
    compiler.close()


def test_closing_gives_up_what_runs(tmp_path: Path):
    compiler = Compiler(SOURCE, VariantCache(tmp_path), command=script("time.sleep(60)"))
    for _ in range(3):
        assert compiler.submit(JOB)
    time.sleep(0.3)
    process = compiler._worker._process
    assert process is not None
    started = time.monotonic()
    compiler.close()
    assert time.monotonic() - started < 3
    assert process.poll() is not None
    assert not any(thread.name == "llmc-compiler" for thread in threading.enumerate())


def test_the_queue_is_bounded(tmp_path: Path):
    compiler = Compiler(SOURCE, VariantCache(tmp_path), command=script("time.sleep(60)"))
    assert [compiler.submit(JOB) for _ in range(40)].count(False)
    compiler.close()


# ---- the cache of variants ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header"])
def test_a_damaged_variant_is_not_there(tmp_path: Path, damage: str):
    cache = VariantCache(tmp_path)
    cache.put("key", stored())
    assert cache.get("key") == stored()
    path = cache.path("key")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-50] ^= 1
    elif damage == "header":
        data[70] ^= 1
    else:
        del data[0 if damage == "empty" else -7:]
    path.write_bytes(data)
    assert cache.get("key") is None


def test_a_damaged_variant_is_compiled_again(artifact: Artifact, tmp_path: Path):
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    job = exact_job(artifact)
    first = compiler.compile(job).variant
    path = compiler.cache.path(job.cache_key(compiler.source))
    path.write_bytes(path.read_bytes()[:-1])
    again = compiler.compile(job)
    assert not again.cached and again.variant is not None and first is not None
    assert again.variant.object == first.object
    assert compiler.cached(job) == again.variant
    compiler.close()


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path):
    cache = VariantCache(tmp_path, limit=3000)
    for number, key in enumerate("abc"):
        cache.put(key, stored(1000))
        if cache.path(key).exists():
            os.utime(cache.path(key), (number, number))
    assert [entry.path.stem for entry in cache.entries()] == ["b", "c"]
    cache.get("b")
    cache.put("d", stored(1000))
    assert {entry.path.stem for entry in cache.entries()} == {"b", "d"}


@pytest.mark.parametrize("place", ["/proc/llmc", "/dev/null/llmc"])
def test_without_a_place_to_write_variants_are_compiled_all_the_same(artifact: Artifact,
                                                                     place: str):
    compiler = Compiler(source_of(artifact), VariantCache(Path(place)))
    outcome = compiler.compile(exact_job(artifact))
    assert outcome.variant is not None, outcome.error
    compiler.close()


def test_a_full_disk_keeps_the_code(artifact: Artifact, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    compiler = Compiler(source_of(artifact), VariantCache(tmp_path))
    assert compiler.compile(exact_job(artifact)).variant is not None
    compiler.close()
    assert [path.suffix for path in (tmp_path / "variants").iterdir()] in ([".lock"], [])
