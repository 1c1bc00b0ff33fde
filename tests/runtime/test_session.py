"""Runtime: the same tokens give the same logits, however they arrive."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import llmc
from llmc.errors import DeviceError, LlmcError, ModelError, ShapeError
from llmc.runtime import session
from llmc.runtime.artifact import Artifact
from llmc.runtime.pages import PAGE, Sequence
from llmc.runtime.step import Chunk
from tests.conftest import GOLDENS

VOCABULARY = 512
CONTEXT = 512


def some_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    """Within the goldens' tolerance: variants sum in different orders."""
    return bool(np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max())


# ---- run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 17, 33, 129])
def test_run_gives_logits_of_every_token(embedded_runtime, count: int):
    logits = embedded_runtime.run(some_ids(count))
    assert logits.shape == (count, VOCABULARY)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("limit", [1, 5, 32])
def test_run_in_chunks_equals_run_at_once(embedded_artifact, embedded_runtime, monkeypatch, limit):
    """Logits of 45 tokens computed `limit` rows at a time."""
    ids = some_ids(45)
    expected = embedded_runtime.run(ids)
    monkeypatch.setattr(session, "LOGIT_BYTES", 4 * VOCABULARY * limit)
    with llmc.Runtime(embedded_artifact, threads=2) as runtime:
        assert close(runtime.run(ids), expected)


def test_long_prompts_are_fed_in_chunks(embedded_artifact, embedded_runtime, monkeypatch):
    ids = some_ids(100)
    expected = list(embedded_runtime.generate(ids, max_new_tokens=8))
    monkeypatch.setattr(session, "CHUNK_TOKENS", 7)
    with llmc.Runtime(embedded_artifact, threads=2) as runtime:
        assert list(runtime.generate(ids, max_new_tokens=8)) == expected


def test_a_batch_of_lists_gives_what_each_gives_alone(embedded_runtime):
    rows = [some_ids(count, seed=count) for count in (1, 7, 33)]
    for got, row in zip(embedded_runtime.run(rows), rows, strict=True):
        assert close(got, embedded_runtime.run(row))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_dense_form_drops_padding(embedded_runtime, side: str):
    rows = [some_ids(count, seed=count) for count in (4, 9)]
    ids, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
    for number, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    logits = embedded_runtime.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert logits.shape == (2, 9, VOCABULARY)
    for number, row in enumerate(rows):
        assert close(logits[number, mask[number] == 1], embedded_runtime.run(row))
        assert not logits[number, mask[number] == 0].any()


def test_pages_come_back_after_every_call(embedded_runtime):
    free = embedded_runtime.stats()["pages"]["free"]
    embedded_runtime.run([some_ids(40), some_ids(3)])
    list(embedded_runtime.generate(some_ids(40), max_new_tokens=3))
    generator = embedded_runtime.generate(some_ids(40), max_new_tokens=30)
    next(generator)
    generator.close()
    assert embedded_runtime.stats()["pages"]["free"] == free


# ---- bits ---------------------------------------------------------------------------------------


def test_one_and_four_threads_give_the_same_bits(embedded_artifact):
    ids = some_ids(67)
    results = []
    for threads in (1, 4):
        with llmc.Runtime(embedded_artifact, threads=threads) as runtime:
            results.append((runtime.run(ids), list(runtime.generate(ids, max_new_tokens=16))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_repeats_give_the_same_bits(embedded_runtime):
    ids = some_ids(19)
    expected = embedded_runtime.run(ids)
    for _ in range(20):
        np.testing.assert_array_equal(embedded_runtime.run(ids), expected)


# ---- generate -----------------------------------------------------------------------------------


def test_goldens(embedded_runtime, embedded_goldens):
    for golden in embedded_goldens:
        assert embedded_runtime.encode(golden["prompt"]) == golden["prompt_ids"]
        made = embedded_runtime.generate(golden["prompt_ids"], max_new_tokens=64, ignore_eos=True)
        assert list(made) == golden["greedy_ids"]


def test_sampling_repeats_with_the_seed_and_differs_between_seeds(embedded_artifact):
    def made(seed: int) -> list[int]:
        with llmc.Runtime(embedded_artifact, threads=1) as runtime:
            return list(runtime.generate([1], max_new_tokens=32, temperature=1.0, seed=seed))

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_generation_ends_at_stop_ids_and_at_the_limit(embedded_runtime):
    made = list(embedded_runtime.generate([1], max_new_tokens=20))
    assert len(made) == 20
    stop = made[10]
    stopped = list(embedded_runtime.generate([1], max_new_tokens=20, stop_ids=[stop]))
    assert stopped == made[:made.index(stop)]
    assert list(embedded_runtime.generate([1], max_new_tokens=0)) == []


def test_generation_ends_when_the_context_is_full(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=2, max_context=40) as runtime:
        made = list(runtime.generate(some_ids(37), ignore_eos=True))
    assert len(made) == 4  # the last token is made, but not fed


def test_two_generations_may_be_interleaved(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=2, max_batch=2) as runtime:
        expected = [list(runtime.generate(some_ids(9, seed), max_new_tokens=12)) for seed in (1, 2)]
        streams = [runtime.generate(some_ids(9, seed), max_new_tokens=12) for seed in (1, 2)]
        got = list(zip(*streams, strict=True))
    assert [list(each) for each in zip(*got, strict=True)] == expected


# ---- step ---------------------------------------------------------------------------------------


def test_mixed_steps_equal_separate_ones(embedded_artifact):
    """Prefill of one sequence beside decoding of two, as a server does it."""
    first, second, third = some_ids(5, 1), some_ids(34, 2), some_ids(11, 3)
    with llmc.Runtime(embedded_artifact, threads=2, max_batch=4) as runtime:
        a, b, c = Sequence(), Sequence(), Sequence()
        runtime.step([Chunk(a, first[:-1], 0), Chunk(b, second[:-1], 0)])
        mixed = runtime.step(
            [Chunk(a, first[-1:], 1), Chunk(c, third, 2), Chunk(b, second[-1:], 1)])
        for sequence in (a, b, c):
            runtime.release(sequence)
        assert mixed.shape == (4, VOCABULARY)
        assert close(mixed[0], runtime.run(first)[-1])
        assert close(mixed[1:3], runtime.run(third)[-2:])
        assert close(mixed[3], runtime.run(second)[-1])


def test_a_step_without_wanted_rows_gives_none(embedded_runtime):
    sequence = Sequence()
    assert embedded_runtime.step([Chunk(sequence, some_ids(3), 0)]).shape == (0, VOCABULARY)
    embedded_runtime.release(sequence)


def test_a_refused_step_leaves_its_sequences_as_they_were(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=1, max_context=64) as runtime:
        kept, big = Sequence(), Sequence()
        runtime.step([Chunk(kept, some_ids(33), 0)])
        pages = list(kept.pages)
        with pytest.raises(ShapeError, match="exceed the context"):
            runtime.step([Chunk(kept, some_ids(1), 1), Chunk(big, some_ids(65), 1)])
        assert (kept.length, kept.pages, big.pages) == (33, pages, [])


@pytest.mark.parametrize(("chunks", "message"), [
    ([], "at least one"), ([(0, 2, 3)], "3 rows of logits are wanted of a chunk of 2"),
    ([(0, 2, 0), (1, 2, -1)], "-1 rows"), ([(0, 1, 1), (0, 1, 1)], "more than once"),
])
def test_senseless_steps_are_refused(embedded_runtime, chunks, message):
    sequences = [Sequence(), Sequence()]
    with pytest.raises(ShapeError, match=message):
        embedded_runtime.step([Chunk(sequences[n], some_ids(count), wanted)
                               for n, count, wanted in chunks])
    assert [sequence.pages for sequence in sequences] == [[], []]


def test_the_kv_memory_option_limits_the_pool(embedded_artifact):
    page_bytes = 2 * 5 * PAGE * 4 * 8 * 4  # k and v, 5 layers, 4 heads of 8 f32
    with llmc.Runtime(embedded_artifact, threads=1, kv_memory=3 * page_bytes) as runtime:
        assert runtime.stats()["pages"] == {"free": 3, "size": 3}
        with pytest.raises(ShapeError, match="97 tokens, the context holds 96"):
            runtime.generate(some_ids(97))


def test_a_context_without_room_is_told_of(embedded_artifact, monkeypatch, caplog):
    options = {"threads": 1, "specialize": "none"}
    page_bytes = 2 * 5 * PAGE * 4 * 8 * 4
    with llmc.Runtime(embedded_artifact, max_context=512, **options):
        assert not caplog.records
    with llmc.Runtime(embedded_artifact, max_context=96, kv_memory=2 * page_bytes, **options):
        assert "holds 64 tokens, of the 96 " in caplog.text
    monkeypatch.setattr("llmc.runtime.executor.Executor.state_memory", lambda _: 3 * page_bytes)
    caplog.clear()
    with llmc.Runtime(embedded_artifact, **options) as runtime:
        assert "holds 96 tokens, of the 512 " in caplog.text
        assert len(runtime.run(some_ids(96))) == 96
    with pytest.raises(LlmcError, match=r"no room for 128 tokens; .* hold 96"):
        llmc.Runtime(embedded_artifact, max_context=128, **options)


# ---- threads and processes ----------------------------------------------------------------------


def test_two_threads_may_call_at_once(embedded_runtime):
    inputs = [some_ids(21, seed) for seed in range(2)]
    expected = [embedded_runtime.run(ids) for ids in inputs]
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(25):
            if not np.array_equal(embedded_runtime.run(inputs[number]), expected[number]):
                failures.append(f"thread {number} got other logits")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_a_forked_process_makes_a_team_of_its_own(embedded_artifact):
    """The parent's threads do not exist in the child; both go on with the same Runtime."""
    ids = some_ids(21)
    with llmc.Runtime(embedded_artifact, threads=3) as runtime:
        expected = runtime.run(ids)
        child = os.fork()
        if child == 0:
            same = np.array_equal(runtime.run(ids), expected)
            os._exit(0 if same else 1)
        assert _exit_code(child, seconds=30) == 0
        np.testing.assert_array_equal(runtime.run(ids), expected)


def _exit_code(child: int, seconds: float) -> int:
    """Exit status of a child process, which is killed if it takes longer."""
    timer = threading.Timer(seconds, os.kill, (child, 9))
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


def test_the_work_is_done_by_one_native_call_a_token(embedded_runtime):
    list(embedded_runtime.generate([1], max_new_tokens=9))
    variants = embedded_runtime.stats()["variants"]
    assert variants["few"]["calls"] == 9
    assert variants["generic"]["calls"] == 0
    assert "few" in str(embedded_runtime.dispatch_table)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "message"), [
    ([], "empty"), ([-1], "token id -1 is outside"), ([VOCABULARY], "outside the vocabulary"),
    ([0.5], "integers"), ([[[1]]], "expected 1-D"), ([[1], []], "empty"),
    ([2**40], "outside the vocabulary"), (None, "expected 1-D"), (3, "expected 1-D"),
    ([[1, [2]], [3]], "one list of integers"), ("text", "expected 1-D"),
    (list(range(1, 500)) * 2, "exceed the context"),
])
def test_bad_tokens_are_shape_errors(embedded_runtime, tokens, message):
    with pytest.raises(ShapeError, match=message):
        embedded_runtime.run(tokens)
    assert embedded_runtime.run([1]).shape == (1, VOCABULARY)


@pytest.mark.parametrize(("tokens", "options", "message"), [
    ([], {}, "empty"), ([1], {"max_new_tokens": -1}, "max_new_tokens"),
    ([1], {"temperature": -0.5}, "temperature"), ([1], {"temperature": float("nan")}, "temper"),
    ([1], {"top_p": 0.0}, "top_p"), ([1], {"top_k": -1}, "top_k"), ([1] * 513, {}, "513 tokens"),
])
def test_bad_generations_are_refused_at_the_call(embedded_runtime, tokens, options, message):
    with pytest.raises(ShapeError, match=message):
        embedded_runtime.generate(tokens, **options)


@pytest.mark.parametrize("arrays", [
    {}, {"ids": np.ones((1, 3), np.int64)}, {"input_ids": np.ones(3, np.int64)},
    {"input_ids": np.ones((1, 3))},
    {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 4), np.int64)},
    {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.array([[1, 0, 1]])},
    {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)},
])
def test_bad_arrays_are_shape_errors(embedded_runtime, arrays):
    with pytest.raises(ShapeError):
        embedded_runtime.run(arrays)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"threads": 0}, LlmcError, "threads must be"), ({"max_context": -1}, LlmcError, "max_context"),
    ({"speed": 11}, LlmcError, "unknown option speed"), ({"target": "nvptx"}, DeviceError, "nvptx"),
    ({"threads": 1.5}, LlmcError, "threads must be"),
])
def test_bad_options(embedded_artifact, options, error, message):
    with pytest.raises(error, match=message):
        llmc.Runtime(embedded_artifact, **options)


def test_errors_of_a_device_say_what_wanted_it(embedded_artifact, monkeypatch):
    class ForGpu(Artifact):
        def __init__(self, directory):
            super().__init__(directory)
            self.manifest = replace(self.manifest, target="nvptx:sm_80")

    def fail(*_):
        raise DeviceError("there is no driver")

    monkeypatch.setattr("llmc.runtime.session.Artifact", ForGpu)
    monkeypatch.setattr("llmc.runtime.cuda_executor.CudaExecutor", fail)
    with pytest.raises(DeviceError, match="llmc was compiled for nvptx:sm_80: there is no driver"):
        llmc.Runtime(embedded_artifact)


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        llmc.Runtime(tmp_path / "nothing")


def test_a_closed_runtime_says_so(embedded_artifact):
    runtime = llmc.Runtime(embedded_artifact, threads=2)
    runtime.close()
    with pytest.raises(LlmcError, match="closed"):
        runtime.run([1])
    runtime.close()


def test_a_language_model_does_not_embed(embedded_runtime):
    with pytest.raises(ShapeError, match="no encoder"):
        embedded_runtime.embed(["a text"])


@pytest.fixture(scope="module")
def encoder():
    with llmc.Runtime(GOLDENS / "hf" / "bert", threads=1) as runtime:
        yield runtime


def test_one_text_gives_one_vector(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode", lambda text: [ord(letter) - 90 for letter in text])
    rows = encoder.embed(["one", "other"])
    assert rows.shape == (2, encoder.config["hidden_size"])
    for alone in (encoder.embed("other"), *encoder.embed(np.array(["other"]))):
        assert close(alone, rows[1]) and alone.shape == rows[1].shape
    assert encoder.embed([]).shape == (0, rows.shape[1])


@pytest.mark.parametrize("texts", [
    None, 3, b"text", {"a": 1}, {"a"}, [1], [["a"]], ["a", None], np.array("a"), [b"a"]], ids=str)
def test_what_is_no_list_of_texts_is_refused(encoder, monkeypatch, texts):
    monkeypatch.setattr(encoder, "_tokenizer", SimpleNamespace(encode=lambda text: [5]))
    with pytest.raises(ShapeError, match="text"):
        encoder.embed(texts)


@pytest.mark.parametrize("rows", [None, 3, b"text", {1: 2}, [[1], 2], [None]], ids=str)
def test_what_is_no_list_of_token_ids_is_refused(encoder, rows):
    with pytest.raises(ShapeError, match="token ids"):
        encoder.embed_ids(rows)
