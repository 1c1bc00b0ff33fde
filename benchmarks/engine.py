#!/usr/bin/env python3
"""What serving costs beside the model: many requests at once on one engine, in this process.

    engine.py MODEL [--target nvptx] [--requests 64] [--prompt 512] [--output 128] [--json]

Random prompts, greedy. The overhead is the share of the steps' time that is not spent in
`Runtime.step`: scheduling before it, sampling and handing out tokens behind it. The floor is 0.
On a GPU also the share of all time in which the host does not wait for the device: what packing
inputs and launching cost comes on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

import llmc
from llmc.errors import LlmcError
from llmc.server.engine import Engine
from llmc.server.request import Request


def serve_all(engine: Engine, requests: list[Request]) -> float:
    """Seconds until all requests have ended."""
    started = time.perf_counter()
    for stream in [engine.submit(request) for request in requests]:
        for _ in stream:
            pass
    return time.perf_counter() - started


def make_requests(vocabulary: int, arguments: argparse.Namespace, seed: int) -> list[Request]:
    random = np.random.default_rng(seed)
    return [Request(random.integers(0, vocabulary, arguments.prompt), arguments.output,
                    ignore_eos=True) for _ in range(arguments.requests)]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The second of two equal loads: code is loaded and captured in the first."""
    length = arguments.prompt + arguments.output
    with llmc.Runtime(arguments.model, target=arguments.target, max_context=length,
                      max_batch=arguments.requests) as runtime:
        engine = Engine(runtime, max_batch=arguments.requests)
        engine.start()
        try:
            vocabulary = runtime.config["vocab_size"]
            serve_all(engine, make_requests(vocabulary, arguments, 1))
            before, waited = engine.stats(), waited_seconds(runtime)
            seconds = serve_all(engine, make_requests(vocabulary, arguments, 2))
            after, waited = engine.stats(), waited_seconds(runtime) - waited
        finally:
            engine.close()
    run = after.seconds_run - before.seconds_run
    other = (after.seconds_schedule - before.seconds_schedule
             + after.seconds_postprocess - before.seconds_postprocess)
    steps = after.steps - before.steps
    tokens = arguments.requests * arguments.output
    found = {"seconds": seconds, "output_tokens_per_second": tokens / seconds, "steps": steps,
             "step_milliseconds": 1e3 * (run + other) / steps,
             "overhead_milliseconds": 1e3 * other / steps, "overhead": other / (run + other),
             "failed_steps": after.failed_steps}
    if arguments.target == "nvptx":
        found["beside_device"] = 1.0 - waited / seconds
    return found


def waited_seconds(runtime: llmc.Runtime) -> float:
    """Seconds that the host has waited for a GPU."""
    return getattr(runtime.executor, "waited", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--target", choices=("host", "nvptx"), default="host")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        found = measure(arguments)
    except LlmcError as error:
        sys.exit(f"engine.py: {error}")
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' '):28} {value:.4g}")


if __name__ == "__main__":
    main()
