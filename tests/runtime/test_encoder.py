"""An encoder's dense form against the goldens: padding on either side, pooled padding too."""

import json

import pytest
from safetensors.numpy import load_file

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
