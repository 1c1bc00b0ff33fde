"""`llmc serve` as a process: how it starts, what it logs, and how it ends."""

from __future__ import annotations

import importlib
import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from llmc import cli
from llmc.server import load
from tests.server.serving import Child, child


def stream(running: Child, tokens: int, n: int, lines: list[str]) -> None:
    """Read a streamed completion to its end."""
    body = json.dumps({"prompt": "Once", "max_tokens": tokens, "n": n, "stream": True,
                       "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", body,
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.strip():
                lines.append(line.decode().strip())


@pytest.fixture(scope="module")
def model(embedded_artifact):
    return embedded_artifact


def test_sigterm_under_load_finishes_what_runs_and_logs_it(model):
    with child(model, "--specialize", "none", "--max-batch", "8") as running:
        running.wait_for("ready")
        answers: list[list[str]] = [[] for _ in range(4)]
        threads = [threading.Thread(target=stream, args=(running, 450, 4, lines))
                   for lines in answers]
        for thread in threads:
            thread.start()
        while not all(answers):
            time.sleep(0.005)
        assert not all(lines[-1] == "data: [DONE]" for lines in answers)
        running.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert running.end() == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", running.port), timeout=5)
    for lines in answers:
        assert lines[-1] == "data: [DONE]" and not any('"error"' in line for line in lines)
        assert sum('"finish_reason":"length"' in line for line in lines) == 4
    requests = [entry for entry in running.log if entry["event"] == "request"]
    assert len(requests) == 4 and running.log[-1]["event"] == "stopped"
    for entry in requests:
        assert entry["status"] == 200 and entry["completion_tokens"] == 1800
        assert entry["finish"] == ["length"] * 4 and entry["id"].startswith("req-")
        assert 0 < entry["first_token_seconds"] < entry["seconds"]


def test_a_second_signal_ends_it_at_once(model):
    with child(model, "--specialize", "none", "--max-batch", "16") as running:
        running.wait_for("ready")
        lines: list[str] = []

        def read() -> None:
            try:
                stream(running, 400, 100, lines)
            except (OSError, ValueError, urllib.error.URLError):
                lines.append("cut")

        thread = threading.Thread(target=read)
        thread.start()
        while not lines:
            time.sleep(0.005)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.process.poll() is None
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.end(15) == 0 and time.monotonic() - began < 10
        thread.join(30)


def test_a_model_that_cannot_be_loaded_is_told_and_ends_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with child(tmp_path) as running:
        assert running.end(60) == 1


def test_flags_have_variables_and_limits(monkeypatch, capsys):
    parser = cli.make_parser()
    monkeypatch.setenv("LLMC_PORT", "8123")
    monkeypatch.setenv("LLMC_KV_MEMORY", "2G")
    monkeypatch.setenv("LLMC_API_KEY", "key")
    arguments = cli.make_parser().parse_args(["serve", "model"])
    assert (arguments.port, arguments.kv_memory, arguments.api_key) == (8123, 2 << 30, "key")
    assert arguments.host == "127.0.0.1"
    for wrong in (["--port", "99999"], ["--max-batch", "0"], ["--max-body", "x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["serve", "model", *wrong])
    assert "LLMC_DRAIN_SECONDS" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--help"])
    told = capsys.readouterr().out
    assert "LLMC_DRAIN_SECONDS" in told
    assert told.count("\n  --") == len(re.findall(r"\[\s*LLMC_\w+\s*\]", told))


def test_options_of_other_commands_have_variables_here(monkeypatch, capsys):
    monkeypatch.setenv("LLMC_QUANTIZE", "int8")
    monkeypatch.setenv("LLMC_GROUP", "64")
    monkeypatch.setenv("LLMC_ASYMMETRIC", "1")
    arguments = cli.make_parser().parse_args(["serve", "model"])
    assert (arguments.quantize, arguments.group, arguments.asymmetric) == ("int8", 64, True)
    for wrong in ("65", "x"):
        monkeypatch.setenv("LLMC_GROUP", wrong)
        cli.make_parser().parse_args(["devices"])
        with pytest.raises(SystemExit):
            cli.make_parser().parse_args(["serve", "model"])
        assert "argument --group: " in capsys.readouterr().err


def test_a_missing_extra_says_how_to_get_it(monkeypatch, capsys):
    real = importlib.import_module

    def missing(name: str, *rest):
        if name == "starlette":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert cli.main(["serve", "model"]) == 1
    assert "pip install '.[server]'" in capsys.readouterr().err


def test_an_address_that_is_taken_is_an_error(model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(model), "--port", port]) == 1
    assert "cannot listen on 127.0.0.1:" + port in capsys.readouterr().err


# ---- the load generator -------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--clients", "3"], ["--rate", "30"]])
def test_bench_serve_counts_what_it_got(demo, capsys, more):
    before = demo.metric("llmc:generation_tokens_total")
    assert cli.main(["bench-serve", demo.url, "--requests", "12", "--seconds", "5", "--json",
                     "--prompt-tokens", "8", "--output-tokens", "12", *more]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["completed"] == figures["requests"] >= 12 and not figures["errors"]
    assert demo.metric("llmc:generation_tokens_total") - before == figures["output_tokens"]
    assert 0 < figures["first_token"]["p50"] <= figures["total"]["p99"]


def test_bench_serve_of_nothing(capsys):
    assert cli.main(["bench-serve", "http://127.0.0.1:9"]) == 1
    assert "no server with OpenAI's API" in capsys.readouterr().err
    assert cli.main(["bench-serve", "http://127.0.0.1:9", "--clients", "0"]) == 1


def test_lengths_have_a_long_tail_and_come_again():
    lengths = [next(pair) for pair in [load.Load(seed=5).lengths()] for _ in range(2000)]
    again = load.Load(seed=5).lengths()
    assert [next(again) for _ in range(2000)] == lengths
    prompts = sorted(prompt for prompt, _ in lengths)
    assert 55 < prompts[1000] < 75 and prompts[1980] > 300 and prompts[-1] <= 2048
