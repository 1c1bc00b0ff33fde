"""llmc run: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.cli import add_command, add_runtime_options, open_runtime, quantization_of

SESSION_OPTIONS = ("dtype", "threads", "max_context", "cache_dir", "specialize", "promote_after",
                   "code_budget_mb", "max_variants")


def add(subparsers) -> None:
    parser = add_command(
        subparsers, "run", run, "Run a model on arrays stored as .npy files.",
        "llmc run model.onnx --input input_ids=ids.npy --input attention_mask=mask.npy "
        "--output out")
    parser.add_argument("model", metavar="MODEL", help="an .onnx file, or an artifact")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy",
                        help="one input; repeat for each")
    parser.add_argument("--output", required=True, metavar="DIR",
                        help="directory for NAME.npy of every output")
    add_runtime_options(parser)


def run(arguments) -> int:
    import numpy as np

    from llmc.cli.examine_options import read_arrays

    results = _results(arguments, read_arrays(arguments.input))
    directory = Path(arguments.output)
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in _arrays(results):
        np.save(directory / f"{name.replace('/', '_')}.npy", value)
        print(f"{name}: {value.dtype}{list(value.shape)}")
    return 0


def _results(arguments, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """All outputs by name. An .onnx file may need several programs, or the host between them."""
    if Path(arguments.model).suffix != ".onnx":
        with open_runtime(arguments.model, arguments) as runtime:
            return runtime.run(arrays)
    from llmc.cli.progress import progress_bar
    from llmc.runtime.inference_session import CPU, CUDA, InferenceSession
    from llmc.runtime.targets import resolve_target

    provider = CUDA if resolve_target(arguments.target).startswith("nvptx") else CPU
    with progress_bar() as progress:
        session = InferenceSession(
            arguments.model, providers=[provider], progress=progress,
            quantize=quantization_of(arguments),
            **{name: getattr(arguments, name) for name in SESSION_OPTIONS})
    try:
        values = session.run(None, arrays)
        return dict(zip((each.name for each in session.get_outputs()), values, strict=True))
    finally:
        session.close()


def _arrays(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What can be saved: the items of a sequence one by one, text as NumPy's fixed width."""
    found = []
    for name, value in results.items():
        items = {f"{name}.{number}": item for number, item in enumerate(value)} if isinstance(
            value, list) else {name: value} if value is not None else {}
        found += [(key, item.astype(str) if item.dtype == object else item)
                  for key, item in items.items()]
    return found
