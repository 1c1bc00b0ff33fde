"""Requests that no client should send: each gets an answer soon, and none a 5xx."""

from __future__ import annotations

import http.client
import json
import re
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.serving import Serving, serving

LEAKS = re.compile(r"Traceback|site-packages|[a-z]Error\b|NoneType|<class|object at 0x|codec can't|"
                   r"keyword argument|positional argument")
SECONDS = 20  # an answer that takes longer hangs
BASES = {
    "/v1/completions": {
        "model": "demo", "prompt": "Once", "max_tokens": 2, "temperature": 0.5, "n": 1, "seed": 1,
        "stream": False, "stop": ["x"], "logprobs": 1, "logit_bias": {"5": 1.0}, "echo": False,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "stream_options": {"include_usage": True}, "ignore_eos": True,
        "stop_token_ids": [7], "min_tokens": 1, "response_format": {"type": "text"},
        "regex": "a", "grammar": "start: \"a\"", "best_of": 1, "suffix": None},
    "/v1/chat/completions": {
        "model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2,
        "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "tools": None,
        "chat_template_kwargs": {"a": 1}, "stream": True, "add_generation_prompt": True,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
    "/v1/embeddings": {"model": "demo", "input": "x", "encoding_format": "float"},
    "/tokenize": {"prompt": "Once", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6, 7]},
}
scalars = (st.none() | st.booleans() | st.integers(-3, 600) | st.integers() | st.floats()
           | st.text(max_size=20) | st.sampled_from(["\ud800", "\x00", "{{", "\u2028", "(" * 40]))
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)


@st.composite
def requests(draw) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers; most of the body is right, so that the rest is looked at."""
    path = draw(st.sampled_from(list(BASES)))
    fields = draw(st.sets(st.sampled_from(sorted(BASES[path])), min_size=1, max_size=5))
    body = {name: value for name, value in BASES[path].items()
            if name in fields or name in ("prompt", "messages", "input", "tokens", "max_tokens")}
    for name in draw(st.sets(st.sampled_from(sorted(BASES[path])), max_size=3)):
        body[name] = draw(junk)
    if "chat_template_kwargs" in body and draw(st.booleans()):
        name = draw(st.sampled_from(["messages", "add_generation_prompt", "self", "bos_token"]))
        body["chat_template_kwargs"] = {name: draw(junk)}
    if draw(st.integers(0, 5)) == 0:
        body[draw(st.text(max_size=10))] = draw(junk)
    if draw(st.integers(0, 8)) == 0:
        body.pop(draw(st.sampled_from(sorted(body))))
    data = json.dumps(draw(junk) if draw(st.integers(0, 12)) == 0 else body).encode()
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=6)) + data[place + draw(st.integers(0, 3)):]
    method = draw(st.sampled_from(["POST"] * 9 + ["PUT"]))
    headers = {"content-type": draw(st.sampled_from(["application/json"] * 9 + ["text/plain"]))}
    return method, path, data, headers


def check(demo: Serving, asked: tuple[str, str, bytes, dict[str, str]]) -> None:
    method, path, data, headers = asked
    connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=SECONDS)
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status < 500, (answer.status, body)
    if answer.status != 200:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        leak = LEAKS.search(error["message"])
        assert leak is None or leak.group().encode() in data, error
        assert len(error["message"]) < 1000, error
        assert str(demo.host.runtime.artifact.directory) not in error["message"], error
    else:
        assert b'"server_error"' not in body, body  # in a stream, whose status came before


def run(demo: Serving, examples: int) -> None:
    quiet = settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(HealthCheck))
    quiet(given(requests())(lambda asked: check(demo, asked)))()
    if demo.host.engine is not None:
        demo.wait_idle()


def test_malformed_requests(demo):
    run(demo, 250)


def test_malformed_requests_to_an_encoder(encoder):
    with serving(encoder) as running:
        run(running, 150)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(demo):
    run(demo, 10_000)


@pytest.mark.parametrize("raw", [
    b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /tokenize HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999999999999\r\n"
    b"Content-Type: application/json\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\nzz\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n"
    b"\r\n0\r\n\r\n", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_what_is_no_http(demo, raw):
    with socket.create_connection(("127.0.0.1", demo.port), timeout=SECONDS) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer[:9] in (b"", b"HTTP/1.1 ") and answer[9:10] in (b"", b"4")
    assert demo.ask("GET", "/readyz")[0] == 200
