"""The engine on a real model: whatever runs beside it, a request gets the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.server.engine import Engine
from llmc.server.request import Request

LENGTH = 56  # new tokens of a request
PAGES = 28  # 16 sequences would take 60 to 90 when they have grown
PAGE_BYTES = 5 * 2 * 32 * 4 * 8 * 4
STORIES = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the "
           "park with her friends. One day, she saw a big red ball in the sky. It was so high that",
           "Tom had a toy car that he liked a lot. He played with it every day and every night. "
           "But one morning the car was gone, and Tom was very sad. He asked his mom where")


@pytest.fixture
def runtime(embedded_artifact: Path, tmp_path: Path) -> Iterator[llmc.Runtime]:
    """Specialised while it runs, with pages for a few of the sequences that run."""
    with llmc.Runtime(embedded_artifact, threads=2, max_batch=16, kv_memory=PAGES * PAGE_BYTES,
                      specialize="lazy", promote_after=10, cache_dir=tmp_path) as opened:
        assert opened.language_model.pool.size == PAGES
        yield opened


def prompts(runtime: llmc.Runtime) -> list[list[int]]:
    """32 prompts of 1 to 130 tokens: half of them begin with one of two long texts."""
    random = np.random.default_rng(5)
    shared = [runtime.encode(text) for text in STORIES]
    found = []
    for number in range(32):
        own = random.integers(3, 512, 1 + number * 7 % 41).tolist()
        found.append(shared[number // 2 % 2] + own if number % 2 else [1, *own])
    return found


def test_32_requests_together_get_what_each_gets_alone(runtime: llmc.Runtime):
    """Greedy, f32, with shared and distinct prefixes, preemption, and code that is replaced
    while it runs: token for token."""
    asked = prompts(runtime)
    alone = [list(runtime.generate(ids, LENGTH, ignore_eos=True)) for ids in asked]
    engine = Engine(runtime, max_batch=16, max_step_tokens=64)
    engine.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and exact_calls(runtime) < 50:
        streams = [engine.submit(Request(ids, LENGTH, ignore_eos=True)) for ids in asked]
        together = [[event.token for event in stream] for stream in streams]
        assert together == alone
    assert engine.drain(10)
    engine.close()
    engine.check()
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.cached_tokens > 0 and stats.pages_used == 0
    assert exact_calls(runtime) >= 50


def exact_calls(runtime: llmc.Runtime) -> int:
    """Steps that ran code of their shape's own."""
    stats = runtime.stats()
    return sum(stats["variants"][name]["calls"] for name in stats["specialize"]["promoted"])
