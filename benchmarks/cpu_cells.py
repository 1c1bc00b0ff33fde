"""What cpu_peers.py measures: cells of work, and how many bytes and operations each is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from make_model import BERT, LLAMA

# Bits of a weight, scales included: of llama.cpp's blocks of 32, and of our groups of 128 and 32;
# our head is int8 in both.
BITS = {"f32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}
OWN_BITS = BITS | {"int8": 8.125}
CONTEXTS = {"1b": (2048, 128), "110m": (128,)}
PROMPTS = {"1b": (128, 512, 2048), "110m": (512,)}
MATMULS = ((2048, 2048), (8192, 2048), (2048, 8192))  # n, k
ROWS = (1, 4, 16, 64, 128, 512, 2048)
ENCODER = ((1, 16), (1, 128), (1, 384), (8, 128))  # batch, tokens
RAGGED = (7, 19, 33, 48, 64, 85, 110, 128)  # tokens
DECODED = 32


@dataclass(frozen=True)
class Cell:
    """One line of the table. job: for the workers; bound: the ceiling; work: bytes or operations
    of one job; own_work: the same of llmc where that differs; tokens: of one job."""

    group: str
    name: str
    shape: str
    dtype: str
    job: dict[str, Any]
    bound: str
    work: float
    own_work: float = 0.0
    tokens: int = 0


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Those of the groups, shapes and dtypes that were asked for."""
    only = set(options.only)
    for shape in options.shapes:
        for dtype in options.dtypes:
            if "prefill" in only:
                yield from prefill_cells(shape, dtype, options.prompts or PROMPTS[shape])
            if "decode" in only:
                yield from decode_cells("decode", shape, dtype, options.contexts or CONTEXTS[shape])
            if "noise" in only:
                yield from decode_cells("noise", shape, dtype, CONTEXTS[shape][-1:])
    for dtype in options.encoder_dtypes if "encoder" in only else ():
        yield from encoder_cells(dtype)
    for dtype in options.matmul_dtypes if "matmul" in only else ():
        yield from matmul_cells(dtype)


def decode_cells(group: str, shape: str, dtype: str, contexts: Sequence[int]) -> Iterator[Cell]:
    """By default the longest context first: the longest prompt was the last."""
    work, own = DECODED * elements(shape) * BITS[dtype] / 8, DECODED * own_bytes(shape, dtype)
    for context in contexts:
        cached = DECODED * cache_bytes(shape, context)
        yield Cell(group, f"context {context}", shape, dtype,
                   {"work": "decode", "context": context, "tokens": DECODED}, "bandwidth",
                   work + cached, own + cached, DECODED)


def prefill_cells(shape: str, dtype: str, prompts: Sequence[int]) -> Iterator[Cell]:
    inner = elements(shape) - head_elements(shape)
    for tokens in prompts:
        yield Cell("prefill", f"{tokens} tokens", shape, dtype,
                   {"work": "prefill", "tokens": tokens}, arithmetic(dtype),
                   2 * tokens * inner + attention_flops(shape, tokens), tokens=tokens)


def encoder_cells(dtype: str) -> Iterator[Cell]:
    inner = elements("bert-base") - head_elements("bert-base")
    batches = {f"{batch} x {tokens}": [tokens] * batch for batch, tokens in ENCODER}
    for name, lengths in (batches | {"ragged 8": list(RAGGED)}).items():
        yield Cell("encoder", name, "bert-base", dtype, {"work": "encode", "lengths": lengths},
                   arithmetic(dtype), 2 * sum(lengths) * inner, tokens=sum(lengths))


def matmul_cells(dtype: str) -> Iterator[Cell]:
    for n, k in MATMULS:
        for rows in ROWS:
            few = rows <= 4
            yield Cell("matmul", f"({n}, {k}) rows {rows}", "", dtype,
                       {"work": "matmul", "k": k, "n": n, "rows": rows},
                       "bandwidth" if few else dtype,
                       n * k * BITS[dtype] / 8 if few else 2.0 * rows * n * k)


def arithmetic(dtype: str) -> str:
    """The ceiling of products of a dtype's weights."""
    return dtype if dtype in ("f32", "bf16") else "int8"


def configuration(shape: str) -> dict[str, Any]:
    return BERT if shape == "bert-base" else LLAMA[shape]


def elements(shape: str) -> int:
    """Elements of a model's matrices, a tied one once."""
    c = configuration(shape)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads, size = c["num_attention_heads"], c.get("head_dim", hidden // c["num_attention_heads"])
    kv = c.get("num_key_value_heads", heads)
    projections = 2 if shape == "bert-base" else 3
    layer = hidden * size * (2 * heads + 2 * kv) + projections * hidden * inner
    return c["num_hidden_layers"] * layer + head_elements(shape)


def head_elements(shape: str) -> int:
    c = configuration(shape)
    return c["vocab_size"] * c["hidden_size"]


def own_bytes(shape: str, dtype: str) -> float:
    """Bytes of a model's matrices as llmc stores them."""
    head = head_elements(shape)
    of_head = OWN_BITS["int8"] if dtype == "int4" else OWN_BITS[dtype]
    return ((elements(shape) - head) * OWN_BITS[dtype] + head * of_head) / 8


def cache_bytes(shape: str, context: int) -> int:
    """Bytes of keys and values that a step reads, in bf16 (llama.cpp's f16 is as large)."""
    c = configuration(shape)
    row = 2 * c["num_key_value_heads"] * c["head_dim"] * 2
    return c["num_hidden_layers"] * (context + DECODED // 2) * row


def attention_flops(shape: str, tokens: int) -> int:
    """Scores and weighted values of a prompt, those behind a token left out."""
    c = configuration(shape)
    return 2 * tokens * tokens * c["num_attention_heads"] * c["head_dim"] * c["num_hidden_layers"]
