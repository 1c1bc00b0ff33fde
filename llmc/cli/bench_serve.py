"""llmc bench-serve: load a server, this one or another with OpenAI's API, and time its answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

from llmc.cli import add_command
from llmc.errors import LlmcError

START_SECONDS = 1800.0  # a model may have to be compiled first


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "bench-serve", run, "Load a server and time its answers.",
        "llmc bench-serve path/to/Llama-3.2-1B --clients 8 --seconds 60\n"
        "  llmc bench-serve http://127.0.0.1:8080 --rate 4     # any server with OpenAI's API")
    parser.add_argument("target", metavar="URL|MODEL",
                        help="a server's URL, or a model to start one for")
    parser.add_argument("--clients", type=int, default=8,
                        help="clients that each ask again when they have their answer (default 8)")
    parser.add_argument("--rate", type=float, default=None, metavar="N",
                        help="instead: N requests a second, at random times (Poisson)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--requests", type=int, default=None, help="end after as many requests")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N",
                        help="median length of the prompts (default 64)")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N",
                        help="median length of the answers (default 64)")
    parser.add_argument("--spread", type=float, default=0.8,
                        help="sigma of the log-normal lengths; 0: all alike (default 0.8)")
    parser.add_argument("--longest", type=int, default=1024, metavar="N",
                        help="longest prompt and answer (default 1024)")
    parser.add_argument("--vocabulary", type=int, default=256, metavar="N",
                        help="prompts are random token ids below N (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at-eos", action="store_true",
                        help="let answers end early (needed for servers without ignore_eos)")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--serve", default="", metavar="'OPTIONS'",
                        help="options of `llmc serve` for a server that is started")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments) -> int:
    from llmc.server.load import Load, run_load, summarize

    load = Load(
        arguments.clients, arguments.rate, arguments.seconds, arguments.requests,
        arguments.prompt_tokens, arguments.output_tokens, arguments.spread, arguments.longest,
        arguments.vocabulary, arguments.seed, not arguments.stop_at_eos, arguments.api_key)
    _check(arguments)
    with server_of(arguments.target, arguments.serve.split()) as url:
        figures = summarize(*asyncio.run(run_load(url, load)))
    print(json.dumps(figures) if arguments.json else table(figures))
    return 0 if figures["completed"] else 1


def _check(arguments: argparse.Namespace) -> None:
    for name in ("clients", "seconds", "prompt_tokens", "output_tokens", "longest", "rate",
                 "requests"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise LlmcError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
    if arguments.spread < 0 or arguments.vocabulary < 4:
        raise LlmcError("--spread must be 0 or more, --vocabulary at least 4")


def table(figures: dict[str, Any]) -> str:
    """The figures for people; times in milliseconds."""
    lines = [f"{figures['completed']} of {figures['requests']} requests in "
             f"{figures['seconds']:.1f} s: {figures['output_tokens_per_second']:.1f} output "
             f"tokens/s, {figures['requests_per_second']:.2f} requests/s",
             f"{'ms':22} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}"]
    for name, text in (("first_token", "first token"), ("token", "each further token"),
                       ("pause", "pause between chunks"), ("total", "whole answer")):
        if (found := figures[name]) is not None:
            lines.append(f"{text:22}" + "".join(
                f" {found[key] * 1e3:9.1f}" for key in ("mean", "p50", "p90", "p99")))
    if figures["errors"]:
        lines.append("errors: " + ", ".join(f"{count} x {error}"
                                            for error, count in figures["errors"].items()))
    return "\n".join(lines)


@contextmanager
def server_of(target: str, options: list[str]) -> Iterator[str]:
    """The URL of the server to load: a URL as it is, or that of a server started for a model."""
    if target.startswith(("http://", "https://")):
        yield target
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc", "serve", target, "--port", "0", *options],
        stderr=subprocess.PIPE, text=True)
    try:
        url = _url_of(process)
        _wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url_of(process: subprocess.Popen) -> str:
    """Where a server says that it listens. The rest of its log is not read by anyone."""
    assert process.stderr
    told = []
    for line in process.stderr:
        told.append(line)
        if '"event": "listening"' in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return json.loads(line)["url"]
    raise LlmcError(f"the server did not start: {''.join(told).strip()}")


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{url}/readyz", timeout=10):
                return
        except OSError:
            time.sleep(0.1)
    raise LlmcError("the server did not become ready: see `llmc serve` with the same options")
