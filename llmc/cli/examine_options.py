"""What `llmc capture` and `llmc compare` have in common: which model, and what it runs on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.examine.taps import TappedModel
    from llmc.frontend.model import ImportedModel

DEFAULT_TOKENS = 16


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Options that say what the model runs on."""
    group = parser.add_argument_group("inputs (default: 16 random tokens)")
    group.add_argument("--prompt", metavar="TEXT", help="text; the model needs a tokenizer")
    group.add_argument("--tokens", metavar="IDS", help="token ids, such as 1,2,3")
    group.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy",
                       help="one input of the graph; repeat for each")


def read_arrays(items: list[str]) -> dict[str, np.ndarray]:
    """The arrays that `--input NAME=FILE.npy` options name. LlmcError."""
    arrays = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals:
            raise LlmcError(f"--input: {item!r} is not NAME=FILE.npy")
        if name in arrays:
            raise LlmcError(f"--input: {name} is given twice")
        try:
            arrays[name] = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise LlmcError(f"{file} is no .npy file: {error}") from None
    return arrays


def model_inputs(model: ImportedModel, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """The graph's inputs as the options say."""
    from llmc.examine.taps import checked_inputs, parse_tokens, token_inputs

    if arguments.input:
        return checked_inputs(model, read_arrays(arguments.input))
    if arguments.tokens is not None:
        tokens = parse_tokens(arguments.tokens)
    elif arguments.prompt is not None:
        tokens = _encode(model.path, arguments.prompt)
    else:
        limit = model.config.vocab_size or 100
        tokens = np.random.default_rng(0).integers(0, limit, DEFAULT_TOKENS).tolist()
    if bad := [each for each in tokens if not 0 <= each < (model.config.vocab_size or each + 1)]:
        raise LlmcError(f"token {bad[0]} is outside the vocabulary of {model.config.vocab_size}")
    return token_inputs(model, tokens)


def _encode(path: Path, text: str) -> list[int]:
    from llmc.frontend.tokenizer import Tokenizer

    return Tokenizer.load(path if path.is_dir() else path.parent).encode(text)


def open_tapped(model: ImportedModel, target: str, inputs: Mapping[str, Any],
                threads: int | None) -> TappedModel:
    """The model on a target, ready to be looked into."""
    from llmc.codegen.target import Target
    from llmc.examine.taps import TappedModel
    from llmc.runtime.targets import resolve_target

    return TappedModel(model, Target.parse(resolve_target(target)), inputs, threads or 1)
