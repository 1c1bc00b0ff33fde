"""llmc compile: a model to an artifact, or to code, header and weights for C."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from llmc.cli import add_command, add_quantization_options, quantization_of
from llmc.errors import LlmcError


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "compile", run, "Compile a model ahead of time.",
        "llmc compile path/to/Llama-3.2-1B -o llama.llmc\n"
        "  llmc compile path/to/Llama-3.2-1B --emit obj,header -o llama.o")
    parser.add_argument("model", metavar="MODEL", help=".onnx file or Hugging Face directory")
    parser.add_argument("-o", "--output", required=True, metavar="OUT",
                        help="artifact directory to write (or with --emit: the file)")
    parser.add_argument("--target", default="host",
                        help="host, nvptx, or CPU such as x86_64:znver5, x86_64:x86-64-v3, "
                             "aarch64:neoverse-v2 (default: this machine)")
    parser.add_argument("--arch", default=None, metavar="ARCH,...",
                        help="with --target nvptx: the GPUs to compile for; needs no GPU "
                             "(default: sm_80,sm_90a)")
    parser.add_argument("--dtype", default=None, help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--shape", default="", metavar="NAME=LOW:HIGH,...",
                        help="narrow the ranges of symbols, such as tokens=1:512")
    parser.add_argument("--emit", default="", metavar="KIND,...",
                        help="for C instead of an artifact: obj, so (needs cc), header; several at "
                             "once lie side by side, with the weights in NAME.weights")
    parser.add_argument("--prefix", default=None,
                        help="with --emit: what names in C begin with (default: llmc_)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_quantization_options(parser)


def run(arguments) -> int:
    from llmc.cli.progress import progress_bar
    emit, quantization = _emitter(arguments), quantization_of(arguments)
    _check_output(Path(arguments.output), artifact=emit is None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written goes
    started = time.perf_counter()
    with progress_bar() as progress:
        compiled = _compile(arguments, quantization, progress)
        paths = emit(compiled, progress) if emit else [compiled.write(arguments.output, progress)]
    seconds = time.perf_counter() - started
    if emit:
        _report_files(paths, compiled, seconds, arguments.json)
    else:
        _report(paths[0], compiled, seconds, arguments.json)
    return 0


def _check_output(output: Path, artifact: bool) -> None:
    """LlmcError before anything is compiled, where the parent of the output is no directory (more
    likely a slip than a wish for one), or where something else than an artifact is in its place."""
    if not output.name:
        raise LlmcError(f"cannot write {output}: --output must end in a name, such as model.llmc")
    if not output.parent.is_dir():
        raise LlmcError(f"cannot write {output}: {output.parent} is no directory")
    if artifact:
        from llmc.driver import check_replaceable

        check_replaceable(output)


def _compile(arguments, quantization, progress):
    """The compiled model, not yet written."""
    target, limits = _target(arguments), parse_shape(arguments.shape)
    later = not arguments.emit
    if quantization is None:
        from llmc.driver import compile_model

        return compile_model(arguments.model, target, arguments.dtype, progress, limits,
                             later=later)
    from llmc.calibrate import compile_quantized

    return compile_quantized(arguments.model, target, quantization, arguments.dtype, progress,
                             limits, later)


def _target(arguments):
    """The target of --target and --arch."""
    from llmc.codegen.target import Target

    if arguments.arch is None:
        return Target.parse(arguments.target)
    if arguments.target != "nvptx":
        raise LlmcError("--arch names GPUs: it goes with --target nvptx")
    if not arguments.arch.strip(", "):
        raise LlmcError("--arch names no GPU: as in --arch sm_80,sm_90a")
    return Target.parse(f"nvptx:{arguments.arch}")


def _emitter(arguments):
    """(compiled, progress) -> files for C, or None without --emit; what is asked for is checked
    here, before anything is compiled."""
    if not arguments.emit:
        if arguments.prefix is not None:
            raise LlmcError("--prefix is for --emit: an artifact has no names in C")
        return None
    from llmc.emit import check_request, emit

    if _target(arguments).kind == "nvptx":
        raise LlmcError("--emit writes host code for C: it does not go with --target nvptx")
    kinds = [kind.strip() for kind in arguments.emit.split(",")]
    prefix = "llmc_" if arguments.prefix is None else arguments.prefix
    check_request(kinds, prefix)
    return lambda compiled, progress: emit(compiled, kinds, arguments.output, prefix, progress)


def parse_shape(text: str) -> dict[str, tuple[int, int]]:
    """`tokens=1:512,sequences=1` as ranges."""
    ranges = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        low, colon, high = value.partition(":")
        try:
            ranges[name.strip()] = (int(low), int(high if colon else low))
        except ValueError:
            raise LlmcError(f"--shape: {item!r} is not NAME=LOW:HIGH") from None
        if not equals:
            raise LlmcError(f"--shape: {item!r} is not NAME=LOW:HIGH")
    return ranges


def _report(path: Path, compiled, seconds: float, as_json: bool) -> None:
    sizes = {name: len(code.object) for name, code in compiled.codes.items()}
    weights = (path / "weights.bin").stat().st_size
    rate = weights / max(compiled.timings["weights"], 1e-9) / 1e9
    compile_seconds = sum(v for name, v in compiled.timings.items() if name != "weights")
    if as_json:
        report = {"artifact": str(path), "seconds": seconds, "compile_seconds": compile_seconds,
                  "timings": compiled.timings, "object_bytes": sizes, "weight_bytes": weights,
                  "weight_gb_per_second": rate}
        print(json.dumps(report | _kernels(compiled) | _quantization(compiled)))
        return
    print(f"{path}: compiled in {compile_seconds:.2f} s "
          f"({', '.join(f'{n} {s / 1024:.0f} KiB' for n, s in sizes.items())}), "
          f"{weights / 1e6:.1f} MB of weights packed at {_rate(rate)}")
    if compiled.target.kind == "nvptx":
        for architecture, found in _kernels(compiled).get("kernels", {}).items():
            print(f"{architecture}: {found['count']} kernels of at most {found['most_registers']} "
                  f"registers, {found['spill_bytes']} bytes of registers spilled")
        _tell_of_missing_assembler()
    if compiled.report is not None:
        from llmc.cli.inspect_quantization import summary

        print(*summary(compiled.report), sep="\n")
        if compiled.target.kind == "nvptx":
            print("a GPU multiplies floats: what these codes stand for takes the room of floats "
                  "there, in the artifact too")


def _tell_of_missing_assembler() -> None:
    from llmc.codegen.nvptx.assemble import is_available

    if not is_available():
        print("PTX only: machine code for GPUs needs nvJitLink (pip install '.[cuda]' in llmc's "
              "checkout); without it the driver assembles the PTX at every start")


def _kernels(compiled) -> dict[str, Any]:
    """What JSON has about the assembled kernels, by architecture: nothing for a host, or where the
    driver assembles."""
    if compiled.target.kind != "nvptx":
        return {}
    kernels: dict[str, list] = {}
    for code in compiled.codes.values():
        for architecture, assembled in code.assembled.items():
            kernels.setdefault(architecture, []).extend(assembled.report)
    return {"kernels": {architecture: {
        "count": len(found), "most_registers": max(kernel.registers for kernel in found),
        "spill_bytes": sum(kernel.spill_bytes for kernel in found)}
        for architecture, found in kernels.items() if found}}


def _quantization(compiled) -> dict[str, Any]:
    """What JSON has about quantisation: nothing, where weights stay as the model has them."""
    if compiled.report is None:
        return {}
    from llmc.cli.inspect_quantization import totals

    return {"quantization": totals(compiled.report)}


def _rate(gigabytes: float) -> str:
    """Of small weights, packed in less time than it takes to begin, there are no GB a second."""
    return f"{gigabytes:.2f} GB/s" if gigabytes >= 0.1 else f"{gigabytes * 1e3:.2g} MB/s"


def _report_files(paths: list[Path], compiled, seconds: float, as_json: bool) -> None:
    """What was emitted for C."""
    sizes = {str(path): path.stat().st_size for path in paths}
    if as_json:
        print(json.dumps({"files": sizes, "seconds": seconds, "timings": compiled.timings}))
        return
    for name, size in sizes.items():
        print(f"{name}: {size:,} bytes")
