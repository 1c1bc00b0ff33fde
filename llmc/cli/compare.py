"""llmc compare: the first op at which two runs of a model part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import add_command, add_target_options
from llmc.cli.examine_options import add_inputs, model_inputs, open_tapped
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.examine.compare import Checked, Comparison, Verdict
    from llmc.examine.taps import TappedModel
    from llmc.runtime.progress import Progress

# Of the largest magnitude: some ten roundings of a value in the coarser dtype of the two.
TOLERANCES = {"f64": 1e-10, "f32": 1e-4, "f16": 1e-2, "bf16": 5e-2}


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "compare", run,
        "Find the first op at which two runs differ: two models, two dtypes, two targets, "
        "onnxruntime, or what `llmc capture` saved. Exit status 1 if they do.",
        "llmc compare right.onnx wrong.onnx\n"
        "  llmc compare path/to/llama --dtype f32 --other-dtype bf16\n"
        "  llmc compare path/to/llama captured_blocks")
    parser.add_argument("model", metavar="A", help="an .onnx file or a checkpoint directory")
    parser.add_argument("other", metavar="B", nargs="?",
                        help="another one, or a directory that `llmc capture` wrote (default: A)")
    parser.add_argument("--other-target", help="where B runs (default: as A)")
    parser.add_argument("--other-dtype", help="compute dtype of B (default: as A)")
    parser.add_argument("--onnxruntime", action="store_true",
                        help="A is an .onnx file; compare with what onnxruntime makes of it")
    parser.add_argument("--tolerance", type=float,
                        help="of the largest magnitude of a value (default: by dtype)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_inputs(parser)
    add_target_options(parser)


def run(arguments) -> int:
    from llmc.cli.progress import progress_bar

    with progress_bar() as progress:
        verdict = make_comparison(arguments, progress).run()
    print(json.dumps(verdict.as_json()) if arguments.json else report(verdict))
    return 1 if verdict.first else 0


def make_comparison(arguments, progress: Progress) -> Comparison:
    """The comparison that a command line asks for."""
    from llmc.examine.capture import Captured, is_capture
    from llmc.examine.compare import Comparison, ModelSide, saved_points
    from llmc.examine.match import match
    from llmc.examine.taps import tap_points
    from llmc.frontend.model import load_model

    model = load_model(arguments.model, dtype=arguments.dtype)
    if arguments.onnxruntime and model.kind != "onnx":
        raise LlmcError(f"{arguments.model}: --onnxruntime is for .onnx files, which it reads")
    dtypes = [model.config.compute_dtype.name]
    if arguments.other and is_capture(Path(arguments.other)):
        _refuse_with(arguments, "what was captured brings its own inputs and runs nowhere",
                     "prompt", "tokens", "input", "other_target", "other_dtype", "onnxruntime")
        captured = Captured(Path(arguments.other))
        captured.check(model)
        first = open_tapped(model, arguments.target, captured.inputs(), arguments.threads)
        points, saved = saved_points(tap_points(model.graph), captured.points())
        return Comparison(first, points, saved, _tolerance(arguments, dtypes), progress)
    first = open_tapped(model, arguments.target, model_inputs(model, arguments), arguments.threads)
    if arguments.onnxruntime:
        _refuse_with(arguments, "onnxruntime is B", "other", "other_target", "other_dtype")
        return _with_onnxruntime(first, arguments, dtypes, progress)
    other = load_model(arguments.other or arguments.model,
                       dtype=arguments.other_dtype or arguments.dtype)
    second = open_tapped(other, arguments.other_target or arguments.target,
                         model_inputs(other, arguments), arguments.threads)
    pairs = match(first.graph, second.graph)
    side = ModelSide(second, [node for _, node in pairs])
    dtypes.append(other.config.compute_dtype.name)
    return Comparison(first, [node for node, _ in pairs], side, _tolerance(arguments, dtypes),
                      progress)


def _refuse_with(arguments, why: str, *names: str) -> None:
    """LlmcError for options that would be ignored."""
    for name in names:
        if getattr(arguments, name):
            shown = "B" if name == "other" else f"--{name.replace('_', '-')}"
            raise LlmcError(f"{shown} has no meaning here: {why}")


def _with_onnxruntime(first: TappedModel, arguments, dtypes: list[str],
                      progress: Progress) -> Comparison:
    from llmc.examine.compare import Comparison
    from llmc.examine.onnx_run import OnnxRuntimeSide, result_names

    points, names = result_names(first.model.path, first.graph)
    side = OnnxRuntimeSide(first.model.path, first.inputs, names)
    return Comparison(first, points, side, _tolerance(arguments, dtypes), progress)


def _tolerance(arguments, dtypes: list[str]) -> float:
    if arguments.tolerance is not None:
        if not arguments.tolerance >= 0:
            raise LlmcError(f"--tolerance must be 0 or more, got {arguments.tolerance}")
        return arguments.tolerance
    return max(TOLERANCES.get(name, 1e-4) for name in dtypes)


def report(verdict: Verdict) -> str:
    """The verdict for people."""
    looked = f"{len(verdict.checked)} of {verdict.points} values looked at"
    if verdict.first is None:
        most = max(verdict.checked, key=lambda each: each.difference.relative)
        return (f"no difference above {verdict.tolerance:g} ({looked}); the largest is "
                f"{most.difference.relative:.2e}, at {most.what}")
    lines = [f"first difference above {verdict.tolerance:g}: {verdict.first.what}"]
    if verdict.first.module:
        lines.append(f"  module     {verdict.first.module}")
    lines += ["  " + line for line in statistics(verdict.first)]
    lines.append("what it is computed from agrees:" if verdict.operands else
                 "it is computed from the inputs")
    lines += [f"  {each.difference.relative:.2e}  {each.what}" for each in verdict.operands]
    return "\n".join([*lines, looked])


def statistics(checked: Checked) -> list[str]:
    found = checked.difference
    lines = [f"shape      {list(checked.shape)}",
             f"relative   {found.relative:.3e} of the largest magnitude, rms {found.rms:.3e}",
             f"absolute   {found.largest:.3e} at most, {found.mean:.3e} on average",
             f"worst      {found.values[0]:.6g} and {found.values[1]:.6g} at {list(found.worst)}"]
    if found.not_finite:
        lines.append(f"not finite {found.not_finite} values are NaN or infinite on one side only")
    return lines
