"""What the real OpenAI client gets, against the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openai
import pytest

import llmc
from tests.server.serving import Serving, serving

PROMPT = "Once upon a time"
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["Lily", "Tom"]},
                                           "old": {"type": "boolean"}},
          "required": ["name", "old"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(demo: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(embedded_artifact: Path) -> str:
    """What the model says greedily, by the Runtime itself: 40 tokens."""
    with llmc.Runtime(embedded_artifact, threads=2, specialize="none") as runtime:
        ids = runtime.encode(PROMPT)
        made = list(runtime.generate(ids, 40))
        return runtime.decode([*ids, *made])[len(PROMPT):]


def test_completion_is_what_the_runtime_says(client, alone):
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.choices[0].text == alone
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40
    assert answer._request_id.startswith("req-")


def test_streamed_completion_says_the_same_with_usage_last(client, alone):
    chunks = list(client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_by_the_template_streamed_and_not(client, alone):
    # The template leaves a space before the prompt's words; both ways must agree.
    ask = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}], "temperature": 0,
           "max_completion_tokens": 20}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}]
    ask["messages"] = [{"role": "user", "content": parts}]
    assert client.chat.completions.create(**ask).choices[0].message.content == text


def test_chat_log_probabilities(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=6,
        logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 6
    assert b"".join(bytes(each.bytes) for each in tokens).decode().strip() == (
        answer.choices[0].message.content.strip())
    for each in tokens:
        best = each.top_logprobs
        assert len(best) == 3 and best[0].token == each.token  # greedy
        assert best[0].logprob == each.logprob >= best[1].logprob >= best[2].logprob
        assert sum(np.exp(top.logprob) for top in best) <= 1.0001


def test_completion_log_probabilities_fit_the_text(client):
    answer = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=8,
                                       logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == list(np.cumsum([0, *map(len, found.tokens[:-1])]))
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs,
                                 strict=True):
        assert top[token] == value == max(top.values())


def test_n_choices_with_a_seed_are_others_and_come_again(client):
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "n": 2, "temperature": 1.0,
           "seed": 7}
    first = client.completions.create(**ask)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1] and texts[0] != texts[1]
    assert [choice.text for choice in client.completions.create(**ask).choices] == texts
    assert first.usage.completion_tokens == 48
    streamed = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_several_prompts_with_echo(client, alone):
    answer = client.completions.create(model="demo", prompt=[PROMPT, "The cat"], max_tokens=40,
                                       temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + alone
    assert answer.choices[1].text.startswith("The cat") and answer.choices[1].index == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client, alone, stream):
    stop = alone[10:14]
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0,
                                       stop=[stop], stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone[:alone.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logit_bias_and_penalties_reach_the_sampler(client, demo):
    space = demo.post("/tokenize", prompt="cat", add_special_tokens=False)[2]["tokens"][0]
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, temperature=0,
                                       logit_bias={str(space): 100})
    piece = demo.post("/detokenize", tokens=[space] * 5)[2]["prompt"].strip()
    assert answer.choices[0].text.strip() == piece
    freely = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, temperature=0,
                                       logit_bias={str(space): 20}, frequency_penalty=2,
                                       extra_body={"repetition_penalty": 5.0})
    assert freely.choices[0].text != answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_is_kept_to(client, stream):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=120, stream=stream,
        seed=3, response_format={"type": "json_schema", "json_schema": {
            "name": "girl", "schema": SCHEMA, "strict": True}})
    text = ("".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream
            else answer.choices[0].message.content)
    found = json.loads(text)
    assert found["name"] in ("Lily", "Tom") and isinstance(found["old"], bool)


def test_regex_grammar_and_json_object(client):
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 60, "seed": 1}
    answer = client.completions.create(**ask, extra_body={"regex": "(yes|no){3}"})
    assert answer.choices[0].text in {a + b + c for a in ("yes", "no") for b in ("yes", "no")
                                      for c in ("yes", "no")}
    lark = 'start: "one" | "two"'
    assert client.completions.create(**ask, extra_body={"grammar": lark}).choices[0].text in (
        "one", "two")
    answer = client.completions.create(**ask, extra_body={
        "response_format": {"type": "json_object"}}, temperature=0)
    assert answer.choices[0].text.startswith("{")


def test_a_bad_grammar_is_a_bad_request(client):
    for extra in ({"regex": "("}, {"grammar": "start: nothing"}, {"regex": "a", "grammar": "b"},
                  {"response_format": {"type": "json_schema"}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="demo", prompt=PROMPT, extra_body=extra)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt/4")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(("changes", "text"), [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"prompt": [99999]}, "vocabulary"),
    ({"logit_bias": {"99999": 1}}, "vocabulary"), ({"suffix": "x"}, "suffix"),
    ({"stop": ["a"] * 17}, "stop"), ({"prompt": ["a", 1]}, "mixture"),
    ({"best_of": 3}, "best_of"), ({"echo": True, "logprobs": 1}, "echo"),
    ({"extra_body": {"nonsense": 1}}, "nonsense")])
def test_what_does_not_fit_is_a_bad_request_that_names_it(client, changes, text):
    with pytest.raises(openai.BadRequestError, match=text):
        client.completions.create(**{"model": "demo", "prompt": PROMPT, **changes})


def test_embeddings_as_floats_and_as_base64(encoder):
    texts = ["hello world", "the other one", "x"]
    with serving(encoder) as running, llmc.Runtime(encoder, threads=2) as runtime:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)
        expected = runtime.embed(texts)
        for extra in ({}, {"encoding_format": "float"}, {"dimensions": expected.shape[1]}):
            answer = client.embeddings.create(model="demo", input=texts, **extra)
            got = np.array([each.embedding for each in answer.data], np.float32)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
            assert answer.usage.prompt_tokens == sum(
                len(runtime.embedding_ids(text)) for text in texts)
        for wrong in ([10**6], [5] * 9999, [[5], [10**6]]):
            with pytest.raises(openai.BadRequestError) as refused:
                client.embeddings.create(model="demo", input=wrong)
            assert refused.value.param == "input"
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="demo", input="x", dimensions=3)
        with pytest.raises(openai.BadRequestError, match="encoder"):
            client.completions.create(model="demo", prompt="x")


def test_a_language_model_makes_no_embeddings(client):
    with pytest.raises(openai.BadRequestError, match="language model"):
        client.embeddings.create(model="demo", input="x")
