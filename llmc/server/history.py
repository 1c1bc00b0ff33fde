"""The last minutes, second by second, for the dashboard."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from llmc.server.metrics import Metrics
from llmc.server.model_host import ModelHost

KEPT_SECONDS = 300
SHAPES_SECONDS = 60
SHAPES = 24  # shapes of the profile that the page shows


@dataclass(frozen=True)
class Second:
    """One sample. at: seconds since 1970; generated, prompt: tokens a second."""

    at: float
    generated: float
    prompt: float
    running: int
    waiting: int
    pages_used: int


class History:
    """Samples of the engine. `sample` is called once a second."""

    def __init__(self, host: ModelHost, metrics: Metrics):
        self._host, self._metrics = host, metrics
        self.seconds: deque[Second] = deque(maxlen=KEPT_SECONDS)
        self._steps: deque[tuple[float, Counter[tuple[int, int]]]] = deque()
        self._last: tuple[float, int, int] | None = None
        self._read_until = 0.0

    async def follow(self) -> None:
        """Take a sample every second, for as long as the server runs."""
        while True:
            await asyncio.sleep(1.0)
            self.sample()

    def sample(self) -> None:
        engine, now = self._host.engine, time.monotonic()
        if engine is None:
            return
        stats = engine.stats()
        at, generated, prompt = self._last or (now, stats.generated_tokens, stats.prompt_tokens)
        passed = max(now - at, 1e-3)
        self._last = now, stats.generated_tokens, stats.prompt_tokens
        self.seconds.append(Second(
            time.time(), (stats.generated_tokens - generated) / passed,
            (stats.prompt_tokens - prompt) / passed, stats.running, stats.waiting,
            stats.pages_used))
        self._count_steps(engine, now)

    def _count_steps(self, engine: Any, now: float) -> None:
        """Steps since the last sample, by tokens and sequences."""
        new = [step for step in list(engine.recent) if step.at > self._read_until]
        if new:
            self._read_until = new[-1].at
            self._steps.append((now, Counter((step.tokens, step.sequences) for step in new)))
        while self._steps and self._steps[0][0] < now - SHAPES_SECONDS:
            self._steps.popleft()

    def step_shapes(self) -> list[tuple[int, int, int]]:
        """(tokens, sequences, steps) of the last SHAPES_SECONDS."""
        total: Counter[tuple[int, int]] = Counter()
        for _, counts in self._steps:
            total.update(counts)
        return [(*shape, count) for shape, count in sorted(total.items())]

    def snapshot(self, after: int) -> dict[str, Any]:
        """Everything that the dashboard shows. after: number of the last event that it has."""
        host, runtime = self._host, self._host.runtime
        data: dict[str, Any] = {"status": host.status(), "now": time.time(),
                                "history": [asdict(each) for each in self.seconds],
                                "latencies": {name: self._metrics.percentiles(name) for name in
                                              ("time_to_first_token", "inter_token_latency",
                                               "e2e_request_latency")}}
        if runtime is None:
            return data
        data |= {"target": ":".join(runtime.manifest.target.split(":")[:2]),
                 "dtype": runtime.manifest.dtype,
                 "table": [_row(row) for row in runtime.dispatch_table.rows],
                 "shapes": [asdict(each) for each in runtime.shapes()[:SHAPES]],
                 "steps": self.step_shapes(),
                 "events": [asdict(each) for each in runtime.events(after)],
                 "specialize": runtime.stats().get("specialize", {}).get("mode", "none"),
                 "compiles": runtime.stats().get("compiles")}
        if host.engine is not None:
            data["engine"] = asdict(host.engine.stats())
        return data


def _row(row: Any) -> dict[str, Any]:
    return {"tier": row.tier, "name": row.name, "key": dict(row.key), "calls": row.calls,
            "seconds": row.seconds, "gain": row.gain, "trial": row.trial}
