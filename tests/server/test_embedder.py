"""Embeddings of many requests in one step; what is bad fails alone."""

from __future__ import annotations

from concurrent.futures import CancelledError

import numpy as np
import pytest

from llmc.errors import ShapeError
from llmc.server.embedder import Embedder
from llmc.server.request import EngineStopped, QueueFull

BAD = 13


class FakeEncoder:
    """The vector of a sentence is its sum and its length."""

    def __init__(self):
        self.batches: list[int] = []

    def check_ids(self, ids) -> np.ndarray:
        if not len(ids):
            raise ShapeError("empty")
        return np.asarray(ids, np.int32)

    def embed_ids(self, rows) -> np.ndarray:
        self.batches.append(len(rows))
        if any(BAD in row for row in rows):
            raise ShapeError("bad")
        return np.array([[row.sum(), len(row)] for row in rows], np.float32)


def test_waiting_requests_are_one_step_and_bad_ones_fail_alone():
    encoder = FakeEncoder()
    embedder = Embedder(encoder, max_step_tokens=10)
    futures = [embedder.submit(rows) for rows in
               ([[1, 2], [3]], [[4]], [[BAD]], [[5] * 12], [[6]])]
    cancelled = embedder.submit([[7]])
    cancelled.cancel()
    embedder.start()
    assert embedder.drain(10)
    embedder.close()
    assert [future.result().tolist() for future in futures[:2]] == [[[3, 2], [3, 1]], [[4, 1]]]
    with pytest.raises(ShapeError, match="bad"):
        futures[2].result()
    assert futures[3].result().tolist() == [[60, 12]] and futures[4].result().tolist() == [[6, 1]]
    with pytest.raises(CancelledError):
        cancelled.result()
    assert encoder.batches == [4, 2, 1, 1, 1, 1]
    assert (embedder.requests, embedder.failed) == (4, 1)


def test_limits():
    embedder = Embedder(FakeEncoder(), queue_limit=1)
    with pytest.raises(ShapeError):
        embedder.submit([[]])
    waiting = embedder.submit([[1]])
    with pytest.raises(QueueFull):
        embedder.submit([[1]])
    assert not embedder.drain(0)
    with pytest.raises(EngineStopped):
        embedder.submit([[1]])
    embedder.close()
    assert waiting.cancelled()
