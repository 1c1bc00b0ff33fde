"""Specialisation from end to end: promotion, trials, eviction, restart, eager, faults, threads."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.errors import LlmcError
from llmc.runtime import compiler
from llmc.runtime.artifact import Artifact
from llmc.runtime.cache import VariantCache
from llmc.runtime.compiler import Compiler
from llmc.runtime.profile import RECENT_LIFE, Verdict
from llmc.runtime.specialize import PATIENCE, Policy, Specializer, make_source
from llmc.runtime.traffic import Range
from tests.conftest import EMBEDDED

LONGEST_WAIT = 300.0  # seconds: trials take long on a busy machine
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
TWO = {"tokens": 2, "sequences": 1, "rows": 2}
EIGHT = "tokens=8,sequences=1,rows=8"


@pytest.fixture(autouse=True)
def not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile processes that a busy machine does not starve."""
    code = "import os; os.nice = lambda _: 0; from llmc.runtime.jit import main; main()"
    monkeypatch.setattr(compiler, "COMMAND", (sys.executable, "-c", code))


@pytest.fixture
def cache(tmp_path: Path, embedded_artifact: Path) -> Path:
    """A cache directory of its own."""
    return tmp_path / "cache"


def still(runtime: llmc.Runtime) -> Specializer:
    """The runtime's specializer without its thread: the test calls tick."""
    specializer = runtime._specializer
    assert specializer is not None
    specializer._wake.set()
    assert specializer._thread is not None
    specializer._thread.join(timeout=10)
    return specializer


def promote(runtime: llmc.Runtime, specializer: Specializer, ids: list[int]) -> None:
    """Run a shape until nothing is left to be done for it."""
    deadline = time.monotonic() + LONGEST_WAIT
    verdicts = len(specializer.profile.verdicts)
    while len(specializer.profile.verdicts) == verdicts:
        for _ in range(30):
            runtime.run(ids)
        specializer.tick()
        assert time.monotonic() < deadline


def wait_for(specializer: Specializer, shape: tuple[int, ...]) -> None:
    """Ticks until a shape has code of its own."""
    deadline = time.perf_counter() + 60
    while shape not in specializer.promoted:
        specializer.tick()
        time.sleep(0.01)
        assert time.perf_counter() < deadline


def test_a_threshold_promotes_and_results_stay(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1) as plain, llmc.Runtime(
            embedded_artifact, threads=1, specialize="lazy", promote_after=5,
            cache_dir=cache) as runtime:
        specializer = still(runtime)
        expected = plain.run(PROMPT)
        runtime.run(PROMPT)
        specializer.tick()
        assert not specializer.attempts, "one call is no five"
        promote(runtime, specializer, PROMPT)
        assert EIGHT in str(runtime.dispatch_table)
        np.testing.assert_allclose(runtime.run(PROMPT), expected, rtol=1e-4, atol=1e-4)
        stats = runtime.stats()
        assert stats["variants"][EIGHT]["calls"] >= 1
        assert stats["specialize"]["verdicts"] == {EIGHT: "kept"}
        assert stats["compiles"]["compiled"] == 1 and stats["compiles"]["failed"] == 0
        assert [event.kind for event in runtime.events()] == ["compiling", "compiled", "kept"]
        (row,) = (row for row in runtime.dispatch_table.rows if row.tier == "exact")
        assert row.name == EIGHT and row.calls >= 1 and row.mean > 0
        assert row.key == {"tokens": (8, 8), "sequences": (1, 1), "rows": (8, 8)}
        (shape,) = runtime.shapes()
        assert shape.shape == TWO | {"tokens": 8, "rows": 8} and shape.calls > 5
        assert shape.variant == EIGHT and shape.verdict == "kept"


@pytest.mark.parametrize(("speed", "state"), [(0.5, "kept"), (1.5, "dropped")])
def test_a_trial_decides_and_is_remembered(embedded_artifact: Path, cache: Path, speed: float,
                                           state: str, monkeypatch: pytest.MonkeyPatch):
    """With a clock that says that exact code takes `speed` times as long."""
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: calls >= 20)
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        dispatch = runtime.executor.dispatch
        observe = dispatch.observe
        monkeypatch.setattr(dispatch, "observe", lambda values, variant, _: observe(
            values, variant, speed if variant.info.name == EIGHT else 1.0))
        promote(runtime, specializer, PROMPT)
        assert specializer.profile.verdicts[8, 1, 8].state == state
        assert (EIGHT in str(runtime.dispatch_table)) is (state == "kept")
        assert not dispatch.table.trials
        specializer.tick()
        assert not specializer.attempts, "what was dropped is not tried again"
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as second:
        assert (EIGHT in str(second.dispatch_table)) is (state == "kept")
        assert second.stats()["specialize"]["verdicts"] == {EIGHT: state}


def test_a_trial_whose_shape_stops_coming_holds_nobody_up(
        embedded_artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: calls >= 20)
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        for _ in range(30):
            runtime.run(PROMPT)
        deadline = time.monotonic() + LONGEST_WAIT
        while not runtime.executor.dispatch.table.trials:
            specializer.tick()
            time.sleep(0.01)
            assert time.monotonic() < deadline
        specializer.tick(PATIENCE)
        specializer.tick(PATIENCE)
        assert not specializer.attempts and not runtime.executor.dispatch.table.trials
        specializer.tick()
        assert not specializer.attempts, "as long as it does not come again"
        runtime.run(PROMPT)
        specializer.tick()
        assert [attempt.own for attempt in specializer.attempts] == [(8, 1, 8)]


def test_a_long_trial_holds_up_no_other_shape(embedded_artifact: Path, cache: Path,
                                              monkeypatch: pytest.MonkeyPatch):
    """One shape whose trial finds nothing for long, and one that gains."""
    monkeypatch.setattr("llmc.runtime.trials.MOST_PAIRS", 1 << 30)
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: calls >= 20)
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        dispatch = runtime.executor.dispatch
        observe, noise = dispatch.observe, random.Random(3)
        monkeypatch.setattr(dispatch, "observe", lambda values, variant, _: observe(
            values, variant, noise.uniform(0.1, 1.0) if values["tokens"] == 8
            else 0.5 if "=" in variant.info.name else 1.0))
        for _ in range(30):
            runtime.run(PROMPT)
        specializer.tick()
        deadline = time.monotonic() + LONGEST_WAIT
        while (3, 1, 3) not in specializer.profile.verdicts:
            for _ in range(20):
                runtime.run(PROMPT[:3])
            runtime.run(PROMPT)
            specializer.tick()
            assert time.monotonic() < deadline
        assert runtime.stats()["specialize"]["trying"] == [EIGHT]


def test_a_trial_goes_on_while_nobody_wants_a_step(embedded_artifact: Path, cache: Path,
                                                   monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: calls >= 20)
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        expected = [runtime.run(PROMPT) for _ in range(30)][-1]
        deadline = time.monotonic() + LONGEST_WAIT
        while not specializer.profile.verdicts:
            specializer.tick()
            time.sleep(0.01)
            assert time.monotonic() < deadline
        assert specializer.profile.calls() == {(8, 1, 8): 30}
        np.testing.assert_allclose(runtime.run(PROMPT), expected, rtol=1e-4, atol=1e-4)


def test_traffic_of_many_shapes_gets_code_for_a_range(embedded_artifact: Path, cache: Path,
                                                      monkeypatch: pytest.MonkeyPatch):
    """With a clock that says that code for a range takes half as long."""
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: isinstance(own, Range))
    options = {"threads": 1, "specialize": "lazy", "cache_dir": cache}
    prompts = [list(range(1, n + 1)) for n in (9, 10, 11, 12, 13)]
    with llmc.Runtime(embedded_artifact, **options) as runtime:
        specializer = still(runtime)
        expected = [runtime.run(prompt) for prompt in prompts]
        dispatch = runtime.executor.dispatch
        observe = dispatch.observe
        monkeypatch.setattr(dispatch, "observe", lambda values, variant, _: observe(
            values, variant, 0.5 if ".." in variant.info.name else 1.0))
        deadline = time.monotonic() + LONGEST_WAIT
        while not specializer.profile.ranges:
            for prompt in prompts:
                runtime.run(prompt)
            specializer.tick()
            assert time.monotonic() < deadline
        (row,) = (row for row in runtime.dispatch_table.rows if ".." in row.name)
        assert row.tier == "ranged" and row.gain == pytest.approx(0.5)
        for prompt, wanted in zip(prompts, expected, strict=True):
            np.testing.assert_allclose(runtime.run(prompt), wanted, rtol=1e-4, atol=1e-4)
    with llmc.Runtime(embedded_artifact, **options) as second:
        assert row.name in str(second.dispatch_table), "the next start has it"


def test_the_next_start_is_hot_and_compiles_nothing(embedded_artifact: Path, cache: Path,
                                                     monkeypatch: pytest.MonkeyPatch):
    options = {"threads": 1, "specialize": "lazy", "promote_after": 5, "cache_dir": cache}
    with llmc.Runtime(embedded_artifact, **options) as runtime:
        promote(runtime, still(runtime), PROMPT)
    monkeypatch.setattr(Compiler, "compile", lambda *_: pytest.fail("compiled"))
    with llmc.Runtime(embedded_artifact, **options) as runtime:
        assert EIGHT in str(runtime.dispatch_table)
        runtime.run(PROMPT)
        assert runtime.stats()["variants"][EIGHT]["calls"] == 1


def test_verdicts_of_another_compiler_do_not_count(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        runtime.run(PROMPT)
        specializer.profile.verdicts[8, 1, 8] = Verdict("kept", 0.1, 1.0, "older")
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as second:
        assert EIGHT not in str(second.dispatch_table)


def test_eager_is_ready_before_the_first_request(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="eager", shapes=[TWO],
                      cache_dir=cache) as runtime:
        assert "tokens=2,sequences=1,rows=2" in str(runtime.dispatch_table)
        before = runtime.stats()["variants"]["tokens=2,sequences=1,rows=2"]["calls"]
        runtime.run([1, 2])
        assert runtime.stats()["variants"]["tokens=2,sequences=1,rows=2"]["calls"] == before + 1
        (shape,) = runtime.shapes()
        assert shape.calls == pytest.approx(1.0), "what was measured before ready is no traffic"


@pytest.mark.parametrize("shapes", [[{"nonsense": 1}], [{"tokens": 0}], [{"tokens": "two"}]])
def test_bad_shapes_are_refused(embedded_artifact: Path, cache: Path, shapes: list):
    with pytest.raises(LlmcError, match="shapes"):
        llmc.Runtime(embedded_artifact, specialize="eager", shapes=shapes, cache_dir=cache)


@pytest.mark.parametrize("option", [{"specialize": "always"}, {"promote_after": 0},
                                    {"code_budget_mb": "1"}, {"max_variants": -1}])
def test_bad_options_are_refused(embedded_artifact: Path, option: dict):
    with pytest.raises(LlmcError, match=next(iter(option))):
        llmc.Runtime(embedded_artifact, **option)


@pytest.mark.parametrize("tokens", [3, 7, 13, 17])
def test_code_of_every_schedule_computes_the_same(embedded_artifact: Path, cache: Path,
                                                  tokens: int):
    ids = list(range(1, tokens + 1))
    shape = (tokens, 1, tokens)
    with llmc.Runtime(embedded_artifact, threads=2, specialize="lazy", cache_dir=cache) as runtime:
        specializer = still(runtime)
        expected = runtime.run(ids)
        schedules = specializer.traffic.schedules(shape)
        for schedule in schedules:
            job = specializer._job(shape, schedule)
            stored = specializer.compiler.compile(job).variant
            assert stored is not None
            specializer._promote(shape, specializer._load(stored), schedule, stored, None)
            np.testing.assert_allclose(runtime.run(ids), expected, rtol=1e-4, atol=1e-4)
            assert runtime.stats()["variants"][job.name]["calls"] == 1
    assert len(schedules) == 2


def test_the_coldest_goes_when_the_budget_is_full(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", promote_after=5,
                      max_variants=1, cache_dir=cache) as runtime:
        specializer = still(runtime)
        promote(runtime, specializer, PROMPT)
        for _ in range(400):
            promoted = runtime.run(PROMPT + PROMPT)
        deadline = time.monotonic() + LONGEST_WAIT
        while "tokens=16," not in str(runtime.dispatch_table):
            for _ in range(100):
                runtime.run(PROMPT + PROMPT)
            specializer.tick()
            assert time.monotonic() < deadline
        assert list(specializer.promoted) == [(16, 1, 16)]
        assert EIGHT not in str(runtime.dispatch_table)
        np.testing.assert_allclose(runtime.run(PROMPT + PROMPT), promoted, rtol=1e-4, atol=1e-4)
        assert runtime.run(PROMPT).shape == (8, 512), "what was evicted runs on generic code"


def test_where_traffic_has_moved_old_code_goes_at_once(embedded_artifact: Path, cache: Path):
    """However hot it was: what counts for eviction is what came lately."""
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", promote_after=5,
                      max_variants=1, cache_dir=cache) as runtime:
        specializer = still(runtime)
        for _ in range(1000):
            runtime.run(PROMPT)
        wait_for(specializer, (8, 1, 8))
        specializer.profile._folded_at -= 6 * RECENT_LIFE  # so long ago
        specializer.tick()
        for _ in range(200):
            runtime.run(PROMPT[:3])
        wait_for(specializer, (3, 1, 3))
        assert list(specializer.promoted) == [(3, 1, 3)]
        heats = specializer.traffic.hot
        assert heats[8, 1, 8].seconds > heats[3, 1, 3].seconds, "though it is hotter over all"


def test_each_decision_is_a_line_that_says_why_and_what_avoids_it(
        embedded_artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("LLMC_LOG", "specialize")
    monkeypatch.setattr(Specializer, "_pays", lambda self, own, calls: calls >= 20)
    monkeypatch.setattr(Specializer, "_fits", lambda self, own: True)
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", max_variants=1,
                      cache_dir=cache) as runtime:
        specializer = still(runtime)
        dispatch = runtime.executor.dispatch
        observe = dispatch.observe
        monkeypatch.setattr(dispatch, "observe", lambda values, variant, _: observe(
            values, variant, 0.5 if variant.info.name == EIGHT else 1.0))
        promote(runtime, specializer, PROMPT)
        promote(runtime, specializer, PROMPT[:2])
        specializer.evict((8, 1, 8))
        events = [event for event in runtime.events() if event.kind != "compiled"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiled in" not in line
             and "taken from" not in line]
    kinds = [event.kind for event in events]
    assert {"compiling", "kept", "dropped", "evicted"} <= set(kinds)
    for kind, line in zip(kinds, lines, strict=True):
        assert re.search(rf"^llmc specialize: tokens=\d,.*: {kind}: .*gain .*; \d+ calls of \S+ ms,"
                         r" expected saving \S+ s, compile \S+ s; \w+=", line), line
    assert "gain 50.0% (50.0% to 50.0%, 12 pairs)" in lines[kinds.index("kept")]
    assert "shapes=[{'tokens': 8, 'sequences': 1, 'rows': 8}]" in lines[0]
    assert lines[-1].endswith("keeps it") and "budget" in lines[-1]
    kept = events[kinds.index("kept")].details
    assert kept["gain"] == pytest.approx(0.5) and kept["compile_seconds"] > 0 < kept["calls"]


def test_a_compile_that_fails_is_not_tried_again(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", promote_after=5,
                      cache_dir=cache) as runtime:
        specializer = still(runtime)
        specializer.compiler._worker._command = (sys.executable, "-c", "import os; os.abort()")
        promote(runtime, specializer, PROMPT)
        assert specializer.profile.verdicts[8, 1, 8].state == "failed"
        specializer.tick()
        assert not specializer.attempts
        assert runtime.run(PROMPT).shape == (8, 512)


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_start(embedded_artifact: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", promote_after=5,
                      cache_dir="/proc/llmc") as runtime:
        promote(runtime, still(runtime), PROMPT)
        assert EIGHT in str(runtime.dispatch_table)


def test_an_artifact_without_its_graph_says_what_to_do(embedded_artifact: Path, cache: Path,
                                                       monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Artifact, "graph_text", lambda _: None)
    with pytest.raises(LlmcError, match="compile the model again"):
        llmc.Runtime(embedded_artifact, specialize="eager", cache_dir=cache)
    with llmc.Runtime(embedded_artifact, specialize="lazy", cache_dir=cache) as runtime:
        assert runtime.run(PROMPT).shape == (8, 512)
        assert runtime.events() == [] and runtime.shapes() == []


def test_lazy_is_what_everybody_gets_and_the_environment_says_otherwise(
        embedded_artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("PROMOTE_AFTER", "7"), ("CODE_BUDGET_MB", "3"), ("MAX_VARIANTS", "2")):
        monkeypatch.setenv(f"LLMC_{name}", value)
    with llmc.Runtime(embedded_artifact, cache_dir=cache) as runtime:
        assert runtime._specializer is not None
        assert runtime._specializer.policy == Policy("lazy", 7, 3 << 20, 2)
    with llmc.Runtime(embedded_artifact, cache_dir=cache, max_variants=5,
                      promote_after=9) as runtime:
        assert runtime._specializer is not None
        assert runtime._specializer.policy == Policy("lazy", 9, 3 << 20, 5)
    monkeypatch.setenv("LLMC_SPECIALIZE", "none")
    with llmc.Runtime(embedded_artifact, cache_dir=cache) as runtime:
        assert runtime._specializer is None
    monkeypatch.setenv("LLMC_SPECIALIZE", "sometimes")
    with pytest.raises(LlmcError, match="sometimes"):
        llmc.Runtime(embedded_artifact, cache_dir=cache)


def test_a_short_run_starts_no_process(embedded_artifact: Path, cache: Path,
                                       monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    with llmc.Runtime(embedded_artifact, threads=1, cache_dir=cache) as runtime:
        specializer = still(runtime)
        list(runtime.generate(PROMPT, 32))
        specializer.tick()
        assert not specializer.attempts


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_threads_get_the_same_results_while_variants_come_and_go(embedded_artifact: Path,
                                                                 cache: Path, seconds: float):
    """4 threads, random shapes, code promoted and evicted all the time."""
    lengths = (1, 2, 3, 5, 8, 9, 16, 17, 33)
    with llmc.Runtime(embedded_artifact, threads=1) as plain:
        expected = {n: plain.run(list(range(1, n + 1))) for n in lengths}
    shapes = [{"tokens": n, "sequences": 1, "rows": n} for n in lengths]
    with llmc.Runtime(embedded_artifact, threads=2, specialize="eager", shapes=shapes,
                      cache_dir=cache) as runtime:
        specializer = still(runtime)
        live = dict(specializer.promoted)
        stop, wrong = threading.Event(), []

        def send(seed: int) -> None:
            choice = random.Random(seed)
            while not stop.is_set():
                n = choice.choice(lengths)
                got = runtime.run(list(range(1, n + 1)))
                if not np.allclose(got, expected[n], rtol=1e-4, atol=1e-4):
                    wrong.append(n)

        senders = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
        for sender in senders:
            sender.start()
        choice = random.Random(9)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shape = choice.choice(list(live))
            if shape in specializer.promoted:
                specializer.evict(shape)
            else:
                stored = specializer.compiler.cached(specializer._job(shape, live[shape].schedule))
                assert stored is not None
                specializer._promote(shape, specializer._load(stored), live[shape].schedule,
                                     stored, None)
            time.sleep(0.002)
        stop.set()
        for sender in senders:
            sender.join(timeout=30)
        assert not wrong
        assert sum(v.calls for v in runtime.executor.variants) > 0


RACER = """
import sys, llmc
from llmc.runtime.compiler import Worker
ask = Worker.ask
def counted(self, request, timeout):
    print("compiled", request["name"], request["schedule"], flush=True)
    return ask(self, request, timeout)
Worker.ask = counted
shapes = [{"tokens": n} for n in (2, 3)]
with llmc.Runtime(sys.argv[1], threads=1, specialize="eager", shapes=shapes,
                  cache_dir=sys.argv[2]) as runtime:
    assert runtime.run([1, 2]).shape == (2, 512)
"""


def test_processes_that_start_together_compile_each_variant_about_once(embedded_artifact: Path,
                                                                       cache: Path):
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    racers = [subprocess.Popen(
        [sys.executable, "-c", RACER, str(embedded_artifact), str(cache)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    lines = []
    for racer in racers:
        output, errors = racer.communicate(timeout=240)
        assert racer.returncode == 0, errors
        lines += output.splitlines()
    assert len(lines) == len(set(lines)) == 4, lines  # two shapes, two schedules each


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_taken_for_code(
        embedded_artifact: Path, cache: Path):
    code = ("import os, signal, sys\n"
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n" + RACER)
    environment = os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code, str(embedded_artifact), str(cache)],
                            env=environment, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(VariantCache(cache).entries()) == []
    with llmc.Runtime(embedded_artifact, threads=1, specialize="eager", shapes=[{"tokens": 2}],
                      cache_dir=cache) as runtime:
        assert "tokens=2," in str(runtime.dispatch_table)
    left = [path for path in (cache / "variants").iterdir() if path.name.startswith(".")]
    assert not left, "the next writer sweeps up after the killed one"


def test_a_child_process_after_a_fork_steps_and_closes(embedded_artifact: Path, cache: Path):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="lazy", cache_dir=cache) as runtime:
        child = os.fork()
        if child == 0:
            try:
                runtime.run(PROMPT)
                runtime.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_model_directory_is_specialised_too(cache: Path, embedded_artifact: Path):
    shutil.copytree(embedded_artifact.parent, cache / "artifacts", dirs_exist_ok=True)
    with llmc.Runtime(EMBEDDED, threads=1, specialize="eager", shapes=[TWO],
                      cache_dir=cache) as runtime:
        assert "exact" in str(runtime.dispatch_table)


def test_the_source_is_what_the_artifact_was_made_from(embedded_artifact: Path):
    artifact = Artifact(embedded_artifact)
    source = make_source(artifact, artifact.manifest.target)
    assert source is not None
    assert source.graph.startswith("graph ") and source.program.startswith("program ")
