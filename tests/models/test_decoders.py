"""Decoders other than Llama through the interpreter against transformers, and their configs."""

import json
from pathlib import Path

import numpy
import pytest

from llmc.errors import ModelError
from llmc.frontend.model import load_model
from llmc.models import ARCHITECTURES
from llmc.models.config import ConfigFile
from llmc.models.rope import Rope, read_rope
from tests.models.packed import GOLDENS, Golden, PackedDecoder, relative_error


def is_decoder(path):
    facts = json.loads((path / "expected.json").read_text())
    return facts["kind"] == "causal" and not path.name.startswith("llama")


YARN = [1.0, 0.25693506, 0.0625, 0.013834965, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05]
NAMES = sorted(path.name for path in GOLDENS.iterdir() if is_decoder(path))


def packed(golden, dtype):
    """(expected, got) logits of every prompt, all in one step."""
    prompts = [ids for case in golden.forward_cases for ids in golden.unpadded(case, "input_ids")]
    expected = [x for case in golden.forward_cases for x in golden.unpadded(case, "logits")]
    got = PackedDecoder(load_model(golden.path, dtype), len(prompts), 48).step(prompts)
    return zip(expected, got, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_all_prompts_in_one_packed_step(name):
    golden = Golden.load(name)
    for number, (expected, got) in enumerate(packed(golden, "f32")):
        golden.assert_close(got, expected, f"sequence {number}")


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_good_as_transformers(name):
    golden = Golden.load(name)
    errors = [relative_error(got, expected) for expected, got in packed(golden, "bf16")]
    assert max(errors) <= 1.5 * golden.facts["bf16_max_rel"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    golden = Golden.load(name)
    cases = [each["prompt"] for each in golden.facts["cases"] if each["type"] == "greedy"]
    prompts = [ids for case in cases for ids in golden.unpadded(case, "input_ids")]
    expected = numpy.concatenate([golden.tensors[f"greedy.{case}.new_ids"] for case in cases])
    last = numpy.concatenate([golden.tensors[f"greedy.{case}.last_logits"] for case in cases])
    decoder = PackedDecoder(load_model(golden.path, "f32"), len(prompts), 72)
    new, logits = decoder.greedy(prompts, expected.shape[1])
    assert new == expected.tolist()
    golden.assert_close(logits, last, "last logits")


# ---- config ------------------------------------------------------------------------------------


def read(name, *dropped, **changes):
    """The config of a golden with values changed (None means null) and dropped."""
    values = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if key not in dropped}
    family = ARCHITECTURES[values["architectures"][0]]
    return family.read_config(ConfigFile(Path("config.json"), values))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma", {"hidden_act": "mish"}),
        ("gemma2", {"attn_logit_softcapping": -1.0}),
        ("gemma2", {"final_logit_softcapping": 0}),
        ("gemma2", {"layer_types": ["full_attention"]}),
        ("gemma2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}),
        ("gemma2", {"sliding_window": -8}),
        ("gemma3_text_legacy", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text_legacy", {"rope_local_base_freq": 0}),
        ("gemma3_text_legacy", {"sliding_window_pattern": 0}),
        ("gpt2", {"n_head": 5}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 1.5}),
        ("phi3_longrope", {"rope_parameters": {"rope_type": "llama3"}}),
        ("phi3_longrope", {"rope_parameters": {"type": "su", "short_factor": [1.0] * 8}}),
        ("phi3_longrope", {"rope_parameters": {"type": "su", "short_factor": [1.0] * 8,
                                               "long_factor": [1.0] * 7}}),
        ("phi3_longrope", {"rope_parameters": {"type": "su", "short_factor": [1.0] * 8,
                                               "long_factor": [0.0] * 8}}),
        ("mixtral", {"num_experts_per_tok": 5}),
        ("mixtral", {"num_local_experts": 0}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"num_experts": 1}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 2]}),
    ],
)
def test_values_that_make_no_sense(name, changes):
    with pytest.raises(ModelError, match=r"config\.json: '"):
        read(name, **changes)


def test_gelu_means_tanh_gelu_in_the_first_gemma_only():
    assert read("gemma").activation is read("gemma", hidden_act="gelu_new").activation
    assert read("gemma2", hidden_activation="gelu").activation is not read("gemma2").activation


def test_caps_are_off_where_null():
    config = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attention_cap, config.final_cap) == (0, 0)
    config = read("gemma2", "attn_logit_softcapping", "final_logit_softcapping")
    assert (config.attention_cap, config.final_cap) == (50, 30)


def test_windows_of_layers():
    assert read("gemma2").windows == read("gemma2", "layer_types").windows == (8, 0, 8, 0)
    assert read("gemma2", sliding_window=None).windows == (0, 0, 0, 0)
    assert read("gemma3_text_legacy").windows == (8, 8, 8, 8, 8, 0)
    assert read("gemma3_text_legacy", sliding_window_pattern=2).windows == (8, 0, 8, 0, 8, 0)
    changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert read("qwen2", **changes).windows == (0, 16)
    assert read("qwen2", **changes | {"use_sliding_window": False}).windows == (0, 0)
    changes |= {"layer_types": None, "max_window_layers": 2}
    assert read("qwen2_moe", **changes).windows == (16, 0, 0)
    assert read("starcoder2").window == 8
    assert read("starcoder2", "sliding_window").window == 0


def test_every_fourth_layer_is_without_rope():
    assert read("smollm3", "no_rope_layers").with_rope == (True, True, True, False)
    assert read("smollm3", no_rope_layers=[0, 1, 1, 1]).with_rope == (False, True, True, True)


def test_which_layers_have_experts():
    assert read("qwen3_moe").dense == {1}
    assert read("qwen3_moe", mlp_only_layers=None, decoder_sparse_step=3).dense == {0, 1}
    assert read("qwen3_moe", "num_local_experts", num_experts=4).experts.count == 4


def test_ropes_of_both_layouts():
    new = read("gemma3_text_legacy", rope_parameters={
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}})
    old = read("gemma3_text_legacy")
    assert (new.rope, new.local_rope) == (old.rope, old.local_rope)
    old = read("gpt_neox", "rope_parameters", rotary_pct=0.25, rotary_emb_base=10000)
    assert old.rope == read("gpt_neox").rope == Rope(10000.0, part=0.25)


# ---- rope --------------------------------------------------------------------------------------


def test_longrope_scales_by_the_growth_of_the_context():
    config = read("phi3_longrope")
    assert config.growth_limit == 32
    assert config.rope.amplitude == pytest.approx((1 + numpy.log(4) / numpy.log(32)) ** 0.5)
    plain = Rope(10000.0).inverse_frequencies(16)
    factors = json.loads((GOLDENS / "phi3_longrope" / "config.json").read_text())["rope_parameters"]
    numpy.testing.assert_allclose(
        config.long_rope.inverse_frequencies(16), plain / factors["long_factor"], rtol=1e-6)
    section = {"type": "su", **{key: factors[key] for key in ("long_factor", "short_factor")}}
    assert read("phi3_longrope", "rope_parameters", rope_scaling=section) == config


def test_yarn_frequencies():
    """The values are transformers' for this config."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    values = {"rope_theta": 10000.0, "rope_scaling": scaling}
    rope = read_rope(ConfigFile(Path("config.json"), values), 1024)
    assert rope.amplitude == pytest.approx(1.1386294361119891)
    numpy.testing.assert_allclose(rope.inverse_frequencies(16), YARN, rtol=1e-6)


@pytest.mark.parametrize("changes", [
    {"factor": 0}, {"beta_fast": 0.5}, {"truncate": False}, {"attention_factor": -1},
])
def test_bad_yarn(changes):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    values = {"rope_scaling": scaling | changes}
    with pytest.raises(ModelError, match=r"config\.json: '"):
        read_rope(ConfigFile(Path("config.json"), values), 1024)
