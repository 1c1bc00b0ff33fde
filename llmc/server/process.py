"""The server as a process: uvicorn on a socket, signals, and the way out."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from llmc.server.app import Server
from llmc.server.logs import log
from llmc.server.model_host import ServeOptions

LOOPBACK = ("127.", "::1")


class Process:
    """Serves until a signal comes. The first SIGTERM or SIGINT: nothing new is taken, what runs
    has `drain_seconds` to finish; the second: stop at once.

    connections: most of them at a time; header_bytes: of a request, at most.
    """

    def __init__(self, options: ServeOptions, *, connections: int, header_bytes: int,
                 drain_seconds: float):
        self.server = Server(options, self._failed)
        # h11 and not httptools: it bounds the size of headers.
        config = uvicorn.Config(
            self.server.app, http="h11", ws="none", lifespan="on", log_config=None,
            access_log=False, server_header=False, limit_concurrency=connections,
            h11_max_incomplete_event_size=header_bytes, timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(drain_seconds)))
        self._uvicorn = _Uvicorn(config, self.server)

    def run(self, listener: socket.socket) -> str:
        """Serve on a listening socket; returns why the model could not be loaded, or nothing."""
        host, number = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log("listening", url=f"http://{shown}:{number}", model=self.server.host.options.name)
        if not host.startswith(LOOPBACK) and not self.server.host.options.api_key:
            log("no --api-key: whoever reaches this address can use the model", logging.WARNING)
        try:
            self._uvicorn.run(sockets=[listener])
        finally:
            self.server.host.close()
        log("stopped")
        return self.server.host.error

    def _failed(self) -> None:
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, whose exit after a signal is a normal one."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._server.host.drain()
