#!/usr/bin/env python3
"""What a client feels of compiles: pauses between tokens while the server compiles for its traffic,
and of the same server that never compiles.

    serve_compiles.py [--shape 110m] [--clients 2,3,5,6,7,8] [--seconds 20]

Every client count is a shape that the server has not seen, for which it compiles after 50 calls,
whether that pays or not. The two servers take turns. After that
the compiling server starts again with the same profile directory: what it has ready then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

from make_model import LLAMA, make_model

from llmc.cli.bench_serve import server_of
from llmc.server.load import Load, run_load, summarize


def look(url: str) -> dict:
    with urlopen(f"{url}/dashboard/data", timeout=60) as answer:
        return json.load(answer)


def pause(url: str, clients: int, seconds: float) -> float:
    """The 99th percentile of the pauses, in seconds."""
    load = Load(clients=clients, seconds=seconds, prompt_tokens=8, output_tokens=120, spread=0.0)
    return summarize(*asyncio.run(run_load(url, load)))["pause"]["p99"]


def show_code(url: str) -> None:
    for row in look(url)["table"]:
        gain = "" if row["gain"] is None else f" gain {row['gain']:.1%}"
        print(f"  {row['tier']:8} {row['name']:40} {row['calls']:8} calls{gain}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(LLAMA), default="110m")
    parser.add_argument("--clients", default="2,3,5,6,7,8")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    counts = list(map(int, arguments.clients.split(",")))
    with tempfile.TemporaryDirectory() as directory:
        model = str(make_model(arguments.shape, Path(directory) / "model"))
        plain = ["--threads", str(arguments.threads), "--max-context", "1024"]
        lazy = [*plain, "--promote-after", "50", "--profile-dir", f"{directory}/profile"]
        ratios = []
        with server_of(model, lazy) as busy, server_of(
                model, [*plain, "--specialize", "none"]) as calm:
            for number, clients in enumerate(counts):
                pair = [(busy, 0), (calm, 1)][::1 if number % 2 else -1]
                found = [0.0, 0.0]
                for url, place in pair:
                    found[place] = pause(url, clients, arguments.seconds)
                ratios.append(found[0] / found[1])
                print(f"{clients} clients: p99 pause {found[0] * 1e3:.1f} ms compiling, "
                      f"{found[1] * 1e3:.1f} ms not, {ratios[-1]:.2f}", flush=True)
            print(f"median ratio {statistics.median(ratios):.2f}; {look(busy)['compiles']}")
            show_code(busy)
        with server_of(model, lazy) as again:
            print("started again:")
            show_code(again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
