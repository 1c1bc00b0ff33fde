#!/usr/bin/env python3
"""llmc's server and llama.cpp's under the same load: one shape, random weights, one dtype.

    serve.py --llama-server PATH [--shape 110m] [--dtype bf16] [--clients 1,8,32] [--rounds 3]
    serve.py --soak 60 [--clients 64]

Both servers hold the model at the same time, answer the same requests, and take turns, so that what
else the machine does meets both. Each --llama-options is a further llama-server that has these:
which are its best differs from machine to machine, and the best counts. Needs `pip install gguf` to
write the weights for llama-server; without --llama-server only llmc is measured. The prompts are
random ids, so nothing is found in a prefix cache. --soak loads llmc alone for that many seconds;
afterwards no request may have failed, and its metrics may not show a request or page that is left.
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
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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


LEFT = ("llmc:num_requests_running", "llmc:num_requests_waiting", "llmc:kv_cache_usage_perc",
        "llmc:engine_failed_steps_total")  # nothing, when all is over


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
def llama_server(program: str, model: Path, threads: int, clients: int, context: int,
                 more: list[str]) -> Iterator[str]:
    """A llama-server with a slot for each client, and without what can only cost it time here: the
    copies of prompts that it keeps for later ones, memory that is mapped, samplers beside the
    likeliest token."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [program, "-m", str(model), "-t", str(threads), "-tb", str(threads), "-np", str(clients),
         "-c", str(context * clients), "--host", "127.0.0.1", "--port", str(port), "--no-webui",
         "-fit", "off", "--load-mode", "none", "--cache-ram", "0", "--samplers", "top_k",
         "--top-k", "1", *more],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{program} ended with status {process.returncode}")
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
    for url in urls.values():  # not counted: memory that is touched for the first time, and such
        asyncio.run(run_load(url, replace(load, requests=2 * load.clients)))
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
        load = make_load(arguments, clients, requests=max(8, arguments.requests * clients))
        options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--max-batch",
                   str(max(32, clients)), "--max-context", str(arguments.context)]
        with ExitStack() as stack:
            urls = {"llmc": stack.enter_context(server_of(str(checkpoint), options))}
            for more in ["", *arguments.llama_options] if arguments.llama_server else []:
                urls[f"llama-server {more}".strip()] = stack.enter_context(llama_server(
                    arguments.llama_server, weights, arguments.threads, clients,
                    arguments.context, more.split()))
            rows.append(row(clients, compare(urls, load, arguments.rounds)))
    return rows


def make_load(arguments: argparse.Namespace, clients: int, requests: int | None = None,
              seconds: float = 3600.0) -> Load:
    return Load(clients=clients, requests=requests, seconds=seconds,
                prompt_tokens=arguments.prompt, output_tokens=arguments.output,
                longest=arguments.context // 2 - 1, vocabulary=256, seed=clients)


def soak(arguments: argparse.Namespace, directory: Path) -> dict:
    """Load with as many clients as are asked for; what was answered, and what is left of it."""
    checkpoint = make_model(arguments.shape, directory / "model", arguments.dtype)
    clients = max(map(int, arguments.clients.split(",")))
    load = make_load(arguments, clients, seconds=arguments.soak)
    options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--max-batch",
               str(clients), "--max-context", str(arguments.context)]
    with server_of(str(checkpoint), options) as url:
        found = summarize(*asyncio.run(run_load(url, load)))
        time.sleep(0.5)  # for the last connections to be closed
        left = {name: metric(url, name) for name in LEFT}
        answered = metric(url, "llmc:request_success_total")
    if found["errors"] or any(left.values()) or answered != found["requests"]:
        raise SystemExit(f"errors {found['errors']}, left {left}, {answered} of "
                         f"{found['requests']} requests succeeded")
    return {"clients": clients, **found, "left": left}


def metric(url: str, name: str) -> float:
    """The sum over a metric's labels."""
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines
               if line.startswith((f"{name} ", f"{name}{{")))


def row(clients: int, figures: dict[str, list[dict]]) -> dict:
    """Medians of the rounds. ratio: of output tokens a second to those of the best other."""
    found: dict = {"clients": clients}
    for name, rounds in figures.items():
        found[name] = {
            "output_tokens_per_second": statistics.median(
                each["output_tokens_per_second"] for each in rounds),
            "first_token_p50": statistics.median(each["first_token"]["p50"] for each in rounds),
            "token_p50": statistics.median(each["token"]["p50"] for each in rounds),
            "errors": sum(each["requests"] - each["completed"] for each in rounds)}
    own, *others = figures.values()
    if others:
        found["ratio"] = min(statistics.median(
            a["output_tokens_per_second"] / b["output_tokens_per_second"]
            for a, b in zip(own, other, strict=True)) for other in others)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", default="", metavar="PATH")
    parser.add_argument("--llama-options", action="append", default=[], metavar="'OPTIONS'")
    parser.add_argument("--shape", choices=list(LLAMA), default="110m")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--clients", default="")
    parser.add_argument("--requests", type=int, default=8, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="median tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="median tokens of an answer")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args()
    arguments.clients = arguments.clients or ("64" if arguments.soak else "1,8,32")
    with tempfile.TemporaryDirectory() as directory:
        if arguments.soak:
            print(json.dumps(soak(arguments, Path(directory))), flush=True)
            return 0
        for found in measure(arguments, Path(directory)):
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
