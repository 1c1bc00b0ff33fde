"""What is measured, for Prometheus and for the dashboard. vLLM's names where it has one."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmc.server.detokenizer import TextStream
from llmc.server.http_middleware import Answer
from llmc.server.model_host import ModelHost

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SAMPLES = 4096  # latencies that the dashboard's percentiles are over, at most
WINDOW = 120.0  # seconds

_SECONDS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60, 120, 300)
_SHORT = (.0005, .001, .002, .005, .01, .02, .03, .05, .075, .1, .15, .2, .5, 1, 2, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

LATENCIES = {
    "time_to_first_token": ("Arrival to first token", _SECONDS),
    "inter_token_latency": ("Between a choice's tokens, as they are handed to the client", _SHORT),
    "e2e_request_latency": ("Arrival to end", _SECONDS),
    "request_queue_time": ("Arrival until the first step that has a token of it", _SECONDS),
    "request_prefill_time": ("That step to first token", _SECONDS),
    "request_decode_time": ("First token to end", _SECONDS),
}


class Metrics:
    """Counts requests and their latencies; collects the rest from the model when asked."""

    def __init__(self, host: ModelHost):
        self.registry = CollectorRegistry()
        self._name = host.options.name
        self.samples: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=SAMPLES) for name in LATENCIES}
        self._latencies = {
            key: self._histogram(f"{key}_seconds", f"{text} (seconds).", buckets)
            for key, (text, buckets) in LATENCIES.items()}
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts.", _TOKENS)
        self._made = self._histogram("request_generation_tokens", "Tokens made for a request.",
                                     _TOKENS)
        self._success = CounterMetric(
            "llmc:request_success", "Finished choices by reason.",
            ("model_name", "finished_reason"), registry=self.registry)
        self._http = CounterMetric("llmc:http_requests", "Answers by route and status.",
                                   ("route", "status"), registry=self.registry)
        self.registry.register(_FromModel(host))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llmc:{name}", text, ("model_name",), buckets=buckets,
                         registry=self.registry).labels(self._name)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    # ---- told as it happens ---------------------------------------------------------------------

    def http(self, answer: Answer) -> None:
        """A request is over."""
        self._http.labels(answer.route, str(answer.status or 499)).inc()

    def token(self, seconds: float) -> None:
        """A choice's token was handed out, `seconds` after the one before (0: it is the first)."""
        if seconds > 0:
            self._add("inter_token_latency", seconds)

    def finished(self, text: TextStream, finishes: Sequence[str]) -> None:
        """A request is over, or its client has gone."""
        times, now = text.stream.times, time.perf_counter()
        for reason in finishes:
            self._success.labels(self._name, reason).inc()
        self._prompt.observe(text.stream.prompt_tokens)
        self._made.observe(text.completion_tokens)
        if times.admitted is not None:
            self._add("request_queue_time", times.admitted - times.arrived)
        if times.first_token is not None and times.admitted is not None:
            self._add("time_to_first_token", times.first_token - times.arrived)
            self._add("request_prefill_time", times.first_token - times.admitted)
            self._add("request_decode_time", now - times.first_token)
        if finishes:
            self._add("e2e_request_latency", now - times.arrived)

    def _add(self, name: str, seconds: float) -> None:
        self._latencies[name].observe(seconds)
        self.samples[name].append((time.monotonic(), seconds))

    def percentiles(self, name: str) -> dict[str, float | None]:
        """p50, p90 and p99 in seconds over the last WINDOW seconds, and how many there were."""
        since = time.monotonic() - WINDOW
        values = sorted(value for at, value in list(self.samples[name]) if at >= since)
        return {f"p{p}": values[min(len(values) - 1, len(values) * p // 100)] if values else None
                for p in (50, 90, 99)} | {"count": len(values)}


class _FromModel(Collector):
    """Metrics that the engine and the runtime count themselves, read when Prometheus asks."""

    def __init__(self, host: ModelHost):
        self._host = host

    def collect(self) -> Iterator[Metric]:
        host = self._host
        yield _gauge("ready", "Whether the model is ready.", float(host.phase == "ready"))
        yield _gauge("startup_seconds", "Seconds from start to ready.", host.ready_seconds or 0.0)
        if host.engine is not None:
            yield from _engine_metrics(host)
        if host.embedder is not None:
            embedder = host.embedder
            yield _gauge("num_requests_waiting", "Requests in the queue.", embedder.waiting)
            yield _counter("embedded_tokens", "Tokens embedded.", embedder.tokens)
            yield _counter("embedding_steps", "Steps of the encoder.", embedder.steps)
        if host.runtime is not None:
            yield from _variant_metrics(host.runtime)
            yield from _specialize_metrics(host.runtime)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"llmc:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"llmc:{name}", text, value=value)


def _engine_metrics(host: ModelHost) -> Iterator[Metric]:
    assert host.engine is not None
    stats = asdict(host.engine.stats())
    used = stats["pages_used"] / max(1, stats["pages"])
    yield _gauge("num_requests_running", "Choices that are being computed.", stats["running"])
    yield _gauge("num_requests_waiting", "Choices in the queue.", stats["waiting"])
    yield _gauge("gpu_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", used)
    yield _gauge("kv_cache_usage_perc", "The same by vLLM's newer name.", used)
    pages = GaugeMetricFamily("llmc:kv_pages", "Pages of the KV cache by state.", labels=["state"])
    pages.add_metric(["used"], stats["pages_used"])
    pages.add_metric(["cached"], stats["pages_cached"])
    pages.add_metric(["free"], stats["pages"] - stats["pages_used"])
    yield pages
    for name, field, text in (
            ("num_preemptions", "preemptions", "Choices that gave up their pages."),
            ("prefix_cache_queries", "prompt_tokens", "Prompt tokens looked up."),
            ("prefix_cache_hits", "cached_tokens", "Prompt tokens that were found."),
            ("prompt_tokens", "prompt_tokens", "Prompt tokens."),
            ("generation_tokens", "generated_tokens", "Tokens made."),
            ("engine_steps", "steps", "Steps of the engine."),
            ("engine_failed_steps", "failed_steps", "Steps that raised.")):
        yield _counter(name, text, stats[field])
    seconds = CounterMetricFamily("llmc:engine_step_seconds", "Seconds of all steps by part.",
                                  labels=["part"])
    for part in ("schedule", "run", "postprocess"):
        seconds.add_metric([part], stats[f"seconds_{part}"])
    yield seconds


def _variant_metrics(runtime) -> Iterator[Metric]:
    """The dispatch table: tier, calls, time, gain."""
    labels = ["variant", "tier"]
    calls = CounterMetricFamily("llmc:variant_calls", "Calls of compiled code.", labels=labels)
    seconds = CounterMetricFamily("llmc:variant_seconds", "Seconds in it.", labels=labels)
    gain = GaugeMetricFamily("llmc:variant_gain_ratio", "Measured share of the time that it saves "
                             "against the code it replaces.", labels=labels)
    tiers: Counter[str] = Counter()
    for row in runtime.dispatch_table.rows:
        labels = [row.name, "trial" if row.trial else row.tier]
        calls.add_metric(labels, row.calls)
        seconds.add_metric(labels, row.seconds)
        tiers[labels[1]] += 1
        if row.gain is not None:
            gain.add_metric(labels, row.gain)
    live = GaugeMetricFamily("llmc:variants", "Live variants by tier.", labels=["tier"])
    for tier, count in tiers.items():
        live.add_metric([tier], count)
    yield from (calls, seconds, gain, live)


def _specialize_metrics(runtime) -> Iterator[Metric]:
    """Compiles and what became of them; nothing where specialisation is off."""
    stats = runtime.stats()
    compiles, policy = stats.get("compiles"), stats.get("specialize")
    if compiles is not None:
        outcomes = CounterMetricFamily("llmc:compiles", "Compiles of exact code by outcome; "
                                       "cached: none was needed.", labels=["outcome"])
        for outcome in ("compiled", "cached", "failed"):
            outcomes.add_metric([outcome], compiles[outcome])
        yield outcomes
        yield _counter("compile_seconds", "Seconds of all compiles.", compiles["seconds"])
        yield _gauge("compiles_waiting", "Compiles in the queue.", compiles["waiting"])
        yield _gauge("compiles_running", "Compiles running.", float(bool(compiles["running"])))
    if policy is not None:
        yield _gauge("specialized_code_bytes", "Bytes of exact code.", policy["code_bytes"])
        verdicts = GaugeMetricFamily("llmc:shapes", "Shapes by what became of their own code.",
                                     labels=["verdict"])
        for verdict, count in Counter(policy["verdicts"].values()).items():
            verdicts.add_metric([verdict], count)
        yield verdicts
