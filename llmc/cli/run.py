"""llmc run: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path

from llmc.cli import add_command, add_runtime_options, open_runtime


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "run", run, "Run a model on arrays stored as .npy files.",
        "llmc run model.onnx --input input_ids=ids.npy --input attention_mask=mask.npy "
        "--output out")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy",
                        help="one input; repeat for each")
    parser.add_argument("--output", required=True, metavar="DIR",
                        help="directory for NAME.npy of every output")
    add_runtime_options(parser)


def run(arguments) -> int:
    import numpy as np

    from llmc.cli.examine_options import read_arrays

    arrays = read_arrays(arguments.input)
    with open_runtime(arguments.model, arguments) as runtime:
        results = runtime.run(arrays)
    directory = Path(arguments.output)
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in results.items():
        np.save(directory / f"{name.replace('/', '_')}.npy", value)
        print(f"{name}: {value.dtype}{list(value.shape)}")
    return 0
