"""llmc inspect: look at a model at any stage of its way through the compiler."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmc.cli import add_command, add_quantization_options, quantization_of
from llmc.cli.generate import EMBEDDED
from llmc.cli.model_path import require_model
from llmc.errors import LlmcError

STAGES = ("imported", "optimized", "program", "llvm", "asm")
QUANTIZATION = "quantization"


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "inspect", run, "Look inside a model: graph, program, LLVM, assembly.",
        "llmc inspect model.onnx --stage optimized")
    parser.add_argument("model", nargs="?", default=str(EMBEDDED), metavar="MODEL",
                        help="default: the embedded model")
    parser.add_argument("--stage", choices=(*STAGES, "ptx", QUANTIZATION), default="program",
                        help="ptx: of an artifact for GPUs, or with --target nvptx: the last "
                             "architecture's, under the assembler's report; quantization: of an "
                             "artifact, what was quantised and the error of each matrix")
    parser.add_argument("--variant", default=None, metavar="NAME",
                        help="which variant's program or code, such as few or generic (default: "
                             "few, where there is one)")
    parser.add_argument("--text", action="store_true",
                        help="with --stage program: the full text that parses back")
    parser.add_argument("--html", metavar="FILE",
                        help="write one self-contained page instead: the graph before and after "
                             "fusion, and bytes, flops and arena stage by stage")
    parser.add_argument("--verify", action="store_true",
                        help="artifact: check every file against its full hash")
    parser.add_argument("--target", default=None, help="of a model: what for (default: host)")
    parser.add_argument("--dtype", default=None, help="of a model: compute dtype")
    parser.add_argument("--json", action="store_true", help="artifact: print its manifest")
    add_quantization_options(parser)


def run(arguments) -> int:
    from llmc.runtime.artifact import is_artifact

    if is_artifact(arguments.model):
        return _inspect_artifact(arguments)
    require_model(arguments.model)
    arguments.target = arguments.target or "host"
    if arguments.verify:
        raise LlmcError(f"{arguments.model} is no artifact: --verify checks artifacts")
    if arguments.json:
        raise LlmcError(f"{arguments.model} is no artifact: --json prints an artifact's manifest")
    if arguments.stage == QUANTIZATION:
        raise LlmcError(f"{arguments.model} is no artifact: --stage quantization reports what "
                        "`llmc compile --quantize` did")
    if arguments.stage == "ptx" and not arguments.target.startswith("nvptx"):
        raise LlmcError("--stage ptx is of GPU code: add --target nvptx:sm_90a")
    if arguments.html:
        return _write_page(arguments)
    return _print_stage(arguments)


def _print_stage(arguments) -> int:
    """The model at the stage that is asked for; nothing is done that comes after it."""
    from llmc.codegen import generate
    from llmc.codegen.target import Target
    from llmc.driver import optimized, variant_keys
    from llmc.frontend.model import load_model
    from llmc.ir.text import format_graph
    from llmc.passes.lower import lower

    model = load_model(arguments.model, arguments.dtype)
    if arguments.stage == "imported":
        print(format_graph(model.graph), end="")
        return 0
    target = Target.parse(arguments.target)
    capabilities = target.capabilities()
    graph, _ = optimized(model, capabilities, quantization_of(arguments))
    if arguments.stage == "optimized":
        print(format_graph(graph), end="")
        return 0
    keys = variant_keys(graph, capabilities, {})
    program = lower(graph, capabilities, keys[_variant(arguments.variant, keys)])
    if arguments.stage == "program":
        _print_program(program, arguments.text)
        return 0
    code = generate(program, target)
    print(code.llvm if arguments.stage == "llvm" else code.asm(), end="")
    return 0


def _write_page(arguments) -> int:
    from llmc.cli.inspect_page import write_page
    from llmc.codegen.target import Target
    from llmc.driver import compile_model

    compiled = compile_model(arguments.model, Target.parse(arguments.target), arguments.dtype,
                             quantization=quantization_of(arguments))
    write_page(Path(arguments.html), compiled, _variant(arguments.variant, compiled.programs))
    print(arguments.html)
    return 0


def _variant(wanted: str | None, names: Iterable[str]) -> str:
    """The variant of that name; without one, the one for few tokens where there is one."""
    names = list(names)
    name = wanted or ("few" if "few" in names else names[0])
    if name not in names:
        raise LlmcError(f"this model has no variant {name!r}: {', '.join(names)}")
    return name


def _print_program(program, whole: bool) -> None:
    if whole:
        from llmc.ir.program_text import format_program

        print(format_program(program), end="")
        return
    from llmc.ir.summary import summarize

    print(summarize(program))


def _inspect_artifact(arguments) -> int:
    from llmc.runtime.artifact import Artifact
    from llmc.runtime.targets import short_target

    artifact = Artifact(arguments.model)
    if quantization_of(arguments) is not None:
        raise LlmcError(f"{arguments.model} is an artifact: options of quantisation are for the "
                        "model it was made from")
    if arguments.target is not None or arguments.dtype is not None:
        raise LlmcError(f"{arguments.model} is an artifact, compiled for "
                        f"{short_target(artifact.manifest.target)}: --target and --dtype are for "
                        "the model it was made from")
    if arguments.html:
        raise LlmcError(f"{arguments.model} is an artifact: --html inspects the model it was made "
                        "from")
    if arguments.verify:
        artifact.verify()
        print(f"{arguments.model}: every file is as it was written")
        return 0
    if arguments.json:
        print((artifact.directory / "manifest.json").read_text())
        return 0
    if arguments.stage == QUANTIZATION:
        from llmc.cli.inspect_quantization import report

        print(report(artifact.manifest))
        return 0
    if arguments.stage not in ("program", "ptx"):
        raise LlmcError(f"an artifact holds programs and object code: inspect the model it was "
                        f"made from for --stage {arguments.stage}")
    name = _variant(arguments.variant, [v.name for v in artifact.manifest.variants])
    if arguments.stage == "ptx":
        from llmc.cli.inspect_ptx import artifact_ptx

        print(artifact_ptx(artifact.directory, name), end="")
        return 0
    (variant,) = (v for v in artifact.manifest.variants if v.name == name)
    from llmc.ir.program_text import parse_program

    _print_program(parse_program(artifact.program_text(variant)), arguments.text)
    return 0
