"""Checkpoint directories: what is read beside the weights, and directories that are refused."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import llmc
from llmc.errors import CompileError, LlmcError, ModelError
from llmc.frontend.model import Pooling, load_model
from llmc.ir.dtypes import bf16, f32
from llmc.models import ARCHITECTURES

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"
STORIES = Path(llmc.__file__).parent / "data" / "stories260K"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a sound checkpoint, to be spoilt."""
    return Path(shutil.copytree(GOLDENS / "llama_mha", tmp_path / "model"))


def edit_json(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def test_facts_of_the_embedded_model():
    model = load_model(STORIES)
    assert model.kind == "causal_lm" and model.graph.name == "llama"
    info = model.config
    assert (info.architecture, info.compute_dtype) == ("LlamaForCausalLM", f32)
    assert (info.vocab_size, info.max_context) == (512, 512)
    assert (info.hidden_size, info.layers) == (64, 5)
    assert (info.eos_token_ids, info.bos_token_id, info.pad_token_id) == ((1, 2), 1, None)
    assert info.pooling is None
    assert "tokenizer.json" in {path.name for path in model.companion_files}
    names = {node["name"] for node in model.graph.parameters()}
    assert names == set(model.parameters) and len(names) == 5 * 9 + 2


def test_every_golden_loads():
    for path in sorted(GOLDENS.iterdir()):
        model = load_model(path)
        assert model.kind in ("causal_lm", "encoder") and model.fingerprint


def test_compute_dtype_is_the_weights_own():
    model = load_model(GOLDENS / "llama_bf16")
    assert model.config.compute_dtype is bf16
    assert load_model(GOLDENS / "llama_bf16", "f32").config.compute_dtype is f32
    stored = model.graph.parameters()
    assert {node.dtype for node in stored} == {bf16}


def test_unknown_compute_dtype():
    with pytest.raises(CompileError, match="'int3'"):
        load_model(STORIES, "int3")


def test_a_dtype_that_config_json_gets_wrong_does_not_matter(checkpoint):
    edit_json(checkpoint / "config.json", dtype="float17", torch_dtype="float17")
    assert load_model(checkpoint).config.compute_dtype is f32


def test_generation_config_goes_before_config(checkpoint):
    edit_json(checkpoint / "config.json", eos_token_id=7, bos_token_id=8)
    edit_json(checkpoint / "generation_config.json", eos_token_id=[3, 4], bos_token_id=None)
    info = load_model(checkpoint).config
    assert (info.eos_token_ids, info.bos_token_id) == ((3, 4), 8)
    edit_json(checkpoint / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ModelError, match=r"generation_config\.json: 'eos_token_id'"):
        load_model(checkpoint)


def test_fingerprint_changes_with_weights_and_config(checkpoint):
    before = load_model(checkpoint).fingerprint
    assert load_model(checkpoint).fingerprint == before
    edit_json(checkpoint / "config.json", rms_norm_eps=1e-3)
    after_config = load_model(checkpoint).fingerprint
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert len({before, after_config, load_model(checkpoint).fingerprint}) == 3


def test_a_directory_of_symlinks_as_in_hub_caches(checkpoint, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert load_model(tmp_path / "snapshot").kind == "causal_lm"


# ---- refused -----------------------------------------------------------------------------------

BAD_CONFIGS = {
    "kv zero": ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0"),
    "epsilon": ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is -1.0"),
    "unknown": ({"architectures": ["QuxForCausalLM"]}, "QuxForCausalLM.*LlamaForCausalLM.*add-a"),
    "no name": ({"architectures": []}, "'architectures'"),
    "null name": ({"architectures": None}, "'architectures'"),
    "more layers": ({"num_hidden_layers": 3}, "is 3, but the weights have 2 layers"),
    "quantised": ({"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
    "vocabulary": ({"vocab_size": 255}, r"has shape \[256, 64\]; config.json asks for \[255, 64\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(checkpoint, case):
    changes, message = BAD_CONFIGS[case]
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


def test_a_billion_layers_are_refused_at_once(checkpoint):
    edit_json(checkpoint / "config.json", num_hidden_layers=10**9)
    start = time.perf_counter()
    with pytest.raises(ModelError, match="1000000000, but the weights have 2 layers"):
        load_model(checkpoint)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"a": 1, "a": 2}'])
def test_config_that_is_none(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(checkpoint)


@pytest.mark.parametrize("path", ["no/such/path", "no-such.onnx", __file__])
def test_paths_that_are_no_models(path):
    with pytest.raises(LlmcError, match=Path(path).name):
        load_model(path)


# ---- sentence embeddings -----------------------------------------------------------------------


def sentence_model(tmp_path, pooling, kinds=("Transformer", "Pooling", "Normalize"), folder="1_P"):
    path = Path(shutil.copytree(GOLDENS / "bert", tmp_path / "model"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in kinds]
    for module in modules:
        if module["type"].endswith("Pooling"):
            module["path"] = folder
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_P").mkdir()
    (path / "1_P" / "config.json").write_text(json.dumps(pooling))
    edit_json(path / "sentence_bert_config.json", max_seq_length=40)
    return path


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling(tmp_path, mode, normalize):
    key = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}[mode]
    flags = {f"pooling_mode_{each}": False for each in ("mean_tokens", "cls_token", "max_tokens")}
    kinds = ("Transformer", "Pooling") + ("Normalize",) * normalize
    pooling = flags | {f"pooling_mode_{key}": True, "word_embedding_dimension": 64}
    info = load_model(sentence_model(tmp_path, pooling, kinds)).config
    assert (info.pooling, info.max_embed_tokens) == (Pooling(mode, normalize), 40)


MEAN = {"pooling_mode_mean_tokens": True}


@pytest.mark.parametrize(
    ("pooling", "changes", "message"),
    [
        ({"pooling_mode_lasttoken": True}, {}, "pooling_mode_lasttoken"),
        (MEAN | {"pooling_mode_cls_token": True}, {}, "is not supported"),
        ({"pooling_mode_mean_tokens": 1}, {}, "true or false"),
        ({}, {}, "is not supported"),
        (MEAN, {"kinds": ("Transformer", "Pooling", "Dense")}, "Dense"),
        (MEAN, {"folder": "../1_P"}, "not a plain folder name"),
        (MEAN, {"folder": "2_P"}, "2_P"),
    ],
)
def test_pooling_that_is_not_supported(tmp_path, pooling, changes, message):
    with pytest.raises(ModelError, match=message):
        load_model(sentence_model(tmp_path, pooling, **changes))


def test_every_family_is_complete():
    for name, family in ARCHITECTURES.items():
        assert family.kind in ("causal_lm", "encoder"), name
        packed = {"ids", "positions", "sequence", "offsets"}
        assert packed - set(family.unread) <= family.inputs.keys(), name


def test_bad_merges_are_refused_before_anything_is_compiled(checkpoint):
    """An artifact's copy of the tokenizer is trusted, and the library would panic."""
    (checkpoint / "tokenizer.json").write_text(json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}))
    with pytest.raises(ModelError, match=r"tokenizer\.json: the merge 'a b' names tokens"):
        load_model(checkpoint)


@pytest.mark.parametrize("layers", [2**31 - 1, 10**9])
def test_more_layers_than_a_list_can_hold(checkpoint, layers):
    """A family whose layers differ makes a list of them from the config."""
    edit_json(checkpoint / "config.json", num_hidden_layers=layers, model_type="qwen2",
              architectures=["Qwen2ForCausalLM"], use_sliding_window=True)
    with pytest.raises(ModelError, match=f"is {layers}, but the weights have 2 layers"):
        load_model(checkpoint)
