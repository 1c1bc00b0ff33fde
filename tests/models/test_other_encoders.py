"""RoBERTa and DistilBERT through the interpreter against transformers, and RoBERTa's positions."""

from pathlib import Path

import numpy
import pytest

import llmc
from llmc.errors import ModelError
from llmc.frontend.model import load_model
from llmc.models.config import ConfigFile
from llmc.models.roberta import RobertaConfig
from tests.models.packed import Golden, encode_packed, relative_error

NAMES = ["distilbert", "distilbert_mlm", "roberta", "roberta_mlm"]


def run_all_cases(golden, dtype):
    """(expected, got) of the output by token of every sequence, all packed into one step."""
    cases = golden.forward_cases
    sequences = [ids for case in cases for ids in golden.unpadded(case, "input_ids")]
    starts = [start for case in cases for start in golden.starts(case)]
    got = encode_packed(load_model(golden.path, dtype), sequences, starts=starts)
    name = next(name for name in got[0] if name != "pooler_output")
    expected = [values for case in cases for values in golden.unpadded(case, name)]
    return [(values, each[name]) for values, each in zip(expected, got, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_all_cases_in_one_packed_step(name):
    golden = Golden.load(name)
    pairs = run_all_cases(golden, "f32")
    assert len(pairs) == 7
    for expected, got in pairs:
        golden.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_good_as_transformers(name):
    golden = Golden.load(name)
    errors = [relative_error(got, expected) for expected, got in run_all_cases(golden, "bf16")]
    assert max(errors) <= 1.5 * golden.facts["bf16_max_rel"]


def test_given_positions_are_refused():
    golden = Golden.load("roberta")
    ids = golden.tensors["p7.input_ids"]
    positions = numpy.arange(7)[None]
    with pytest.raises(llmc.LlmcError, match="leave out position_ids"):
        llmc.Runtime(golden.path, threads=1).run({"input_ids": ids, "position_ids": positions})


def test_positions_take_rows_from_behind_the_padding_token():
    values = {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 514,
              "vocab_size": 9, "num_hidden_layers": 1, "intermediate_size": 8}
    config = RobertaConfig.read(ConfigFile(Path("config.json"), values | {"pad_token_id": 1}))
    assert (config.max_context, config.position_rows) == (512, 514)
    with pytest.raises(ModelError, match="max_position_embeddings"):
        RobertaConfig.read(ConfigFile(Path("config.json"), values | {"pad_token_id": 513}))
