"""An encoder's dense form against the goldens: padding on either side, pooled padding too; and how
sentences are shared out among steps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmc.runtime.encoder import Encoder, Sentence
from llmc.runtime.session import Runtime
from tests.conftest import GOLDENS
from tests.models.packed import relative_error


@pytest.mark.parametrize("name", ["bert", "bert_mlm"])
def test_dense_batches_match_the_goldens(name):
    expected = load_file(GOLDENS / "hf" / name / "expected.safetensors")
    cases = json.loads((GOLDENS / "hf" / name / "expected.json").read_text())["cases"]
    with Runtime(GOLDENS / "hf" / name, dtype="f32", threads=2) as runtime:
        for case in cases:
            inputs = {key: expected[f"{case['name']}.{key}"] for key in case["inputs"]}
            got = runtime.run(inputs)
            kept = inputs.get("attention_mask")
            for output in case["outputs"]:
                want = expected[f"{case['name']}.{output}"]
                mask = kept.astype(bool) if kept is not None and want.ndim == 3 else ...
                assert relative_error(got[output][mask], want[mask]) < 1e-4, (case, output)


class Steps:
    """An executor that writes down how many tokens its steps have."""

    inputs = (SimpleNamespace(name="ids"),)
    outputs = (SimpleNamespace(name="hidden", shape=("tokens", 2)),)

    def __init__(self):
        self.tokens = []

    def run(self, inputs):
        self.tokens.append(len(inputs["ids"]))
        return {"hidden": np.zeros((len(inputs["ids"]), 2), np.float32)}


@pytest.mark.parametrize("lengths, steps", [
    ([3], [3]), ([10] * 8, [80]), ([40, 70, 60], [170]), ([7, 16, 31, 45, 64], [99, 64]),
    ([100, 60, 60], [100, 120]), ([90, 90, 90], [90, 90, 90]), ([128, 200, 1], [128, 201])])
def test_steps_hold_so_many_tokens_and_leave_no_short_one(lengths, steps):
    executor = Steps()
    encoder = Encoder(executor, max_context=200, chunk_tokens=100)
    encoder.chunk_tokens = 120
    results = encoder.run([Sentence.of(np.ones(length, np.int32)) for length in lengths])
    assert [len(each["hidden"]) for each in results] == lengths
    assert executor.tokens == steps
