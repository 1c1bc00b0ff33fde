"""The `llmc` command. One module per command: `add(subparsers)` declares, `run(arguments)` does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import __version__, knobs
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.ir.quantization import Quantization

COMMANDS = ("generate", "compile", "run", "bench", "inspect", "capture", "compare",
            "devices", "cache", "profile", "serve", "bench-serve")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status: 0, or 1 with one line on stderr, or 2 for a wrong command line."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as it runs)
    try:
        arguments = make_parser(argv[0] if argv else "").parse_args(argv)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except LlmcError as error:
        print(f"llmc: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"llmc: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("llmc: interrupted", file=sys.stderr, flush=True)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # without waiting for threads: LLVM cannot be interrupted
    return 1


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of that command's line; of every line, unless command is one of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="llmc", description="Compile transformer models with LLVM alone, and run them.",
        epilog="MODEL is an .onnx file, a Hugging Face directory, or an artifact made by "
               "`llmc compile` (loading an artifact runs its code). `llmc COMMAND --help` has "
               "an example for each command.")
    parser.add_argument("--version", action="version", version=f"llmc {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in (command,) if command in COMMANDS else COMMANDS:
        importlib.import_module(f"llmc.cli.{name.replace('-', '_')}").add(subparsers)
    return parser


def add_command(subparsers, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose --help shows an example."""
    parser = subparsers.add_parser(
        name, help=summary, description=summary, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def add_target_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where a model runs, and in which dtype; each option has an LLMC_* variable too."""
    group = parser.add_argument_group("runtime")
    group.add_argument("--target", default=os.environ.get("LLMC_TARGET", "host"),
                       help="where to run: host, nvptx (an NVIDIA GPU) or auto (default: host) "
                            "[LLMC_TARGET]")
    group.add_argument("--dtype", default=os.environ.get("LLMC_DTYPE"),
                       help="compute dtype, such as f32 or bf16 (default: the checkpoint's) "
                            "[LLMC_DTYPE]")
    group.add_argument("--threads", type=int, default=None, metavar="N",
                       help="host threads (default: all cores; for a small model as many as it "
                            "pays for) [LLMC_THREADS]")
    return group


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command which runs a model has; each has an LLMC_* variable too."""
    group = add_target_options(parser)
    add_quantization_options(parser)
    group.add_argument("--max-context", type=int, default=knobs.positive("LLMC_MAX_CONTEXT"),
                       metavar="N",
                       help="longest sequence in tokens (default: the model's limit); ONNX graphs "
                            "that are given arrays take what the shapes of their inputs allow, "
                            "whatever this says [LLMC_MAX_CONTEXT]")
    group.add_argument("--cache-dir", default=None, metavar="DIR",
                       help="where compiled models are kept (default: the platform's cache "
                            "directory) [LLMC_CACHE_DIR]")
    group.add_argument("--specialize", default=None, choices=("lazy", "eager", "none"),
                       help="code of their own for shapes that keep coming: compiled in the "
                            "background (lazy, the default), also before ready what earlier runs "
                            "found (eager), or not [LLMC_SPECIALIZE]")
    group.add_argument("--promote-after", type=int, default=None, metavar="N",
                       help="calls after which a shape gets its own code (default: when it pays) "
                            "[LLMC_PROMOTE_AFTER]")
    group.add_argument("--code-budget-mb", type=int, default=None, metavar="MB",
                       help="most memory for such code (default 64) [LLMC_CODE_BUDGET_MB]")
    group.add_argument("--max-variants", type=int, default=None, metavar="N",
                       help="most such variants (default 32) [LLMC_MAX_VARIANTS]")


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """What weights are compiled to; `quantization_of` reads it."""
    group = parser.add_argument_group("quantisation")
    group.add_argument("--quantize", choices=("int8", "int4"), default=None,
                       help="store the matrices of weights as integers (default: as the model has "
                            "them)")
    group.add_argument("--group", type=int, choices=(32, 64, 128), default=None,
                       help="elements that share a scale (default: 128 for int8, 32 for int4)")
    group.add_argument("--asymmetric", action="store_true",
                       help="groups have zero points too: slower and larger; more exact without "
                            "calibration, with it for some models only")
    group.add_argument("--quantize-head", choices=("int8", "int4", "float"), default=None,
                       help="the matrix that makes logits, and an embedding tied to it (default: "
                            "int8)")
    group.add_argument("--activations", choices=("int8", "float"), default=None,
                       help="what quantised weights are multiplied by: rounded to 8 bits block by "
                            "block where the CPU has instructions for it (int8, the default), or "
                            "not")
    group.add_argument("--calibrate", choices=("auto", "always", "never"), default=None,
                       help="int4: choose codes on text that the model itself makes while "
                            "compiling (default: auto, where that takes 30 seconds at most)")
    group.add_argument("--kv-cache", choices=("int8", "float"), default=None,
                       help="store keys and values as 8-bit codes, with a scale for each token and "
                            "head (default: float, in the compute dtype)")


def quantization_of(arguments: argparse.Namespace) -> Quantization | None:
    """What the options say; LlmcError where some need --quantize."""
    given = {"group": arguments.group, "head": arguments.quantize_head,
             "activations": arguments.activations, "calibrate": arguments.calibrate,
             "symmetric": False if arguments.asymmetric else None}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.quantize is None and given:
        raise LlmcError("options of quantisation go with --quantize int8 or --quantize int4")
    if arguments.quantize is None and arguments.kv_cache is None:
        return None
    from llmc.ir.quantization import Quantization, quantization

    weights = None if arguments.quantize is None else Quantization(arguments.quantize, **given)
    return quantization(weights, arguments.kv_cache)


def begin_start(model: str, arguments: argparse.Namespace) -> None:
    """Before NumPy and the runtime are imported for a model that will be given text: where it is
    compiled already, its tokenizer is loaded meanwhile, on a thread."""
    from llmc.frontend.tokenizer import Tokenizer
    from llmc.runtime.locate import find_artifact

    cache = Path(arguments.cache_dir) if arguments.cache_dir else None
    found = find_artifact(Path(model), arguments.target, arguments.dtype,
                          quantization_of(arguments), cache)
    if found is not None and (found / "files" / "tokenizer.json").is_file():
        # NumPy's BLAS would start threads that spin beside this one, for nothing: compiling alone
        # multiplies matrices in NumPy.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        Tokenizer.begin(found / "files")


def open_runtime(model: str, arguments: argparse.Namespace, **options: Any):
    """The Runtime for a command line, with a progress bar while it compiles or loads."""
    from llmc.cli.progress import progress_bar
    from llmc.runtime.session import Runtime

    with progress_bar() as progress:
        return Runtime(model, target=arguments.target, dtype=arguments.dtype,
                       quantize=quantization_of(arguments),
                       threads=arguments.threads, max_context=arguments.max_context,
                       cache_dir=arguments.cache_dir, progress=progress,
                       specialize=arguments.specialize, promote_after=arguments.promote_after,
                       code_budget_mb=arguments.code_budget_mb,
                       max_variants=arguments.max_variants, **options)
