"""The runtime's door to the compiler; the only module of the runtime that knows the driver.

The driver is imported when something must be compiled, so that running an artifact never loads it.
Whole models are compiled in the calling process (`cached_artifact`), variants for hot shapes in
processes of their own (`compiler.py` starts them, `serve` is what they run): LLVM can abort a
process, and must not take a server down.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc import knobs
from llmc.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.plan import Plan
from llmc.ir.quantization import Quantization
from llmc.runtime.artifact import Artifact
from llmc.runtime.cache import Cache
from llmc.runtime.locate import artifact_key, options_text, this_cpu
from llmc.runtime.progress import Progress, silent
from llmc.runtime.sources import text_key


def cached_artifact(path: Path, target: str, dtype: str | None, cache_dir: Path | None,
                    limits: dict[str, tuple[int, int]], progress: Progress = silent,
                    quantization: Quantization | None = None) -> Artifact:
    """The model's artifact from the cache, compiled first if it is not there."""
    place = cache_dir or knobs.cache_directory()
    key = artifact_key(path, target, dtype, quantization, limits, place, _external_names)

    def build(output: Path) -> None:
        from llmc.codegen.target import Target
        from llmc.driver import compile_model

        own = Target.parse(target)
        if quantization is None:
            compiled = compile_model(path, own, dtype, progress, limits, later=True)
        else:
            from llmc.calibrate import compile_quantized

            compiled = compile_quantized(path, own, quantization, dtype, progress, limits,
                                         later=True)
        compiled.write(output, progress)

    return Cache(place).artifact(key, build)


def _external_names(path: Path) -> list[str]:
    """The files beside an .onnx file that hold its weights."""
    from llmc.frontend.onnx.protobuf import external_files, read_model

    return [str(file.relative_to(path.parent)) for file in external_files(read_model(path), path)]


def cached_graph(graph: Graph, parameters: Mapping[str, np.ndarray], target: str,
                 cache_dir: Path | None, limits: dict[str, tuple[int, int]],
                 progress: Progress = silent, quantization: Quantization | None = None
                 ) -> Artifact:
    """The artifact of a traced graph with these parameters from the cache, or compiled into it."""
    from llmc.frontend.traced_model import traced_model

    if quantization is not None and quantization.calibrate == "always":
        raise LlmcError("a traced graph makes no text to calibrate with: leave calibrate out")
    model = traced_model(graph, parameters)
    key = text_key(f"{model.fingerprint} {target} {sorted(limits.items())} {this_cpu()}"
                   f"{options_text(quantization)}")

    def build(output: Path) -> None:
        from llmc.codegen.target import Target
        from llmc.driver import compile_imported

        compile_imported(model, Target.parse(target), progress, limits,
                         quantization=quantization, later=True).write(output, progress)

    return Cache(cache_dir or knobs.cache_directory()).artifact(key, build)


def onnx_artifact(source: Path | bytes, values: Mapping[str, np.ndarray], target: str,
                  directory: Path, fed: Collection[str] = ()) -> tuple[Path | None, str | None]:
    """Compile an ONNX model into an artifact in the directory; see `driver.compile_onnx`."""
    from llmc.codegen.target import Target
    from llmc.driver import compile_onnx

    compiled, key = compile_onnx(source, Target.parse(target), values, fed)
    return compiled.write(directory / "model.llmc") if compiled else None, key


def onnx_interface(source: Path | bytes) -> tuple[list[tuple], list[tuple]]:
    """(name, type, shape) of an ONNX model's inputs and outputs, as it declares them."""
    from llmc.frontend.onnx import declared_interface

    return declared_interface(source)


def onnx_overridable(source: Path | bytes) -> list[tuple]:
    """(name, type, shape) of the inputs of an ONNX model that have an initializer too."""
    from llmc.frontend.onnx import declared_overridable

    return declared_overridable(source)


def onnx_metadata(source: Path | bytes) -> dict[str, Any]:
    """What an ONNX model says of itself."""
    from llmc.frontend.onnx import declared_metadata

    return declared_metadata(source)


def host_plan(source: Path | bytes, fed: Collection[str] = ()) -> Plan | None:
    """The plan of an ONNX model that has something for the host to do, else None."""
    from llmc.frontend.onnx.plan import host_plan as plan_of

    if isinstance(source, bytes):
        return plan_of(source, fed=fed)
    return plan_of(source.read_bytes(), str(source), fed)


def typed_part(model: bytes, arrays: Mapping[str, np.ndarray],
               varying: Mapping[str, Collection[int]]) -> bytes:
    """A program step's model with the types of its inputs; axes that vary are symbols."""
    from llmc.frontend.onnx.plan import declared_part

    return declared_part(model, arrays, varying)


# ---- the worker process ---------------------------------------------------------------------


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Compile variants until the requests end. A message is 8 bytes of length, then JSON; the
    object code of a good reply ({"info", "seconds", "launches", "bytes"}) follows it. A bad one is
    {"error"}.
    """
    while (message := read_message(requests)) is not None:
        try:
            reply, code = _compile(json.loads(message))
        except Exception as error:  # whatever it was, the parent is told and goes on
            reply, code = {"error": f"{type(error).__name__}: {error}"}, b""
        replies.write(frame(json.dumps(reply).encode()) + code)
        replies.flush()


def _compile(request: Mapping) -> tuple[dict, bytes]:
    from dataclasses import asdict

    from llmc.codegen.target import Target
    from llmc.driver import compile_variant, variant_info
    from llmc.ir.program_text import parse_program
    from llmc.ir.text import parse_graph

    started = time.process_time()  # what it costs: at the lowest priority it may take long
    key = {name: (low, high) for name, (low, high) in request["key"].items()}
    target = Target.parse(request["target"])
    program, code = compile_variant(
        parse_graph(request["graph"]), parse_program(request["program"]), target, key,
        request["schedule"])
    info = variant_info(request["name"], program, code)
    launches = "" if target.kind == "host" else code.files()[f"{target.cpu}.json"].decode()
    return {"info": asdict(info), "bytes": len(code.object), "launches": launches,
            "seconds": time.process_time() - started}, code.object


def frame(message: bytes) -> bytes:
    return struct.pack("<q", len(message)) + message


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message; None when the stream has ended, in the middle of one too."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack("<q", header)
    message = stream.read(length)
    return message if len(message) == length else None


def main() -> None:
    """Entry of a worker: requests on stdin, replies on what was stdout; nobody else's business
    comes before it."""
    os.nice(19)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    serve(sys.stdin.buffer, replies)
