"""Embeddings: sentences of many requests in one step of an encoder."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.server.request import EngineStopped, QueueFull


@dataclass(eq=False)
class _Job:
    rows: list[np.ndarray]
    future: Future[np.ndarray] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class Embedder:
    """Embeds token ids in a thread of its own; requests that wait are batched.

    max_step_tokens: most tokens that are embedded together (a request with more is still done
    whole); queue_limit: most requests that wait.
    """

    def __init__(self, runtime: Any, *, max_step_tokens: int = 4096, queue_limit: int = 256):
        self.runtime = runtime
        self.max_step_tokens = max_step_tokens
        self.queue_limit = queue_limit
        self.requests = self.failed = self.tokens = self.steps = 0
        self._queue: deque[_Job] = deque()
        self._news = threading.Condition()
        self._busy = False
        self._state = "serving"  # then "draining", "stopped"
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, rows: Sequence[Sequence[int]]) -> Future[np.ndarray]:
        """Queue sentences (token ids; see `Runtime.embedding_ids`); vectors [len(rows), dim] f32.
        A future that is cancelled before its turn is skipped.

        ShapeError if they are no token ids, QueueFull, EngineStopped.
        """
        job = _Job([self.runtime.check_ids(row) for row in rows])
        with self._news:
            if self._state != "serving":
                raise EngineStopped("the server is shutting down")
            if len(self._queue) >= self.queue_limit:
                raise QueueFull(f"{len(self._queue)} requests wait already: try again later")
            self._queue.append(job)
            self._news.notify_all()
        return job.future

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="llmc-embedder", daemon=True)
        self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that are there; whether all have finished."""
        with self._news:
            self._state = "draining" if self._state == "serving" else self._state
            return self._news.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self) -> None:
        """Cancel what waits, and stop the thread."""
        with self._news:
            self._state = "stopped"
            for job in self._queue:
                job.future.cancel()
            self._queue.clear()
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._news:
                self._busy = False
                self._news.notify_all()
                self._news.wait_for(lambda: self._queue or self._state == "stopped")
                if self._state == "stopped":
                    return
                jobs = self._take()
                self._busy = True
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])

    def _take(self) -> list[_Job]:
        """The oldest jobs, as many as make one step."""
        jobs = [self._queue.popleft()]
        tokens = jobs[0].tokens
        while self._queue and tokens + self._queue[0].tokens <= self.max_step_tokens:
            jobs.append(self._queue.popleft())
            tokens += jobs[-1].tokens
        return jobs

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Embed jobs together; where that fails one by one, so that only the bad ones do."""
        if not jobs:
            return
        try:
            vectors = self.runtime.embed_ids([row for job in jobs for row in job.rows])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._run([job])
            else:
                self.failed += 1
                jobs[0].future.set_exception(error)
            return
        self.steps += 1
        start = 0
        for job in jobs:
            job.future.set_result(vectors[start:start + len(job.rows)])
            start += len(job.rows)
            self.requests += 1
            self.tokens += job.tokens
