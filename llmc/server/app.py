"""The ASGI application: which path is answered by what, and its life from start to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from llmc.server.history import History
from llmc.server.http_body import EarlyAnswer, TooLarge, json_answer
from llmc.server.http_errors import ApiError
from llmc.server.http_generate import Generate
from llmc.server.http_middleware import QUIET, Answer, Gate
from llmc.server.http_other import Other
from llmc.server.metrics import Metrics
from llmc.server.model_host import ModelHost, ServeOptions
from llmc.server.spans import Spans


class Server:
    """An ASGI application (`app`) for one model. failed: called, in another thread, if the model
    cannot be loaded; `host.error` says why."""

    def __init__(self, options: ServeOptions, failed: Callable[[], None] = lambda: None):
        self.host = ModelHost(options)
        self.metrics = Metrics(self.host)
        self.history = History(self.host, self.metrics)
        self.spans = Spans(options.name) if options.otel else None
        self._failed = failed
        inner = Starlette(routes=self._routes(), lifespan=self._life,
                          exception_handlers={HTTPException: _http_error})
        inner.router.redirect_slashes = False
        self.app = Gate(inner, api_key=options.api_key, observe=self._observe)

    def _observe(self, answer: Answer) -> None:
        self.metrics.http(answer)
        if self.spans is not None and answer.route not in QUIET:
            self.spans.record(answer)

    def _routes(self) -> list[Route]:
        generate = Generate(self.host, self.metrics)
        other = Other(self.host, self.metrics, self.history)
        posts = {"/v1/chat/completions": generate.chat, "/v1/completions": generate.completions,
                 "/v1/embeddings": other.embeddings, "/tokenize": other.tokenize,
                 "/detokenize": other.detokenize}
        gets = {"/v1/models": other.models, "/v1/models/{model:path}": other.model,
                "/livez": other.live, "/readyz": other.ready, "/startupz": other.startup,
                "/metrics": other.metrics, "/dashboard": other.dashboard,
                "/dashboard/data": other.dashboard_data}
        return [Route(path, _route(path, endpoint), methods=[method])
                for method, table in (("POST", posts), ("GET", gets))
                for path, endpoint in table.items()]

    @asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        self.host.start(self._failed)
        sampler = asyncio.create_task(self.history.follow())
        yield
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler
        await asyncio.to_thread(self.host.close)
        if self.host.template is not None:
            await self.host.template.close()
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)


def _route(path: str, endpoint):
    """The endpoint, known to the log by its path; its exceptions are answers too."""
    async def respond(request: HttpRequest):
        answer = request.state.answer
        answer.route = path
        try:
            return await endpoint(request)
        except ConnectionError:  # nobody reads this
            return Response(status_code=499)
        except Exception as error:
            told = answer.explain(error)
            response = (EarlyAnswer(told) if isinstance(told, TooLarge)
                        else json_answer(told.body(), told.status))
            response.headers.update(told.headers)
            return response
    return respond


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the shape of the other errors."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    answer = json_answer(told.body(), error.status_code)
    answer.headers.update(error.headers or {})
    return answer
