"""Decoding ahead of the reader: with a decoder that takes its time, and on a device made of host
memory that runs made-up kernels."""

from __future__ import annotations

import ctypes
from collections import deque
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.errors import ShapeError
from llmc.ir.choice import FIELDS
from llmc.runtime import cuda_decode
from llmc.runtime.decode import AHEAD, RING, DecodeLoop, Start
from llmc.runtime.pages import Sequence
from llmc.runtime.sampling import Sampling, sample
from llmc.runtime.step import Chunk, pack_batch


class PatientDecoder:
    """Runs a step on the host when its token is read, or later."""

    ahead = AHEAD

    def __init__(self, executor: Any):
        self.executor = executor
        self.begun: deque[list[np.ndarray]] = deque()
        self.most = 0

    def start(self, starts):
        self.tokens = [each.token for each in starts]
        self.lengths = [each.position for each in starts]
        self.starts = starts

    def step(self, page_rows):
        self.rows = self.rows if page_rows is None else page_rows
        self.begun.append([row.copy() for row in self.rows])
        self.most = max(self.most, len(self.begun))

    def read(self):
        rows = self.begun.popleft()
        sequences = [Sequence(length, row.tolist()) for length, row
                     in zip(self.lengths, rows, strict=True)]
        assert all(sequence.length < 32 * len(sequence.pages) for sequence in sequences)
        inputs = pack_batch([Chunk(s, [t], 1) for s, t in zip(sequences, self.tokens, strict=True)])
        logits = self.executor.run(inputs)["logits"]
        self.lengths = [length + 1 for length in self.lengths]
        self.tokens = [sample(row, start.sampling, start.choice, length) for row, start, length
                       in zip(logits, self.starts, self.lengths, strict=True)]
        return np.array(self.tokens, np.int32)

    def drain(self):
        while self.begun:
            self.read()


@pytest.fixture
def runtime(embedded_artifact):
    with llmc.Runtime(embedded_artifact, threads=1, specialize="none") as runtime:
        yield runtime


@pytest.fixture
def decoder(runtime, monkeypatch):
    made = PatientDecoder(runtime.executor)
    made.returned = 0

    def give_back(_):
        made.returned += 1

    monkeypatch.setattr(runtime.executor, "borrow_decoder", lambda *_: made)
    monkeypatch.setattr(runtime.executor, "return_decoder", give_back)
    return made


SETTINGS = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_k": 9, "top_p": 0.9}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_running_ahead_changes_no_token(runtime, settings, request):
    prompt = runtime.encode("Once upon a time")
    runtime._generations = 0
    expected = list(runtime.generate(prompt, 70, ignore_eos=True, **settings))
    request.getfixturevalue("decoder")
    runtime._generations = 0
    assert list(runtime.generate(prompt, 70, ignore_eos=True, **settings)) == expected
    stop = expected[20]
    runtime._generations = 0
    assert list(runtime.generate(prompt, 70, stop_ids=[stop], ignore_eos=True, **settings)) == \
        expected[:expected.index(stop)]


def test_ahead_by_so_many_and_nothing_is_left_behind(runtime, decoder):
    tokens = runtime.generate(runtime.encode("The"), 50, ignore_eos=True)
    for _ in range(5):
        next(tokens)
    assert len(decoder.begun) == AHEAD - 1
    tokens.close()
    assert not decoder.begun and decoder.most == AHEAD
    assert decoder.returned == 1
    pool = runtime._model.pool
    assert pool.free == pool.size


def test_the_context_ends_and_the_cache_can_be_full(embedded_artifact, monkeypatch):
    for context, memory, expected in ((70, None, 66), (512, 1, None)):
        with llmc.Runtime(embedded_artifact, threads=1, max_context=context, kv_memory=memory,
                          specialize="none") as runtime:
            decoder = PatientDecoder(runtime.executor)
            monkeypatch.setattr(runtime.executor, "borrow_decoder", lambda *_, d=decoder: d)
            tokens = runtime.generate([1, 403, 407, 261, 378], ignore_eos=True)
            if expected:
                assert len(list(tokens)) == expected
                continue
            made = []
            with pytest.raises(ShapeError, match="the KV cache is full"):
                for token in tokens:
                    made.append(token)
            assert len(made) == 28  # one page: 5 of the prompt, 27 made; the last one stays outside


def test_sequences_decode_together_and_can_go_on(runtime, decoder):
    model = runtime._model
    prompts = [runtime.encode("Once upon"), runtime.encode("The big dog")]
    alone = [list(runtime.generate(prompt, 41, ignore_eos=True)) for prompt in prompts]
    sequences = [Sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        list(model.feed(sequence, prompt))
    starts = [Start(made[0], len(prompt), Sampling()) for made, prompt
              in zip(alone, prompts, strict=True)]
    loop = DecodeLoop(model, decoder, sequences, starts, 40)
    together = [loop.next() for _ in range(30)]
    loop.finish()
    assert np.array(together).T.tolist() == [made[1:31] for made in alone]
    assert [s.length for s in sequences] == [len(prompt) + 30 for prompt in prompts]
    (logits,) = model.feed(sequences[0], [alone[0][30]])
    assert logits[-1].argmax() == alone[0][31]


# ---- the GPU's decoder, on made-up kernels ------------------------------------------------------


def at(address: int, dtype: Any, count: int) -> np.ndarray:
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)


class HostMemory:
    def __init__(self, *arguments: Any):
        size = next(a for a in arguments if isinstance(a, int))
        self.array = np.full(max(size, 256), 0xFF, np.uint8)
        self.address = self.array.ctypes.data

    def close(self) -> None:
        self.array[:] = 0xFF


class LateGraph:
    """Runs what was recorded when it is launched."""

    recorded = 0

    def __init__(self, device: Any, record: Any):
        LateGraph.recorded += 1
        self.kernels: list[Any] = []
        device.kernels = self.kernels
        record()

    def launch(self) -> None:
        for kernel in self.kernels:
            kernel()

    def close(self) -> None: ...


VOCABULARY = 1000


class MadeUpExecutor:
    """A model whose next token is told by the last one, its position and the page it stands in."""

    graph_launches = moves = 0
    waited = 0.0
    known = MappingProxyType({"pool_pages": 64})
    symbols = ("tokens", "sequences", "rows", "table_width", "pool_pages")
    inputs = tuple(SimpleNamespace(name=name) for name in
                   ("ids", "positions", "sequence", "offsets", "page_table", "rows"))
    outputs = tuple(SimpleNamespace(name=name) for name in ("logits", "greedy"))

    def __init__(self):
        self.device = SimpleNamespace(use=lambda: None, stream=0)
        self.variant = SimpleNamespace(calls=0, seconds=0.0)
        self.dispatch = SimpleNamespace(table=object(), trial=None, choose=self.choose,
                                        count=self.count)
        self.choices, self.counted = 0, []
        self.results = HostMemory(1 << 16)

    def choose(self, values):
        self.choices += 1
        return self.variant

    def count(self, values, variant, seconds, calls):
        assert seconds >= 0
        self.counted.append((values["table_width"], calls))

    def require_open(self): ...

    def unload_retired(self, chosen): ...

    def plan(self, variant, values):
        logits = 4 * VOCABULARY * values["tokens"]
        return SimpleNamespace(
            grids=(values["table_width"],), symbols=tuple(values[name] for name in self.symbols),
            outputs={"logits": (256, logits), "greedy": (512 + logits, 8 * values["tokens"])})

    def memory_for(self, plan):
        return 7, self.results.address

    def tables(self):
        return 5, 6

    def choosers(self):
        function = SimpleNamespace(function=lambda name, shared: name)
        return function, {name: {"kernel": name, "shared_bytes": 0, "threads": 1,
                                 "blocks": "1"} for name in ("advance", "sample")}

    def launch_stages(self, variant, plan, arguments):
        self.device.kernels.append(lambda: self.stage(arguments))

    def stage(self, arguments):
        fields = at(arguments, np.int64, 9).tolist()
        assert fields[3:6] == [5, 6, 7]
        symbols = dict(zip(self.symbols, at(fields[0], np.int64, len(self.symbols)).tolist(),
                           strict=True))
        count, width = symbols["tokens"], symbols["table_width"]
        assert symbols["sequences"] == symbols["rows"] == count and symbols["pool_pages"] == 64
        sizes = [count, count, count, count + 1, count * width, count]
        ids, positions, sequence, offsets, table, rows = (
            at(pointer, np.int32, size) for pointer, size
            in zip(at(fields[1], np.int64, 6).tolist(), sizes, strict=True))
        assert sequence.tolist() == rows.tolist() == list(range(count))
        assert offsets.tolist() == list(range(count + 1))
        pages = table.reshape(count, width)[np.arange(count), positions // 32]
        logits, greedy = at(fields[2], np.int64, 2).tolist()
        assert logits % 4 == 0
        at(greedy, np.int64, count)[:] = following(ids, positions, pages)


def following(token, position, page):
    return (token * 31 + position * 7 + page * 3 + 1) % VOCABULARY


def advance(device, function, blocks, threads, shared, choice, layer):
    def run() -> None:
        assert function == "advance"
        value = dict(zip(FIELDS, at(choice, np.int64, len(FIELDS)).tolist(), strict=True))
        count = value["sequences"]
        chosen, steps = at(value["greedy"], np.int64, count), at(value["steps"], np.int64, 1)
        at(value["ids"], np.int32, count)[:] = chosen
        at(value["positions"], np.int32, count)[:] += 1
        ring = at(value["ring"], np.int32, value["slots"] * count).reshape(-1, count)
        ring[steps[0] % value["slots"]] = chosen
        steps += 1
        assert value["vocabulary"] == VOCABULARY

    device.kernels.append(run)


@pytest.fixture
def host_device(monkeypatch):
    def prepared(name: str, *arguments: Any) -> Any:
        if name == "cuMemcpyHtoDAsync":
            return lambda: ctypes.memmove(*arguments[:3])
        return lambda: None

    for name, fake in {"Memory": HostMemory, "PinnedMemory": HostMemory, "Graph": LateGraph,
                       "launch": advance, "call": lambda *_: 0, "event": iter(range(100)).__next__,
                       "prepared": prepared}.items():
        monkeypatch.setattr(cuda_decode, name, fake)
    LateGraph.recorded = 0


@pytest.mark.parametrize("count", [1, 3])
def test_steps_feed_each_other_over_pages_and_moves_of_memory(host_device, count):
    executor = MadeUpExecutor()
    decoder = cuda_decode.CudaDecoder(executor, count, most_pages=64)
    for turn in range(2):  # a decoder serves again
        tokens, positions = np.arange(count) + 5, np.arange(count) * 17 + 3
        rows = [np.arange(40, dtype=np.int32)[::-1] + number for number in range(count)]
        decoder.start([Start(int(t), int(p), Sampling())
                       for t, p in zip(tokens, positions, strict=True)])
        pages = [0] * count
        unread = 0
        expected = []
        for step in range(600):
            needed = [(int(p) + step) // 32 + 1 for p in positions]
            decoder.step([row[:n] for row, n in zip(rows, needed, strict=True)]
                         if needed != pages else None)
            pages = needed
            if step == 300:
                executor.moves += 1
                executor.results = HostMemory(1 << 16)
            places = positions + step
            page = np.array([row[p // 32] for row, p in zip(rows, places, strict=True)])
            tokens = following(tokens, places, page)
            expected.append(tokens)
            unread += 1
            while unread > (RING - 1 if step % 9 else 0):
                assert decoder.read().tolist() == expected.pop(0).tolist()
                unread -= 1
        decoder.drain()
        assert LateGraph.recorded <= 3, turn
        # chosen anew where the table gets wider and after the move; every step is counted once
        assert executor.choices <= 5 * (turn + 1)
        assert sum(calls for _, calls in executor.counted) == (600 - unread) * (turn + 1)
    decoder.close()


class TimedExecutor(MadeUpExecutor):
    """Two variants on trial that take different times, by a clock that waiting turns."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now, self.pending = 0.0, deque()
        self.old, self.new = (SimpleNamespace(calls=0, seconds=0.0, cost=cost)
                              for cost in (1.0, 0.75))
        self.observed: list[tuple[Any, float]] = []
        self.dispatch.trial = SimpleNamespace(
            observe=lambda *each: self.observed.append(each))
        monkeypatch.setattr(cuda_decode.time, "perf_counter", lambda: self.now)
        copies = cuda_decode.prepared
        monkeypatch.setattr(cuda_decode, "prepared", lambda name, *arguments: (
            partial(self.wait, *arguments) if name == "cuEventSynchronize"
            else copies(name, *arguments)))

    def choose(self, values):
        self.choices += 1
        if self.dispatch.trial is None:
            return self.old
        return self.new if self.choices % 4 in (2, 3) else self.old

    def launch_stages(self, variant, plan, arguments):
        super().launch_stages(variant, plan, arguments)
        self.device.kernels.append(lambda: self.pending.append(variant.cost))

    def wait(self, event):
        if event in self.of_steps:  # the others are those of copies
            self.now += self.pending.popleft()


def test_trials_judge_the_steps_that_were_theirs(host_device, monkeypatch):
    executor = TimedExecutor(monkeypatch)
    decoder = cuda_decode.CudaDecoder(executor, 1, most_pages=4)
    executor.of_steps = decoder._events
    decoder.start([Start(5, 0, Sampling())])
    for step in range(96):
        if step == 50:
            executor.dispatch.trial, executor.dispatch.table = None, object()
        decoder.step([np.arange(3, dtype=np.int32)] if step == 0 else None)
        if step >= AHEAD - 1:
            decoder.read()
    while decoder._read < 96:
        decoder.read()
    decoder.drain()
    assert len(executor.observed) == 50 and executor.choices == 51
    assert all(seconds == variant.cost for variant, seconds in executor.observed)
    assert executor.new.seconds == 0.75 * executor.new.calls == 0.75 * 25
    assert executor.old.seconds == executor.old.calls == 71
    assert sum(calls for _, calls in executor.counted) == 96
    assert executor.waited == executor.now


def test_few_widths_of_page_tables():
    widths = {cuda_decode.round_width(pages) for pages in range(1, 4097)}
    assert len(widths) < 40
    assert all(pages <= cuda_decode.round_width(pages) <= max(pages + 7, pages * 1.25)
               for pages in range(1, 4097))
