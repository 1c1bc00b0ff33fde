"""A golden checkpoint of every family, compiled for this machine."""

import json

import numpy
import pytest

import llmc
from tests.models.packed import GOLDENS, Golden


def names(kind):
    facts = {path.name: json.loads((path / "expected.json").read_text())
             for path in sorted(GOLDENS.iterdir())}
    families = {each["family"]: name for name, each in facts.items() if each["kind"] == kind}
    return sorted(families.values())


def runtime(name):
    return llmc.Runtime(GOLDENS / name, dtype="f32", threads=1)


@pytest.mark.parametrize("name", names("causal"))
def test_decoder(name):
    golden, model = Golden.load(name), runtime(name)
    for case in golden.forward_cases:
        prompts, expected = golden.unpadded(case, "input_ids"), golden.unpadded(case, "logits")
        for ids, logits in zip(prompts, expected, strict=True):
            golden.assert_close(model.run(ids), logits, case)
    prompt, expected = golden.tensors["p7.input_ids"][0], golden.tensors["greedy.p7.new_ids"][0]
    new = model.generate(prompt, max_new_tokens=len(expected), temperature=0, ignore_eos=True)
    assert list(new) == expected.tolist()


@pytest.mark.parametrize("name", [*names("base"), *names("mlm")])
def test_encoder(name):
    golden, model = Golden.load(name), runtime(name)
    for case in golden.facts["cases"]:
        inputs = {key: golden.tensors[f"{case['name']}.{key}"] for key in case["inputs"]}
        got, mask = model.run(inputs), golden.masks(case["name"])
        for output in case["outputs"]:
            expected = golden.tensors[f"{case['name']}.{output}"]
            kept = mask if expected.shape[:2] == mask.shape else slice(None)
            golden.assert_close(got[output][kept], expected[kept], f"{case['name']} {output}")


def test_a_longrope_sequence_cannot_grow_past_the_original_context():
    model = runtime("phi3_longrope")
    new = model.generate(numpy.arange(3, 23), max_new_tokens=24, temperature=0, ignore_eos=True)
    with pytest.raises(llmc.LlmcError, match="cannot grow from 32 to 33 tokens"):
        list(new)
    new = model.generate(numpy.arange(3, 43), max_new_tokens=24, temperature=0, ignore_eos=True)
    assert len(list(new)) == 24
