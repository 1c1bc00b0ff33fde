"""RoBERTa through the interpreter against transformers: how it counts positions."""

from pathlib import Path

import numpy
import pytest

import llmc
from llmc.errors import ModelError
from llmc.frontend.model import load_model
from llmc.models.config import ConfigFile
from llmc.models.roberta import RobertaConfig
from tests.models.packed import Golden, encode_packed, relative_error


def run_all_cases(dtype):
    """(expected, got) hidden states of every sequence, all packed into one step."""
    golden = Golden.load("roberta")
    cases = golden.forward_cases
    sequences = [ids for case in cases for ids in golden.unpadded(case, "input_ids")]
    expected = [x for case in cases for x in golden.unpadded(case, "last_hidden_state")]
    got = encode_packed(load_model(golden.path, dtype), sequences)
    return golden, [(a, b["last_hidden_state"]) for a, b in zip(expected, got, strict=True)]


def test_all_cases_in_one_packed_step():
    golden, pairs = run_all_cases("f32")
    assert len(pairs) == 7
    for expected, got in pairs:
        golden.assert_close(got, expected)


def test_bf16_is_as_good_as_transformers():
    golden, pairs = run_all_cases("bf16")
    errors = [relative_error(got, expected) for expected, got in pairs]
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
