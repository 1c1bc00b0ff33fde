#!/usr/bin/env python3
"""A server that compiles for its own traffic: that it does, and what its clients feel of it.

    serve_compiles.py [--shape 110m] [--hot 6,9] [--clients 2,3,5,6,7,8] [--seconds 20]

First, a server starts cold and gets the traffic of --hot clients in turn, each a shape of its own
(so many sequences that decode), until its metrics show code for all of them that was kept because
it was measured to be faster, or --patience is over. It starts again with the same profile
directory: what its metrics show before the first request, and what runs that. For which shapes
faster code is found depends on the CPU: generic code may be the best for one of them.

Second, pauses between tokens while a server compiles for its traffic, and those of one that never
compiles. Every number of --clients is a shape that the server has not seen, for which it compiles
after 50 calls, whether that pays or not. The two servers take turns. Without numbers a part is
left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from make_model import LLAMA, make_model

from llmc.cli.bench_serve import server_of
from llmc.server.load import Load, run_load, summarize

ROUND_SECONDS = 5.0  # of one kind of traffic, before it is the other's turn


def look(url: str) -> dict:
    with urlopen(f"{url}/dashboard/data", timeout=60) as answer:
        return json.load(answer)


def metric(url: str, name: str) -> dict[str, float]:
    """A metric's values by the variant that they are labelled with."""
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = (re.fullmatch(name + r'\{.*variant="([^"]*)".*\} (.*)', line) for line in lines)
    return {match.group(1): float(match.group(2)) for match in found if match}


def load(url: str, clients: int, seconds: float) -> dict:
    """Answers of 120 tokens, for so many clients at once."""
    work = Load(clients=clients, seconds=seconds, prompt_tokens=8, output_tokens=120, spread=0.0)
    return summarize(*asyncio.run(run_load(url, work)))


def show_code(url: str) -> None:
    calls, gains = metric(url, "llmc:variant_calls_total"), metric(url, "llmc:variant_gain_ratio")
    for name, count in calls.items():
        gain = f" gain {gains[name]:.1%}" if name in gains else ""
        print(f"  {name:40} {count:8.0f} calls{gain}")


def promote(model: str, options: list[str], hot: list[int], patience: float,
            snapshot: Path | None) -> bool:
    """Both parts of the first story; whether all hot shapes got code that was measured faster.
    snapshot: where to write what the dashboard shows then."""
    wanted = {f"tokens={n},sequences={n},rows={n}" for n in hot}
    with server_of(model, options) as url:
        began = time.monotonic()
        while wanted - set(gains := metric(url, "llmc:variant_gain_ratio")) \
                and time.monotonic() - began < patience:
            for clients in hot:
                load(url, clients, ROUND_SECONDS)
        print(f"started cold, {time.monotonic() - began:.0f} s of {' and '.join(map(str, hot))} "
              "clients in turn:")
        show_code(url)
        if snapshot:
            snapshot.write_text(json.dumps(look(url)))
        for event in look(url)["events"]:
            print(f"  {event['kind']:10} {event['variant']}: {event['text']}")
    with server_of(model, options) as url:
        print("started again, before the first request:")
        show_code(url)
        for clients in hot:
            load(url, clients, 1.0)
        print("after a second of each:")
        show_code(url)
    return wanted <= set(gains)


def compare_pauses(model: str, plain: list[str], lazy: list[str], counts: list[int],
                   seconds: float) -> float:
    """The median ratio of p99 of the pauses, compiling over not."""
    ratios = []
    with server_of(model, lazy) as busy, server_of(model, plain) as calm:
        for number, clients in enumerate(counts):
            pair = [(busy, 0), (calm, 1)][::1 if number % 2 else -1]
            found = [0.0, 0.0]
            for url, place in pair:
                found[place] = load(url, clients, seconds)["pause"]["p99"]
            ratios.append(found[0] / found[1])
            print(f"{clients} clients: p99 pause {found[0] * 1e3:.1f} ms compiling, "
                  f"{found[1] * 1e3:.1f} ms not, {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}; {look(busy)['compiles']}")
        show_code(busy)
    return statistics.median(ratios)


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(LLAMA), default="110m")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--hot", type=numbers, default=[6, 9],
                        help="numbers of clients (default 6,9, for CPUs with AVX2; 12,16 are "
                        "shapes that gain with AVX-512)")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for both promotions")
    parser.add_argument("--snapshot", type=Path, help="write the dashboard's data there")
    parser.add_argument("--clients", type=numbers, default=[2, 3, 5, 6, 7, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    done = True
    with tempfile.TemporaryDirectory() as directory:
        model = str(make_model(arguments.shape, Path(directory) / "model", arguments.dtype))
        options = ["--threads", str(arguments.threads), "--max-context", "1024"]
        if arguments.hot:
            done = promote(model, [*options, "--profile-dir", f"{directory}/hot"], arguments.hot,
                           arguments.patience, arguments.snapshot)
        if arguments.clients:
            compare_pauses(model, [*options, "--specialize", "none"],
                           [*options, "--promote-after", "50", "--profile-dir",
                            f"{directory}/busy"], arguments.clients, arguments.seconds)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
