"""The bodies of requests: OpenAI's fields, and a few more that sampling here can take.

A field that is not listed is refused; those of `Ignored` are taken, and have no effect. Ranges
that the engine checks (Sampling, Request) are not checked a second time here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from llmc.server.http_errors import ApiError

MOST_STOPS = 16
MOST_INPUTS = 2048  # texts of one embeddings request, prompts of one completions request

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Text = Annotated[str, Meta(min_length=1)]
Stops = Annotated[list[Text], Meta(max_length=MOST_STOPS)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
# A text, texts, token ids, or lists of them; `inputs` tells which.
Inputs = str | Annotated[list[str | TokenId | Ids], Meta(min_length=1, max_length=1 << 20)]


def inputs(given: Inputs, field: str) -> list[str | list[int]]:
    """What a request asks for, one entry for each text or list of token ids."""
    if isinstance(given, str):
        return [given]
    kinds = {type(each) for each in given}
    if len(kinds) > 1:
        raise ApiError(400, f"{field} must be a text, texts, token ids or lists of them: not a "
                       "mixture", field)
    if int in kinds:
        return [given]  # type: ignore[list-item]
    if len(given) > MOST_INPUTS:
        raise ApiError(400, f"{field} has {len(given)} entries, at most {MOST_INPUTS} are taken",
                       field)
    return given  # type: ignore[return-value]


class Ignored(Struct, kw_only=True, forbid_unknown_fields=True):
    """What clients of hosted services send along; here it has no meaning."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """include_usage: a last chunk tells the token counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # nothing is obfuscated here


class JsonSchema(Struct):
    """A schema that the answer must fit."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Ignored, kw_only=True):
    """What chat and plain completions have in common. Beyond OpenAI's: top_k, min_p,
    repetition_penalty, min_tokens, ignore_eos, stop_token_ids, regex, grammar (Lark)."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: float | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    stop: Text | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: Text | None = None
    grammar: Text | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Generation, kw_only=True):
    """The body of /v1/completions."""

    prompt: Inputs
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Count | None = None
    suffix: str | None = None


class TextPart(Struct):
    """A part of a message's content. Other types than text are refused by name."""

    type: str
    text: str | None = None


class Message(Struct, omit_defaults=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class ChatRequest(Generation, kw_only=True):
    """The body of /v1/chat/completions. chat_template_kwargs: variables for the template."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None


class EmbeddingRequest(Ignored, kw_only=True):
    """The body of /v1/embeddings. dimensions: only as many as the model has."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /tokenize: a text, or messages for the chat template."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    model: str | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /detokenize."""

    tokens: list[TokenId]
    model: str | None = None
