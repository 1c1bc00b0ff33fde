"""From a request's fields to what the engine takes: token ids, Sampling, grammar."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from llmc.runtime.sampling import Sampling
from llmc.server.http_errors import ApiError, field_errors, shown
from llmc.server.model_host import ModelHost
from llmc.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    inputs,
)
from llmc.server.request import Request

RESERVED = {"messages", "add_generation_prompt"}  # no variables of chat_template_kwargs
SHORT = 4096  # characters that are tokenized at once; longer texts in a thread
COMPLETION_TOKENS = 16  # default of /v1/completions; chat ends where the context does


async def completion_requests(host: ModelHost, body: CompletionRequest, request_id: str
                              ) -> tuple[list[Request], list[str]]:
    """A Request for each prompt, and the prompts' texts (those that are to be echoed)."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported", "suffix", "unsupported")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of other than n is not supported", "best_of", "unsupported")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo together with logprobs is not supported", "echo", "unsupported")
    fields = await _request_fields(host, body, body.max_tokens or COMPLETION_TOKENS)
    tokenizer = host.runtime.tokenizer
    requests, texts = [], []
    for number, given in enumerate(inputs(body.prompt, "prompt")):
        ids = checked(host, await encode(host, given) if isinstance(given, str) else given,
                      "prompt")
        if body.echo:
            texts.append(given if isinstance(given, str) else tokenizer.decode(ids))
        requests.append(Request(ids, logprobs=body.logprobs, id=f"{request_id}-{number}", **fields))
    return requests, texts


async def chat_requests(host: ModelHost, body: ChatRequest, request_id: str) -> list[Request]:
    """The Request for a conversation."""
    if body.tools or body.modalities not in (None, ["text"]):
        field = "tools" if body.tools else "modalities"
        raise ApiError(400, f"{field} are not supported: this server makes text", field,
                       "unsupported")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    ids = checked(host, await chat_ids(host, body.messages, body.add_generation_prompt is not False,
                                       body.chat_template_kwargs or {}), "messages")
    fields = await _request_fields(host, body, body.max_completion_tokens or body.max_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [Request(ids, logprobs=logprobs, id=request_id, **fields)]


async def chat_ids(host: ModelHost, messages: Sequence[Message], add_generation_prompt: bool,
                   variables: dict[str, Any]) -> list[int]:
    """Token ids of a conversation, by the model's chat template."""
    for name in RESERVED & variables.keys():
        raise ApiError(400, f"chat_template_kwargs may not contain {name}: the request has a field "
                       "for that", "chat_template_kwargs")
    assert host.template is not None
    text = await host.template.render([_plain(number, message) for number, message in
                                       enumerate(messages)], add_generation_prompt, variables)
    return await encode(host, text, add_special_tokens=False, field="messages")


def _plain(number: int, message: Message) -> dict[str, Any]:
    """A message as templates know it, its content one text."""
    plain = {name: value for name, value in msgspec.to_builtins(message).items()
             if value is not None}
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"Content of type {shown(part.type)!r} is not supported, only "
                               "text.", f"messages[{number}].content", "unsupported")
        plain["content"] = "".join(part.text or "" for part in message.content)
    plain.setdefault("content", "")
    return plain


async def encode(host: ModelHost, text: str, add_special_tokens: bool = True,
                 field: str = "prompt") -> list[int]:
    """Token ids; long texts are tokenized in a thread. field: where the text is from."""
    tokenizer = host.runtime.tokenizer
    with field_errors(field):
        if len(text) <= SHORT:
            ids = tokenizer.encode(text, add_special_tokens)
        else:
            ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    if not ids:
        raise ApiError(400, "The prompt is empty: at least one token is needed.", field)
    return ids


def checked(host: ModelHost, ids: list[int], field: str) -> np.ndarray:
    """Token ids as the engine takes them. ApiError 400 if they are none, or too many."""
    with field_errors(field):
        array = host.runtime.check_ids(ids)
    if len(array) > (capacity := host.require_engine().capacity):
        raise ApiError(400, f"The prompt has {len(array)} tokens, the context holds {capacity}.",
                       field, "context_length_exceeded")
    return array


async def _request_fields(host: ModelHost, body: Generation, max_tokens: int | None
                          ) -> dict[str, Any]:
    """What Request takes, apart from the prompt. ShapeError for values out of range."""
    grammar = _grammar(body)
    _check_stops(body, host.runtime.config["vocab_size"], max_tokens)
    assert host.grammars is not None
    return {
        "max_tokens": max_tokens, "sampling": _sampling(body, host.runtime.config["vocab_size"]),
        "stop": body.stops, "n": body.n or 1, "min_tokens": body.min_tokens or 0,
        "ignore_eos": bool(body.ignore_eos), "stop_ids": frozenset(body.stop_token_ids or ()),
        "grammar": await asyncio.to_thread(host.grammars.compile, *grammar) if grammar else None}


def _check_stops(body: Generation, vocabulary: int, max_tokens: int | None) -> None:
    """ApiError 400 for what could have no effect."""
    for token in body.stop_token_ids or ():
        if token >= vocabulary:
            raise ApiError(400, f"Token id {token} of stop_token_ids is outside the vocabulary of "
                           f"{vocabulary}.", "stop_token_ids")
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens is {body.min_tokens}, more than max_tokens, which is "
                       f"{max_tokens}.", "min_tokens")


def _sampling(body: Generation, vocabulary: int) -> Sampling:
    """OpenAI's defaults; without a seed, a random one."""
    for token in body.logit_bias or ():
        if token >= vocabulary:
            raise ApiError(400, f"Token id {token} of logit_bias is outside the vocabulary of "
                           f"{vocabulary}.", "logit_bias")
    seed = secrets.randbits(63) if body.seed is None else body.seed & (2**64 - 1)
    with field_errors():
        return Sampling(
            temperature=_given(body.temperature, 1.0), top_k=max(0, _given(body.top_k, 0)),
            top_p=_given(body.top_p, 1.0), min_p=_given(body.min_p, 0.0), seed=seed,
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            logit_bias=body.logit_bias or {})


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _grammar(body: Generation) -> tuple[str, Any] | None:
    """Kind and source of what the answer must fit, if anything."""
    found: list[tuple[str, Any]] = []
    form = body.response_format
    if form and form.type == "json_object":
        found.append(("json", {"type": "object"}))
    if form and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs json_schema",
                           "response_format.json_schema")
        found.append(("json", form.json_schema.schema))
    if body.regex is not None:
        found.append(("regex", body.regex))
    if body.grammar is not None:
        found.append(("lark", body.grammar))
    if len(found) > 1:
        raise ApiError(400, "response_format, regex and grammar exclude each other",
                       "response_format")
    return found[0] if found else None
