"""What the server answers when all is well, and when it is not: plain HTTP, one fault at a time."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from llmc.errors import LlmcError
from llmc.server.http_middleware import OPEN_PATHS
from llmc.server.model_host import ModelHost, ServeOptions
from tests.server.serving import TEMPLATE, Serving, raw_request, serving

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def error_of(answer) -> dict:
    """The error of an answer, whose shape is OpenAI's."""
    error = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ---- health, metrics, dashboard -----------------------------------------------------------------


def test_health_tells_the_phase_before_the_model_is_ready(embedded_artifact, monkeypatch):
    go = threading.Event()
    opened = ModelHost._open

    def slow(host: ModelHost) -> None:
        host._progress("weights", 0.25)
        assert go.wait(30)
        opened(host)

    monkeypatch.setattr(ModelHost, "_open", slow)
    waited = []

    def look(running: Serving) -> None:
        while running.host.phase != "weights":
            time.sleep(0.01)
        for path, status in (("/livez", 200), ("/readyz", 503), ("/startupz", 503)):
            got, _, body = running.ask("GET", path)
            assert got == status and body["phase"] == "weights" and body["share"] == 0.25
            assert body["elapsed_seconds"] >= 0
        assert error_of(running.post("/v1/completions", prompt="x"))["code"] == "weights"
        assert running.ask("GET", "/metrics")[0] == running.ask("GET", "/dashboard")[0] == 200
        assert running.ask("GET", "/dashboard/data")[2]["status"]["phase"] == "weights"
        waited.append(True)

    monkeypatch.setattr("tests.server.serving.wait_ready",
                        lambda running: (look(running), go.set(), _until_ready(running)))
    with serving(embedded_artifact) as running:
        assert waited
        for path in ("/livez", "/readyz", "/startupz"):
            assert running.ask("GET", path)[0] == 200


def _until_ready(running: Serving) -> None:
    while running.host.phase != "ready":
        assert running.host.phase != "failed", running.host.error
        time.sleep(0.01)


def test_metrics_count_what_was_served(demo):
    before = {name: demo.metric(f"llmc:{name}") for name in (
        "generation_tokens_total", "request_success_total", "e2e_request_latency_seconds_count",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count")}
    assert demo.post("/v1/completions", prompt="Once", max_tokens=9)[0] == 200
    grown = {name: demo.metric(f"llmc:{name}") - value for name, value in before.items()}
    made = grown["generation_tokens_total"]
    assert 0 < made <= 9
    assert grown["inter_token_latency_seconds_count"] <= made - 1
    assert (grown["request_success_total"] == grown["e2e_request_latency_seconds_count"]
            == grown["time_to_first_token_seconds_count"] == 1)
    assert demo.metric("llmc:variant_calls_total") > 0
    assert demo.metric("llmc:gpu_cache_usage_perc") == demo.metric("llmc:num_requests_running") == 0


def test_the_dashboard_is_one_page_that_needs_nothing_else(demo):
    status, headers, page = demo.ask("GET", "/dashboard")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    text = page.decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "innerHTML" not in text
    data = demo.ask("GET", "/dashboard/data")[2]
    assert {"status", "history", "latencies", "table", "shapes", "steps", "events"} <= set(data)
    assert [row["tier"] for row in data["table"]][-1] == "generic"
    assert error_of(demo.ask("GET", "/dashboard/data?after=-1"))["param"] == "after"


# ---- tokens -------------------------------------------------------------------------------------


def test_tokenize_and_back(demo):
    status, _, body = demo.post("/tokenize", prompt="Once upon a time", return_token_strs=True)
    assert status == 200 and body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert "".join(body["token_strs"][1:]).strip() == "Once upon a time"
    back = demo.post("/detokenize", tokens=body["tokens"][1:])[2]["prompt"]
    assert back.strip() == "Once upon a time"
    chat = demo.post("/tokenize", messages=[{"role": "user", "content": "Hi"}])[2]
    assert demo.post("/detokenize", tokens=chat["tokens"])[2]["prompt"].strip() == (
        "Hi Once upon a time")
    assert demo.post("/tokenize", prompt="")[2]["tokens"] == []
    assert error_of(demo.post("/tokenize"))["param"] == "prompt"
    assert error_of(demo.post("/detokenize", tokens=[10**6]))["param"] == "tokens"


# ---- who may ask --------------------------------------------------------------------------------


def test_a_key_is_asked_for_everywhere_but_at_the_door(embedded_artifact):
    with serving(embedded_artifact, api_key="s3cret") as running:
        for path in ("/v1/models", "/metrics", "/dashboard/data", "/v1/completions", "/nowhere"):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s3cre"},
                          {"authorization": "s3cret"}, {"authorization": "Basic s3cret"},
                          {"authorization": "Bearer " + "x" * 5000}):
                status, headers, body = running.ask("GET", path, headers=given)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert body["error"]["code"] == "invalid_api_key"
        for path in OPEN_PATHS:
            assert running.ask("GET", path)[0] == 200
        assert running.ask("GET", "/v1/models", headers={
            "authorization": "Bearer s3cret"})[0] == 200


def test_keys_are_compared_in_constant_time():
    source = (Path(__file__).parents[2] / "llmc" / "server" / "http_middleware.py").read_text()
    assert "hmac.compare_digest(_digest(" in source


def test_it_listens_on_this_machine_only(demo):
    others = {"127.0.0.2", socket.gethostbyname(socket.gethostname())} - {"127.0.0.1"}
    for address in others:  # a server that listens on 0.0.0.0 answers at all of them
        with pytest.raises(OSError):
            socket.create_connection((address, demo.port), timeout=2)


def test_request_ids_come_back_if_they_are_harmless(demo):
    given = {"x-request-id": "my-id_1.2"}
    assert demo.ask("GET", "/readyz", headers=given)[1]["x-request-id"] == "my-id_1.2"
    for bad in ("a b", "x" * 200, "<script>"):
        got = demo.ask("GET", "/readyz", headers={"x-request-id": bad})[1]["x-request-id"]
        assert got.startswith("req-")


# ---- requests that cannot be served --------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/v1/nowhere", 404), ("POST", "/v1/models", 405),
    ("GET", "/v1/completions", 405), ("DELETE", "/tokenize", 405), ("GET", "/../etc/passwd", 404)])
def test_unknown_paths_and_methods(demo, method, path, status):
    answer = demo.ask(method, path)
    assert answer[0] == status and path in error_of(answer)["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "\\ud800"}', b"[" * 100000,
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 50000 + b"1" + b"}" * 50000 + b"}",
    b'{"prompt": [[]]}', b'{"prompt": []}', b'{"prompt": [-1]}', b'{"prompt": [1.5]}',
    b'{"prompt": "a", "max_tokens": 99999999999999999999999}', b'{"prompt": {"a": 1}}'])
def test_bad_bodies_are_bad_requests(demo, body):
    answer = demo.ask("POST", "/v1/completions", body)
    assert answer[0] == 400, answer
    error_of(answer)


@pytest.mark.parametrize(("path", "body", "param", "code", "words"), [
    ("/v1/completions", b'{"max_tokens": 1}', "prompt", "missing_required_parameter", "required"),
    ("/v1/completions", b'{"prompt": "a", "n": "x"}', "n", "invalid_type", "got `str`"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias", "invalid_type",
     "got `str`"),
    ("/v1/completions", b'{"prompt": "a", "temperature": -1}', "temperature", None, "0 or more"),
    ("/v1/completions", b'{"prompt": "a", "top_p": 1.5}', "top_p", None, "in (0, 1]"),
    ("/v1/completions", b'{"prompt": [9999]}', "prompt", None, "vocabulary of 512"),
    ("/v1/completions", b'{"prompt": "a", "regex": "' + b"a" * 9999 + b'("}', "regex",
     "invalid_grammar", "invalid regex"),
    ("/v1/completions", b'{"prompt": "a", "regex": "[^\\\\s\\\\S]"}', None, "invalid_grammar",
     "no token of this model may come next"),
    ("/v1/completions", b'{"prompt": "a", "stop_token_ids": [5, 99999]}', "stop_token_ids", None,
     "99999"),
    ("/v1/completions", b'{"prompt": "a", "min_tokens": 6, "max_tokens": 5}', "min_tokens", None,
     "more than max_tokens"),
    ("/v1/completions", b'{"prompt": "a", "min_tokens": 17}', "min_tokens", None, "which is 16"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "min_tokens": 6, '
     b'"max_completion_tokens": 5}', "min_tokens", None, "more than max_tokens"),
    ("/v1/completions", b'{"prompt": "a", "b\\nc": 1}', "b\nc", "unknown_parameter",
     "Unrecognized"),
    ("/v1/completions", b'{"prompt": "a", "model": "' + b"x" * 9999 + b'"}', "model",
     "model_not_found", "xxx..."),
    ("/v1/completions", b'{"prompt": "\xff"}', None, "invalid_json", "not UTF-8"),
    ("/v1/completions", b'{"metadata":' + b'{"a":' * 50000, None, "invalid_json", "too deeply"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], '
     b'"chat_template_kwargs": {"messages": 3}}', "chat_template_kwargs", None, "messages"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], '
     b'"chat_template_kwargs": {"self": 3}}', "messages", "chat_template_error", "template"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "'
     + b"a b " * 900 + b'"}]}', "messages", "context_length_exceeded", "context"),
])
def test_errors_name_the_field_and_nothing_of_the_server(demo, path, body, param, code, words):
    answer = demo.ask("POST", path, body)
    error = error_of(answer)
    assert (answer[0] // 100, error["param"], error["code"]) == (4, param, code), error
    assert words in error["message"] and len(error["message"]) < 600
    for secret in ("Error", "codec", "()", "<state>", str(demo.host.runtime.artifact.directory)):
        assert secret not in error["message"]


def test_only_json_is_read(demo):
    answer = demo.ask("POST", "/v1/completions", b"prompt=x", {"content-type": "text/plain"})
    assert answer[0] == 415 and "application/json" in error_of(answer)["message"]


def test_bodies_and_headers_are_bounded(embedded_artifact):
    with serving(embedded_artifact, max_body=2000, body_seconds=0.5) as running:
        answer = running.post("/v1/completions", prompt="a" * 3000)
        assert answer[0] == 413 and error_of(answer)["code"] == "request_too_large"
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request("POST", "/v1/completions", iter([b"a" * 900] * 4),
                           {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413  # its length was not told
        assert _long_headers(running) in (b"", b"HTTP/1.1 400")
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as slow:
            slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                         b"\r\nContent-Length: 1000\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert running.ask("GET", "/readyz")[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_all_before_it_reads_sees_that_it_was_too_much(demo, chunked):
    body = b"a" * (24 << 20)  # more than sockets buffer
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=30)
        connection.request("POST", "/v1/completions", iter([body]) if chunked else body,
                           {"content-type": "application/json"}, encode_chunked=chunked)
        answer = connection.getresponse()
        assert answer.status == 413 and b"request_too_large" in answer.read()
        connection.close()


def test_a_body_without_end_is_not_read_for_ever(demo, monkeypatch):
    """The answer comes at once; the connection is cut when enough has been discarded."""
    monkeypatch.setattr("llmc.server.http_body.DISCARD_BYTES", 1 << 20)
    with socket.create_connection(("127.0.0.1", demo.port), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: "
                           b"application/json\r\nContent-Length: 99999999999\r\n\r\n{")
        assert connection.recv(12) == b"HTTP/1.1 413"
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"a" * (1 << 20))


def _long_headers(running: Serving) -> bytes:
    """The first bytes of the answer to 2 MiB of headers; none if the connection was cut."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        try:
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (2 << 20))
            return connection.recv(12)
        except ConnectionError:
            return b""


def test_a_prompt_beyond_the_context_is_refused(demo):
    answer = demo.post("/v1/completions", prompt=[5] * 5000)
    assert answer[0] == 400 and "context" in error_of(answer)["message"]


# ---- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [
    "{{ ().__class__.__base__.__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}", "{{ tojson.__globals__['json'] }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{% set x = namespace(a='a') %}{% for i in range(60) %}"
    "{% set x.a = x.a + x.a %}{% endfor %}", "{% if %}", "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}", "{{ 9**9**9**9 }}"])
def test_a_hostile_template_is_a_bad_request(demo, tmp_path, source, monkeypatch):
    from llmc.server.templates import ChatTemplate

    file = tmp_path / "hostile.jinja"
    file.write_text(source)
    hostile = ChatTemplate(demo.host.runtime.artifact.files, file, seconds=1.0)
    monkeypatch.setattr("llmc.server.templates.START_SECONDS", 3.0)
    monkeypatch.setattr(demo.host, "template", hostile)
    began = time.monotonic()
    answer = demo.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
    assert answer[0] == 400 and error_of(answer), answer  # refused, or rendered to nothing
    assert "uid=" not in json.dumps(answer[2]) and time.monotonic() - began < 10
    told = error_of(answer)["message"]
    assert told.startswith(("The chat template ", "The prompt ")) and "/" not in told
    assert told.endswith("refuses these messages: no") or "raise_exception('no')" not in source
    assert demo.ask("GET", "/readyz")[0] == 200
    if hostile._process is not None:
        hostile._process.kill()


def test_text_of_messages_is_never_a_template(demo):
    injected = "{{ 7 * 7 }}"
    tokens = demo.post("/tokenize", messages=[{"role": "user", "content": injected}])[2]["tokens"]
    assert injected in demo.post("/detokenize", tokens=tokens)[2]["prompt"]
    assert "message.content" in TEMPLATE
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    answer = demo.post("/v1/chat/completions", messages=[{"role": "user", "content": image}])
    assert answer[0] == 400 and "image_url" in error_of(answer)["message"]


# ---- faults while serving ------------------------------------------------------------------------


def test_a_client_that_goes_frees_its_pages_at_once(demo):
    demo.wait_idle()
    cancelled = demo.metric("llmc:http_requests_total")
    for stream in (True, False):
        connection = raw_request(demo.port, "/v1/completions", {**LONG, "n": 8, "stream": stream})
        while not demo.host.engine.stats().pages_used:
            time.sleep(0.001)
        if stream:
            assert connection.recv(1000)
        connection.close()
        demo.wait_idle(5)
    assert demo.host.engine.stats().requests["cancelled"] >= 8
    assert demo.metric("llmc:http_requests_total") > cancelled


def test_a_slow_reader_holds_up_nobody_and_is_given_up(embedded_artifact):
    with serving(embedded_artifact, write_seconds=1.0, max_batch=16) as running:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", running.port))
        body = json.dumps({**LONG, "n": 16, "stream": True, "logprobs": 20}).encode()
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                     b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        began = time.monotonic()
        assert running.post("/v1/completions", prompt="Once", max_tokens=5)[0] == 200
        assert time.monotonic() - began < 10
        running.wait_idle(20)  # the engine went on at its own pace, and forgot it
        slow.close()


def test_an_engine_exception_is_a_500_with_an_id_and_the_rest_goes_on(demo, monkeypatch):
    runtime, broken = demo.host.runtime, 0
    step = runtime.step

    def failing(batch, *output):
        nonlocal broken
        if any(int(chunk.tokens[-1]) == 66 and len(chunk.tokens) == 3 for chunk in batch):
            broken += 1
            raise RuntimeError("a secret of the engine")
        return step(batch, *output)

    answers = []
    other = threading.Thread(target=lambda: answers.append(demo.post(
        "/v1/completions", **{**LONG, "max_tokens": 200})))
    other.start()
    monkeypatch.setattr(runtime, "step", failing)
    for stream in (False, True):
        answer = demo.ask("POST", "/v1/completions", {"prompt": [5, 6, 66], "stream": stream},
                          {"x-request-id": "mine"})
        assert answer[0] == 500 and "mine" in error_of(answer)["message"]
        assert "secret" not in json.dumps(answer[2])
    other.join(60)
    assert broken >= 2 and answers[0][0] == 200
    assert answers[0][2]["usage"]["completion_tokens"] == 200
    monkeypatch.undo()
    assert demo.post("/v1/completions", prompt=[5, 6, 66], max_tokens=2)[0] == 200
    demo.wait_idle()


def test_beyond_the_queue_is_429_and_short_pages_only_make_it_slower(embedded_artifact):
    with serving(embedded_artifact, max_batch=4, queue_limit=4, runtime={"kv_memory": 1}) as small:
        assert small.host.engine.stats().pages == 1  # 32 tokens: one short request at a time
        assert small.ask("GET", "/v1/models")[2]["data"][0]["max_model_len"] == 32
        assert small.post("/tokenize", prompt="a")[2]["max_model_len"] == 32
        answers = []
        body = {"prompt": "Once", "max_tokens": 20, "ignore_eos": True}
        threads = [threading.Thread(target=lambda: answers.append(
            small.post("/v1/completions", **body))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        statuses = [answer[0] for answer in answers]
        assert set(statuses) <= {200, 429} and 200 in statuses
        for answer in answers:
            if answer[0] == 429:
                assert int(answer[1]["retry-after"]) >= 1
                assert error_of(answer)["type"] == "rate_limit_error"
        for many, param in (({"prompt": "a", "n": 5}, "n"), ({"prompt": ["a"] * 5}, "prompt"),
                            ({"prompt": ["a", "b"], "n": 3}, "prompt")):
            refused = small.post("/v1/completions", max_tokens=2, **many)  # at any time
            assert refused[0] == 400 and "retry-after" not in refused[1]
            error = error_of(refused)
            assert error["param"] == param and "queue holds 4" in error["message"]
        fits = small.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=2)
        assert fits[0] == 200 and len(fits[2]["choices"]) == 4
        too_long = small.post("/v1/completions", prompt=[5] * 40)
        assert too_long[0] == 400 and "context" in error_of(too_long)["message"]
        small.wait_idle()


@pytest.mark.parametrize(("runtime", "said"), [
    ({}, []), ({"kv_memory": 1}, ["the KV cache holds 32 tokens, of the 512 "])])
def test_a_cache_that_holds_less_than_the_context_is_warned_of(embedded_artifact, monkeypatch,
                                                               runtime, said):
    logged = []
    monkeypatch.setattr("llmc.server.model_host.log", lambda event, *_, **fields: logged.append(
        (event, fields)))
    with serving(embedded_artifact, runtime=runtime):
        texts = [fields["message"] for event, fields in logged if event == "little_memory"]
        assert [text[:len(start)] for text, start in zip(texts, said, strict=True)] == said


def test_a_context_beyond_the_models_limit_is_refused(embedded_artifact):
    host = ModelHost(ServeOptions(str(embedded_artifact), "demo", runtime={"max_context": 513}))
    with pytest.raises(LlmcError, match="max_context is 513, this model's limit is 512"):
        host._open()
    host.close()


def test_unknown_fields_of_a_message_are_ignored_and_those_of_the_body_refused(demo):
    messages = [{"role": "user", "content": "a", "annotations": []}]
    assert demo.post("/v1/chat/completions", messages=messages, max_tokens=1)[0] == 200
    refused = demo.post("/v1/chat/completions", messages=messages, max_tokens=1, annotations=[])
    assert refused[0] == 400 and error_of(refused)["param"] == "annotations"


def test_unicode_across_tokens_is_whole_in_every_chunk(demo):
    text = "h\u00e9llo \u4f60\u597d \U0001f600!"
    tokens = demo.post("/tokenize", prompt=text, add_special_tokens=False)[2]["tokens"]
    assert len(tokens) > len(text)  # characters are made of byte tokens
    grammar = f'start: "{text}"'
    body = {"prompt": "x", "grammar": grammar, "stream": True, "max_tokens": 100}
    status, _, raw = demo.ask("POST", "/v1/completions", body)
    chunks = [json.loads(line[6:])["choices"][0]["text"] for line in raw.decode().splitlines()
              if line.startswith("data: {")]
    assert status == 200 and "".join(chunks) == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_spans_tell_of_requests(embedded_artifact):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from llmc.server.spans import Spans

    exporter = InMemorySpanExporter()
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving(embedded_artifact) as running:
        running.server.spans = Spans("demo", exporter)
        running.ask("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 3},
                    {"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        running.ask("GET", "/readyz")
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/completions" and f"{span.context.trace_id:032x}" == trace
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert span.attributes["http.response.status_code"] == 200 and span.end_time > span.start_time
