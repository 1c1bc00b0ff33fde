"""llmc capture: inputs and outputs of a model's blocks, saved."""

from __future__ import annotations

from pathlib import Path

from llmc.cli import add_command, add_target_options
from llmc.cli.examine_options import add_inputs, model_inputs, open_tapped


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "capture", run,
        "Save config, inputs and outputs of chosen blocks of a model, to test against.",
        "llmc capture path/to/llama --blocks 'model.layers.*.mlp' --tokens 1,2,3 --output blocks")
    parser.add_argument("model", metavar="MODEL", help="an .onnx file or a checkpoint directory")
    parser.add_argument("--blocks", required=True, metavar="PATTERN",
                        help="module paths; * stands for anything but a dot")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    add_inputs(parser)
    add_target_options(parser)


def run(arguments) -> int:
    from llmc.cli.progress import progress_bar
    from llmc.examine.capture import capture
    from llmc.frontend.model import load_model

    model = load_model(arguments.model, dtype=arguments.dtype)
    tapped = open_tapped(model, arguments.target, model_inputs(model, arguments),
                         arguments.threads)
    with progress_bar() as progress:
        for block in capture(tapped, arguments.blocks, arguments.output, progress):
            print(block)
    return 0
