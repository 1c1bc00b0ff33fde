"""A server in this process, on a free port; and one as a process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llmc
from llmc.cli.serve import listen
from llmc.server.model_host import ServeOptions
from llmc.server.process import Process

TEMPLATE = ("{% for message in messages %}{{ message.content }} {% endfor %}"
            "{% if add_generation_prompt %}Once upon a time{% endif %}")


class Serving:
    """A server's address, and what is inside (`host`)."""

    def __init__(self, process: Process, port: int):
        self.server, self.host = process.server, process.server.host
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
            ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the body: JSON if it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | (headers or {})
        connection.request(method, path, raw, sent)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        told = {name.lower(): value for name, value in answer.getheaders()}
        is_json = told.get("content-type") == "application/json"
        return answer.status, told, json.loads(data) if is_json else data

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, str], Any]:
        return self.ask("POST", path, body)

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines
                   if line.startswith((f"{name} ", f"{name}{{")))

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until nothing runs or waits, and no page is held; fails if that does not come."""
        engine, deadline = self.host.engine, time.monotonic() + seconds
        while (stats := engine.stats()).running or stats.waiting or stats.pages_used:
            assert time.monotonic() < deadline, stats
            time.sleep(0.01)
        engine.check()


@contextmanager
def serving(model: Path, **options: Any) -> Iterator[Serving]:
    """A server in a thread. options: those of ServeOptions; runtime's in `runtime`."""
    runtime = {"threads": 2, "specialize": "none", **options.pop("runtime", {})}
    process = Process(ServeOptions(str(model), options.pop("name", "demo"), runtime=runtime,
                                   **options),
                      connections=256, header_bytes=1 << 16, drain_seconds=20)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=process.run, args=(listener,))
    thread.start()
    try:
        running = Serving(process, listener.getsockname()[1])
        wait_ready(running)
        yield running
    finally:
        process._uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_ready(running: Serving, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while running.host.phase != "ready":
        assert running.host.phase != "failed", running.host.error
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Child:
    """`llmc serve` as a process: its address, and its log."""

    def __init__(self, model: Path, *options: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmc", "serve", str(model), "--port", "0", "--threads", "2",
             *options], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(llmc.__file__).parent.parent)})
        self.log: list[dict[str, Any]] = []
        self.port = int(self.wait_for("listening")["url"].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log entry of that name."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == event:
                return self.log[-1]
        raise AssertionError(f"no {event} in {self.log}")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self, seconds: float = 30.0) -> int:
        rest = self.process.communicate(timeout=seconds)[1]
        self.log += [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        return self.process.returncode


@contextmanager
def child(model: Path, *options: str) -> Iterator[Child]:
    running = Child(model, *options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def raw_request(port: int, path: str, body: Any) -> socket.socket:
    """Send a request, and read nothing."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection
