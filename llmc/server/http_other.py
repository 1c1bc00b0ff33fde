"""The other endpoints: embeddings, models, tokens, health, metrics, dashboard."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import llmc
from llmc.server.history import History
from llmc.server.http_body import json_answer, read_json, until_gone
from llmc.server.http_errors import ApiError, field_errors
from llmc.server.metrics import CONTENT_TYPE, Metrics
from llmc.server.model_host import ModelHost
from llmc.server.prompts import chat_ids, encode
from llmc.server.protocol import DetokenizeRequest, EmbeddingRequest, TokenizeRequest, inputs
from llmc.server.request import EngineStopped

_EMBEDDING = msgspec.json.Decoder(EmbeddingRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
_PAGE = Path(llmc.__file__).parent / "data" / "dashboard.html"
# The page may run its own script and style, and talk to this server: nothing else.
_PAGE_HEADERS = {"content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
                 "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                 "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
                 "x-content-type-options": "nosniff", "cache-control": "no-cache"}


class Other:
    """Everything but completions."""

    def __init__(self, host: ModelHost, metrics: Metrics, history: History):
        self._host, self._metrics, self._history = host, metrics, history

    async def _body(self, http: HttpRequest, decoder: msgspec.json.Decoder) -> Any:
        self._host.require_ready()
        options = self._host.options
        body = await read_json(http, decoder, options.max_body, options.body_seconds)
        self._host.check_name(body.model)
        return body

    # ---- embeddings -----------------------------------------------------------------------------

    async def embeddings(self, http: HttpRequest) -> Response:
        embedder = self._host.require_embedder()
        body: EmbeddingRequest = await self._body(http, _EMBEDDING)
        runtime = self._host.runtime
        width = runtime.config["hidden_size"]
        if body.dimensions not in (None, width):
            raise ApiError(400, f"This model makes vectors of {width} dimensions, no others.",
                           "dimensions", "unsupported")
        given = inputs(body.input, "input")
        with field_errors("input"):
            rows = await asyncio.to_thread(
                lambda: [runtime.embedding_ids(each) if isinstance(each, str) else each
                         for each in given])
            future = asyncio.wrap_future(embedder.submit(rows))
        watcher = asyncio.create_task(until_gone(http))
        watcher.add_done_callback(lambda task: task.cancelled() or future.cancel())
        try:
            with field_errors("input"):
                vectors = await future
        except asyncio.CancelledError:
            if watcher.done():
                raise ConnectionAbortedError("the client has gone") from None
            raise EngineStopped("the server is shutting down") from None
        finally:
            watcher.cancel()
        tokens = sum(map(len, rows))
        http.state.answer.fields["prompt_tokens"] = tokens
        encoding = body.encoding_format or "float"
        return json_answer({
            "object": "list", "model": self._host.options.name,
            "data": [{"object": "embedding", "index": index,
                      "embedding": _written(vector, encoding)}
                     for index, vector in enumerate(vectors)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    # ---- models and tokens ----------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        return json_answer({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        self._host.check_name(http.path_params["model"])
        return json_answer(self._card())

    def _card(self) -> dict[str, Any]:
        host = self._host
        context = host.context if host.phase == "ready" else None
        return {"id": host.options.name, "object": "model", "created": host.created,
                "owned_by": "llmc", "max_model_len": context}

    async def tokenize(self, http: HttpRequest) -> Response:
        body: TokenizeRequest = await self._body(http, _TOKENIZE)
        host = self._host
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            ids = await chat_ids(host, body.messages, body.add_generation_prompt, {})
        else:
            ids = await encode(host, body.prompt, body.add_special_tokens) if body.prompt else []
        answer = {"count": len(ids), "max_model_len": host.context, "tokens": ids}
        if body.return_token_strs:
            assert host.vocabulary is not None
            answer["token_strs"] = [host.vocabulary.text_of(each) for each in ids]
        return json_answer(answer)

    async def detokenize(self, http: HttpRequest) -> Response:
        body: DetokenizeRequest = await self._body(http, _DETOKENIZE)
        tokenizer = self._host.runtime.tokenizer
        with field_errors("tokens"):
            text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
        return json_answer({"prompt": text})

    # ---- watching -------------------------------------------------------------------------------

    async def live(self, http: HttpRequest) -> Response:
        """Whether the process is worth keeping."""
        return json_answer(self._host.status(), 503 if self._host.phase == "failed" else 200)

    async def ready(self, http: HttpRequest) -> Response:
        """Whether to send requests here now."""
        return json_answer(self._host.status(), 200 if self._host.phase == "ready" else 503)

    async def startup(self, http: HttpRequest) -> Response:
        """Whether the model has been loaded."""
        return json_answer(self._host.status(), 503 if self._host.ready_seconds is None else 200)

    async def metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def dashboard(self, http: HttpRequest) -> Response:
        return Response(_PAGE.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    async def dashboard_data(self, http: HttpRequest) -> Response:
        after = http.query_params.get("after", "0")
        if not (after.isascii() and after.isdecimal() and len(after) < 19):
            raise ApiError(400, "after must be the number of an event", "after")
        return json_answer(self._history.snapshot(int(after)))


def _written(vector: np.ndarray, encoding: str) -> list[float] | str:
    """float: numbers; base64: little-endian f32, as OpenAI's client asks for and reads it."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
