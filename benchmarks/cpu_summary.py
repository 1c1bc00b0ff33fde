#!/usr/bin/env python3
"""What the lines of cpu_peers.py come to, beside the bars that were set for them.

    python benchmarks/cpu_summary.py LINES.json...

A verdict is {"what", "value", "bar", "holds"}; a bar whose cells were not measured has none. Files
have one JSON object a line, as `cpu_peers.py --json` prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import geometric_mean
from typing import Any

Line = dict[str, Any]
MOST = 4  # threads that most bars are for
SHARES = {"bf16": 0.95, "int8": 0.95, "int4": 0.90}
PREFILL_SHARES = {"bf16": 0.82, "int8": 0.6, "int4": 0.6}


def verdicts(lines: list[Line]) -> list[Line]:
    found = []
    measured = [line for line in lines if line.get("engines", {}).get("llmc")]
    for part in (decode, prefill, small_model, encoder, matmul, fewer_threads, noise):
        found += [each for each in part(measured) if each["value"] is not None]
    return found


def verdict(what: str, value: float | None, bar: float, least: bool = True) -> Line:
    """least: the value must reach the bar; else it must not exceed it."""
    holds = value is not None and (value >= bar if least else value <= bar)
    return {"what": what, "value": value and round(value, 3), "bar": bar, "holds": holds}


def select(lines: list[Line], **wanted: Any) -> list[Line]:
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def ahead(lines: list[Line], peer: str = "best") -> list[float]:
    """Times as fast as the peer, at its best where it was measured with several settings."""
    found = ([ratio for name, ratio in line.get("ahead", {}).items() if name.startswith(peer)]
             for line in lines)
    return [min(ratios) for ratios in found if ratios]


def over(function: Callable[[list[float]], float], values: list[float]) -> float | None:
    return function(values) if values else None


def shares(lines: list[Line]) -> list[float]:
    return [line["engines"]["llmc"]["share"] for line in lines]


def decode(lines: list[Line]) -> Iterator[Line]:
    for dtype, bar in SHARES.items():
        chosen = select(lines, group="decode", shape="1b", dtype=dtype, threads=MOST)
        yield verdict(f"1B decode {dtype}: least share of the read bandwidth",
                      over(min, shares(chosen)), bar)
        yield verdict(f"1B decode {dtype}: least times as fast as the best peer",
                      over(min, ahead(chosen)), 1.0)


def prefill(lines: list[Line]) -> Iterator[Line]:
    chosen = select(lines, group="prefill", shape="1b", threads=MOST)
    yield verdict("1B prefill bf16: least times as fast as openvino",
                  over(min, ahead(select(chosen, dtype="bf16"), "openvino")), 1.12)
    for dtype in ("int8", "int4"):
        yield verdict(f"1B prefill {dtype}: least times as fast as openvino's best quantised",
                      over(min, over_best_quantised(chosen, dtype)), 1.4)
    for dtype, bar in PREFILL_SHARES.items():
        yield verdict(f"1B prefill {dtype}, 512 tokens: share of the peak", over(
            min, shares(select(chosen, dtype=dtype, name="512 tokens"))), bar)


def over_best_quantised(lines: list[Line], dtype: str) -> list[float]:
    """llmc's tokens a second over the most that openvino makes of int8 or int4 weights."""
    ratios = []
    for line in select(lines, dtype=dtype):
        rates = [figure["tokens_per_second"] for each in ("int8", "int4")
                 for other in select(lines, dtype=each, name=line["name"])
                 for name, figure in other["engines"].items() if name.startswith("openvino")]
        if rates:
            ratios.append(line["engines"]["llmc"]["tokens_per_second"] / max(rates))
    return ratios


def small_model(lines: list[Line]) -> Iterator[Line]:
    ratios = [ratio for group in ("decode", "prefill")
              for ratio in ahead(select(lines, group=group, shape="110m", threads=MOST))]
    yield verdict("110M decode and prefill: least times as fast as the best peer",
                  over(min, ratios), 1.0)
    yield verdict("110M decode and prefill: geometric mean", over(geometric_mean, ratios), 1.15)


def encoder(lines: list[Line]) -> Iterator[Line]:
    chosen = select(lines, group="encoder", threads=MOST)
    dense = [line for line in chosen
             if "ragged" not in line["name"] and line["dtype"] in ("f32", "bf16")]
    yield verdict("BERT-base: least times as fast as openvino",
                  over(min, ahead(dense, "openvino")), 1.0)
    yield verdict("BERT-base: geometric mean of times as fast as openvino",
                  over(geometric_mean, ahead(dense, "openvino")), 1.15)
    speeds = [base["engines"]["llmc"]["ms"] / line["engines"]["llmc"]["ms"]
              for line in select(chosen, dtype="int8") if "ragged" not in line["name"]
              for base in select(chosen, dtype="bf16", name=line["name"])]
    yield verdict("BERT-base int8: least times as fast as its bf16", over(min, speeds), 1.3)
    ragged = [line for line in chosen if "ragged" in line["name"] and line["dtype"] != "int8"]
    yield verdict("BERT-base ragged: least times as fast as the best padded peer",
                  over(min, ahead(ragged)), 1.5)


def matmul(lines: list[Line]) -> Iterator[Line]:
    for dtype in ("f32", "bf16"):
        ratios = ahead(select(lines, group="matmul", dtype=dtype, threads=MOST), "torch")
        yield verdict(f"matmul {dtype}: geometric mean of times as fast as torch",
                      over(geometric_mean, ratios), 1.03)
        yield verdict(f"matmul {dtype}: least", over(min, ratios), 0.93)


def fewer_threads(lines: list[Line]) -> Iterator[Line]:
    for threads in (1, 2):
        chosen = [line for line in select(lines, threads=threads) if line["group"] != "noise"]
        yield verdict(f"{threads} threads, all cells: least times as fast as the best peer",
                      over(min, ahead(chosen)), 0.95)


def noise(lines: list[Line]) -> Iterator[Line]:
    for line in select(lines, group="noise"):
        losses = {name: figure["loss"] for name, figure in line["engines"].items()}
        if "llama.cpp" in losses:
            what = f"{line['shape']} {line['dtype']} decode beside a busy core: loss"
            yield verdict(f"{what} beyond llama.cpp's", losses["llmc"] - losses["llama.cpp"], 0.0,
                          least=False)


def show_verdict(each: Line) -> str:
    return (f"{'holds ' if each['holds'] else 'MISSED'}  {each['what']}: {each['value']:.2f} "
            f"(bar {each['bar']:.2f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=argparse.FileType(),
                        help="what cpu_peers.py --json printed")
    lines = [json.loads(text) for file in parser.parse_args().files for text in file
             if text.startswith("{")]
    for each in verdicts([line for line in lines if "group" in line]):
        print(show_verdict(each))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
