"""A span for each request, by OpenTelemetry (the extra `otel`). The OTEL_* variables say where they
go; a request's `traceparent` is continued."""

from __future__ import annotations

import time
from typing import Any

from llmc.errors import LlmcError
from llmc.server.http_middleware import Answer


class Spans:
    """Sends spans. exporter: in place of OTLP over HTTP. LlmcError without the extra."""

    def __init__(self, model: str, exporter: Any = None):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise LlmcError(f"--otel needs {error.name}, which is not installed: "
                            "pip install '.[otel]' in llmc's checkout") from None
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "llmc"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("llmc.server")

    def record(self, answer: Answer) -> None:
        """The span of a request that is over."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        start = end - int((time.perf_counter() - answer.began) * 1e9)
        parent = TraceContextTextMapPropagator().extract(
            {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers})
        span = self._tracer.start_span(f"{answer.method} {answer.route}", parent, SpanKind.SERVER,
                                       self._attributes(answer), start_time=start)
        span.end(end)

    def _attributes(self, answer: Answer) -> dict[str, Any]:
        fields = answer.fields
        told = {"http.request.method": answer.method, "http.route": answer.route,
                "http.response.status_code": answer.status or 499,
                "gen_ai.request.model": self._model, "llmc.request_id": answer.request_id,
                "gen_ai.usage.input_tokens": fields.get("prompt_tokens"),
                "gen_ai.usage.output_tokens": fields.get("completion_tokens"),
                "gen_ai.response.finish_reasons": fields.get("finish"),
                "llmc.first_token_seconds": fields.get("first_token_seconds"),
                "error.type": fields.get("error")}
        return {name: value for name, value in told.items() if value is not None}

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
