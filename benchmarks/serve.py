#!/usr/bin/env python3
"""llmc's server and llama.cpp's under the same load: one shape, random weights, one dtype.

    serve.py --llama-server PATH [--shape 110m] [--dtype bf16] [--clients 1,8,32] [--rounds 3]

Both servers hold the model at the same time, and take turns, so that what else the machine does
meets both. Needs `pip install gguf` to write the weights for llama-server; without --llama-server
only llmc is measured. The prompts are random ids, so nothing is found in a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from make_model import LLAMA, make_model

from llmc.cli.bench_serve import server_of, table
from llmc.cli.serve import listen
from llmc.frontend.safetensors import open_safetensors
from llmc.server.load import Load, run_load, summarize

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight", "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight"}


def write_gguf(checkpoint: Path, output: Path, dtype: str) -> None:
    """The same weights for llama.cpp, with a vocabulary of bytes and made-up words. The rows of q
    and k are in another order than rope expects there: that changes the text, not the time."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    write_vocabulary(writer, config["vocab_size"])
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for name, stored in open_safetensors(checkpoint / "model.safetensors").tensors.items():
        array = np.asarray(stored.read()).astype(np.float32)
        if array.ndim == 2 and dtype != "f32":
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def write_vocabulary(writer, size: int) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *([6] * 256)]
    words += [f"w{number}" for number in range(len(words), size)]
    kinds += [1] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@contextmanager
def llama_server(program: str, model: Path, threads: int, clients: int, context: int
                 ) -> Iterator[str]:
    """A llama-server with a slot for each client."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [program, "-m", str(model), "-t", str(threads), "-tb", str(threads), "-np", str(clients),
         "-c", str(context * clients), "--host", "127.0.0.1", "--port", str(port), "--no-webui",
         "-fit", "off"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                with urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def compare(urls: dict[str, str], load: Load, rounds: int) -> dict[str, list[dict]]:
    """Figures of every round of every server; who comes first changes from round to round."""
    figures: dict[str, list[dict]] = {name: [] for name in urls}
    for number in range(rounds):
        for name in list(urls) if number % 2 == 0 else reversed(urls):
            found = summarize(*asyncio.run(run_load(urls[name], load)))
            figures[name].append(found)
            print(f"--- {name}, {load.clients} clients, round {number + 1}\n{table(found)}",
                  file=sys.stderr, flush=True)
    return figures


def measure(arguments: argparse.Namespace, directory: Path) -> list[dict]:
    checkpoint = make_model(arguments.shape, directory / "model", arguments.dtype)
    weights = directory / "model.gguf"
    if arguments.llama_server:
        write_gguf(checkpoint, weights, arguments.dtype)
    rows = []
    for clients in map(int, arguments.clients.split(",")):
        load = Load(clients=clients, seconds=arguments.seconds, prompt_tokens=arguments.prompt,
                    output_tokens=arguments.output, longest=arguments.context // 2 - 1,
                    vocabulary=256, seed=clients)
        options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--max-batch",
                   str(max(32, clients)), "--max-context", str(arguments.context)]
        with server_of(str(checkpoint), options) as own:
            if not arguments.llama_server:
                rows.append(row(clients, compare({"llmc": own}, load, arguments.rounds)))
                continue
            with llama_server(arguments.llama_server, weights, arguments.threads, clients,
                              arguments.context) as other:
                urls = {"llmc": own, "llama-server": other}
                rows.append(row(clients, compare(urls, load, arguments.rounds)))
    return rows


def row(clients: int, figures: dict[str, list[dict]]) -> dict:
    """Medians of the rounds."""
    found: dict = {"clients": clients}
    for name, rounds in figures.items():
        found[name] = {
            "output_tokens_per_second": statistics.median(
                each["output_tokens_per_second"] for each in rounds),
            "first_token_p50": statistics.median(each["first_token"]["p50"] for each in rounds),
            "token_p50": statistics.median(each["token"]["p50"] for each in rounds),
            "errors": sum(each["requests"] - each["completed"] for each in rounds)}
    if len(figures) == 2:
        found["ratio"] = statistics.median(
            a["output_tokens_per_second"] / b["output_tokens_per_second"]
            for a, b in zip(*figures.values(), strict=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", default="", metavar="PATH")
    parser.add_argument("--shape", choices=list(LLAMA), default="110m")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="median tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="median tokens of an answer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for found in measure(arguments, Path(directory)):
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
