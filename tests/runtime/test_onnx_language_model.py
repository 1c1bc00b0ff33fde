"""Generation with exported language models: caches that are inputs and outputs of the graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.cli import main
from llmc.errors import ModelError
from llmc.frontend.model import load_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "onnx"
PROMPT = [3, 17, 9, 42, 5]


@pytest.fixture
def runtime(tmp_path):
    made = []

    def runtime(path):
        made.append(llmc.Runtime(path, cache_dir=tmp_path / "cache", specialize="none", threads=1))
        return made[-1]

    yield runtime
    for each in made:
        each.close()


@pytest.mark.parametrize("name", ["gpt2_past_dynamo", "llama_past_torchscript",
                                  "llama_genai_fp32", "llama_genai_int4", "llama_dynamo"])
def test_generation_step_by_step_is_generation_from_scratch(runtime, name):
    """Token by token from the cache, against the whole sequence in each step."""
    model = runtime(GOLDENS / name / "model.onnx")
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(np.asarray(model.run(tokens))[-1].argmax()))
    found = list(model.generate(PROMPT, max_new_tokens=6, ignore_eos=True))
    assert found == tokens[len(PROMPT):]


def genai_directory(tmp_path, **changes):
    """A directory as onnxruntime-genai's exporter makes it."""
    directory = tmp_path / "genai"
    directory.mkdir()
    shutil.copyfile(GOLDENS / "llama_genai_fp32" / "model.onnx", directory / "decoder.onnx")
    decoder = {
        "filename": "decoder.onnx", "num_hidden_layers": 2,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                   "past_key_names": "past_key_values.%d.key",
                   "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"},
        **changes,
    }
    config = {"model": {"context_length": 77, "eos_token_id": [2, 5], "bos_token_id": 1,
                        "decoder": decoder}}
    (directory / "genai_config.json").write_text(json.dumps(config))
    return directory


def test_genai_config_names_the_model_and_its_limits(tmp_path):
    model = load_model(genai_directory(tmp_path))
    assert model.path.name == "decoder.onnx"
    assert model.config.max_context == 77
    assert model.config.eos_token_ids == (2, 5) and model.config.bos_token_id == 1
    assert ("past_key_values.0.value", "present.0.value") in model.token_interface.cache
    assert "genai_config.json" in {file.name for file in model.companion_files}


@pytest.mark.parametrize("name", ["../decoder.onnx", "/decoder.onnx", "decoder.bin"])
def test_genai_config_names_no_other_files(tmp_path, name):
    with pytest.raises(ModelError, match=r"names no \.onnx file beside it"):
        load_model(genai_directory(tmp_path, filename=name))


def test_damaged_genai_config(tmp_path):
    directory = genai_directory(tmp_path)
    (directory / "genai_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="genai_config"):
        load_model(directory)


def test_generate_command_on_an_exported_model(tmp_path, capsys):
    """`llmc generate` with past_key_values in the graph and a tokenizer beside it."""
    directory = genai_directory(tmp_path)
    words = {f"w{number}": number for number in range(200)}
    (directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}))
    command = ["generate", str(directory), "--prompt", "w3 w17 w9", "--max-tokens", "4",
               "--ignore-eos", "--json", "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_ids"] == [3, 17, 9] and len(answer["token_ids"]) == 4
    assert answer["text"].split()[-4:] == [f"w{token}" for token in answer["token_ids"]]
