#!/usr/bin/env python3
"""How far quantised models are from their floats: mean KL divergence of the next token, in nats.

    quantize_quality.py MODEL... [--text FILE] [--modes int8,int4,...] [--tokens N] [--draws N]
                        [--json FILE]

The text is that of MODEL/golden.json (prompts and their continuations) or the end of FILE, in
windows of 256 tokens. It is never that of calibration, which the model makes itself; with --draws,
calibrated modes are measured on so many other draws of that too, and mean and worst are told, also
over plain rounding of the same mode. Of models with a golden.json the greedy continuation of its
first prompt is printed. A mode is int8 or int4 and any of these, joined by `+`: rtn (plain
rounding: each group's largest element is the largest code; the same group, head and form), asym,
g32, g64, g128, head8, head4, headfloat, float (activations), never (calibrated), kv8 (8-bit cache).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc import calibrate
from llmc.ir import rounding

MODES = ("int8", "int8+float", "int4", "int4+never", "int4+rtn", "int4+head4", "int4+asym",
         "int4+asym+rtn", "int4+g64", "int4+g64+rtn", "int4+g128", "int4+g128+rtn", "none+kv8")
WINDOW = 256
WORDS: dict[str, dict[str, Any]] = {
    "asym": {"symmetric": False}, "g32": {"group": 32}, "g64": {"group": 64},
    "g128": {"group": 128}, "head8": {"head": "int8"}, "head4": {"head": "int4"},
    "headfloat": {"head": "float"}, "float": {"activations": "float"},
    "never": {"calibrate": "never"}, "rtn": {"calibrate": "never"}}
SHOWN = 48  # tokens of the greedy text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--tokens", type=int, default=3072, help="of FILE (default 3072)")
    parser.add_argument("--draws", type=int, default=0, help="of calibration's text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {}
    for path in arguments.models:
        found = measure(path, arguments.modes.split(","), arguments.text, arguments.tokens,
                        arguments.draws)
        report[path.name] = found
        show(path.name, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def show(name: str, found: dict[str, Any]) -> None:
    for mode, row in found["modes"].items():
        print(f"{name:24} {mode:20} KL {row['kl']:.6f}  {row['bits']:6.3f} bits  "
              f"{row['bytes'] / 1e6:8.2f} MB  compile {row['seconds']:6.2f} s", flush=True)
        if "draws" in row:
            print(f"{'':24} {len(row['draws'])} draws: mean {row['mean']:.6f}, worst "
                  f"{row['worst']:.6f}; over plain rounding: mean {row['mean_ratio']:.3f}, worst "
                  f"{row['worst_ratio']:.3f}")
        if row["text"]:
            print(f"{'':24} {row['text']!r}")


def measure(path: Path, modes: list[str], text: Path | None, tokens: int, draws: int
            ) -> dict[str, Any]:
    """KL of each mode against the f32 model, over the text's tokens."""
    with llmc.Runtime(path, dtype="f32") as runtime:
        windows = read_windows(path, runtime, text, tokens)
        wanted = [log_softmax(runtime.run(window)) for window in windows]
        nats = [-rows[np.arange(len(window) - 1), window[1:]]
                for rows, window in zip(wanted, windows, strict=True)]
    rows = {mode: one_mode(path, mode, windows, wanted) for mode in modes}
    for mode, row in rows.items() if draws else ():
        if "calibrated" in row:
            row |= over_draws(path, mode, windows, wanted, draws)
    return {"tokens": sum(map(len, windows)),
            "perplexity": float(np.exp(np.concatenate(nats).mean())), "modes": rows}


def over_draws(path: Path, mode: str, windows: list[list[int]], wanted: list[np.ndarray],
               draws: int) -> dict[str, Any]:
    """KL of a calibrated mode with other draws of calibration's text than that of users."""
    found = []
    for seed in range(1, draws + 1):
        with drawn(seed) as directory:
            found.append(one_mode(path, mode, windows, wanted, directory)["kl"])
    plain = one_mode(path, f"{mode}+rtn", windows, wanted)["kl"]
    return {"draws": found, "mean": float(np.mean(found)), "worst": max(found),
            "mean_ratio": float(np.mean(found)) / plain, "worst_ratio": max(found) / plain}


@contextmanager
def drawn(seed: int) -> Iterator[str]:
    """Inside, calibration draws its text with this seed; artifacts are cached apart."""
    with tempfile.TemporaryDirectory() as directory:
        before, calibrate.SEED = calibrate.SEED, seed
        try:
            yield directory
        finally:
            calibrate.SEED = before


def one_mode(path: Path, mode: str, windows: list[list[int]], wanted: list[np.ndarray],
             cache_dir: str | None = None) -> dict[str, Any]:
    weights, *words = mode.split("+")
    calibrated = "int4" in weights or "head4" in words
    options: dict[str, Any] = {"calibrate": "always"} if calibrated else {}
    for word in words:
        options |= WORDS.get(word, {})
    kv_cache = {"kv_cache": "int8"} if "kv8" in words else {}
    chosen = None if weights == "none" else llmc.Quantization(weights, **options)
    started = time.perf_counter()
    with plain_rounding("rtn" in words) as directory:
        runtime = llmc.Runtime(path, dtype="f32", quantize=chosen,
                               cache_dir=directory or cache_dir, **kv_cache)
        seconds = time.perf_counter() - started
        with runtime:
            info = runtime.manifest.quantization
            total = sum(divergence(rows, log_softmax(runtime.run(window))).sum()
                        for rows, window in zip(wanted, windows, strict=True))
            text = greedy_text(path, runtime)
    quantized = info.quantized if info else ()
    elements = sum(each.shape[0] * each.shape[1] for each in quantized)
    return {"kl": float(total / sum(map(len, windows))),
            "bits": 8 * sum(each.bytes for each in quantized) / max(1, elements),
            "bytes": runtime.manifest.weight_bytes, "seconds": seconds,
            "text": text} | ({"calibrated": True} if options.get("calibrate") == "always" else {})


def greedy_text(path: Path, runtime: Any) -> str:
    """What the model makes of the first prompt of golden.json; "" where there is none."""
    goldens = path / "golden.json"
    found = json.loads(goldens.read_text())["goldens"] if goldens.is_file() else []
    if not found:
        return ""
    ids = found[0]["prompt_ids"]
    return runtime.decode(ids + list(runtime.generate(ids, SHOWN)))


@contextmanager
def plain_rounding(wanted: bool) -> Iterator[str | None]:
    """Inside, matrices are quantised without a search (and cached apart); else nothing changes."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        before = rounding.FACTORS[4]
        rounding.FACTORS[4] = np.ones(1, np.float32)
        from llmc import quantizer

        search = quantizer.Quantizer.__call__
        quantizer.Quantizer.__call__ = round_to_nearest  # type: ignore[method-assign]
        try:
            yield directory
        finally:
            quantizer.Quantizer.__call__ = search  # type: ignore[method-assign]
            rounding.FACTORS[4] = before


def round_to_nearest(self: Any, matrix: np.ndarray, dtype: Any, group: int, moments: Any = None
                     ) -> Any:
    """The plain way, in place of `Quantizer.__call__`."""
    from llmc.quantizer import QuantizedMatrix

    own = rounding.CodeRange.of(dtype)
    wide = rounding.padded(matrix.astype(np.float32), group)
    x = wide.reshape(len(wide), -1, group)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if own.zeros:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / own.steps
    else:
        scale = np.maximum(-low, high) / (own.low + own.steps)
    scale = np.where(scale == 0, 1, scale).astype(rounding.SCALES.numpy)
    zero = np.rint(-low / scale.astype(np.float32)) if own.zeros else np.zeros_like(low)
    codes = np.clip(np.rint(x / scale.astype(np.float32)) + zero,
                    0 if own.zeros else own.low, (0 if own.zeros else own.low) + own.steps)
    codes = codes.astype(np.uint8 if own.zeros else np.int8).reshape(wide.shape)
    return QuantizedMatrix(codes[:, :matrix.shape[1]].view(dtype.numpy), scale[..., 0],
                           zero[..., 0].astype(np.uint8) if own.zeros else None, 0.0)


def read_windows(path: Path, runtime: Any, text: Path | None, tokens: int) -> list[list[int]]:
    if text is None:
        goldens = json.loads((path / "golden.json").read_text())["goldens"]
        return [each["prompt_ids"] + each["greedy_ids"] for each in goldens]
    ids = runtime.encode(text.read_text()[-8 * tokens:])[-tokens:]
    size = min(WINDOW, runtime.max_context)
    return [ids[first:first + size] for first in range(0, len(ids) - 1, size)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(wanted, found) of rows of log probabilities."""
    return (np.exp(wanted) * (wanted - found)).sum(-1)


if __name__ == "__main__":
    sys.exit(main())
