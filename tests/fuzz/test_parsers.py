"""Damaged safetensors headers, configs and ONNX files: refused with an LlmcError of one line or
read for what they are; nothing outside the model's directory is opened, nothing takes long."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import onnx
import pytest

from llmc.frontend.model import load_model
from llmc.frontend.onnx.plan import host_plan
from llmc.frontend.safetensors import INDEX_NAME, open_checkpoint
from llmc.models import ARCHITECTURES
from tests.fuzz.mutate import check_parser, damage_bytes, damage_json, damage_message, fuzz
from tests.models.packed import GOLDENS as HF
from tests.runtime.test_host_loop import counting, growing, halving

ONNX = HF.parent / "onnx"
SHORT = 5.0  # seconds in `make test`
LONG = 120.0
TIMES = [pytest.param(SHORT, id="short"),
         pytest.param(LONG, id="long", marks=pytest.mark.slow)]
CONFIG_WORDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "layer_types",
    "attention_bias", "mlp_bias", "tie_word_embeddings", "quantization_config", "hidden_act",
    "partial_rotary_factor", "rope_type", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "num_key_value_heads", "eos_token_id",
    "max_position_embeddings", "final_logit_softcapping", "long_factor", "attention_factor",
)


def first_seed(seconds: float) -> int:
    """Always the same seeds in `make test`; others every time in the long runs."""
    return 0 if seconds == SHORT else time.time_ns() % 2**40


# ---- safetensors --------------------------------------------------------------------------------


def packed(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("seconds", TIMES)
def test_safetensors(tmp_path, seconds):
    content = (HF / "llama_mha" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    header = dict(list(header.items())[:12])
    path = tmp_path / "model.safetensors"

    def parse() -> None:
        for stored in open_checkpoint(tmp_path).tensors.values():
            assert stored.read().nbytes == stored.bytes

    def one(r: random.Random) -> bool:
        damaged = damage_json(header, r, ("x", "dtype", "shape", "data_offsets", "__metadata__"))
        whole = packed(damaged, data) if r.random() < 0.5 else damage_bytes(content, r)
        path.write_bytes(whole)
        return check_parser(parse, tmp_path, "model.safetensors")

    fuzz(one, seconds, first_seed(seconds))


@pytest.mark.parametrize("seconds", TIMES)
def test_safetensors_index(tmp_path, seconds):
    source = HF / "llama_gqa3_sharded"
    for file in source.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    index = json.loads((source / INDEX_NAME).read_text())

    def one(r: random.Random) -> bool:
        damaged = json.dumps(damage_json(index, r, ("x", "weight_map"))).encode()
        (tmp_path / INDEX_NAME).write_bytes(damage_bytes(damaged, r) if r.random() < 0.3
                                            else damaged)
        return check_parser(lambda: load_model(tmp_path), tmp_path, INDEX_NAME)

    fuzz(one, seconds, first_seed(seconds))


# ---- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", TIMES)
def test_configs(tmp_path, seconds):
    directories = []
    for source in sorted(HF.iterdir()):
        shutil.copytree(source, tmp_path / source.name)
        load_model(source)
        directories.append(tmp_path / source.name)
    configs = {d: json.loads((d / "config.json").read_text()) for d in directories}

    def one(r: random.Random) -> bool:
        directory = r.choice(directories)
        damaged = damage_json(configs[directory], r, CONFIG_WORDS)
        if r.random() < 0.15 and isinstance(damaged, dict):
            damaged["architectures"] = [r.choice(sorted(ARCHITECTURES))]
        content = json.dumps(damaged).encode()
        content = damage_bytes(content, r) if r.random() < 0.1 else content
        (directory / "config.json").write_bytes(content)
        return check_parser(lambda: load_model(directory), directory, f"{content!r}")

    fuzz(one, seconds, first_seed(seconds))


# ---- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", TIMES)
def test_onnx(tmp_path, seconds):
    models = {}
    for source in sorted(path for path in ONNX.iterdir() if path.is_dir()):
        shutil.copytree(source, tmp_path / source.name)
        load_model(source / "model.onnx")
        models[tmp_path / source.name / "model.onnx"] = (source / "model.onnx").read_bytes()

    def one(r: random.Random) -> bool:
        path: Path = r.choice(list(models))
        if r.random() < 0.3:
            content = damage_bytes(models[path], r)
        else:
            proto = onnx.ModelProto.FromString(models[path])
            damage_message(proto, r)
            content = proto.SerializeToString()
        path.write_bytes(content)

        def parse() -> None:
            for stored in load_model(path).parameters.values():
                stored.read()

        return check_parser(parse, path.parent, path.parent.name)

    fuzz(one, seconds, first_seed(seconds))


@pytest.mark.parametrize("seconds", TIMES)
def test_plans(tmp_path, seconds):
    """Loops and text, which the host cuts out of a model before its parts are imported."""
    models = [halving(), growing(), counting(5000)]

    def one(r: random.Random) -> bool:
        proto = onnx.ModelProto()
        proto.CopyFrom(r.choice(models))
        damage_message(proto, r)
        content = proto.SerializeToString()
        return check_parser(lambda: host_plan(content), tmp_path, "plan")

    fuzz(one, seconds, first_seed(seconds))
