#!/usr/bin/env python3
"""How far quantised models are from their floats: mean KL divergence of the next token, in nats.

    quantize_quality.py MODEL... [--text FILE] [--modes int8,int4,...] [--tokens N] [--json FILE]

The text is that of MODEL/golden.json (prompts and their continuations) or the end of FILE, in
windows of 256 tokens. A mode is int8 or int4 and any of these, joined by `+`: rtn (plain rounding:
each group's largest element is the largest code; the same group, head and form), asym, g32, g64,
g128, head8, head4, headfloat, float (activations), always, never (calibration), kv8 (8-bit cache).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.ir import rounding

MODES = ("int8", "int8+float", "int4", "int4+never", "int4+rtn", "int4+float", "int4+float+never",
         "int4+float+rtn", "int4+head4", "int4+asym")
WINDOW = 256
WORDS: dict[str, dict[str, Any]] = {
    "asym": {"symmetric": False}, "g32": {"group": 32}, "g64": {"group": 64},
    "g128": {"group": 128}, "head8": {"head": "int8"}, "head4": {"head": "int4"},
    "headfloat": {"head": "float"}, "float": {"activations": "float"},
    "always": {"calibrate": "always"}, "never": {"calibrate": "never"},
    "rtn": {"calibrate": "never"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--tokens", type=int, default=3072, help="of FILE (default 3072)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {}
    for path in arguments.models:
        found = measure(path, arguments.modes.split(","), arguments.text, arguments.tokens)
        report[path.name] = found
        for mode, row in found["modes"].items():
            print(f"{path.name:24} {mode:20} KL {row['kl']:.6f}  {row['bits']:6.3f} bits  "
                  f"{row['bytes'] / 1e6:8.2f} MB  compile {row['seconds']:6.2f} s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(path: Path, modes: list[str], text: Path | None, tokens: int) -> dict[str, Any]:
    """KL of each mode against the f32 model, over the text's tokens."""
    with llmc.Runtime(path, dtype="f32") as runtime:
        windows = read_windows(path, runtime, text, tokens)
        wanted = [log_softmax(runtime.run(window)) for window in windows]
        nats = [-rows[np.arange(len(window) - 1), window[1:]]
                for rows, window in zip(wanted, windows, strict=True)]
    return {"tokens": sum(map(len, windows)),
            "perplexity": float(np.exp(np.concatenate(nats).mean())),
            "modes": {mode: one_mode(path, mode, windows, wanted) for mode in modes}}


def one_mode(path: Path, mode: str, windows: list[list[int]], wanted: list[np.ndarray]
             ) -> dict[str, Any]:
    weights, *words = mode.split("+")
    options: dict[str, Any] = {}
    for word in words:
        options |= WORDS.get(word, {})
    kv_cache = {"kv_cache": "int8"} if "kv8" in words else {}
    chosen = None if weights == "none" else llmc.Quantization(weights, **options)
    started = time.perf_counter()
    with plain_rounding("rtn" in words) as directory:
        runtime = llmc.Runtime(path, dtype="f32", quantize=chosen, cache_dir=directory, **kv_cache)
        seconds = time.perf_counter() - started
    with runtime:
        info = runtime.manifest.quantization
        total = sum(divergence(rows, log_softmax(runtime.run(window))).sum()
                    for rows, window in zip(wanted, windows, strict=True))
    quantized = info.quantized if info else ()
    elements = sum(each.shape[0] * each.shape[1] for each in quantized)
    return {"kl": float(total / sum(map(len, windows))),
            "bits": 8 * sum(each.bytes for each in quantized) / max(1, elements),
            "bytes": runtime.manifest.weight_bytes, "seconds": seconds,
            "calibration": info.calibration if info else 0.0}


@contextmanager
def plain_rounding(wanted: bool) -> Iterator[str | None]:
    """Inside, matrices are quantised without a search (and cached apart); else nothing changes."""
    if not wanted:
        yield None
        return
    import tempfile

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
