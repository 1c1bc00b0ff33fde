"""What goes wrong in the middle leaves everything as it was: cancelled and refused steps, abandoned
generators, many threads, several runtimes, forks, and artifacts for other CPUs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.codegen.target import Target
from llmc.driver import compile_model
from llmc.errors import DeviceError, LlmcError, ShapeError
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.step import Chunk
from tests.conftest import EMBEDDED
from tests.fuzz.hostile import spoil_memory, spoil_states
from tests.fuzz.test_memory import some_ids


def pages(runtime: llmc.Runtime) -> int:
    return runtime.stats()["pages"]["free"]


# ---- cancelled ----------------------------------------------------------------------------------


def test_a_cancelled_step_changes_nothing(embedded_artifact):
    """The same step once more gives what it gives where nothing was cancelled."""
    first, more = some_ids(45, 1, 512), some_ids(20, 2, 512)
    with llmc.Runtime(embedded_artifact, threads=3) as runtime:
        spoil_memory(runtime.executor)
        spoil_states(runtime.executor)
        sequence = Sequence()
        runtime.step([Chunk(sequence, first, 0)])
        before = (sequence.length, list(sequence.pages), pages(runtime))
        for stale in range(3):
            runtime.executor._cancel[0] = 1
            with pytest.raises(LlmcError, match="cancelled"):
                runtime.step([Chunk(sequence, some_ids(20, stale + 3, 512), 20)])
            assert (sequence.length, sequence.pages, pages(runtime)) == before
        runtime.executor._cancel[0] = 0
        got = runtime.step([Chunk(sequence, more, 20)])
        runtime.release(sequence)
        whole = runtime.run(first + more)
    assert np.abs(got - whole[45:]).max() <= 1e-4 * np.abs(whole).max()


def test_steps_cancelled_at_any_moment(embedded_artifact):
    """Steps that end normally while another thread cancels now and then have the right logits."""
    ids = some_ids(200, 1, 512)
    done = threading.Event()
    with llmc.Runtime(embedded_artifact, threads=2) as runtime:
        expected, free = runtime.run(ids), pages(runtime)

        def flicker() -> None:
            while not done.is_set():
                runtime.executor._cancel[0] ^= 1
                time.sleep(0.002)

        thread = threading.Thread(target=flicker)
        thread.start()
        outcomes = []
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            try:
                np.testing.assert_array_equal(runtime.run(ids), expected)
                outcomes.append("done")
            except LlmcError:
                outcomes.append("cancelled")
        done.set()
        thread.join()
        runtime.executor._cancel[0] = 0
        assert "cancelled" in outcomes
        np.testing.assert_array_equal(runtime.run(ids), expected)
        assert pages(runtime) == free


# ---- refused ------------------------------------------------------------------------------------


def small_runtime(artifact: Path) -> llmc.Runtime:
    """A pool of 4 pages; contexts of up to 512 tokens."""
    page_bytes = 2 * 5 * PAGE * 4 * 8 * 4  # k and v, 5 layers, 4 heads of 8 f32
    return llmc.Runtime(artifact, threads=2, kv_memory=4 * page_bytes)


def test_a_step_that_finds_no_pages_takes_none(embedded_artifact):
    """The second sequence's pages run out after the first has got its own."""
    with small_runtime(embedded_artifact) as runtime:
        kept, other, new = Sequence(), Sequence(), Sequence()
        runtime.step([Chunk(kept, some_ids(31), 0), Chunk(other, some_ids(32), 0)])
        before = [(s.length, list(s.pages)) for s in (kept, other, new)]
        with pytest.raises(ShapeError, match="KV cache is full"):
            runtime.step([Chunk(other, [3], 1), Chunk(kept, some_ids(2), 1),
                          Chunk(new, some_ids(PAGE), 1)])
        assert [(s.length, s.pages) for s in (kept, other, new)] == before
        assert pages(runtime) == 2
        got = runtime.step([Chunk(kept, [5], 1)])
        for sequence in (kept, other):
            runtime.release(sequence)
        assert pages(runtime) == 4
        np.testing.assert_allclose(got[0], runtime.run([*some_ids(31), 5])[-1], rtol=0, atol=1e-4)


def test_prompts_that_run_out_of_pages_give_them_back(embedded_artifact):
    with small_runtime(embedded_artifact) as runtime:
        holder = Sequence()
        runtime.step([Chunk(holder, some_ids(60), 0)])
        for attempt in (lambda: runtime.run(some_ids(100)),
                        lambda: list(runtime.generate(some_ids(100))),
                        lambda: list(runtime.generate(some_ids(60), max_new_tokens=100,
                                                      ignore_eos=True))):
            with pytest.raises(ShapeError, match="KV cache is full"):
                attempt()
            assert pages(runtime) == 2
        runtime.release(holder)
        assert pages(runtime) == 4


def test_abandoned_generators_give_their_pages_back(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=2, max_batch=8) as runtime:
        free = pages(runtime)
        generators = [runtime.generate(some_ids(40, n), ignore_eos=True) for n in range(4)]
        for count, generator in enumerate(generators):
            for _ in range(count):
                next(generator)
        generators[1].close()
        del generator
        generators.clear()
        assert pages(runtime) == free


# ---- together -----------------------------------------------------------------------------------


def test_two_runtimes_take_turns(embedded_artifact):
    ids = some_ids(33, 1, 512)
    with (llmc.Runtime(embedded_artifact, threads=3) as one,
          llmc.Runtime(embedded_artifact, threads=2) as other):
        expected = one.run(ids)
        for _ in range(5):
            np.testing.assert_array_equal(other.run(ids), expected)
            np.testing.assert_array_equal(one.run(ids), expected)
        both = list(zip(one.generate(ids[:9], max_new_tokens=20),
                        other.generate(ids[:9], max_new_tokens=20), strict=True))
        assert len(both) == 20 and all(a == b for a, b in both)
    with llmc.Runtime(embedded_artifact, threads=2) as again:
        np.testing.assert_array_equal(again.run(ids), expected)


def test_eight_threads_on_one_runtime(embedded_artifact):
    """Some run, some generate, some step: each gets what it gets alone, and every page returns."""
    with llmc.Runtime(embedded_artifact, threads=2, max_batch=10) as runtime:
        prompts = [some_ids(5 + 4 * n, n, 512) for n in range(8)]
        free = pages(runtime)
        logits = [runtime.run(ids) for ids in prompts]
        tokens = [list(runtime.generate(ids, max_new_tokens=6)) for ids in prompts]
        failures: list[str] = []

        def work(number: int) -> None:
            ids = prompts[number]
            try:
                for turn in range(12):
                    if (turn + number) % 3 == 0:
                        same = list(runtime.generate(ids, max_new_tokens=6)) == tokens[number]
                    elif (turn + number) % 3 == 1:
                        same = np.array_equal(runtime.run(ids), logits[number])
                    else:
                        sequence = Sequence()
                        got = runtime.step([Chunk(sequence, ids, len(ids))])
                        runtime.release(sequence)
                        same = np.array_equal(got, logits[number])
                    if not same:
                        failures.append(f"thread {number} turn {turn}: other results")
            except Exception as error:
                failures.append(f"thread {number}: {error!r}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not failures
        assert pages(runtime) == free


FORK = """
import os, sys
import numpy as np
import llmc

ids = list(range(3, 40))
runtime = llmc.Runtime(sys.argv[1], threads=3)
expected = runtime.run(ids)
generator = runtime.generate(ids, max_new_tokens=12)
begun = [next(generator) for _ in range(4)]
child = os.fork()
rest = list(generator)
assert np.array_equal(runtime.run(ids), expected)
if child == 0:
    inner = os.fork()
    assert np.array_equal(runtime.run(ids), expected)
    if inner:
        assert os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) == 0
    runtime.close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert begun + rest == list(runtime.generate(ids, max_new_tokens=12))
runtime.close()
"""


def test_forks_of_forks_in_the_middle_of_a_generation(embedded_artifact):
    """Child and grandchild go on and exit by the ordinary way (destructors run)."""
    subprocess.run([sys.executable, "-c", FORK, str(embedded_artifact)], check=True, timeout=60,
                   env=os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parents[1])})


# ---- other CPUs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def for_another(tmp_path_factory):
    """Compiles the embedded model for a target."""
    directory = tmp_path_factory.mktemp("targets")

    def build(target: str) -> Path:
        return compile_model(EMBEDDED, Target.parse(target)).write(directory / "model.llmc")

    return build


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86_64")
@pytest.mark.parametrize("level", [
    "x86-64", pytest.param("x86-64-v2", marks=pytest.mark.slow), "x86-64-v3", "x86-64-v4"])
def test_artifacts_for_levels(for_another, level, embedded_goldens):
    """Run where the CPU has the level, and give the golden ids; refused by name where not."""
    artifact = for_another(f"x86_64:{level}")
    try:
        runtime = llmc.Runtime(artifact, threads=2)
    except DeviceError as error:
        assert "lacks" in str(error) and not has_level(level)
        return
    assert has_level(level)
    with runtime:
        golden = embedded_goldens[0]
        made = runtime.generate(golden["prompt_ids"], max_new_tokens=64, ignore_eos=True)
        assert list(made) == golden["greedy_ids"]


def has_level(level: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    telling = {"x86-64": "sse2", "x86-64-v2": "sse4_2", "x86-64-v3": "avx2",
               "x86-64-v4": "avx512vl"}
    return telling[level] in flags


@pytest.mark.parametrize("target", ["x86_64:znver5", "aarch64:neoverse-v1"])
def test_artifacts_for_other_cpus_are_refused(for_another, target):
    if Target.host().cpu == target.split(":")[1]:
        pytest.skip("this is that CPU")
    with pytest.raises(DeviceError, match="compile the model on this machine"):
        llmc.Runtime(for_another(target))
