"""What memory held before a step never shows: every golden model, compiled, gives the same bits
whether arena, scratch, outputs and unused pages are zeros or NaN, and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.step import Chunk
from tests.frontend.onnx.test_goldens import GOLDENS as ONNX
from tests.frontend.onnx.test_goldens import runs
from tests.fuzz.hostile import NAN, spoil_memory, spoil_states
from tests.models.packed import GOLDENS as HF

SAMPLE = {  # of `make test`; the others compute with the same kernels
    "bert", "gemma2", "llama_bf16", "llama_gqa3_sharded", "bert_int8_qdq", "gpt2_past_dynamo",
    "llama_genai_fp32", "llama_genai_int4", "llama_past_torchscript", "opset23_block",
}


def names(directory: Path) -> list:
    found = sorted(path.name for path in directory.iterdir() if path.is_dir())
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
            for name in found]


THREADS = (1, 2, 3, 4, 7)
BYTES = (0x00, NAN)


def some_ids(count: int, seed: int = 0, vocabulary: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocabulary, count).tolist()


def spoiled_runtimes(model: Path, **options) -> Iterator[llmc.Runtime]:
    """The model with one thread and zeroed memory first; then other bytes, and more threads."""
    settings = [(1, byte) for byte in BYTES] + [(threads, NAN) for threads in THREADS[1:]]
    for threads, byte in settings:
        with llmc.Runtime(model, threads=threads, **options) as runtime:
            spoil_memory(runtime.executor, byte)
            spoil_states(runtime.executor, byte)
            yield runtime


def assert_same(results: list[list[np.ndarray]]) -> None:
    """Bit for bit, and no NaN anywhere."""
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert not np.isnan(np.asarray(expected, np.float64)).any()
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", names(ONNX))
def test_onnx_goldens(name):
    results = []
    for runtime in spoiled_runtimes(ONNX / name / "model.onnx"):
        outputs = [runtime.run(given) for given, _ in runs(name)]
        results.append([each[key] for each in outputs for key in sorted(each)])
    # A row of a mask that sees nothing may be NaN by the graph's own arithmetic.
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", names(HF))
def test_checkpoints(name):
    results = []
    for runtime in spoiled_runtimes(HF / name):
        vocabulary = runtime.config["vocab_size"]
        outputs = [runtime.run(some_ids(count, count, vocabulary)) for count in (1, 3, 17, 33)]
        if runtime.manifest.kind == "causal_lm":
            made = runtime.generate(some_ids(7, 7, vocabulary), max_new_tokens=9, ignore_eos=True)
            outputs.append(np.array(list(made)))
        results.append(outputs)
    assert_same(results)


def test_steps_of_a_server(embedded_artifact):
    """Prompts, decoding, sequences that come and go on reused pages: one script, all settings."""
    assert_same([server_script(runtime) for runtime in spoiled_runtimes(
        embedded_artifact, max_batch=2)])


def server_script(runtime: llmc.Runtime) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    running: list[Sequence] = []
    results = []
    for _ in range(40):
        if len(running) < 12 and random.random() < 0.6:
            running.append(Sequence())
        chunks = [Chunk(sequence, ids, min(len(ids), int(random.integers(0, 3))))
                  for sequence in running
                  if (ids := some_ids(int(random.choice([0, 1, 1, 1, 2, 9])), 7, 512))]
        if chunks:
            results.append(runtime.step(chunks))
        for sequence in [s for s in running if s.length > 2 * PAGE or random.random() < 0.05]:
            running.remove(sequence)
            runtime.release(sequence)
    for sequence in running:
        runtime.release(sequence)
    pages = runtime.stats()["pages"]
    assert pages["free"] == pages["size"]
    return results


def test_a_thousand_decode_steps_repeat_bit_for_bit(embedded_artifact):
    """Each logit of 1,000 steps (several stories, full contexts), with one and with two threads."""
    def logits(threads: int) -> list[np.ndarray]:
        random = np.random.default_rng(6)
        rows = []
        with llmc.Runtime(embedded_artifact, threads=threads) as runtime:
            spoil_memory(runtime.executor)
            while len(rows) < 1000:
                sequence = Sequence()
                for token in random.integers(3, 512, 250):
                    rows.append(runtime.step([Chunk(sequence, [int(token)], 1)]))
                runtime.release(sequence)
        return rows

    assert_same([logits(1), logits(1), logits(2), logits(3)])
