"""Llama and BERT steps of any size, made with `make`: what the pass tests run on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.ir.dims import symbol
from llmc.ir.dtypes import DType, dtype
from llmc.ir.graph import Graph, Node, TensorType
from llmc.ir.ops import PAGE, constant, make
from llmc.ir.program import QUANTIZED_MATMUL, Capabilities

TOKENS, SEQUENCES, ROWS = symbol("tokens"), symbol("sequences"), symbol("rows", 0)
WIDTH, POOL = symbol("table_width"), symbol("pool_pages")
F32, I32 = dtype("f32"), dtype("i32")


def tensor(name: str, type_: DType, *shape) -> Node:
    return make("input", name=name, type=TensorType(type_, shape))


def weight(name: str, *shape: int, type_: DType = F32) -> Node:
    return make("parameter", name=name, type=TensorType(type_, shape))


def linear(x: Node, name: str, width: int, bias: bool = False) -> Node:
    """x @ transpose(w) (+ bias), as checkpoints store it."""
    matrix = make("transpose", weight(f"{name}.weight", width, x.shape[-1]), permutation=(1, 0))
    y = make("matmul", x, matrix)
    return make("add", y, weight(f"{name}.bias", width)) if bias else y


def heads(x: Node, count: int) -> Node:
    return make("reshape", x, shape=(x.shape[0], count, x.shape[1] // count))


def merged(x: Node) -> Node:
    return make("reshape", x, shape=(x.shape[0], x.shape[1] * x.shape[2]))


def llama(layers: int = 2, hidden: int = 24, query: int = 4, kv: int = 2, inner: int = 40,
          vocab: int = 33, bias: bool = False) -> Graph:
    """A Llama step, as the models trace it: paged cache, tied embedding, logits of some rows."""
    ids, positions, sequence = (tensor(name, I32, TOKENS)
                                for name in ("ids", "positions", "sequence"))
    offsets = tensor("offsets", I32, SEQUENCES + 1)
    page_table = tensor("page_table", I32, SEQUENCES, WIDTH)
    rows = tensor("rows", I32, ROWS)
    size = hidden // query
    embedding = weight("embed.weight", vocab, hidden)
    x = make("gather", embedding, ids, axis=0)
    angles = make("mul", make("reshape", make("cast", positions, dtype=F32), shape=(TOKENS, 1)),
                  constant([[0.5**i for i in range(size // 2)]], F32))
    cos, sin = make("cos", angles), make("sin", angles)
    updates = []

    def cache(name: str, values: Node) -> Node:
        state = make("state", name=name, kind="paged", group="full",
                     type=TensorType(F32, (POOL, PAGE, kv, size)))
        grown = make("cache_append", state, values, page_table, sequence, positions)
        updates.append((state, grown))
        return grown

    for layer in range(layers):
        name = f"layers.{layer}"
        normed = make("rms_norm", x, weight(f"{name}.norm1.weight", hidden), epsilon=1e-5)
        q, k, v = (heads(linear(normed, f"{name}.attn.{part}_proj", count * size, bias), count)
                   for part, count in (("q", query), ("k", kv), ("v", kv)))
        q = make("rope", q, cos, sin, interleaved=False)
        keys = cache(f"{name}.k", make("rope", k, cos, sin, interleaved=False))
        values = cache(f"{name}.v", v)
        attended = make("paged_attention", q, keys, values, page_table, sequence, positions,
                        offsets, scale=size**-0.5)
        x = make("add", x, linear(merged(attended), f"{name}.attn.o_proj", hidden, bias))
        normed = make("rms_norm", x, weight(f"{name}.norm2.weight", hidden), epsilon=1e-5)
        gate = linear(normed, f"{name}.mlp.gate_proj", inner, bias)
        up = linear(normed, f"{name}.mlp.up_proj", inner, bias)
        activated = make("mul", make("silu", gate), up)
        x = make("add", x, linear(activated, f"{name}.mlp.down_proj", hidden, bias))
    wanted = make("gather", x, rows, axis=0)
    normed = make("rms_norm", wanted, weight("norm.weight", hidden), epsilon=1e-5)
    logits = make("matmul", normed, make("transpose", embedding, permutation=(1, 0)))
    return Graph("llama", (ids, positions, sequence, offsets, page_table, rows),
                 (("logits", logits),), tuple(updates))


def bert(layers: int = 2, hidden: int = 24, count: int = 4, inner: int = 40,
         vocab: int = 33) -> Graph:
    """A BERT step over packed tokens: last_hidden_state."""
    ids, positions, types = (tensor(name, I32, TOKENS)
                             for name in ("ids", "positions", "token_types"))
    offsets = tensor("offsets", I32, SEQUENCES + 1)

    def norm(x: Node, name: str) -> Node:
        return make("layer_norm", x, weight(f"{name}.weight", hidden),
                    weight(f"{name}.bias", hidden), epsilon=1e-12)

    parts = [make("gather", weight(f"{name}.weight", extent, hidden), index, axis=0)
             for name, extent, index in (("word", vocab, ids), ("position", 64, positions),
                                         ("token_type", 2, types))]
    x = norm(make("add", make("add", parts[0], parts[1]), parts[2]), "embed_norm")
    for layer in range(layers):
        name = f"layer.{layer}"
        q, k, v = (heads(linear(x, f"{name}.{part}", hidden, True), count)
                   for part in ("query", "key", "value"))
        attended = make("packed_attention", q, k, v, offsets, scale=(hidden // count) ** -0.5,
                        causal=False)
        x = norm(make("add", linear(merged(attended), f"{name}.out", hidden, True), x),
                 f"{name}.norm1")
        middle = make("gelu", linear(x, f"{name}.up", inner, True))
        x = norm(make("add", linear(middle, f"{name}.down", hidden, True), x), f"{name}.norm2")
    return Graph("bert", (ids, positions, types, offsets), (("last_hidden_state", x),))


CAPABILITIES = Capabilities(
    "test", vector_lanes=8, matmul_rows=6, panel_columns=16, few_rows=8, bf16_dot=False,
    kernels=frozenset({"sigmoid", "silu", "softplus", "gelu", "rope", "attention",
                       "packed_attention", "cache_append", "paged_attention", QUANTIZED_MATMUL}))


# ---- values ------------------------------------------------------------------------------------


def parameters_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for every parameter of a graph that a model hands in."""
    random = np.random.default_rng(seed)
    return {
        node["name"]: (random.standard_normal(node.shape) * 0.3).astype(node.dtype.numpy)
        for node in graph.parameters()
    }


def step_of(graph: Graph, lengths: Sequence[int] = (5, 1, 17), past: Sequence[int] = (0, 40, 3)
            ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, states): sequences of these lengths, after `past` tokens that are in the cache."""
    random = np.random.default_rng(1)
    tokens, width = sum(lengths), 2
    table = random.permutation(len(lengths) * width).reshape(len(lengths), width)
    values = {
        "ids": random.integers(0, 33, tokens),
        "positions": np.concatenate(
            [np.arange(p, p + n) for n, p in zip(lengths, past, strict=True)]),
        "token_types": random.integers(0, 2, tokens),
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "offsets": np.cumsum([0, *lengths]),
        "page_table": table,
        "rows": np.cumsum(lengths) - 1,
    }
    inputs = {node["name"]: values[node["name"]].astype(np.int32) for node in graph.inputs}
    states = {
        node["name"]: random.standard_normal((table.size, *node.shape[1:])).astype(np.float32)
        for node in graph.states()
    }
    return inputs, states
