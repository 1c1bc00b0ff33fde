"""Cases of attention on a GPU, each against the reference in f64."""

from __future__ import annotations

import attention_harness as reference
import numpy as np
from attention_on_device import DeviceStage, run_once

from llmc.codegen.nvptx.attention import attention
from llmc.codegen.nvptx.attention_flash import FlashAttention
from llmc.ir.layouts import KeyPages, ValuePages, pack, unpack
from llmc.ir.ops import make

MIX = [(1, 0), (7, 30), (33, 0), (1, 200), (1, 31), (129, 5), (2, 64), (1, 1500)]
MEDIUM = [(1, 3000), (1, 95)]
FEW = [(1, 700), (1, 0), (3, 65), (1, 95), (2, 31)]
LONG = [(1, 9000), (1, 40)]  # more pages than clusters take
TOLERANCE = {"f32": 4e-6, "f16": 2e-3, "bf16": 1.2e-2}
LAYOUTS = {"k": ValuePages(), "v": ValuePages()}


def device_arrays(arrays: dict, inputs) -> dict:
    """Keys laid as the GPU wants them."""
    shape = next(x.shape for x in inputs if x["name"] == "k")
    return {**arrays, "k": pack(unpack(arrays["k"], KeyPages(), shape), ValuePages())}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    got = got.astype(np.float64).reshape(want.shape)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_paged(device, sequences, heads, kv_heads, size, dtype_name, kernel=FlashAttention,
                **attributes) -> float:
    inputs, result, _, arrays, dense = reference.paged_case(
        sequences, heads, kv_heads, size, dtype_name, **attributes)
    output = make("reshape", result, shape=(result.shape[0], heads * size))
    stage = DeviceStage(inputs, output, layouts=LAYOUTS, make=kernel)
    got = run_once(device, stage, device_arrays(arrays, inputs))
    starts = arrays["offsets"]
    want = np.concatenate([
        reference.oracle(arrays["q"][starts[i]:starts[i + 1]], k, v, size**-0.5, **attributes)
        for i, (k, v) in enumerate(dense)])
    return relative_error(got, want.reshape(want.shape[0], -1))


def check_packed(device, lengths, heads, kv_heads, size, dtype_name, seen=None, **attributes):
    tokens = sum(lengths)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    shapes = {"q": (tokens, heads, size), "k": (tokens, kv_heads, size),
              "v": (tokens, kv_heads, size)}
    arrays = {name: reference.random(shape, dtype_name, seed)
              for seed, (name, shape) in enumerate(shapes.items())}
    inputs = [reference.leaf(name, dtype_name, *shape) for name, shape in shapes.items()]
    arrays["offsets"] = offsets
    inputs.append(reference.leaf("offsets", "i32", len(offsets)))
    if seen is not None:
        arrays["lengths"] = np.array(seen, np.int32)
        inputs.append(reference.leaf("lengths", "i32", len(seen)))
    result = make("packed_attention", *inputs, **attributes)
    want = reference.evaluate_exactly(result, arrays, {})
    return relative_error(run_once(device, DeviceStage(inputs, result), arrays), want)


def check_dense(device, batch, heads, kv_heads, queries, keys, size, dtype_name, mask=None,
                **attributes):
    shapes = {"q": (batch, queries, heads, size), "k": (batch, keys, kv_heads, size),
              "v": (batch, keys, kv_heads, size)}
    arrays = {name: reference.random(shape, dtype_name, seed)
              for seed, (name, shape) in enumerate(shapes.items())}
    inputs = [reference.leaf(name, dtype_name, *shape) for name, shape in shapes.items()]
    operands = [make("transpose", x, permutation=(0, 2, 1, 3)) for x in inputs]
    if mask is not None:
        arrays["mask"] = mask
        kind = "bool" if mask.dtype == bool else "f32"
        inputs.append(reference.leaf("mask", kind, *mask.shape))
        operands.append(inputs[-1])
    result = make("transpose", make("attention", *operands, **attributes),
                  permutation=(0, 2, 1, 3))
    want = reference.evaluate_exactly(result, arrays, {})
    return relative_error(run_once(device, DeviceStage(inputs, result), arrays), want)


def cases():
    """(name, dtype, function of the device)."""
    for dtype, heads, kv_heads, size in [
            ("bf16", 8, 2, 64), ("bf16", 8, 2, 128), ("f16", 8, 1, 128), ("bf16", 4, 4, 128),
            ("bf16", 5, 1, 80), ("f16", 6, 2, 96), ("bf16", 2, 2, 256), ("bf16", 40, 2, 64),
            ("f16", 8, 4, 16), ("f16", 4, 2, 32), ("bf16", 8, 2, 20), ("f32", 8, 2, 64),
            ("f32", 14, 2, 7), ("f32", 4, 2, 128), ("f32", 2, 1, 256), ("f32", 71, 1, 8)]:
        for name, sequences in (("mix", MIX), ("few", FEW)):
            yield (f"paged {name} {dtype} {heads}/{kv_heads} x {size}", dtype,
                   lambda device, s=sequences, h=heads, g=kv_heads, d=size, t=dtype:
                   check_paged(device, s, h, g, d, t))
    for size in (64, 128):
        yield (f"paged medium bf16 8/2 x {size}", "bf16", lambda device, d=size:
               check_paged(device, MEDIUM, 8, 2, d, "bf16"))
        yield (f"paged long bf16 8/2 x {size}", "bf16", lambda device, d=size:
               check_paged(device, LONG, 8, 2, d, "bf16"))
    for attributes in ({"window": 1}, {"window": 33}, {"softcap": 5.0},
                       {"window": 40, "softcap": 50.0}):
        for dtype, sequences in (("bf16", MIX), ("bf16", FEW), ("f32", MIX)):
            yield (f"paged {dtype} {attributes} {len(sequences)}", dtype,
                   lambda device, a=attributes, t=dtype, s=sequences:
                   check_paged(device, s, 8, 2, 64, t, **a))
    for size in (7, 64, 80, 96, 128, 192, 256):  # of few queries, in f32
        yield (f"one query a block f32 8/2 x {size}", "f32", lambda device, d=size:
               check_paged(device, FEW, 8, 2, d, "f32", attention))
    for size in (64, 128):  # so many heads that tiles are of the greater height
        for attributes in ({}, {"window": 40, "softcap": 50.0}):
            yield (f"paged high bf16 64/64 x {size} {attributes}", "bf16",
                   lambda device, d=size, a=attributes: check_paged(device, MIX, 64, 64, d, "bf16",
                                                                    **a))
        yield (f"packed high bf16 80/80 x {size} lengths", "bf16", lambda device, d=size:
               check_packed(device, [5, 70, 1, 129], 80, 80, d, "bf16", seen=[3, 70, 0, 100]))
        yield (f"dense high bf16 80/80 x {size}", "bf16", lambda device, d=size:
               check_dense(device, 4, 80, 80, 33, 71, d, "bf16", causal=True, window=30))
    for dtype, size in (("bf16", 64), ("f32", 64), ("f16", 24)):
        for causal in (False, True):
            yield (f"packed {dtype} x {size} causal {causal}", dtype,
                   lambda device, t=dtype, d=size, c=causal:
                   check_packed(device, [3, 70, 1, 129], 6, 2, d, t, causal=c))
        yield (f"packed {dtype} x {size} lengths", dtype, lambda device, t=dtype, d=size:
               check_packed(device, [5, 70, 1, 129], 4, 4, d, t, seen=[3, 70, 0, 100]))
        yield (f"dense {dtype} x {size}", dtype, lambda device, t=dtype, d=size:
               check_dense(device, 2, 6, 2, 33, 71, d, t, causal=True, window=30))
        chosen = np.random.default_rng(1).random((2, 1, 33, 71)) < 0.7
        yield (f"dense {dtype} x {size} bool mask", dtype, lambda device, t=dtype, d=size, m=chosen:
               check_dense(device, 2, 6, 2, 33, 71, d, t, mask=m))
        added = np.where(chosen[:, :, :1], 0, np.finfo(np.float32).min).astype(np.float32)
        yield (f"dense {dtype} x {size} added mask", dtype, lambda device, t=dtype, d=size, m=added:
               check_dense(device, 2, 6, 2, 33, 71, d, t, mask=m))
