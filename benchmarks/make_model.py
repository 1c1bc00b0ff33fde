#!/usr/bin/env python3
"""Write a Llama- or BERT-shaped checkpoint with seeded random weights, for benchmarks.

    make_model.py --shape 1b|8b|110m|bert-base [--layers N] [--dtype bf16|f32] [--tiled] OUT

Weights are normal with a standard deviation of 0.02, norms near 1. The tokenizer is that of the
embedded model with made-up words for the rest of the vocabulary: its text means nothing. --tiled
repeats one block of such values in every tensor, for which seconds are enough at any size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

LLAMA = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
           "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 131072},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
           "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 131072},
    "110m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": 32000,
             "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 2048},
}
BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
DTYPES = {"bf16": ("BF16", ml_dtypes.bfloat16), "f32": ("F32", np.float32)}
BLOCK = 1 << 24  # values made at once
WRITERS = 8
FIRST_STEP = 100_003  # values between where two tiled tensors begin in the block
TOKENIZER = Path(__file__).parent.parent / "llmc" / "data" / "stories260K"

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def llama_tensors(c: dict) -> Shapes:
    hidden, inner, size = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (q, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, q)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def bert_tensors(c: dict) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    yield "embeddings.word_embeddings.weight", (c["vocab_size"], hidden)
    yield "embeddings.position_embeddings.weight", (c["max_position_embeddings"], hidden)
    yield "embeddings.token_type_embeddings.weight", (c["type_vocab_size"], hidden)
    yield from layer_norm("embeddings.LayerNorm", hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            yield from linear(f"{prefix}attention.self.{name}", hidden, hidden)
        yield from linear(prefix + "attention.output.dense", hidden, hidden)
        yield from layer_norm(prefix + "attention.output.LayerNorm", hidden)
        yield from linear(prefix + "intermediate.dense", inner, hidden)
        yield from linear(prefix + "output.dense", hidden, inner)
        yield from layer_norm(prefix + "output.LayerNorm", hidden)
    yield from linear("pooler.dense", hidden, hidden)


def linear(name: str, rows: int, columns: int) -> Shapes:
    yield name + ".weight", (rows, columns)
    yield name + ".bias", (rows,)


def layer_norm(name: str, size: int) -> Shapes:
    yield name + ".weight", (size,)
    yield name + ".bias", (size,)


def write_safetensors(path: Path, tensors: Shapes, dtype: str, seed: int, tiled: bool) -> None:
    """Header first (sizes are known), then one tensor at a time."""
    code, numpy_dtype = DTYPES[dtype]
    shapes, header, offset = list(tensors), {}, 0
    for name, shape in shapes:
        size = int(np.prod(shape)) * np.dtype(numpy_dtype).itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.SFC64(seed))
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if tiled:
            file.truncate(file.tell() + offset)
            write_tiled(file, random, header, numpy_dtype)
            return
        for name, shape in shapes:
            for part in random_parts(random, name, shape):
                file.write(part.astype(numpy_dtype).tobytes())


def write_tiled(file, random: np.random.Generator, header: dict, numpy_dtype) -> None:
    """Every tensor is one block of random values again and again; several threads write.

    Each begins at another value: engines that keep equal tensors once would read less.
    """
    start = file.tell()
    file.flush()
    blocks = {name: next(random_parts(random, name, (BLOCK,))).astype(numpy_dtype).view(np.uint8)
              for name in ("weight", "norm.weight")}

    names = list(header)

    def write(name: str) -> None:
        begin, end = header[name]["data_offsets"]
        block = blocks["norm.weight" if is_norm(name) else "weight"]
        first = names.index(name) * FIRST_STEP % BLOCK * np.dtype(numpy_dtype).itemsize
        block = np.concatenate((block[first:], block[:first]))
        for at in range(begin, end, block.size):
            part = memoryview(block)[:min(block.size, end - at)]
            while part:  # a call may write less than it is given
                written = os.pwrite(file.fileno(), part, start + at)
                part, at = part[written:], at + written

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, header))


def random_parts(random: np.random.Generator, name: str, shape: tuple[int, ...]):
    """A tensor's values in parts of at most 64 MiB."""
    rest = int(np.prod(shape))
    mean = 1.0 if is_norm(name) else 0.0
    while rest:
        count = min(rest, BLOCK)
        yield random.standard_normal(count, np.float32) * np.float32(0.02) + np.float32(mean)
        rest -= count


def is_norm(name: str) -> bool:
    """Whether a tensor's values are near 1."""
    return "norm" in name.lower() and name.endswith("weight")


def make_model(shape: str, output: Path, dtype: str = "bf16", layers: int | None = None,
               seed: int = 0, tiled: bool = False) -> Path:
    """Write the checkpoint directory; returns it."""
    config = dict(BERT if shape == "bert-base" else LLAMA[shape])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    bert = shape == "bert-base"
    output.mkdir(parents=True, exist_ok=True)
    tensors = bert_tensors(config) if bert else llama_tensors(config)
    write_safetensors(output / "model.safetensors", tensors, dtype, seed, tiled)
    common = {"torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype]}
    if bert:
        common |= {"architectures": ["BertModel"], "model_type": "bert"}
    else:
        common |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                   "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
                   "bos_token_id": 1, "eos_token_id": 2}
    (output / "config.json").write_text(json.dumps({**config, **common}, indent=1))
    shutil.copyfile(TOKENIZER / "tokenizer_config.json", output / "tokenizer_config.json")
    write_tokenizer(output / "tokenizer.json", config["vocab_size"])
    return output


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """The embedded model's tokenizer, its vocabulary filled up with words that no text holds."""
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words.update({f"<{number}>": number for number in range(len(words), vocabulary)})
    path.write_text(json.dumps(tokenizer))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--shape", choices=[*LLAMA, "bert-base"], required=True)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiled", action="store_true", help="repeat one block of values")
    arguments = parser.parse_args()
    make_model(arguments.shape, arguments.output, arguments.dtype, arguments.layers,
               arguments.seed, arguments.tiled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
