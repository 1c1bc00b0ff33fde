"""Llama through the interpreter against transformers, packed, chunked and greedy."""

import json
from pathlib import Path

import numpy
import pytest

import llmc
from llmc.errors import ModelError
from llmc.frontend.model import load_model
from llmc.models.config import ConfigFile
from llmc.models.llama import LlamaConfig
from llmc.models.rope import Rope, read_rope
from tests.models.packed import GOLDENS, Golden, PackedDecoder, relative_error

NAMES = sorted(path.name for path in GOLDENS.glob("llama*"))
STORIES = Path(llmc.__file__).parent / "data" / "stories260K"
MODELS = Path(__file__).parents[1] / "goldens" / "models"


@pytest.mark.parametrize("name", NAMES)
def test_all_prompts_in_one_packed_step(name):
    golden = Golden.load(name)
    prompts = [ids for case in golden.forward_cases for ids in golden.unpadded(case, "input_ids")]
    expected = [x for case in golden.forward_cases for x in golden.unpadded(case, "logits")]
    decoder = PackedDecoder(load_model(golden.path, "f32"), len(prompts), 33)
    for number, logits in enumerate(decoder.step(prompts)):
        golden.assert_close(logits, expected[number], f"sequence {number}")


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_good_as_transformers(name):
    golden = Golden.load(name)
    prompts = [ids for case in golden.forward_cases for ids in golden.unpadded(case, "input_ids")]
    expected = [x for case in golden.forward_cases for x in golden.unpadded(case, "logits")]
    decoder = PackedDecoder(load_model(golden.path, "bf16"), len(prompts), 33)
    errors = [relative_error(a, b) for a, b in zip(decoder.step(prompts), expected, strict=True)]
    assert max(errors) <= 1.5 * golden.facts["bf16_max_rel"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    golden = Golden.load(name)
    cases = ("p7", "p33", "left")
    prompts = [ids for case in cases for ids in golden.unpadded(case, "input_ids")]
    expected = numpy.concatenate([golden.tensors[f"greedy.{case}.new_ids"] for case in cases])
    last = numpy.concatenate([golden.tensors[f"greedy.{case}.last_logits"] for case in cases])
    decoder = PackedDecoder(load_model(golden.path, "f32"), len(prompts), 57)
    new, logits = decoder.greedy(prompts, expected.shape[1])
    assert new == expected.tolist()
    golden.assert_close(logits, last, "last logits")


@pytest.mark.parametrize("chunks", [(1, 32), (17, 16), (3, 13, 17)])
def test_a_prompt_in_chunks(chunks):
    golden = Golden.load("llama_gqa3_sharded")
    prompt, expected = golden.unpadded("p33", "input_ids")[0], golden.unpadded("p33", "logits")[0]
    decoder = PackedDecoder(load_model(golden.path, "f32"), 1, 33)
    parts = numpy.split(prompt, numpy.cumsum(chunks)[:-1])
    logits = numpy.concatenate([decoder.step([part])[0] for part in parts])
    golden.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("path", "golden"),
    [(STORIES, "stories260K"), (MODELS / "tinystories656K", "tinystories656K")],
)
def test_trained_models_tell_their_stories(path, golden):
    cases = json.loads((MODELS / golden / "golden.json").read_text())["goldens"]
    prompts = [case["prompt_ids"] for case in cases]
    decoder = PackedDecoder(load_model(path, "f32"), len(prompts), 96)
    new, _ = decoder.greedy(prompts, 64)
    assert new == [case["greedy_ids"] for case in cases]


def test_a_step_may_want_no_logits():
    golden = Golden.load("llama_mha")
    prompt, expected = golden.unpadded("p7", "input_ids")[0], golden.unpadded("p7", "logits")[0]
    decoder = PackedDecoder(load_model(golden.path, "f32"), 1, 7)
    assert decoder.run([prompt[:4]], rows=[]).shape == (0, 256)
    golden.assert_close(decoder.step([prompt[4:]])[0], expected[4:])


# ---- tensors -----------------------------------------------------------------------------------


def rewritten(tmp_path, name, edit_tensors=None, **changes):
    """A copy of a golden with tensors and config values changed (None drops a key)."""
    from safetensors.numpy import load_file, save_file

    source = GOLDENS / name
    tensors = load_file(source / "model.safetensors")
    if edit_tensors:
        tensors = edit_tensors(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def first_logits(path):
    golden = Golden.load("llama_mha")
    decoder = PackedDecoder(load_model(path, "f32"), 1, 7)
    return decoder.step(golden.unpadded("p7", "input_ids"))[0]


def test_names_without_the_prefix(tmp_path):
    def drop_prefix(tensors):
        return {name.removeprefix("model."): value for name, value in tensors.items()}

    golden = Golden.load("llama_mha")
    path = rewritten(tmp_path, "llama_mha", drop_prefix)
    golden.assert_close(first_logits(path), golden.unpadded("p7", "logits")[0])


def test_buffers_and_strangers_are_ignored(tmp_path):
    def add(tensors):
        strangers = {"model.layers.0.self_attn.rotary_emb.inv_freq": numpy.ones(8, numpy.float32)}
        return tensors | strangers | {"model.mask": numpy.ones((3, 3), numpy.bool_)}

    golden = Golden.load("llama_mha")
    path = rewritten(tmp_path, "llama_mha", add)
    golden.assert_close(first_logits(path), golden.unpadded("p7", "logits")[0])


def test_biases_of_every_projection(tmp_path):
    random = numpy.random.default_rng(0)

    def add_biases(tensors):
        biases = {
            name.replace("weight", "bias"): random.normal(size=len(weight)).astype(numpy.float32)
            for name, weight in tensors.items()
            if "_proj.weight" in name
        }
        return tensors | biases

    path = rewritten(tmp_path, "llama_mha", add_biases, attention_bias=True, mlp_bias=True)
    golden = Golden.load("llama_mha")
    prompt = golden.unpadded("p7", "input_ids")[0]
    golden.assert_close(first_logits(path), numpy_llama(path, prompt))


def numpy_llama(path, ids):
    """Logits f64[tokens, vocab] of a checkpoint with biases and one key head for each head."""
    stored = load_model(path, "f32").parameters
    weights = {name: tensor.read().astype(numpy.float64) for name, tensor in stored.items()}
    config = json.loads((path / "config.json").read_text())
    heads, tokens = config["num_attention_heads"], len(ids)
    frequencies = 10000.0 ** -(numpy.arange(0, 16, 2) / 16)
    angles = numpy.tile(numpy.arange(tokens)[:, None] * frequencies, 2)[:, None]

    def norm(x, name):
        scale = numpy.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def rotate(x):
        halves = numpy.concatenate([-x[..., 8:], x[..., :8]], -1)
        return x * numpy.cos(angles) + halves * numpy.sin(angles)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in (f"model.layers.{n}" for n in range(config["num_hidden_layers"])):
        normed = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(normed, f"{layer}.self_attn.{name}_proj").reshape(tokens, heads, 16)
            for name in "qkv"
        )
        scores = numpy.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / 4
        scores[:, numpy.triu_indices(tokens, 1)[0], numpy.triu_indices(tokens, 1)[1]] = -numpy.inf
        scores = numpy.exp(scores - scores.max(-1, keepdims=True))
        attended = numpy.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(attended.reshape(tokens, -1), f"{layer}.self_attn.o_proj")
        normed = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(normed, f"{layer}.mlp.gate_proj")
        gated = gate / (1 + numpy.exp(-gate)) * linear(normed, f"{layer}.mlp.up_proj")
        x = x + linear(gated, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (lambda t: t.pop("model.norm.weight"), r"'model.norm.weight' is missing .*\[64\]"),
        (lambda t: t.update({"model.norm.weight": numpy.ones(65, numpy.float32)}),
         r"'model.norm.weight' has shape \[65\]; config.json asks for \[64\]"),
        (lambda t: t.update({"model.norm.weight": numpy.ones(64, numpy.int8)}), "dtype i8"),
    ],
)
def test_missing_and_misshapen_tensors(tmp_path, edit, message):
    def edited(tensors):
        edit(tensors)
        return tensors

    with pytest.raises(ModelError, match=message):
        load_model(rewritten(tmp_path, "llama_mha", edited))


def test_tied_without_either_matrix(tmp_path):
    def drop(tensors):
        return {k: v for k, v in tensors.items() if "embed" not in k}

    path = rewritten(tmp_path, "llama_gqa4_tied", drop)
    with pytest.raises(ModelError, match="is missing"):
        load_model(path)


# ---- config ------------------------------------------------------------------------------------

CONFIG = json.loads((GOLDENS / "llama_mha" / "config.json").read_text())


def read(**changes):
    values = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    return LlamaConfig.read(ConfigFile(Path("config.json"), values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("num_attention_heads", -4),
        ("hidden_size", 64.0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("vocab_size", None),
        ("vocab_size", 2**40),
        ("intermediate_size", 0),
        ("head_dim", 7),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("hidden_act", "mish"),
        ("hidden_act", 3),
        ("tie_word_embeddings", "yes"),
        ("max_position_embeddings", 0),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 0}),
        ("rope_parameters", {"rope_type": "linear"}),
    ],
)
def test_values_that_make_no_sense(key, value):
    with pytest.raises(ModelError, match=r"config\.json: '"):
        read(**{key: value})


def test_defaults():
    config = read(head_dim=None, num_key_value_heads=None, rms_norm_eps=None)
    assert (config.head_size, config.kv_heads, config.epsilon) == (16, 4, 1e-6)
    with pytest.raises(ModelError, match="no divisor"):
        read(head_dim=None, num_attention_heads=6, num_key_value_heads=6)


# ---- rope --------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_type": "llama3"}


def rope_of(**values):
    return read_rope(ConfigFile(Path("config.json"), values), 131072)


def test_both_layouts_mean_the_same():
    new = rope_of(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    old = rope_of(rope_theta=5e5, rope_scaling=LLAMA3)
    older = rope_of(rope_theta=5e5, rope_scaling={
        **{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"})
    assert new == old == older == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert rope_of() == rope_of(rope_scaling=None) == Rope(10000.0)


def test_llama3_frequencies():
    plain = Rope(5e5).inverse_frequencies(128)
    scaled = rope_of(rope_theta=5e5, rope_scaling=LLAMA3).inverse_frequencies(128)
    waves = 2 * numpy.pi / plain.astype(numpy.float64)
    assert scaled.dtype == numpy.float32
    short, long = waves < 8192 / 4, waves > 8192
    numpy.testing.assert_array_equal(scaled[short], plain[short])
    numpy.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    keep = (8192 / waves[between] - 1) / 3
    expected = plain[between] * (keep + (1 - keep) / 8)
    assert 0 < between.sum() < 20
    numpy.testing.assert_allclose(scaled[between], expected, rtol=1e-5)


def test_linear_frequencies():
    scaled = rope_of(rope_scaling={"type": "linear", "factor": 4.0}).inverse_frequencies(8)
    numpy.testing.assert_allclose(scaled, Rope(10000.0).inverse_frequencies(8) / 4)


@pytest.mark.parametrize("changes", [
    {"low_freq_factor": 4.0}, {"high_freq_factor": 0.0}, {"factor": 0.0}, {"factor": -8},
    {"original_max_position_embeddings": 0}, {"low_freq_factor": None},
    {"rope_type": "longrope"}, {"rope_type": "dynamic"}, {"rope_type": 3},
])
def test_bad_scaling(changes):
    with pytest.raises(ModelError, match=r"config\.json: '"):
        rope_of(rope_scaling=LLAMA3 | changes)
