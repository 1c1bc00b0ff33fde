#!/usr/bin/env python3
"""What running answers feel of long prompts that arrive, by the size of the steps they share.

    serve_prompts.py [--shape 110m] [--tokens 64,128,256,512] [--threads 4] [--seconds 10]

Some clients have answers of 200 tokens written, one after the other, while others send prompts of
512 tokens at random times, a half of what the machine can take. For each --mixed-step-tokens: the
pauses of the first, and how soon the second have their first token. Rounds take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from make_model import LLAMA, make_model

from llmc.cli.bench_serve import server_of
from llmc.server.load import Load, Result, run_load, summarize

LONG = 512  # tokens of a long prompt


async def load_both(url: str, writers: Load, readers: Load) -> tuple[list[Result], list[Result]]:
    """What became of the requests that mostly write, and of those that mostly read."""
    (written, _), (read, _) = await asyncio.gather(run_load(url, writers), run_load(url, readers))
    return written, read


def prompt_speed(url: str) -> float:
    """Prompt tokens a second of one client, to choose the rate of arrivals by."""
    load = Load(clients=1, requests=4, prompt_tokens=LONG, output_tokens=1, spread=0.0)
    found = summarize(*asyncio.run(run_load(url, load)))
    return found["prompt_tokens"] / found["seconds"]


def measure(url: str, rate: float, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """p50 and p99 of pauses, of the time to the first token of a long prompt, output tokens/s."""
    writers = Load(clients=arguments.clients, seconds=arguments.seconds, prompt_tokens=16,
                   output_tokens=200, spread=0.0, seed=seed)
    readers = Load(rate=rate, seconds=arguments.seconds, prompt_tokens=LONG, output_tokens=4,
                   spread=0.0, seed=seed + 1)
    written, read = asyncio.run(load_both(url, writers, readers))
    wrote, got = summarize(written, arguments.seconds), summarize(read, arguments.seconds)
    return {"pause_p50": wrote["pause"]["p50"], "pause_p99": wrote["pause"]["p99"],
            "first_p50": got["first_token"]["p50"], "first_p99": got["first_token"]["p99"],
            "tokens_per_second": wrote["output_tokens_per_second"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(LLAMA), default="110m")
    parser.add_argument("--tokens", default="64,128,256,512", help="--mixed-step-tokens to try")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = str(make_model(arguments.shape, Path(directory) / "model"))
        servers = {int(tokens): stack.enter_context(server_of(model, [
            "--threads", str(arguments.threads), "--max-context", "1024", "--specialize", "none",
            "--max-batch", "24", "--mixed-step-tokens", tokens]))
            for tokens in arguments.tokens.split(",")}
        speed = prompt_speed(next(iter(servers.values())))
        rate = 0.5 * speed / LONG
        print(f"{speed:.0f} prompt tokens/s alone; {rate:.2f} long prompts/s; milliseconds")
        found: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in servers}
        for number in range(arguments.rounds):
            for tokens, url in servers.items():
                found[tokens].append(measure(url, rate, arguments, number))
    for tokens, rounds in found.items():
        median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        print(f"{tokens:4} tokens: pause p50 {median['pause_p50'] * 1e3:.1f} p99 "
              f"{median['pause_p99'] * 1e3:.1f}, first token of long prompts p50 "
              f"{median['first_p50'] * 1e3:.0f} p99 {median['first_p99'] * 1e3:.0f}, "
              f"{median['tokens_per_second']:.0f} output tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
