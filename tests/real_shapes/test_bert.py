"""A BERT-base-shaped encoder of two layers against float64: what its sentences are packed with
makes no difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from benchmarks import make_model
from llmc.frontend.model import load_model
from llmc.ir.interpret import allowed, interpret
from llmc.runtime.encoder import Encoder, Sentence
from tests.fuzz.hostile import spoil_memory
from tests.real_shapes.compiled import build
from tests.real_shapes.reference import Error, one_chain, some_ids, write_checkpoint
from tests.real_shapes.test_llama import FACTOR

OUTPUTS = ("last_hidden_state", "pooler_output")
Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint("bert-base", tmp_path_factory.mktemp("bert") / "bert-base")


def interpreted(checkpoint: Path, dtype: str, sentences: list[np.ndarray], exact: bool) -> Outputs:
    """Every output, all sentences in one packed step."""
    model = load_model(checkpoint, dtype)
    counts = [len(ids) for ids in sentences]
    offsets = np.cumsum([0, *counts])
    inputs = {
        "ids": np.concatenate(sentences),
        "positions": np.concatenate([np.arange(count) for count in counts]),
        "token_types": np.zeros(sum(counts)),
        "sequence": np.repeat(np.arange(len(counts)), counts),
        "offsets": offsets,
        "lengths": np.diff(offsets),
        "pooled": offsets[:-1],
    }
    arrays = {node["name"]: inputs[node["name"]].astype(np.int32) for node in model.graph.inputs}
    with allowed():
        return interpret(model.graph, arrays, model.parameters, {}, exact=exact)


def compiled(artifact: Path, sentences: list[np.ndarray], at_once: int) -> Outputs:
    """Every output, `at_once` sentences in a step, in memory full of NaN."""
    with llmc.Runtime(artifact, threads=2) as runtime:
        spoil_memory(runtime.executor)
        model = runtime._model
        assert isinstance(model, Encoder)
        results = []
        for start in range(0, len(sentences), at_once):
            results += model.run([Sentence.of(ids) for ids in sentences[start:start + at_once]])
    return {"last_hidden_state": np.concatenate([r["last_hidden_state"] for r in results]),
            "pooler_output": np.stack([r["pooler_output"] for r in results])}


def check(checkpoint: Path, dtype: str, lengths: list[int], output: Path) -> None:
    sentences = some_ids(lengths)
    oracle = interpreted(checkpoint, "f32", sentences, True)
    rounded = interpreted(checkpoint, dtype, sentences, False)
    artifact = build(checkpoint, dtype, output)
    longest_sum = make_model.BERT["intermediate_size"]
    wrong = []
    for at_once in (1, len(sentences)):
        got = compiled(artifact, sentences, at_once)
        for name in OUTPUTS:
            scale = float(np.abs(oracle[name]).max())
            bound = Error.of(rounded[name], oracle[name], scale).times(FACTOR)
            if dtype == "f32":
                bound = bound.plus(one_chain(longest_sum, oracle[name], scale))
            error = Error.of(got[name], oracle[name], scale)
            print(f"\n    {dtype} {at_once:3} at once {name:20} {error}, allowed {bound}")
            if not error.within(bound):
                wrong.append(f"{dtype}, {at_once} at once, {name}: {error}, allowed {bound}")
    assert not wrong, "\n".join(wrong)


def test_a_sample_in_f32(checkpoint, tmp_path):
    check(checkpoint, "f32", [17, 1, 130], tmp_path / "f32.llmc")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_length(checkpoint, tmp_path, dtype):
    lengths = [1, 2, 7, 8, 17, 64, 129, 512, *range(3, 51, 2), 511]
    check(checkpoint, dtype, lengths, tmp_path / "all.llmc")
