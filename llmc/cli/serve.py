"""llmc serve: an OpenAI-compatible server for one model."""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

from llmc.cli import add_command, add_runtime_options, quantization_of
from llmc.cli.model_path import require_context, require_served
from llmc.errors import LlmcError

EXTRA = ("starlette", "uvicorn", "msgspec", "prometheus_client")
HEADER_BYTES = 64 << 10
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
RUNTIME = ("dtype", "threads", "max_context", "cache_dir", "specialize", "promote_after",
           "code_budget_mb", "max_variants")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def size(text: str) -> int:
    """Bytes, as 8M or 2G."""
    text = text.upper().removesuffix("B").removesuffix("I")
    unit = text[-1:] if text[-1:] in "KMGT" else ""
    return positive(text.removesuffix(unit)) * UNITS[unit]


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise ValueError
    return value


METAVARS = {positive: "N", seconds: "SECONDS", size: "SIZE"}
# Flag, type, default, help. The variable LLMC_FLAG is read where a flag is not given.
FLAGS: tuple[tuple[str, Any, Any, str], ...] = (
    ("host", str, "127.0.0.1", "address to listen on; 0.0.0.0 is every one (default 127.0.0.1: "
                               "this machine only)"),
    ("port", port, 8000, "port to listen on; 0 is any free one (default 8000)"),
    ("api-key", str, None, "key that clients must send as `Authorization: Bearer KEY` (default: "
                           "none). The variable does not show in the list of processes"),
    ("served-name", str, None, "what clients call the model (default: the name of its directory)"),
    ("max-batch", positive, 32, "most sequences that are computed at once (default 32)"),
    ("max-step-tokens", positive, None, "most tokens of a step (default: what suits the model)"),
    ("mixed-step-tokens", positive, None, "most tokens of a step in which some answers go on while "
                                          "prompts are read: fewer make shorter pauses (default: "
                                          "32 a thread, up to 256; on a GPU --max-step-tokens)"),
    ("kv-memory", size, None, "memory for the KV cache, such as 4G (default: what --max-batch and "
                              "--max-context need, at most half of this machine's)"),
    ("queue-limit", positive, 256, "most requests that wait; beyond, 429 (default 256)"),
    ("profile-dir", Path, None, "where profiles and the code of hot shapes are kept, so that the "
                                "next start is hot (default: in the cache)"),
    ("chat-template", Path, None, "Jinja file in place of the model's own chat template"),
    ("max-body", size, 8 << 20, "largest request (default 8M)"),
    ("max-connections", positive, 1024, "most connections; beyond, 503 (default 1024)"),
    ("body-seconds", seconds, 30.0, "time to send a request in (default 30)"),
    ("write-seconds", seconds, 60.0, "time to read a piece of an answer in (default 60)"),
    ("drain-seconds", seconds, 30.0, "time that requests have to finish after SIGTERM (default "
                                     "30)"),
    ("log-level", str, "info", "debug, info, warning or error (default info)"),
)


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "serve", run, "Serve a model with OpenAI's API.",
        "llmc serve path/to/Llama-3.2-1B --port 8000\n"
        "  curl localhost:8000/v1/completions -H 'content-type: application/json' \\\n"
        "    -d '{\"prompt\": \"The sky is\"}'          # and see localhost:8000/dashboard")
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or an artifact "
                        "made by `llmc compile`")
    for name, kind, default, text in FLAGS:
        variable = "LLMC_" + name.upper().replace("-", "_")
        parser.add_argument(f"--{name}", type=kind, default=os.environ.get(variable) or default,
                            help=f"{text} [{variable}]",
                            metavar=METAVARS.get(kind) or name.split("-")[-1].upper())
    parser.add_argument("--otel", action="store_true", default=bool(os.environ.get("LLMC_OTEL")),
                        help="send a span for each request, by OpenTelemetry (extra otel; "
                             "the OTEL_* variables say where) [LLMC_OTEL]")
    add_runtime_options(parser)
    read_variables(parser)


def read_variables(parser: argparse.ArgumentParser) -> None:
    """Give every option that has no variable yet one of its name."""
    for action in parser._actions:  # argparse has no other list of them
        if not action.option_strings or action.dest == "help" or "[LLMC_" in (action.help or ""):
            continue
        variable = "LLMC_" + action.dest.upper()
        action.help = f"{action.help} [{variable}]"
        if text := os.environ.get(variable):
            action.default = True if action.nargs == 0 else text
        if action.choices is not None:
            action.type = one_of(action.type or str, list(action.choices))


def one_of(kind: Any, choices: list[Any]) -> Any:
    """A type of arguments that refuses other values: argparse checks defaults by nothing else."""
    def read(text: str) -> Any:
        if (value := kind(text)) not in choices:
            allowed = ", ".join(map(str, choices))
            raise argparse.ArgumentTypeError(f"must be one of {allowed}, got {text[:40]!r}")
        return value
    return read


def run(arguments) -> int:
    require_extra()
    from llmc.server.logs import LEVELS, set_up_logs

    if arguments.log_level not in LEVELS:
        raise LlmcError(f"--log-level must be one of {', '.join(LEVELS)}, got "
                        f"{arguments.log_level!r}")
    set_up_logs(arguments.log_level)
    return serve(arguments)


def require_extra() -> None:
    """LlmcError if what the server is made of is not installed."""
    for module in EXTRA:
        try:
            importlib.import_module(module)
        except ImportError:
            raise LlmcError(f"the server needs {module}, which is not installed: "
                            "pip install '.[server]' in llmc's checkout") from None


def serve(arguments: argparse.Namespace) -> int:
    from llmc.server.process import Process

    options = serve_options(arguments)
    listener = listen(arguments.host, arguments.port)
    process = Process(options, connections=arguments.max_connections,
                      header_bytes=HEADER_BYTES, drain_seconds=arguments.drain_seconds)
    error = process.run(listener)
    if error:
        print(f"llmc: {error}", file=sys.stderr)
    return 1 if error else 0


def serve_options(arguments: argparse.Namespace):
    """What the command line says, for the server; LlmcError if a file is missing, the model is none
    that can be served or has no such context, or there is no GPU."""
    from llmc.runtime.targets import resolve_target
    from llmc.server.model_host import ServeOptions

    require_served(arguments.model)
    require_context(arguments.model, arguments.max_context)
    if arguments.target == "nvptx":
        resolve_target(arguments.target)
    if arguments.chat_template is not None and not arguments.chat_template.exists():
        raise LlmcError(f"{arguments.chat_template}: no such file or directory")
    runtime = {name: getattr(arguments, name) for name in RUNTIME}
    runtime |= {"kv_memory": arguments.kv_memory, "profile_dir": arguments.profile_dir,
                "quantize": quantization_of(arguments)}
    return ServeOptions(
        arguments.model, arguments.served_name or Path(arguments.model).resolve().name,
        arguments.target, runtime, arguments.max_batch, arguments.max_step_tokens,
        arguments.mixed_step_tokens, arguments.queue_limit, arguments.api_key,
        arguments.chat_template, arguments.max_body, arguments.body_seconds,
        arguments.write_seconds, arguments.otel)


def listen(host: str, number: int) -> socket.socket:
    """A listening socket; LlmcError if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise LlmcError(f"cannot listen on {host}:{number}: {error.strerror or error}; choose "
                        "another with --host and --port") from error
    return listener
