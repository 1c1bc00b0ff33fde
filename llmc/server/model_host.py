"""The model behind the server: loaded in a thread while HTTP already answers, then served."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import LlmcError
from llmc.runtime.session import Runtime
from llmc.server.embedder import Embedder
from llmc.server.engine import Engine
from llmc.server.grammar import Grammars
from llmc.server.http_errors import ApiError, shown
from llmc.server.logs import log
from llmc.server.templates import ChatTemplate
from llmc.server.vocabulary import Vocabulary

MIXED_TOKENS_A_THREAD = 32
MOST_MIXED_TOKENS = 256


@dataclass(frozen=True)
class ServeOptions:
    """What `llmc serve` is told. model: path; name: what clients call it; target and runtime:
    what Runtime takes; max_batch, max_step_tokens, mixed_step_tokens: what Engine takes;
    queue_limit: most requests that wait; max_body: bytes of a request; body_seconds,
    write_seconds: how long a client may take to send its request, and to read a piece of its
    answer."""

    model: str
    name: str
    target: str = "host"
    runtime: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int = 32
    max_step_tokens: int | None = None
    mixed_step_tokens: int | None = None
    queue_limit: int = 256
    api_key: str | None = None
    chat_template: Path | None = None
    max_body: int = 8 << 20
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    otel: bool = False


class ModelHost:
    """Where a model stands on its way to ready, and what serves it then: `engine` for a language
    model, `embedder` for an encoder.

    phase: starting, loading, compile, weights ... (what the runtime reports), ready, draining,
    failed.
    """

    def __init__(self, options: ServeOptions):
        self.options = options
        self.phase, self.share = "starting", 0.0
        self.began = time.monotonic()
        self.ready_seconds: float | None = None
        self.error = ""
        self.created = int(time.time())
        self.runtime: Any = None
        self.engine: Engine | None = None
        self.embedder: Embedder | None = None
        self.template: ChatTemplate | None = None
        self.grammars: Grammars | None = None
        self.vocabulary: Vocabulary | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    # ---- life -----------------------------------------------------------------------------------

    def start(self, failed: Callable[[], None]) -> None:
        """Load in a thread; `failed` is called there if that does not work out."""
        self._thread = threading.Thread(target=self._load, args=(failed,), name="llmc-load",
                                        daemon=True)
        self._thread.start()

    def _load(self, failed: Callable[[], None]) -> None:
        try:
            self._open()
        except Exception as error:
            self.error = str(error) if isinstance(error, LlmcError | OSError) else (
                f"{type(error).__name__}: {error}")
            self.phase = "failed"
            if not self._closing:
                failed()

    def _open(self) -> None:
        options = self.options
        self.phase = "loading"
        runtime = Runtime(options.model, target=options.target, progress=self._progress,
                          max_batch=options.max_batch, **options.runtime)
        self.runtime = runtime
        runtime.require_context(options.runtime.get("max_context"))
        if runtime.manifest.kind == "encoder":
            self.embedder = Embedder(runtime, queue_limit=options.queue_limit)
            self.embedder.start()
        else:
            self.engine = Engine(runtime, max_batch=options.max_batch,
                                 max_step_tokens=options.max_step_tokens,
                                 mixed_step_tokens=(options.mixed_step_tokens
                                                    or mixed_step_tokens(runtime)),
                                 queue_limit=options.queue_limit)
            self._warn_of_little_memory(self.engine.capacity, runtime.max_context)
            self.engine.start()
        self._open_text(runtime)
        if self._closing:
            return
        self.ready_seconds = self.elapsed
        self.phase, self.share = "ready", 1.0
        log("ready", model=options.name, seconds=round(self.ready_seconds, 3))

    def _open_text(self, runtime: Runtime) -> None:
        """Everything about text; ModelError for a model without a tokenizer."""
        files = runtime.artifact.files
        self.vocabulary = Vocabulary(files, runtime.tokenizer)
        self.template = ChatTemplate(files, self.options.chat_template)
        self.grammars = Grammars(files / "tokenizer.json", runtime.config["vocab_size"],
                                 runtime.config.get("eos_token_ids") or ())

    def _progress(self, phase: str, share: float) -> None:
        if self._closing:  # nobody waits for this model any more
            raise LlmcError("interrupted")
        self.phase, self.share = phase, share

    def drain(self) -> None:
        """Refuse new requests; those that run go on."""
        if self.phase == "ready":
            self.phase = "draining"

    def close(self) -> None:
        """Cancel what still runs, and let go of the model."""
        self._closing = True
        for part in (self.engine, self.embedder):
            if part is not None:
                part.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        if self.runtime is not None:
            self.runtime.close()

    def _warn_of_little_memory(self, capacity: int, context: int) -> None:
        if capacity < context:
            log("little_memory", logging.WARNING, model=self.options.name, context=capacity,
                max_context=context, message=f"the KV cache holds {capacity} tokens, of the "
                f"{context} that a sequence may have: give more --kv-memory")

    # ---- asking ---------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def context(self) -> int:
        """Most tokens of a sequence: the model's limit, or what the KV cache holds."""
        return self.engine.capacity if self.engine else self.runtime.max_context

    def status(self) -> dict[str, Any]:
        """What the health endpoints tell."""
        status = {"phase": self.phase, "share": round(self.share, 4),
                  "elapsed_seconds": round(self.elapsed, 3), "model": self.options.name}
        return status | ({"error": self.error} if self.error else {})

    def require_ready(self) -> None:
        """ApiError 503 while the model loads, or the server shuts down."""
        if self.phase != "ready":
            raise ApiError(503, f"The model is not ready: {self.phase}.", code=self.phase,
                           headers={"retry-after": "1"})

    def require_engine(self) -> Engine:
        """What serves a language model; ApiError 503 before ready, 400 for an encoder."""
        self.require_ready()
        if self.engine is None:
            raise ApiError(400, f"{self.options.name} is an encoder: it makes embeddings, no text.",
                           "model", "model_not_supported")
        return self.engine

    def require_embedder(self) -> Embedder:
        """What serves an encoder; ApiError 503 before ready, 400 for a language model."""
        self.require_ready()
        if self.embedder is None:
            raise ApiError(400, f"{self.options.name} is a language model: it makes no embeddings.",
                           "model", "model_not_supported")
        return self.embedder

    def check_name(self, name: str | None) -> None:
        """ApiError 404 if a request is for another model."""
        if name is not None and name != self.options.name:
            raise ApiError(404, f"The model {shown(name)!r} does not exist; this server has "
                           f"{self.options.name!r}.", "model", "model_not_found")


def mixed_step_tokens(runtime: Any) -> int | None:
    """Most tokens of a step that a decoding sequence waits for; None where all steps may be of the
    same size.

    Decoding reads all weights for few tokens, which takes as long on a few cores as on many;
    prompts are arithmetic, which is done by all threads. So many tokens a thread are a step of 5 to
    8 decodes' time, and at most a tenth slower for prompts than longer ones (docs/server.md). A GPU
    has arithmetic to spare.
    """
    if runtime.manifest.target.startswith("nvptx"):
        return None
    return min(MOST_MIXED_TOKENS, MIXED_TOKENS_A_THREAD * runtime.threads)
