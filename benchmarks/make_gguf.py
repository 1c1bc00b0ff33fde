#!/usr/bin/env python3
"""Write a Llama checkpoint as GGUF for llama.cpp, without a tokenizer: see make_model.py.

    make_gguf.py --type bf16|f32|q8_0|q4_0 CHECKPOINT OUT.gguf

Every matrix gets the type, the (tied) embedding too; norms are f32. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llmc.frontend.model import load_model

TYPES = ("f32", "bf16", "q8_0", "q4_0")
PIECE = 1 << 22  # elements quantised at once
THREADS = 4
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        number, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_NAMES[rest]}.weight"
    return f"{_NAMES[stem]}.weight"


def write_header(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")


def encoded(array: np.ndarray, kind: Any) -> np.ndarray:
    """A matrix in a GGML type, in pieces of rows by several threads."""
    from gguf import quants

    rows = max(1, PIECE // array.shape[1])
    pieces = [array[first:first + rows] for first in range(0, array.shape[0], rows)]
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(lambda piece: quants.quantize(piece.astype(np.float32), kind), pieces)
        return np.concatenate(list(done))


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in load_model(checkpoint).parameters.items():
        yield name, tensor.read()


def make_gguf(checkpoint: Path, output: Path, kind: str) -> Path:
    """Write the file; returns its path."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(output, "llama")
    write_header(writer, json.loads((checkpoint / "config.json").read_text()))
    for name, array in tensors(checkpoint):
        if array.ndim == 1 or kind == "f32":
            writer.add_tensor(gguf_name(name), array.astype(np.float32))
        else:
            data = array.view(np.uint8) if array.dtype.itemsize == 2 and kind == "bf16" \
                else encoded(array, wanted)
            writer.add_tensor(gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=TYPES, required=True)
    arguments = parser.parse_args()
    make_gguf(arguments.checkpoint, arguments.output, arguments.type)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
