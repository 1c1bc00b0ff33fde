"""Models with text: what the host does itself, and the programs between."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.errors import LlmcError, ModelError, ShapeError
from llmc.frontend.onnx.check import TEXT_OPERATORS
from llmc.frontend.onnx.plan import ON_TEXT, host_plan
from llmc.ir.plan import HostStep, ProgramStep
from llmc.runtime.host_functions import HOST_FUNCTIONS
from llmc.runtime.inference_session import InferenceSession

WORDS = np.array(["a", "bcé", "", "ÜBER", "x y"], dtype=object)


def build(text, **tensors):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def run(model, feeds):
    return InferenceSession(model.SerializeToString()).run(None, feeds)


def test_every_host_operator_has_a_function():
    assert set(HOST_FUNCTIONS) == TEXT_OPERATORS | ON_TEXT | {"Constant"}


def test_text_between_programs():
    """Lengths of matching words: host, program, host and program again."""
    model = build("""g (string[n] x, float[m] w) => (string[n] both, float[m] scaled, float s) {
        both = StringConcat(x, x)
        hits = RegexFullMatch<pattern = "[a-z ]+">(both)
        number = Cast<to = 1>(hits)
        s = ReduceSum<keepdims = 0>(number)
        scaled = Mul(w, s)
    }""")
    feeds = {"x": WORDS, "w": np.arange(3, dtype=np.float32)}
    both, scaled, total = run(model, feeds)
    assert both.tolist() == [word * 2 for word in WORDS]
    assert total == 2 and scaled.tolist() == [0, 2, 4]
    plan = host_plan(model.SerializeToString())
    kinds = [type(step) for step in plan.steps]
    assert kinds == [HostStep, HostStep, ProgramStep]


@pytest.mark.parametrize("body", [
    'y = StringNormalizer<case_change_action = "LOWER", stopwords = ["x"]>(x)',
    'y = StringNormalizer<case_change_action = "UPPER", is_case_sensitive = 1>(x)',
    "y = StringConcat(x, x)",
    'y, n = StringSplit<delimiter = " ">(x)',
])
@pytest.mark.filterwarnings("ignore")
def test_against_the_reference(body):
    model = build(f"g (string[n] x) => (string[m] y) {{ {body} }}")
    (found,) = run(model, {"x": WORDS})
    (wanted,) = ReferenceEvaluator(model).run(["y"], {"x": WORDS})
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
def test_n_grams(mode):
    node = helper.make_node(
        "TfIdfVectorizer", ["x"], ["y"], mode=mode, min_gram_length=1, max_gram_length=2,
        max_skip_count=3, ngram_counts=[0, 2], ngram_indexes=[0, 2, 1, 3],
        pool_int64s=[2, 3, 2, 3, 3, 3], weights=[0.5, 2.0, 3.0, 0.25])
    model = helper.make_model(helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 7, [3, 17])],
        [helper.make_tensor_value_info("y", 1, None)]))
    x = np.random.default_rng(1).integers(1, 5, (3, 17))
    (found,) = run(model, {"x": x})
    singles = [[(row == 2).sum(), (row == 3).sum()] for row in x]
    pairs = [[sum((a, b) == (first, 3) for step in range(1, 5)
                  for a, b in zip(row, row[step:], strict=False)) for first in (2, 3)]
             for row in x]
    wanted = np.array([[s[0], p[0], s[1], p[1]] for s, p in zip(singles, pairs, strict=True)])
    wanted = wanted > 0 if mode == "IDF" else wanted
    weights = np.ones(4) if mode == "TF" else np.array([0.5, 3.0, 2.0, 0.25])
    np.testing.assert_array_equal(found, (wanted * weights).astype(np.float32))


def test_errors_name_the_node():
    model = build('g (string[n] x) => (bool[n] y) { y = RegexFullMatch<pattern = "(">(x) }')
    with pytest.raises(ModelError, match="pattern"):
        run(model, {"x": WORDS})
    model = build("g (string[n] x, string[m] z) => (string[n] y) { y = StringConcat(x, z) }")
    with pytest.raises(ShapeError, match="StringConcat"):
        run(model, {"x": WORDS, "z": WORDS[:2]})
    with pytest.raises(ShapeError, match="missing input z"):
        run(model, {"x": WORDS})


def test_unknown_operators_beside_text_are_listed():
    model = build("g (string[n] x) => (string[n] y) { y = StringConcat(x, x) }")
    model.graph.node.append(helper.make_node("Frobnicate", ["y"], ["z"], name="first"))
    model.graph.node.append(helper.make_node("Mangle", ["z"], ["v"], name="second"))
    with pytest.raises(LlmcError, match=r"Frobnicate \('first'\).*Mangle \('second'\)"):
        run(model, {"x": WORDS})
