"""Load for a server with OpenAI's API: who asks for what and when, and how long it took.

Needs the standard library only, and little of the processor, which the server may share.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmc.errors import LlmcError

FIRST_ID = 3  # ids below are special in most vocabularies
LINE = 1 << 20  # bytes of an event, at most


@dataclass(frozen=True)
class Load:
    """rate: requests a second that arrive at random (Poisson), or None: `clients` that each ask
    again when they have their answer. It lasts for `seconds`, or until there were `requests`.
    prompt_tokens, output_tokens: medians of log-normal lengths, `spread` their sigma (0: all
    alike); vocabulary: prompts are random ids below it; ignore_eos: ask for all tokens."""

    clients: int = 8
    rate: float | None = None
    seconds: float = 30.0
    requests: int | None = None
    prompt_tokens: int = 64
    output_tokens: int = 64
    spread: float = 0.8
    longest: int = 2048
    vocabulary: int = 256
    seed: int = 0
    ignore_eos: bool = True
    api_key: str | None = None

    def lengths(self) -> Iterator[tuple[int, int]]:
        """(prompt tokens, output tokens) of one request after the other."""
        chance = random.Random(self.seed)
        while True:
            yield tuple(self._length(chance, median) for median in  # type: ignore[misc]
                        (self.prompt_tokens, self.output_tokens))

    def _length(self, chance: random.Random, median: int) -> int:
        drawn = median * chance.lognormvariate(0.0, self.spread) if self.spread else median
        return max(1, min(self.longest, round(drawn)))


@dataclass
class Result:
    """One request. Times are seconds since its start; pauses: between the chunks of its text."""

    prompt_tokens: int
    output_tokens: int = 0
    first: float | None = None
    total: float = 0.0
    pauses: list[float] = field(default_factory=list)
    error: str = ""


async def run_load(url: str, load: Load) -> tuple[list[Result], float]:
    """Results of all requests, and the seconds from the first one's start to the last one's end.
    LlmcError if the server cannot be reached at all."""
    target = Target(url, load.api_key)
    target.model = await target.first_model()
    results: list[Result] = []
    lengths, chance = load.lengths(), random.Random(load.seed + 1)
    began = time.perf_counter()

    def more() -> bool:
        enough = load.requests is not None and len(results) >= load.requests
        return not enough and time.perf_counter() - began < load.seconds

    def start() -> Any:
        prompt, output = next(lengths)
        results.append(result := Result(prompt))
        ids = [chance.randrange(FIRST_ID, load.vocabulary) for _ in range(prompt)]
        return target.complete(ids, output, load.ignore_eos, result)

    async def client() -> None:
        while more():
            await start()

    if load.rate is None:
        await asyncio.gather(*(client() for _ in range(load.clients)))
    else:
        tasks = []
        while more():
            tasks.append(asyncio.create_task(start()))
            await asyncio.sleep(chance.expovariate(load.rate))
        await asyncio.gather(*tasks)
    return results, time.perf_counter() - began


class Target:
    """A server, and how to ask it."""

    def __init__(self, url: str, api_key: str | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LlmcError(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self.model = ""

    async def first_model(self) -> str:
        """The name of the model that the server has."""
        try:
            status, body = await self._get("/v1/models")
            if status != 200:
                raise LlmcError(f"{self._host}:{self._port} answers {status} to /v1/models")
            return json.loads(body)["data"][0]["id"]
        except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as error:
            raise LlmcError(f"{self._host}:{self._port} is no server with OpenAI's API: "
                            f"{error}") from error

    async def _get(self, path: str) -> tuple[int, bytes]:
        reader, writer = await self._send("GET", path, b"")
        try:
            status, chunked, length = await _head(reader)
            parts = [part async for part in _body(reader, chunked, length)]
            return status, b"".join(parts)
        finally:
            writer.close()

    async def _send(self, method: str, path: str, body: bytes
                    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls,
                                                       limit=LINE)
        writer.write(f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}"
                     f"\r\n{self._key}Content-Type: application/json\r\nConnection: close\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    async def complete(self, ids: Sequence[int], tokens: int, ignore_eos: bool, result: Result
                       ) -> None:
        """Stream one completion; everything about it goes into `result`."""
        body = {"model": self.model, "prompt": ids, "max_tokens": tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}
        if ignore_eos:
            body["ignore_eos"] = True
        began = time.perf_counter()
        writer = None
        try:
            reader, writer = await self._send("POST", "/v1/completions", json.dumps(body).encode())
            status, chunked, length = await _head(reader)
            if status == 200:
                await _follow(_body(reader, chunked, length), began, result)
            else:
                result.error = f"status {status}"
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            result.error = type(error).__name__
        finally:
            result.total = time.perf_counter() - began
            if writer is not None:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool, int | None]:
    """Status, whether the body comes in chunks, else its length if that is told."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    length = headers.get("content-length")
    return (int(lines[0].split()[1]), "chunked" in headers.get("transfer-encoding", ""),
            int(length) if length else None)


async def _body(reader: asyncio.StreamReader, chunked: bool, length: int | None):
    """The parts of a body."""
    if not chunked:
        yield await (reader.read() if length is None else reader.readexactly(length))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _follow(parts, began: float, result: Result) -> None:
    """Take the times of the events of a stream. Only what is needed of them is parsed."""
    rest, last, ended = b"", 0.0, False
    async for part in parts:
        now = time.perf_counter() - began
        *lines, rest = (rest + part).split(b"\n")
        spoke = False
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                spoke |= _take(line[6:], result)
        if spoke:
            if result.first is None:
                result.first = now
            else:
                result.pauses.append(now - last)
            last = now
    if not ended and not result.error:
        result.error = "cut off"


def _take(event: bytes, result: Result) -> bool:
    """What an event tells; whether it has text."""
    if b'"error"' in event[:12]:
        result.error = "error in the stream"
    if b'"usage":{' in event or b'"usage": {' in event:
        usage = json.loads(event).get("usage")
        result.output_tokens = usage["completion_tokens"]
        return False
    return b'"text":""' not in event


# ---- what came out ------------------------------------------------------------------------------


def summarize(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Counts, rates, and percentiles in seconds. pause: between two chunks of one text;
    token: between two tokens, as the mean of each request."""
    done = [each for each in results if not each.error]
    firsts = [each.first for each in done if each.first is not None]
    tokens = [(each.total - each.first) / (each.output_tokens - 1) for each in done
              if each.first is not None and each.output_tokens > 1]
    made = sum(each.output_tokens for each in done)
    return {
        "requests": len(results), "completed": len(done),
        "errors": dict(Counter(each.error for each in results if each.error)),
        "seconds": seconds, "prompt_tokens": sum(each.prompt_tokens for each in done),
        "output_tokens": made, "requests_per_second": len(done) / seconds,
        "output_tokens_per_second": made / seconds,
        "first_token": percentiles(firsts), "token": percentiles(tokens),
        "pause": percentiles([pause for each in done for pause in each.pauses]),
        "total": percentiles([each.total for each in done])}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the mean; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)]
             for p in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **found}
